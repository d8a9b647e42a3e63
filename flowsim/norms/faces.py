r"""The set of steepest directions at a tie.

A norm's unit ball has flat parts, and a gradient ``g`` may be perpendicular to one of them.  Then
every point of

    F(g) = argmax { <g, v> : ||v|| <= 1 }

is a steepest direction: a face of the ball.  A flow that slides along a tie needs the whole face,
because its velocity is the point of F that minimises the quadratic form of the loss' curvature
(`Face.minimise`).

Rows of a batch may be tied in different ways, so ties are masks and never lists.  From plain to
composed:

    Point         smooth norms
    Box           l-infinity: signs, free where the gradient is zero
    Simplex       l1: signed corners of the tied coordinates
    Contraction   spectral norm: the polar factor, plus a contraction on the null spaces
    Spectraplex   nuclear norm: a density matrix between the top singular spaces
    Ball          the whole unit ball, where the gradient is zero
    Either        one face or another, row by row
    Scaled        a multiple of a face
    Product       block by block
    Hull          a mixture of blocks
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from flowsim.numerics.roots import root


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
        size = torch.maximum(_length(v), _length(nearest))
        return _length(v - nearest) <= max(tol, 128 * torch.finfo(v.dtype).eps) * size

    def minimise(
        self,
        hvp: Callable[[Tensor], Tensor],
        *,
        start: Float[Tensor, "*batch P"] | None = None,
        tol: float = 1e-10,
        max_steps: int = 2000,
    ) -> Float[Tensor, "*batch P"]:
        """A point of the face where ``v^T H v / 2`` is least; H positive semidefinite, ``hvp(v) = H
        v``.

        Accelerated projected gradient (Beck and Teboulle 2009) with restart (O'Donoghue and Candes
        2015). The step 1/L starts from the curvature along the first projected step and L doubles
        where the quadratic bound fails, so curvature off the face does not slow it.  One ``hvp``
        per step, called with the batch's shape.

        A row stops when a step moves it by at most ``tol`` (not below 8 units of rounding) times
        its length; its distance to the minimiser is then about ``tol`` times the condition number
        of H along the face. After ``max_steps`` the point of smallest such residual is returned.
        Rows never influence each other. Where H is singular along the face the minimiser is not
        unique; starting from `element` (the default) leaves at zero the coordinates that H does not
        see."""
        v = self.element() if start is None else self.project(start)
        tol = max(tol, 8 * torch.finfo(v.dtype).eps)
        search = _Search.begin(self, hvp, v)
        for _ in range(max_steps):
            search = search.step(self, hvp, tol)
            if bool(search.done.all()):
                break
        return search.best


@dataclass(frozen=True)
class _Search:
    """Where `Face.minimise` stands, row by row; ``y`` extrapolates ``v``, and H v and H y come
    along."""

    v: Tensor
    hv: Tensor
    y: Tensor
    hy: Tensor
    lipschitz: Tensor
    momentum: Tensor
    best: Tensor
    residual: Tensor
    size: Tensor
    done: Tensor

    @staticmethod
    def begin(face: Face, hvp: Callable[[Tensor], Tensor], v: Tensor) -> "_Search":
        hv = hvp(v)
        # two tries at a step about as long as v: most of hv may point off the face
        step = _ratio(_length(v), _length(hv))[..., None]
        step = step * _ratio(_length(v), _length(face.project(v - step * hv) - v))[..., None]
        d = face.project(v - step * hv) - v
        along = torch.maximum(_dot(d, hvp(v + d) - hv), 1e-3 * _dot(d, hv).abs())
        lipschitz = _ratio(along, _dot(d, d))
        # d = 0 means that v is optimal already, and any positive number will do
        lipschitz = torch.where(lipschitz > 0, lipschitz, 1.0)
        one, never = torch.ones_like(lipschitz), torch.zeros_like(lipschitz, dtype=torch.bool)
        return _Search(
            v, hv, v, hv, lipschitz, one, v, torch.full_like(one, torch.inf), _length(v), never
        )

    def step(self, face: Face, hvp: Callable[[Tensor], Tensor], tol: float) -> "_Search":
        new = face.project(self.y - self.hy / self.lipschitz[..., None])
        hnew = hvp(new)
        d = new - self.y
        too_long = _dot(d, hnew - self.hy) > self.lipschitz * _dot(d, d) * (1 + 1e-6)
        moves = ~self.done & ~too_long
        residual = _length(d)
        # written so that a NaN, which no further step can mend, counts as done
        done = self.done | (moves & ~(residual > tol * torch.maximum(self.size, _length(new))))
        better = moves & ~(residual >= self.residual)

        restart = _dot(-d, new - self.v) > 0
        momentum = torch.where(restart, 1.0, (1 + (1 + 4 * self.momentum**2).sqrt()) / 2)
        carry = torch.where(restart, 0.0, (self.momentum - 1) / momentum)[..., None]

        def pick(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
            return torch.where(mask[..., None], yes, no)

        return _Search(
            v=pick(moves, new, self.v),
            hv=pick(moves, hnew, self.hv),
            y=pick(moves, new + carry * (new - self.v), self.y),
            hy=pick(moves, hnew + carry * (hnew - self.hv), self.hy),
            lipschitz=torch.where(too_long & ~self.done, 2 * self.lipschitz, self.lipschitz),
            momentum=torch.where(moves, momentum, self.momentum),
            best=pick(better, new, self.best),
            residual=torch.where(better, residual, self.residual),
            size=self.size,
            done=done,
        )


@dataclass(frozen=True)
class Single(Face):
    """One direction, ``(*batch, P)``."""

    at: Tensor

    def element(self) -> Tensor:
        return self.at

    def support(self, c: Tensor) -> Tensor:
        return _dot(c, self.at)

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
        return self.signs * simplex(v * self.signs, self.signs != 0)


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
        return _dot(c, self.element()) + singular(self._free(c))[1].sum(-1)

    def project(self, v: Tensor) -> Tensor:
        left, s, right = singular(self._free(v))
        clipped = (left * s.clamp(max=1.0)[..., None, :]) @ right.mT
        # again free, as rounding tilts the singular vectors of values far below the largest
        return self.element() + self._free(clipped.flatten(-2)).flatten(-2)

    def _free(self, v: Tensor) -> Tensor:
        w = v.unflatten(-1, (self.u.shape[-2], self.v.shape[-2]))
        for _ in range(
            2
        ):  # once leaves a rounding error of the size of v; twice is enough (Parlett 1980)
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
        weight = self.top.to(self.u) / self.top.sum(-1, keepdim=True)
        return ((self.u * weight[..., None, :]) @ self.v.mT).flatten(-2)

    def support(self, c: Tensor) -> Tensor:
        return _eigen(self._core(c))[0].amax(-1)

    def project(self, v: Tensor) -> Tensor:
        weight, q = _eigen(self._core(v))
        return (((self.u @ q) * simplex(weight)[..., None, :]) @ (self.v @ q).mT).flatten(-2)

    def _core(self, v: Tensor) -> Tensor:
        """The symmetric part of U^T W V on the top; elsewhere an eigenvalue too low to be
        chosen."""
        w = self.u.mT @ v.unflatten(-1, (self.u.shape[-2], self.v.shape[-2])) @ self.v
        tied = self.top[..., :, None] & self.top[..., None, :]
        w = torch.where(tied, (w + w.mT) / 2, 0.0)
        # every tied eigenvalue is at least -|w|, and `simplex` ignores what is 1 below the largest
        low = torch.where(self.top, 0.0, -2 - 2 * _length(w.flatten(-2))[..., None])
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
        yes, no = torch.where(mask, v, 0.0), torch.where(mask, 0.0, v)
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
class Product(Face):
    """``v[slice_l]`` in ``faces[l]``, each block on its own; the slices follow each other."""

    slices: tuple[slice, ...]
    faces: tuple[Face, ...]

    def element(self) -> Tensor:
        return torch.cat([face.element() for face in self.faces], -1)

    def support(self, c: Tensor) -> Tensor:
        return sum((f.support(c[..., s]) for s, f in self._pairs()), start=c.new_zeros(()))

    def project(self, v: Tensor) -> Tensor:
        return torch.cat([f.project(v[..., s]) for s, f in self._pairs()], -1)

    def _pairs(self) -> zip:
        return zip(self.slices, self.faces, strict=True)


@dataclass(frozen=True)
class Mixture(Face):
    """``v[slice_l]`` in ``r_l * faces[l]``, r in the simplex of the blocks in ``tied (*batch,
    L)``."""

    slices: tuple[slice, ...]
    faces: tuple[Face, ...]
    tied: Tensor

    def element(self) -> Tensor:
        return self.project(
            torch.cat([torch.zeros_like(face.element()) for face in self.faces], -1)
        )

    def support(self, c: Tensor) -> Tensor:
        supports = [f.support(c[..., s]) for s, f in zip(self.slices, self.faces, strict=True)]
        return torch.where(self.tied, torch.stack(supports, -1), -torch.inf).amax(-1)

    def project(self, v: Tensor) -> Tensor:
        return mix([v[..., s] for s in self.slices], self.faces, self.tied, power=1)


def mix(
    blocks: Sequence[Tensor], faces: Sequence[Face], tied: Bool[Tensor, "*batch L"], *, power: int
) -> Float[Tensor, "*batch P"]:
    """The x nearest to ``blocks`` with ``x_l`` in ``r_l faces[l]``, ``r >= 0``, ``sum_l r_l^power =
    1``.

    Only ``tied`` blocks have r_l > 0.  With x_l(r) the projection of v_l onto r F_l, half the
    squared distance is convex in r with derivative -slope_l(r), slope_l(r) = <v_l - x_l, x_l> / r.
    Optimal radii share a multiplier mu: slope_l(r_l) = mu r_l^(power - 1), or r_l = 0.  So a root
    for each radius sits inside a root for mu.  Where the faces are unit balls, v must lie outside
    the mixture."""

    def slope(v: Tensor, face: Face, r: Tensor) -> Tensor:
        inside = _dot(v - (x := Scaled(r, face).project(v)), x) / torch.where(r > 0, r, 1.0)
        return torch.where(r > 0, inside, face.support(v))

    few = 4 * torch.finfo(blocks[0].dtype).eps
    kept = [torch.where(tied[..., i, None], v, 0.0) for i, v in enumerate(blocks)]
    pairs = list(zip(kept, faces, strict=True))
    zero = torch.zeros_like(_length(blocks[0]) * tied[..., 0])

    def radius(v: Tensor, face: Face, mu: Tensor) -> Tensor:
        noise = few * _length(v) * _length(face.project(v))
        return root(
            lambda r: slope(v, face, r) - mu * r ** (power - 1),
            zero,
            zero + 1,
            xtol=few,
            ftol=noise,
        )

    def radii(mu: Tensor) -> Tensor:
        return torch.where(tied, torch.stack([radius(v, f, mu) for v, f in pairs], -1), 0.0)

    at_zero = torch.stack([slope(v, f, zero) for v, f in pairs], -1)
    if power == 1:
        # at the largest slope(1) one block alone uses up sum r = 1, at the largest slope(0) every r
        # is 0
        at_one = torch.stack([slope(v, f, zero + 1) for v, f in pairs], -1)
        low = torch.where(tied, at_one, -torch.inf).amax(-1)
        high = torch.where(tied, at_zero, -torch.inf).amax(-1)
    else:
        low, high = zero, _length(at_zero)
    r = radii(root(lambda mu: (radii(mu) ** power).sum(-1) - 1, low, high, xtol=few / 64, ftol=few))
    r = r / (r**power).sum(-1, keepdim=True) ** (1 / power)
    return torch.cat([Scaled(r[..., i], f).project(v) for i, (v, f) in enumerate(pairs)], -1)


def simplex(
    u: Float[Tensor, "*batch k"], allowed: Tensor | None = None
) -> Float[Tensor, "*batch k"]:
    """The point of the unit simplex nearest to ``u``, zero off ``allowed`` (Held, Wolfe and Crowder
    1974).

    >>> simplex(torch.tensor([0.5, 0.25, -3.0]))
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


def singular(w: Float[Tensor, "*batch m n"]) -> tuple[Tensor, Tensor, Tensor]:
    """``u (*batch, m, k)``, ``s (*batch, k)``, ``v (*batch, n, k)`` with ``w = u diag(s) v^T``.

    NaN where w is not finite: LAPACK refuses a whole batch for one row that is not finite, hence
    the detour."""
    fine = torch.isfinite(w).all(-1).all(-1)
    u, s, vt = torch.linalg.svd(torch.where(fine[..., None, None], w, 0.0), full_matrices=False)
    bad = torch.where(fine, 0.0, torch.nan).to(w.dtype)
    return u + bad[..., None, None], s + bad[..., None], vt.mT + bad[..., None, None]


def _eigen(w: Tensor) -> tuple[Tensor, Tensor]:
    fine = torch.isfinite(w).all(-1).all(-1)
    values, vectors = torch.linalg.eigh(torch.where(fine[..., None, None], w, 0.0))
    return values + torch.where(fine, 0.0, torch.nan).to(w.dtype)[..., None], vectors


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)


def _length(a: Tensor) -> Tensor:
    return torch.linalg.vector_norm(a, dim=-1)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b > 0, a / torch.where(b > 0, b, 1.0), 0.0)
