"""Polyhedral unit balls and their faces, by the corners in use.

The ball is ‖v‖ = max over groups g of Σ_{k∈g} |v_k|/c_k: ℓ∞ has a group for each weight, ℓ1 a
single group, and a maximum over blocks of both the groups of its blocks. A steepest direction of h
puts, in each group, a mixture on the corners ±c_k e_k where c_k|h_k| is largest."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray as Array

from flowsim.norms.blocks import Max, Sum
from flowsim.norms.norm import Norm
from flowsim.norms.vector import L1, Linf

EPS = float(np.finfo(np.float64).eps)


REST = 2  # the code of a weight in a group whose gradient is zero; 0 is idle, ±1 moves in its corner's direction


def follows(norm: Norm) -> bool:
    """Whether the (bound) norm's ball has the form of `Polyhedral`."""
    if isinstance(norm, Max | Sum):
        return all(
            isinstance(part.norm, L1 | Linf if isinstance(norm, Max) else L1)
            for part in norm._bound
        )
    return isinstance(norm, L1 | Linf)


@dataclass(frozen=True)
class Polyhedral:
    """‖v‖ = max_g Σ_{k∈g} |v_k|/c_k: the group of each weight, in increasing order, and its scale
    c."""

    group: Int[Array, " P"]
    scale: Float[Array, " P"]

    @staticmethod
    def of(norm: Norm, size: int) -> "Polyhedral":
        """The ball of a norm on ``size`` weights."""
        if isinstance(norm, Linf):
            return Polyhedral(np.arange(size), np.ones(size))
        if isinstance(norm, L1):
            return Polyhedral(np.zeros(size, dtype=np.int64), np.ones(size))
        parts = norm._bound if isinstance(norm, Max | Sum) else ()
        if not parts or not all(
            isinstance(p.norm, L1 | Linf if isinstance(norm, Max) else L1) for p in parts
        ):
            raise ValueError(
                f"ExactPieces: got the norm {norm.name}, expected ℓ1, ℓ∞, a Max over blocks of both or a Sum over "
                "blocks of ℓ1, try SmallStep for the small-step path"
            )
        balls = [Polyhedral.of(part.norm, part.block.size) for part in parts]
        apart = np.cumsum([0, *(b.group[-1] + 1 for b in balls)]) * isinstance(norm, Max)
        group = np.concatenate([b.group + first for b, first in zip(balls, apart, strict=False)])
        return Polyhedral(
            group, np.concatenate([b.scale * p.scale for b, p in zip(balls, parts, strict=True)])
        )

    @cached_property
    def starts(self) -> Int[Array, " G"]:
        return np.flatnonzero(np.diff(self.group, prepend=-1))

    def sums(self, a: Float[Array, " P"]) -> Float[Array, " G"]:
        return np.add.reduceat(a, self.starts)

    def dual(self, h: Float[Array, " P"]) -> float:
        return float(np.maximum.reduceat(self.scale * np.abs(h), self.starts).sum())

    def value(self, v: Float[Array, " P"]) -> float:
        return float(self.sums(np.abs(v) / self.scale).max())


@dataclass(frozen=True)
class Corners:
    """The corners in use, by a code for each weight: sign of its corner, 0 idle, or `REST`.

    Coordinates y along the face: each weight at rest, and for a group that shares its motion among
    m > 1 corners m − 1 orthonormal combinations of the shares whose sum is zero."""

    ball: Polyhedral
    code: Int[Array, " P"]

    @cached_property
    def moving(self) -> Bool[Array, " P"]:
        return np.abs(self.code) == 1

    @cached_property
    def corners(self) -> Int[Array, " P"]:
        """How many corners share the motion of each weight's group; 0 at rest."""
        return self.ball.sums(self.moving.astype(np.int64))[self.ball.group]

    @cached_property
    def centre(self) -> Float[Array, " P"]:
        return np.where(self.moving, self.code * self.ball.scale / np.maximum(self.corners, 1), 0.0)

    @cached_property
    def _parts(self) -> list[Int[Array, " m"]]:
        """The weights at rest, then those of each group with several corners."""
        shared = np.flatnonzero(self.moving & (self.corners > 1))
        ends = np.flatnonzero(np.diff(self.ball.group[shared])) + 1
        return [np.flatnonzero(self.code == REST), *(np.split(shared, ends) if len(shared) else [])]

    @cached_property
    def free(self) -> Int[Array, " m"]:
        """All weights whose velocity the face leaves open, in the order of `restrict`."""
        return np.concatenate(self._parts)

    @cached_property
    def _weight(self) -> Float[Array, " m"]:
        return np.where(self.moving, self.code, 1)[self.free] * self.ball.scale[self.free]

    def restrict(self, a: Float[Array, "*rows m"]) -> Float[Array, "*rows k"]:
        """Eᵀ, on the free entries: derivatives along the weights become derivatives along y."""
        ends = np.cumsum([len(part) for part in self._parts])[:-1]
        rest, *shared = np.split(a * self._weight, ends, axis=-1)
        return np.concatenate([rest, *(_reflect(part)[..., 1:] for part in shared)], axis=-1)

    def sizes(self, size: Float[Array, " m"]) -> Float[Array, " k"]:
        """Of derivatives along y, from those of derivatives along the weights."""
        ends = np.cumsum([len(part) for part in self._parts])[:-1]
        rest, *shared = np.split(size * self.ball.scale[self.free], ends)
        return np.concatenate([rest, *(np.full(len(part) - 1, part.max()) for part in shared)])

    def expand(self, y: Float[Array, " k"]) -> Float[Array, " P"]:
        """E y."""
        ends = np.cumsum([len(self._parts[0]), *(len(part) - 1 for part in self._parts[1:])])[:-1]
        rest, *shared = np.split(y, ends)
        v = np.zeros(len(self.code))
        v[self.free] = self._weight * np.concatenate(
            [rest, *(_reflect(np.append(0.0, part)) for part in shared)]
        )
        return v

    def missing(self, slope: Float[Array, " P"]) -> Float[Array, "2 P"]:
        """By how much each corner +c_k e_k, and −c_k e_k, misses the slope of those in use;
        infinite for these."""
        slope = self.ball.scale * slope
        top = self.ball.sums(np.where(self.moving, self.code * slope, 0.0))[self.ball.group]
        top = top / np.maximum(self.corners, 1)
        plus, minus = self.in_use
        return np.stack([np.where(plus, np.inf, top - slope), np.where(minus, np.inf, top + slope)])

    def shares(self, u: Float[Array, " P"]) -> Float[Array, " P"]:
        """The share of each corner that is one of several, or at rest how far the group is inside
        its ball."""
        room = (1 - self.ball.sums(np.abs(u) / self.ball.scale))[self.ball.group]
        share = np.where(self.moving & (self.corners > 1), self.code * u / self.ball.scale, np.inf)
        return np.where(self.code == REST, room, share)

    def mixture(self, u: Float[Array, " P"]) -> Float[Array, "2 P"]:
        """Shares of the corners +c_k e_k and −c_k e_k that make u; a group inside its ball has two
        opposite ones."""
        share = u / self.ball.scale
        spare = np.zeros(len(u))
        spare[self.ball.starts] = np.maximum(1 - self.ball.sums(np.abs(share)), 0) / 2
        spare[self.code != REST] = 0
        return np.where(self.in_use, np.maximum(np.stack([share, -share]), 0) + spare, 0.0)

    def trimmed(self, u: Float[Array, " P"], noise: float) -> "Corners":
        """The face without corners whose shares in u are negative, and with groups that u takes out
        of their ball in motion."""
        beyond = self.shares(u) < -noise
        sign = np.sign(u).astype(np.int64)
        return Corners(self.ball, np.where(beyond, np.where(self.code == REST, sign, 0), self.code))

    @cached_property
    def in_use(self) -> Bool[Array, "2 P"]:
        """The corners +c_k e_k and −c_k e_k whose slopes are equal; at rest all of the group's."""
        return np.stack([(self.code == REST) | (self.code == sign) for sign in (1, -1)])


def _reflect(a: Float[Array, "*rows m"]) -> Float[Array, "*rows m"]:
    """The Householder reflection that exchanges (1, …, 1)/√m and the first unit vector."""
    v = np.full(a.shape[-1], a.shape[-1] ** -0.5)
    v[0] -= 1
    return a - (a @ v)[..., None] * (2 / (v @ v) * v)
