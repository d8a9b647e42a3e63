"""Polyhedral unit balls and their faces, by the corners in use.

The ball is ‖v‖ = max over groups g of Σ_{k∈g} |v_k|/c_k: ℓ∞ has a group for each weight, ℓ1 a
single group, and a maximum over blocks of both the groups of its blocks. A steepest direction of h
puts, in each group, a mixture on the corners ±c_k e_k where c_k|h_k| is largest."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray as Array
from scipy.linalg import block_diag

from flowsim.norms.blocks import Max, Sum
from flowsim.norms.norm import Norm
from flowsim.norms.vector import L1, Linf

PerWeight = Float[Array, " P"]  # one number for each weight
PerCorner = Float[Array, "2 P"]  # for each corner +c_k e_k, and then for each −c_k e_k
_Codes = Int[Array, " P"]

REST = 2  # the code of a weight in a group whose gradient is zero


def is_polyhedral(norm: Norm) -> bool:
    """Whether the (bound) norm's ball has the form of `Polyhedral`."""
    if isinstance(norm, Max):
        return all(isinstance(part.norm, L1 | Linf) for part in norm.blocks)
    if isinstance(norm, Sum):
        return all(isinstance(part.norm, L1) for part in norm.blocks)
    return isinstance(norm, L1 | Linf)


@dataclass(frozen=True)
class Polyhedral:
    """‖v‖ = max_g Σ_{k∈g} |v_k|/c_k: the group of each weight, in increasing order, and its scale
    c."""

    group: _Codes
    scale: PerWeight

    @staticmethod
    def of(norm: Norm, size: int) -> "Polyhedral":
        """The ball of a norm on ``size`` weights."""
        if isinstance(norm, Linf):
            each = np.arange(size)
            return Polyhedral(each, np.ones(size))
        if isinstance(norm, L1):
            one = np.zeros(size, dtype=np.int64)
            return Polyhedral(one, np.ones(size))
        if isinstance(norm, Max | Sum) and is_polyhedral(norm):
            return Polyhedral._joined(norm)
        raise ValueError(
            f"ExactPieces: got the norm {norm.name}, expected ℓ1, ℓ∞, a Max over blocks of both or "
            "a Sum over blocks of ℓ1, try SmallStep for the small-step path"
        )

    @staticmethod
    def _joined(norm: Max | Sum) -> "Polyhedral":
        group = []
        scale = []
        first = 0
        for part in norm.blocks:
            ball = Polyhedral.of(part.norm, part.block.size)
            group.append(ball.group + first)
            scale.append(ball.scale * part.scale)
            first += len(ball.starts) * isinstance(norm, Max)
        return Polyhedral(np.concatenate(group), np.concatenate(scale))

    @cached_property
    def starts(self) -> Int[Array, " G"]:
        begins = np.diff(self.group, prepend=-1)
        return np.flatnonzero(begins)

    def sums(self, a: PerWeight) -> Float[Array, " G"]:
        return np.add.reduceat(a, self.starts)

    def dual(self, h: PerWeight) -> float:
        """‖h‖_*."""
        slopes = self.scale * np.abs(h)
        steepest = np.maximum.reduceat(slopes, self.starts)
        return float(steepest.sum())

    def values(self, v: PerWeight) -> Float[Array, " G"]:
        """Σ_{k∈g} |v_k|/c_k."""
        shares = np.abs(v) / self.scale
        return self.sums(shares)

    def value(self, v: PerWeight) -> float:
        """‖v‖."""
        return float(self.values(v).max())

    def spare(self, v: PerWeight) -> PerWeight:
        """How far the group of each weight is inside its ball."""
        spare = 1 - self.values(v)
        return spare[self.group]


@dataclass(frozen=True)
class Corners:
    """A face by its corners in use, with a code for each weight: the sign of its corner, 0 idle, or
    `REST`.

    Coordinates y along the face: each weight at rest, and for a group that shares its motion among
    m > 1 corners m − 1 orthonormal combinations of the shares whose sum is zero."""

    ball: Polyhedral
    code: _Codes

    @staticmethod
    def of(ball: Polyhedral, used: Bool[Array, "2 P"]) -> "Corners":
        """A group at rest is one that uses both corners of a weight."""
        plus, minus = used.astype(np.int64)
        both = ball.sums(plus * minus)
        rest = both[ball.group] > 0
        code = np.where(rest, REST, plus - minus)
        return Corners(ball, code)

    @staticmethod
    def steepest(ball: Polyhedral, h: PerWeight) -> "Corners":
        """The first of the steepest corners of each group."""
        falling = -ball.scale * np.abs(h)
        steepest_first = np.lexsort((falling, ball.group))
        leaders = steepest_first[ball.starts]
        sign = np.where(h < 0, -1, 1)
        code = np.zeros_like(sign)
        code[leaders] = sign[leaders]
        return Corners(ball, code)

    @cached_property
    def used(self) -> Bool[Array, "2 P"]:
        """The corners whose slopes are equal; at rest all of the group's."""
        rest = self.code == REST
        plus = self.code == 1
        minus = self.code == -1
        return rest | np.stack([plus, minus])

    @cached_property
    def moving(self) -> Bool[Array, " P"]:
        return np.abs(self.code) == 1

    @cached_property
    def sharing(self) -> _Codes:
        """How many corners share the motion of each weight's group; 0 at rest."""
        moving = self.moving.astype(np.int64)
        number = self.ball.sums(moving)
        return number[self.ball.group]

    @property
    def several(self) -> Bool[Array, " P"]:
        """Weights whose corners are not their group's only ones."""
        return self.moving & (self.sharing > 1)

    @cached_property
    def centre(self) -> PerWeight:
        corner = self.code * self.ball.scale
        mean = corner / np.maximum(self.sharing, 1)
        return np.where(self.moving, mean, 0.0)

    # --- coordinates along the face ---------------------------------------------------------------

    @cached_property
    def _parts(self) -> list[Int[Array, " m"]]:
        """The weights at rest, then those of each group with several corners."""
        rest = np.flatnonzero(self.code == REST)
        shared = np.flatnonzero(self.several)
        if not len(shared):
            return [rest]
        group = self.ball.group[shared]
        ends = np.flatnonzero(np.diff(group)) + 1
        return [rest, *np.split(shared, ends)]

    @cached_property
    def free(self) -> Int[Array, " m"]:
        """All weights whose velocity the face leaves open."""
        return np.concatenate(self._parts)

    @cached_property
    def basis(self) -> Float[Array, "m k"]:
        """E, on the free weights: velocities E y leave the slopes of all corners in use equal."""
        rest, *shared = map(len, self._parts)
        blocks = block_diag(np.eye(rest), *map(_without_sum, shared))
        sign = np.where(self.moving, self.code, 1)
        corner = sign * self.ball.scale
        return corner[self.free, None] * blocks

    def restrict(self, a: PerWeight) -> Float[Array, " k"]:
        """Eᵀ a: derivatives along the weights become derivatives along y."""
        return a[self.free] @ self.basis

    def expand(self, y: Float[Array, " k"]) -> PerWeight:
        """E y."""
        v = np.zeros(len(self.code))
        v[self.free] = self.basis @ y
        return v

    def sizes(self, size: Float[Array, " m"]) -> Float[Array, " k"]:
        """Of derivatives along y, from those of derivatives along the free weights."""
        scaled = size * self.ball.scale[self.free]
        enters = self.basis != 0
        sizes = scaled[:, None] * enters
        return sizes.max(0, initial=0.0)

    # --- where the face ends ----------------------------------------------------------------------

    def missing(self, slope: PerWeight) -> PerCorner:
        """By how much each corner misses the slope of those in use; infinite for these."""
        ball = self.ball
        slope = ball.scale * slope
        in_use = np.where(self.moving, self.code * slope, 0.0)
        total = ball.sums(in_use)
        mean = total[ball.group] / np.maximum(self.sharing, 1)
        missing = np.stack([mean - slope, mean + slope])
        return np.where(self.used, np.inf, missing)

    def shares(self, u: PerWeight) -> PerWeight:
        """The share of each corner that is one of several, or at rest how far the group is inside
        its ball."""
        ball = self.ball
        share = self.code * u / ball.scale
        share = np.where(self.several, share, np.inf)
        rest = self.code == REST
        return np.where(rest, ball.spare(u), share)

    def mixture(self, u: PerWeight) -> PerCorner:
        """Shares of the corners that make u; a group inside its ball has two opposite ones."""
        ball = self.ball
        share = u / ball.scale
        spare = ball.spare(u)[ball.starts]
        opposite = np.zeros(len(u))
        opposite[ball.starts] = np.maximum(spare, 0) / 2
        opposite[self.code != REST] = 0
        shares = np.stack([share, -share])
        mixed = np.maximum(shares, 0) + opposite
        return np.where(self.used, mixed, 0.0)

    def trimmed(self, u: PerWeight, noise: float) -> "Corners":
        """The face without corners whose shares in u are negative, and with groups that u takes out
        of their ball in motion."""
        beyond = self.shares(u) < -noise
        sign = np.sign(u).astype(np.int64)
        kept = np.where(self.code == REST, sign, 0)
        code = np.where(beyond, kept, self.code)
        return Corners(self.ball, code)


def _without_sum(m: int) -> Float[Array, "m m-1"]:
    """Orthonormal vectors whose sums are zero: the Householder reflection that exchanges (1, …,
    1)/√m and the first unit vector, without its first column."""
    v = np.full(m, m**-0.5)
    v[0] -= 1
    twice = 2 / (v @ v)
    reflection = np.eye(m) - np.outer(v, v) * twice
    return reflection[:, 1:]
