"""Norms composed over the blocks of flat weights, each block with a norm and a scale c_l of its
own.

norm                 dual norm                    what moves
Max over blocks      sum_l c_l ||g_l||_*          every block, each its own steepest direction
Sum over blocks      max_l c_l ||g_l||_*          the best block only
Euclidean            sqrt(sum (c_l ||g_l||_*)^2)  every block, in proportion to c_l^2 ||g_l||_*
"""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from flowsim.checks import is_positive
from flowsim.layout import Block, Layout
from flowsim.norms.block_faces import Mixture, Product, onto_mixture
from flowsim.norms.faces import Face, Scaled, WholeBall
from flowsim.norms.matrix import Spectral
from flowsim.norms.norm import Norm
from flowsim.norms.vector import L1, L2, Linf
from flowsim.numerics.shapes import Vectors


@dataclass(frozen=True)
class NormedBlock:
    """A block of a layout with its norm (bound to the block) and its scale: ``||W||_l / c_l``."""

    block: Block
    norm: Norm
    scale: float

    def of(self, v: Tensor) -> Tensor:
        """The block's part of flat weights, flat."""
        return v[..., self.block.slice]

    def value(self, v: Tensor) -> Tensor:
        value = self.norm.value(self.of(v))
        return value / self.scale

    def dual(self, g: Tensor) -> Tensor:
        dual = self.norm.dual(self.of(g))
        return dual * self.scale

    def steepest(self, g: Tensor) -> Tensor:
        direction = self.norm.steepest(self.of(g))
        return direction * self.scale

    def face(self, g: Tensor, atol: Tensor) -> Face:
        face = self.norm._face(self.of(g), atol / self.scale)
        return Scaled(self._scale_like(g), face)

    def ball(self, v: Tensor) -> Face:
        origin = torch.zeros_like(self.of(v))
        ball = WholeBall(self.norm, origin)
        return Scaled(self._scale_like(v), ball)

    def _scale_like(self, v: Tensor) -> Tensor:
        return v.new_full((), self.scale)


@dataclass(frozen=True, eq=False)
class _Blocks(Norm):
    """What the block norms share: one norm per block of a layout, and a vector norm ``outer`` of
    the blocks' norms.

    ``parts`` maps each block's name to a norm, or is one norm used on every block; ``scales`` maps
    names to positive numbers c_l, 1 where not given; ``blocks`` is empty until `bind`.  Raises
    ValueError for nested block norms, missing or unknown names, and scales that are not
    positive."""

    parts: Mapping[str, Norm] | Norm
    scales: Mapping[str, float] | None = None
    _: KW_ONLY
    blocks: tuple[NormedBlock, ...] = field(default=(), repr=False)

    word: ClassVar[str]
    outer: ClassVar[Norm]
    ties = True

    def __post_init__(self) -> None:
        for norm in self.norms:
            if isinstance(norm, _Blocks) or not isinstance(norm, Norm):
                raise ValueError(
                    f"got {norm!r} inside {type(self).__name__}(...), expected a norm of one "
                    "block, try L2()"
                )
        for name, scale in (self.scales or {}).items():
            if not is_positive(scale):
                raise ValueError(
                    f"got scale {scale} for block {name!r}, expected a positive number, try 1.0"
                )

    @property
    def norms(self) -> tuple[Norm, ...]:
        """The blocks' norms, or the one of all."""
        if isinstance(self.parts, Norm):
            return (self.parts,)
        return tuple(self.parts.values())

    @property
    def name(self) -> str:
        if isinstance(self.parts, Norm):
            return f"{self.word}({self.parts.name})"
        inner = [f"{block}:{norm.name}" for block, norm in self.parts.items()]
        return f"{self.word}({','.join(inner)})"

    @property
    def symbol(self) -> str:
        symbols = [norm.symbol.strip("$") for norm in self.norms]
        inner = ", ".join(dict.fromkeys(symbols))
        return rf"$\mathrm{{{self.word}}}({inner})$"

    def bind(self, layout: Layout) -> Self:
        names = [block.name for block in layout]
        parts = self.parts
        if isinstance(parts, Norm):
            parts = dict.fromkeys(names, parts)
        scales = self.scales or {}
        unknown = set(scales) - set(names)
        if set(parts) != set(names) or unknown:
            raise ValueError(
                f"got norms for {list(parts)} and scales for {list(scales)}, expected the layout's "
                f"blocks {names}, try one norm for each of them or modular(layout)"
            )

        blocks = []
        for block in layout:
            alone = replace(block, start=0)
            norm = parts[block.name].bind((alone,))
            scale = float(scales.get(block.name, 1.0))
            blocks.append(NormedBlock(block, norm, scale))
        return replace(self, blocks=tuple(blocks))

    def blocks_of(self, v: Tensor) -> tuple[NormedBlock, ...]:
        """``blocks``. Raises ValueError where the norm is not bound, or to weights other than
        v's."""
        if not self.blocks:
            raise ValueError(
                f"got the norm {self.name!r} without a layout, expected a bound norm, "
                "try norm.bind(net.layout)"
            )
        size = sum(part.block.size for part in self.blocks)
        if v.shape[-1] != size:
            raise ValueError(
                f"got {v.shape[-1]} weights for the norm {self.name!r}, expected {size} by its "
                "layout, try norm.bind(layout) with the layout of these weights"
            )
        return self.blocks

    def value(self, v: Tensor) -> Tensor:
        values = [part.value(v) for part in self.blocks_of(v)]
        return self.outer.value(torch.stack(values, -1))

    def dual(self, g: Tensor) -> Tensor:
        return self.outer.dual(self._duals(g))

    def steepest(self, g: Tensor) -> Tensor:
        moves = self._moves(g).unbind(-1)
        parts = []
        for move, part in zip(moves, self.blocks, strict=True):
            direction = part.steepest(g)
            parts.append(move[..., None] * direction)
        return torch.cat(parts, -1)

    def _duals(self, g: Tensor) -> Vectors:
        """The dual norm of each block's gradient, ``(*batch, L)``."""
        duals = [part.dual(g) for part in self.blocks_of(g)]
        return torch.stack(duals, -1)

    def _moves(self, g: Tensor) -> Vectors:
        """How far each block moves in its own norm, ``(*batch, L)``."""
        return self.outer.steepest(self._duals(g))

    def _faces(self, g: Tensor, atol: Tensor) -> tuple[Face, ...]:
        return tuple(part.face(g, atol) for part in self.blocks_of(g))

    def _onto_ball(self, v: Tensor, *, power: int) -> Tensor:
        """`_nearest` where the ball is ``sum_l r_l^power <= 1`` in the blocks' norms r_l."""
        parts = self.blocks_of(v)
        balls = [(part.ball(v), part.of(v)) for part in parts]
        every = torch.ones_like(self._duals(v), dtype=torch.bool)
        return onto_mixture(balls, every, power=power)

    def _slices(self) -> tuple[slice, ...]:
        return tuple(part.block.slice for part in self.blocks)


@dataclass(frozen=True, eq=False)
class Max(_Blocks):
    """``max_l ||W_l||_l / c_l``: every block moves at the speed its scale allows (Large et al.
    2024).

    >>> from flowsim.layout import lay_out
    >>> norm = Max({"W": Spectral(), "b": Linf()}).bind(lay_out({"W": (1, 2), "b": (2,)}))
    >>> norm.steepest(torch.tensor([3.0, 4.0, -7.0, 0.0]))
    tensor([ 0.6000,  0.8000, -1.0000,  0.0000])
    """

    word = "max"
    outer = Linf()

    def _nearest(self, v: Tensor) -> Tensor:
        nearest = []
        for part in self.blocks_of(v):
            ball = part.ball(v)
            nearest.append(ball.project(part.of(v)))
        return torch.cat(nearest, -1)

    def _ties_at(self, g: Tensor, atol: Tensor) -> Face:
        return Product(self._slices(), self._faces(g, atol))


@dataclass(frozen=True, eq=False)
class Sum(_Blocks):
    """``sum_l ||W_l||_l / c_l``: only the block of largest ``c_l ||g_l||_*`` moves, at a tie the
    first."""

    word = "sum"
    outer = L1()

    def _nearest(self, v: Tensor) -> Tensor:
        return self._onto_ball(v, power=1)

    def _ties_at(self, g: Tensor, atol: Tensor) -> Face:
        duals = self._duals(g)
        least = self.outer.dual(duals) - atol
        tied = duals >= least[..., None]
        return Mixture(self._slices(), self._faces(g, atol), tied)


@dataclass(frozen=True, eq=False)
class Euclidean(_Blocks):
    """``sqrt(sum_l (||W_l||_l / c_l)^2)``: each block its own flow, at c_l^2 ||g_l||_* /
    ||g||_*."""

    word = "euclidean"
    outer = L2()

    @property
    def ties(self) -> bool:  # type: ignore[override]
        return any(norm.ties for norm in self.norms)

    @property
    def quadratic(self) -> bool:  # type: ignore[override]
        return all(norm.quadratic for norm in self.norms)

    def _nearest(self, v: Tensor) -> Tensor:
        return self._onto_ball(v, power=2)

    def _ties_at(self, g: Tensor, atol: Tensor) -> Face:
        # blocks are independent, so each judges its ties by how far it moves
        moves = self._moves(g).unbind(-1)
        faces = []
        for move, part in zip(moves, self.blocks, strict=True):
            face = part.face(g, atol * move)
            faces.append(Scaled(move, face))
        return Product(self._slices(), tuple(faces))


def modular(layout: Layout, scales: Mapping[str, float] | None = None) -> Max:
    """`Max` with `Spectral` on every matrix or kernel and `L2` on every vector (Large et al. 2024),
    bound.

    >>> from flowsim.layout import lay_out
    >>> modular(lay_out({"W1": (3, 2), "b1": (3,)})).name
    'max(W1:spectral,b1:l2)'
    """
    norms: dict[str, Norm] = {}
    for block in layout:
        vector = len(block.shape) < 2
        norms[block.name] = L2() if vector else Spectral()
    return Max(norms, scales).bind(layout)
