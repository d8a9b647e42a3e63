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
from flowsim.norms import faces
from flowsim.norms.faces import Face
from flowsim.norms.norm import Norm
from flowsim.norms.vector import L1, Linf, Lp
from flowsim.numerics.scaling import nonzero, scaled


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
                f"got blocks {got} for the norm {self.name!r}, expected exactly one block with two or more "
                "dimensions, try modular(layout) or Max({block: norm, ...}), which take one norm per block"
            )
        out, *rest = layout[0].shape
        return replace(self, shape=(out, math.prod(rest)))

    def value(self, v: Tensor) -> Tensor:
        s, size = self._values(v)
        return size * self.inner.value(s)

    def dual(self, g: Tensor) -> Tensor:
        s, size = self._values(g)
        return size * self.inner.dual(s)

    def steepest(self, g: Tensor) -> Tensor:
        u, s, v, _ = self._svd(g)
        return _assemble(u, self.inner.steepest(s), v)

    def _nearest(self, v: Tensor) -> Tensor:
        left, s, right = faces.singular(self._matrix(v))
        return _assemble(left, self.inner.project(s), right)

    def _values(self, v: Tensor) -> tuple[Tensor, Tensor]:
        u, size = scaled(v)
        fine = torch.isfinite(u).all(-1)
        s = torch.linalg.svdvals(self._matrix(torch.where(fine[..., None], u, 0.0)))
        return torch.where(fine[..., None], s, torch.nan), size

    def _svd(self, g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """u, s, v and the rounding error of s, for g over its largest entry; s within rounding of 0
        is 0."""
        u, s, v = faces.singular(self._matrix(scaled(g)[0]))
        rounding = (
            max(u.shape[-2], v.shape[-2]) * torch.finfo(s.dtype).eps * s.amax(-1, keepdim=True)
        )
        return u, torch.where(s <= rounding, 0.0, s), v, rounding

    def _matrix(self, v: Tensor) -> Tensor:
        if self.shape is None:
            raise ValueError(
                f"got the norm {self.name!r} without a matrix shape, expected a bound norm, try norm.bind(net.layout)"
            )
        if v.shape[-1] != math.prod(self.shape):
            raise ValueError(
                f"got {v.shape[-1]} weights for the norm {self.name!r} of a {self.shape} matrix, expected "
                f"{math.prod(self.shape)}, try norm.bind(layout) with the layout of these weights"
            )
        return v.unflatten(-1, self.shape)


@dataclass(frozen=True)
class Spectral(_Singular):
    """The largest singular value: descent along the polar factor U V^T, as Muon does.

    `steepest` is zero on the null spaces of g.
    """

    name = "spectral"
    symbol = r"$S_\infty$"

    @property
    def inner(self) -> Norm:
        return Linf()

    def _ties_at(self, g: Tensor, atol: Tensor) -> Face:
        u, s, v, _ = self._svd(g)
        positive = (s > (atol / nonzero(scaled(g)[1]))[..., None])[..., None, :]
        return faces.Contraction(u * positive, v * positive)


@dataclass(frozen=True)
class Nuclear(_Singular):
    """The sum of the singular values; `steepest` is u_1 v_1^T."""

    name = "nuclear"
    symbol = r"$S_1$"

    @property
    def inner(self) -> Norm:
        return L1()

    def _ties_at(self, g: Tensor, atol: Tensor) -> Face:
        u, s, v, rounding = self._svd(g)
        gap = torch.maximum((atol / nonzero(scaled(g)[1]))[..., None], rounding)
        return faces.Spectraplex(u, v, s >= s.amax(-1, keepdim=True) - gap)


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


def _assemble(u: Tensor, s: Tensor, v: Tensor) -> Tensor:
    return ((u * s[..., None, :]) @ v.mT).flatten(-2)
