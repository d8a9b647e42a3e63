"""TODO."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from flowsim.kernels import reference as kernels
from flowsim.kernels.reference import Activation
from flowsim.layout import Layout, lay_out
from flowsim.nets.activations import identity, relu
from flowsim.nets.net import Net, Pullback


@dataclass(frozen=True)
class MLP(Net):
    """Bias-free feed-forward net W_L φ(… φ(W_1 x)): ``widths`` = [inputs, hidden …, outputs],
    blocks W1 … WL.

    Degree: each layer adds 1 and each activation multiplies by its own degree, so L for (leaky)
    ReLU and identity.

    >>> net = MLP([64, 128, 1], activation=relu)
    >>> net.size, net.degree
    (8320, 2)
    """

    widths: Sequence[int]
    activation: Activation = relu

    def __post_init__(self) -> None:
        widths = tuple(self.widths)
        if len(widths) < 2 or not all(isinstance(n, int) and n > 0 for n in widths):
            raise ValueError(
                f"MLP: got widths {list(widths)}, expected at least two positive integers, try [64, 128, 1]"
            )
        if not isinstance(self.activation, Activation):
            raise TypeError(
                f"MLP: got activation {self.activation!r}, expected one of flowsim's, try flowsim.relu"
            )
        object.__setattr__(self, "widths", widths)

    @cached_property
    def layout(self) -> Layout:  # type: ignore[override]
        pairs = zip(self.widths[1:], self.widths[:-1], strict=True)
        return lay_out({f"W{l}": shape for l, shape in enumerate(pairs, 1)})

    @property
    def degree(self) -> int:  # type: ignore[override]
        degree = 1
        for _ in self.widths[2:]:
            degree = self.activation.degree * degree + 1
        return degree

    @property
    def kinks(self) -> bool:  # type: ignore[override]
        return self.activation.kinked and len(self.widths) > 2

    @property
    def linear(self) -> bool:  # type: ignore[override]
        return len(self.widths) == 2

    def weights(self, w: Tensor) -> list[Tensor]:
        """The layers' matrices ``(B, n_l, n_{l-1})``, as views of the flat weights."""
        return [block.of(w) for block in self.layout]

    def _tape(self, w: Tensor, x: Tensor) -> tuple[Tensor, kernels.Tape]:
        return kernels.forward(self.weights(w), x, self.activation)

    def outputs(self, w: Tensor, x: Tensor) -> Tensor:
        return self._tape(w, x)[0]

    def linearize(self, w: Tensor, x: Tensor) -> tuple[Tensor, Pullback]:
        outputs, tape = self._tape(w, x)
        return outputs, lambda c: torch.cat([g.flatten(1) for g in kernels.pullback(tape, c)], 1)

    def pushforward(self, w: Tensor, x: Tensor, v: Tensor) -> Tensor:
        return kernels.pushforward(self._tape(w, x)[1], self.weights(v))

    def jacobian(self, w: Tensor, x: Tensor) -> Tensor:
        return torch.cat([J.flatten(3) for J in kernels.jacobian(self._tape(w, x)[1])], -1)

    def gram(self, w: Tensor, x: Tensor) -> Tensor:
        return kernels.gram(self._tape(w, x)[1])

    def neuron_grams(self, w: Tensor, x: Tensor, layer: int) -> Float[Tensor, "B n NC NC"]:
        """The part of `gram` that each neuron's incoming weights give; ``layer`` counts from 0."""
        return kernels.neuron_grams(self._tape(w, x)[1], layer)


def Linear(inputs: int, outputs: int = 1) -> MLP:
    """Linear model f(x) = Wx, degree 1, with one block W1 ``(outputs, inputs)``."""
    return MLP([inputs, outputs], activation=identity)
