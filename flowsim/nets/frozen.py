"""Nets with some of their blocks held fixed."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import torch
from jaxtyping import Int
from torch import Tensor

from flowsim.layout import Block, Layout, lay_out
from flowsim.nets.net import Net, Pullback, measured_degree


@dataclass(frozen=True)
class Frozen(Net):
    """A net with some blocks held fixed, ``Frozen(net, {"W2": values})``: only the others are
    weights.

    A value has the block's shape, or a leading axis with one array for each trajectory."""

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
        return lay_out({block.name: block.shape for block in self._trained})

    @property
    def _trained(self) -> list[Block]:
        """The net's own blocks that are not frozen."""
        return [block for block in self.net.layout if block.name not in self.values]

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

    @cached_property
    def _places(self) -> Int[Tensor, " P"]:
        """Where the weights lie among all of the net's."""
        every = torch.arange(self.net.size)
        return torch.cat([every[block.slice] for block in self._trained])

    def _full(self, w: Tensor) -> Tensor:
        """All the net's weights."""
        full = self._tangent(w)
        for block in self.net.layout:
            if block.name in self.values:
                full[:, block.slice] = self._value(block, w)
        return full

    def _tangent(self, v: Tensor) -> Tensor:
        """A direction of all the net's weights, in which frozen blocks stay."""
        full = v.new_zeros(len(v), self.net.size)
        full[:, self._places] = v
        return full

    def _free(self, g: Tensor) -> Tensor:
        return g[:, self._places]

    def outputs(self, w: Tensor, x: Tensor) -> Tensor:
        return self.net.outputs(self._full(w), x)

    def linearize(self, w: Tensor, x: Tensor) -> tuple[Tensor, Pullback]:
        outputs, pull = self.net.linearize(self._full(w), x)

        def pull_free(c: Tensor) -> Tensor:
            return self._free(pull(c))

        return outputs, pull_free

    def pushforward(self, w: Tensor, x: Tensor, v: Tensor) -> Tensor:
        full = self._full(w)
        return self.net.pushforward(full, x, self._tangent(v))

    def measured(self, x: Tensor) -> Self:
        net = replace(self, net=self.net.measured(x))
        rows = torch.zeros(2, dtype=torch.long)
        first = net.select(rows)
        degree = measured_degree(first, x, declared=self.degree)
        return replace(net, degree=degree)

    def select(self, rows: Tensor) -> Self:
        net = self.net.select(rows)
        values = dict(self.values)
        for block in net.layout:
            value = values.get(block.name)
            if value is not None and value.ndim > len(block.shape):
                values[block.name] = value[rows]
        return replace(self, net=net, values=values)


def _require_value(block: Block, value: Any) -> None:
    if not isinstance(value, Tensor) or not torch.isfinite(value).all():
        raise ValueError(
            f"Frozen: got {block.name} = {value!r}, expected a tensor of finite numbers"
        )
    shape = tuple(value.shape)
    several = shape[1:] == block.shape
    if shape != block.shape and not several:
        raise ValueError(
            f"Frozen: {block.name} has shape {shape}, expected {block.shape}, or one such array "
            "for each trajectory"
        )
