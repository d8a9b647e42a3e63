r"""Norms on flat weights and their dual maps: which way is steepest.

A norm answers, for a gradient or ascent direction ``g`` with any leading batch dimensions,

    value(v)      ||v||
    dual(g)       ||g||_* = max { <g, v> : ||v|| <= 1 }
    steepest(g)   one v with ||v|| = 1 and <g, v> = ||g||_*, zero where g is zero
    face(g)       all of them
    project(v)    the nearest point of the unit ball

Steepest *ascent* of g is meant; a flow that descends a loss passes ``g = -grad``.  The norm is the one in
which the *weights* move, so sign descent belongs to `Linf` and coordinate descent to `L1`.

    norm                 dual norm                    steepest direction, up to normalisation
    L1                   l-infinity                   the largest coordinate
    L2, Frobenius        l2                           g
    Linf                 l1                           sign(g)
    Lp(p)                lq, 1/p + 1/q = 1            sign(g) |g|^(q-1)
    Mahalanobis(A)       sqrt(g^T A^-1 g)             A^-1 g

Norms of a matrix's singular values are in `matrix_norms`, compositions over blocks in `block_norms`.

Inputs are divided by their largest entry first, so gradients of any representable size are alike.
"""

import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from flowsim import faces
from flowsim.faces import Face
from flowsim.layout import Layout


class Norm(ABC):
    """A norm on flat weights ``(*batch, P)``.

    A new norm defines the abstract members and, if it has ties, `_ties_at`.
    """

    quadratic: bool = False
    """Whether ``||v||^2`` is a quadratic form ``v^T A v``, so that ``dual(g) steepest(g) = A^-1 g`` is linear."""

    @property
    @abstractmethod
    def name(self) -> str:
        """ASCII name for columns and files."""

    @property
    @abstractmethod
    def symbol(self) -> str:
        """Matplotlib mathtext for labels."""

    @property
    def title(self) -> str:
        """Name in running text: ℓ2, ℓ∞, spectral."""
        return re.sub(r"\bl(?=\d|inf\b)", "ℓ", self.name).replace("ℓinf", "ℓ∞")

    @property
    @abstractmethod
    def ties(self) -> bool:
        """Whether some ``g != 0`` has several steepest directions."""

    @abstractmethod
    def value(self, v: Float[Tensor, "*batch P"]) -> Float[Tensor, "*batch"]:
        """``||v||``."""

    @abstractmethod
    def dual(self, g: Float[Tensor, "*batch P"]) -> Float[Tensor, "*batch"]:
        """``max <g, v>`` over ``||v|| <= 1``."""

    @abstractmethod
    def steepest(self, g: Float[Tensor, "*batch P"]) -> Float[Tensor, "*batch P"]:
        """One v with ``||v|| = 1`` and ``<g, v> = dual(g)``, deterministic at a tie; zero where g is zero."""

    @abstractmethod
    def _nearest(self, v: Tensor) -> Tensor:
        """`project` for v outside the unit ball; anything at v = 0."""

    def bind(self, layout: Layout) -> Self:
        """The norm with the shapes of ``layout``; itself where it needs none."""
        return self

    def project(self, v: Float[Tensor, "*batch P"]) -> Float[Tensor, "*batch P"]:
        """The point of the unit ball nearest to v in the Euclidean sense; v itself inside, up to rounding."""
        inside = (self.value(v) <= 1 + 16 * torch.finfo(v.dtype).eps)[..., None]
        return torch.where(inside, v, self._nearest(torch.where(inside, 0.0, v)))

    def face(self, g: Float[Tensor, "*batch P"], tol: float = 1e-9) -> Face:
        """All steepest directions, where differences up to ``tol * dual(g)`` count as ties.

        ``tol`` is never taken below 8 units of rounding; singular values also tie within max(m, n) units.
        Where g is zero the face is the whole unit ball.
        """
        return self._face(g, max(tol, 8 * torch.finfo(g.dtype).eps) * self.dual(g))

    def _face(self, g: Tensor, atol: Tensor) -> Face:
        """`face` with an absolute tolerance ``(*batch)``, which blocks inherit from the whole gradient."""
        zero, face = self.dual(g) <= atol, self._ties_at(g, atol)
        return faces.Either(zero, faces.Ball(self, torch.zeros_like(g)), face) if bool(zero.any()) else face

    def _ties_at(self, g: Tensor, atol: Tensor) -> Face:
        """The face on rows where ``dual(g) > atol``; anything on the others."""
        return faces.Point(self.steepest(g))


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
        return torch.zeros_like(g).scatter(-1, first, _sign(g.gather(-1, first)))

    def _nearest(self, v: Tensor) -> Tensor:
        return v.sign() * faces.simplex(v.abs())

    def _ties_at(self, g: Tensor, atol: Tensor) -> Face:
        tied = g.abs() >= (self.dual(g) - atol)[..., None]
        return faces.Simplex(torch.where(tied, _sign(g), 0.0))


@dataclass(frozen=True)
class Linf(Norm):
    """``max |v_i|``: sign descent, which is Adam without its averages and ε.  `steepest` takes sign(0) = 0.

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
        return faces.Box(torch.where(free, -1.0, _sign(g)), torch.where(free, 1.0, _sign(g)))


@dataclass(frozen=True)
class L2(Norm):
    """``sqrt(sum v_i^2)``: gradient descent."""

    name = "l2"
    symbol = r"$\ell_2$"
    ties = False
    quadratic = True

    def value(self, v: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(v, dim=-1)
        if bool(_sound(length).all()):
            return length
        u, exponent = _near_one(v)
        return torch.ldexp(torch.linalg.vector_norm(u, dim=-1), exponent)

    def dual(self, g: Tensor) -> Tensor:
        return self.value(g)

    def steepest(self, g: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(g, dim=-1)
        if not bool(_sound(length).all()):
            g, _ = _near_one(g)
            length = torch.linalg.vector_norm(g, dim=-1)
        return g / nonzero(length)[..., None]

    def _nearest(self, v: Tensor) -> Tensor:
        return self.steepest(v)


@dataclass(frozen=True)
class Frobenius(L2):
    """`L2` on the entries of a matrix, under its usual name there."""

    name = "frobenius"
    symbol = r"$\|\cdot\|_F$"


@dataclass(frozen=True)
class Lp(Norm):
    """``(sum |v_i|^p)^(1/p)``, 1 < p < infinity; v_i = sign(g_i) (|g_i| / ||g||_q)^(q-1), 1/p + 1/q = 1.

    Raises ValueError for other p.  For p > 2 the dual map is only Hoelder continuous, with exponent q - 1,
    where a coordinate of g vanishes.
    """

    p: float

    def __post_init__(self) -> None:
        check_exponent(self.p, "L1() or Linf()")

    @property
    def name(self) -> str:
        return f"l{self.p:g}"

    @property
    def symbol(self) -> str:
        return rf"$\ell_{{{self.p:g}}}$"

    @property
    def ties(self) -> bool:
        return False

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
        return u.sign() * (u.abs() / nonzero(_power_norm(u, self.q))[..., None]) ** (self.q - 1)

    def _nearest(self, v: Tensor) -> Tensor:
        # x + lam x^(p-1) = |v|; the residual lam x^(p-1) has dual norm lam on the sphere, hence the bracket.
        # The reciprocal of ||x|| is nearly linear in lam, which the root finder likes.
        low, high = torch.zeros_like(self.dual(v)), self.dual(v)
        lam = faces.root(lambda lam: 1 - 1 / self.value(_shrink(v.abs(), lam[..., None], self.p)), low, high)
        return v.sign() * _shrink(v.abs(), lam[..., None], self.p)


@dataclass(frozen=True, eq=False)
class Mahalanobis(Norm):
    """``sqrt(v^T A v)``, A positive definite: a dense ``(P, P)`` matrix or a diagonal ``(P,)``; v ~ A^-1 g.

    Raises ValueError where the matrix is not finite, symmetric and positive definite beyond rounding.

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
                f"got a Mahalanobis matrix for {len(self.matrix)} weights and a layout with {size}, expected "
                "equal sizes, try Max({block: Mahalanobis(...), ...}) for one matrix per block"
            )
        return self

    def value(self, v: Tensor) -> Tensor:
        return L2().value(self._rotate(v) * self._roots(v))

    def dual(self, g: Tensor) -> Tensor:
        return L2().value(self._rotate(g) / self._roots(g))

    def steepest(self, g: Tensor) -> Tensor:
        # Euclidean in the coordinates A^(1/2) v
        return self._back(L2().steepest(self._rotate(g) / self._roots(g)) / self._roots(g))

    def _nearest(self, v: Tensor) -> Tensor:
        # x = (I + lam A)^-1 v; the residual lam A x has dual norm lam on the sphere, hence the bracket
        u, roots = self._rotate(v), self._roots(v)
        low, high = torch.zeros_like(self.dual(v)), self.dual(v)

        def shrunk(lam: Tensor) -> Tensor:
            return u / (1 + lam[..., None] * roots**2)

        return self._back(shrunk(faces.root(lambda lam: 1 - 1 / L2().value(roots * shrunk(lam)), low, high)))

    def _roots(self, v: Tensor) -> Tensor:
        return self._eigenvalues.to(v).sqrt()

    def _rotate(self, v: Tensor) -> Tensor:
        return v if self._basis is None else _times(v, self._basis.to(v))

    def _back(self, u: Tensor) -> Tensor:
        return u if self._basis is None else _times(u, self._basis.to(u).mT)


def _times(v: Float[Tensor, "*batch P"], matrix: Float[Tensor, "P P"]) -> Float[Tensor, "*batch P"]:
    """v·matrix with every row rounded alike: BLAS adds up a single row in another order than several."""
    rows = v.reshape(-1, v.shape[-1])
    product = rows.expand(2, -1) @ matrix if len(rows) == 1 else rows @ matrix
    return product[: len(rows)].view(v.shape)


def _sound(length: Tensor) -> Tensor:
    """Where no square that matters has under- or overflowed."""
    tiny = torch.finfo(length.dtype).tiny ** 0.25
    return (length > tiny) & (length < 1 / tiny)


def _near_one(v: Tensor) -> tuple[Tensor, Tensor]:
    """v over a power of two, which changes no digit, with entries up to 1; and the power, for `ldexp`."""
    limit = math.log2(torch.finfo(v.dtype).max) - 1
    exponent = torch.frexp(v.abs().amax(-1)).exponent.clamp(-limit, limit)
    exponent = exponent.to(v)  # of an integer, `ldexp` takes the power in single precision
    return torch.ldexp(v, -exponent[..., None]), exponent


def scaled(v: Tensor) -> tuple[Tensor, Tensor]:
    """``v`` divided by its largest entry, and that entry ``(*batch)``; zero rows stay zero."""
    size = v.abs().amax(-1)
    return v / nonzero(size)[..., None], size


def nonzero(a: Tensor) -> Tensor:
    return torch.where(a == 0, 1.0, a)


def _sign(g: Tensor) -> Tensor:
    """The sign, and NaN where g is not finite (torch gives the sign 0 to NaN)."""
    return g.sign() + (g - g)


def _power_norm(v: Tensor, p: float) -> Tensor:
    u, size = scaled(v)
    return size * (u.abs() ** p).sum(-1) ** (1 / p)


def _shrink(a: Tensor, lam: Tensor, p: float) -> Tensor:
    """``x >= 0`` with ``x + lam x^(p-1) = a`` for nonnegative ``a`` and ``lam``.

    Convex in x for p > 2 and in z = x^(p-1) otherwise, so Newton's method descends from the upper bound that
    either term alone gives, at most a factor 2 above in value.
    """
    linear, power, e = (1.0, lam, p - 1) if p > 2 else (lam, torch.ones_like(lam), 1 / (p - 1))
    b = power ** (1 / e)
    z = torch.minimum(a / linear, a ** (1 / e) / b)
    for _ in range(8):
        bent = (b * z) ** e  # at most a, so nothing overflows
        z = z * (a + (e - 1) * bent) / (linear * z + e * bent)
    return torch.where(a == 0, 0.0, z if p > 2 else z**e)


def check_exponent(p: float, ends: str) -> None:
    if not 1 < p < math.inf:
        raise ValueError(f"got p = {p}, expected 1 < p < infinity, try {ends} for the ends")


def _spectrum(matrix: Tensor) -> tuple[Tensor, Tensor | None]:
    """Eigenvalues and eigenvectors of a positive definite matrix; None for the eigenvectors of a diagonal."""

    def refuse(got: str, expected: str, attempt: str) -> None:
        raise ValueError(f"got a matrix {got}, expected {expected}, try {attempt}")

    if matrix.ndim not in (1, 2) or matrix.shape[0] != matrix.shape[-1]:
        refuse(f"of shape {tuple(matrix.shape)}", "a diagonal (P,) or a square (P, P)", "torch.ones(P)")
    if not bool(torch.isfinite(matrix).all()):
        refuse("with entries that are not finite", "a positive definite one", "torch.ones(P)")
    rounding = len(matrix) * torch.finfo(matrix.dtype).eps
    eigenvalues, basis = matrix, None
    if matrix.ndim == 2:
        skew = float((matrix - matrix.mT).abs().amax())
        if skew > 8 * rounding * float(matrix.abs().amax()):
            refuse(f"with asymmetry {skew:.3g}", "a symmetric one", "(matrix + matrix.T) / 2")
        eigenvalues, basis = torch.linalg.eigh(matrix)
    least, largest = float(eigenvalues.amin()), float(eigenvalues.amax())
    if least <= (0.0 if basis is None else rounding * largest):
        refuse(
            f"with eigenvalues from {least:.3g} to {largest:.3g}",
            "a positive definite one",
            "adding c * eye(P)",
        )
    return eigenvalues, basis
