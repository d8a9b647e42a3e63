"""The steepest flow of two-layer ReLU nets in quadratic norms, through its kinks.

Even gradient flow of a small ReLU net spends most of its time *on* kinks, where no ODE solver can
follow. A step here treats two things implicitly. The forces of attracting kinks are unknowns of the
step, determined by where it ends: a pair (neuron, example) ends on one side with that side's force,
or on the kink with a force in between (`boxqp`). And the softmax weights, which stiffen like Λ, are
damped by the Gauss–Newton matrix JᵀSJ. With M = (A + γτJᵀSJ)⁻¹, A the norm's matrix and γ = 1 −
1/√2,

    k₁ = M(h(w) − Nᵀλ₁),                          w₁ = w + τk₁
    k₂ = M(h(w₁) − Nᵀλ₂ − 2Ak₁),                  w₊ = w + τ(3k₁ + k₂)/2

is the two-stage Rosenbrock W-method of Verwer et al. (1999): second order for any matrix in the
place of JᵀSJ, and damping for this one. h is ∇Λ without the forces λ of the kinks at hand, N holds
their normals; λ₁ makes w₁ and λ₂ makes w₊ consistent with the kinks, so that a sliding pair has z =
0 to rounding, without drift and without a band. A force has bounds that remember what it was before
the events of the step (`_impulses`), without which a pair that only passes its kink would be held
there.

All linear algebra is in sample space and per neuron: nothing P × P is formed.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from flowsim.convex import box as boxqp
from flowsim.convex.box import Solution
from flowsim.flow.field import Field, Sample, memory_of, sample_of
from flowsim.flow.sliding.forces import ActivePairs, GaussNewton, KinkCoupling, Metric
from flowsim.flow.steps import (
    Controller,
    Method,
    begun,
    count_attempt,
    length,
    log_elapsed_in,
    segment_between,
    stop_if_stuck,
    without_size,
)
from flowsim.motion.clocks import GRADIENT, Clock, Target
from flowsim.motion.rule import advance_by_steps
from flowsim.motion.state import State, Status
from flowsim.problems.kinks import NetAt, TwoLayer, release_sides, require_sides
from flowsim.problems.objective import Objective
from flowsim.problems.problem import Problem

GAMMA = 1 - 0.5**0.5

_CONTROL = Controller(order=2, safety=0.8, most=3.0, retry=0.7)


@dataclass(frozen=True)
class SlidingTrial:
    """A step that has been tried: its first and its second stage, the kinks that hold at its end,
    and those that held after the first stage and were released for the second."""

    w1: Float[Tensor, "B P"]
    w: Float[Tensor, "B P"]
    outputs1: Float[Tensor, "B N C"]
    multipliers: Float[Tensor, "B N m"]
    stuck: Bool[Tensor, "B N m"]
    released: Bool[Tensor, "B N m"]
    solved: Bool[Tensor, " B"]


@dataclass(frozen=True)
class KinkImplicit(Method):
    """The method for two-layer nets with kinks in a quadratic norm; see the module.

    The step size kept in a state is relative arclength. A step is accepted where the results of
    first and second order differ by at most ``atol + rtol·‖w‖``, their margins by at most 100·rtol
    in standard deviation under the softmax weights, ∫‖h‖_*² dτ and the rise of Λ by at most
    ``rtol·(½ + rise/10)``, and where neither Λ nor the soft margin falls. The error of the result,
    which is the one of second order, is smaller.

    Where the outer weights of a neuron change sign, its sliding pairs become repelling and are
    *released*; both sides are solutions. The n-th release takes the side ``sides[n]``, 0 for z < 0
    and 1 for z > 0; those for which nothing is asked take the side whose multiplier is nearer
    (`kinks.taken`)."""

    own_clock: ClassVar[Clock | None] = GRADIENT

    sides: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        require_sides("KinkImplicit", self.sides)

    def start(self, field: Field, objective: Objective, state: State) -> State:
        problem, metric = _required(objective, field)
        net, before = problem.two_layer(len(state.w)), state
        point = net.at(state.w)
        stored = state.multipliers
        given = (point.z > 0).to(state.w) if stored is None else stored.view_as(point.z)
        given = _sides(net, point, given)
        stuck = (_at_kink(net, point) | _between(given)) & net.distinct
        multipliers, h = self._selected(metric, net, point, given, stuck)
        u = metric.norm.steepest(h)
        sample = field.sample(problem, state.w, point.lam, h, u)
        zero = torch.zeros_like(state.step_size)
        counts = {name: state.tallies.get(name, zero) for name in ("sliding", "releases")}
        counts["sliding"] = _count(_between(multipliers))
        state = replace(state, tallies=state.tallies | counts, multipliers=multipliers.flatten(1))
        if "tau" not in state.memory:
            state = without_size(state)
        state = begun(problem, state, sample, torch.full_like(zero, 1e-3), {"tau": zero})
        return _going_on(metric, point, before, _with_kinks(state, state.multipliers))

    def advance(
        self, field: Field, objective: Objective, state: State, until: Target, budget: int
    ) -> State:
        problem, metric = _required(objective, field)
        # one trajectory at a time: sets of kinks differ in size
        for row in torch.arange(len(state.w), device=state.w.device).split(1):
            part, begun = problem.select(row), state.select(row)
            local = advance_by_steps(
                lambda p, s: self._step(field, metric, p, s), part, begun, until.select(row), budget
            )
            if bool((local.readings["steps"] > begun.readings["steps"]).all()):
                local = _readable(metric, part, local)
            state = state.scatter(row, local)
        return state

    def _step(self, field: Field, metric: Metric, problem: Problem, state: State) -> State:
        """One attempt of every trajectory."""
        net, first = problem.two_layer(len(state.w)), sample_of(state)
        size = metric.norm.value(state.w).double()
        tau = state.step_size * size / first.dual_norm
        trial = self._tried(metric, net, state, first, tau)
        point = net.at(trial.w)
        released = trial.stuck & (point.jump >= 0) & ~trial.released
        before = state.tallies["releases"] + _count(trial.released)
        given = torch.where(
            released, self._taken(trial.multipliers, released, before), trial.multipliers
        )
        multipliers, h = self._selected(metric, net, point, given, trial.stuck)
        last = field.sample(problem, trial.w, point.lam, h, metric.norm.steepest(h))
        moved = self._moved(problem, metric, state, trial, (first, last), tau)
        excess = self._excess(field, problem, metric, state, trial, point, moved)
        accepted = excess <= 1
        assert state.multipliers is not None
        state = count_attempt(state, accepted, gradients=2)
        gained = {"sliding": _count(_between(multipliers)), "releases": before + _count(released)}
        moved = replace(moved, multipliers=multipliers.flatten(1), tallies=state.tallies | gained)
        moved = _with_kinks(moved, state.multipliers)
        state = moved.where(accepted, state)
        # too little to be seen in the level
        floor = tau * first.dual_norm**2 <= 16 * torch.finfo(state.w.dtype).eps * (
            1 + first.lam.abs()
        )
        state = state.stopped(~accepted & floor & torch.isfinite(last.lam), Status.PRECISION_FLOOR)
        return self._resized(state, excess)

    def _resized(self, state: State, excess: Tensor) -> State:
        """The next step size, and trajectories stopped that cannot go on."""
        step_size = (state.step_size * _CONTROL.factor(excess)).clamp_max(0.5)
        state = replace(state, step_size=step_size)
        return stop_if_stuck(state, step_size * length(state.w), torch.isfinite(excess))

    def _tried(
        self, metric: Metric, net: TwoLayer, state: State, first: Sample, tau: Tensor
    ) -> SlidingTrial:
        """Both stages of a step of τ."""
        assert state.multipliers is not None
        point, h = net.at(state.w), tau.to(state.w)[:, None]
        given = _sides(net, point, state.multipliers.view_as(point.z))
        damping = GaussNewton.at(metric, point, point.slopes(given), GAMMA * tau)
        mask = self._within_reach(metric, net, point, first, tau)
        pack = ActivePairs.of(mask, metric.scales is not None)
        hold = KinkCoupling.of(pack, damping, net, point)
        z, size = pack.take(point.z), state.w.shape[1]

        def stage(
            off: Tensor, far: Tensor, lead: Tensor, share: float, upper: Tensor, guess: Tensor
        ) -> tuple[Tensor, Solution]:
            """The k with ``z + τN(lead + share·k)`` consistent with forces in [0, upper], and the
            forces."""
            base = damping(metric.raised(off) - far)
            ahead = z / (share * h[..., None]) + hold.along(lead / share + base)
            solution = boxqp.solve_box(hold.blocks, ahead, upper, hold.low_rank, guess)
            return damping(metric.raised(off - hold.combine(solution.force, size)) - far), solution

        move = h[..., None] * point.along(damping(first.velocity))
        low, high = _impulses(point.z, move, given, _between(given) | _at_kink(net, point))
        zero, room = torch.zeros_like(state.w), pack.take(high - low)
        off = point.gradient(point.slopes(torch.where(mask, low, given)))
        upper = -pack.take(point.jump) * room
        k1, one = stage(off, zero, zero, 1.0, upper, upper * pack.take(given))
        w1 = state.w + h * k1
        used = pack.put(given, pack.take(low) + _share(one.force, upper) * room)

        point1 = net.at(w1)
        hangs = mask & (point1.jump < 0)
        # what has become repelling inside the step is let go
        released = ~hangs & (pack.put(torch.zeros_like(given), one.free.to(given)) > 0)
        side = self._taken(used, released, state.tallies["releases"])
        slope = torch.where(
            mask, torch.where(hangs, low, side), _fractions(point.z, point1.z, given)
        )
        off1 = point1.gradient(point1.slopes(slope))
        upper1 = -pack.take(torch.where(hangs, point1.jump, 0.0)) * room
        k2, two = stage(off1, 2 * k1, 1.5 * k1, 0.5, upper1, upper1 * _share(one.force, upper))
        w = state.w + h * (1.5 * k1 + 0.5 * k2)
        multipliers = pack.put(used, pack.take(low) + _share(two.force, upper1) * room)
        stuck = pack.put(torch.zeros_like(given), two.free.to(w)) > 0
        # a pair released so late that the step ends on its wrong side leaves its kink in the next
        # step
        wrong = released & ((point1.along(w) > 0) != (side > 0.5))
        if bool(wrong.any()):
            multipliers, stuck = torch.where(wrong, side, multipliers), stuck | wrong
            off_kink = pack.take(torch.where(wrong, point1.along(w), 0.0))
            w = w - damping(metric.raised(hold.combine(_forces_for(hold, stuck, off_kink), size)))
        return SlidingTrial(
            w1, w, point1.outputs, multipliers, stuck, released, one.solved & two.solved
        )

    def _within_reach(
        self, metric: Metric, net: TwoLayer, point: NetAt, first: Sample, tau: Tensor
    ) -> Bool[Tensor, "B N m"]:
        """Attracting pairs that may come to their kink within the step."""
        own = metric.stiffness(net, point)
        reach = point.along(first.velocity).abs() + point.jump.abs() * own
        return (
            (point.jump < 0)
            & net.distinct
            & (point.z.abs() <= 1.5 * tau.to(own)[:, None, None] * reach)
        )

    def _selected(
        self, metric: Metric, net: TwoLayer, point: NetAt, given: Tensor, stuck: Tensor
    ) -> tuple[Float[Tensor, "B N m"], Float[Tensor, "B P"]]:
        """Multipliers and the ∇Λ of least dual norm, over the kinks that hold the pairs in
        ``stuck``.

        The others are on the side that z shows; a stuck pair whose kink repels is let go.
        """
        hangs = stuck & (point.jump < 0)
        sides = torch.where(stuck, (given >= 0.5).to(given), (point.z > 0).to(point.z))
        pack = ActivePairs.of(hangs, metric.scales is not None)
        blocks = metric.blocks(pack, net, point)
        off = point.gradient(point.slopes(torch.where(hangs, 0.0, sides)))
        upper = -pack.take(torch.where(hangs, point.jump, 0.0))
        ahead = pack.along(net, metric.raised(off))
        force = boxqp.solve_box(blocks, ahead, upper, start=upper * pack.take(given)).force
        return pack.put(sides, _share(force, upper)), off - pack.combine(net, force, off.shape[1])

    def _taken(
        self, multipliers: Tensor, released: Tensor, before: Tensor
    ) -> Float[Tensor, "B N m"]:
        """The sides of pairs that no force holds."""
        flat = release_sides(multipliers.flatten(1), released.flatten(1), before, self.sides)
        return flat.view_as(multipliers)

    def _moved(
        self,
        problem: Problem,
        metric: Metric,
        state: State,
        trial: SlidingTrial,
        ends: tuple[Sample, Sample],
        tau: Tensor,
    ) -> State:
        """The state at the end of the step. Readings by Simpson's rule with the mean velocity for
        the middle one: it is free of the fast motion of the softmax weights that the ends still
        show."""
        a, b = ends
        speed = metric.norm.value(trial.w - state.w).double() / tau
        sizes = [
            metric.norm.value(w).double() for w in (state.w, 0.5 * (state.w + trial.w), trial.w)
        ]

        def mean(start: Tensor, inner: Tensor, end: Tensor) -> Tensor:
            return tau * (start + 4 * inner + end) / 6

        rates = [a.dual_norm, speed, b.dual_norm]
        gained = {
            "arclength": mean(*rates),
            "relative": mean(*(rate / size for rate, size in zip(rates, sizes, strict=True))),
            "dissipated": mean(*(rate**2 for rate in rates)),
        }
        log_time = torch.logaddexp(state.readings["log_time"], log_elapsed_in(problem, a, b, tau))
        readings = {"steps": state.readings["steps"] + 1, "lam": b.lam, "log_time": log_time}
        readings |= {name: state.readings[name] + gain for name, gain in gained.items()}
        return replace(
            state,
            w=trial.w,
            readings=readings,
            memory=memory_of(b) | {"tau": tau},
            segment=segment_between(problem, state, trial.w, a, b, tau, readings),
        )

    def _excess(
        self,
        field: Field,
        problem: Problem,
        metric: Metric,
        state: State,
        trial: SlidingTrial,
        point: NetAt,
        moved: State,
    ) -> Float[Tensor, " B"]:
        """The error over its tolerance; infinite where the step cannot be right."""
        size = metric.norm.value(trial.w).double()
        direction = metric.norm.value(trial.w - trial.w1).double() / (
            field.atol + field.rtol * size
        )
        root = problem.loss.curvature(point.outputs, point.net.y)
        logits = (root.mT @ (point.outputs - trial.outputs1).flatten(1)[..., None]).flatten(1)
        rise = moved.readings["lam"] - state.readings["lam"]
        spent = moved.readings["dissipated"] - state.readings["dissipated"]
        excess = torch.stack(
            [
                direction,
                torch.linalg.vector_norm(logits, dim=-1).double() / (100 * field.rtol),
                (spent - rise).abs() / (field.rtol * (0.5 + 0.1 * rise.abs())),
            ]
        ).amax(0)
        good = (
            torch.isfinite(excess)
            & (rise > 0)
            & trial.solved
            & ~self._margin_falls(problem, metric, state, moved)
        )
        return torch.where(good, excess, torch.inf)

    def _margin_falls(
        self, problem: Problem, metric: Metric, state: State, moved: State
    ) -> Bool[Tensor, " B"]:
        """Whether the step lowers the soft margin, which the flow never does once it is
        positive."""
        if problem.loss.tail.inverse is None:
            return torch.zeros_like(state.status, dtype=torch.bool)
        before, after = (problem.loss.soft_minimum(s.readings["lam"]) for s in (state, moved))
        growth = (
            metric.norm.value(moved.w) / metric.norm.value(state.w)
        ).double() ** problem.degree
        return (before > 0) & (after < before * growth * (1 - 1e-14))


def _forces_for(
    hold: KinkCoupling, stuck: Bool[Tensor, "B N m"], move: Float[Tensor, "B G c"]
) -> Float[Tensor, "B G c"]:
    """The forces on stuck pairs that move their coordinates by so much."""
    held = hold.pack.take(stuck.to(move)) > 0
    return boxqp.ridged(hold.blocks, hold.low_rank)[0].solve(held, move)


def _required(objective: Objective, field: Field) -> tuple[Problem, Metric]:
    if not isinstance(objective, Problem):
        raise ValueError(
            f"got a {type(objective).__name__} with kinks, expected a Problem with a two-layer net; try "
            "flowsim.select for the velocity at one place, or flowsim.SmallStep for the small-step path"
        )
    if not field.norm.quadratic:
        raise ValueError(
            f"got the norm {field.norm.name!r}, expected a quadratic one (L2, Mahalanobis, Euclidean of these) for a "
            "net with kinks; try flowsim.SmallStep for the small-step path"
        )
    return objective, Metric.of(field.norm)


def _going_on(metric: Metric, point: NetAt, before: State, anew: State) -> State:
    """``anew``, but ``before`` itself for trajectories that come from this flow of this problem.

    A selection at the same place may round otherwise, and where a pair has just been released it
    may take the other side."""
    if (
        before.multipliers is None
        or before.segment is None
        or before.memory.keys() != anew.memory.keys()
    ):
        return anew
    h, kept = point.gradient(point.slopes(before.multipliers.view_as(point.z))), before.memory
    pairs = [
        (before.readings["lam"], point.lam.double()),
        (kept["dual_norm"], metric.norm.dual(h).double()),
        (metric.norm.dual(kept["ascent"] - h).double() + kept["dual_norm"], kept["dual_norm"]),
    ]
    digits = torch.finfo(h.dtype).eps ** 0.5
    same = [(a - b).abs() <= digits * (a.abs() + b.abs()) for a, b in pairs]
    tallies = before.tallies | {"gradients": anew.tallies["gradients"]}
    return replace(before, tallies=tallies).where(torch.stack(same).all(0), anew)


def _readable(metric: Metric, problem: Problem, state: State) -> State:
    """The state with slopes of its last step that a cubic over a long step can follow.

    Off the slow manifold the velocity points back to it, and the cubic would leave it. So the
    slopes lose their stiff part (1 − M)³v, with M the damping among velocities that stay on the
    kinks of both ends; what remains of the rest is exact to third order in the step. Only steps
    that are read need it."""
    step = state.segment
    assert step is not None
    assert step.multipliers0 is not None
    assert step.multipliers1 is not None
    net = problem.two_layer(len(step.w0))
    point = net.at(step.w0)
    given = _sides(net, point, step.multipliers0.view_as(point.z))
    damping = GaussNewton.at(metric, point, point.slopes(given), GAMMA * state.memory["tau"])
    sliding = (_between(step.multipliers0) & _between(step.multipliers1)).view_as(point.z)
    hold = KinkCoupling.of(ActivePairs.of(sliding, metric.scales is not None), damping, net, point)
    solve = boxqp.ridged(hold.blocks, hold.low_rank)[0].factored(hold.pack.valid)

    def stiff(v: Tensor) -> Tensor:
        damped = damping(v)
        held = hold.combine(solve(hold.along(damped)), v.shape[1])
        return v - damped + damping(metric.raised(held))

    slopes = [slope - stiff(stiff(stiff(slope))) for slope in (step.slope0, step.slope1)]
    return replace(state, segment=replace(step, slope0=slopes[0], slope1=slopes[1]))


def _with_kinks(state: State, before: Tensor | None) -> State:
    """The state whose last step knows the kinks at both its ends."""
    if state.segment is None:
        return state
    step = replace(state.segment, multipliers0=before, multipliers1=state.multipliers)
    return replace(state, segment=step)


def _share(force: Tensor, upper: Tensor) -> Tensor:
    return force / torch.where(upper > 0, upper, 1.0)


def _between(multipliers: Tensor) -> Bool[Tensor, "..."]:
    """Which pairs slide: those whose multiplier is at neither end."""
    return (multipliers > 0) & (multipliers < 1)


def _count(mask: Tensor) -> Float[Tensor, " B"]:
    return mask.flatten(1).sum(-1).double()


def _sides(net: TwoLayer, point: NetAt, multipliers: Tensor) -> Float[Tensor, "B N m"]:
    """The stored multipliers for pairs on or within rounding of their kink, else the side that z
    shows."""
    return torch.where(
        _between(multipliers) | _at_kink(net, point), multipliers, (point.z > 0).to(point.z)
    )


def _at_kink(net: TwoLayer, point: NetAt) -> Bool[Tensor, "B N m"]:
    size = torch.diagonal(net.xx, dim1=-2, dim2=-1).sqrt()[..., None]
    rounding = 16 * torch.finfo(point.z.dtype).eps * net.x.shape[-1] ** 0.5
    return point.z.abs() <= rounding * size * torch.linalg.vector_norm(point.first, dim=-1)[:, None]


def _impulses(
    z: Float[Tensor, "B N m"],
    move: Float[Tensor, "B N m"],
    given: Float[Tensor, "B N m"],
    on: Bool[Tensor, "B N m"],
) -> tuple[Float[Tensor, "B N m"], Float[Tensor, "B N m"]]:
    """Bounds on the mean multipliers over a step of pairs that its forces may hold.

    A pair keeps its multiplier until something happens to it after the share θ of the step, and has
    one between 0 and 1 for the rest, so that its mean lies between θ·given and θ·given + 1 − θ.
    What happens to a pair off its kink is that it gets there; ``move`` is the way that it would
    make in the step. To a pair on its kink it is the first arrival of another pair of its neuron,
    which changes the force on it at once. So pairs that pass or leave end at a bound, those that
    stick end in between, and all have felt the right impulse. Where nothing is foreseen θ is 0."""
    arrives = (z * move < 0) & (z.abs() < move.abs()) & ~on
    share = z.abs() / torch.where(arrives, move.abs(), 1.0)
    first = torch.where(arrives, share, torch.inf).amin(1, keepdim=True)
    share = torch.where(arrives, share, torch.where(on & (first < 1), first, 0.0))
    return share * given, share * given + 1 - share


def _fractions(z: Tensor, z1: Tensor, given: Tensor) -> Float[Tensor, "B N m"]:
    """Second-stage multipliers of pairs that no force holds.

    The step counts the mean of both stages. A pair that crosses its kink gets the share F of the
    step in which z > 0, so its second multiplier is 2F − (the first); the others have that of their
    side."""
    crosses = z * z1 < 0
    positive = torch.maximum(z, z1) / torch.where(crosses, (z - z1).abs(), 1.0)
    return torch.where(crosses, 2 * positive - given, torch.where(z1 == 0, given, (z1 > 0).to(z1)))
