r"""Norms on flat weights and their dual maps: which way is steepest.

A norm answers, for a gradient or ascent direction ``g`` with any leading batch dimensions,

    value(v)      ||v||
    dual(g)       ||g||_* = max { <g, v> : ||v|| <= 1 }
    steepest(g)   one v with ||v|| = 1 and <g, v> = ||g||_*, zero where g is zero
    face(g)       all of them
    project(v)    the nearest point of the unit ball

Steepest *ascent* of g is meant; a flow that descends a loss passes ``g = -grad``.  The norm is the one in
which the *weights* move, so sign descent belongs to `Linf` and coordinate descent to `L1`.

    norm                 dual norm                    steepest direction, up to normalisation
    L1                   l-infinity                   the largest coordinate
    L2, Frobenius        l2                           g
    Linf                 l1                           sign(g)
    Lp(p)                lq, 1/p + 1/q = 1            sign(g) |g|^(q-1)
    Mahalanobis(A)       sqrt(g^T A^-1 g)             A^-1 g
    Spectral             nuclear                      U V^T
    Nuclear              spectral                     u_1 v_1^T
    Schatten(p)          Schatten(q)                  U diag(s^(q-1)) V^T
    Max over blocks      sum_l c_l ||g_l||_*          every block, each its own steepest direction
    Sum over blocks      max_l c_l ||g_l||_*          the best block only
    Euclidean            sqrt(sum (c_l ||g_l||_*)^2)  every block, in proportion to c_l^2 ||g_l||_*

Inputs are divided by their largest entry first, so gradients of any representable size are alike.
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor

from flowsim import faces
from flowsim.faces import Face
from flowsim.layout import Block, Layout


class Norm(ABC):
    """A norm on flat weights ``(*batch, P)``.

    A new norm defines the abstract members and, if it has ties, `_ties_at`.
    """

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
        return re.sub(r"\bl(?=\d|inf\b)", "ℓ", self.name).replace("ℓinf", "ℓ∞")

    @property
    @abstractmethod
    def ties(self) -> bool:
        """Whether some ``g != 0`` has several steepest directions."""

    @abstractmethod
    def value(self, v: Float[Tensor, "*batch P"]) -> Float[Tensor, "*batch"]:
        """``||v||``."""

    @abstractmethod
    def dual(self, g: Float[Tensor, "*batch P"]) -> Float[Tensor, "*batch"]:
        """``max <g, v>`` over ``||v|| <= 1``."""

    @abstractmethod
    def steepest(self, g: Float[Tensor, "*batch P"]) -> Float[Tensor, "*batch P"]:
        """One v with ``||v|| = 1`` and ``<g, v> = dual(g)``, deterministic at a tie; zero where g is zero."""

    @abstractmethod
    def _nearest(self, v: Tensor) -> Tensor:
        """`project` for v outside the unit ball; anything at v = 0."""

    def bind(self, layout: Layout) -> Self:
        """The norm with the shapes of ``layout``; itself where it needs none."""
        return self

    def project(self, v: Float[Tensor, "*batch P"]) -> Float[Tensor, "*batch P"]:
        """The point of the unit ball nearest to v in the Euclidean sense; v itself inside, up to rounding."""
        inside = (self.value(v) <= 1 + 16 * torch.finfo(v.dtype).eps)[..., None]
        return torch.where(inside, v, self._nearest(torch.where(inside, 0.0, v)))

    def face(self, g: Float[Tensor, "*batch P"], tol: float = 1e-9) -> Face:
        """All steepest directions, where differences up to ``tol * dual(g)`` count as ties.

        ``tol`` is never taken below 8 units of rounding; singular values also tie within max(m, n) units.
        Where g is zero the face is the whole unit ball.
        """
        return self._face(g, max(tol, 8 * torch.finfo(g.dtype).eps) * self.dual(g))

    def _face(self, g: Tensor, atol: Tensor) -> Face:
        """`face` with an absolute tolerance ``(*batch)``, which blocks inherit from the whole gradient."""
        zero, face = self.dual(g) <= atol, self._ties_at(g, atol)
        return faces.Either(zero, faces.Ball(self, torch.zeros_like(g)), face) if bool(zero.any()) else face

    def _ties_at(self, g: Tensor, atol: Tensor) -> Face:
        """The face on rows where ``dual(g) > atol``; anything on the others."""
        return faces.Point(self.steepest(g))


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
    """``max |v_i|``: sign descent, the limit of Adam.  `steepest` takes sign(0) = 0.

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

    def value(self, v: Tensor) -> Tensor:
        u, size = _scaled(v)
        return size * torch.linalg.vector_norm(u, dim=-1)

    def dual(self, g: Tensor) -> Tensor:
        return self.value(g)

    def steepest(self, g: Tensor) -> Tensor:
        u, _ = _scaled(g)
        return u / _nonzero(torch.linalg.vector_norm(u, dim=-1, keepdim=True))

    def _nearest(self, v: Tensor) -> Tensor:
        return self.steepest(v)


@dataclass(frozen=True)
class Frobenius(L2):
    """`L2` on the entries of a matrix, under its usual name there."""

    name = "frobenius"
    symbol = r"$\|\cdot\|_F$"


@dataclass(frozen=True)
class Lp(Norm):
    """``(sum |v_i|^p)^(1/p)``, 1 < p < infinity; v_i = sign(g_i) (|g_i| / ||g||_q)^(q-1), 1/p + 1/q = 1.

    Raises ValueError for other p.  For p > 2 the dual map is only Hoelder continuous, with exponent q - 1,
    where a coordinate of g vanishes.
    """

    p: float

    def __post_init__(self) -> None:
        _check_exponent(self.p, "L1() or Linf()")

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
    def q(self) -> float:
        """The dual exponent p/(p-1)."""
        return self.p / (self.p - 1)

    def value(self, v: Tensor) -> Tensor:
        return _power_norm(v, self.p)

    def dual(self, g: Tensor) -> Tensor:
        return _power_norm(g, self.q)

    def steepest(self, g: Tensor) -> Tensor:
        u, _ = _scaled(g)
        return u.sign() * (u.abs() / _nonzero(_power_norm(u, self.q))[..., None]) ** (self.q - 1)

    def _nearest(self, v: Tensor) -> Tensor:
        # x + lam x^(p-1) = |v|; the residual lam x^(p-1) has dual norm lam on the sphere, hence the bracket.
        # The reciprocal of ||x|| is nearly linear in lam, which the root finder likes.
        low, high = torch.zeros_like(self.dual(v)), self.dual(v)
        lam = faces.root(lambda lam: 1 - 1 / self.value(_shrink(v.abs(), lam[..., None], self.p)), low, high)
        return v.sign() * _shrink(v.abs(), lam[..., None], self.p)


@dataclass(frozen=True, eq=False)
class Mahalanobis(Norm):
    """``sqrt(v^T A v)``, A positive definite: a dense ``(P, P)`` matrix or a diagonal ``(P,)``; v ~ A^-1 g.

    Raises ValueError where the matrix is not finite, symmetric and positive definite beyond rounding.

    >>> Mahalanobis(torch.tensor([4.0, 1.0])).steepest(torch.tensor([4.0, 0.0]))
    tensor([0.5000, 0.0000])
    """

    matrix: Tensor
    _eigenvalues: Tensor = field(init=False, repr=False)
    _basis: Tensor | None = field(init=False, repr=False)

    name = "mahalanobis"
    symbol = r"$\|\cdot\|_A$"
    ties = False

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
        # x = (I + lam A)^-1 v; the residual lam A x has dual norm lam on the sphere, hence the bracket
        u, roots = self._rotate(v), self._roots(v)
        low, high = torch.zeros_like(self.dual(v)), self.dual(v)

        def shrunk(lam: Tensor) -> Tensor:
            return u / (1 + lam[..., None] * roots**2)

        return self._back(shrunk(faces.root(lambda lam: 1 - 1 / L2().value(roots * shrunk(lam)), low, high)))

    def _roots(self, v: Tensor) -> Tensor:
        return self._eigenvalues.to(v).sqrt()

    def _rotate(self, v: Tensor) -> Tensor:
        return v if self._basis is None else v @ self._basis.to(v)

    def _back(self, u: Tensor) -> Tensor:
        return u if self._basis is None else u @ self._basis.to(u).mT


@dataclass(frozen=True)
class _Singular(Norm):
    """A vector norm ``inner`` of the singular values of one ``(m, n)`` matrix (von Neumann 1937).

    G = U diag(s) V^T has steepest direction U diag(inner.steepest(s)) V^T and likewise for projections.
    Singular values below max(m, n) eps s_1 count as zero.
    """

    _: KW_ONLY
    shape: tuple[int, int] | None = None

    @property
    @abstractmethod
    def inner(self) -> Norm:
        """The vector norm of the singular values."""

    @property
    def ties(self) -> bool:
        return self.inner.ties

    def bind(self, layout: Layout) -> Self:
        """The norm on the one matrix of ``layout``; kernels with more dimensions become (out, rest)."""
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
        u, size = _scaled(v)
        fine = torch.isfinite(u).all(-1)
        s = torch.linalg.svdvals(self._matrix(torch.where(fine[..., None], u, 0.0)))
        return torch.where(fine[..., None], s, torch.nan), size

    def _svd(self, g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """u, s, v and the rounding error of s, for g over its largest entry; s within rounding of 0 is 0."""
        u, s, v = faces.singular(self._matrix(_scaled(g)[0]))
        rounding = max(u.shape[-2], v.shape[-2]) * torch.finfo(s.dtype).eps * s.amax(-1, keepdim=True)
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
        positive = (s > (atol / _nonzero(_scaled(g)[1]))[..., None])[..., None, :]
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
        gap = torch.maximum((atol / _nonzero(_scaled(g)[1]))[..., None], rounding)
        return faces.Spectraplex(u, v, s >= s.amax(-1, keepdim=True) - gap)


@dataclass(frozen=True)
class Schatten(_Singular):
    """The l_p norm of the singular values, 1 < p < infinity."""

    p: float

    def __post_init__(self) -> None:
        _check_exponent(self.p, "Nuclear() or Spectral()")

    @property
    def name(self) -> str:
        return f"schatten{self.p:g}"

    @property
    def symbol(self) -> str:
        return rf"$S_{{{self.p:g}}}$"

    @property
    def inner(self) -> Norm:
        return Lp(self.p)


@dataclass(frozen=True)
class _Part:
    """A block of a layout with its norm (bound to the block) and its scale: ``||W||_l / c_l``."""

    block: Block
    norm: Norm
    scale: float

    def of(self, v: Tensor) -> Tensor:
        return v[..., self.block.slice]

    def value(self, v: Tensor) -> Tensor:
        return self.norm.value(self.of(v)) / self.scale

    def dual(self, g: Tensor) -> Tensor:
        return self.norm.dual(self.of(g)) * self.scale

    def steepest(self, g: Tensor) -> Tensor:
        return self.norm.steepest(self.of(g)) * self.scale

    def face(self, g: Tensor, atol: Tensor) -> Face:
        return faces.Scaled(g.new_full((), self.scale), self.norm._face(self.of(g), atol / self.scale))

    def ball(self, v: Tensor) -> Face:
        return faces.Scaled(v.new_full((), self.scale), faces.Ball(self.norm, torch.zeros_like(self.of(v))))


@dataclass(frozen=True, eq=False)
class _Blocks(Norm):
    """What the block norms share: one norm per block of a layout.

    ``parts`` maps each block's name to a norm, or is one norm used on every block; ``scales`` maps names to
    positive numbers c_l, 1 where not given.  Raises ValueError for nested block norms, missing or unknown
    names, and scales that are not positive.
    """

    parts: Mapping[str, Norm] | Norm
    scales: Mapping[str, float] | None = None
    _: KW_ONLY
    _bound: tuple[_Part, ...] = field(default=(), repr=False)

    word: ClassVar[str]

    def __post_init__(self) -> None:
        for norm in self._norms():
            if isinstance(norm, _Blocks) or not isinstance(norm, Norm):
                raise ValueError(
                    f"got {norm!r} inside {type(self).__name__}(...), expected a norm of one block, try L2()"
                )
        for name, scale in (self.scales or {}).items():
            if not 0 < scale < math.inf:
                raise ValueError(f"got scale {scale} for block {name!r}, expected a positive number, try 1.0")

    @property
    def name(self) -> str:
        if isinstance(self.parts, Norm):
            return f"{self.word}({self.parts.name})"
        return f"{self.word}({','.join(f'{block}:{norm.name}' for block, norm in self.parts.items())})"

    @property
    def symbol(self) -> str:
        inner = dict.fromkeys(norm.symbol.strip("$") for norm in self._norms())
        return rf"$\mathrm{{{self.word}}}({', '.join(inner)})$"

    @property
    def ties(self) -> bool:
        return True

    def bind(self, layout: Layout) -> Self:
        names = [block.name for block in layout]
        parts = dict.fromkeys(names, self.parts) if isinstance(self.parts, Norm) else self.parts
        scales = self.scales or {}
        if set(parts) != set(names) or not set(scales) <= set(names):
            raise ValueError(
                f"got norms for {list(parts)} and scales for {list(scales)}, expected the layout's blocks "
                f"{names}, try one norm for each of them or modular(layout)"
            )
        alone = {block.name: (Block(block.name, 0, block.shape),) for block in layout}
        bound = [_Part(b, parts[b.name].bind(alone[b.name]), float(scales.get(b.name, 1.0))) for b in layout]
        return replace(self, _bound=tuple(bound))

    def _norms(self) -> list[Norm]:
        return [self.parts] if isinstance(self.parts, Norm) else list(self.parts.values())

    def _each(self, v: Tensor) -> tuple[_Part, ...]:
        if not self._bound:
            raise ValueError(
                f"got the norm {self.name!r} without a layout, expected a bound norm, try norm.bind(net.layout)"
            )
        if v.shape[-1] != (size := sum(part.block.size for part in self._bound)):
            raise ValueError(
                f"got {v.shape[-1]} weights for the norm {self.name!r}, expected {size} by its layout, "
                "try norm.bind(layout) with the layout of these weights"
            )
        return self._bound

    def _slices(self) -> tuple[slice, ...]:
        return tuple(part.block.slice for part in self._bound)

    def _values(self, v: Tensor) -> Tensor:
        return torch.stack([part.value(v) for part in self._each(v)], -1)

    def _duals(self, g: Tensor) -> Tensor:
        return torch.stack([part.dual(g) for part in self._each(g)], -1)

    def _mix(self, v: Tensor, power: int) -> Tensor:
        balls = [part.ball(v) for part in self._each(v)]
        tied = torch.ones_like(self._values(v), dtype=torch.bool)
        return faces.mix([part.of(v) for part in self._each(v)], balls, tied, power=power)


@dataclass(frozen=True, eq=False)
class Max(_Blocks):
    """``max_l ||W_l||_l / c_l``: every block moves at the speed its scale allows (Large et al. 2024).

    >>> from flowsim.layout import layout
    >>> norm = Max({"W": Spectral(), "b": Linf()}).bind(layout({"W": (1, 2), "b": (2,)}))
    >>> norm.steepest(torch.tensor([3.0, 4.0, -7.0, 0.0]))
    tensor([ 0.6000,  0.8000, -1.0000,  0.0000])
    """

    word: ClassVar[str] = "max"

    def value(self, v: Tensor) -> Tensor:
        return self._values(v).amax(-1)

    def dual(self, g: Tensor) -> Tensor:
        return self._duals(g).sum(-1)

    def steepest(self, g: Tensor) -> Tensor:
        # a block with zero gradient stays, as its face is a whole ball; the others still have norm 1
        return torch.cat([part.steepest(g) for part in self._each(g)], -1)

    def _nearest(self, v: Tensor) -> Tensor:
        return torch.cat([part.ball(v).project(part.of(v)) for part in self._each(v)], -1)

    def _ties_at(self, g: Tensor, atol: Tensor) -> Face:
        return faces.Product(self._slices(), tuple(part.face(g, atol) for part in self._each(g)))


@dataclass(frozen=True, eq=False)
class Sum(_Blocks):
    """``sum_l ||W_l||_l / c_l``: only the block of largest ``c_l ||g_l||_*`` moves, at a tie the first."""

    word: ClassVar[str] = "sum"

    def value(self, v: Tensor) -> Tensor:
        return self._values(v).sum(-1)

    def dual(self, g: Tensor) -> Tensor:
        return self._duals(g).amax(-1)

    def steepest(self, g: Tensor) -> Tensor:
        first = self._duals(g).argmax(-1, keepdim=True)
        parts = enumerate(self._each(g))
        return torch.cat([torch.where(first == i, part.steepest(g), 0.0) for i, part in parts], -1)

    def _nearest(self, v: Tensor) -> Tensor:
        return self._mix(v, power=1)

    def _ties_at(self, g: Tensor, atol: Tensor) -> Face:
        tied = self._duals(g) >= (self.dual(g) - atol)[..., None]
        return faces.Hull(self._slices(), tuple(part.face(g, atol) for part in self._each(g)), tied)


@dataclass(frozen=True, eq=False)
class Euclidean(_Blocks):
    """``sqrt(sum_l (||W_l||_l / c_l)^2)``: each block its own flow, at c_l^2 ||g_l||_* / ||g||_*."""

    word: ClassVar[str] = "euclidean"

    @property
    def ties(self) -> bool:
        return any(norm.ties for norm in self._norms())

    def value(self, v: Tensor) -> Tensor:
        return L2().value(self._values(v))

    def dual(self, g: Tensor) -> Tensor:
        return L2().value(self._duals(g))

    def steepest(self, g: Tensor) -> Tensor:
        share = L2().steepest(self._duals(g))
        return torch.cat([share[..., i, None] * part.steepest(g) for i, part in enumerate(self._each(g))], -1)

    def _nearest(self, v: Tensor) -> Tensor:
        return self._mix(v, power=2)

    def _ties_at(self, g: Tensor, atol: Tensor) -> Face:
        # blocks are independent, so each judges its ties by its own share of the gradient
        share = L2().steepest(self._duals(g))
        each = [(share[..., i], part) for i, part in enumerate(self._each(g))]
        return faces.Product(
            self._slices(), tuple(faces.Scaled(weight, part.face(g, atol * weight)) for weight, part in each)
        )


def modular(layout: Layout, scales: Mapping[str, float] | None = None) -> Max:
    """`Max` with `Spectral` on every matrix or kernel and `L2` on every vector (Large et al. 2024), bound.

    >>> from flowsim.layout import layout
    >>> modular(layout({"W1": (3, 2), "b1": (3,)})).name
    'max(W1:spectral,b1:l2)'
    """
    return Max({b.name: Spectral() if len(b.shape) > 1 else L2() for b in layout}, scales).bind(layout)


def _scaled(v: Tensor) -> tuple[Tensor, Tensor]:
    """``v`` divided by its largest entry, and that entry ``(*batch)``; zero rows stay zero."""
    size = v.abs().amax(-1)
    return v / _nonzero(size)[..., None], size


def _nonzero(a: Tensor) -> Tensor:
    return torch.where(a == 0, 1.0, a)


def _sign(g: Tensor) -> Tensor:
    """The sign, and NaN where g is not finite (torch gives the sign 0 to NaN)."""
    return g.sign() + (g - g)


def _power_norm(v: Tensor, p: float) -> Tensor:
    u, size = _scaled(v)
    return size * (u.abs() ** p).sum(-1) ** (1 / p)


def _shrink(a: Tensor, lam: Tensor, p: float) -> Tensor:
    """``x >= 0`` with ``x + lam x^(p-1) = a`` for nonnegative ``a`` and ``lam``.

    Convex in x for p > 2 and in z = x^(p-1) otherwise, so Newton's method descends from the upper bound that
    either term alone gives, at most a factor 2 above in value.
    """
    linear, power, e = (1.0, lam, p - 1) if p > 2 else (lam, torch.ones_like(lam), 1 / (p - 1))
    b = power ** (1 / e)
    z = torch.minimum(a / linear, a ** (1 / e) / b)
    for _ in range(8):
        bent = (b * z) ** e  # at most a, so nothing overflows
        z = z * (a + (e - 1) * bent) / (linear * z + e * bent)
    return torch.where(a == 0, 0.0, z if p > 2 else z**e)


def _assemble(u: Tensor, s: Tensor, v: Tensor) -> Tensor:
    return ((u * s[..., None, :]) @ v.mT).flatten(-2)


def _check_exponent(p: float, ends: str) -> None:
    if not 1 < p < math.inf:
        raise ValueError(f"got p = {p}, expected 1 < p < infinity, try {ends} for the ends")


def _spectrum(matrix: Tensor) -> tuple[Tensor, Tensor | None]:
    """Eigenvalues and eigenvectors of a positive definite matrix; None for the eigenvectors of a diagonal."""

    def refuse(got: str, expected: str, attempt: str) -> None:
        raise ValueError(f"got a matrix {got}, expected {expected}, try {attempt}")

    if matrix.ndim not in (1, 2) or matrix.shape[0] != matrix.shape[-1]:
        refuse(f"of shape {tuple(matrix.shape)}", "a diagonal (P,) or a square (P, P)", "torch.ones(P)")
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
