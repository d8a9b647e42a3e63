"""Steepest flow of a convex loss in any norm, by implicit steps: minimising movements.

A movement of arclength ε from w is

    w + εv,   v ∈ argmin { 𝓛(w + εv) : ‖v‖ ≤ 1 },

so that v is a steepest direction *at the end*: it slides along ties (a gradient of deficient rank, equal singular
values, zero coordinates) and sits on a stiff softmax without being told (Ambrosio, Gigli and Savaré 2005). A step of
the flow is the two movements of a stiffly accurate Runge–Kutta method of second order (Alexander 1977),

    w₁ = w + γε v₁,   w₂ = w + (1 − γ)ε v₁ + γε v₂,   γ = 1 − 1/√2.
"""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from flowsim.barriers import HalfSquare, Minimum, Outer, SoftMaximum, minimise_in_ball, supported
from flowsim.clocks import ARCLENGTH, Target
from flowsim.integrate import Field, Sample, log_elapsed_in, recall, remember, segment
from flowsim.losses import EXPONENTIAL, HALF_SQUARE, Pairwise, Residual, Signed, SoftPairwise
from flowsim.norms import Norm
from flowsim.problem import Objective, Problem
from flowsim.quadratics import Quadratic
from flowsim.state import State, Status, march, tree_map

_GAMMA = 1 - 1 / math.sqrt(2)
# the quadrature of third order at 0, γ and 1
_MIDDLE = 1 / (6 * _GAMMA * (1 - _GAMMA))
_LAST = (2 - 3 * _GAMMA) / (6 * (1 - _GAMMA))
_NODES = (1 - _MIDDLE - _LAST, _MIDDLE, _LAST)

_TRUSTED = 1e-6  # a movement whose relative duality gap is larger is none


@dataclass(frozen=True)
class MinimisingMovement:
    """Implicit steps, for convex losses (`Linear` models, `Quadratic`) in every norm, ties and all."""

    def solver(self, rtol: float, atol: float) -> "ImplicitSteps":
        return ImplicitSteps(rtol, atol)


# ---------------------------------------------------------------------------------------------------------------
# One movement
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Movement:
    """Where a movement ends, its direction ``v``, the dual variables that prove it to the relative ``gap`` (a share
    of ε‖h‖_*, with h = ∇Λ at the start), and Newton steps taken."""

    w: Float[Tensor, " P"]
    v: Float[Tensor, " P"]
    duals: Float[Tensor, " n"]
    gap: float
    newton: float


@dataclass(frozen=True)
class _Surrogate:
    """A convex function of w + Δ that agrees with the loss to second order at one point: f(b + AΔ) with f = ½‖·‖²,
    or log Σ exp(−(b + AΔ)). ``exact`` where it is the loss, up to a monotone map."""

    rows: Float[Tensor, "n P"]
    offset: Float[Tensor, " n"]
    soft: bool
    exact: bool = True


class Mover:
    """Movements of one trajectory of a convex objective."""

    def __init__(self, norm: Norm, objective: Objective, w: Float[Tensor, "1 P"]) -> None:
        self.norm, self.objective = norm, objective
        self._rows = _rows(objective, w)

    @property
    def duals(self) -> int:
        return len(self._rows)

    def move(self, w: Float[Tensor, " P"], eps: float, start: Tensor | None, tol: float = 1e-15) -> Movement:
        """The movement of arclength ``eps`` from w; ``start`` are the dual variables of one like it.

        Stops at a duality gap of ``tol``; on a curved ball v is then good to about its root.
        """
        level, h = self._ascent(w)
        unit = eps * float(self.norm.dual(h))
        if not 0 < unit < math.inf:
            nothing = torch.zeros(self.duals).to(w)
            return Movement(w, torch.zeros_like(w), nothing, 0.0 if unit == 0 else math.inf, 0.0)
        surrogate = self._surrogate(w)
        if not surrogate.exact:
            return self._sweeps(w, level, eps, unit, start, tol)
        found = self._solve(surrogate, torch.zeros_like(w), eps, unit, start, tol)
        return Movement(w + eps * found.v, found.v, found.p, found.gap, found.newton)

    def _sweeps(self, w: Tensor, level: float, eps: float, unit: float, start: Tensor | None, tol: float) -> Movement:
        """`move` where the surrogate only touches the loss: Newton's method, going back while the level falls."""
        v, newton, gap = torch.zeros_like(w), 0, math.inf
        for _ in range(40):
            found = self._solve(self._surrogate(w + eps * v), -eps * v, eps, unit, start, 0.01 * tol)
            start, newton, step, share = found.p, newton + found.newton, found.v - v, 1.0
            now, h = self._ascent(w + eps * found.v)
            while now < level - 1e-13 * abs(level) and share > 1e-3:
                share /= 2
                now, h = self._ascent(w + eps * (v + share * step))
            v, level = v + share * step, now
            # of a convex function, the linearisation at the end bounds what is left to gain
            gap = float(self.norm.dual(h) - h @ v) * eps / unit
            still = float(step.abs().amax()) < math.sqrt(tol) * float(v.abs().amax())
            if gap < tol or still or share <= 1e-3:
                break
        assert start is not None
        return Movement(w + eps * v, v, start, gap, newton)

    def _solve(
        self, s: _Surrogate, shift: Tensor, eps: float, unit: float, start: Tensor | None, tol: float
    ) -> Minimum:
        """The surrogate's minimum over the ball around ``shift`` from its centre, in units of the expected gain."""
        offset = s.offset + s.rows @ shift
        outer: Outer = SoftMaximum(1 / unit) if s.soft else HalfSquare()
        scale = unit if s.soft else math.sqrt(unit)
        offset = offset - offset.amin() if s.soft else offset
        return minimise_in_ball(self.norm, outer, s.rows * (eps / scale), offset / scale, start=start, tol=tol)

    def _ascent(self, w: Tensor) -> tuple[float, Tensor]:
        level, h = self.objective.ascent(w[None])
        return float(level), h[0]

    def _surrogate(self, w: Tensor) -> _Surrogate:
        """A model of the loss around w; exponential losses are their own."""
        objective = self.objective
        if isinstance(objective, Quadratic):
            return _Surrogate(self._rows, self._rows @ (w - objective.minimiser), soft=False)
        assert isinstance(objective, Problem)
        q = objective.loss.reading.read(objective.outputs(w[None]), objective.y)[0]
        tail, reading = objective.loss.tail, objective.loss.reading
        if tail is HALF_SQUARE:
            return _Surrogate(self._rows, q[0], soft=False)
        if isinstance(reading, SoftPairwise):
            # log(1 + Σe^(−s)) lies below its tangent in Σe^(−s), which is a sum of exponentials with its gradient
            gaps = Pairwise().read(objective.outputs(w[None]), objective.y)[0][0]
            excess = tail.log_slope(q) + q
            return _Surrogate(self._rows, gaps - excess[0].repeat_interleave(len(gaps) // q.shape[1]), True, False)
        # a·e^(−c(q' − q)) has the slope and the curvature of the tail
        fall = tail.fall or torch.func.grad(lambda q: -tail.log_slope(q).sum())
        c = fall(q)[0].clamp_min(0.05)
        offset = torch.log(c) - tail.log_slope(q)[0]
        return _Surrogate(c[:, None] * self._rows, offset, True, exact=tail is EXPONENTIAL)


def _rows(objective: Objective, w: Float[Tensor, "1 P"]) -> Float[Tensor, "n P"]:
    """How the numbers that the loss sees move with the weights."""
    if isinstance(objective, Quadratic):
        return objective.curvature(w)[0]
    if not (isinstance(objective, Problem) and objective.convex):
        raise ValueError("MinimisingMovement needs a convex loss: a Linear model, or a Quadratic")
    reading = objective.loss.reading
    if not (isinstance(reading, Signed | Pairwise | SoftPairwise) and objective.loss.tail.decreasing) and not (
        isinstance(reading, Residual) and objective.loss.tail is HALF_SQUARE
    ):
        raise ValueError(f"MinimisingMovement does not know the loss {objective.loss.name}; try flowsim.exponential")
    jacobian = objective.net.jacobian(w, objective.x)[0]
    if isinstance(reading, Residual):
        return jacobian.flatten(0, 1)
    linear = Pairwise() if isinstance(reading, SoftPairwise) else reading
    # linear in the outputs, so it reads their derivatives too
    return linear.read(jacobian.movedim(-1, 0), objective.y)[0].mT


# ---------------------------------------------------------------------------------------------------------------
# Steps along the flow
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImplicitSteps:
    """Implicit steps of second order with their own size for each trajectory.

    The error e of a step is what its quadrature lacks to third order, with the directions at its start, stage and
    end. A step is accepted where ‖e‖₂ ≤ atol + rtol·‖w‖₂ and, for a loss, |⟨∇Λ, e⟩| ≤ rtol·max(1, ΔΛ), and where
    neither the level nor the soft margin falls. Trajectories are taken one by one. A finite minimiser is reached in
    finite arclength, and the trajectory stops there as STATIONARY.
    """

    rtol: float
    atol: float

    def start(self, field: Field, objective: Objective, state: State) -> State:
        rows = [torch.tensor([b], device=state.w.device) for b in range(len(state.w))]
        if not supported(field.norm):
            raise ValueError(f"MinimisingMovement does not know the norm {field.norm.name!r}; try a norm of flowsim")
        if state.w.dtype != torch.float64:
            raise ValueError(f"MinimisingMovement needs weights in float64, got {state.w.dtype}; try w.double()")
        begun = [self._begin(field, objective.select(row), state.select(row)) for row in rows]
        return tree_map(lambda *parts: torch.cat(parts), *begun)

    def advance(self, field: Field, objective: Objective, state: State, until: Target, budget: int) -> State:
        field = replace(field, clock=ARCLENGTH)
        for b in state.running.nonzero().flatten():
            row = b[None]
            part, local = objective.select(row), state.select(row)
            mover = Mover(field.norm, part, local.w)

            def step(part: Objective, local: State, mover: Mover = mover) -> State:
                return self._step(field, mover, part, local)

            state = state.scatter(row, march(step, part, local, until.select(row), budget))
        return state

    def _begin(self, field: Field, objective: Objective, state: State) -> State:
        """The state with the direction of a short movement, unless it comes from such steps."""
        tallies = {name: torch.zeros_like(state.step_size) for name in ("newton", "gap")} | state.tallies
        state = replace(state, tallies=tallies)
        lam, h = objective.ascent(state.w)
        dual = float(field.norm.dual(h)[0])
        mover = Mover(field.norm, objective, state.w)
        if _resumes(state, mover.duals, dual):
            return state
        rise = 1.0 if objective.logarithmic else abs(float(lam))
        size = 1e-3 * rise / dual if dual > 0 else 1.0
        moved = mover.move(state.w[0], size, None)
        sample = replace(field, clock=ARCLENGTH).sample(objective, state.w, lam, h, moved.v[None])
        state = replace(
            state,
            step_size=torch.where(torch.isfinite(state.step_size), state.step_size, size),
            readings=state.readings | {"lam": sample.lam},
            tallies=_added(state, gradients=1.0, newton=moved.newton),
            memory=remember(sample) | {"duals": moved.duals[None]},
            segment=segment(objective, state, state.w, sample, sample, torch.zeros_like(state.step_size)),
        )
        return state.stopped(sample.dual == 0, Status.STATIONARY)

    def _step(self, field: Field, mover: Mover, objective: Objective, state: State) -> State:
        """One attempt of one trajectory."""
        first, eps = recall(state), float(state.step_size)
        # directions to a hundredth of what a step may err
        allowed = self.atol + self.rtol * float(torch.linalg.vector_norm(state.w))
        tol = min(1e-9, max(1e-15, min(1.0, 0.01 * allowed / eps) ** 2))
        trial = implicit_step(field, mover, objective, state.w[0], first, eps, state.memory["duals"][0], tol)
        excess = self._excess(field, objective, state, first, trial)
        counts = {"gradients": 2.0, "newton": trial.newton}
        factor = min(5.0, max(0.2, 0.9 * max(excess, 1e-10) ** (-1 / 3)))
        if excess > 1:
            tallies = _added(state, rejected=1.0, **counts)
            return self._judged(replace(state, tallies=tallies, step_size=state.step_size * min(factor, 0.9)), trial)
        tallies = _added(state, accepted=1.0, **counts)
        tallies["gap"] = tallies["gap"].clamp_min(trial.gap)
        moved = self._moved(objective, replace(state, tallies=tallies), first, trial)
        return self._judged(replace(moved, step_size=state.step_size * factor), trial)

    def _moved(self, objective: Objective, state: State, first: Sample, trial: "Trial") -> State:
        """The state after an accepted step."""
        dt = torch.full_like(state.step_size, trial.length)
        elapsed = log_elapsed_in(objective, first, trial.last, dt)
        readings = {
            "steps": state.readings["steps"] + 1,
            "lam": trial.last.lam,
            "log_time": torch.logaddexp(state.readings["log_time"], elapsed),
            "arclength": state.readings["arclength"] + dt,
            **{name: state.readings[name] + dt * trial.mean(name, first) for name in ("relative", "dissipated")},
        }
        return replace(
            state,
            w=trial.w[None],
            readings=readings,
            memory=remember(trial.last) | {"duals": trial.duals[None]},
            segment=segment(objective, state, trial.w[None], first, trial.last, dt, readings),
        )

    def _excess(self, field: Field, objective: Objective, state: State, first: Sample, trial: "Trial") -> float:
        """The error over its tolerance; infinite where the step is no good."""
        w, e = state.w[0], trial.error
        size = max(float(torch.linalg.vector_norm(w)), float(torch.linalg.vector_norm(trial.w)))
        excess = float(torch.linalg.vector_norm(e)) / (self.atol + self.rtol * size)
        rise = float(trial.last.lam - first.lam)
        if objective.logarithmic:
            excess = max(excess, abs(float(trial.last.ascent[0] @ e)) / (self.rtol * max(1.0, rise)))
        before = _soft_margin(field.norm, objective, first.lam, state.w)
        after = _soft_margin(field.norm, objective, trial.last.lam, trial.w[None])
        falls = rise < -1e-13 * max(1.0, abs(float(first.lam))) or (before > 0 and after < before * (1 - 1e-12))
        return excess if math.isfinite(excess) and trial.gap < _TRUSTED and not falls else math.inf

    def _judged(self, state: State, trial: "Trial") -> State:
        """The state, stopped if the trajectory cannot go on."""
        eps = torch.finfo(state.w.dtype).eps
        moved = trial.w[None] == state.w
        state = state.stopped(moved.all(-1) & trial.interior, Status.STATIONARY)
        stuck = ~(state.step_size > 4 * eps * torch.linalg.vector_norm(state.w, dim=-1) + 1e-3 * self.atol)
        finite = torch.isfinite(trial.w).all() & torch.isfinite(trial.last.lam)
        return state.stopped(stuck & ~finite, Status.NONFINITE).stopped(stuck, Status.STEP_TOO_SMALL)


@dataclass(frozen=True)
class Trial:
    """A step: its end, its error vector, the field at the stage and at the end."""

    w: Float[Tensor, " P"]
    error: Float[Tensor, " P"]
    middle: Sample
    last: Sample
    duals: Float[Tensor, " n"]
    length: float
    interior: bool
    gap: float
    newton: float

    def mean(self, name: str, first: Sample) -> Float[Tensor, " 1"]:
        """The mean of a rate over the step."""
        values = (first.rates[name], self.middle.rates[name], self.last.rates[name])
        return sum((c * v for c, v in zip(_NODES, values, strict=True)), start=torch.zeros_like(values[0]))


def implicit_step(
    field: Field,
    mover: Mover,
    objective: Objective,
    w: Float[Tensor, " P"],
    first: Sample,
    eps: float,
    start: Tensor | None,
    tol: float = 1e-15,
) -> Trial:
    """One step of arclength ``eps`` from w, where the direction is that of ``first``."""
    one = mover.move(w, _GAMMA * eps, start, tol)
    two = mover.move(w + (1 - _GAMMA) * eps * one.v, _GAMMA * eps, one.duals, tol)

    def sample(at: Movement) -> Sample:
        lam, h = objective.ascent(at.w[None])
        return field.sample(objective, at.w[None], lam, h, at.v[None])

    u = first.velocity[0]
    lacking = (-_NODES[0], 1 - _GAMMA - _NODES[1], _GAMMA - _NODES[2])
    error = eps * (lacking[0] * u + lacking[1] * one.v + lacking[2] * two.v)
    # inside the ball there is no steepest direction: the end is a minimiser
    interior = float(mover.norm.value(two.v)) < 0.999
    length = float(mover.norm.value(two.w - w)) if interior else eps
    gap, newton = max(one.gap, two.gap), one.newton + two.newton
    return Trial(two.w, error, sample(one), sample(two), two.duals, length, interior, gap, newton)


def _soft_margin(norm: Norm, objective: Objective, lam: Tensor, w: Float[Tensor, "1 P"]) -> float:
    """What the flow raises once it is positive (Tsilivis et al. 2026, Thm. 1 and 22); −1 where there is none."""
    if not isinstance(objective, Problem) or objective.loss.tail.inverse is None:
        return -1.0
    size = float(norm.value(w)[0])
    return float(objective.loss.soft_minimum(lam)[0]) / size if size > 0 else -1.0


def _resumes(state: State, duals: int, dual: float) -> bool:
    """Whether the state comes from such steps, of the same problem in the same norm."""
    memory = state.memory
    known = "duals" in memory and memory["duals"].shape[1] == duals
    return known and math.isclose(float(memory["dual"]), dual, rel_tol=1e-6)


def _added(state: State, **counts: float) -> dict[str, Tensor]:
    return state.tallies | {name: state.tallies[name] + count for name, count in counts.items()}
