r"""Dual norms made smooth, for interior point methods on the unit ball of any norm.

    N_μ(g) = max { <g, v> + μ b(v) : ‖v‖ < 1 }

tends to ``‖g‖_*`` as μ → 0. Its gradient is a point strictly inside the ball, its Hessian is
explicit, and ``b`` is

    l-infinity, spectral    Σ log(1 − v²), up to a constant
    l1, nuclear             Σ log v⁺ + Σ log v⁻ + log(1 − Σ v⁺ − Σ v⁻),  v = v⁺ − v⁻
    lp, Schatten, quadratic not a barrier: N_μ is the norm of g with a further μ for each coordinate
    Sum over blocks         as l1, on the norms of the blocks

Matrix norms are the same functions of singular values, with divided differences for the Hessian
(Lewis and Sendov 2001). All is for one g ``(P,)``, without a batch."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from flowsim.norms.blocks import Euclidean, Max, Sum
from flowsim.norms.matrix import Nuclear, Schatten, Spectral
from flowsim.norms.norm import Norm
from flowsim.norms.vector import L1, L2, Linf, Lp
from flowsim.numerics.batched import svd
from flowsim.numerics.shapes import Row


@dataclass(frozen=True)
class Smoothed:
    """N_μ at one g: its value, its gradient, and its Hessian as a map of rows ``(k, P)``."""

    value: Float[Tensor, ""]
    gradient: Row
    hessian: Callable[[Float[Tensor, "k P"]], Float[Tensor, "k P"]]


@dataclass(frozen=True)
class Curve:
    """A symmetric function of numbers s: value, gradient ``slope``, and Hessian diag(diagonal) +
    twist·along alongᵀ."""

    value: Tensor
    slope: Tensor
    diagonal: Tensor
    twist: Tensor
    along: Tensor

    def hessian(self, rows: Float[Tensor, "k P"]) -> Float[Tensor, "k P"]:
        twisted = self.twist * (rows @ self.along)
        return rows * self.diagonal + twisted[:, None] * self.along


def supports_smoothing(norm: Norm) -> bool:
    """Whether `smoothed_dual` takes the norm."""
    if isinstance(norm, Max | Sum | Euclidean):
        return all(supports_smoothing(part) for part in norm.norms)
    return norm.quadratic or isinstance(norm, L1 | Linf | Lp | Spectral | Nuclear | Schatten)


def smoothed_dual(norm: Norm, g: Row, mu: float) -> Smoothed:
    """N_μ of the dual of ``norm`` (bound to its layout) at g, for μ > 0."""
    if isinstance(norm, Max | Sum | Euclidean):
        return _of_blocks(norm, g, mu)
    if norm.quadratic:
        return _of_metric(norm, g, mu)
    if isinstance(norm, Spectral | Nuclear | Schatten):
        return _of_singular_values(norm, g, mu)
    curve = curved(norm, g, mu)
    return Smoothed(curve.value, curve.slope, curve.hessian)


def curved(norm: Norm, s: Tensor, mu: float) -> Curve:
    """N_μ of a norm of numbers: ℓ1, ℓ2, ℓ∞ or ℓp."""
    if isinstance(norm, L2):
        return _length(s, mu)
    if isinstance(norm, Linf):
        return _box(s, mu)
    if isinstance(norm, L1):
        return _cross(s, mu)
    if isinstance(norm, Lp):
        return _power(s, mu, norm.q)
    raise ValueError(f"got the norm {norm.name!r}, expected ℓ1, ℓ2, ℓ∞ or ℓp, try Lp(p)")


# --------------------------------------------------------------------------------------------------
# Norms of numbers
# --------------------------------------------------------------------------------------------------


def _length(s: Tensor, mu: float) -> Curve:
    """√(Σ s² + μ²)."""
    length = torch.hypot(torch.linalg.vector_norm(s), s.new_tensor(mu))
    slope = s / length
    return Curve(length, slope, (1 / length).expand_as(s), -1 / length, slope)


def _box(s: Tensor, mu: float) -> Curve:
    """Σ R − μ + μ log(2μ/(μ + R)), R = √(s² + μ²)."""
    r = torch.hypot(s, torch.full_like(s, mu))
    value = (r - mu - mu * torch.log((mu + r) / (2 * mu))).sum()
    diagonal = mu / (r * (mu + r))
    return Curve(value, s / (mu + r), diagonal, s.new_zeros(()), torch.zeros_like(s))


def _cross(s: Tensor, mu: float) -> Curve:
    """min over τ of τ − μ Σ log(τ² − s²) − μ log τ, up to a constant."""
    magnitude = s.abs()
    sign = torch.sign(s)
    top = magnitude.amax()
    # in terms of τ − max |s|, which would be lost by rounding in τ
    excess = _multiplier(torch.cat([top - magnitude, top + magnitude, top[None]]), mu)
    near = excess + (top - magnitude)
    far = excess + (top + magnitude)
    tau = excess + top
    value = tau - mu * (torch.log(near) + torch.log(far)).sum() - mu * torch.log(tau)
    slope = mu * sign * (1 / near - 1 / far)
    diagonal = mu * (1 / near**2 + 1 / far**2)
    along = mu * sign * (1 / far**2 - 1 / near**2)
    return Curve(value, slope, diagonal, -1 / (diagonal.sum() + mu / tau**2), along)


def _multiplier(gaps: Tensor, mu: float) -> Tensor:
    """The e > 0 with Σ μ/(e + gap) = 1, where the least gap is 0.

    Newton's method on the harmonic mean, which is concave and rises, so that it climbs to the root
    from the left."""
    e = gaps.new_tensor(mu)
    for _ in range(50):
        inverse = 1 / (e + gaps)
        total = inverse.sum()
        step = (mu * total - 1) * total / (inverse**2).sum()
        e = e + step
        if not float(step) > 1e-15 * float(e):
            break
    return e


def _power(s: Tensor, mu: float, q: float) -> Curve:
    """(Σ y^q)^(1/q), y = √(s² + μ²)."""
    y = torch.hypot(s, torch.full_like(s, mu))
    top = y.amax()
    value = top * ((y / top) ** q).sum() ** (1 / q)
    weight = (y / value) ** (q - 2) / value
    slope = weight * s
    diagonal = weight * (1 + (q - 2) * (s / y) ** 2)
    return Curve(value, slope, diagonal, (1 - q) / value, slope)


# --------------------------------------------------------------------------------------------------
# Quadratic norms, and norms of singular values
# --------------------------------------------------------------------------------------------------


def _of_metric(norm: Norm, g: Tensor, mu: float) -> Smoothed:
    """√(gᵀA⁻¹g + μ²); A⁻¹g = ‖g‖_* times the steepest direction is linear in g."""

    def inverse(rows: Tensor) -> Tensor:
        return norm.dual(rows)[..., None] * norm.steepest(rows)

    value = torch.hypot(norm.dual(g), g.new_tensor(mu))
    v = inverse(g) / value
    return Smoothed(value, v, lambda rows: (inverse(rows) - (rows @ v)[:, None] * v) / value)


def _of_singular_values(norm: Spectral | Nuclear | Schatten, g: Tensor, mu: float) -> Smoothed:
    u, s, v = svd(norm.as_matrix(g))
    curve = curved(norm.inner, s, mu)

    def hessian(rows: Tensor) -> Tensor:
        even, odd, edge = _quotients(s, curve, mu)
        e = norm.as_matrix(rows)  # (k, m, n)
        left = _from_left(u.mT, e)
        right = e @ v
        core = _from_left(u.mT, right)
        twisted = curve.twist * (core.diagonal(dim1=-2, dim2=-1) @ curve.along)
        inner = even * (core + core.mT) / 2 + odd * (core - core.mT) / 2
        inner = inner + torch.diag_embed(twisted[:, None] * curve.along)
        # of the two complements one is empty
        if len(u) > len(v):
            beside = (right - _from_left(u, core)) * edge
            return ((_from_left(u, inner) + beside) @ v.mT).flatten(-2)
        beside = edge[:, None] * (left - core @ v.mT)
        return _from_left(u, inner @ v.mT + beside).flatten(-2)

    return Smoothed(curve.value, ((u * curve.slope) @ v.mT).flatten(), hessian)


def _from_left(u: Tensor, x: Float[Tensor, "k m n"]) -> Tensor:
    """u x for each of many small matrices, by one product."""
    return torch.tensordot(x, u, dims=([1], [1])).mT


def _quotients(s: Tensor, curve: Curve, mu: float) -> tuple[Tensor, Tensor, Tensor]:
    """(fᵢ − fⱼ)/(sᵢ − sⱼ), (fᵢ + fⱼ)/(sᵢ + sⱼ) and fᵢ/sᵢ, with f the slope.

    Rounding in them costs speed and no accuracy, as the Hessian only steers.
    """
    f = curve.slope
    rounded = torch.hypot(s, torch.full_like(s, mu))
    gap = s[:, None] - s
    total = s[:, None] + s
    tiny = torch.finfo(s.dtype).tiny
    close = gap.abs() < 1e-4 * (rounded[:, None] + rounded)
    middle = (curve.diagonal[:, None] + curve.diagonal) / 2
    even = torch.where(close, middle, (f[:, None] - f) / torch.where(close, 1.0, gap))
    odd = (f[:, None] + f) / total.clamp_min(tiny)
    odd = torch.where(total > tiny, odd, curve.diagonal)
    return even, odd, torch.where(s > tiny, f / s.clamp_min(tiny), curve.diagonal)


# --------------------------------------------------------------------------------------------------
# Blocks
# --------------------------------------------------------------------------------------------------


def _of_blocks(norm: Max | Sum | Euclidean, g: Tensor, mu: float) -> Smoothed:
    """φ(c_l N_l(g_l)) with the function φ that composes the dual norms, made smooth as well."""
    parts = norm.blocks_of(g)
    inner = [smoothed_dual(part.norm, part.of(g), mu) for part in parts]
    scale = g.new_tensor([part.scale for part in parts])
    value, slope, curvature = _composed(norm, scale * torch.stack([s.value for s in inner]), mu)
    gradients = [c * s.gradient for c, s in zip(scale, inner, strict=True)]

    def hessian(rows: Tensor) -> Tensor:
        blocks = [part.of(rows) for part in parts]
        along = torch.stack([x @ v for x, v in zip(blocks, gradients, strict=True)], -1)
        shared = (along @ curvature).mT[..., None]  # (L, k, 1)
        own = [a * s.hessian(x) for a, s, x in zip(slope * scale, inner, blocks, strict=True)]
        return torch.cat([x + y * v for x, y, v in zip(own, shared, gradients, strict=True)], -1)

    gradient = torch.cat([a * v for a, v in zip(slope, gradients, strict=True)])
    return Smoothed(value, gradient, hessian)


def _composed(
    norm: Norm, x: Float[Tensor, " L"], mu: float
) -> tuple[Float[Tensor, ""], Float[Tensor, " L"], Float[Tensor, "L L"]]:
    """Value, gradient and Hessian of the smooth sum, maximum or length of x; each rises in every
    x."""
    if isinstance(norm, Max):
        return x.sum(), torch.ones_like(x), torch.zeros(len(x), len(x)).to(x)
    if isinstance(norm, Euclidean):
        curve = _length(x, mu)
        eye = torch.eye(len(x)).to(x)
        return curve.value, curve.slope, (eye - torch.outer(curve.slope, curve.slope)) / curve.value
    # min over τ of τ − μ Σ log(τ − x)
    gaps = x.amax() - x
    excess = _multiplier(gaps, mu)
    slope = mu / (excess + gaps)
    value = x.amax() + excess - mu * torch.log(excess + gaps).sum()
    diagonal = slope**2 / mu
    return value, slope, torch.diag(diagonal) - torch.outer(diagonal, diagonal) / diagonal.sum()
