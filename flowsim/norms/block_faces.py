"""Faces of several blocks: each block in its own face, or a mixture of them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from flowsim.norms.faces import Face, Scaled
from flowsim.numerics.batched import dot
from flowsim.numerics.roots import find_zero
from flowsim.numerics.scaling import lengths, nonzero
from flowsim.numerics.shapes import PerVector, Vectors


@dataclass(frozen=True)
class _OfBlocks(Face):
    """Faces of the blocks, which follow each other in the flat vector."""

    slices: tuple[slice, ...]
    faces: tuple[Face, ...]

    def _pairs(self, v: Tensor) -> Iterator[tuple[Face, Tensor]]:
        """Each block's face and part of v."""
        parts = [v[..., part] for part in self.slices]
        return zip(self.faces, parts, strict=True)

    def _elements(self) -> Vectors:
        elements = [face.element() for face in self.faces]
        return torch.cat(elements, -1)

    def _supports(self, c: Tensor) -> Vectors:
        """Each block's support, ``(*batch, L)``."""
        supports = [face.support(part) for face, part in self._pairs(c)]
        return torch.stack(supports, -1)


@dataclass(frozen=True)
class Product(_OfBlocks):
    """Each block in its own face."""

    def element(self) -> Tensor:
        return self._elements()

    def support(self, c: Tensor) -> Tensor:
        return self._supports(c).sum(-1)

    def project(self, v: Tensor) -> Tensor:
        nearest = [face.project(part) for face, part in self._pairs(v)]
        return torch.cat(nearest, -1)


@dataclass(frozen=True)
class Mixture(_OfBlocks):
    """Block l in ``r_l * faces[l]``, r in the simplex of the blocks in ``tied (*batch, L)``."""

    tied: Tensor

    def element(self) -> Tensor:
        origin = torch.zeros_like(self._elements())
        return self.project(origin)

    def support(self, c: Tensor) -> Tensor:
        return _largest(self._supports(c), self.tied)

    def project(self, v: Tensor) -> Tensor:
        blocks = list(self._pairs(v))
        return onto_mixture(blocks, self.tied, power=1)


def onto_mixture(
    blocks: list[tuple[Face, Tensor]], tied: Bool[Tensor, "*batch L"], *, power: int
) -> Vectors:
    """The x nearest to the blocks v_l with ``x_l`` in ``r_l F_l``, ``r >= 0``, ``sum_l r_l^power =
    1``; only ``tied`` blocks have r_l > 0.

    With x_l(r) the projection of v_l onto r F_l, half the squared distance is convex in r with
    derivative -slope_l(r).  Optimal radii share a multiplier mu: slope_l(r_l) = mu r_l^(power - 1),
    or r_l = 0.  So a root for each radius sits inside a root for mu.  Where the faces are unit
    balls, v must lie outside the mixture."""
    rays = []
    for (face, v), kept in zip(blocks, tied.unbind(-1), strict=True):
        v = torch.where(kept[..., None], v, 0.0)
        rays.append(_Ray(face, v))
    mixture = _Rays(rays, tied, power)

    def excess(mu: Tensor) -> Tensor:
        powers = mixture.radii(mu) ** power
        return powers.sum(-1) - 1

    few = rays[0].few
    low, high = mixture.ends()
    mu = find_zero(excess, low, high, xtol=few / 64, ftol=few)
    r = mixture.radii(mu)
    total = (r**power).sum(-1, keepdim=True)
    return mixture.nearest(r / total ** (1 / power))


@dataclass(frozen=True)
class _Rays:
    """One ray for each block, of which only those of ``tied (*batch, L)`` blocks are left."""

    rays: list["_Ray"]
    tied: Tensor
    power: int

    def radii(self, mu: Tensor) -> Vectors:
        """r_l(mu) ``(*batch, L)``."""
        radii = [ray.radius(mu, self.power) for ray in self.rays]
        every = torch.stack(radii, -1)
        return torch.where(self.tied, every, 0.0)

    def nearest(self, r: Tensor) -> Vectors:
        """x(r), flat."""
        pairs = zip(self.rays, r.unbind(-1), strict=True)
        parts = [ray.nearest(radius) for ray, radius in pairs]
        return torch.cat(parts, -1)

    def ends(self) -> tuple[PerVector, PerVector]:
        """Multipliers at which the radii are too large, and too small."""
        first = lengths(self.rays[0].v)
        zero = torch.zeros_like(first * self.tied[..., 0])
        at_zero = self._slopes(zero)
        if self.power > 1:
            return zero, lengths(at_zero)
        # at the largest slope(1) one block alone uses up sum r = 1, at the largest slope(0) every r
        # is 0
        at_one = self._slopes(zero + 1)
        return _largest(at_one, self.tied), _largest(at_zero, self.tied)

    def _slopes(self, r: Tensor) -> Vectors:
        slopes = [ray.slope(r) for ray in self.rays]
        return torch.stack(slopes, -1)


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
        at_zero = self.face.support(self.v)
        inside = dot(self.v - x, x) / nonzero(r)
        return torch.where(r > 0, inside, at_zero)

    def radius(self, mu: Tensor, power: int) -> Tensor:
        """The r in [0, 1] with slope(r) = mu r^(power - 1), or the nearer end."""

        def excess(r: Tensor) -> Tensor:
            return self.slope(r) - mu * r ** (power - 1)

        longest = lengths(self.face.project(self.v))
        noise = self.few * lengths(self.v) * longest
        zero = torch.zeros_like(mu)
        return find_zero(excess, zero, zero + 1, xtol=self.few, ftol=noise)


def _largest(values: Tensor, tied: Tensor) -> PerVector:
    """The largest of the tied blocks' values."""
    return torch.where(tied, values, -torch.inf).amax(-1)
