"""What a minimising movement is, and the sums of exponentials that stand for losses to find it.

A movement of arclength ε from w is

    w + εv,   v ∈ argmin { 𝓛(w + εv) : ‖v‖ ≤ 1 },

so that v is a steepest direction *at the end*: it slides along ties (a gradient of deficient rank,
equal singular values, zero coordinates) and sits on a stiff softmax without being told (Ambrosio,
Gigli and Savaré 2005)."""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from flowsim.norms.norm import Norm
from flowsim.numerics.shapes import Row
from flowsim.problems.losses import Loss
from flowsim.problems.readings import Pairwise, Signed, SoftPairwise
from flowsim.problems.tails import EXPONENTIAL

_Vector = Row  # in the place of the weights


@dataclass(frozen=True)
class Guess:
    """What a movement may start from: the direction and the dual variables of one like it, and how
    many kinks have been released so far."""

    v: _Vector
    dual_variables: Float[Tensor, " n"]
    releases: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Movement(Guess):
    """Where a movement ends, its direction ``v``, the dual variables that prove it to the relative
    ``gap`` (a share of ε‖h‖_*), Newton steps taken, and Λ and h = ∇Λ at the end.

    On kinks h is the element of Clarke's gradient for which v is steepest, and the dual variables
    are its multipliers; ``releases`` counts the kinks that have slid and begun to repel."""

    w: _Vector
    gap: float
    lam: Float[Tensor, ""]
    ascent: _Vector
    newton: float = 0.0


class Mover(Protocol):
    """Movements of one trajectory. One with a gap above ``trusted`` is none."""

    norm: Norm
    trusted: ClassVar[float]

    @property
    def unknowns(self) -> int:
        """The number of dual variables."""

    def aim(self, rtol: float, atol: float, w: _Vector, eps: float) -> float:
        """The gap that a movement of a step with these tolerances needs."""

    def move(self, w: _Vector, eps: float, guess: Guess | None, tol: float) -> Movement:
        """The movement of arclength ``eps`` from w, to a relative duality gap of ``tol``."""


def exact(loss: Loss) -> bool:
    """Whether `touching` gives the loss itself."""
    return loss.tail is EXPONENTIAL and not isinstance(loss.reading, SoftPairwise)


def linear_reading(loss: Loss) -> Signed | Pairwise:
    """The numbers of which `touching` is a sum of exponentials; they are linear in the outputs."""
    reading = Pairwise() if isinstance(loss.reading, SoftPairwise) else loss.reading
    if isinstance(reading, Signed | Pairwise) and loss.tail.decreasing:
        return reading
    raise ValueError(
        f"MinimisingMovement does not know the loss {loss.name}; try flowsim.exponential"
    )


def touching(
    loss: Loss, outputs: Float[Tensor, "1 N C"], y: Tensor
) -> tuple[Float[Tensor, " R"], Float[Tensor, " R"]]:
    """Scales c and offsets b for which Σ exp(−b − c(q' − q)) touches 𝓛 to second order at these
    outputs, or lies above it, with q from `linear_reading`."""
    q = loss.reading.read(outputs, y)[0]
    log_slope = loss.tail.log_slope(q)
    if isinstance(loss.reading, SoftPairwise):
        # log(1 + Σe^(−s)) lies below its tangent in Σe^(−s), which is a sum of exponentials with
        # its gradient
        gaps = Pairwise().read(outputs, y)[0][0]
        excess = (log_slope + q)[0]
        return torch.ones_like(gaps), gaps - excess.repeat_interleave(len(gaps) // len(excess))
    # a·e^(−c(q' − q)) has the slope and the curvature of the tail
    c = loss.tail.fall(q)[0].clamp_min(0.05)
    return c, torch.log(c) - log_slope[0]
