r"""The set of steepest directions at a tie.

A norm's unit ball has flat parts, and a gradient ``g`` may be perpendicular to one of them.  Then
every point of

    F(g) = argmax { <g, v> : ||v|| <= 1 }

is a steepest direction: a face of the ball.  A flow that slides along a tie needs the whole face,
because its velocity is the point of F that minimises the quadratic form of the loss' curvature.

Rows of a batch may be tied in different ways, so ties are masks and never lists.  From plain to
composed:

    Single        smooth norms
    Box           l-infinity: signs, free where the gradient is zero
    Simplex       l1: signed corners of the tied coordinates
    Contraction   spectral norm: the polar factor, plus a contraction on the null spaces
    Spectraplex   nuclear norm: a density matrix between the top singular spaces
    WholeBall     the whole unit ball, where the gradient is zero
    RowByRow      one face or another, row by row
    Scaled        a multiple of a face

Faces of several blocks are in `norms.block_faces`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool
from torch import Tensor

from flowsim.numerics.batched import dot, eigh, from_svd, singular_values, svd
from flowsim.numerics.scaling import lengths, nonzero
from flowsim.numerics.shapes import Matrices, PerVector, Vectors


class Face(ABC):
    """A convex set of flat directions for each row of a batch.

    Arguments ``v`` and ``c`` have the batch's shape, or more dimensions in front of it."""

    @abstractmethod
    def element(self) -> Vectors:
        """The point of least Euclidean norm."""

    @abstractmethod
    def support(self, c: Vectors) -> PerVector:
        """The maximum of ``<c, v>`` over the face."""

    @abstractmethod
    def project(self, v: Vectors) -> Vectors:
        """The Euclidean projection of ``v`` onto the face."""

    def contains(self, v: Vectors, tol: float = 1e-9) -> Bool[Tensor, "*batch"]:
        """Whether ``v`` lies within ``tol`` of the face, relative to the length of ``v`` or its
        projection.

        ``tol`` is never taken below 128 units of rounding, which a projection through an SVD may
        cost."""
        nearest = self.project(v)
        rounding = 128 * torch.finfo(v.dtype).eps
        relative = max(tol, rounding)
        longer = torch.maximum(lengths(v), lengths(nearest))
        return lengths(v - nearest) <= relative * longer


@dataclass(frozen=True)
class Single(Face):
    """One direction, ``(*batch, P)``."""

    at: Tensor

    def element(self) -> Tensor:
        return self.at

    def support(self, c: Tensor) -> Tensor:
        return dot(c, self.at)

    def project(self, v: Tensor) -> Tensor:
        return self.at.expand_as(v + self.at)


@dataclass(frozen=True)
class Box(Face):
    """``low <= v <= high``: for l-infinity a sign, or [-1, 1] where the gradient vanishes."""

    low: Tensor
    high: Tensor

    def element(self) -> Tensor:
        return self.project(torch.zeros_like(self.low))

    def support(self, c: Tensor) -> Tensor:
        ends = c * self.low, c * self.high
        return torch.maximum(*ends).sum(-1)

    def project(self, v: Tensor) -> Tensor:
        return v.clamp(self.low, self.high)


@dataclass(frozen=True)
class Simplex(Face):
    """Convex hull of ``signs[i] e_i`` over the coordinates whose sign, one of -1, 0, 1, is not
    zero."""

    signs: Tensor

    def element(self) -> Tensor:
        tied = self._tied.sum(-1, keepdim=True)
        return self.signs / tied

    def support(self, c: Tensor) -> Tensor:
        corners = c * self.signs
        return torch.where(self._tied, corners, -torch.inf).amax(-1)

    def project(self, v: Tensor) -> Tensor:
        weights = onto_simplex(v * self.signs, self._tied)
        return self.signs * weights

    @property
    def _tied(self) -> Bool[Tensor, "*batch P"]:
        return self.signs != 0


@dataclass(frozen=True)
class Contraction(Face):
    """``{U V^T + P C Q : ||C||_sigma <= 1}``, P and Q the projections onto the complements of U and
    V.

    ``u (*batch, m, k)`` and ``v (*batch, n, k)`` hold the singular vectors of positive singular
    values, and zero columns in place of the others, so that rows may differ in rank."""

    u: Tensor
    v: Tensor

    def element(self) -> Tensor:
        polar = self.u @ self.v.mT
        return polar.flatten(-2)

    def support(self, c: Tensor) -> Tensor:
        s = singular_values(self._free(c))
        return dot(c, self.element()) + s.sum(-1)

    def project(self, v: Tensor) -> Tensor:
        left, s, right = svd(self._free(v))
        clipped = from_svd(left, s.clamp(max=1.0), right)
        # again free, as rounding tilts the singular vectors of values far below the largest
        free = self._free(clipped)
        return self.element() + free.flatten(-2)

    def _free(self, v: Tensor) -> Matrices:
        """P W Q, projected twice: once leaves a rounding error of the size of W (Parlett 1980)."""
        m = self.u.shape[-2]
        w = v.unflatten(-1, (m, -1))
        for _ in range(2):
            in_u = self.u @ (self.u.mT @ w)
            w = w - in_u
            in_v = (w @ self.v) @ self.v.mT
            w = w - in_v
        return w


@dataclass(frozen=True)
class Spectraplex(Face):
    """``{U S V^T : S positive semidefinite, tr S = 1}`` on the singular vectors in ``top (*batch,
    k)``."""

    u: Tensor
    v: Tensor
    top: Tensor

    def element(self) -> Tensor:
        top = self.top.to(self.u)
        weights = top / top.sum(-1, keepdim=True)
        return from_svd(self.u, weights, self.v)

    def support(self, c: Tensor) -> Tensor:
        values, _ = eigh(self._core(c))
        return values.amax(-1)

    def project(self, v: Tensor) -> Tensor:
        values, basis = eigh(self._core(v))
        weights = onto_simplex(values)
        return from_svd(self.u @ basis, weights, self.v @ basis)

    def _core(self, v: Tensor) -> Matrices:
        """The symmetric part of U^T W V on the top; elsewhere an eigenvalue too low to be
        chosen."""
        m = self.u.shape[-2]
        w = v.unflatten(-1, (m, -1))
        core = self.u.mT @ w @ self.v
        symmetric = (core + core.mT) / 2
        tied = self.top[..., :, None] & self.top[..., None, :]
        core = torch.where(tied, symmetric, 0.0)
        # tied eigenvalues are at least -|core|; `onto_simplex` ignores what is 1 below the largest
        low = -2 - 2 * lengths(core.flatten(-2))
        diagonal = torch.where(self.top, 0.0, low[..., None])
        return core + torch.diag_embed(diagonal)


class UnitBall(Protocol):
    """What `WholeBall` asks of a norm."""

    def dual(self, g: Tensor, /) -> Tensor: ...

    def project(self, v: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class WholeBall(Face):
    """The unit ball of a norm; ``origin (*batch, P)`` is its centre."""

    norm: UnitBall
    origin: Tensor

    def element(self) -> Tensor:
        return self.origin

    def support(self, c: Tensor) -> Tensor:
        return self.norm.dual(c + self.origin)

    def project(self, v: Tensor) -> Tensor:
        return self.norm.project(v + self.origin)


@dataclass(frozen=True)
class RowByRow(Face):
    """Row by row, ``yes`` where ``mask (*batch)`` holds and ``no`` elsewhere."""

    mask: Tensor
    yes: Face
    no: Face

    def element(self) -> Tensor:
        yes = self.yes.element()
        no = self.no.element()
        return torch.where(self.mask[..., None], yes, no)

    def support(self, c: Tensor) -> Tensor:
        yes = self.yes.support(c)
        no = self.no.support(c)
        return torch.where(self.mask, yes, no)

    def project(self, v: Tensor) -> Tensor:
        mask = self.mask[..., None]
        # the side that will be thrown away gets a zero, which costs its root finding nothing
        yes = self.yes.project(torch.where(mask, v, 0.0))
        no = self.no.project(torch.where(mask, 0.0, v))
        return torch.where(mask, yes, no)


@dataclass(frozen=True)
class Scaled(Face):
    """``scale * face`` with ``scale (*batch)`` nonnegative."""

    scale: Tensor
    face: Face

    def element(self) -> Tensor:
        return self.scale[..., None] * self.face.element()

    def support(self, c: Tensor) -> Tensor:
        return self.scale * self.face.support(c)

    def project(self, v: Tensor) -> Tensor:
        divisor = nonzero(self.scale)[..., None]
        nearest = self.face.project(v / divisor)
        return self.scale[..., None] * nearest


def onto_simplex(u: Vectors, allowed: Tensor | None = None) -> Vectors:
    """The point of the unit simplex nearest to ``u``, zero off ``allowed`` (Held, Wolfe and Crowder
    1974).

    >>> onto_simplex(torch.tensor([0.5, 0.25, -3.0]))
    tensor([0.6250, 0.3750, 0.0000])
    """
    if allowed is not None:
        u = torch.where(allowed, u, -torch.inf)
    # entries 1 or more below the largest end at zero anyway; the others lie in [-1, 0], free of
    # cancellation
    largest = u.amax(-1, keepdim=True)
    u = (u - largest).clamp(min=-2.0)
    ordered = u.sort(-1, descending=True).values
    excess = ordered.cumsum(-1) - 1
    count = torch.ones_like(u).cumsum(-1)
    positive = ordered * count > excess
    kept = positive.sum(-1, keepdim=True).clamp(min=1)
    shift = excess.gather(-1, kept - 1) / kept
    x = (u - shift).clamp(min=0.0)
    return x / x.sum(-1, keepdim=True)
