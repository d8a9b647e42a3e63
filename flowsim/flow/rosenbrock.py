"""Linearly implicit integration of smooth steepest flows in quadratic norms, which turn stiff once
the loss is small.

Late in training the softmax weights of the examples relax at a rate that grows with Λ, so that
explicit steps stay short for ever. In a norm ‖v‖² = vᵀAv and on the clock ds = ‖∇Λ‖_* dτ the flow
is w' = A⁻¹h(w), h = ∇Λ; a Rosenbrock W-method takes the stiff part −A⁻¹CᵀC of its Jacobian
(`Objective.curvature`) implicitly and keeps its order where that part is inexact. Its linear
systems are solved among examples, (R, R), never among weights, (P, P)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from flowsim.flow.explicit import combine
from flowsim.flow.field import Field, Sample, per_length, sample_of
from flowsim.flow.steps import (
    Controller,
    Method,
    begun,
    count_attempt,
    excess_of,
    first_size,
    length,
    log_elapsed_in,
    moved_along,
    segment_between,
    stop_if_stuck,
    without_size,
)
from flowsim.motion.clocks import GRADIENT, Clock, Target
from flowsim.motion.rule import advance_by_steps
from flowsim.motion.segment import Segment
from flowsim.motion.state import State
from flowsim.norms.norm import Norm
from flowsim.numerics.batched import bmm_one_by_one, dot
from flowsim.numerics.quadrature import hermite
from flowsim.numerics.shapes import PerTrajectory, Rows
from flowsim.problems.objective import Objective

Solve = Callable[[Rows], Rows]


@dataclass(frozen=True)
class Rosenbrock(Method):
    """An embedded pair of Rosenbrock W-methods, with its own step size for each trajectory.

    With M = (1 − γτW)⁻¹, stage i is k_i = M(τf(w + Σα_ij k_j) + g_i) − g_i with g_i = Σ(γ_ij/γ)k_j,
    j < i. Rows of ``stages`` and ``couplings`` are α_ij and γ_ij for i = 2, 3, …; ``weights`` gives
    the solution Σb_i k_i of order ``order`` for any matrix W, and ``embedded`` one of an order
    less.

    A step is accepted where its error vector e satisfies ‖e‖₂ ≤ atol + rtol·‖w‖₂ and, for a loss,
    moves Λ by |⟨h, e⟩| ≤ rtol·max(1, |Λ|) and the logits by ‖Ce‖₂ ≤ rtol, their standard deviation
    under the softmax weights. Without the last the run would leave the slow manifold at Λ ≈ 300:
    softmax weights need logits to an absolute accuracy, however large the weights are."""

    own_clock: ClassVar[Clock | None] = GRADIENT

    name: str
    order: int
    gamma: float
    stages: tuple[tuple[float, ...], ...]
    couplings: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]
    embedded: tuple[float, ...]

    def start(self, field: Field, objective: Objective, state: State) -> State:
        if not field.norm.quadratic:
            raise ValueError(
                f"{self.name}: got the {field.norm.name} norm, expected a quadratic one such as "
                "flowsim.L2() or flowsim.Mahalanobis(A), try method=flowsim.DOPRI5"
            )
        sample = evaluate(field, objective, state.w)
        size = first_size(state.w, sample)
        memory = {"excess": torch.ones_like(size), "refused": torch.zeros_like(size)}
        if "excess" in state.memory:
            memory = {name: state.memory[name] for name in memory}
        else:
            state = without_size(state)
        return begun(objective, state, sample, size, memory)

    def advance(
        self, field: Field, objective: Objective, state: State, until: Target, budget: int
    ) -> State:
        step = partial(self._step, field)
        return advance_by_steps(step, objective, state, until, budget)

    def _step(self, field: Field, objective: Objective, state: State) -> State:
        """One attempt of every trajectory."""

        def velocity(w: Tensor) -> Tensor:
            return evaluate(field, objective, w).velocity

        first = sample_of(state)
        dt = state.step_size
        root = objective.curvature(state.w)
        solve = damping(field.norm, root, self.gamma * dt)
        w, error = attempt(self, velocity, solve, state.w, first, dt)
        last = evaluate(field, objective, w)
        others = _errors_of_level(root, error, last) if objective.logarithmic else ()
        excess = excess_of(field, state.w, w, error, last, *others)
        chosen = self._moved(field, objective, state, w, last, solve)
        chosen = chosen.where(excess <= 1, state)
        chosen = count_attempt(chosen, excess <= 1, gradients=len(self.weights))
        chosen = self._resized(chosen, state, excess)
        move = chosen.step_size * length(first.velocity)
        return stop_if_stuck(chosen, move, torch.isfinite(excess))

    def _moved(
        self,
        field: Field,
        objective: Objective,
        state: State,
        w: Tensor,
        last: Sample,
        solve: Solve,
    ) -> State:
        """The state after an accepted step to w."""
        first = sample_of(state)
        dt = state.step_size
        path = segment_between(objective, state, w, first, last, dt)
        path = smoothed(solve, path)
        gains = gains_along(field.norm, path, dt)
        elapsed = log_elapsed_in(objective, first, last, dt)
        return moved_along(state, path, last, gains, elapsed)

    def _resized(self, state: State, before: State, excess: Tensor) -> State:
        """The state with its next step size, and what the one after will depend on."""
        control = Controller(self.order, broken=0.1, least=0.1, damping=0.1)
        known = before.memory["excess"]
        factor = control.factor(excess, known, before.memory["refused"])
        accepted = excess <= 1
        memory = {
            "excess": torch.where(accepted, excess.clamp_min(1e-6), known),
            "refused": 1 - accepted.double(),
        }
        memory = state.memory | memory
        return replace(state, step_size=before.step_size * factor, memory=memory)


_G = 0.435866521508458999  # the root of g³ − 3g² + 3g/2 − 1/6 for which the method is L-stable

ROS34PW2 = Rosenbrock(
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


def damping(norm: Norm, root: Float[Tensor, "B R P"], size: PerTrajectory) -> Solve:
    """v ↦ (1 + size·A⁻¹CᵀC)⁻¹v by Woodbury's identity, from the factor of 1 + size·CA⁻¹Cᵀ ``(B, R,
    R)``."""
    inverse = norm.by_inverse_metric(root).mT  # A⁻¹Cᵀ, (B, P, R)
    scale = size.to(root)[:, None, None]
    eye = torch.eye(root.shape[1], dtype=root.dtype, device=root.device)
    gram = bmm_one_by_one(root, inverse)
    factor, failed = torch.linalg.cholesky_ex(eye + scale * gram)
    good = (failed == 0)[:, None, None]
    factor = torch.where(good, factor, torch.nan)

    def solve(v: Tensor) -> Tensor:
        seen = bmm_one_by_one(root, v[..., None])  # Cv
        inner = torch.cholesky_solve(seen, factor)
        stiff = scale * bmm_one_by_one(inverse, inner)
        return v - stiff[..., 0]

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
    pair: Rosenbrock,
    velocity: Solve,
    solve: Solve,
    w: Tensor,
    first: Sample,
    dt: PerTrajectory,
) -> tuple[Tensor, Tensor]:
    """One step of size dt from w, where the field is ``first``: the new point and its error vector.

    ``solve`` is v ↦ (1 − γ·dt·W)⁻¹v.
    """
    tau = dt.to(w)[:, None]
    increments = [solve(tau * first.velocity)]
    for row, coupling in zip(pair.stages, pair.couplings, strict=True):
        scaled = tuple(c / pair.gamma for c in coupling)
        lag = combine(scaled, increments)
        point = w + combine(row, increments)
        ahead = solve(tau * velocity(point) + lag)
        increments.append(ahead - lag)
    solutions = zip(pair.weights, pair.embedded, strict=True)
    difference = tuple(a - b for a, b in solutions)
    end = w + combine(pair.weights, increments)
    return end, combine(difference, increments)


def _errors_of_level(
    root: Float[Tensor, "B R P"], error: Rows, last: Sample
) -> tuple[PerTrajectory, ...]:
    """|⟨h, e⟩|/max(1, |Λ|) and ‖Ce‖₂."""
    rise = dot(last.ascent, error).abs().double()
    level = last.lam.abs().clamp_min(1)
    spread = bmm_one_by_one(root, error[..., None])
    return rise / level, length(spread[..., 0])


def smoothed(solve: Solve, step: Segment) -> Segment:
    """A step with slopes that a cubic can follow even if it is long: without their stiff part."""
    slope0 = without_stiff_part(solve, step.slope0)
    slope1 = without_stiff_part(solve, step.slope1)
    return replace(step, slope0=slope0, slope1=slope1)


def evaluate(field: Field, objective: Objective, w: Tensor) -> Sample:
    """The field on the clock `GRADIENT`."""
    sample = field(objective, w)
    lam = sample.lam
    # exact, also where the gradient is zero
    rate = lam if objective.logarithmic else torch.zeros_like(lam)
    return replace(sample, log_time_rate=rate)


_GAUSS = np.polynomial.legendre.leggauss(4)
_NODES = _GAUSS[0] / 2 + 0.5
_WEIGHTS = _GAUSS[1] / 2


def gains_along(norm: Norm, path: Segment, dt: PerTrajectory) -> dict[str, PerTrajectory]:
    """∫‖dw‖, ∫‖dw‖/‖w‖ and ∫‖w'‖² dτ = ∫‖h‖_* ds of the cubic through both ends of a step, by Gauss
    quadrature."""
    arclength = torch.zeros_like(dt)
    relative = torch.zeros_like(dt)
    dissipated = torch.zeros_like(dt)
    for u, weight in zip(_NODES.tolist(), _WEIGHTS.tolist(), strict=True):
        place = path.w0.new_tensor(u)
        w = hermite(place, path.w0, path.w1, path.slope0, path.slope1)
        size = norm.value(w).double()
        slope = 6 * u * (1 - u) * (path.w1 - path.w0)
        slope = slope + (1 - u) * (1 - 3 * u) * path.slope0
        slope = slope + u * (3 * u - 2) * path.slope1
        speed = norm.value(slope).double()
        arclength += weight * speed
        relative += weight * per_length(speed, size)
        dissipated += weight * speed**2 / dt
    return {"arclength": arclength, "relative": relative, "dissipated": dissipated}
