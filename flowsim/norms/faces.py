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
    Product       block by block
    Mixture       a mixture of blocks
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from flowsim.numerics.batched import dot, eigh, from_svd, svd
from flowsim.numerics.roots import find_zero
from flowsim.numerics.scaling import lengths


class Face(ABC):
    """A convex set of flat directions for each row of a batch.

    Arguments ``v`` and ``c`` have the batch's shape, or more dimensions in front of it.
    """

    @abstractmethod
    def element(self) -> Float[Tensor, "*batch P"]:
        """The point of least Euclidean norm."""

    @abstractmethod
    def support(self, c: Float[Tensor, "*batch P"]) -> Float[Tensor, "*batch"]:
        """The maximum of ``<c, v>`` over the face."""

    @abstractmethod
    def project(self, v: Float[Tensor, "*batch P"]) -> Float[Tensor, "*batch P"]:
        """The Euclidean projection of ``v`` onto the face."""

    def contains(self, v: Float[Tensor, "*batch P"], tol: float = 1e-9) -> Bool[Tensor, "*batch"]:
        """Whether ``v`` lies within ``tol`` of the face, relative to the length of ``v`` or its
        projection.

        ``tol`` is never taken below 128 units of rounding, which a projection through an SVD may
        cost."""
        nearest = self.project(v)
        relative = max(tol, 128 * torch.finfo(v.dtype).eps)
        return lengths(v - nearest) <= relative * torch.maximum(lengths(v), lengths(nearest))


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
        return torch.maximum(c * self.low, c * self.high).sum(-1)

    def project(self, v: Tensor) -> Tensor:
        return v.clamp(self.low, self.high)


@dataclass(frozen=True)
class Simplex(Face):
    """Convex hull of ``signs[i] e_i`` over the coordinates whose sign, one of -1, 0, 1, is not
    zero."""

    signs: Tensor

    def element(self) -> Tensor:
        return self.signs / self.signs.abs().sum(-1, keepdim=True)

    def support(self, c: Tensor) -> Tensor:
        return torch.where(self.signs != 0, c * self.signs, -torch.inf).amax(-1)

    def project(self, v: Tensor) -> Tensor:
        return self.signs * onto_simplex(v * self.signs, self.signs != 0)


@dataclass(frozen=True)
class Contraction(Face):
    """``{U V^T + P C Q : ||C||_sigma <= 1}``, P and Q the projections onto the complements of U and
    V.

    ``u (*batch, m, k)`` and ``v (*batch, n, k)`` hold the singular vectors of positive singular
    values, and zero columns in place of the others, so that rows may differ in rank."""

    u: Tensor
    v: Tensor

    def element(self) -> Tensor:
        return (self.u @ self.v.mT).flatten(-2)

    def support(self, c: Tensor) -> Tensor:
        _, s, _ = svd(self._free(c))
        return dot(c, self.element()) + s.sum(-1)

    def project(self, v: Tensor) -> Tensor:
        left, s, right = svd(self._free(v))
        clipped = (left * s.clamp(max=1.0)[..., None, :]) @ right.mT
        # again free, as rounding tilts the singular vectors of values far below the largest
        return self.element() + self._free(clipped.flatten(-2)).flatten(-2)

    def _free(self, v: Tensor) -> Float[Tensor, "*batch m n"]:
        """P W Q, projected twice: once leaves a rounding error of the size of W (Parlett 1980)."""
        w = v.unflatten(-1, (self.u.shape[-2], self.v.shape[-2]))
        for _ in range(2):
            w = w - self.u @ (self.u.mT @ w)
            w = w - (w @ self.v) @ self.v.mT
        return w


@dataclass(frozen=True)
class Spectraplex(Face):
    """``{U S V^T : S positive semidefinite, tr S = 1}`` on the singular vectors in ``top (*batch,
    k)``."""

    u: Tensor
    v: Tensor
    top: Tensor

    def element(self) -> Tensor:
        weights = self.top.to(self.u) / self.top.sum(-1, keepdim=True)
        return from_svd(self.u, weights, self.v)

    def support(self, c: Tensor) -> Tensor:
        values, _ = eigh(self._core(c))
        return values.amax(-1)

    def project(self, v: Tensor) -> Tensor:
        values, basis = eigh(self._core(v))
        return from_svd(self.u @ basis, onto_simplex(values), self.v @ basis)

    def _core(self, v: Tensor) -> Float[Tensor, "*batch k k"]:
        """The symmetric part of U^T W V on the top; elsewhere an eigenvalue too low to be
        chosen."""
        w = self.u.mT @ v.unflatten(-1, (self.u.shape[-2], self.v.shape[-2])) @ self.v
        tied = self.top[..., :, None] & self.top[..., None, :]
        w = torch.where(tied, (w + w.mT) / 2, 0.0)
        # tied eigenvalues are at least -|w|, and `onto_simplex` ignores what is 1 below the largest
        low = torch.where(self.top, 0.0, -2 - 2 * lengths(w.flatten(-2))[..., None])
        return w + torch.diag_embed(low)


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
        return torch.where(self.mask[..., None], self.yes.element(), self.no.element())

    def support(self, c: Tensor) -> Tensor:
        return torch.where(self.mask, self.yes.support(c), self.no.support(c))

    def project(self, v: Tensor) -> Tensor:
        mask = self.mask[..., None]
        # the side that will be thrown away gets a zero, which costs its root finding nothing
        yes = torch.where(mask, v, 0.0)
        no = torch.where(mask, 0.0, v)
        return torch.where(mask, self.yes.project(yes), self.no.project(no))


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
        divisor = torch.where(self.scale > 0, self.scale, 1.0)[..., None]
        return self.scale[..., None] * self.face.project(v / divisor)


@dataclass(frozen=True)
class _OfBlocks(Face):
    """Faces of the blocks, which follow each other in the flat vector."""

    slices: tuple[slice, ...]
    faces: tuple[Face, ...]

    def _pairs(self, v: Tensor) -> Iterator[tuple[Face, Tensor]]:
        """Each block's face and part of v."""
        return zip(self.faces, [v[..., part] for part in self.slices], strict=True)


@dataclass(frozen=True)
class Product(_OfBlocks):
    """Each block in its own face."""

    def element(self) -> Tensor:
        return torch.cat([face.element() for face in self.faces], -1)

    def support(self, c: Tensor) -> Tensor:
        return sum((face.support(part) for face, part in self._pairs(c)), start=c.new_zeros(()))

    def project(self, v: Tensor) -> Tensor:
        return torch.cat([face.project(part) for face, part in self._pairs(v)], -1)


@dataclass(frozen=True)
class Mixture(_OfBlocks):
    """Block l in ``r_l * faces[l]``, r in the simplex of the blocks in ``tied (*batch, L)``."""

    tied: Tensor

    def element(self) -> Tensor:
        zeros = [torch.zeros_like(face.element()) for face in self.faces]
        return self.project(torch.cat(zeros, -1))

    def support(self, c: Tensor) -> Tensor:
        supports = torch.stack([face.support(part) for face, part in self._pairs(c)], -1)
        return torch.where(self.tied, supports, -torch.inf).amax(-1)

    def project(self, v: Tensor) -> Tensor:
        return onto_mixture(list(self._pairs(v)), self.tied, power=1)


def onto_mixture(
    blocks: list[tuple[Face, Tensor]], tied: Bool[Tensor, "*batch L"], *, power: int
) -> Float[Tensor, "*batch P"]:
    """The x nearest to the blocks v_l with ``x_l`` in ``r_l F_l``, ``r >= 0``, ``sum_l r_l^power =
    1``; only ``tied`` blocks have r_l > 0.

    With x_l(r) the projection of v_l onto r F_l, half the squared distance is convex in r with
    derivative -slope_l(r).  Optimal radii share a multiplier mu: slope_l(r_l) = mu r_l^(power - 1),
    or r_l = 0.  So a root for each radius sits inside a root for mu.  Where the faces are unit
    balls, v must lie outside the mixture."""
    kept = [
        _Ray(face, torch.where(tied[..., l, None], v, 0.0)) for l, (face, v) in enumerate(blocks)
    ]
    few = kept[0].few
    zero = torch.zeros_like(lengths(kept[0].v) * tied[..., 0])

    def radii(mu: Tensor) -> Float[Tensor, "*batch L"]:
        return torch.where(tied, torch.stack([ray.radius(mu, power) for ray in kept], -1), 0.0)

    def excess(mu: Tensor) -> Tensor:
        return (radii(mu) ** power).sum(-1) - 1

    at_zero = torch.stack([ray.slope(zero) for ray in kept], -1)
    low = zero
    high = lengths(at_zero)
    if power == 1:
        # at the largest slope(1) one block alone uses up sum r = 1, at the largest slope(0) every r
        # is 0
        at_one = torch.stack([ray.slope(zero + 1) for ray in kept], -1)
        low, high = (torch.where(tied, end, -torch.inf).amax(-1) for end in (at_one, at_zero))
    r = radii(find_zero(excess, low, high, xtol=few / 64, ftol=few))
    r = r / (r**power).sum(-1, keepdim=True) ** (1 / power)
    return torch.cat([ray.nearest(r[..., l]) for l, ray in enumerate(kept)], -1)


@dataclass(frozen=True)
class _Ray:
    """The multiples r F of a face, and a point v to approach."""

    face: Face
    v: Tensor

    @property
    def few(self) -> float:
        return 4 * torch.finfo(self.v.dtype).eps

    def nearest(self, r: Tensor) -> Tensor:
        """x(r), the projection of v onto r F."""
        return Scaled(r, self.face).project(self.v)

    def slope(self, r: Tensor) -> Tensor:
        """<v - x(r), x(r)> / r: how fast half the squared distance falls with r."""
        x = self.nearest(r)
        inside = dot(self.v - x, x) / torch.where(r > 0, r, 1.0)
        return torch.where(r > 0, inside, self.face.support(self.v))

    def radius(self, mu: Tensor, power: int) -> Tensor:
        """The r in [0, 1] with slope(r) = mu r^(power - 1), or the nearer end."""
        noise = self.few * lengths(self.v) * lengths(self.face.project(self.v))
        zero = torch.zeros_like(mu)
        return find_zero(
            lambda r: self.slope(r) - mu * r ** (power - 1),
            zero,
            zero + 1,
            xtol=self.few,
            ftol=noise,
        )


def onto_simplex(
    u: Float[Tensor, "*batch k"], allowed: Tensor | None = None
) -> Float[Tensor, "*batch k"]:
    """The point of the unit simplex nearest to ``u``, zero off ``allowed`` (Held, Wolfe and Crowder
    1974).

    >>> onto_simplex(torch.tensor([0.5, 0.25, -3.0]))
    tensor([0.6250, 0.3750, 0.0000])
    """
    if allowed is not None:
        u = torch.where(allowed, u, -torch.inf)
    # entries 1 or more below the largest end at zero anyway; the others lie in [-1, 0], free of
    # cancellation
    u = (u - u.amax(-1, keepdim=True)).clamp(min=-2.0)
    ordered = u.sort(-1, descending=True).values
    excess = ordered.cumsum(-1) - 1
    count = torch.arange(1, u.shape[-1] + 1, device=u.device, dtype=u.dtype)
    kept = (ordered * count > excess).sum(-1, keepdim=True).clamp(min=1)
    x = (u - excess.gather(-1, kept - 1) / kept).clamp(min=0.0)
    return x / x.sum(-1, keepdim=True)
