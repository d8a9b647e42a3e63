"""The two stages of an implicit step along kinks.

    k₁ = M(h(w) − Nᵀλ₁),                          w₁ = w + τk₁
    k₂ = M(h(w₁) − Nᵀλ₂ − 2Ak₁),                  w₊ = w + τ(3k₁ + k₂)/2

h is ∇Λ without the forces λ of the pairs (neuron, example) at hand; λ₁ makes w₁ and λ₂ makes w₊
consistent with their kinks (`step`). A pair with a mean multiplier D feels the force −jump·D."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from flowsim.flow.field import Sample
from flowsim.flow.sliding.forces import ActivePairs, GaussNewton, KinkCoupling, Metric
from flowsim.flow.sliding.selection import between, fraction_of, on_kink, sides_at
from flowsim.motion.state import State
from flowsim.numerics.shapes import Outputs, PerPair, PerTrajectory, Rows
from flowsim.problems.kinks import NetAt, TwoLayer, release_sides

GAMMA = 1 - 0.5**0.5


@dataclass(frozen=True)
class Impulses:
    """Bounds on the mean multipliers D over a step, of pairs that its forces may hold: low ≤ D ≤
    low + width.

    A pair keeps its multiplier until something happens to it after the share θ of the step, and has
    one between 0 and 1 for the rest, so that its mean lies between θ·given and θ·given + 1 − θ.
    What happens to a pair off its kink is that it gets there. To a pair on its kink it is the first
    arrival of another pair of its neuron, which changes the force on it at once. So pairs that pass
    or leave end at a bound, those that stick end in between, and all have felt the right impulse.
    Where nothing is foreseen θ is 0."""

    pairs: ActivePairs
    low: PerPair
    width: Float[Tensor, "B G c"]

    @staticmethod
    def of(pairs: ActivePairs, move: PerPair, given: PerPair) -> "Impulses":
        """The bounds for pairs that had the multipliers ``given`` and that would make the way
        ``move`` in the step."""
        z = pairs.point.z
        on = between(given) | on_kink(pairs.point)
        opposed = z * move < 0
        arrives = opposed & (z.abs() < move.abs()) & ~on
        way = torch.where(arrives, move.abs(), 1.0)
        share = z.abs() / way
        arrival = torch.where(arrives, share, torch.inf)
        first = arrival.amin(1, keepdim=True)  # of each neuron
        waits = torch.where(on & (first < 1), first, 0.0)
        share = torch.where(arrives, share, waits)
        low = share * given
        width = low + 1 - share - low
        return Impulses(pairs, low, pairs.take(width))

    def largest(self, jump: PerPair) -> Float[Tensor, "B G c"]:
        """The largest forces over the step, of kinks with these jumps."""
        return -self.pairs.take(jump) * self.width

    def multipliers(self, others: PerPair, fraction: Float[Tensor, "B G c"]) -> PerPair:
        """Mean multipliers where the pairs at hand feel this fraction of their largest forces."""
        low = self.pairs.take(self.low)
        return self.pairs.put(others, low + fraction * self.width)


@dataclass(frozen=True)
class Stage:
    """A stage: its k and where it leads, the multipliers there, the part of its largest force that
    each pair at hand has ``felt``, and the pairs that are held strictly inside their bounds."""

    k: Rows
    w: Rows
    multipliers: PerPair
    felt: Float[Tensor, "B G c"]
    free: Bool[Tensor, "B N m"]
    solved: Bool[Tensor, " B"]


@dataclass(frozen=True)
class SlidingTrial:
    """A step that has been tried: its first and its second stage, the kinks that hold at its end,
    and those that held after the first stage and were released for the second."""

    w1: Rows
    w: Rows
    outputs1: Outputs
    multipliers: PerPair
    stuck: Bool[Tensor, "B N m"]
    released: Bool[Tensor, "B N m"]
    solved: Bool[Tensor, " B"]


@dataclass(frozen=True)
class StepStart:
    """What both stages of a step of length ``tau`` from ``w`` share: the linear algebra there, and
    the bounds of the pairs at hand."""

    w: Rows
    tau: Float[Tensor, "B 1"]
    point: NetAt
    given: PerPair
    damping: GaussNewton
    coupling: KinkCoupling
    impulses: Impulses

    @staticmethod
    def of(
        metric: Metric, net: TwoLayer, state: State, first: Sample, tau: PerTrajectory
    ) -> "StepStart":
        """The start of a step of ``state``, where the field is ``first``."""
        w = state.w
        point = net.at(w)
        given = sides_at(point, state.multipliers)
        damping = GaussNewton.at(metric, point, given, GAMMA * tau)
        near = within_reach(metric, point, first.velocity, tau)
        pairs = ActivePairs.of(point, near, metric)
        coupling = KinkCoupling.of(pairs, damping)
        step = tau.to(w)[:, None]
        speed = point.along(damping(first.velocity))
        move = step[..., None] * speed
        impulses = Impulses.of(pairs, move, given)
        return StepStart(w, step, point, given, damping, coupling, impulses)

    def stage(
        self,
        h: Rows,
        upper: Float[Tensor, "B G c"],
        guess: Float[Tensor, "B G c"],
        others: PerPair,
        *,
        carried: Tensor | float = 0.0,
        offset: Tensor | float = 0.0,
        fraction: float = 1.0,
    ) -> Stage:
        """The stage with k = M(h − Nᵀλ − A·carried), to w + τ(offset + fraction·k), where z is
        consistent with forces λ in [0, upper]; pairs not at hand keep the multipliers
        ``others``."""
        pairs = self.coupling.pairs
        inverse = self.damping.metric.inverse
        without = self.damping(inverse(h) - carried)  # k without forces
        tau = fraction * self.tau[..., None]
        ahead = pairs.take(self.point.z) / tau
        ahead = ahead + pairs.along(offset / fraction + without)
        solution = self.coupling.held(ahead, upper, guess)
        held = inverse(h - pairs.combine(solution.force))
        k = self.damping(held - carried)
        w = self.w + self.tau * (offset + fraction * k)
        felt = fraction_of(solution.force, upper)
        multipliers = self.impulses.multipliers(others, felt)
        free = pairs.put(torch.zeros_like(others), solution.free.to(others))
        return Stage(k, w, multipliers, felt, free > 0, solution.solved)


def within_reach(
    metric: Metric, point: NetAt, velocity: Rows, tau: PerTrajectory
) -> Bool[Tensor, "B N m"]:
    """Attracting pairs that may come to their kink within a step of ``tau``."""
    pull = point.jump.abs() * metric.stiffness(point)
    speed = point.along(velocity).abs() + pull
    way = 1.5 * tau.to(speed)[:, None, None] * speed
    near = point.z.abs() <= way
    return (point.jump < 0) & point.net.distinct & near


def first_stage(start: StepStart) -> Stage:
    """k₁ and w₁ = w + τk₁."""
    point = start.point
    impulses = start.impulses
    pairs = start.coupling.pairs
    multipliers = torch.where(pairs.mask, impulses.low, start.given)
    h = point.gradient(point.slopes(multipliers))
    upper = impulses.largest(point.jump)
    guess = upper * pairs.take(start.given)
    return start.stage(h, upper, guess, start.given)


def second_stage(
    start: StepStart, one: Stage, point1: NetAt, hangs: Tensor, side: PerPair
) -> Stage:
    """k₂ and w₊ = w + τ(3k₁ + k₂)/2, where the pairs of ``hangs`` still attract at w₁ and the
    others at hand are on ``side``."""
    impulses = start.impulses
    mask = start.coupling.pairs.mask
    crossed = multipliers_of_crossings(start.point.z, point1.z, start.given)
    at_hand = torch.where(hangs, impulses.low, side)
    multipliers = torch.where(mask, at_hand, crossed)
    h = point1.gradient(point1.slopes(multipliers))
    jump = torch.where(hangs, point1.jump, 0.0)
    upper = impulses.largest(jump)
    return start.stage(
        h,
        upper,
        upper * one.felt,
        one.multipliers,
        carried=2 * one.k,
        offset=1.5 * one.k,
        fraction=0.5,
    )


def both_stages(start: StepStart, sides: tuple[int, ...], releases: PerTrajectory) -> SlidingTrial:
    """Both stages. What has become repelling inside the step is let go for the second, to the sides
    that follow the ``releases`` before."""
    one = first_stage(start)
    point1 = start.point.net.at(one.w)
    hangs = start.coupling.pairs.mask & (point1.jump < 0)
    released = ~hangs & one.free
    side = sides_of_releases(one.multipliers, released, releases, sides)
    two = second_stage(start, one, point1, hangs, side)
    z = point1.along(two.w)
    wrong = (z > 0) != (side > 0.5)
    late = released & wrong
    if bool(late.any()):
        two = _leaving_later(start, two, z, late, side)
    return SlidingTrial(
        w1=one.w,
        w=two.w,
        outputs1=point1.outputs,
        multipliers=two.multipliers,
        stuck=two.free,
        released=released,
        solved=one.solved & two.solved,
    )


def _leaving_later(
    start: StepStart, two: Stage, z: Tensor, late: Bool[Tensor, "B N m"], side: Tensor
) -> Stage:
    """The stage with pairs that were released so late that they ended, with ``z``, on their wrong
    side: they are put on their kinks, which they leave in the next step."""
    pairs = start.coupling.pairs
    stuck = two.free | late
    held = pairs.take(stuck.to(z)) > 0
    beyond = torch.where(late, z, 0.0)
    force = start.coupling.system.solve(held, pairs.take(beyond))
    inverse = start.damping.metric.inverse
    back = start.damping(inverse(pairs.combine(force)))
    multipliers = torch.where(late, side, two.multipliers)
    return replace(two, w=two.w - back, multipliers=multipliers, free=stuck)


def sides_of_releases(
    multipliers: PerPair,
    released: Bool[Tensor, "B N m"],
    before: PerTrajectory,
    sides: tuple[int, ...],
) -> PerPair:
    """The sides of pairs that no force holds (`kinks.release_sides`)."""
    flat = multipliers.flatten(1)
    side = release_sides(flat, released.flatten(1), before, sides)
    return side.view_as(multipliers)


def multipliers_of_crossings(z: Tensor, z1: Tensor, given: Tensor) -> PerPair:
    """Second-stage multipliers of pairs that no force holds.

    The step counts the mean of both stages. A pair that crosses its kink gets the share F of the
    step in which z > 0, so its second multiplier is 2F − (the first); the others have that of their
    side."""
    crosses = z * z1 < 0
    way = torch.where(crosses, (z - z1).abs(), 1.0)
    positive = torch.maximum(z, z1) / way
    shown = (z1 > 0).to(z1)
    side = torch.where(z1 == 0, given, shown)
    return torch.where(crosses, 2 * positive - given, side)
