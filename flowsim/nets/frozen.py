"""Nets with some of their blocks held fixed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from flowsim.layout import Block, Layout, lay_out
from flowsim.nets.net import Net, Pullback, measured_degree


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
        blocks = {block.name: block for block in self.net.layout}
        for name, value in self.values.items():
            if name not in blocks:
                raise ValueError(f"Frozen: got block {name!r}, expected one of {list(blocks)}")
            _require_value(blocks[name], value)
        if len(self.values) == len(blocks):
            raise ValueError("Frozen: every block is frozen, so there is nothing to train")

    @cached_property
    def layout(self) -> Layout:  # type: ignore[override]
        return lay_out({b.name: b.shape for b in self.net.layout if b.name not in self.values})

    @property
    def kinks(self) -> bool:  # type: ignore[override]
        return self.net.kinks

    def _value(self, block: Block, w: Tensor) -> Tensor:
        """The frozen block of each trajectory, flat."""
        value = self.values[block.name].to(w)
        if value.ndim == len(block.shape):
            return value.flatten().expand(len(w), -1)
        if len(value) != len(w):
            raise ValueError(
                f"Frozen: got {len(value)} {block.name} and {len(w)} trajectories, expected one "
                "for each"
            )
        return value.flatten(1)

    def _full(self, w: Tensor) -> Tensor:
        """All the net's weights."""
        return self._joined(w, lambda block: self._value(block, w))

    def _tangent(self, v: Tensor) -> Tensor:
        """A direction of all the net's weights, in which frozen blocks stay."""
        return self._joined(v, lambda block: v.new_zeros(len(v), block.size))

    def _joined(self, w: Tensor, frozen: Callable[[Block], Tensor]) -> Tensor:
        free = {block.name: w[:, block.slice] for block in self.layout}
        parts = [
            free[block.name] if block.name in free else frozen(block) for block in self.net.layout
        ]
        return torch.cat(parts, 1)

    def _free(self, g: Tensor) -> Tensor:
        return torch.cat([g[:, b.slice] for b in self.net.layout if b.name not in self.values], 1)

    def outputs(self, w: Tensor, x: Tensor) -> Tensor:
        return self.net.outputs(self._full(w), x)

    def linearize(self, w: Tensor, x: Tensor) -> tuple[Tensor, Pullback]:
        outputs, pull = self.net.linearize(self._full(w), x)
        return outputs, lambda c: self._free(pull(c))

    def pushforward(self, w: Tensor, x: Tensor, v: Tensor) -> Tensor:
        return self.net.pushforward(self._full(w), x, self._tangent(v))

    def measured(self, x: Tensor) -> Self:
        net = replace(self, net=self.net.measured(x))
        first = net.select(torch.zeros(2, dtype=torch.long))
        return replace(net, degree=measured_degree(first, x, declared=self.degree))

    def select(self, rows: Tensor) -> Self:
        axes = {block.name: len(block.shape) for block in self.net.layout}
        values = {
            name: value if value.ndim == axes[name] else value[rows]
            for name, value in self.values.items()
        }
        return replace(self, net=self.net.select(rows), values=values)


def _require_value(block: Block, value: Any) -> None:
    if not isinstance(value, Tensor) or not torch.isfinite(value).all():
        raise ValueError(
            f"Frozen: got {block.name} = {value!r}, expected a tensor of finite numbers"
        )
    shape = tuple(value.shape)
    axes = len(block.shape)
    if shape[-axes:] != block.shape or len(shape) > axes + 1:
        raise ValueError(
            f"Frozen: {block.name} has shape {shape}, expected {block.shape}, or one such array "
            "for each trajectory"
        )
