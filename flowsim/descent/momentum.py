"""The moving frame: averages of gradients that are kept in units of the gradient.

With h = ∇Λ the true gradient is g = −e^{−Λ}h, which no float holds late in a run. An average m of
gradients is kept as m e^{−S}, with S the logarithm of a unit that follows ‖g‖_*: it rises to it at
once, and falls no faster than the average forgets. So what is kept neither under- nor overflows,
and a scale of the loss changes nothing.

Momentum: what a rule follows in the place of the gradient.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from flowsim.checks import require_share
from flowsim.descent.rule import Memory
from flowsim.motion.state import State
from flowsim.numerics.shapes import PerTrajectory, Rows
from flowsim.problems.objective import Objective


@dataclass(frozen=True)
class Frame:
    """S ``(B,)``, and the factors ``(B, 1)`` that bring what is kept and h to its units; the second
    in two parts where it would overflow."""

    log_unit: PerTrajectory
    keep: Float[Tensor, "B 1"]
    add: Float[Tensor, "B 1"]
    rest: Float[Tensor, "B 1"] | None

    @staticmethod
    def follow(objective: Objective, state: State, forget: float, head: float = 0.0) -> "Frame":
        """The frame that the gradient at ``state`` leads to; ``forget`` is what an average keeps of
        itself in a step, and ``head`` the logarithm of the largest ‖g‖_* in its units."""
        lam = state.readings["lam"]
        before = state.memory["frame"]
        scale = -lam if objective.logarithmic else torch.zeros_like(lam)  # of g over h
        newest = head - torch.log(state.memory["dual_norm"])
        oldest = torch.full_like(lam, torch.inf)
        if forget > 0:
            oldest = (scale - before) - math.log(forget)
        log_add = torch.minimum(newest, oldest)
        log_unit = scale - log_add
        log_add = torch.where(log_add < torch.inf, log_add, 0.0)  # no gradient so far
        log_keep = (before - scale) + log_add
        factors = _factors(log_keep, log_add, state.w)
        return Frame(log_unit, *factors)

    def gradient(self, state: State) -> Rows:
        """−g in the frame's units."""
        g = self.add * state.memory["ascent"]
        if self.rest is not None:
            g.mul_(self.rest)
        return g

    def inside(self, value: float, power: int) -> PerTrajectory:
        """``value``, which is in units of ‖g‖_* to this power, in those of the frame."""
        log = math.log(value) if value > 0 else -math.inf
        unit = power * self.log_unit
        return torch.exp(log - unit)


def _factors(
    log_keep: PerTrajectory, log_add: PerTrajectory, w: Rows
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``keep``, ``add`` and ``rest`` of a `Frame` in the numbers of the weights."""
    numbers = torch.finfo(w.dtype)
    largest = 0.9 * math.log(numbers.max)
    excess = (log_add - largest).clamp_min(0.0)
    logs = torch.stack([log_keep, log_add - excess, excess])
    factors = torch.exp(logs).to(w)
    keep, add, rest = factors[..., None]
    overflows = bool((excess > 0).any())
    return keep, add, rest if overflows else None


def no_frame(state: State) -> PerTrajectory:
    """S before the first gradient."""
    return torch.full_like(state.step_size, -torch.inf)


@dataclass(frozen=True)
class Momentum(ABC):
    """An average m of gradients, and what is followed; ``beta`` is what m keeps of itself in a
    step."""

    beta: float = 0.9

    def __post_init__(self) -> None:
        require_share(type(self).__name__, beta=self.beta)

    @property
    def gain(self) -> float:
        """What a constant gradient is multiplied by in the long run: steps of η advance time by
        η·gain."""
        return 1 / (1 - self.beta)

    @abstractmethod
    def update(self, kept: Rows, g: Rows) -> tuple[Rows, Rows]:
        """m from ``kept`` = βm and the gradient, and what is followed."""

    def blank(self, state: State) -> Memory:
        """What is remembered before the first step."""
        m = torch.zeros_like(state.w)
        return {"momentum": m, "frame": no_frame(state)}

    def followed(self, objective: Objective, state: State) -> tuple[Rows, Memory]:
        """What is followed after the gradient at ``state``, in units of the frame, and what is
        remembered; both of ascent, −g."""
        frame = Frame.follow(objective, state, self.beta)
        m = state.memory["momentum"]
        kept = self.beta * frame.keep * m
        g = frame.gradient(state)
        m, followed = self.update(kept, g)
        return followed, {"momentum": m, "frame": frame.log_unit}


@dataclass(frozen=True)
class HeavyBall(Momentum):
    """m ← βm + g, and m is followed (Polyak 1964). The gain is 1/(1 − β)."""

    def update(self, kept: Rows, g: Rows) -> tuple[Rows, Rows]:
        m = kept + g
        return m, m


@dataclass(frozen=True)
class Nesterov(Momentum):
    """m ← βm + g, and g + βm is followed (Nesterov 1983; as in Sutskever et al. 2013). The gain is
    1/(1 − β)."""

    def update(self, kept: Rows, g: Rows) -> tuple[Rows, Rows]:
        m = kept + g
        followed = torch.add(g, m, alpha=self.beta)
        return m, followed


@dataclass(frozen=True)
class Average(Momentum):
    """m ← βm + (1 − β)g, from m = 0, and m is followed. The gain is 1."""

    @property
    def gain(self) -> float:
        return 1.0

    def update(self, kept: Rows, g: Rows) -> tuple[Rows, Rows]:
        fresh = 1 - self.beta
        m = torch.add(kept, g, alpha=fresh)
        return m, m
