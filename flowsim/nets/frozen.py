"""TODO."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from flowsim.layout import Block, Layout, lay_out
from flowsim.nets.net import Net, Pullback, _confirmed, measure_degree


@dataclass(frozen=True)
class Frozen(Net):
    """A net with some blocks held fixed, ``Frozen(net, {"W2": values})``: only the others are
    weights.

    A value has the block's shape, or a leading axis with one array for each trajectory.
    """

    net: Net
    values: Mapping[str, Tensor]
    degree: float | None = None

    def __post_init__(self) -> None:
        shapes = {block.name: block.shape for block in self.net.layout}
        for name, value in self.values.items():
            if name not in shapes:
                raise ValueError(f"Frozen: got block {name!r}, expected one of {list(shapes)}")
            if not isinstance(value, Tensor) or not torch.isfinite(value).all():
                raise ValueError(
                    f"Frozen: got {name} = {value!r}, expected a tensor of finite numbers"
                )
            if (
                tuple(value.shape)[-len(shapes[name]) :] != shapes[name]
                or value.ndim > len(shapes[name]) + 1
            ):
                raise ValueError(
                    f"Frozen: {name} has shape {tuple(value.shape)}, expected {shapes[name]}, or one such array for "
                    "each trajectory"
                )
        if len(self.values) == len(shapes):
            raise ValueError("Frozen: every block is frozen, so there is nothing to train")

    @cached_property
    def layout(self) -> Layout:  # type: ignore[override]
        return lay_out({b.name: b.shape for b in self.net.layout if b.name not in self.values})

    @property
    def kinks(self) -> bool:  # type: ignore[override]
        return self.net.kinks

    def _frozen(self) -> list[tuple[Block, Tensor, bool]]:
        """The frozen blocks, their values, and whether each trajectory has its own."""
        blocks = [block for block in self.net.layout if block.name in self.values]
        return [(b, self.values[b.name], self.values[b.name].ndim > len(b.shape)) for b in blocks]

    def _full(self, w: Tensor, *, frozen: bool = True) -> Tensor:
        """All the net's weights; the frozen blocks are their values, or zeros for a tangent."""
        free = {block.name: w[:, block.slice] for block in self.layout}
        parts = []
        for block in self.net.layout:
            if block.name in free:
                parts.append(free[block.name])
            elif frozen:
                value = self.values[block.name].to(w)
                own = value.ndim > len(block.shape)
                if own and len(value) != len(w):
                    raise ValueError(
                        f"Frozen: got {len(value)} {block.name} and {len(w)} trajectories, expected one for each"
                    )
                parts.append(value.flatten(1) if own else value.flatten().expand(w.shape[0], -1))
            else:
                parts.append(w.new_zeros(w.shape[0], block.size))
        return torch.cat(parts, 1)

    def _free(self, g: Tensor) -> Tensor:
        return torch.cat([g[:, b.slice] for b in self.net.layout if b.name not in self.values], 1)

    def outputs(self, w: Tensor, x: Tensor) -> Tensor:
        return self.net.outputs(self._full(w), x)

    def linearize(self, w: Tensor, x: Tensor) -> tuple[Tensor, Pullback]:
        outputs, pull = self.net.linearize(self._full(w), x)
        return outputs, lambda c: self._free(pull(c))

    def pushforward(self, w: Tensor, x: Tensor, v: Tensor) -> Tensor:
        return self.net.pushforward(self._full(w), x, self._full(v, frozen=False))

    def measured(self, x: Tensor) -> Self:
        net = self.net.measured(x)
        values = {block.name: value[0] if own else value for block, value, own in self._frozen()}
        single = replace(self, net=net, values=values)
        degree = measure_degree(single, (x[0] if x.ndim == 3 else x)[:8].to(torch.float64))
        return replace(self, net=net, degree=_confirmed(self.degree, degree))

    def select(self, rows: Tensor) -> Self:
        values = {block.name: value[rows] if own else value for block, value, own in self._frozen()}
        return replace(self, net=self.net.select(rows), values=values)
