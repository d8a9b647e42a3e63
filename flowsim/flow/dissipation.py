"""Flows w' = −∇ψ*(g) of dissipation potentials that come from no norm, such as the limit of Adam
with ε > 0.

Their orbit depends on the scale of the loss, so that they are flows in time only, and no theorem on
margins is claimed. Each potential says where a gradient g = e^σ·a leads, and never forms g."""

import math
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from flowsim.checks import require_fraction, require_instance, require_positive
from flowsim.flow.explicit import DOPRI5
from flowsim.flow.field import Field, Sample, per_length
from flowsim.flow.steps import Method
from flowsim.motion.clocks import ARCLENGTH, Target
from flowsim.motion.rule import Labelled
from flowsim.motion.state import State, initial_state
from flowsim.norms.vector import L2
from flowsim.numerics.batched import dot
from flowsim.numerics.shapes import PerTrajectory, Rows
from flowsim.problems.objective import Objective


@runtime_checkable
class Potential(Protocol):
    """A convex dissipation potential ψ*, by its gradient."""

    @property
    def label(self) -> str:
        """What plots and tables call the flow."""

    def velocity(self, a: Rows, sigma: PerTrajectory) -> tuple[Tensor, Tensor]:
        """v ``(B, P)`` and the logarithm r ``(B,)`` of its unit: ∇ψ*(e^σ·a) = e^r·v."""


@dataclass(frozen=True)
class SmoothSign:
    """ψ*(g) = Σ |g_i| − ε log(1 + |g_i|/ε), w' = −g/(|g| + ε): Adam and RMSProp for small learning
    rates.

    Sign descent where |g| is far above ε, gradient descent with the step 1/ε far below.
    """

    eps: float = 1e-8

    def __post_init__(self) -> None:
        require_positive("SmoothSign", eps=self.eps)

    @property
    def label(self) -> str:
        return f"smooth sign flow, ε = {self.eps:g}"

    def velocity(self, a: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        c = math.log(self.eps) - sigma  # log ε in the units of a
        unit = c.clamp_min(0.0)
        small = _exp_of_rows(c - unit, a)
        large = _exp_of_rows(-unit, a)
        size = a.abs() * large + small
        return a / torch.where(size > 0, size, 1.0), -unit


@dataclass(frozen=True)
class Huber:
    """ψ*(g) = Σ g_i²/2 where |g_i| ≤ δ and δ|g_i| − δ²/2 beyond: w' = −g with every entry clipped
    at δ."""

    delta: float = 1.0

    def __post_init__(self) -> None:
        require_positive("Huber", delta=self.delta)

    @property
    def label(self) -> str:
        return f"Huber flow, δ = {self.delta:g}"

    def velocity(self, a: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        c = math.log(self.delta) - sigma  # log δ in the units of a
        unit = c.clamp_max(0.0)
        bound = _exp_of_rows(c - unit, a)
        scaled = a * _exp_of_rows(-unit, a)
        return scaled.clamp(-bound, bound), sigma + unit


@dataclass(frozen=True)
class Clipping:
    """w' = −g·min(1, τ/‖g‖₂), gradient clipping: the orbit of gradient flow at another speed."""

    threshold: float = 1.0

    def __post_init__(self) -> None:
        require_positive("Clipping", threshold=self.threshold)

    @property
    def label(self) -> str:
        return f"clipped gradient flow, τ = {self.threshold:g}"

    def velocity(self, a: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        size = L2().value(a).double()
        log_bound = math.log(self.threshold) - torch.log(size)
        return a, torch.minimum(sigma, log_bound)


def _exp_of_rows(logs: PerTrajectory, a: Rows) -> Float[Tensor, "B 1"]:
    """The exponential of one logarithm for each row of ``a``."""
    return torch.exp(logs).to(a)[:, None]


@dataclass(frozen=True)
class _PotentialField(Field):
    """The flow of a potential by the ℓ2 arclength, which holds no time that could overflow."""

    potential: Potential = field(default_factory=SmoothSign)

    def __call__(self, objective: Objective, w: Tensor) -> Sample:
        lam, h = objective.ascent(w)
        lam = lam.double()
        log_loss = -lam if objective.logarithmic else torch.zeros_like(lam)
        v, log_unit = self.potential.velocity(h, log_loss)
        size = self.norm.value(v).double()
        log_speed = torch.log(size) + log_unit
        u = self.norm.steepest(v)
        unit = torch.ones_like(lam)
        length = self.norm.value(w).double()
        rates = {
            "arclength": unit,
            "relative": per_length(unit, length),
            "dissipated": dot(h, u).double(),
        }
        dual_norm = self.norm.dual(h).double()
        return Sample(u, lam, h, dual_norm, rates, -log_speed)


@dataclass(frozen=True, repr=False)
class DissipationFlow(Labelled):
    """w' = −∇ψ*(g), g = ∇𝓛(w), for a potential `SmoothSign`, `Huber` or `Clipping`.

    t is its own time, lengths are in ℓ2, and the dissipated level is ∫⟨∇Λ, dw⟩. Smooth objectives
    only: kinks are refused by the method. Methods with a clock of their own follow norms, and are
    refused."""

    potential: Potential
    rtol: float = 1e-6
    atol: float = 1e-12
    method: Method = DOPRI5

    def __post_init__(self) -> None:
        expected = "one, try flowsim.SmoothSign(1e-8)"
        require_instance("DissipationFlow", Potential, expected, potential=self.potential)
        require_fraction("DissipationFlow", rtol=self.rtol, atol=self.atol)
        explicit = "an explicit method, try flowsim.DOPRI5"
        require_instance("DissipationFlow", Method, explicit, method=self.method)
        if self.method.own_clock is not None:
            raise ValueError(
                f"DissipationFlow: got method={self.method!r}, which follows norms and would "
                "ignore the potential, expected an explicit method, try flowsim.DOPRI5"
            )

    @property
    def label(self) -> str:
        return self.potential.label

    @property
    def _field(self) -> Field:
        return _PotentialField(L2(), ARCLENGTH, self.rtol, self.atol, self.potential)

    def start(self, problem: Objective, w_or_state: Tensor | State) -> State:
        state = initial_state(problem, w_or_state)
        return self.method.start(self._field, problem, state)

    def advance(self, problem: Objective, state: State, until: Target, budget: int) -> State:
        return self.method.advance(self._field, problem, state, until, budget)
