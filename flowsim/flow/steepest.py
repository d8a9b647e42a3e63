"""The steepest flow of an objective in a norm, as a Rule."""

from dataclasses import dataclass

from torch import Tensor

from flowsim.checks import require_fraction, require_instance
from flowsim.flow.explicit import DOPRI5
from flowsim.flow.field import Field, speed_of
from flowsim.flow.movements.step import MinimisingMovement
from flowsim.flow.pieces.polytope import is_polyhedral
from flowsim.flow.pieces.step import ExactPieces
from flowsim.flow.rosenbrock import ROS34PW2
from flowsim.flow.sliding.step import KinkImplicit
from flowsim.flow.steps import Method
from flowsim.motion.clocks import ARCLENGTH, Clock, Target
from flowsim.motion.rule import Labelled
from flowsim.motion.state import State, initial_state
from flowsim.norms.norm import Norm
from flowsim.problems.objective import Objective


@dataclass(frozen=True, repr=False)
class SteepestFlow(Labelled):
    """Steepest flow dw/dt ∈ argmin_{‖u‖ ≤ ‖g‖_*} ⟨u, g⟩ with g = ∇𝓛(w) (Tsilivis et al. 2026,
    Eq. 3).

    Where ∇𝓛 is a set (on kinks) or the steepest direction is (at ties) this is the velocity of
    least dual norm and, among the steepest directions, of least curvature: the solution that
    balances energy. See `suited` for the method that is taken by default; ``method`` replaces it.
    ``clock`` sets the variable that an explicit method integrates by, arclength by default; the
    path does not depend on it, and the implicit methods, which have a clock of their own, refuse
    one."""

    norm: Norm
    rtol: float = 1e-4
    atol: float = 1e-12
    clock: Clock | None = None
    method: Method | None = None

    def __post_init__(self) -> None:
        owner = "SteepestFlow"
        require_instance(owner, Norm, "a flowsim norm, try flowsim.L2()", norm=self.norm)
        require_fraction(owner, rtol=self.rtol, atol=self.atol)
        known = "a method, try flowsim.DOPRI5 or flowsim.TorchDiffEq('dopri5')"
        require_instance(owner, Method | None, known, method=self.method)
        if self.clock is not None:
            speed_of(self.clock)
            if self.method is not None:
                self._clock_of(self.method)

    @property
    def label(self) -> str:
        return f"{self.norm.title} flow"

    def start(self, problem: Objective, w_or_state: Tensor | State) -> State:
        method, field = self._method(problem)
        return method.start(field, problem, initial_state(problem, w_or_state))

    def advance(self, problem: Objective, state: State, until: Target, budget: int) -> State:
        method, field = self._method(problem)
        return method.advance(field, problem, state, until, budget)

    def refined(self, problem: Objective, state: State, u: Tensor, point: State) -> State:
        """``point``, read off the last step of ``state`` at u, as near to the flow as the method
        can bring it."""
        method, field = self._method(problem)
        return method.refined(field, problem, state, u, point)

    def _method(self, problem: Objective) -> tuple[Method, Field]:
        norm = self.norm.bind(problem.layout)
        method = self.method or suited(norm, problem)
        clock = self._clock_of(method)
        return method, Field(norm, clock, self.rtol, self.atol)

    def _clock_of(self, method: Method) -> Clock:
        if method.own_clock is None:
            return self.clock or ARCLENGTH
        if self.clock is not None:
            raise ValueError(
                f"SteepestFlow: got clock {self.clock.name!r} for {method!r}, expected none, since "
                "it has a clock of its own; try clock=None"
            )
        return method.own_clock


def suited(norm: Norm, objective: Objective) -> Method:
    """The method that follows the flow of this objective in this (bound) norm, from facts about
    both."""
    if objective.kinks:
        return KinkImplicit() if norm.quadratic else MinimisingMovement()
    if objective.convex and is_polyhedral(norm):
        return ExactPieces()
    if norm.quadratic:
        return ROS34PW2
    if objective.convex:
        return MinimisingMovement()
    if not norm.ties:
        return DOPRI5
    raise ValueError(
        f"SteepestFlow: the {norm.name} norm has ties, which no method follows on a net; try "
        f"flowsim.SmallStep(flowsim.{norm!r}) for the small-step path"
    )
