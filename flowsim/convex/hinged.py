"""One step of a flow of a net with kinks as a convex programme, and an interior point method for
it.

    minimise  T log Σ_r exp(−q_r/T) + ½(v − c)ᵀC(v − c),     q = b + Av − Ks,
    over      ‖v‖ ≤ 1,  s ≥ 0,  s ≥ z + Ev.

A row r is a margin, T log Σ exp its soft minimum. The hinges s are the activations of the pairs
(neuron j, example i) whose kinks attract: Ks is what they take from the margins. C curbs v where
the margins are better known than their curvature. The dual unknowns are the softmax weights p of
the rows and the forces 0 ≤ f ≤ Kᵀp of the hinges; f/Kᵀp is the multiplier of a kink in Clarke's
gradient, and v is steepest for g = Aᵀp − Eᵀf − C(v − c).

Weights are laid out per neuron, ``v (m, D)`` with D = d + C: its d inner weights, then its C outer
ones. Each row belongs to an example. All matrices are of the size of a neuron or of the number of
rows: nothing P × P is formed."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from flowsim.convex.balls import BallDirection, BallIterate, to_boundary
from flowsim.norms.norm import Norm


@dataclass(frozen=True)
class Programme:
    """The data: see the module. With examples ``x (N, d)`` and ``of (R,)`` the example of each row,

        (Av)_r = Σ_j slope_jr ⟨x_of(r), w_j⟩ + Σ_jc ends_jcr a_cj,
        (Ks)_r = Σ_j kinks_jr s_j,of(r),   (Ev)_ji = ⟨x_i, w_j⟩,

    and K vanishes where no hinge is ``live``.
    """

    x: Float[Tensor, "N d"]
    of: Int[Tensor, " R"]
    slope: Float[Tensor, "m R"]
    ends: Float[Tensor, "m C R"]
    kinks: Float[Tensor, "m R"]
    live: Bool[Tensor, "m N"]
    z: Float[Tensor, "m N"]
    offset: Float[Tensor, " R"]
    temperature: float
    curb: Float[Tensor, "m D D"]
    centre: Float[Tensor, "m D"]

    @property
    def inputs(self) -> int:
        return self.x.shape[1]

    @cached_property
    def inputs_of(self) -> Float[Tensor, "d R"]:
        """The inputs of the rows."""
        return self.x[self.of].mT.contiguous()

    @cached_property
    def same(self) -> Float[Tensor, "R R"]:
        """1 for rows of the same example."""
        return (self.of[:, None] == self.of).to(self.x)

    def rows(self, v: Float[Tensor, "m D"]) -> Float[Tensor, " R"]:
        """Av."""
        inner = (self.slope * (v[:, : self.inputs] @ self.x.mT)[:, self.of]).sum(0)
        return inner + torch.einsum("jcr,jc->r", self.ends, v[:, self.inputs :])

    def columns(self, p: Float[Tensor, " R"]) -> Float[Tensor, "m D"]:
        """Aᵀp."""
        return torch.cat([(self.slope * p) @ self.inputs_of.mT, self.ends @ p], 1)

    def along(self, v: Float[Tensor, "m D"]) -> Float[Tensor, "m N"]:
        """Ev where hinges are live, 0 elsewhere."""
        return torch.where(self.live, v[:, : self.inputs] @ self.x.mT, 0.0)

    def push(self, f: Float[Tensor, "m N"]) -> Float[Tensor, "m D"]:
        """Eᵀf."""
        return torch.nn.functional.pad(f @ self.x, (0, self.ends.shape[1]))

    def taken(self, s: Float[Tensor, "m N"]) -> Float[Tensor, " R"]:
        """Ks."""
        return (self.kinks * s[:, self.of]).sum(0)

    def limit(self, p: Float[Tensor, " R"]) -> Float[Tensor, "m N"]:
        """Kᵀp."""
        return torch.zeros_like(self.z).index_add_(1, self.of, self.kinks * p)

    def curbed(self, v: Float[Tensor, "m D"]) -> Float[Tensor, "m D"]:
        """Cv."""
        return (self.curb @ v[..., None])[..., 0]

    def gradient(self, p: Tensor, f: Tensor, v: Tensor) -> Float[Tensor, "m D"]:
        return self.columns(p) - self.push(f) - self.curbed(v - self.centre)

    def flat(self, v: Float[Tensor, "m D"]) -> Float[Tensor, " P"]:
        """The weights in the order of a net: all inner ones, then the outer ones."""
        return torch.cat([v[:, : self.inputs].flatten(), v[:, self.inputs :].mT.flatten()])

    def blocked(self, v: Float[Tensor, " P"]) -> Float[Tensor, "m D"]:
        """`flat`, undone."""
        m, d = len(self.z), self.inputs
        return torch.cat([v[: m * d].view(m, d), v[m * d :].view(-1, m).mT], 1)


@dataclass(frozen=True)
class Iterate:
    """Where the method is. ``up`` is the force that s ≥ z + Ev exerts and ``down`` that of s ≥ 0;
    ``gap_up`` is s − z − Ev where it has been met."""

    ball: BallIterate
    live: Bool[Tensor, "m N"]
    s: Float[Tensor, "m N"]
    gap_up: Float[Tensor, "m N"]
    up: Float[Tensor, "m N"]
    down: Float[Tensor, "m N"]
    p: Float[Tensor, " R"]
    level: float


@dataclass(frozen=True)
class Optimum:
    """The best point, with the weights p and forces f that prove it to the duality ``gap``; Newton
    steps taken, and an iterate from which a similar programme may be continued."""

    v: Float[Tensor, "m D"]
    p: Float[Tensor, " R"]
    f: Float[Tensor, "m N"]
    gap: float
    newton: int
    iterate: Iterate


def solve_hinged(
    programme: Programme,
    norm: Norm,
    begin: Callable[[Tensor, float], BallIterate],
    tol: float,
    start: Iterate | None = None,
) -> Optimum:
    """The optimum to a duality gap of ``tol``, for data scaled so that the expected gain is about
    1.

    Mehrotra's predictor and corrector from an infeasible start (Nocedal and Wright 2006, algorithm
    16.4), with a temperature that is never far below the gap. ``begin`` makes the ball. Where
    rounding ends the progress, the best point so far is returned, with its gap."""
    at = _begun(programme, begin) if start is None else _continued(programme, start)
    best, keep, stale = _measured(programme, norm, at, 0, at), at, 0
    newest = best
    for count in range(1, 81):
        if best.gap <= tol or stale > 25:
            break
        moved = _advanced(programme, at, newest.gap, tol)
        if moved is None:
            break
        at = moved
        newest = _measured(programme, norm, at, count, keep)
        if not math.isfinite(newest.gap):
            break
        keep = at if newest.gap > 1e-3 else keep
        stale = 0 if newest.gap < 0.9 * best.gap else stale + 1
        best = replace(newest if newest.gap < best.gap else best, newton=count, iterate=keep)
    return best


def _begun(programme: Programme, begin: Callable[[Tensor, float], BallIterate]) -> Iterate:
    """The usual start: v at the middle of the ball, weights between softmax and equal."""
    rows = len(programme.offset)
    s = torch.where(programme.live, programme.z.clamp_min(0), 0.0)
    q = programme.offset - programme.taken(s)
    p = 0.9 * torch.softmax(-q / max(programme.temperature, 0.3), 0) + 0.1 / rows
    force = programme.limit(p) / 2
    g = programme.flat(programme.columns(p) - programme.push(force))
    products = 2 * (g.numel() + int(programme.live.sum()))
    mu = 0.1 / products
    ball = begin(g, mu)
    v = programme.blocked(ball.v)
    reach = programme.z + programme.along(v)
    slack = mu / force.clamp_min(1e-3 * float(programme.kinks.abs().amax()) / rows + 1e-300)
    s = torch.where(programme.live, reach.clamp_min(0) + slack, 1.0)
    above = torch.where(programme.live, s - reach, 1.0)
    q = programme.offset + programme.rows(v) - programme.taken(s)
    level = float((programme.temperature * torch.log(p) + q).mean())
    return Iterate(ball, programme.live, s, above, force, force, p, level)


def _continued(programme: Programme, start: Iterate) -> Iterate:
    """An iterate of a similar programme, with a beginning for hinges that were not live in it."""
    new = programme.live & ~start.live
    if not bool(new.any()):
        return replace(start, live=programme.live)
    force = programme.limit(start.p) / 2
    reach = programme.z + programme.along(programme.blocked(start.ball.v))
    slack = 1e-3 * (1 + reach.abs())
    s = reach.clamp_min(0) + slack
    return replace(
        start,
        live=programme.live,
        s=torch.where(new, s, start.s),
        gap_up=torch.where(new, s - reach, start.gap_up),
        up=torch.where(new, force, start.up),
        down=torch.where(new, force, start.down),
    )


def _measured(programme: Programme, norm: Norm, at: Iterate, count: int, keep: Iterate) -> Optimum:
    """The feasible points nearest to an iterate, and their duality gap, free of cancellation."""
    v = at.ball.v / norm.value(at.ball.v).clamp_min(1.0)
    blocks = programme.blocked(v)
    p = at.p / at.p.sum()
    limit = programme.limit(p).clamp_min(0)
    f = torch.where(programme.live, torch.minimum(at.up, limit), 0.0)
    reach = torch.where(programme.live, programme.z, 0.0) + programme.along(blocks)
    s = reach.clamp_min(0)
    q = programme.offset + programme.rows(blocks) - programme.taken(s)
    soft = torch.log_softmax(-q / programme.temperature, 0)
    surprise = programme.temperature * (p * (torch.log(p) - soft) - p + torch.exp(soft)).sum()
    g = programme.flat(programme.gradient(p, f, blocks))
    gap = surprise + (limit * s - f * reach).sum() + norm.dual(g) - g @ v
    return Optimum(blocks, p, f, float(gap), count, keep)


@dataclass(frozen=True)
class _Newton:
    """The factored Newton equations at an iterate; see `_factored`."""

    programme: Programme
    at: Iterate
    g: Float[Tensor, " P"]
    entropy: Float[Tensor, " R"]
    excess: Float[Tensor, "m N"]
    stiff_up: Float[Tensor, "m N"]
    stiff_down: Float[Tensor, "m N"]
    limit: Float[Tensor, "m N"]
    root: Float[Tensor, "m D D"]
    size: Float[Tensor, "m D"]
    white: Float[Tensor, "mD R"]
    low: Float[Tensor, "mD k"]
    shrink: Float[Tensor, " k"]
    solve_rows: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Direction:
    """A Newton direction, as `Iterate` names its parts."""

    turn: BallDirection
    s: Tensor
    gap_up: Tensor
    up: Tensor
    down: Tensor
    p: Tensor
    level: float

    def to_boundary(self, at: Iterate) -> tuple[float, float]:
        """How far primal and dual variables may go; hinges that are not live do not move."""
        primal, dual = at.ball.to_boundary(self.turn)
        slacks = to_boundary(torch.stack([at.s, at.gap_up]), torch.stack([self.s, self.gap_up]))
        forces = to_boundary(torch.stack([at.up, at.down]), torch.stack([self.up, self.down]))
        return min(primal, slacks), min(dual, forces)


def _advanced(programme: Programme, at: Iterate, gap: float, tol: float) -> Iterate | None:
    """The next iterate, or None where the equations cannot be solved."""
    total, count = at.ball.products()
    live = programme.live
    kinks = torch.where(live, at.up * at.gap_up + at.down * at.s, 0.0).sum()
    number = count + 2 * int(live.sum())
    # without products there is nothing to centre, and μ only smooths the ball
    mu = (total + float(kinks)) / number if number else gap
    newton = _factored(programme, at, gap, mu)
    if newton is None:
        return None
    affine = _direction(newton, 0.0 if number else 0.1 * mu, None)
    primal, dual = (min(1.0, 0.9995 * x) for x in affine.to_boundary(at))
    ahead = at.ball.after(affine.turn, primal, dual).products()[0]
    up, down = at.up + dual * affine.up, at.down + dual * affine.down
    above, s = at.gap_up + primal * affine.gap_up, at.s + primal * affine.s
    ahead += float(torch.where(live, up * above + down * s, 0.0).sum())
    left = min(
        1.0, max(ahead, 0.0) / max(mu * number, 1e-300)
    )  # what the predictor leaves of the products
    centring = min(0.8, max(1e-4, left**3))
    if min(primal, dual) < 0.1:
        centring = max(centring, 0.3)
    # products far below the gap, or below the one that is asked for, only make the equations worse
    least = max(0.2 * tol, 0.01 * gap) / max(number, 1)
    direction = _direction(newton, max(centring * mu, min(mu, least)), affine)
    primal, dual = direction.to_boundary(at)
    keep = max(0.95, 1 - mu)
    primal, dual = min(1.0, keep * primal), min(1.0, keep * dual, _steady(at.p, direction.p))
    return Iterate(
        at.ball.after(direction.turn, primal, dual),
        live,
        at.s + primal * direction.s,
        at.gap_up + primal * direction.gap_up,
        at.up + dual * direction.up,
        at.down + dual * direction.down,
        at.p * (1 + dual * direction.p / at.p).clamp(1e-3, 6),
        at.level + dual * direction.level,
    )


def _steady(p: Tensor, dp: Tensor) -> float:
    """How far the weights may go: none that counts to zero, none to more than six times its
    size."""
    falls = torch.where((p > 1e-2) & (dp < 0), -0.95 * p / dp.clamp_max(-1e-300), math.inf)
    rises = torch.where((p > 1e-3) & (dp > 0), 5 * p / dp.clamp_min(1e-300), math.inf)
    return float(torch.minimum(falls, rises).amin())


def _factored(programme: Programme, at: Iterate, gap: float, mu: float) -> _Newton | None:
    """Newton's equations, reduced to one matrix for each neuron and one for the rows.

    With a, b the ratios of force and slack of the two sides of a hinge, its slope between both is
    a/(a + b) and its stiffness ab/(a + b). Eliminating s and the forces leaves, with A' = A − K
    diag(a/(a+b)) E,

        (ball + C + Eᵀ diag(ab/(a+b)) E) dv − A'ᵀ dp = …
        A' dv + (T/p + K diag(1/(a+b)) Kᵀ) dp − d(level) = …
    """
    live = programme.live
    a = torch.where(live, at.up / at.gap_up, 0.0)
    b = torch.where(live, at.down / at.s, 1.0)
    v = programme.blocked(at.ball.v)
    g = programme.flat(programme.gradient(at.p, at.up, v))
    response = at.ball.response(g, mu)
    matrix = programme.curb.clone()
    d = programme.inputs
    matrix[:, :d, :d] += (programme.x.mT * (a * b / (a + b))[:, None, :]) @ programme.x
    matrix.diagonal(dim1=1, dim2=2).add_(programme.blocked(response.stiff))
    size = matrix.diagonal(dim1=1, dim2=2).rsqrt()
    root = _cholesky(size[:, :, None] * matrix * size[:, None, :])
    if root is None:
        return None
    slope = programme.slope - programme.kinks * (a / (a + b))[:, programme.of]
    sides = torch.cat([slope[:, None, :] * programme.inputs_of, programme.ends], 1)
    if len(response.low):
        low = torch.stack([programme.blocked(x) for x in response.low], -1)
        sides = torch.cat([sides, low * response.weight.sqrt()], 2)
    sides = size[..., None] * sides
    white = torch.linalg.solve_triangular(root, sides, upper=False).flatten(0, 1)
    # the root of (1 + LLᵀ)⁻¹ is 1 − Q diag(shrink) Qᵀ
    count = len(programme.of)
    low, far, _ = torch.linalg.svd(white[:, count:], full_matrices=False)
    shrink = 1 - (1 + far**2).rsqrt()
    white = _thinned(low, shrink, white[:, :count])
    temperature = max(programme.temperature, 0.1 * gap)
    kinked = programme.kinks / (a + b)[:, programme.of]
    schur = (
        white.mT @ white
        + programme.same * (kinked.mT @ programme.kinks)
        + torch.diag(temperature / at.p)
    )
    solve_rows = _solver(schur)
    if solve_rows is None:
        return None
    q = programme.offset + programme.rows(v) - programme.taken(torch.where(live, at.s, 0.0))
    entropy = temperature * torch.log(at.p) + q - at.level
    excess = torch.where(live, at.s - programme.z - programme.along(v) - at.gap_up, 0.0)
    limit = programme.limit(at.p)
    return _Newton(
        programme, at, g, entropy, excess, a, b, limit, root, size, white, low, shrink, solve_rows
    )


def _cholesky(matrix: Tensor) -> Tensor | None:
    """The root of a matrix with unit diagonal, or of many, with the least ridge that rounding asks
    for."""
    ridge, eye = 0.0, torch.eye(matrix.shape[-1]).to(matrix)
    while ridge < 1e-4:
        root, info = torch.linalg.cholesky_ex(matrix + ridge * eye)
        if not bool(info.any()):
            return root if bool(torch.isfinite(root).all()) else None
        ridge = max(10 * ridge, 1e-15)
    return None


def _solver(matrix: Tensor) -> Callable[[Tensor], Tensor] | None:
    size = matrix.diagonal().rsqrt()
    root = _cholesky(size[:, None] * matrix * size)
    if root is None:
        return None
    return lambda b: size * torch.cholesky_solve((size * b)[:, None], root)[:, 0]


def _direction(newton: _Newton, mu: float, before: _Direction | None) -> _Direction:
    """The Newton direction towards products of μ, corrected to second order after ``before``."""
    programme, at, live = newton.programme, newton.at, newton.programme.live
    a, b, excess, limit = newton.stiff_up, newton.stiff_down, newton.excess, newton.limit
    up = down = torch.full_like(a, mu)
    if before is not None:
        up, down = mu - before.up * before.gap_up, mu - before.down * before.s
    up, down = torch.where(live, up / at.gap_up, 0.0), torch.where(live, down / at.s, 0.0)
    both, share, stiff = a + b, a / (a + b), a * b / (a + b)
    over = up + down - limit
    force = torch.where(live, up - at.up - stiff * excess - share * over, 0.0)
    lift = torch.where(live, over / both - share * excess, 0.0)
    response = at.ball.response(newton.g, mu, None if before is None else before.turn)
    pull = programme.blocked(response.pull) - programme.push(force)
    pull = _whitened(newton, pull)
    dp, level = _on_simplex(newton, programme.taken(lift) - newton.entropy - newton.white.mT @ pull)
    dv = _unwhitened(newton, pull + newton.white @ dp)
    rise = programme.along(dv)
    dlimit = programme.limit(dp)
    dup = torch.where(live, force + stiff * rise + share * dlimit, 0.0)
    ds = torch.where(live, lift + share * rise - dlimit / both, 0.0)
    dg = programme.columns(dp) - programme.push(dup) - programme.curbed(dv)
    turn = at.ball.turn(response, newton.g, programme.flat(dv), programme.flat(dg))
    return _Direction(turn, ds, ds - rise + excess, dup, down - at.down - b * ds, dp, level)


def _on_simplex(newton: _Newton, b: Tensor) -> tuple[Tensor, float]:
    """dp with matrix·dp − level = b and Σ dp = 1 − Σp; and the level."""
    free, shift = newton.solve_rows(b), newton.solve_rows(torch.ones_like(b))
    level = (1 - newton.at.p.sum() - free.sum()) / shift.sum()
    return free + level * shift, float(level)


def _whitened(newton: _Newton, v: Float[Tensor, "m D"]) -> Float[Tensor, " mD"]:
    y = torch.linalg.solve_triangular(
        newton.root, (newton.size * v)[..., None], upper=False
    ).flatten()
    return _thinned(newton.low, newton.shrink, y)


def _unwhitened(newton: _Newton, y: Float[Tensor, " mD"]) -> Float[Tensor, "m D"]:
    y = _thinned(newton.low, newton.shrink, y).view(*newton.size.shape, 1)
    return newton.size * torch.linalg.solve_triangular(newton.root.mT, y, upper=True)[..., 0]


def _thinned(low: Float[Tensor, "mD k"], shrink: Float[Tensor, " k"], y: Tensor) -> Tensor:
    """The part of low rank of the ball, taken out of whitened numbers."""
    if not len(shrink):
        return y
    along = low.mT @ y
    return y - low @ (shrink * along if y.ndim == 1 else shrink[:, None] * along)
