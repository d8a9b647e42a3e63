r"""Norms on flat weights and their dual maps: which way is steepest.

A norm answers, for a gradient or ascent direction ``g`` with any leading batch dimensions,

    value(v)      ||v||
    dual(g)       ||g||_* = max { <g, v> : ||v|| <= 1 }
    steepest(g)   one v with ||v|| = 1 and <g, v> = ||g||_*, zero where g is zero
    face(g)       all of them
    project(v)    the nearest point of the unit ball

Steepest *ascent* of g is meant; a flow that descends a loss passes ``g = -grad``.  The norm is the
one in which the *weights* move, so sign descent belongs to `Linf` and coordinate descent to `L1`.

    norm                 dual norm                    steepest direction, up to normalisation
    L1                   l-infinity                   the largest coordinate
    L2, Frobenius        l2                           g
    Linf                 l1                           sign(g)
    Lp(p)                lq, 1/p + 1/q = 1            sign(g) |g|^(q-1)
    Mahalanobis(A)       sqrt(g^T A^-1 g)             A^-1 g

Norms of a matrix's singular values are in `norms.matrix`, compositions over blocks in
`norms.blocks`.

Inputs are divided by their largest entry first, so gradients of any representable size are alike.
"""

import re
from abc import ABC, abstractmethod
from typing import Self

import torch
from torch import Tensor

from flowsim.checks import require_instance
from flowsim.layout import Layout
from flowsim.norms.faces import Face, RowByRow, Single, WholeBall
from flowsim.numerics.shapes import PerVector, Vectors


class Norm(ABC):
    """A norm on flat weights ``(*batch, P)``.

    A new norm defines the abstract members and, if it has ties, `_ties_at`."""

    quadratic: bool = False
    """Whether ``||v||^2`` is a quadratic form ``v^T A v``, so that ``dual(g) steepest(g) = A^-1 g``
    is linear."""

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
        title = re.sub(r"\bl(?=\d|inf\b)", "ℓ", self.name)
        return title.replace("ℓinf", "ℓ∞")

    @property
    @abstractmethod
    def ties(self) -> bool:
        """Whether some ``g != 0`` has several steepest directions."""

    @abstractmethod
    def value(self, v: Vectors) -> PerVector:
        """``||v||``."""

    @abstractmethod
    def dual(self, g: Vectors) -> PerVector:
        """``max <g, v>`` over ``||v|| <= 1``."""

    @abstractmethod
    def steepest(self, g: Vectors) -> Vectors:
        """One v with ``||v|| = 1`` and ``<g, v> = dual(g)``, deterministic at a tie; zero where g
        is zero."""

    @abstractmethod
    def _nearest(self, v: Tensor) -> Tensor:
        """`project` for v outside the unit ball; anything at v = 0."""

    def bind(self, layout: Layout) -> Self:
        """The norm with the shapes of ``layout``; itself where it needs none."""
        return self

    def project(self, v: Vectors) -> Vectors:
        """The point of the unit ball nearest to v in the Euclidean sense; v itself inside, up to
        rounding."""
        rounding = 16 * torch.finfo(v.dtype).eps
        inside = (self.value(v) <= 1 + rounding)[..., None]
        outer = torch.where(inside, 0.0, v)
        return torch.where(inside, v, self._nearest(outer))

    def by_inverse_metric(self, g: Vectors) -> Vectors:
        """``A^-1 g`` of a quadratic norm; of any norm, a gradient of ``dual(g)^2 / 2``."""
        return self.dual(g)[..., None] * self.steepest(g)

    def face(self, g: Vectors, tol: float = 1e-9) -> Face:
        """All steepest directions, where differences up to ``tol * dual(g)`` count as ties.

        ``tol`` is never taken below 8 units of rounding; singular values also tie within max(m, n)
        units. Where g is zero the face is the whole unit ball."""
        rounding = 8 * torch.finfo(g.dtype).eps
        relative = max(tol, rounding)
        return self._face(g, relative * self.dual(g))

    def _face(self, g: Tensor, atol: Tensor) -> Face:
        """`face` with an absolute tolerance ``(*batch)``, which blocks inherit from the whole
        gradient."""
        face = self._ties_at(g, atol)
        zero = self.dual(g) <= atol
        if not bool(zero.any()):
            return face
        ball = WholeBall(self, torch.zeros_like(g))
        return RowByRow(zero, ball, face)

    def _ties_at(self, g: Tensor, atol: Tensor) -> Face:
        """The face on rows where ``dual(g) > atol``; anything on the others."""
        return Single(self.steepest(g))


def require_norm(owner: str, norm: Norm) -> None:
    """Raise TypeError where ``norm`` is not an instance of one."""
    require_instance(owner, Norm, "a flowsim norm, try flowsim.Linf()", norm=norm)
