"""Experiments: a frozen description, read from a TOML file, that fully determines a run.

This is where the words of a configuration become objects; everything else in flowsim passes the
objects themselves."""

import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
import tomli_w
import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor

from flowsim.diagnostics import observers as diagnostics
from flowsim.experiment.sections import AnyRule, Dissipation, Flow, Part, Until, Whole
from flowsim.motion.rule import Rule
from flowsim.motion.state import Status
from flowsim.nets import activations
from flowsim.nets.activations import leaky_relu
from flowsim.nets.frozen import Frozen
from flowsim.nets.function import Diagonal
from flowsim.nets.mlp import MLP
from flowsim.nets.net import Net
from flowsim.problems import data, losses
from flowsim.problems.data import Data
from flowsim.problems.problem import Problem
from flowsim.run.simulation import simulate
from flowsim.run.trajectory import Trajectory
from flowsim.study.comparison import Comparison, compare

# --------------------------------------------------------------------------------------------------
# Data, net, loss
# --------------------------------------------------------------------------------------------------


class Digits(Part):
    kind: Literal["digits"]
    classes: list[int] = Field([3, 6])
    n: Whole = 100

    def draw(self, seeds: list[int]) -> tuple[Data, Data | None]:
        return (
            data.digits(self.classes, self.n, seed=seeds),
            data.digits(self.classes, self.n, seed=seeds, part="test"),
        )


class Gaussian(Part):
    kind: Literal["gaussian_separable"]
    n: Whole = 100
    d: Whole = 20
    margin: Annotated[float, Field(ge=0)] = 0.1

    def draw(self, seeds: list[int]) -> tuple[Data, Data | None]:
        return data.gaussian_separable(self.n, self.d, margin=self.margin, seed=seeds), None


class TeacherStudent(Part):
    kind: Literal["teacher_student"]
    n: Whole = 250
    d: Whole = 232
    teacher_width: Whole = 64
    active: Whole = 3
    test: Annotated[int, Field(ge=0)] = 1000

    def draw(self, seeds: list[int]) -> tuple[Data, Data | None]:
        both = data.teacher_student(
            self.n + self.test,
            self.d,
            teacher_width=self.teacher_width,
            active=self.active,
            seed=seeds,
        )
        train = Data(both.x[:, : self.n], both.y[:, : self.n])
        return train, Data(both.x[:, self.n :], both.y[:, self.n :]) if self.test else None


class Arrays(Part):
    """Arrays ``X (N, d)`` and ``y (N,)`` of an .npz file, shared by all seeds."""

    kind: Literal["npz"]
    path: Path

    def draw(self, seeds: list[int]) -> tuple[Data, Data | None]:
        with np.load(self.path, allow_pickle=False) as arrays:
            if not {"X", "y"} <= set(arrays.files):
                raise ValueError(
                    f"{self.path}: got arrays {arrays.files}, expected X (N, d) and y (N,)"
                )
            return Data(torch.from_numpy(arrays["X"]), torch.from_numpy(arrays["y"])), None


class FeedForward(Part):
    kind: Literal["mlp"]
    hidden: list[Whole] = Field([128])
    activation: Literal["relu", "leaky_relu", "squared_relu", "identity", "square"] = "relu"
    slope: Annotated[float, Field(ge=0, le=1)] = 0.01
    frozen: list[str] = Field([])

    def build(self, inputs: int, outputs: int) -> Net:
        chosen = (
            leaky_relu(self.slope)
            if self.activation == "leaky_relu"
            else getattr(activations, self.activation)
        )
        return MLP([inputs, *self.hidden, outputs], activation=chosen)


class DiagonalNet(Part):
    kind: Literal["diagonal"]
    depth: Whole = 2
    signed: bool = False
    frozen: list[str] = Field([])

    def build(self, inputs: int, outputs: int) -> Net:
        return Diagonal(inputs, self.depth, signed=self.signed)


class Init(Part):
    scale: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1


# --------------------------------------------------------------------------------------------------
# The experiment
# --------------------------------------------------------------------------------------------------


class Experiment(Part):
    """Data, net, loss and start, and the rules to run on them, all from the same weights.

    >>> Experiment.read("flowsim/experiment/demo.toml").name
    'demo'
    """

    name: str
    seeds: list[int] = Field([0], min_length=1)
    loss: Literal["exponential", "logistic", "cross_entropy", "pairwise_exponential", "squared"] = (
        "exponential"
    )
    device: str = "cpu"
    dtype: Literal["float64", "float32"] = "float64"
    threads: Whole | None = None
    data: Annotated[Digits | Gaussian | TeacherStudent | Arrays, Field(discriminator="kind")]
    net: Annotated[FeedForward | DiagonalNet, Field(discriminator="kind")]
    init: Init = Init()
    until: Until
    rules: Annotated[list[AnyRule], Field(min_length=1)]

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds: got {self.seeds}, expected different ones")
        return self

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """The experiment of a TOML file; every error of the file is reported at once, each with its
        place."""
        try:
            return cls.model_validate(tomllib.loads(Path(path).read_text(encoding="utf-8")))
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{path}: not a TOML file: {error}") from None
        except ValidationError as error:
            raise ValueError(f"{path}:\n" + "\n".join(_complaints(error))) from None

    def write(self, path: str | Path) -> None:
        """The complete configuration, defaults included, as a TOML file."""
        Path(path).write_text(
            tomli_w.dumps(self.model_dump(mode="json", exclude_none=True)), encoding="utf-8"
        )

    def problem(self) -> tuple[Problem, Data | None, Tensor]:
        """The problem, the test set where there is one, and the weights that every rule starts
        from."""
        train, test = self.data.draw(self.seeds)
        outputs = 1 if self.loss in ("exponential", "logistic") else self._outputs(train.y)
        net: Net = self.net.build(train.x.shape[-1], outputs)
        w = net.init(self.seeds, self.init.scale)
        if self.net.frozen:
            _require_blocks(self.net.frozen, net)
            values = {
                block.name: block.of(w) for block in net.layout if block.name in self.net.frozen
            }
            w = torch.cat([w[:, b.slice] for b in net.layout if b.name not in values], 1)
            net = Frozen(net, values)
        w = w.to(device=self.device, dtype=getattr(torch, self.dtype))
        return Problem(net, *train, getattr(losses, self.loss)), test, w

    def _outputs(self, y: Tensor) -> int:
        return 1 if self.loss == "squared" else int(y.max()) + 1

    def run(
        self, directory: str | Path | None = None, *, progress: bool = False
    ) -> dict[str, Trajectory]:
        """Run every rule; with a directory, the configuration and each run, as soon as it ends, are
        saved there.

        ``threads``, where given, is set for the process: small nets run fastest on one.
        After Ctrl-C the interrupted run is kept and the rules after it are left out.
        """
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        problem, test, w = self.problem()
        observe = diagnostics.standard(problem, test)
        runs: dict[str, Trajectory] = {}
        rules = self._rules(problem)
        for rule in rules.values():
            rule.start(problem.like(w), w)  # what a rule refuses is said before anything runs
        if directory is not None:
            Path(directory).mkdir(parents=True, exist_ok=True)
            self.write(Path(directory) / "config.toml")
        for part, (label, rule) in zip(self.rules, rules.items(), strict=True):
            runs[label] = run = simulate(
                problem,
                rule,
                w,
                until=(part.until or self.until).schedule(),
                observe=observe,
                max_steps=part.max_steps,
                progress=progress,
                directory=None if directory is None else Path(directory) / slug(label),
            )
            if Status.INTERRUPTED in run.statuses:
                break
        return runs

    def compare(self, directory: str | Path | None = None, *, progress: bool = False) -> Comparison:
        """Run the first flow among the rules and hold all others against it, as `flowsim.compare`
        does.

        With a directory, all that `run` saves is there as well, and ``distances.csv``. Where rules
        have an ``until`` of their own, the flow goes as far as the furthest of them."""
        flow = next((part for part in self.rules if isinstance(part, Flow | Dissipation)), None)
        others = [part for part in self.rules if part is not flow]
        if flow is None or not others:
            raise ValueError(
                f"compare: got rules of kind {', '.join(part.kind for part in self.rules)}, expected a flow and one "
                'other at least; try kind = "flow"'
            )
        problem, test, w = self.problem()
        self._rules(problem)
        reference = flow.rule(problem.layout)
        reference.start(problem.like(w), w)
        runs = self.model_copy(update={"rules": others}).run(directory, progress=progress)
        found = compare(
            problem,
            reference,
            runs,
            w,
            until=(flow.until or self.until).schedule(),
            observe=diagnostics.standard(problem, test),
            max_steps=flow.max_steps,
            progress=progress,
        )
        found = replace(found, flow=replace(found.flow, label=flow.label or reference.label))
        if directory is not None:
            self.write(Path(directory) / "config.toml")
            found.flow.save(Path(directory) / slug(found.flow.label))
            found.write(Path(directory) / "distances.csv")
        return found

    def _rules(self, problem: Problem) -> dict[str, Rule]:
        """The rules by label."""
        rules: dict[str, Rule] = {}
        for part in self.rules:
            rule = part.rule(problem.layout)
            label = part.label or rule.label
            if label in rules:
                raise ValueError(
                    f"rules: two rules are labelled {label!r}; give one of them a label of its own"
                )
            rules[label] = rule
        return rules


def _require_blocks(names: list[str], net: Net) -> None:
    known = [block.name for block in net.layout]
    if not set(names) < set(known):
        raise ValueError(f"net.frozen: got {names}, expected some, but not all, of {known}")


def _complaints(error: ValidationError) -> list[str]:
    lines = []
    for item in error.errors():
        place = ".".join(str(part) for part in item["loc"]) or "top level"
        got = "" if item["type"] == "missing" else f" (got {item['input']!r})"
        lines.append(f"  {place}: {item['msg']}{got}")
    return lines


def slug(label: str) -> str:
    """A label as a file name.

    >>> slug("ℓ∞ small steps, ΔΛ = 0.1")
    'linf-small-steps-dlam-0.1'
    """
    plain = label.replace("ℓ", "l").replace("∞", "inf").replace("ΔΛ", "dlam")
    return re.sub(r"[^A-Za-z0-9.]+", "-", plain).strip("-").lower()
