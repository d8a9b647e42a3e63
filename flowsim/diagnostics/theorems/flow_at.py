"""What the theorems speak of at one point of a flow: its velocity, how fast Λ and ‖w‖ grow along
it, the balance of neurons."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from flowsim.diagnostics.margins import entropy, soft_margin
from flowsim.diagnostics.selected import ascent, selected_sides, strictly_between
from flowsim.diagnostics.stationarity import Stationarity
from flowsim.diagnostics.theorems.check import EXACT
from flowsim.motion.state import State
from flowsim.norms.norm import Norm
from flowsim.norms.polars import polar
from flowsim.numerics.batched import dot
from flowsim.numerics.shapes import PerTrajectory, Rows
from flowsim.problems.problem import Problem
from flowsim.velocity.selection import select


def velocity(problem: Problem, state: State, norm: Norm) -> Rows:
    """The unit velocity dw/ds of the flow: at ties what its method has followed, where the state
    remembers it, else what `select` gives."""
    norm = norm.bind(problem.layout)
    h = ascent(problem, state)
    if not norm.ties:
        return norm.steepest(h)
    if "velocity" in state.memory:
        followed = state.memory["velocity"]
        u = followed / norm.value(followed)[:, None]
        steepest = dot(u, h) >= (1 - EXACT) * norm.dual(h)
        if bool(steepest.all()):  # else it was another norm's
            return u
    sides = selected_sides(problem, state)
    return select(problem, norm, state.w, sides).direction


def rise(problem: Problem, state: State, u: Rows) -> PerTrajectory:
    """The derivative of Λ along u from the right, example by example: no gradient in the weights
    enters."""
    sides = selected_sides(problem, state)
    if sides is None:
        f = problem.outputs(state.w)
        _, cotangent = problem.loss.ascent(f, problem.y)
        moves = problem.net.pushforward(state.w, problem.x, u)
        return (cotangent * moves).flatten(1).sum(-1)
    hinges = problem.hinges(state.w)
    along = hinges.along(u)
    slides = strictly_between(sides)
    kinked = torch.where(slides, along.clamp_min(0), sides * along)
    return dot(hinges.base, u) + dot(hinges.jump, kinked)


def radial_speed(problem: Problem, state: State, norm: Norm, u: Rows) -> PerTrajectory:
    """ν, the derivative of ‖w‖ along u from the right: max ⟨n, u⟩ over n ∈ ∂‖w‖."""
    bound = norm.bind(problem.layout)
    subgradients = polar(bound).face(state.w)
    return subgradients.support(u)


def neuron_balance(
    problem: Problem, state: State, norm: Norm
) -> tuple[Float[Tensor, "B m"], Float[Tensor, "B m"]]:
    """‖w_j‖ and ‖a_j‖ of each hidden neuron of a two-layer net, in a norm of vectors: incoming and
    outgoing weights.

    At a KKT point in ℓp, p < ∞, they are equal for every neuron; in ℓ2 ‖w_j‖² − ‖a_j‖² is constant
    along the flow, sliding or not. Raises ValueError for nets that do not have two layers."""
    matrices = all(len(block.shape) == 2 for block in problem.layout)
    if len(problem.layout) != 2 or not matrices:
        raise ValueError(
            f"neuron_balance: got {len(problem.layout)} blocks, expected the two layers of "
            "MLP([d, m, c])"
        )
    first, last = (block.of(state.w) for block in problem.layout)
    return norm.value(first), norm.value(last.mT)


@dataclass(frozen=True)
class FlowAt:
    """The letters of the theorems at a state of a flow in ``norm``, bound to its layout.

    Those of the exponential loss, ``lam``, ``H`` and ``soft``, raise ValueError for another."""

    problem: Problem
    state: State
    norm: Norm

    @property
    def L(self) -> float:
        """The degree of the net."""
        return self.problem.degree

    @cached_property
    def size(self) -> PerTrajectory:
        """‖w‖."""
        return self.norm.value(self.state.w)

    @cached_property
    def h(self) -> Rows:
        """∇Λ, the element that the flow has selected."""
        return ascent(self.problem, self.state)

    @cached_property
    def slope(self) -> PerTrajectory:
        """‖h‖_*."""
        return self.norm.dual(self.h)

    @property
    def radial_rise(self) -> PerTrajectory:
        """⟨w, h⟩."""
        return dot(self.state.w, self.h)

    @property
    def alpha(self) -> PerTrajectory:
        """⟨w, h⟩/(‖w‖‖h‖_*)."""
        return self.radial_rise / (self.size * self.slope)

    @cached_property
    def u(self) -> Rows:
        """The unit velocity."""
        return velocity(self.problem, self.state, self.norm)

    @cached_property
    def rise(self) -> PerTrajectory:
        """dΛ/ds."""
        return rise(self.problem, self.state, self.u)

    @cached_property
    def nu(self) -> PerTrajectory:
        """d‖w‖/ds."""
        return radial_speed(self.problem, self.state, self.norm, self.u)

    @property
    def level(self) -> PerTrajectory:
        """Λ, of whatever sign."""
        return self.problem.lam(self.state.w)

    @cached_property
    def lam(self) -> PerTrajectory:
        """Λ; NaN where it is not positive."""
        self._require_exponential()
        return torch.where(self.level > 0, self.level, torch.nan)

    @cached_property
    def H(self) -> PerTrajectory:
        """The entropy of the softmax weights."""
        self._require_exponential()
        return entropy(self.problem, self.state)

    @property
    def soft(self) -> PerTrajectory:
        """γ̃."""
        measure = soft_margin(self.norm)
        return measure(self.problem, self.state)

    @cached_property
    def kkt(self) -> Stationarity:
        """w̃, λ and Γ."""
        return Stationarity.of(self.problem, self.state, self.norm)

    def _require_exponential(self) -> None:
        loss = self.problem.loss
        if loss.tail.name != "exponential":
            raise ValueError(
                f"got the {loss.name} loss, expected an exponential tail, for which this identity "
                "holds; try loss=flowsim.exponential or flowsim.pairwise_exponential"
            )
