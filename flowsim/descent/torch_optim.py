"""Any optimiser of torch as a rule, for comparison."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from flowsim.checks import require_positive
from flowsim.descent.rule import Step, begin, take
from flowsim.layout import Layout
from flowsim.motion.clocks import Target
from flowsim.motion.rule import advance_by_steps, pending
from flowsim.motion.state import State
from flowsim.norms.norm import Norm, require_norm
from flowsim.norms.vector import L2
from flowsim.problems.objective import Objective


@dataclass(frozen=True)
class TorchOptimiser:
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

    def __post_init__(self) -> None:
        require_norm("TorchOptimiser", self.norm)
        if self.lr is not None:
            require_positive("TorchOptimiser", lr=self.lr)
        made = self.make([nn.Parameter(torch.zeros(1, 1))]) if callable(self.make) else None
        if not isinstance(made, torch.optim.Optimizer):
            raise TypeError(
                f"TorchOptimiser: got {self.make!r}, expected a function from a list of parameters to an optimiser, "
                "try lambda parameters: torch.optim.SGD(parameters, lr=0.1)"
            )
        object.__setattr__(self, "name", self.name or f"{type(made).__name__} of torch")

    @property
    def label(self) -> str:
        return self.name

    def start(self, problem: Objective, w_or_state: Tensor | State) -> State:
        state = begin(problem, self.norm.bind(problem.layout), w_or_state)
        own = self._blank(problem.layout, state) | {"age": torch.zeros_like(state.step_size)}
        old = w_or_state.memory if isinstance(w_or_state, State) else {}
        if (
            own.keys() <= old.keys()
            and "dual" in old
            and all(own[name].shape == old[name].shape for name in own)
        ):
            own = {name: old[name] for name in own}
        return replace(state, memory=state.memory | own)

    def advance(self, problem: Objective, state: State, until: Target, budget: int) -> State:
        for row in pending(state, until).nonzero():
            one = self._advance_one(
                problem.select(row), state.select(row), until.select(row), budget
            )
            state = state.scatter(row, one)
        return state

    def _advance_one(self, problem: Objective, state: State, until: Target, budget: int) -> State:
        norm = self.norm.bind(problem.layout)
        parameters = self._parameters(problem.layout, state.w)
        optimiser = self.make(parameters)
        if float(state.memory["age"]) > 0:
            for name, value in state.memory.items():
                if name.startswith(_PREFIX):
                    place, _, key = name.removeprefix(_PREFIX).partition(" ")
                    optimiser.state[parameters[int(place)]][key] = value[0].clone()

        def step(part: Objective, local: State) -> State:
            w = self._stepped(optimiser, parameters, part, local)
            move = w - local.w
            length = norm.value(move).double()
            time = None if self.lr is None else torch.full_like(length, self.lr).log()
            return take(part, norm, local, Step(move, length, time))

        state = advance_by_steps(step, problem, state, until, budget)
        kept = {
            name: value[None].clone() for name, value in _remembered(optimiser, parameters).items()
        }
        return replace(state, memory=state.memory | kept)

    def _stepped(
        self,
        optimiser: torch.optim.Optimizer,
        parameters: list[nn.Parameter],
        problem: Objective,
        state: State,
    ) -> Tensor:
        """The weights after a step of the optimiser."""
        scale = (
            torch.exp(-state.readings["lam"])
            if problem.logarithmic
            else torch.ones_like(state.readings["lam"])
        )
        gradient = -scale.to(state.w)[:, None] * state.memory["ascent"]
        values, slopes = (self._parts(problem.layout, v) for v in (state.w, gradient))
        for parameter, value, slope in zip(parameters, values, slopes, strict=True):
            parameter.data, parameter.grad = value[0].clone(), slope[0].clone()
        optimiser.step()
        return torch.cat([p.detach().flatten() for p in parameters])[None]

    def _parts(self, layout: Layout, w: Tensor) -> list[Tensor]:
        return [block.of(w) for block in layout] if self.blocks else [w]

    def _parameters(self, layout: Layout, w: Tensor) -> list[nn.Parameter]:
        return [nn.Parameter(part[0].clone()) for part in self._parts(layout, w)]

    def _blank(self, layout: Layout, state: State) -> dict[str, Tensor]:
        """Room for what the optimiser remembers, which a step of the first trajectory tells."""
        parameters = self._parameters(layout, state.w[:1])
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
        return {
            name: torch.zeros_like(value).expand(len(state.w), *value.shape).clone()
            for name, value in found.items()
        }


_PREFIX = "of parameter "


def _remembered(
    optimiser: torch.optim.Optimizer, parameters: list[nn.Parameter]
) -> dict[str, Tensor]:
    """What an optimiser remembers, by parameter and name."""
    found: dict[str, Tensor] = {}
    for i, parameter in enumerate(parameters):
        kept: dict[str, Any] = optimiser.state[parameter]
        for key, value in kept.items():
            if value is not None and not isinstance(value, Tensor):
                raise ValueError(
                    f"TorchOptimiser: {type(optimiser).__name__} remembers {key!r} as a {type(value).__name__}, "
                    "expected tensors only, try another optimiser"
                )
            if value is not None:
                found[f"{_PREFIX}{i} {key}"] = value
    return found
