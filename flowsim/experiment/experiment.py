"""Experiments: a frozen description, read from a TOML file, that fully determines a run.

This is where the words of a configuration become objects; everything else in flowsim passes the
objects themselves."""

import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, Self, TypeAlias

import numpy as np
import tomli_w
import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor

from flowsim.diagnostics.observers import standard
from flowsim.experiment.sections import (
    AnyRule,
    Count,
    Dissipation,
    Flow,
    Moving,
    NotNegative,
    Part,
    Until,
    Whole,
)
from flowsim.motion.clocks import SavePlan
from flowsim.motion.rule import Rule
from flowsim.motion.state import Status
from flowsim.nets import activations
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


Drawn: TypeAlias = tuple[Data, Data | None]  # the training set, and the test set where there is one


class Digits(Part):
    kind: Literal["digits"]
    classes: list[int] = Field([3, 6])
    n: Whole = 100

    def draw(self, seeds: list[int]) -> Drawn:
        return (
            data.digits(self.classes, self.n, seed=seeds),
            data.digits(self.classes, self.n, seed=seeds, part="test"),
        )


class Gaussian(Part):
    kind: Literal["gaussian_separable"]
    n: Whole = 100
    d: Whole = 20
    margin: NotNegative = 0.1

    def draw(self, seeds: list[int]) -> Drawn:
        return data.gaussian_separable(self.n, self.d, margin=self.margin, seed=seeds), None


class TeacherStudent(Part):
    kind: Literal["teacher_student"]
    n: Whole = 250
    d: Whole = 232
    teacher_width: Whole = 64
    active: Whole = 3
    test: Count = 1000

    def draw(self, seeds: list[int]) -> Drawn:
        n = self.n
        teacher = {"teacher_width": self.teacher_width, "active": self.active}
        x, y = data.teacher_student(n + self.test, self.d, seed=seeds, **teacher)
        test = Data(x[:, n:], y[:, n:]) if self.test else None
        return Data(x[:, :n], y[:, :n]), test


class Arrays(Part):
    """Arrays ``X (N, d)`` and ``y (N,)`` of an .npz file, shared by all seeds."""

    kind: Literal["npz"]
    path: Path

    def draw(self, seeds: list[int]) -> Drawn:
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
        activation = getattr(activations, self.activation)
        if self.activation == "leaky_relu":
            activation = activation(self.slope)
        return MLP([inputs, *self.hidden, outputs], activation=activation)


class DiagonalNet(Part):
    kind: Literal["diagonal"]
    depth: Whole = 2
    signed: bool = False
    frozen: list[str] = Field([])

    def build(self, inputs: int, outputs: int) -> Net:
        return Diagonal(inputs, self.depth, signed=self.signed)


class Init(Part):
    scale: NotNegative = 0.1


# --------------------------------------------------------------------------------------------------
# The experiment
# --------------------------------------------------------------------------------------------------


LossWord = Literal["exponential", "logistic", "cross_entropy", "pairwise_exponential", "squared"]


class Experiment(Part):
    """Data, net, loss and start, and the rules to run on them, all from the same weights.

    >>> Experiment.read("flowsim/experiment/demo.toml").name
    'demo'
    """

    name: str
    seeds: list[int] = Field([0], min_length=1)
    loss: LossWord = "exponential"
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
        settings = self.model_dump(mode="json", exclude_none=True)
        Path(path).write_text(tomli_w.dumps(settings), encoding="utf-8")

    def problem(self) -> tuple[Problem, Data | None, Tensor]:
        """The problem, the test set where there is one, and the weights that every rule starts
        from."""
        train, test = self.data.draw(self.seeds)
        one_output = self.loss in ("exponential", "logistic", "squared")
        outputs = 1 if one_output else int(train.y.max()) + 1
        net: Net = self.net.build(train.x.shape[-1], outputs)
        w = net.init(self.seeds, self.init.scale)
        if self.net.frozen:
            _require_blocks(self.net.frozen, net)
            frozen = [block for block in net.layout if block.name in self.net.frozen]
            free = [w[:, block.slice] for block in net.layout if block not in frozen]
            net = Frozen(net, {block.name: block.of(w) for block in frozen})
            w = torch.cat(free, 1)
        w = w.to(device=self.device, dtype=getattr(torch, self.dtype))
        return Problem(net, *train, getattr(losses, self.loss)), test, w

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
        rules = self._rules(problem, w)
        folder = self._folder(directory)
        runs: dict[str, Trajectory] = {}
        for part, (label, rule) in zip(self.rules, rules.items(), strict=True):
            runs[label] = run = simulate(
                problem,
                rule,
                w,
                until=self._plan(part),
                observe=standard(problem, test),
                max_steps=part.max_steps,
                progress=progress,
                directory=folder and folder / slug(label),
            )
            if Status.INTERRUPTED in run.statuses:
                break
        return runs

    def compare(self, directory: str | Path | None = None, *, progress: bool = False) -> Comparison:
        """Run the first flow among the rules and hold all others against it, as `flowsim.compare`
        does.

        With a directory, all that `run` saves is there as well, and ``distances.csv``. Where rules
        have an ``until`` of their own, the flow goes as far as the furthest of them."""
        first = next((part for part in self.rules if isinstance(part, Flow | Dissipation)), None)
        others = [part for part in self.rules if part is not first]
        if first is None or not others:
            kinds = ", ".join(part.kind for part in self.rules)
            raise ValueError(
                f"compare: got rules of kind {kinds}, expected a flow and one other at least; try "
                'kind = "flow"'
            )
        problem, test, w = self.problem()
        self._rules(problem, w)
        runs = self.model_copy(update={"rules": others}).run(directory, progress=progress)
        flow = first.rule(problem.layout)
        found = compare(
            problem,
            flow,
            runs,
            w,
            until=self._plan(first),
            observe=standard(problem, test),
            max_steps=first.max_steps,
            progress=progress,
        )
        label = first.label or flow.label
        found = replace(found, flow=replace(found.flow, label=label))
        if folder := self._folder(directory):
            found.flow.save(folder / slug(label))
            found.write(folder / "distances.csv")
        return found

    def _plan(self, rule: Moving) -> SavePlan:
        return (rule.until or self.until).plan()

    def _rules(self, problem: Problem, w: Tensor) -> dict[str, Rule]:
        """The rules by label; what one of them refuses is said before anything runs."""
        rules: dict[str, Rule] = {}
        for part in self.rules:
            rule = part.rule(problem.layout)
            label = part.label or rule.label
            if label in rules:
                raise ValueError(
                    f"rules: two rules are labelled {label!r}; give one of them a label of its own"
                )
            rule.start(problem.like(w), w)
            rules[label] = rule
        return rules

    def _folder(self, directory: str | Path | None) -> Path | None:
        """The directory of the results, with the configuration in it; None where none is asked
        for."""
        if directory is None:
            return None
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.write(folder / "config.toml")
        return folder


def _require_blocks(names: list[str], net: Net) -> None:
    known = [block.name for block in net.layout]
    if not set(names) < set(known):
        raise ValueError(f"net.frozen: got {names}, expected some, but not all, of {known}")


def _complaints(error: ValidationError) -> list[str]:
    """A line for each mistake, with its place."""
    lines = []
    for item in error.errors():
        place = ".".join(map(str, item["loc"])) or "top level"
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
