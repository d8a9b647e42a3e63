"""Momentum: what a rule follows in the place of the gradient."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flowsim.frames import Frame
from flowsim.schedules import require_share
from flowsim.state import State


class Momentum(Protocol):
    """An average m of gradients, and what is followed."""

    @property
    def beta(self) -> float:
        """What m keeps of itself in a step."""

    @property
    def gain(self) -> float:
        """What a constant gradient is multiplied by in the long run: steps of η advance time by η·gain."""

    def update(self, state: State, frame: Frame) -> tuple[Tensor, Tensor]:
        """m after the gradient at ``state``, and what is followed, in units of the frame; both of ascent, −g."""


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
    """m ← βm + g, and g + βm is followed (Nesterov 1983; as in Sutskever et al. 2013). The gain is 1/(1 − β)."""

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
