"""Names, places and shapes of the blocks inside a flat weight vector."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor


@dataclass(frozen=True)
class Block:
    """One named array inside the flat weights: ``w[..., block.slice]`` reshaped to
    ``block.shape``."""

    name: str
    start: int
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def slice(self) -> slice:
        return slice(self.start, self.start + self.size)

    def of(self, w: Tensor) -> Tensor:
        """The block of flat weights ``(..., P)``, as a view of shape ``(..., *shape)``."""
        return w[..., self.slice].reshape(*w.shape[:-1], *self.shape)


Layout: TypeAlias = tuple[Block, ...]


def lay_out(shapes: Mapping[str, tuple[int, ...]]) -> Layout:
    """Blocks laid one after the other.

    >>> [(b.name, b.start, b.shape) for b in lay_out({"W1": (3, 2), "W2": (1, 3)})]
    [('W1', 0, (3, 2)), ('W2', 6, (1, 3))]
    """
    blocks: list[Block] = []
    start = 0
    for name, shape in shapes.items():
        blocks.append(Block(name, start, tuple(shape)))
        start += blocks[-1].size
    return tuple(blocks)
