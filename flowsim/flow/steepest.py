"""The steepest flow of an objective in a norm, as a Rule."""

from dataclasses import dataclass

from torch import Tensor

from flowsim.flow.explicit import DOPRI5
from flowsim.flow.field import Field
from flowsim.flow.movements.step import MinimisingMovement
from flowsim.flow.pieces.polytope import follows
from flowsim.flow.pieces.step import ExactPieces
from flowsim.flow.rosenbrock import ROS34PW2
from flowsim.flow.sliding.step import KinkImplicit
from flowsim.flow.steps import Integrator, Method, Settling
from flowsim.motion.clocks import ARCLENGTH, Clock, Target
from flowsim.motion.state import State, initial_state
from flowsim.norms.norm import Norm
from flowsim.problems.objective import Objective


@dataclass(frozen=True)
class SteepestFlow:
    """Steepest flow dw/dt ∈ argmin_{‖u‖ ≤ ‖g‖_*} ⟨u, g⟩ with g = ∇𝓛(w) (Tsilivis et al. 2026, Eq.
    3).

    Where ∇𝓛 is a set (on kinks) or the steepest direction is (at ties) this is the velocity of
    least dual norm and, among the steepest directions, of least curvature: the solution that
    balances energy. See `suited` for the method that is taken by default; ``method`` replaces it.
    The path does not depend on ``clock``, which sets only the variable that an explicit solver
    sees."""

    norm: Norm
    rtol: float = 1e-4
    atol: float = 1e-12
    clock: Clock = ARCLENGTH
    method: Method | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.norm, Norm):
            raise TypeError(
                f"SteepestFlow: got norm {self.norm!r}, expected a flowsim norm, try flowsim.L2()"
            )
        for name, value in (("rtol", self.rtol), ("atol", self.atol)):
            if not (isinstance(value, int | float) and 0 < value < 1):
                raise ValueError(
                    f"SteepestFlow: got {name}={value!r}, expected a number between 0 and 1"
                )
        if not isinstance(self.clock, Clock) or self.clock.speed is None:
            raise ValueError(
                f"SteepestFlow: got clock {self.clock!r}, expected one that can be integrated against, "
                "try flowsim.clocks.ARCLENGTH"
            )
        if self.method is not None and (
            isinstance(self.method, type) or not isinstance(self.method, Method)
        ):
            raise TypeError(
                f"SteepestFlow: got method {self.method!r}, expected a method, try flowsim.DOPRI5 or "
                "flowsim.TorchDiffEq('dopri5')"
            )

    @property
    def label(self) -> str:
        return f"{self.norm.title} flow"

    def start(self, problem: Objective, w_or_state: Tensor | State) -> State:
        return self._solver(problem).start(
            self._field(problem), problem, initial_state(problem, w_or_state)
        )

    def advance(self, problem: Objective, state: State, until: Target, budget: int) -> State:
        return self._solver(problem).advance(self._field(problem), problem, state, until, budget)

    def refined(self, problem: Objective, state: State, u: Tensor, point: State) -> State:
        """``point``, read off the last step of ``state`` at u, as near to the flow as the method
        can bring it."""
        solver = self._solver(problem)
        return (
            solver.refined(self._field(problem), problem, state, u, point)
            if isinstance(solver, Settling)
            else point
        )

    def _field(self, problem: Objective) -> Field:
        return Field(self.norm.bind(problem.layout), self.clock)

    def _solver(self, problem: Objective) -> Integrator:
        method = self.method or suited(self.norm.bind(problem.layout), problem)
        return method.solver(self.rtol, self.atol)


def suited(norm: Norm, objective: Objective) -> Method:
    """The method that follows the flow of this objective in this (bound) norm, from facts about
    both."""
    if objective.kinks:
        return KinkImplicit() if norm.quadratic else MinimisingMovement()
    if objective.convex and follows(norm):
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
