"""The moving frame: averages of gradients that are kept in units of the gradient.

With h = ∇Λ the true gradient is g = −e^{−Λ}h, which no float holds late in a run. An average m of
gradients is kept as m e^{−S}, with S the logarithm of a unit that follows ‖g‖_*: it rises to it at
once, and falls no faster than the average forgets. So what is kept neither under- nor overflows,
and a scale of the loss changes nothing.

Momentum: what a rule follows in the place of the gradient.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from flowsim.checks import require_share
from flowsim.motion.state import State
from flowsim.problems.objective import Objective


@dataclass(frozen=True)
class Frame:
    """S ``(B,)``, and the factors ``(B, 1)`` that bring what is kept and h to its units; the second
    in two parts where it would overflow."""

    log_unit: Float[Tensor, " B"]
    keep: Float[Tensor, "B 1"]
    add: Float[Tensor, "B 1"]
    rest: Float[Tensor, "B 1"] | None

    @staticmethod
    def follow(objective: Objective, state: State, forget: float, head: float = 0.0) -> "Frame":
        """The frame that the gradient at ``state`` leads to; ``forget`` is what an average keeps of
        itself in a step, and ``head`` the logarithm of the largest ‖g‖_* in its units."""
        lam, before = state.readings["lam"], state.memory["frame"]
        scale = -lam if objective.logarithmic else torch.zeros_like(lam)  # of g over h
        newest = head - torch.log(state.memory["dual"])
        oldest = (
            (scale - before) - math.log(forget) if forget > 0 else torch.full_like(lam, torch.inf)
        )
        log_add = torch.minimum(newest, oldest)
        log_unit = scale - log_add
        log_add = torch.where(log_add < torch.inf, log_add, 0.0)  # no gradient so far
        most = 0.9 * math.log(torch.finfo(state.w.dtype).max)
        excess = (log_add - most).clamp_min(0.0)
        logs = torch.stack([(before - scale) + log_add, log_add - excess, excess])
        factors = torch.exp(logs).to(state.w)[..., None]
        return Frame(
            log_unit, factors[0], factors[1], factors[2] if bool((excess > 0).any()) else None
        )

    def gradient(self, state: State) -> Float[Tensor, "B P"]:
        """−g in the frame's units."""
        g = self.add * state.memory["ascent"]
        return g if self.rest is None else g.mul_(self.rest)


def no_frame(state: State) -> Float[Tensor, " B"]:
    """S before the first gradient."""
    return torch.full_like(state.step_size, -torch.inf)


class Momentum(Protocol):
    """An average m of gradients, and what is followed."""

    @property
    def beta(self) -> float:
        """What m keeps of itself in a step."""

    @property
    def gain(self) -> float:
        """What a constant gradient is multiplied by in the long run: steps of η advance time by
        η·gain."""

    def update(self, state: State, frame: Frame) -> tuple[Tensor, Tensor]:
        """m after the gradient at ``state``, and what is followed, in units of the frame; both of
        ascent, −g."""


@dataclass(frozen=True)
class HeavyBall:
    """m ← βm + g, and m is followed (Polyak 1964). The gain is 1/(1 − β)."""

    beta: float = 0.9

    def __post_init__(self) -> None:
        require_share("HeavyBall", beta=self.beta)

    @property
    def gain(self) -> float:
        return 1 / (1 - self.beta)

    def update(self, state: State, frame: Frame) -> tuple[Tensor, Tensor]:
        m = self.beta * frame.keep * state.memory["momentum"] + frame.gradient(state)
        return m, m


@dataclass(frozen=True)
class Nesterov:
    """m ← βm + g, and g + βm is followed (Nesterov 1983; as in Sutskever et al. 2013). The gain is
    1/(1 − β)."""

    beta: float = 0.9

    def __post_init__(self) -> None:
        require_share("Nesterov", beta=self.beta)

    @property
    def gain(self) -> float:
        return 1 / (1 - self.beta)

    def update(self, state: State, frame: Frame) -> tuple[Tensor, Tensor]:
        g = frame.gradient(state)
        m = self.beta * frame.keep * state.memory["momentum"] + g
        return m, torch.add(g, m, alpha=self.beta)


@dataclass(frozen=True)
class Average:
    """m ← βm + (1 − β)g, from m = 0, and m is followed. The gain is 1."""

    beta: float = 0.9

    def __post_init__(self) -> None:
        require_share("Average", beta=self.beta)

    @property
    def gain(self) -> float:
        return 1.0

    def update(self, state: State, frame: Frame) -> tuple[Tensor, Tensor]:
        kept = self.beta * frame.keep * state.memory["momentum"]
        m = torch.add(kept, frame.gradient(state), alpha=1 - self.beta)
        return m, m


def require_momentum(rule: str, momentum: Momentum | None) -> None:
    """Raise where ``momentum`` is neither None nor one of them."""
    if momentum is not None and (isinstance(momentum, type) or not hasattr(momentum, "update")):
        raise TypeError(
            f"{rule}: got momentum={momentum!r}, expected None or one of its kinds, try flowsim.HeavyBall(0.9)"
        )


def blank_momentum(momentum: Momentum | None, state: State) -> dict[str, Tensor]:
    """What a rule with this momentum remembers before its first step."""
    return (
        {}
        if momentum is None
        else {"momentum": torch.zeros_like(state.w), "frame": no_frame(state)}
    )


def remembered(momentum: Momentum, state: State, frame: Frame) -> tuple[dict[str, Tensor], Tensor]:
    """What a rule with this momentum remembers after the gradient at ``state``, and what it
    follows."""
    m, followed = momentum.update(state, frame)
    return {"momentum": m, "frame": frame.log_unit}, followed
