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
from flowsim.numerics.shapes import Matrices, Row, Vectors


@dataclass(frozen=True)
class Smoothed:
    """N_μ at one g: its value, its gradient, and its Hessian as a map of rows ``(k, P)``."""

    value: Float[Tensor, ""]
    gradient: Row
    hessian: Callable[[Vectors], Vectors]


@dataclass(frozen=True)
class SecondOrder:
    """A symmetric function of numbers s: value, gradient ``slope``, and Hessian diag(diagonal) +
    twist·along alongᵀ."""

    value: Tensor
    slope: Tensor
    diagonal: Tensor
    twist: Tensor
    along: Tensor

    @staticmethod
    def separable(value: Tensor, slope: Tensor, diagonal: Tensor) -> "SecondOrder":
        """A sum of functions of one number each."""
        none = torch.zeros_like(slope)
        return SecondOrder(value.sum(), slope, diagonal, none.sum(), none)

    def hessian(self, rows: Vectors) -> Vectors:
        along = self.twist * (rows @ self.along)
        twisted = along[:, None] * self.along
        return rows * self.diagonal + twisted


def supports_smoothing(norm: Norm) -> bool:
    """Whether `smoothed_dual` takes the norm."""
    if isinstance(norm, Max | Sum | Euclidean):
        return all(supports_smoothing(part) for part in norm.norms)
    if norm.quadratic:
        return True
    return isinstance(norm, L1 | Linf | Lp | Spectral | Nuclear | Schatten)


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


def curved(norm: Norm, s: Tensor, mu: float) -> SecondOrder:
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


def softened(s: Tensor, mu: float) -> Tensor:
    """√(s² + μ²)."""
    return torch.hypot(s, torch.full_like(s, mu))


def _length(s: Tensor, mu: float) -> SecondOrder:
    """√(Σ s² + μ²)."""
    length = softened(torch.linalg.vector_norm(s), mu)
    slope = s / length
    diagonal = (1 / length).expand_as(s)
    return SecondOrder(length, slope, diagonal, -1 / length, slope)


def _box(s: Tensor, mu: float) -> SecondOrder:
    """Σ R − μ + μ log(2μ/(μ + R)), R = √(s² + μ²)."""
    r = softened(s, mu)
    total = mu + r
    entropy = mu * torch.log(total / (2 * mu))
    value = r - mu - entropy
    slope = s / total
    diagonal = mu / (r * total)
    return SecondOrder.separable(value, slope, diagonal)


def _cross(s: Tensor, mu: float) -> SecondOrder:
    """min over τ of τ − μ Σ log(τ² − s²) − μ log τ, up to a constant."""
    near, far, tau = _slacks(s.abs(), mu)
    logs = torch.log(near) + torch.log(far)
    value = tau - mu * logs.sum() - mu * torch.log(tau)
    pull = mu * torch.sign(s)
    slope = pull * (1 / near - 1 / far)
    stiff_near = 1 / near**2
    stiff_far = 1 / far**2
    diagonal = mu * (stiff_near + stiff_far)
    along = pull * (stiff_far - stiff_near)
    spread = diagonal.sum() + mu / tau**2
    return SecondOrder(value, slope, diagonal, -1 / spread, along)


def _slacks(size: Tensor, mu: float) -> tuple[Tensor, Tensor, Tensor]:
    """τ − |s|, τ + |s| and τ at the minimum, in terms of τ − max |s|, which would be lost by
    rounding in τ."""
    top = size.amax()
    near = top - size
    far = top + size
    gaps = torch.cat([near, far, top[None]])
    excess = _multiplier(gaps, mu)
    return excess + near, excess + far, excess + top


def _multiplier(gaps: Tensor, mu: float) -> Tensor:
    """The e > 0 with Σ μ/(e + gap) = 1, where the least gap is 0.

    Newton's method on the harmonic mean, which is concave and rises, so that it climbs to the root
    from the left."""
    e = gaps.new_tensor(mu)
    for _ in range(50):
        inverse = 1 / (e + gaps)
        total = inverse.sum()
        square = (inverse**2).sum()
        step = (mu * total - 1) * total / square
        e = e + step
        if not float(step) > 1e-15 * float(e):
            break
    return e


def _power(s: Tensor, mu: float, q: float) -> SecondOrder:
    """(Σ y^q)^(1/q), y = √(s² + μ²)."""
    y = softened(s, mu)
    top = y.amax()
    total = ((y / top) ** q).sum()
    value = top * total ** (1 / q)
    weight = (y / value) ** (q - 2) / value
    slope = weight * s
    ratio = (s / y) ** 2
    diagonal = weight * (1 + (q - 2) * ratio)
    twist = (1 - q) / value
    return SecondOrder(value, slope, diagonal, twist, slope)


# --------------------------------------------------------------------------------------------------
# Quadratic norms, and norms of singular values
# --------------------------------------------------------------------------------------------------


def _of_metric(norm: Norm, g: Tensor, mu: float) -> Smoothed:
    """√(gᵀA⁻¹g + μ²)."""
    value = softened(norm.dual(g), mu)
    v = norm.by_inverse_metric(g) / value

    def hessian(rows: Tensor) -> Tensor:
        along = (rows @ v)[:, None] * v
        return (norm.by_inverse_metric(rows) - along) / value

    return Smoothed(value, v, hessian)


def _of_singular_values(norm: Spectral | Nuclear | Schatten, g: Tensor, mu: float) -> Smoothed:
    u, s, v = svd(norm.as_matrix(g))
    curve = curved(norm.inner, s, mu)

    def hessian(rows: Tensor) -> Tensor:
        e = norm.as_matrix(rows)  # (k, m, n)
        left = _from_left(u.mT, e)
        right = e @ v
        core = _from_left(u.mT, right)
        inner = _between_vectors(core, s, curve, mu)
        edge = _ratio(curve.slope, s, curve.diagonal)
        # of the two complements one is empty
        if len(u) > len(v):
            beside = (right - _from_left(u, core)) * edge
            out = (_from_left(u, inner) + beside) @ v.mT
        else:
            beside = edge[:, None] * (left - core @ v.mT)
            out = _from_left(u, inner @ v.mT + beside)
        return out.flatten(-2)

    gradient = (u * curve.slope) @ v.mT
    return Smoothed(curve.value, gradient.flatten(), hessian)


def _from_left(u: Tensor, x: Matrices) -> Tensor:
    """u x for each of many small matrices, by one product."""
    return torch.tensordot(x, u, dims=([1], [1])).mT


def _between_vectors(core: Matrices, s: Tensor, curve: SecondOrder, mu: float) -> Matrices:
    """The Hessian times uᵀev, in the basis of the singular vectors."""
    even, odd = _quotients(s, curve, mu)
    symmetric = even * (core + core.mT) / 2
    skew = odd * (core - core.mT) / 2
    diagonal = core.diagonal(dim1=-2, dim2=-1)
    along = curve.twist * (diagonal @ curve.along)
    twisted = along[:, None] * curve.along
    return symmetric + skew + torch.diag_embed(twisted)


def _quotients(s: Tensor, curve: SecondOrder, mu: float) -> tuple[Tensor, Tensor]:
    """(fᵢ − fⱼ)/(sᵢ − sⱼ) and (fᵢ + fⱼ)/(sᵢ + sⱼ), with f the slope.

    Rounding in them costs speed and no accuracy, as the Hessian only steers.
    """
    f = curve.slope
    diagonal = curve.diagonal
    width = softened(s, mu)
    widths = width[:, None] + width
    gap = s[:, None] - s
    close = gap.abs() < 1e-4 * widths
    middle = (diagonal[:, None] + diagonal) / 2
    apart = torch.where(close, 1.0, gap)
    rise = (f[:, None] - f) / apart
    even = torch.where(close, middle, rise)
    total = s[:, None] + s
    odd = _ratio(f[:, None] + f, total, diagonal)
    return even, odd


def _ratio(f: Tensor, s: Tensor, limit: Tensor) -> Tensor:
    """f/s, or its limit where s vanishes."""
    tiny = torch.finfo(s.dtype).tiny
    ratio = f / s.clamp_min(tiny)
    return torch.where(s > tiny, ratio, limit)


# --------------------------------------------------------------------------------------------------
# Blocks
# --------------------------------------------------------------------------------------------------


def _of_blocks(norm: Max | Sum | Euclidean, g: Tensor, mu: float) -> Smoothed:
    """φ(c_l N_l(g_l)) with the function φ that composes the dual norms, made smooth as well."""
    parts = norm.blocks_of(g)
    inner = [smoothed_dual(part.norm, part.of(g), mu) for part in parts]
    scale = g.new_tensor([part.scale for part in parts])
    values = torch.stack([s.value for s in inner])
    gradients = [c * s.gradient for c, s in zip(scale, inner, strict=True)]
    outer = _composed(norm, scale * values, mu)

    def hessian(rows: Tensor) -> Tensor:
        out = []
        blocks = [part.of(rows) for part in parts]
        along = [x @ v for x, v in zip(blocks, gradients, strict=True)]
        shared = outer.hessian(torch.stack(along, -1))  # (k, L)
        weights = outer.slope * scale
        for i, x in enumerate(blocks):
            own = weights[i] * inner[i].hessian(x)
            carried = shared[:, i, None] * gradients[i]
            out.append(own + carried)
        return torch.cat(out, -1)

    weighted = [a * v for a, v in zip(outer.slope, gradients, strict=True)]
    return Smoothed(outer.value, torch.cat(weighted), hessian)


def _composed(norm: Norm, x: Float[Tensor, " L"], mu: float) -> SecondOrder:
    """The smooth sum, maximum or length of x, which rises in every x."""
    if isinstance(norm, Max):
        return SecondOrder.separable(x, torch.ones_like(x), torch.zeros_like(x))
    if isinstance(norm, Euclidean):
        return _length(x, mu)
    # min over τ of τ − μ Σ log(τ − x)
    top = x.amax()
    gaps = top - x
    excess = _multiplier(gaps, mu)
    slack = excess + gaps
    logs = torch.log(slack)
    value = top + excess - mu * logs.sum()
    slope = mu / slack
    diagonal = slope**2 / mu
    spread = diagonal.sum()
    return SecondOrder(value, slope, diagonal, -1 / spread, diagonal)
