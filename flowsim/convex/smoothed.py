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
from typing import ClassVar, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from flowsim.norms import faces
from flowsim.norms.blocks import Euclidean, Max, Sum
from flowsim.norms.matrix import Nuclear, Schatten, Spectral
from flowsim.norms.norm import Norm
from flowsim.norms.vector import L1, L2, Linf, Lp


@dataclass(frozen=True)
class Smoothed:
    """N_μ at one g: its value, its gradient, and its Hessian as a map of rows ``(k, P)``."""

    value: Float[Tensor, ""]
    gradient: Float[Tensor, " P"]
    hessian: Callable[[Float[Tensor, "k P"]], Float[Tensor, "k P"]]


@dataclass(frozen=True)
class Curve:
    """A symmetric function of numbers s: value, gradient ``slope``, Hessian diag(bend) +
    twist·along alongᵀ."""

    value: Tensor
    slope: Tensor
    bend: Tensor
    twist: Tensor
    along: Tensor


def supports_smoothing(norm: Norm) -> bool:
    """Whether `smoothed_dual` knows the norm."""
    if isinstance(norm, Max | Sum | Euclidean):
        return all(supports_smoothing(part) for part in norm._norms())
    return norm.quadratic or isinstance(norm, L1 | Linf | Lp | Spectral | Nuclear | Schatten)


def smoothed_dual(norm: Norm, g: Float[Tensor, " P"], mu: float) -> Smoothed:
    """N_μ of the dual of ``norm`` (bound to its layout) at g, for μ > 0."""
    if isinstance(norm, Max | Sum | Euclidean):
        return _blocks(norm, g, mu)
    if norm.quadratic:
        return _quadratic(norm, g, mu)
    if isinstance(norm, Spectral | Nuclear | Schatten):
        return _singular(norm, g, mu)
    curve = curved(norm, g, mu)

    def hessian(rows: Tensor) -> Tensor:
        return rows * curve.bend + curve.twist * (rows @ curve.along)[:, None] * curve.along

    return Smoothed(curve.value, curve.slope, hessian)


def _quadratic(norm: Norm, g: Tensor, mu: float) -> Smoothed:
    """√(gᵀA⁻¹g + μ²); A⁻¹g = ‖g‖_* times the steepest direction is linear in g."""

    def inverse(rows: Tensor) -> Tensor:
        return norm.dual(rows)[..., None] * norm.steepest(rows)

    value = torch.hypot(norm.dual(g), g.new_tensor(mu))
    v = inverse(g) / value
    return Smoothed(value, v, lambda rows: (inverse(rows) - (rows @ v)[:, None] * v) / value)


def curved(norm: Norm, s: Tensor, mu: float) -> Curve:
    """N_μ of a norm of numbers: ℓ1, ℓ2, ℓ∞ or ℓp."""
    if isinstance(norm, L2):
        length = torch.hypot(torch.linalg.vector_norm(s), s.new_tensor(mu))
        return Curve(length, s / length, (1 / length).expand_as(s), -1 / length, s / length)
    if isinstance(norm, Linf):
        return _box(s, mu)
    if isinstance(norm, L1):
        return _cross(s, mu)
    assert isinstance(norm, Lp)
    return _power(s, mu, norm.q)


def _box(s: Tensor, mu: float) -> Curve:
    """Σ R − μ + μ log(2μ/(μ + R)), R = √(s² + μ²)."""
    r = torch.hypot(s, torch.full_like(s, mu))
    value = (r - mu - mu * torch.log((mu + r) / (2 * mu))).sum()
    return Curve(value, s / (mu + r), mu / (r * (mu + r)), s.new_zeros(()), torch.zeros_like(s))


def _cross(s: Tensor, mu: float) -> Curve:
    """min over τ of τ − μ Σ log(τ² − s²) − μ log τ, up to a constant."""
    size = s.abs()
    top = size.amax()
    # in terms of τ − max |s|, which would be lost by rounding in τ
    excess = _multiplier(torch.cat([top - size, top + size, top[None]]), mu)
    near, far, tau = excess + (top - size), excess + (top + size), excess + top
    value = tau - mu * (torch.log(near) + torch.log(far)).sum() - mu * torch.log(tau)
    slope = mu * torch.sign(s) * (1 / near - 1 / far)
    bend = mu * (1 / near**2 + 1 / far**2)
    along = mu * torch.sign(s) * (1 / far**2 - 1 / near**2)
    return Curve(value, slope, bend, -1 / (bend.sum() + mu / tau**2), along)


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
    bend = weight * (1 + (q - 2) * (s / y) ** 2)
    return Curve(value, slope, bend, (1 - q) / value, slope)


def _singular(norm: Spectral | Nuclear | Schatten, g: Tensor, mu: float) -> Smoothed:
    assert norm.shape is not None
    u, s, v = faces.singular(g.view(norm.shape))
    curve = curved(norm.inner, s, mu)

    def hessian(rows: Tensor) -> Tensor:
        even, odd, edge = _quotients(s, curve, mu)
        e = rows.unflatten(-1, norm.shape)
        left, right = _from_left(u.mT, e), e @ v
        core = _from_left(u.mT, right)
        inner = even * (core + core.mT) / 2 + odd * (core - core.mT) / 2
        turn = curve.twist * (core.diagonal(dim1=-2, dim2=-1) @ curve.along)
        inner = inner + torch.diag_embed(turn[:, None] * curve.along)
        if len(u) > len(v):  # of the two complements one is empty
            return ((_from_left(u, inner) + (right - _from_left(u, core)) * edge) @ v.mT).flatten(
                -2
            )
        return _from_left(u, inner @ v.mT + edge[:, None] * (left - core @ v.mT)).flatten(-2)

    return Smoothed(curve.value, ((u * curve.slope) @ v.mT).flatten(), hessian)


def _from_left(u: Tensor, x: Float[Tensor, "k m n"]) -> Tensor:
    """u x for each of many small matrices, by one product."""
    return torch.tensordot(x, u, dims=([1], [1])).mT


def _quotients(s: Tensor, curve: Curve, mu: float) -> tuple[Tensor, Tensor, Tensor]:
    """(fᵢ − fⱼ)/(sᵢ − sⱼ), (fᵢ + fⱼ)/(sᵢ + sⱼ) and fᵢ/sᵢ, with f the slope.

    Rounding in them costs speed and no accuracy, as the Hessian only steers.
    """
    f, size = curve.slope, torch.hypot(s, torch.full_like(s, mu))
    gap, total = s[:, None] - s, s[:, None] + s
    close = gap.abs() < 1e-4 * (size[:, None] + size)
    even = torch.where(
        close,
        (curve.bend[:, None] + curve.bend) / 2,
        (f[:, None] - f) / torch.where(close, 1.0, gap),
    )
    tiny = torch.finfo(s.dtype).tiny
    odd = torch.where(total > tiny, (f[:, None] + f) / total.clamp_min(tiny), curve.bend)
    return even, odd, torch.where(s > tiny, f / s.clamp_min(tiny), curve.bend)


def _blocks(norm: Max | Sum | Euclidean, g: Tensor, mu: float) -> Smoothed:
    """φ(c_l N_l(g_l)) with the function φ that composes the dual norms, made smooth as well."""
    parts = norm._each(g)
    inner = [smoothed_dual(part.norm, part.of(g), mu) for part in parts]
    scale = g.new_tensor([part.scale for part in parts])
    value, slope, bend = _composed(norm, scale * torch.stack([s.value for s in inner]), mu)
    gradients = [c * s.gradient for c, s in zip(scale, inner, strict=True)]

    def hessian(rows: Tensor) -> Tensor:
        along = (
            torch.stack([part.of(rows) @ v for part, v in zip(parts, gradients, strict=True)], -1)
            @ bend
        )
        return torch.cat(
            [
                slope[i] * scale[i] * s.hessian(parts[i].of(rows))
                + along[:, i, None] * gradients[i]
                for i, s in enumerate(inner)
            ],
            -1,
        )

    return Smoothed(
        value, torch.cat([a * v for a, v in zip(slope, gradients, strict=True)]), hessian
    )


def _composed(norm: Norm, x: Tensor, mu: float) -> tuple[Tensor, Tensor, Tensor]:
    """Value, gradient and Hessian of the smooth sum, maximum or length of x ``(L,)``; each rises in
    every x."""
    if isinstance(norm, Max):
        return x.sum(), torch.ones_like(x), torch.zeros(len(x), len(x)).to(x)
    if isinstance(norm, Euclidean):
        length = torch.hypot(torch.linalg.vector_norm(x), x.new_tensor(mu))
        slope = x / length
        return length, slope, (torch.eye(len(x)).to(x) - torch.outer(slope, slope)) / length
    # min over τ of τ − μ Σ log(τ − x)
    gaps = x.amax() - x
    excess = _multiplier(gaps, mu)
    slope = mu / (excess + gaps)
    bend = slope**2 / mu
    value = x.amax() + excess - mu * torch.log(excess + gaps).sum()
    return value, slope, torch.diag(bend) - torch.outer(bend, bend) / bend.sum()


# --------------------------------------------------------------------------------------------------
# Convex functions of few linear forms, minimised over the unit ball
# --------------------------------------------------------------------------------------------------


class Outer(Protocol):
    """A convex f of z = b + Av, by its conjugate: min f(b + Av) over the ball is max −(⟨p, b⟩ +
    f*(−p) + ‖Aᵀp‖_*).

    ``mu`` adds a barrier to f*(−p) where its domain has a boundary.
    """

    @property
    def simplex(self) -> bool:
        """Whether Σp = 1."""

    def begin(self, b: Tensor) -> Tensor:
        """Some p inside the domain."""

    def inside(self, p: Tensor, mu: float) -> Tensor:
        """p moved off the boundary by about μ."""

    def dual(self, p: Tensor, mu: float) -> tuple[Tensor, Tensor, Tensor]:
        """f*(−p) with its gradient and the diagonal of its Hessian."""

    def gap(self, p: Tensor, z: Tensor) -> Tensor:
        """f(z) + f*(−p) + ⟨p, z⟩ ≥ 0, free of cancellation."""

    def paths(self, p: Tensor, d: Tensor) -> list[tuple[float, Callable[[float], Tensor]]]:
        """Curves that leave p in the direction d, and how far each may be followed."""


@dataclass(frozen=True)
class SoftMaximum:
    """f(z) = T log Σ e^(−z/T), T > 0. Its dual variables p are the softmax weights; −f* is T times
    their entropy."""

    temperature: float
    simplex: ClassVar[bool] = True

    def begin(self, b: Tensor) -> Tensor:
        return 0.9 * torch.softmax(-b / max(self.temperature, 0.3), 0) + 0.1 / len(b)

    def inside(self, p: Tensor, mu: float) -> Tensor:
        p = p + 0.1 * min(mu, 1 / len(p))
        return p / p.sum()

    def dual(self, p: Tensor, mu: float) -> tuple[Tensor, Tensor, Tensor]:
        heat, log = max(self.temperature, mu), torch.log(p)
        value = heat * (p * log).sum() - 0.5 * mu * log.sum()
        return value, heat * (1 + log) - 0.5 * mu / p, heat / p + 0.5 * mu / p**2

    def gap(self, p: Tensor, z: Tensor) -> Tensor:
        log = torch.log_softmax(-z / self.temperature, 0)
        return self.temperature * (p * (torch.log(p) - log) - p + torch.exp(log)).sum()

    def paths(self, p: Tensor, d: Tensor) -> list[tuple[float, Callable[[float], Tensor]]]:
        def straight(a: float) -> Tensor:
            q = p + a * d
            return q / q.sum()

        def curved(a: float) -> Tensor:
            # where p falls, 1/p moves linearly: Newton's method on a barrier then has no boundary
            # to hit
            q = torch.where(d < 0, p / (1 - a * d.clamp_max(0) / p), p + a * d)
            return q / q.sum()

        room = 0.95 / max(float((-d / p).amax()), 0.1)
        return [(1.0, straight)] if room > 1 else [(room, straight), (1.0, curved)]


@dataclass(frozen=True)
class HalfSquare:
    """f(z) = ½‖z‖²; p = −z at the solution."""

    simplex: ClassVar[bool] = False

    def begin(self, b: Tensor) -> Tensor:
        return -b

    def inside(self, p: Tensor, mu: float) -> Tensor:
        return p

    def dual(self, p: Tensor, mu: float) -> tuple[Tensor, Tensor, Tensor]:
        return 0.5 * (p @ p), p, torch.ones_like(p)

    def gap(self, p: Tensor, z: Tensor) -> Tensor:
        return 0.5 * ((p + z) ** 2).sum()

    def paths(self, p: Tensor, d: Tensor) -> list[tuple[float, Callable[[float], Tensor]]]:
        return [(1.0, lambda a: p + a * d)]
