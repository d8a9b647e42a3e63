"""Norms of the singular values of one matrix, on flat weights.

norm                 dual norm                    steepest direction, up to normalisation
Spectral             nuclear                      U V^T
Nuclear              spectral                     u_1 v_1^T
Schatten(p)          Schatten(q)                  U diag(s^(q-1)) V^T
"""

import math
from abc import abstractmethod
from dataclasses import KW_ONLY, dataclass, replace
from typing import Self

import torch
from torch import Tensor

from flowsim.checks import require_exponent
from flowsim.layout import Layout
from flowsim.norms.faces import Contraction, Face, Spectraplex
from flowsim.norms.norm import Norm
from flowsim.norms.vector import L1, Linf, Lp
from flowsim.numerics.batched import from_svd, singular_values, svd
from flowsim.numerics.scaling import nonzero, scaled
from flowsim.numerics.shapes import Matrices, Vectors


@dataclass(frozen=True)
class _Singular(Norm):
    """A vector norm ``inner`` of the singular values of one ``(m, n)`` matrix (von Neumann 1937).

    G = U diag(s) V^T has steepest direction U diag(inner.steepest(s)) V^T and likewise for
    projections. Singular values below max(m, n) eps s_1 count as zero."""

    _: KW_ONLY
    shape: tuple[int, int] | None = None

    @property
    @abstractmethod
    def inner(self) -> Norm:
        """The vector norm of the singular values."""

    @property
    def ties(self) -> bool:
        return self.inner.ties

    @property
    def quadratic(self) -> bool:  # type: ignore[override]
        return self.inner.quadratic

    def bind(self, layout: Layout) -> Self:
        """The norm on the one matrix of ``layout``; kernels with more dimensions become (out,
        rest)."""
        if len(layout) != 1 or len(layout[0].shape) < 2:
            got = ", ".join(f"{block.name} {block.shape}" for block in layout)
            raise ValueError(
                f"got blocks {got} for the norm {self.name!r}, expected exactly one block with two "
                "or more dimensions, try modular(layout) or Max({block: norm, ...}), which take "
                "one norm per block"
            )
        out, *rest = layout[0].shape
        return replace(self, shape=(out, math.prod(rest)))

    def value(self, v: Tensor) -> Tensor:
        u, largest = scaled(v)
        s = singular_values(self.as_matrix(u))
        return largest * self.inner.value(s)

    def dual(self, g: Tensor) -> Tensor:
        u, largest = scaled(g)
        s = singular_values(self.as_matrix(u))
        return largest * self.inner.dual(s)

    def steepest(self, g: Tensor) -> Tensor:
        u, s, v = self._svd(g)
        return from_svd(u, self.inner.steepest(s), v)

    def _nearest(self, v: Tensor) -> Tensor:
        left, s, right = svd(self.as_matrix(v))
        return from_svd(left, self.inner.project(s), right)

    def _svd(self, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """u, s, v of g over its largest entry; s within rounding of 0 is 0."""
        near_one, _ = scaled(g)
        u, s, v = svd(self.as_matrix(near_one))
        vanishing = s <= _rounding(u, s, v)
        s = torch.where(vanishing, 0.0, s)
        return u, s, v

    def as_matrix(self, v: Tensor) -> Matrices:
        """Flat weights as the matrix. Raises ValueError where the norm is not bound to as many."""
        if self.shape is None:
            raise ValueError(
                f"got the norm {self.name!r} without a matrix shape, expected a bound norm, "
                "try norm.bind(net.layout)"
            )
        if v.shape[-1] != math.prod(self.shape):
            raise ValueError(
                f"got {v.shape[-1]} weights for the norm {self.name!r} of a {self.shape} matrix, "
                f"expected {math.prod(self.shape)}, try norm.bind(layout) with the layout of these "
                "weights"
            )
        return v.unflatten(-1, self.shape)


@dataclass(frozen=True)
class Spectral(_Singular):
    """The largest singular value: descent along the polar factor U V^T, as Muon does.

    `steepest` is zero on the null spaces of g."""

    name = "spectral"
    symbol = r"$S_\infty$"
    inner = Linf()

    def _ties_at(self, g: Tensor, atol: Tensor) -> Face:
        u, s, v = self._svd(g)
        positive = (s > _relative(atol, g))[..., None, :]
        return Contraction(u * positive, v * positive)


@dataclass(frozen=True)
class Nuclear(_Singular):
    """The sum of the singular values; `steepest` is u_1 v_1^T."""

    name = "nuclear"
    symbol = r"$S_1$"
    inner = L1()

    def _ties_at(self, g: Tensor, atol: Tensor) -> Face:
        u, s, v = self._svd(g)
        gap = torch.maximum(_relative(atol, g), _rounding(u, s, v))
        largest = s.amax(-1, keepdim=True)
        return Spectraplex(u, v, s >= largest - gap)


@dataclass(frozen=True)
class Schatten(_Singular):
    """The l_p norm of the singular values, 1 < p < infinity."""

    p: float

    def __post_init__(self) -> None:
        require_exponent(self.p, "Nuclear() or Spectral()")

    @property
    def name(self) -> str:
        return f"schatten{self.p:g}"

    @property
    def symbol(self) -> str:
        return rf"$S_{{{self.p:g}}}$"

    @property
    def inner(self) -> Norm:
        return Lp(self.p)


def _relative(atol: Tensor, g: Tensor) -> Vectors:
    """A tolerance for the singular values of g over its largest entry, ``(*batch, 1)``."""
    largest = g.abs().amax(-1)
    relative = atol / nonzero(largest)
    return relative[..., None]


def _rounding(u: Tensor, s: Tensor, v: Tensor) -> Vectors:
    """The rounding error of singular values, ``(*batch, 1)``."""
    longer = max(u.shape[-2], v.shape[-2])
    units = longer * torch.finfo(s.dtype).eps
    return units * s.amax(-1, keepdim=True)
