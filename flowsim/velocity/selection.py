r"""Which velocity at a tie or a kink.

The level is raised by steepest flow, dw/ds = u with ‖u‖ = 1. On kinks its gradient is a set,
Clarke's

    { base + Σ_k D_k jump_k n_k :  0 ≤ D_k ≤ 1 where z_k = 0,  D_k = 1{z_k > 0} elsewhere },

and at ties the steepest directions of one gradient fill a face of the ball. Flows take the gradient
h* of *least dual norm* (Tsilivis et al. 2026, Prop. 7) over the kinks that attract (jump < 0). It
comes from a saddle point,

    min_D ‖b − Σ c_k D_k n_k‖_*  =  max_{‖u‖ ≤ 1} ⟨b, u⟩ − Σ c_k max(⟨n_k, u⟩, 0),    c = −jump ≥ 0,

whose u lie on the face of h*, stay on the kinks with 0 < D_k < 1 and never enter the side that D_k
excludes. Which D, where several give the same dual norm, does not change this set. Of its points
the one of least curvature uᵀ(CᵀC)u is where minimising movements go as their steps shrink, and
among those that the loss cannot tell apart the shortest is taken."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from flowsim.norms.norm import Norm
from flowsim.problems.kinks import Hinges
from flowsim.problems.objective import Objective
from flowsim.velocity.multipliers import AttractingKinks, least_dual_norm
from flowsim.velocity.ties import Slabs, least_curved, support_within

_Rows = Float[Tensor, "B P"]
_PerKink = Float[Tensor, "B K"]
_Which = Bool[Tensor, "B K"]

ROUNDING = 256  # in units of the last place: how far from zero a computed z may be on its kink
ZERO = 1e-11  # a gradient that cancels to this part of its terms is zero
FLAT = 1e-9  # what differs by less, relative to its size, is equal


@dataclass(frozen=True)
class Selection:
    """The velocity of steepest flow: the unit direction u (zero where h* is) and the gradient h*
    that it belongs to.

    ``dual`` is ‖h*‖_*, the slope of the level along u. ``gap`` is how much the slope along u may
    fall short of the optimum, over ‖h*‖_*: zero up to rounding where the selection is right.
    ``multipliers`` D and ``sliding``, the kinks on which u stays since 0 < D < 1, are None for
    objectives without kinks."""

    direction: _Rows
    ascent: _Rows
    dual: Float[Tensor, " B"]
    level: Float[Tensor, " B"]
    gap: Float[Tensor, " B"]
    multipliers: _PerKink | None = None
    sliding: _Which | None = None


def select(
    objective: Objective,
    norm: Norm,
    w: _Rows,
    multipliers: _PerKink | None = None,
    *,
    tol: float = 1e-9,
    opposite: bool = False,
) -> Selection:
    """The velocity of the steepest flow at ``w``, row by row.

    ``multipliers`` strictly between 0 and 1 say that w sits on a kink, 0 and 1 on which side it is
    where z vanishes up to rounding. ``tol`` is the relative tolerance of ties.

    A repelling kink keeps the side of its multiplier if the velocity does. An undecided one,
    between 0 and 1, is taken to the positive side from ½ on, and without multipliers to the
    negative side; ``opposite`` takes the other. Where the velocity of that side enters the other
    one, so does the flow, and that side is taken instead."""
    norm = norm.bind(objective.layout)
    place = _Place.of(objective, w, multipliers, opposite)
    while True:
        least = place.least(norm)
        turned = place.entered(norm, least.h, least.u)
        if not bool(turned.any()):
            u = _directions(objective, norm, w, least, tol)
            turned = place.entered(norm, least.h, u)
        if not bool(turned.any()):
            return _selection(objective, norm, w, least, u)
        place = replace(place, side=place.side ^ turned)


def variation(
    objective: Objective,
    norm: Norm,
    w: _Rows,
    selection: Selection,
    *,
    tol: float = 1e-9,
) -> Float[Tensor, " B"]:
    """How far u is from solving ⟨Hu, v − u⟩ ≥ 0 for all v that tie with it, over the largest |⟨Hu,
    v − v'⟩|.

    H = −∇² of the level for fixed multipliers, with the curvature of a net's outputs, which
    `select` leaves out. Any right derivative of a flow solves this inequality (theory of steepest
    flow at ties); where the residual is not small, H is indefinite on the face and the flow
    branches or leaves it elsewhere."""
    norm = norm.bind(objective.layout)
    u = selection.direction
    D = u[:, :0] if selection.multipliers is None else selection.multipliers
    place = _Place.of(objective, w, D, False)
    _, kinks = place.attracting()
    least = _Least(selection.ascent, D, kinks, u)
    Hu = _hessian_along(objective, w, u, D)
    lowest, width = _range_over_ties(norm, least, Hu, tol)
    short = (Hu * u).sum(-1) - lowest
    return torch.where(width == 0, 0.0, short / width)


def _range_over_ties(
    norm: Norm, least: "_Least", a: _Rows, tol: float
) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    """The least ⟨a, v⟩ over the velocities v that tie, and the width of its range over the face,
    which is zero where only rounding is left of it."""
    face = norm.face(least.h, tol)
    lowest = -face.support(-a)
    width = face.support(a) - lowest
    width = torch.where(width <= FLAT * norm.dual(a), 0.0, width)
    for row, here in enumerate(least.kinks):
        if len(here.c) and width[row] > 0:
            alone = norm.face(least.h[row], tol)
            slabs = least.slabs(row)
            lowest[row] = -support_within(alone, -a[row], slabs)
    return lowest, width


# --------------------------------------------------------------------------------------------------
# Kinks
# --------------------------------------------------------------------------------------------------


def _hinges(objective: Objective, w: _Rows) -> Hinges:
    """The kinks of the level, which may be none."""
    if objective.kinks:
        return objective.hinges(w)
    _, h = objective.ascent(w)
    none = h[:, :0]
    return Hinges(
        none,
        none,
        base=h,
        combine=lambda _: torch.zeros_like(h),
        along=lambda _: none,
    )


@dataclass(frozen=True)
class _Least:
    """The gradient h of least dual norm, with the multipliers D of all kinks, the kinks that
    attract in each row, and one steepest direction u."""

    h: _Rows
    D: _PerKink
    kinks: list[AttractingKinks]
    u: _Rows

    def slabs(self, row: int) -> Slabs:
        """Where the velocity of a row may lie."""
        here = self.kinks[row]
        return here.respected(self.D[row, here.index])


@dataclass(frozen=True)
class _Place:
    """Weights among their kinks: those that they are ``on``, and the side of each."""

    hinges: Hinges
    on: _Which
    side: _Which

    @staticmethod
    def of(objective: Objective, w: Tensor, stored: Tensor | None, opposite: bool) -> "_Place":
        """The side is that of z, and on the kink that of the rule in `select`."""
        hinges = _hinges(objective, w)
        inside = torch.zeros_like(hinges.z, dtype=torch.bool)
        side = torch.full_like(inside, opposite)
        if stored is not None:
            stored = stored.reshape(hinges.z.shape).to(hinges.z)
            inside = (stored > 0) & (stored < 1)
            side = (stored >= 0.5) ^ (inside & opposite)
        z = hinges.z
        on = inside | (z.abs() <= _rounding(hinges, w))
        on &= hinges.along(_probe(w)) != 0  # a normal that is zero makes no kink
        side = torch.where(on, side, z > 0)
        return _Place(hinges, on, side)

    def attracting(self) -> tuple[_PerKink, list[AttractingKinks]]:
        """The attracting kinks that w is on, row by row, and the multipliers of all others, with 0
        for these."""
        hinges = self.hinges
        free = self.on & (hinges.jump < 0)
        D = (self.side & ~free).to(hinges.z)
        b = hinges.gradient(D)
        normals = _normals(hinges, free)
        kinks = []
        for row, n in enumerate(normals):
            index = free[row].nonzero()[:, 0]
            c = -hinges.jump[row, index]
            kinks.append(AttractingKinks(b[row], n, c, index))
        return D, kinks

    def least(self, norm: Norm) -> _Least:
        """See `_Least`; h is zero where only rounding is left of its terms."""
        D, kinks = self.attracting()
        u = []
        for row, here in enumerate(kinks):
            D[row, here.index], direction = least_dual_norm(norm, here)
            u.append(direction)
        h = self.hinges.gradient(D)
        b = torch.stack([here.b for here in kinks])
        cancelled = norm.dual(h) <= ZERO * norm.dual(b)
        h = torch.where(cancelled[:, None], 0.0, h)
        return _Least(h, D, kinks, torch.stack(u))

    def entered(self, norm: Norm, h: _Rows, u: _Rows) -> _Which:
        """The repelling kinks whose other side u enters. To take that side raises the slope, so
        that turning ends."""
        jump = self.hinges.jump
        repels = self.on & (jump > 0)
        across = torch.where(self.side, -1, 1)
        gain = jump * self.hinges.along(u) * across
        slope = norm.dual(h)[:, None]
        return repels & (gain > FLAT * slope)


def _rounding(hinges: Hinges, w: Tensor, probes: int = 4) -> _PerKink:
    """A bound on the rounding errors of z: n_k·w with random signs has variance Σ_i (n_ki w_i)²."""
    generator = torch.Generator().manual_seed(0)
    bound = hinges.z.abs()
    for _ in range(probes):
        bits = torch.randint(2, w.shape[1:], generator=generator)
        sign = bits.to(w) * 2 - 1
        z = hinges.along(w * sign)
        bound = bound.maximum(z.abs())
    return ROUNDING * torch.finfo(w.dtype).eps * bound


def _probe(w: _Rows) -> _Rows:
    """A fixed vector that is orthogonal to nothing by accident, in every row."""
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(w.shape[1:], generator=generator, dtype=w.dtype)
    return probe.to(w.device).expand_as(w)


def _normals(hinges: Hinges, free: _Which) -> list[Float[Tensor, "k P"]]:
    """Normals of the free kinks of each row, one kink of every row at a time."""
    counts = free.sum(-1).tolist()
    order = free.int().argsort(stable=True, dim=-1, descending=True)
    first = order[:, : max(counts)]
    none = torch.zeros_like(hinges.z)
    normals = [hinges.base]  # stands before the first, of which there may be none
    for kink in first.split(1, dim=1):
        only = none.scatter(1, kink, 1.0)
        normals.append(hinges.combine(only))
    rows = torch.stack(normals, 1)[:, 1:]
    return [row[:count] for row, count in zip(rows, counts, strict=True)]


# --------------------------------------------------------------------------------------------------
# Ties
# --------------------------------------------------------------------------------------------------


def _directions(objective: Objective, norm: Norm, w: _Rows, least: _Least, tol: float) -> _Rows:
    """The unit direction of each row: its only one, or that of least curvature on its face."""
    u = norm.steepest(least.h)
    if not norm.ties:
        return u
    face = norm.face(least.h, tol)
    probe = _probe(w)
    width = face.support(probe) + face.support(-probe)
    tied = width > FLAT * norm.dual(probe)
    tied &= norm.dual(least.h) > 0
    for index in tied.nonzero():
        row = int(index)
        C = objective.select(index).curvature(w[index])[0]
        alone = norm.face(least.h[row], tol)
        slabs = least.slabs(row)
        u[row] = least_curved(alone, C, slabs, u[row])
    return u


def _selection(
    objective: Objective,
    norm: Norm,
    w: _Rows,
    least: _Least,
    u: _Rows,
) -> Selection:
    dual = norm.dual(least.h)
    slopes = [here.slope(v) for here, v in zip(least.kinks, u, strict=True)]
    slope = torch.stack(slopes)
    rises = dual > 0
    gap = (dual - slope) / torch.where(rises, dual, 1.0)
    gap = torch.where(rises, gap, 0.0)
    at = Selection(u, least.h, dual, objective.lam(w), gap)
    if not objective.kinks:
        return at
    D = least.D
    sliding = (D > 0) & (D < 1)
    return replace(at, multipliers=D, sliding=sliding)


def _hessian_along(objective: Objective, w: _Rows, u: _Rows, D: Tensor) -> _Rows:
    """Hu for H = −∇² of the level with fixed multipliers, up to a multiple of h."""
    if objective.convex:
        C = objective.curvature(w)
        Hu = C.mT @ (C @ u[..., None])
        return Hu[..., 0]
    # central differences, over a length at which their two errors balance
    largest = w.abs().amax(-1, keepdim=True)
    fastest = u.abs().amax(-1, keepdim=True)
    size = torch.where(largest > 0, largest, 1.0)
    t = torch.finfo(w.dtype).eps ** (1 / 3) * size
    t = t / torch.where(fastest > 0, fastest, 1.0)
    before = _hinges(objective, w - t * u).gradient(D)
    after = _hinges(objective, w + t * u).gradient(D)
    return (before - after) / (2 * t)
