"""Any optimiser of torch as a rule, for comparison."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flowsim.checks import require_positive
from flowsim.descent.rule import Discrete, Memory, Step, take
from flowsim.layout import Layout
from flowsim.motion.state import State
from flowsim.norms.norm import Norm, require_norm
from flowsim.norms.vector import L2
from flowsim.problems.objective import Objective


@dataclass(frozen=True, repr=False)
class TorchOptimiser(Discrete):
    """``make(parameters)`` returns a ``torch.optim.Optimizer`` of this list of parameters. It is
    given the gradient of 𝓛, the **sum** loss, itself: where that underflows it sees zeros, as it
    would outside of flowsim.

    Each trajectory has an optimiser of its own, with its flat weights as the one parameter, or with
    ``blocks`` a parameter for each block of the layout, in its shape. What the optimiser remembers
    becomes part of the state, and has to be tensors; one that keeps lists, such as LBFGS, is
    refused.

    Lengths are in ``norm``. ``lr``, where given, is the time that each step takes; without it t is
    the time that the steepest flow in this norm takes for the path.

    >>> TorchOptimiser(lambda parameters: torch.optim.SGD(parameters, lr=0.1), lr=0.1).label
    'SGD of torch'
    """

    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    lr: float | None = None
    norm: Norm = field(default_factory=L2)
    blocks: bool = False
    name: str = ""

    memoryless = False

    def __post_init__(self) -> None:
        require_norm("TorchOptimiser", self.norm)
        if self.lr is not None:
            require_positive("TorchOptimiser", lr=self.lr)
        made = None
        if callable(self.make):
            made = self.make([nn.Parameter(torch.zeros(1, 1))])
        if not isinstance(made, torch.optim.Optimizer):
            raise TypeError(
                f"TorchOptimiser: got {self.make!r}, expected a function from a list of parameters "
                "to an optimiser, try lambda parameters: torch.optim.SGD(parameters, lr=0.1)"
            )
        object.__setattr__(self, "name", self.name or f"{type(made).__name__} of torch")

    @property
    def label(self) -> str:
        return self.name

    @property
    def kind(self) -> str:
        return f"TorchOptimiser {self.name}"

    def step(self, problem: Objective, norm: Norm, state: State) -> State:
        ends: list[Tensor] = []
        kept: list[Memory] = []
        for row in torch.arange(len(state.w), device=state.w.device).split(1):
            w, remembered = self._stepped(problem, state.select(row))
            ends.append(w)
            kept.append(remembered)
        move = torch.cat(ends) - state.w
        own = {name: torch.stack([one[name] for one in kept]) for name in kept[0]}
        log_time = None
        if self.lr is not None:
            time = torch.full_like(state.step_size, self.lr)
            log_time = time.log()
        step = Step(move, log_time=log_time)
        return take(problem, norm, state, step, own)

    def _stepped(self, problem: Objective, state: State) -> tuple[Tensor, Memory]:
        """The weights after a step of the optimiser of one trajectory, and what it remembers."""
        lam = state.readings["lam"]
        ascent = state.memory["ascent"]
        scale = torch.exp(-lam) if problem.logarithmic else torch.ones_like(lam)
        gradient = -scale.to(ascent)[:, None] * ascent
        parameters = self._parameters(problem.layout, state.w)
        parts = self._parts(problem.layout, gradient)
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part[0].clone()
        optimiser = self.make(parameters)
        if float(state.memory["age"]) > 0:
            _recall(optimiser, parameters, state.memory)
        optimiser.step()
        weights = [p.detach().flatten() for p in parameters]
        w = torch.cat(weights)
        return w[None], _remembered(optimiser, parameters)

    def _parts(self, layout: Layout, w: Tensor) -> list[Tensor]:
        if not self.blocks:
            return [w]
        return [block.of(w) for block in layout]

    def _parameters(self, layout: Layout, w: Tensor) -> list[nn.Parameter]:
        parts = self._parts(layout, w)
        return [nn.Parameter(part[0].clone()) for part in parts]

    def blank(self, problem: Objective, state: State) -> Memory:
        """Room for what the optimiser remembers, which a step of the first trajectory tells."""
        parameters = self._parameters(problem.layout, state.w[:1])
        optimiser = self.make(parameters)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        try:
            optimiser.step()
        except TypeError as error:
            raise ValueError(
                f"TorchOptimiser: {self.name} cannot step from a gradient alone ({error})"
            ) from None
        found = _remembered(optimiser, parameters)
        B = len(state.w)
        return {name: value.new_zeros(B, *value.shape) for name, value in found.items()}


_PREFIX = "of parameter "


def _recall(
    optimiser: torch.optim.Optimizer, parameters: list[nn.Parameter], memory: Memory
) -> None:
    """Give an optimiser what it has remembered."""
    for name, value in memory.items():
        if name.startswith(_PREFIX):
            place, _, key = name.removeprefix(_PREFIX).partition(" ")
            parameter = parameters[int(place)]
            optimiser.state[parameter][key] = value[0].clone()


def _remembered(optimiser: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> Memory:
    """What an optimiser remembers, by parameter and name."""
    found: Memory = {}
    for i, parameter in enumerate(parameters):
        kept: dict[str, Any] = optimiser.state[parameter]
        for key, value in kept.items():
            if isinstance(value, Tensor):
                found[f"{_PREFIX}{i} {key}"] = value
            elif value is not None:
                raise ValueError(
                    f"TorchOptimiser: {type(optimiser).__name__} remembers {key!r} as a "
                    f"{type(value).__name__}, expected tensors only, try another optimiser"
                )
    return found
