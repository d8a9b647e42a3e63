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
from flowsim.velocity.ties import least_curved, support_within

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

    direction: Float[Tensor, "B P"]
    ascent: Float[Tensor, "B P"]
    dual: Float[Tensor, " B"]
    level: Float[Tensor, " B"]
    gap: Float[Tensor, " B"]
    multipliers: Float[Tensor, "B K"] | None = None
    sliding: Bool[Tensor, "B K"] | None = None


def select(
    objective: Objective,
    norm: Norm,
    w: Float[Tensor, "B P"],
    multipliers: Float[Tensor, "B K"] | None = None,
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
        D, kinks = place.attracting()
        u = torch.empty_like(w)
        for row, here in enumerate(kinks):
            D[row, here.index], u[row] = least_dual_norm(norm, here)
        h = _unless_cancelled(norm, place.hinges.gradient(D), kinks)
        turned = place.entered(norm, h, u)
        if not bool(turned.any()):
            u = _directions(objective, norm, w, h, D, kinks, tol)
            turned = place.entered(norm, h, u)
        if not bool(turned.any()):
            return _selection(objective, norm, w, h, u, D, kinks)
        place = replace(place, side=place.side ^ turned)


def variation(
    objective: Objective,
    norm: Norm,
    w: Float[Tensor, "B P"],
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
    u, h = selection.direction, selection.ascent
    D = u[:, :0] if selection.multipliers is None else selection.multipliers
    Hu = _hessian_along(objective, w, u, D)
    face = norm.face(h, tol)
    lowest = -face.support(-Hu)
    width = face.support(Hu) - lowest
    flat = width <= FLAT * norm.dual(Hu)
    for row, kinks in enumerate(_Place.of(objective, w, D, False).attracting()[1]):
        if len(kinks.c) and not flat[row]:
            slabs = kinks.respected(D[row, kinks.index])
            lowest[row] = -support_within(norm.face(h[row], tol), -Hu[row], slabs)
    excess = (Hu * u).sum(-1) - lowest
    return torch.where(flat, 0.0, excess / torch.where(flat, 1.0, width))


# --------------------------------------------------------------------------------------------------
# Kinks
# --------------------------------------------------------------------------------------------------


def _hinges(objective: Objective, w: Float[Tensor, "B P"]) -> Hinges:
    """The kinks of the level, which may be none."""
    if objective.kinks:
        return objective.hinges(w)
    h = objective.ascent(w)[1]
    return Hinges(h[:, :0], h[:, :0], h, lambda _: torch.zeros_like(h), lambda v: v[:, :0])


@dataclass(frozen=True)
class _Place:
    """Weights among their kinks: those that they are ``on``, and the side of each."""

    hinges: Hinges
    on: Bool[Tensor, "B K"]
    side: Bool[Tensor, "B K"]

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
        on = inside | (hinges.z.abs() <= _rounding(hinges, w))
        on &= hinges.along(_probe(w).expand_as(w)) != 0  # a normal that is zero makes no kink
        return _Place(hinges, on, torch.where(on, side, hinges.z > 0))

    def attracting(self) -> tuple[Float[Tensor, "B K"], list[AttractingKinks]]:
        """The attracting kinks that w is on, row by row, and the multipliers of all others, with 0
        for these."""
        free = self.on & (self.hinges.jump < 0)
        D = (self.side & ~free).to(self.hinges.z)
        b, normals = self.hinges.gradient(D), _normals(self.hinges, free)
        index = [row.nonzero()[:, 0] for row in free]
        c = [-jump[k] for jump, k in zip(self.hinges.jump, index, strict=True)]
        return D, list(map(AttractingKinks, b, normals, c, index))

    def entered(
        self, norm: Norm, h: Float[Tensor, "B P"], u: Float[Tensor, "B P"]
    ) -> Bool[Tensor, "B K"]:
        """The repelling kinks whose other side u enters. To take that side raises the slope, so
        that turning ends."""
        across = self.hinges.along(u) * (1 - 2 * self.side.to(u))
        gain = self.hinges.jump * across
        return self.on & (self.hinges.jump > 0) & (gain > FLAT * norm.dual(h)[:, None])


def _rounding(hinges: Hinges, w: Tensor, probes: int = 4) -> Float[Tensor, "B K"]:
    """A bound on the rounding errors of z: n_k·w with random signs has variance Σ_i (n_ki w_i)²."""
    generator = torch.Generator().manual_seed(0)
    bound = hinges.z.abs()
    for _ in range(probes):
        sign = torch.randint(2, w.shape[1:], generator=generator).to(w) * 2 - 1
        bound = bound.maximum(hinges.along(w * sign).abs())
    return ROUNDING * torch.finfo(w.dtype).eps * bound


def _probe(w: Tensor) -> Float[Tensor, " P"]:
    """A fixed vector that is orthogonal to nothing by accident."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(w.shape[1:], generator=generator, dtype=w.dtype).to(w.device)


def _normals(hinges: Hinges, free: Bool[Tensor, "B K"]) -> list[Float[Tensor, "k P"]]:
    """Normals of the free kinks of each row, one kink of every row at a time."""
    counts = free.sum(-1).tolist()
    order = free.int().argsort(stable=True, dim=-1, descending=True)
    normals = [hinges.base[:, :0]]
    for kink in order[:, : max(counts)].split(1, dim=1):
        normals.append(hinges.combine(torch.zeros_like(hinges.z).scatter(1, kink, 1.0)))
    stacked = torch.stack(normals[1:], 1) if max(counts) else hinges.base[:, None][:, :0]
    return [rows[:count] for rows, count in zip(stacked, counts, strict=True)]


def _unless_cancelled(
    norm: Norm, h: Float[Tensor, "B P"], kinks: list[AttractingKinks]
) -> Float[Tensor, "B P"]:
    """h, and zero where only rounding is left of the gradient b."""
    terms = norm.dual(torch.stack([here.b for here in kinks]))
    cancelled = norm.dual(h) <= ZERO * terms
    return torch.where(cancelled[:, None], 0.0, h)


# --------------------------------------------------------------------------------------------------
# Ties
# --------------------------------------------------------------------------------------------------


def _directions(
    objective: Objective,
    norm: Norm,
    w: Tensor,
    h: Tensor,
    D: Tensor,
    kinks: list[AttractingKinks],
    tol: float,
) -> Float[Tensor, "B P"]:
    """The unit direction of each row: its only one, or that of least curvature on its face."""
    u = norm.steepest(h)
    if not norm.ties:
        return u
    face, probe = norm.face(h, tol), _probe(w).expand_as(w)
    width = face.support(probe) + face.support(-probe)
    tied = (width > FLAT * norm.dual(probe)) & (norm.dual(h) > 0)
    C = objective.curvature(w) if bool(tied.any()) else h[:, None]
    for row in tied.nonzero()[:, 0].tolist():
        slabs = kinks[row].respected(D[row, kinks[row].index])
        u[row] = least_curved(norm.face(h[row], tol), C[row], slabs, u[row])
    return u


def _selection(
    objective: Objective,
    norm: Norm,
    w: Tensor,
    h: Tensor,
    u: Tensor,
    D: Tensor,
    kinks: list[AttractingKinks],
) -> Selection:
    dual = norm.dual(h)
    slope = torch.stack([here.slope(v) for here, v in zip(kinks, u, strict=True)])
    gap = torch.where(dual > 0, (dual - slope) / torch.where(dual > 0, dual, 1.0), 0.0)
    at = Selection(u, h, dual, objective.lam(w), gap)
    return replace(at, multipliers=D, sliding=(D > 0) & (D < 1)) if objective.kinks else at


def _hessian_along(
    objective: Objective, w: Float[Tensor, "B P"], u: Float[Tensor, "B P"], D: Tensor
) -> Float[Tensor, "B P"]:
    """Hu for H = −∇² of the level with fixed multipliers, up to a multiple of h."""
    if objective.convex:
        C = objective.curvature(w)
        return (C.mT @ (C @ u[..., None]))[..., 0]
    # central differences, over a length at which their two errors balance
    largest = w.abs().amax(-1, keepdim=True)
    fastest = u.abs().amax(-1, keepdim=True)
    t = torch.finfo(w.dtype).eps ** (1 / 3) * torch.where(largest > 0, largest, 1.0)
    t = t / torch.where(fastest > 0, fastest, 1.0)
    before, after = (_hinges(objective, at).gradient(D) for at in (w - t * u, w + t * u))
    return (before - after) / (2 * t)
