"""Norms of a flat vector: l1, l2, l-infinity, lp and those of a matrix A."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from flowsim.checks import require_exponent
from flowsim.layout import Layout
from flowsim.norms.faces import Box, Face, Simplex, onto_simplex
from flowsim.norms.norm import Norm
from flowsim.numerics.batched import rows_times
from flowsim.numerics.roots import find_zero
from flowsim.numerics.scaling import lengths, nonzero, scaled, unit
from flowsim.numerics.shapes import PerVector, Row


@dataclass(frozen=True)
class L1(Norm):
    """``sum |v_i|``: coordinate descent.  At a tie `steepest` takes the first largest coordinate.

    >>> L1().steepest(torch.tensor([1.0, -3.0, 3.0]))
    tensor([ 0., -1.,  0.])
    """

    name = "l1"
    symbol = r"$\ell_1$"
    ties = True

    def value(self, v: Tensor) -> Tensor:
        return v.abs().sum(-1)

    def dual(self, g: Tensor) -> Tensor:
        return g.abs().amax(-1)

    def steepest(self, g: Tensor) -> Tensor:
        first = g.abs().argmax(-1, keepdim=True)
        sign = _sign(g.gather(-1, first))
        return torch.zeros_like(g).scatter(-1, first, sign)

    def _nearest(self, v: Tensor) -> Tensor:
        return v.sign() * onto_simplex(v.abs())

    def _ties_at(self, g: Tensor, atol: Tensor) -> Face:
        tied = g.abs() >= (self.dual(g) - atol)[..., None]
        return Simplex(torch.where(tied, _sign(g), 0.0))


@dataclass(frozen=True)
class Linf(Norm):
    """``max |v_i|``: sign descent, which is Adam without its averages and ε.  `steepest` takes
    sign(0) = 0.

    >>> Linf().steepest(torch.tensor([1.0, -3.0, 0.0]))
    tensor([ 1., -1.,  0.])
    """

    name = "linf"
    symbol = r"$\ell_\infty$"
    ties = True

    def value(self, v: Tensor) -> Tensor:
        return v.abs().amax(-1)

    def dual(self, g: Tensor) -> Tensor:
        return g.abs().sum(-1)

    def steepest(self, g: Tensor) -> Tensor:
        return _sign(g)

    def _nearest(self, v: Tensor) -> Tensor:
        return v.clamp(-1.0, 1.0)

    def _ties_at(self, g: Tensor, atol: Tensor) -> Face:
        free = g.abs() <= atol[..., None]
        sign = _sign(g)
        low = torch.where(free, -1.0, sign)
        high = torch.where(free, 1.0, sign)
        return Box(low, high)


@dataclass(frozen=True)
class L2(Norm):
    """``sqrt(sum v_i^2)``: gradient descent."""

    name = "l2"
    symbol = r"$\ell_2$"
    ties = False
    quadratic = True

    def value(self, v: Tensor) -> Tensor:
        return lengths(v)

    def dual(self, g: Tensor) -> Tensor:
        return lengths(g)

    def steepest(self, g: Tensor) -> Tensor:
        return unit(g)

    def _nearest(self, v: Tensor) -> Tensor:
        return unit(v)


@dataclass(frozen=True)
class Frobenius(L2):
    """`L2` on the entries of a matrix, under its usual name there."""

    name = "frobenius"
    symbol = r"$\|\cdot\|_F$"


@dataclass(frozen=True)
class Lp(Norm):
    """``(sum |v_i|^p)^(1/p)``, 1 < p < infinity; v_i = sign(g_i) (|g_i| / ||g||_q)^(q-1), 1/p + 1/q
    = 1.

    Raises ValueError for other p.  For p > 2 the dual map is only Hoelder continuous, with exponent
    q - 1, where a coordinate of g vanishes."""

    p: float

    def __post_init__(self) -> None:
        require_exponent(self.p, "L1() or Linf()")

    @property
    def name(self) -> str:
        return f"l{self.p:g}"

    @property
    def symbol(self) -> str:
        return rf"$\ell_{{{self.p:g}}}$"

    ties = False

    @property
    def quadratic(self) -> bool:  # type: ignore[override]
        return self.p == 2

    @property
    def q(self) -> float:
        """The dual exponent p/(p-1)."""
        return self.p / (self.p - 1)

    def value(self, v: Tensor) -> Tensor:
        return _power_norm(v, self.p)

    def dual(self, g: Tensor) -> Tensor:
        return _power_norm(g, self.q)

    def steepest(self, g: Tensor) -> Tensor:
        u, _ = scaled(g)
        length = nonzero(_power_norm(u, self.q))
        magnitudes = u.abs() / length[..., None]
        return u.sign() * magnitudes ** (self.q - 1)

    def _nearest(self, v: Tensor) -> Tensor:
        # x + lam x^(p-1) = |v|; the residual lam x^(p-1) has dual norm lam on the sphere
        def shrunk(lam: Tensor) -> Tensor:
            return _shrink(v.abs(), lam[..., None], self.p)

        nearest = _onto_sphere(shrunk, self.value, self.dual(v))
        return v.sign() * nearest


@dataclass(frozen=True, eq=False)
class Mahalanobis(Norm):
    """``sqrt(v^T A v)``, A positive definite: a dense ``(P, P)`` matrix or a diagonal ``(P,)``; v ~
    A^-1 g.

    Raises ValueError where the matrix is not finite, symmetric and positive definite beyond
    rounding.

    >>> Mahalanobis(torch.tensor([4.0, 1.0])).steepest(torch.tensor([4.0, 0.0]))
    tensor([0.5000, 0.0000])
    """

    matrix: Tensor
    _eigenvalues: Tensor = field(init=False, repr=False)
    _basis: Tensor | None = field(init=False, repr=False)

    name = "mahalanobis"
    symbol = r"$\|\cdot\|_A$"
    ties = False
    quadratic = True

    def __post_init__(self) -> None:
        eigenvalues, basis = _spectrum(self.matrix)
        object.__setattr__(self, "_eigenvalues", eigenvalues)
        object.__setattr__(self, "_basis", basis)

    def bind(self, layout: Layout) -> Self:
        size = sum(block.size for block in layout)
        if size != len(self.matrix):
            raise ValueError(
                f"got a Mahalanobis matrix for {len(self.matrix)} weights and a layout with "
                f"{size}, expected equal sizes, try Max({{block: Mahalanobis(...), ...}}) for one "
                "matrix per block"
            )
        return self

    def value(self, v: Tensor) -> Tensor:
        return lengths(self._rotate(v) * self._stretch(v))

    def dual(self, g: Tensor) -> Tensor:
        return lengths(self._rotate(g) / self._stretch(g))

    def steepest(self, g: Tensor) -> Tensor:
        # Euclidean in the coordinates A^(1/2) v
        stretch = self._stretch(g)
        direction = unit(self._rotate(g) / stretch)
        return self._rotate_back(direction / stretch)

    def _nearest(self, v: Tensor) -> Tensor:
        # x = (I + lam A)^-1 v; the residual lam A x has dual norm lam on the sphere
        u = self._rotate(v)
        stretch = self._stretch(v)

        def shrunk(lam: Tensor) -> Tensor:
            return u / (1 + lam[..., None] * stretch**2)

        def value(x: Tensor) -> Tensor:
            return lengths(stretch * x)

        nearest = _onto_sphere(shrunk, value, self.dual(v))
        return self._rotate_back(nearest)

    def _stretch(self, v: Tensor) -> Row:
        return self._eigenvalues.to(v).sqrt()

    def _rotate(self, v: Tensor) -> Tensor:
        if self._basis is None:
            return v
        return rows_times(v, self._basis.to(v))

    def _rotate_back(self, u: Tensor) -> Tensor:
        if self._basis is None:
            return u
        return rows_times(u, self._basis.to(u).mT)


def _onto_sphere(
    shrunk: Callable[[Tensor], Tensor], value: Callable[[Tensor], Tensor], high: Tensor
) -> Tensor:
    """``shrunk(lam)`` for the multiplier lam from 0 to ``high`` that makes its norm 1: a multiplier
    that is the dual norm of the residual is at most that of the projected vector.

    The reciprocal of the norm is nearly linear in lam, which the root finder likes."""

    def excess(lam: Tensor) -> Tensor:
        return 1 - 1 / value(shrunk(lam))

    lam = find_zero(excess, torch.zeros_like(high), high)
    return shrunk(lam)


def _sign(g: Tensor) -> Tensor:
    """The sign, and NaN where g is not finite (torch gives the sign 0 to NaN)."""
    return g.sign() + (g - g)


def _power_norm(v: Tensor, p: float) -> PerVector:
    u, largest = scaled(v)
    powers = u.abs() ** p
    return largest * powers.sum(-1) ** (1 / p)


def _shrink(a: Tensor, lam: Tensor, p: float) -> Tensor:
    """``x >= 0`` with ``x + lam x^(p-1) = a`` for nonnegative ``a`` and ``lam``.

    Convex in x for p > 2 and in z = x^(p-1) otherwise, so Newton's method descends from the upper
    bound that either term alone gives, at most a factor 2 above in value."""
    if p > 2:
        x = _newton(a, torch.ones_like(lam), lam, p - 1)
    else:
        e = 1 / (p - 1)
        x = _newton(a, lam, torch.ones_like(lam), e) ** e
    return torch.where(a == 0, 0.0, x)


def _newton(a: Tensor, linear: Tensor, power: Tensor, e: float) -> Tensor:
    """The z with ``linear z + power z^e = a``."""
    b = power ** (1 / e)
    z = torch.minimum(a / linear, a ** (1 / e) / b)
    for _ in range(8):
        term = (b * z) ** e  # at most a, so nothing overflows
        numerator = a + (e - 1) * term
        slope = linear * z + e * term
        z = z * numerator / slope
    return z


def _spectrum(matrix: Tensor) -> tuple[Row, Float[Tensor, "P P"] | None]:
    """Eigenvalues and eigenvectors of a positive definite matrix; None for the eigenvectors of a
    diagonal."""
    if matrix.ndim not in (1, 2) or matrix.shape[0] != matrix.shape[-1]:
        got = f"of shape {tuple(matrix.shape)}"
        raise _refused(got, "a diagonal (P,) or a square (P, P)", "torch.ones(P)")
    if not bool(torch.isfinite(matrix).all()):
        raise _refused("with entries that are not finite", _DEFINITE, "torch.ones(P)")
    if matrix.ndim == 1:
        _require_definite(matrix, least=0.0)
        return matrix, None
    rounding = len(matrix) * torch.finfo(matrix.dtype).eps
    largest = float(matrix.abs().amax())
    skew = float((matrix - matrix.mT).abs().amax())
    if skew > 8 * rounding * largest:
        got = f"with asymmetry {skew:.3g}"
        raise _refused(got, "a symmetric one", "(matrix + matrix.T) / 2")
    eigenvalues, basis = torch.linalg.eigh(matrix)
    highest = float(eigenvalues.amax())
    _require_definite(eigenvalues, least=rounding * highest)
    return eigenvalues, basis


_DEFINITE = "a positive definite one"


def _require_definite(eigenvalues: Tensor, least: float) -> None:
    low = float(eigenvalues.amin())
    high = float(eigenvalues.amax())
    if low <= least:
        got = f"with eigenvalues from {low:.3g} to {high:.3g}"
        raise _refused(got, _DEFINITE, "adding c * eye(P)")


def _refused(got: str, expected: str, attempt: str) -> ValueError:
    return ValueError(f"got a matrix {got}, expected {expected}, try {attempt}")
