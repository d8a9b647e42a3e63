"""What a rule needs to know of what it descends."""

from typing import Protocol, Self

from jaxtyping import Float
from torch import Tensor

from flowsim.layout import Layout
from flowsim.numerics.shapes import PerTrajectory, Rows
from flowsim.problems.kinks import Hinges


class Objective(Protocol):
    """What a rule needs to know. Weights are ``(B, P)``, one row a trajectory.

    The level ``lam`` is what the flow raises: Λ = log(1/𝓛) for a Problem, −F for an objective F
    whose sign is not fixed. ``logarithmic`` tells which, because time depends on it: −∇𝓛 = e^{−Λ}∇Λ
    in the first case, −∇F = ∇(−F) in the second."""

    @property
    def size(self) -> int:
        """P, the number of weights."""

    @property
    def layout(self) -> Layout:
        """The blocks of the flat weights."""

    @property
    def degree(self) -> float:
        """Degree of homogeneity of the margins; 1 where there are none."""

    @property
    def kinks(self) -> bool:
        """Whether the gradient jumps somewhere."""

    @property
    def convex(self) -> bool:
        """Whether the loss is a convex function of the weights: a linear model, or a quadratic."""

    @property
    def logarithmic(self) -> bool:
        """Whether the level is the logarithm of one over a loss."""

    def lam(self, w: Rows) -> PerTrajectory:
        """The level."""

    def ascent(self, w: Rows) -> tuple[PerTrajectory, Rows]:
        """The level and its gradient h; at a kink, the element that autograd returns."""

    def hinges(self, w: Rows) -> Hinges:
        """The kinks of the level at these weights; called only where ``kinks`` is true."""

    def curvature(self, w: Rows) -> Float[Tensor, "B R P"]:
        """C with CᵀC = −∇²(level) up to a multiple of hhᵀ, and without the curvature of a net's
        outputs."""

    def check_weights(self, w: Tensor) -> None:
        """Raise where ``w`` cannot be weights of this objective."""

    def select(self, rows: Tensor) -> Self:
        """The objective of these trajectories."""

    def like(self, w: Tensor) -> Self:
        """The objective with its data on the device and in the dtype of ``w``."""
