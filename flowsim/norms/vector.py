"""TODO."""

from dataclasses import dataclass, field
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from flowsim.checks import require_exponent
from flowsim.layout import Layout
from flowsim.norms import faces
from flowsim.norms.faces import Face
from flowsim.norms.norm import Norm
from flowsim.numerics.roots import root
from flowsim.numerics.scaling import _near_one, _sound, nonzero, scaled


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
        # x + lam x^(p-1) = |v|; the residual lam x^(p-1) has dual norm lam on the sphere, hence the
        # bracket. The reciprocal of ||x|| is nearly linear in lam, which the root finder likes.
        low, high = torch.zeros_like(self.dual(v)), self.dual(v)
        lam = root(
            lambda lam: 1 - 1 / self.value(_shrink(v.abs(), lam[..., None], self.p)), low, high
        )
        return v.sign() * _shrink(v.abs(), lam[..., None], self.p)


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
        # x = (I + lam A)^-1 v; the residual lam A x has dual norm lam on the sphere, hence the
        # bracket
        u, roots = self._rotate(v), self._roots(v)
        low, high = torch.zeros_like(self.dual(v)), self.dual(v)

        def shrunk(lam: Tensor) -> Tensor:
            return u / (1 + lam[..., None] * roots**2)

        return self._back(
            shrunk(root(lambda lam: 1 - 1 / L2().value(roots * shrunk(lam)), low, high))
        )

    def _roots(self, v: Tensor) -> Tensor:
        return self._eigenvalues.to(v).sqrt()

    def _rotate(self, v: Tensor) -> Tensor:
        return v if self._basis is None else _times(v, self._basis.to(v))

    def _back(self, u: Tensor) -> Tensor:
        return u if self._basis is None else _times(u, self._basis.to(u).mT)


def _times(v: Float[Tensor, "*batch P"], matrix: Float[Tensor, "P P"]) -> Float[Tensor, "*batch P"]:
    """v·matrix with every row rounded alike: BLAS adds up a single row in another order than
    several."""
    rows = v.reshape(-1, v.shape[-1])
    product = rows.expand(2, -1) @ matrix if len(rows) == 1 else rows @ matrix
    return product[: len(rows)].view(v.shape)


def _sign(g: Tensor) -> Tensor:
    """The sign, and NaN where g is not finite (torch gives the sign 0 to NaN)."""
    return g.sign() + (g - g)


def _power_norm(v: Tensor, p: float) -> Tensor:
    u, size = scaled(v)
    return size * (u.abs() ** p).sum(-1) ** (1 / p)


def _shrink(a: Tensor, lam: Tensor, p: float) -> Tensor:
    """``x >= 0`` with ``x + lam x^(p-1) = a`` for nonnegative ``a`` and ``lam``.

    Convex in x for p > 2 and in z = x^(p-1) otherwise, so Newton's method descends from the upper
    bound that either term alone gives, at most a factor 2 above in value."""
    linear, power, e = (1.0, lam, p - 1) if p > 2 else (lam, torch.ones_like(lam), 1 / (p - 1))
    b = power ** (1 / e)
    z = torch.minimum(a / linear, a ** (1 / e) / b)
    for _ in range(8):
        bent = (b * z) ** e  # at most a, so nothing overflows
        z = z * (a + (e - 1) * bent) / (linear * z + e * bent)
    return torch.where(a == 0, 0.0, z if p > 2 else z**e)


def _spectrum(matrix: Tensor) -> tuple[Tensor, Tensor | None]:
    """Eigenvalues and eigenvectors of a positive definite matrix; None for the eigenvectors of a
    diagonal."""

    def refuse(got: str, expected: str, attempt: str) -> None:
        raise ValueError(f"got a matrix {got}, expected {expected}, try {attempt}")

    if matrix.ndim not in (1, 2) or matrix.shape[0] != matrix.shape[-1]:
        refuse(
            f"of shape {tuple(matrix.shape)}", "a diagonal (P,) or a square (P, P)", "torch.ones(P)"
        )
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
