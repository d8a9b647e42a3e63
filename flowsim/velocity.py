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

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linprog
from torch import Tensor

from flowsim.convex import box as boxqp
from flowsim.convex.admm import Form, split
from flowsim.norms.faces import Face
from flowsim.norms.norm import Norm
from flowsim.norms.vector import L1, Linf
from flowsim.problems.kinks import Hinges
from flowsim.problems.objective import Objective

ROUNDING = 256  # in units of the last place: how far from zero a computed z may be on its kink


END = 1e-9  # multipliers so near to 0 or 1 are taken to be there


ZERO = 1e-11  # a gradient that cancels to this part of its terms is zero


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


@dataclass(frozen=True)
class _Corner:
    """The attracting kinks at one place: normals ``n (K, P)``, ``c = −jump``, and the gradient
    ``b`` for D = 0."""

    b: Float[Tensor, " P"]
    n: Float[Tensor, "K P"]
    c: Float[Tensor, " K"]
    index: Int[Tensor, " K"]

    def gradient(self, D: Tensor) -> Tensor:
        return self.b - (self.c * D) @ self.n

    def slope(self, u: Tensor) -> Tensor:
        """The directional derivative of the level."""
        return self.b @ u - self.c @ (self.n @ u).clamp_min(0)


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
    level, h = objective.ascent(w)
    if not objective.kinks:
        corners = [_Corner(g, g.new_zeros(0, len(g)), g[:0], torch.arange(0)) for g in h]
        return _selection(
            norm, level, h, _directions(objective, norm, w, h, None, corners, tol), corners
        )
    hinges = objective.hinges(w)
    on, side = _sides(hinges, w, multipliers, opposite)
    while True:
        D, corners = _corners(hinges, on, side)
        optimal = torch.empty_like(w)
        for row, corner in enumerate(corners):
            D[row, corner.index], optimal[row] = _saddle_point(norm, corner)
        h = hinges.gradient(D)
        cancelled = norm.dual(h) <= ZERO * norm.dual(torch.stack([corner.b for corner in corners]))
        h = torch.where(cancelled[:, None], 0.0, h)
        turned = _turned(norm, hinges, on, side, h, optimal)
        if not bool(turned.any()):
            u = _directions(objective, norm, w, h, D, corners, tol)
            turned = _turned(norm, hinges, on, side, h, u)
            if not bool(turned.any()):
                return _selection(norm, level, h, u, corners, D)
        side = side ^ turned


def _selection(
    norm: Norm,
    level: Tensor,
    h: Tensor,
    u: Tensor,
    corners: list["_Corner"],
    D: Tensor | None = None,
) -> Selection:
    dual = norm.dual(h)
    slope = torch.stack([corner.slope(v) for corner, v in zip(corners, u, strict=True)])
    gap = torch.where(dual > 0, (dual - slope) / torch.where(dual > 0, dual, 1.0), 0.0)
    return Selection(u, h, dual, level, gap, D, None if D is None else (D > 0) & (D < 1))


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
    u, h, D = selection.direction, selection.ascent, selection.multipliers
    corners: list[_Corner] = []
    if D is not None:
        hinges = objective.hinges(w)
        corners = _corners(hinges, *_sides(hinges, w, D, False))[1]
    bend = _hessian_along(objective, w, u, D)
    face = norm.face(h, tol)
    width = face.support(bend) + face.support(-bend)
    lowest = -face.support(-bend)
    flat = width <= 1e-9 * norm.dual(bend)
    for row, corner in enumerate(corners):
        if D is not None and len(corner.c) and not flat[row]:
            lowest[row] = -_support(
                norm.face(h[row], tol), -bend[row], corner.n, _bounds(D[row, corner.index])
            )
    return torch.where(flat, 0.0, ((bend * u).sum(-1) - lowest) / torch.where(flat, 1.0, width))


# --------------------------------------------------------------------------------------------------
# Kinks
# --------------------------------------------------------------------------------------------------


def _sides(
    hinges: Hinges, w: Tensor, stored: Tensor | None, opposite: bool
) -> tuple[Bool[Tensor, "B K"], Bool[Tensor, "B K"]]:
    """Which kinks w is on, and the side of each: that of z, on the kink that of the rule in
    `select`."""
    inside = torch.zeros_like(hinges.z, dtype=torch.bool)
    side = torch.full_like(inside, opposite)
    if stored is not None:
        stored = stored.reshape(hinges.z.shape).to(hinges.z)
        inside = (stored > 0) & (stored < 1)
        side = (stored >= 0.5) ^ (inside & opposite)
    on = inside | (hinges.z.abs() <= _rounding(hinges, w))
    on &= hinges.along(_probe(w).expand_as(w)) != 0  # a normal that is zero makes no kink
    return on, torch.where(on, side, hinges.z > 0)


def _corners(
    hinges: Hinges, on: Bool[Tensor, "B K"], side: Bool[Tensor, "B K"]
) -> tuple[Float[Tensor, "B K"], list[_Corner]]:
    """The attracting kinks that w is on, row by row, and the multipliers of all others, with 0 for
    these."""
    free = on & (hinges.jump < 0)
    D = (side & ~free).to(hinges.z)
    b, normals = hinges.gradient(D), _normals(hinges, free)
    index = [row.nonzero()[:, 0] for row in free]
    return D, [_Corner(b[i], normals[i], -hinges.jump[i, k], k) for i, k in enumerate(index)]


def _turned(
    norm: Norm, hinges: Hinges, on: Tensor, side: Tensor, h: Tensor, u: Tensor
) -> Bool[Tensor, "B K"]:
    """The repelling kinks whose other side u enters. To take that side raises the slope, so that
    turning ends."""
    gain = hinges.jump * hinges.along(u) * (1 - 2 * side.to(u))
    return on & (hinges.jump > 0) & (gain > 1e-9 * norm.dual(h)[:, None])


def _rounding(hinges: Hinges, w: Tensor, probes: int = 4) -> Float[Tensor, "B K"]:
    """A bound on the rounding errors of z: n_k·w with random signs has variance Σ_i (n_ki w_i)²."""
    generator = torch.Generator().manual_seed(0)
    signs = [
        torch.randint(2, w.shape[1:], generator=generator).to(w) * 2 - 1 for _ in range(probes)
    ]
    size = torch.stack([hinges.z.abs(), *(hinges.along(w * sign).abs() for sign in signs)]).amax(0)
    return ROUNDING * torch.finfo(w.dtype).eps * size


def _probe(w: Tensor) -> Float[Tensor, " P"]:
    """A fixed vector that is orthogonal to nothing by accident."""
    return torch.randn(w.shape[1:], generator=torch.Generator().manual_seed(0), dtype=w.dtype).to(
        w.device
    )


def _normals(hinges: Hinges, free: Bool[Tensor, "B K"]) -> list[Float[Tensor, "k P"]]:
    """Normals of the free kinks of each row, one kink of every row at a time."""
    count, order = free.sum(-1), free.int().argsort(stable=True, dim=-1, descending=True)
    unit = [
        torch.zeros_like(hinges.z).scatter(1, order[:, i : i + 1], 1.0)
        for i in range(int(count.max()))
    ]
    stack = (
        torch.stack([hinges.combine(e) for e in unit], 1)
        if unit
        else hinges.base[:, None, :][:, :0]
    )
    return [stack[row, :k] for row, k in enumerate(count.tolist())]


def _saddle_point(norm: Norm, corner: _Corner) -> tuple[Float[Tensor, " K"], Float[Tensor, " P"]]:
    """D in [0, 1] for which ‖b − Σ c_k D_k n_k‖_* is least, and one of the steepest u."""
    scale = norm.dual(corner.b)
    if not (len(corner.c) and scale > 0):
        return torch.zeros_like(corner.c), norm.steepest(
            corner.b
        )  # no gradient is shorter than zero
    scaled = _Corner(corner.b / scale, corner.n, corner.c / scale, corner.index)
    solve = (
        _least_squares
        if norm.quadratic
        else _linear_program
        if isinstance(norm, L1 | Linf)
        else _splitting
    )
    D, u = solve(scaled, norm)
    D = torch.where(D < END, 0.0, D)
    return torch.where(D > 1 - END, 1.0, D), u


def _least_squares(corner: _Corner, norm: Norm) -> tuple[Float[Tensor, " K"], Float[Tensor, " P"]]:
    """In a quadratic norm ‖h‖_*² = ⟨h, A⁻¹h⟩: a box-constrained quadratic programme, in forces
    c·D."""
    raised = norm.dual(corner.n)[:, None] * norm.steepest(corner.n)
    blocks, z = (corner.n @ raised.mT)[None, None], (raised @ corner.b)[None, None]
    solved = boxqp.solve_box(blocks, z, corner.c[None, None], max_sweeps=40 + 4 * len(corner.c))
    D = solved.force[0, 0] / corner.c
    return D, norm.steepest(corner.gradient(D))


def _linear_program(corner: _Corner, norm: Norm) -> tuple[Tensor, Tensor]:
    """In ℓ∞ and ℓ1 the saddle point is a linear program; D are the multipliers of s_k ≥ c_k ⟨n_k,
    u⟩."""
    K, P = corner.n.shape
    b, rows = corner.b.cpu().numpy(), (corner.c[:, None] * corner.n).cpu().numpy()
    if isinstance(norm, L1):  # u = p − q with p, q ≥ 0
        b, rows = np.concatenate([b, -b]), np.concatenate([rows, -rows], 1)
        box = np.repeat([[0.0, np.inf]], 2 * P + K, 0)
        ball = np.concatenate([np.ones(2 * P), np.zeros(K)])[None]
    else:
        box = np.repeat([[-1.0, 1.0], [0.0, np.inf]], [P, K], 0)
        ball = np.zeros((0, P + K))
    A = np.concatenate([np.concatenate([rows, -np.eye(K)], 1), ball])
    limit = np.concatenate([np.zeros(K), np.ones(len(ball))])
    tight = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
    done = linprog(
        np.concatenate([-b, np.ones(K)]), A, limit, bounds=box, method="highs", options=tight
    )
    if done.x is None:
        raise ArithmeticError(f"the multipliers of {K} kinks were not found: {done.message}")
    u = done.x[:P] - done.x[P : 2 * P] if isinstance(norm, L1) else done.x[:P]
    return torch.from_numpy(-done.ineqlin.marginals[:K]).to(corner.b).clamp(0, 1), torch.from_numpy(
        u
    ).to(corner.b)


def _splitting(corner: _Corner, norm: Norm) -> tuple[Tensor, Tensor]:
    """D from the splitting method, with the unit ball and the kinks c max(⟨n, u⟩, 0) as its
    parts."""
    size = torch.linalg.vector_norm(corner.n, dim=-1)
    c = corner.c * size
    done = split(
        Form(corner.b.new_zeros(0, len(corner.b)), 0.0, corner.b),
        norm.project,
        corner.n / size[:, None],
        lambda v, rho: torch.where(v > 0, (v - c / rho).clamp_min(0), v),
        start=norm.steepest(corner.b),
    )
    return (done.force / c).clamp(0, 1), done.at


# --------------------------------------------------------------------------------------------------
# Ties
# --------------------------------------------------------------------------------------------------


def _directions(
    objective: Objective,
    norm: Norm,
    w: Tensor,
    h: Tensor,
    D: Tensor | None,
    corners: list[_Corner],
    tol: float,
) -> Float[Tensor, "B P"]:
    """The unit direction of each row: its only one, or that of least curvature on its face."""
    if not norm.ties:
        return norm.steepest(h)
    face, u = norm.face(h, tol), norm.steepest(h)
    probe = _probe(w)
    width = face.support(probe.expand_as(w)) + face.support(-probe.expand_as(w))
    tied = (width > 1e-9 * norm.dual(probe)) & (norm.dual(h) > 0)
    if bool(tied.any()):
        C = objective.curvature(w)
        for row in tied.nonzero()[:, 0].tolist():
            corner = corners[row]
            ends = _bounds(corner.c if D is None else D[row, corner.index])
            u[row] = _least_curved(norm.face(h[row], tol), C[row], corner.n, ends, u[row])
    return u


def _bounds(D: Float[Tensor, " K"]) -> tuple[Tensor, Tensor]:
    """Where ⟨n, u⟩ may lie: at most 0 for D = 0, at least 0 for D = 1, 0 in between."""
    return torch.where(D <= 0, -torch.inf, 0.0).to(D), torch.where(D >= 1, torch.inf, 0.0).to(D)


def _least_curved(
    face: Face, C: Tensor, n: Tensor, ends: tuple[Tensor, Tensor], start: Tensor
) -> Float[Tensor, " P"]:
    """The point of the face with ⟨n, u⟩ between its ends and least ‖Cu‖, the shortest one if there
    are several."""
    n = n / torch.linalg.vector_norm(n, dim=-1, keepdim=True)
    _, s, seen = torch.linalg.svd(C, full_matrices=False)
    kept = s > 1e-7 * s.amax(-1, keepdim=True)  # curvature below rounding is none
    s, seen = s[kept], seen[kept]
    u = start
    if len(s):
        form = Form((s / s[0])[:, None] * seen, 0.0, torch.zeros_like(u))
        u = split(form, face.project, n, lambda v, _: v.clamp(*ends), start=u).at
    if len(s) == len(u):
        return u
    rows = torch.cat([n, seen])
    low, high = (torch.cat([end, seen @ u]) for end in ends)
    form = Form(C[:0], 1.0, torch.zeros_like(u))
    return split(form, face.project, rows, lambda v, _: v.clamp(low, high), start=u).at


def _support(face: Face, a: Tensor, n: Tensor, ends: tuple[Tensor, Tensor]) -> Float[Tensor, ""]:
    """The maximum of ⟨a, v⟩ over the face with ⟨n, v⟩ between its ends: a bound from above, by the
    multipliers."""
    n, size = n / torch.linalg.vector_norm(n, dim=-1, keepdim=True), a.abs().amax()
    if not size > 0:
        return a.sum()
    form = Form(n[:0], 0.0, a / size)
    force = split(form, face.project, n, lambda v, _: v.clamp(*ends), start=face.element()).force
    force = torch.where(torch.isinf(ends[0]), force.clamp_min(0), force)
    force = torch.where(torch.isinf(ends[1]), force.clamp_max(0), force)
    return face.support(a - size * (force @ n))


def _hessian_along(
    objective: Objective, w: Tensor, u: Tensor, D: Tensor | None
) -> Float[Tensor, "B P"]:
    """Hu for H = −∇² of the level with fixed multipliers, up to a multiple of h."""
    if objective.convex:
        C = objective.curvature(w)
        return (C.mT @ (C @ u[..., None]))[..., 0]

    def gradient(at: Tensor) -> Tensor:
        return objective.ascent(at)[1] if D is None else objective.hinges(at).gradient(D)

    size, reach = w.abs().amax(-1, keepdim=True), u.abs().amax(-1, keepdim=True)
    t = (
        torch.finfo(w.dtype).eps ** (1 / 3)
        * torch.where(size > 0, size, 1.0)
        / torch.where(reach > 0, reach, 1.0)
    )
    return (gradient(w - t * u) - gradient(w + t * u)) / (2 * t)
