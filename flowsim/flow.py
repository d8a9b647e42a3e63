"""The steepest flow of an objective in a norm, as a Rule."""

from dataclasses import dataclass

from torch import Tensor

from flowsim.clocks import ARCLENGTH, Clock, Target
from flowsim.integrate import DOPRI5, Field, Method, Solver
from flowsim.norms import Norm
from flowsim.problem import Objective
from flowsim.state import State, fresh


@dataclass(frozen=True)
class SteepestFlow:
    """Steepest flow dw/dt ∈ argmin_{‖u‖ ≤ ‖g‖_*} ⟨u, g⟩ with g = ∇𝓛(w) (Tsilivis et al. 2026, Eq. 3).

    The path does not depend on ``clock``, which sets only the variable that the solver sees. ``method`` is an
    embedded pair (`DOPRI5`, `BOSH3`) or a solver of torchdiffeq (`TorchDiffEq`). A step's error is at most
    ``atol + rtol·‖w‖₂``, and at most ``rtol`` in Λ and in log t.

    Smooth fields only: a net with kinks or a norm with ties is refused, because there a one-step error estimate
    says nothing about the true solution.
    """

    norm: Norm
    rtol: float = 1e-6
    atol: float = 1e-12
    clock: Clock = ARCLENGTH
    method: Method = DOPRI5

    def __post_init__(self) -> None:
        if not isinstance(self.norm, Norm):
            raise TypeError(f"SteepestFlow: got norm {self.norm!r}, expected a flowsim norm, try flowsim.L2()")
        for name, value in (("rtol", self.rtol), ("atol", self.atol)):
            if not (isinstance(value, int | float) and 0 < value < 1):
                raise ValueError(f"SteepestFlow: got {name}={value!r}, expected a number between 0 and 1")
        if not isinstance(self.clock, Clock) or self.clock.speed is None:
            raise ValueError(
                f"SteepestFlow: got clock {self.clock!r}, expected one that can be integrated against, "
                "try flowsim.clocks.ARCLENGTH"
            )
        if isinstance(self.method, type) or not isinstance(self.method, Method):
            raise TypeError(
                f"SteepestFlow: got method {self.method!r}, expected a method, try flowsim.DOPRI5 or "
                "flowsim.TorchDiffEq('dopri5')"
            )

    @property
    def label(self) -> str:
        return f"{self.norm.title} flow"

    def start(self, problem: Objective, w_or_state: Tensor | State) -> State:
        self._require_smooth(problem)
        return self._solver.start(self._field(problem), problem, fresh(problem, w_or_state))

    def advance(self, problem: Objective, state: State, until: Target, budget: int) -> State:
        return self._solver.advance(self._field(problem), problem, state, until, budget)

    def _field(self, problem: Objective) -> Field:
        return Field(self.norm.bind(problem.layout), self.clock)

    @property
    def _solver(self) -> Solver:
        return self.method.solver(self.rtol, self.atol)

    def _require_smooth(self, problem: Objective) -> None:
        if getattr(self.method, "ties", False):
            return
        instead = f"try flowsim.SmallStep(flowsim.{self.norm!r}) for the small-step path"
        if problem.kinks:
            raise ValueError(
                "SteepestFlow integrates smooth fields, but the net has kinks (ReLU), where the true flow slides and "
                f"an ODE solver stalls; {instead}, or a smooth activation such as flowsim.squared_relu"
            )
        if self.norm.ties:
            raise ValueError(
                f"SteepestFlow integrates smooth fields, but the {self.norm.name} norm has ties, where its steepest "
                f"direction jumps and an ODE solver stalls; {instead}"
            )
