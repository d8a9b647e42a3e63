"""Feed-forward nets without biases, with hand-written derivatives."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise

from torch import Tensor

from flowsim.checks import require_instance
from flowsim.kernels import reference as kernels
from flowsim.kernels.reference import Activation, Tape
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
        whole = all(isinstance(n, int) and n > 0 for n in widths)
        if not whole or len(widths) < 2:
            raise ValueError(
                f"MLP: got widths {list(widths)}, expected at least two positive integers, "
                "try [64, 128, 1]"
            )
        expected = "one of flowsim's, try flowsim.relu"
        require_instance("MLP", Activation, expected, activation=self.activation)
        object.__setattr__(self, "widths", widths)

    @cached_property
    def layout(self) -> Layout:  # type: ignore[override]
        shapes = {}
        for l, (n, m) in enumerate(pairwise(self.widths), 1):
            shapes[f"W{l}"] = m, n
        return lay_out(shapes)

    @property
    def degree(self) -> int:  # type: ignore[override]
        degree = 1
        for _ in self.widths[2:]:
            degree = self.activation.degree * degree + 1
        return degree

    @property
    def kinks(self) -> bool:  # type: ignore[override]
        return self.activation.kinked and not self.linear

    @property
    def linear(self) -> bool:  # type: ignore[override]
        return len(self.widths) == 2

    def weights(self, w: Tensor) -> list[Tensor]:
        """The layers' matrices ``(B, n_l, n_{l-1})``, as views of the flat weights."""
        return [block.of(w) for block in self.layout]

    def _forward(self, w: Tensor, x: Tensor) -> tuple[Tensor, Tape]:
        weights = self.weights(w)
        return kernels.forward(weights, x, self.activation)

    def outputs(self, w: Tensor, x: Tensor) -> Tensor:
        outputs, _ = self._forward(w, x)
        return outputs

    def linearize(self, w: Tensor, x: Tensor) -> tuple[Tensor, Pullback]:
        outputs, tape = self._forward(w, x)
        return outputs, partial(kernels.pullback, tape)

    def pushforward(self, w: Tensor, x: Tensor, v: Tensor) -> Tensor:
        _, tape = self._forward(w, x)
        return kernels.pushforward(tape, v)

    def jacobian(self, w: Tensor, x: Tensor) -> Tensor:
        _, tape = self._forward(w, x)
        return kernels.jacobian(tape)

    def gram(self, w: Tensor, x: Tensor) -> Tensor:
        _, tape = self._forward(w, x)
        return kernels.gram(tape)


def Linear(inputs: int, outputs: int = 1) -> MLP:
    """Linear model f(x) = Wx, degree 1, with one block W1 ``(outputs, inputs)``."""
    return MLP([inputs, outputs], activation=identity)
