"""Norms composed over the blocks of flat weights, each block with a norm and a scale c_l of its
own.

norm                 dual norm                    what moves
Max over blocks      sum_l c_l ||g_l||_*          every block, each its own steepest direction
Sum over blocks      max_l c_l ||g_l||_*          the best block only
Euclidean            sqrt(sum (c_l ||g_l||_*)^2)  every block, in proportion to c_l^2 ||g_l||_*
"""

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from flowsim.layout import Block, Layout
from flowsim.norms import faces
from flowsim.norms.faces import Face
from flowsim.norms.matrix import Spectral
from flowsim.norms.norm import Norm
from flowsim.norms.vector import L2


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
        return faces.Scaled(
            g.new_full((), self.scale), self.norm._face(self.of(g), atol / self.scale)
        )

    def ball(self, v: Tensor) -> Face:
        return faces.Scaled(
            v.new_full((), self.scale), faces.WholeBall(self.norm, torch.zeros_like(self.of(v)))
        )


@dataclass(frozen=True, eq=False)
class _Blocks(Norm):
    """What the block norms share: one norm per block of a layout.

    ``parts`` maps each block's name to a norm, or is one norm used on every block; ``scales`` maps
    names to positive numbers c_l, 1 where not given.  Raises ValueError for nested block norms,
    missing or unknown names, and scales that are not positive."""

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
                raise ValueError(
                    f"got scale {scale} for block {name!r}, expected a positive number, try 1.0"
                )

    @property
    def name(self) -> str:
        if isinstance(self.parts, Norm):
            return f"{self.word}({self.parts.name})"
        return (
            f"{self.word}({','.join(f'{block}:{norm.name}' for block, norm in self.parts.items())})"
        )

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
        bound = [
            _Part(b, parts[b.name].bind(alone[b.name]), float(scales.get(b.name, 1.0)))
            for b in layout
        ]
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
    """``max_l ||W_l||_l / c_l``: every block moves at the speed its scale allows (Large et al.
    2024).

    >>> from flowsim.layout import lay_out
    >>> from flowsim.norms.vector import Linf
    >>> norm = Max({"W": Spectral(), "b": Linf()}).bind(lay_out({"W": (1, 2), "b": (2,)}))
    >>> norm.steepest(torch.tensor([3.0, 4.0, -7.0, 0.0]))
    tensor([ 0.6000,  0.8000, -1.0000,  0.0000])
    """

    word: ClassVar[str] = "max"

    def value(self, v: Tensor) -> Tensor:
        return self._values(v).amax(-1)

    def dual(self, g: Tensor) -> Tensor:
        return self._duals(g).sum(-1)

    def steepest(self, g: Tensor) -> Tensor:
        # a block with zero gradient stays, as its face is a whole ball; the others still have norm
        # 1
        return torch.cat([part.steepest(g) for part in self._each(g)], -1)

    def _nearest(self, v: Tensor) -> Tensor:
        return torch.cat([part.ball(v).project(part.of(v)) for part in self._each(v)], -1)

    def _ties_at(self, g: Tensor, atol: Tensor) -> Face:
        return faces.Product(self._slices(), tuple(part.face(g, atol) for part in self._each(g)))


@dataclass(frozen=True, eq=False)
class Sum(_Blocks):
    """``sum_l ||W_l||_l / c_l``: only the block of largest ``c_l ||g_l||_*`` moves, at a tie the
    first."""

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
        return faces.Mixture(
            self._slices(), tuple(part.face(g, atol) for part in self._each(g)), tied
        )


@dataclass(frozen=True, eq=False)
class Euclidean(_Blocks):
    """``sqrt(sum_l (||W_l||_l / c_l)^2)``: each block its own flow, at c_l^2 ||g_l||_* /
    ||g||_*."""

    word: ClassVar[str] = "euclidean"

    @property
    def ties(self) -> bool:
        return any(norm.ties for norm in self._norms())

    @property
    def quadratic(self) -> bool:  # type: ignore[override]
        return all(norm.quadratic for norm in self._norms())

    def value(self, v: Tensor) -> Tensor:
        return L2().value(self._values(v))

    def dual(self, g: Tensor) -> Tensor:
        return L2().value(self._duals(g))

    def steepest(self, g: Tensor) -> Tensor:
        share = L2().steepest(self._duals(g))
        return torch.cat(
            [share[..., i, None] * part.steepest(g) for i, part in enumerate(self._each(g))], -1
        )

    def _nearest(self, v: Tensor) -> Tensor:
        return self._mix(v, power=2)

    def _ties_at(self, g: Tensor, atol: Tensor) -> Face:
        # blocks are independent, so each judges its ties by its own share of the gradient
        share = L2().steepest(self._duals(g))
        each = [(share[..., i], part) for i, part in enumerate(self._each(g))]
        return faces.Product(
            self._slices(),
            tuple(faces.Scaled(weight, part.face(g, atol * weight)) for weight, part in each),
        )


def modular(layout: Layout, scales: Mapping[str, float] | None = None) -> Max:
    """`Max` with `Spectral` on every matrix or kernel and `L2` on every vector (Large et al. 2024),
    bound.

    >>> from flowsim.layout import lay_out
    >>> modular(lay_out({"W1": (3, 2), "b1": (3,)})).name
    'max(W1:spectral,b1:l2)'
    """
    return Max({b.name: Spectral() if len(b.shape) > 1 else L2() for b in layout}, scales).bind(
        layout
    )
