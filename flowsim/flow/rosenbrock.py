"""Linearly implicit integration of smooth steepest flows in quadratic norms, which turn stiff once
the loss is small.

Late in training the softmax weights of the examples relax at a rate that grows with Λ, so that
explicit steps stay short for ever. In a norm ‖v‖² = vᵀAv and on the clock ds = ‖∇Λ‖_* dτ the flow
is w' = A⁻¹h(w), h = ∇Λ; a Rosenbrock W-method takes the stiff part −A⁻¹CᵀC of its Jacobian
(`Objective.curvature`) implicitly and keeps its order where that part is inexact. Its linear
systems are solved among examples, (R, R), never among weights, (P, P)."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from flowsim.flow.explicit import combine
from flowsim.flow.field import Field, Sample, memory_of, sample_of
from flowsim.flow.steps import (
    count_attempt,
    first_size,
    length,
    log_elapsed_in,
    segment_between,
    stop_if_stuck,
)
from flowsim.motion.clocks import GRADIENT, Target
from flowsim.motion.rule import advance_by_steps
from flowsim.motion.segment import Segment
from flowsim.motion.state import State, Status
from flowsim.norms.norm import Norm
from flowsim.numerics.batched import bmm_one_by_one
from flowsim.numerics.quadrature import hermite
from flowsim.problems.objective import Objective


@dataclass(frozen=True)
class Pair:
    """An embedded pair of Rosenbrock W-methods.

    With M = (1 − γτW)⁻¹, stage i is k_i = M(τf(w + Σα_ij k_j) + g_i) − g_i with g_i = Σ(γ_ij/γ)k_j,
    j < i. Rows of ``stages`` and ``couplings`` are α_ij and γ_ij for i = 2, 3, …; ``weights`` gives
    the solution Σb_i k_i of order ``order`` for any matrix W, and ``embedded`` one of an order
    less."""

    name: str
    order: int
    gamma: float
    stages: tuple[tuple[float, ...], ...]
    couplings: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]
    embedded: tuple[float, ...]

    def solver(self, rtol: float, atol: float) -> "Rosenbrock":
        """This pair with its own step size for each trajectory."""
        return Rosenbrock(self, rtol, atol)


_G = 0.435866521508458999  # the root of g³ − 3g² + 3g/2 − 1/6 for which the method is L-stable


ROS34PW2 = Pair(
    "ros34pw2",
    3,
    _G,
    ((2 * _G,), (0.844570600153694243, -0.112990642364841847), (0, 0, 1)),
    (
        (-2 * _G,),
        (-0.903380570130440766, 0.0541806723880953233),
        (0.242123807060953475, -1.22325058390451462, 0.545260255335102142),
    ),
    (0.242123807060953475, -1.22325058390451462, 1.54526025533510214, _G),
    (0.378109031458193672, -0.0960422922124231721, 0.5, _G / 2),
)


"""Rang & Angermann 2005, order 3(2), L-stable; digits after the twelfth from the order
conditions."""


Solve = Callable[[Float[Tensor, "B P"]], Float[Tensor, "B P"]]


def damping(norm: Norm, root: Float[Tensor, "B R P"], size: Float[Tensor, " B"]) -> Solve:
    """v ↦ (1 + size·A⁻¹CᵀC)⁻¹v by Woodbury's identity, from the factor of 1 + size·CA⁻¹Cᵀ ``(B, R,
    R)``."""
    raised = norm.dual(root)[..., None] * norm.steepest(root)  # A⁻¹ of every row of C
    scale = size.to(root)[:, None, None]
    eye = torch.eye(root.shape[1], dtype=root.dtype, device=root.device)
    factor, failed = torch.linalg.cholesky_ex(eye + scale * bmm_one_by_one(root, raised.mT))
    factor = torch.where((failed == 0)[:, None, None], factor, torch.nan)

    def solve(v: Tensor) -> Tensor:
        inner = torch.cholesky_solve(bmm_one_by_one(root, v[..., None]), factor)
        return v - (scale * bmm_one_by_one(raised.mT, inner))[..., 0]

    return solve


def without_stiff_part(solve: Solve, v: Tensor) -> Tensor:
    """v without its stiff part, otherwise to third order in the step: what remains is 1 − (1 − M)³
    with M ``solve``.

    The velocity next to the slow manifold points back to it, and over a long step its rounding
    would leave it."""
    stiff = v
    for _ in range(3):
        stiff = stiff - solve(stiff)
    return v - stiff


def attempt(
    pair: Pair, velocity: Solve, solve: Solve, w: Tensor, first: Sample, dt: Float[Tensor, " B"]
) -> tuple[Tensor, Tensor]:
    """One step of size dt from w, where the field is ``first``: the new point and its error vector.

    ``solve`` is v ↦ (1 − γ·dt·W)⁻¹v.
    """
    tau = dt.to(w)[:, None]
    increments = [solve(tau * first.velocity)]
    for row, coupling in zip(pair.stages, pair.couplings, strict=True):
        lag = combine(tuple(c / pair.gamma for c in coupling), increments)
        increments.append(solve(tau * velocity(w + combine(row, increments)) + lag) - lag)
    difference = tuple(a - b for a, b in zip(pair.weights, pair.embedded, strict=True))
    return w + combine(pair.weights, increments), combine(difference, increments)


@dataclass(frozen=True)
class Rosenbrock:
    """A pair with its own step size for each trajectory.

    A step is accepted where its error vector e satisfies ‖e‖₂ ≤ atol + rtol·‖w‖₂ and, for a loss,
    moves Λ by |⟨h, e⟩| ≤ rtol·max(1, |Λ|) and the logits by ‖Ce‖₂ ≤ rtol, their standard deviation
    under the softmax weights. Without the last the run would leave the slow manifold at Λ ≈ 300:
    softmax weights need logits to an absolute accuracy, however large the weights are."""

    pair: Pair
    rtol: float
    atol: float

    def start(self, field: Field, objective: Objective, state: State) -> State:
        if not field.norm.quadratic:
            raise ValueError(
                f"{self.pair.name}: got the {field.norm.name} norm, expected a quadratic one such as flowsim.L2() or "
                "flowsim.Mahalanobis(A), try method=flowsim.DOPRI5"
            )
        sample = evaluate(field, objective, state.w)
        guess = first_size(state.w, sample)
        # a step size of another method is on another clock
        resumed = "excess" in state.memory
        neutral = {"excess": torch.ones_like(guess), "refused": torch.zeros_like(guess)}
        controller = {
            name: state.memory[name] if resumed else value for name, value in neutral.items()
        }
        state = replace(
            state,
            step_size=torch.where(torch.isfinite(state.step_size), state.step_size, guess)
            if resumed
            else guess,
            readings=state.readings | {"lam": sample.lam},
            tallies=state.tallies | {"gradients": state.tallies["gradients"] + 1},
            memory=memory_of(sample) | controller,
            segment=segment_between(
                objective, state, state.w, sample, sample, torch.zeros_like(guess)
            ),
        )
        return state.stopped(sample.dual == 0, Status.STATIONARY)

    def advance(
        self, field: Field, objective: Objective, state: State, until: Target, budget: int
    ) -> State:
        return advance_by_steps(
            lambda part, local: self._step(field, part, local), objective, state, until, budget
        )

    def _step(self, field: Field, objective: Objective, state: State) -> State:
        """One attempt of every trajectory."""
        first, dt = sample_of(state), state.step_size
        root = objective.curvature(state.w)
        solve = damping(field.norm, root, self.pair.gamma * dt)
        w, error = attempt(
            self.pair, lambda w: evaluate(field, objective, w).velocity, solve, state.w, first, dt
        )
        last = evaluate(field, objective, w)
        path = segment_between(objective, state, w, first, last, dt)
        path = replace(
            path,
            slope0=without_stiff_part(solve, path.slope0),
            slope1=without_stiff_part(solve, path.slope1),
        )
        excess = self._excess(objective, state.w, w, error, root, last)
        accepted = excess <= 1
        moved = self._moved(field, objective, state, last, path)
        chosen = count_attempt(moved.where(accepted, state), accepted, len(self.pair.weights))
        chosen = self._resized(chosen, state.memory, excess, dt)
        return stop_if_stuck(chosen, first, finite=torch.isfinite(excess))

    def _excess(
        self,
        objective: Objective,
        w0: Tensor,
        w1: Tensor,
        error: Tensor,
        root: Tensor,
        last: Sample,
    ) -> Float[Tensor, " B"]:
        """The error over its tolerance; infinite where the trial is not finite."""
        size = torch.maximum(length(w0), length(w1))
        excess = length(error) / (self.atol + self.rtol * size)
        if objective.logarithmic:
            rise = (last.ascent * error).sum(-1).abs().double() / last.lam.abs().clamp_min(1)
            spread = length(bmm_one_by_one(root, error[..., None])[..., 0])
            excess = torch.maximum(excess, torch.maximum(rise, spread) / self.rtol)
        finite = (
            torch.isfinite(excess)
            & torch.isfinite(last.lam)
            & torch.isfinite(length(last.velocity))
        )
        return torch.where(finite, excess, torch.inf)

    def _moved(
        self, field: Field, objective: Objective, state: State, last: Sample, path: Segment
    ) -> State:
        """The state after an accepted step along ``path``."""
        dt = state.step_size
        elapsed = log_elapsed_in(objective, sample_of(state), last, dt)
        readings = {
            "steps": state.readings["steps"] + 1,
            "lam": last.lam,
            "log_time": torch.logaddexp(state.readings["log_time"], elapsed),
            **{
                name: state.readings[name] + gain
                for name, gain in gains_along(field.norm, path, dt).items()
            },
        }
        memory = state.memory | memory_of(last)
        return replace(
            state,
            w=path.w1,
            readings=readings,
            memory=memory,
            segment=replace(path, readings1=readings),
        )

    def _resized(
        self, state: State, before: dict[str, Tensor], excess: Tensor, dt: Tensor
    ) -> State:
        """The state with its next step size, by proportional and integral control (Gustafsson
        1991).

        The proportional part is weak: along a step size that grows for ever, a strong one holds the
        error far below the tolerance."""
        accepted, excess = excess <= 1, excess.clamp_min(1e-6)
        power = 1 / self.pair.order
        grown = 0.9 * excess ** (-1.1 * power) * before["excess"] ** (0.2 * power)
        # where the last attempt was rejected a larger step would be as well
        grown = grown.clamp(0.2, 5.0).clamp_max(torch.where(before["refused"] > 0, 1.0, 5.0))
        shrunk = (0.9 * excess**-power).clamp(0.1, 0.9)
        controller = {
            "excess": torch.where(accepted, excess, before["excess"]),
            "refused": 1 - accepted.double(),
        }
        return replace(
            state,
            step_size=dt * torch.where(accepted, grown, shrunk),
            memory=state.memory | controller,
        )


def evaluate(field: Field, objective: Objective, w: Tensor) -> Sample:
    """The field on the clock `GRADIENT`."""
    sample = replace(field, clock=GRADIENT)(objective, w)
    # exact, also where the gradient is zero
    return replace(
        sample, log_time_rate=sample.lam if objective.logarithmic else torch.zeros_like(sample.lam)
    )


_NODES, _WEIGHTS = (torch.from_numpy(values) / 2 for values in np.polynomial.legendre.leggauss(4))


def gains_along(
    norm: Norm, path: Segment, dt: Float[Tensor, " B"]
) -> dict[str, Float[Tensor, " B"]]:
    """∫‖dw‖, ∫‖dw‖/‖w‖ and ∫‖w'‖² dτ = ∫‖h‖_* ds of the cubic through both ends of a step, by Gauss
    quadrature."""
    gained = {name: torch.zeros_like(dt) for name in ("arclength", "relative", "dissipated")}
    for u, weight in zip((_NODES + 0.5).tolist(), _WEIGHTS.tolist(), strict=True):
        w = hermite(path.w0.new_tensor(u), path.w0, path.w1, path.slope0, path.slope1)
        slope = 6 * u * (1 - u) * (path.w1 - path.w0) + (1 - u) * (1 - 3 * u) * path.slope0
        speed = norm.value(slope + u * (3 * u - 2) * path.slope1).double()
        size = norm.value(w).double()
        gained["arclength"] += weight * speed
        gained["relative"] += weight * speed / size.clamp_min(torch.finfo(size.dtype).tiny)
        gained["dissipated"] += weight * speed**2 / dt
    return gained
