"""Learning problems: a net, data and a loss."""

import math
from dataclasses import dataclass, fields, replace
from functools import cached_property
from html import escape
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flowsim.checks import as_floats, as_tensor, require_weights
from flowsim.layout import Layout
from flowsim.nets.mlp import MLP
from flowsim.nets.net import Net
from flowsim.numerics.shapes import Outputs, PerTrajectory, Rows
from flowsim.problems.kinks import Hinges, TwoLayer
from flowsim.problems.losses import Loss
from flowsim.problems.readings import checked_targets


@dataclass(frozen=True)
class Problem:
    """A net, data and a loss: 𝓛(w) = Σ_i ℓ(y_i f(x_i; w)).

    ``x`` is ``(N, d)``, or ``(B, N, d)`` with data of its own for each trajectory. ``y`` is
    ``(N,)`` or ``(B, N)``: ±1 or 0/1 for binary losses, 0 … C−1 for multi-class ones, real numbers
    (``(…, N, C)`` for C outputs) for squared loss. Labels of one sign are allowed: data in the form
    y·x.

    >>> import flowsim as fs
    >>> problem = fs.Problem(fs.Linear(2), [[1.0, 0.0], [0.0, -1.0]], [1, -1], loss=fs.exponential)
    >>> problem.lam(torch.zeros(1, 2, dtype=torch.float64))  # two examples, each with loss 1
    tensor([-0.6931], dtype=torch.float64)
    >>> problem
    Problem: exponential loss of a net MLP
      2 examples of 2 numbers, 1 outputs
      2 weights, degree 1, kinks: False
    """

    net: Net
    x: Any
    y: Any
    loss: Loss

    def __post_init__(self) -> None:
        expected = "a flowsim Net, try flowsim.MLP(...) or flowsim.ModuleNet(module)"
        if not isinstance(self.net, Net):
            raise TypeError(f"Problem: got net {type(self.net).__name__}, expected {expected}")
        if not isinstance(self.loss, Loss):
            expected = "a flowsim Loss, try loss=flowsim.exponential"
            raise TypeError(f"Problem: got loss {self.loss!r}, expected {expected}")
        x = _inputs(self.x)
        net, C = _fitted(self.net, x)
        examples = x.shape[:-1]
        y = checked_targets(self.y, self.loss.reading, self.loss.name, examples, C)
        vars(self).update(net=net, x=x, y=y)

    @property
    def size(self) -> int:
        return self.net.size

    @property
    def layout(self) -> Layout:
        return self.net.layout

    @property
    def degree(self) -> float:
        degree = self.net.degree
        return math.nan if degree is None else degree  # `measured` has set it

    @property
    def kinks(self) -> bool:
        return self.net.kinks

    @property
    def convex(self) -> bool:
        return self.net.linear

    @property
    def logarithmic(self) -> bool:
        return True

    @property
    def examples(self) -> int:
        """N, the number of examples of each trajectory."""
        return self.x.shape[-2]

    def outputs(self, w: Rows) -> Outputs:
        """f(x; w) on the data."""
        return self.net.outputs(w, self.x)

    def lam(self, w: Rows) -> PerTrajectory:
        """Λ = log(1/𝓛), finite where 𝓛 itself underflows."""
        outputs = self.outputs(w)
        return self.loss.lam(outputs, self.y)

    def ascent(self, w: Rows) -> tuple[PerTrajectory, Rows]:
        """Λ and h = ∇Λ = −∇𝓛/𝓛."""
        outputs, pull = self.net.linearize(w, self.x)
        lam, cotangent = self.loss.ascent(outputs, self.y)
        return lam, pull(cotangent)

    def curvature(self, w: Rows) -> Float[Tensor, "B NC P"]:
        """FᵀJ, with J the Jacobian of the outputs and F the factor of the loss's curvature
        (`Loss.curvature`)."""
        outputs = self.outputs(w)
        jacobian = self.net.jacobian(w, self.x)
        return self.loss.curved(outputs, self.y, jacobian)

    def margins(self, w: Rows) -> Float[Tensor, "B N"]:
        """The margin of each example, y f(x) or f_y − max of the others: positive where it is
        classified right."""
        outputs = self.outputs(w)
        return self.loss.reading.margins(outputs, self.y)

    def weights(self, w: Rows) -> Float[Tensor, "B M"]:
        """p = |ℓ'| / Σ|ℓ'|, the share of each example (of each pairwise gap, for that loss) in the
        descent."""
        outputs = self.outputs(w)
        return self.loss.weights(outputs, self.y)

    def two_layer(self, trajectories: int) -> TwoLayer:
        """The kinks of a two-layer net on these data. Raises for other nets."""
        return self._two_layer.expanded(trajectories)

    @cached_property
    def _two_layer(self) -> TwoLayer:
        net = self.net
        if not (isinstance(net, MLP) and net.kinks and len(net.widths) == 3):
            raise ValueError(
                "the true flow across kinks is known for two-layer MLPs with relu or leaky_relu; "
                f"got {type(net).__name__}, try flowsim.MLP([inputs, width, outputs]), a smooth "
                "activation such as flowsim.squared_relu, or flowsim.SmallStep for the small-step "
                "path"
            )
        x = self.x if self._own_x else self.x[None]
        _, width, _ = net.widths
        return TwoLayer.on(x, self.y, self.loss, net.activation, width)

    def hinges(self, w: Rows) -> Hinges:
        net = self.two_layer(len(w)).at(w)
        return net.hinges()

    def check_weights(self, w: Tensor) -> None:
        require_weights(w, self.size)
        if self._own_x and len(self.x) != len(w):
            raise ValueError(
                f"weights: got {len(w)} trajectories, but the data holds {len(self.x)} data sets; "
                "expected as many, one for each trajectory"
            )

    @property
    def _own_x(self) -> bool:
        """Whether each trajectory has inputs of its own."""
        return self.x.ndim == 3

    @property
    def _own_y(self) -> bool:
        return self.y.ndim > self.loss.reading.axes

    def select(self, rows: Tensor) -> Self:
        return self._replaced(
            net=self.net.select(rows),
            x=self.x[rows] if self._own_x else self.x,
            y=self.y[rows] if self._own_y else self.y,
        )

    def examples_of(self, index: Int[Tensor, "B n"]) -> Self:
        """The problem on some of its examples, of each trajectory its own."""
        rows = torch.arange(len(index), device=index.device)[:, None]
        return self._replaced(
            x=self.x[rows, index] if self._own_x else self.x[index],
            y=self.y[rows, index] if self._own_y else self.y[index],
        )

    def like(self, w: Tensor) -> Self:
        x = self.x.to(w)
        y = self.y.to(w.device)
        if y.is_floating_point():
            y = y.to(w)
        return self._replaced(x=x, y=y)

    def with_data(self, x: Any, y: Any) -> "Problem":
        """The same net and loss on other data, such as a test set."""
        return replace(self, x=x, y=y)

    def _replaced(self, **values: Any) -> Self:
        """A copy that skips validation: its data have passed it."""
        copy = object.__new__(type(self))
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        vars(copy).update(own | values)
        return copy

    def __repr__(self) -> str:
        N, d = self.x.shape[-2:]
        sets = f", {len(self.x)} data sets" if self._own_x else ""
        return (
            f"Problem: {self.loss.name} loss of a net {type(self.net).__name__}\n"
            f"  {N} examples of {d} numbers{sets}, {_outputs_of(self.net, self.x)} outputs\n"
            f"  {self.size} weights, degree {self.degree:g}, kinks: {self.kinks}"
        )

    def _repr_html_(self) -> str:
        return f"<pre>{escape(repr(self))}</pre>"


def _inputs(x: Any) -> Tensor:
    x = as_floats(as_tensor(x, "x"))
    got = f"x: got shape {tuple(x.shape)}"
    if x.ndim not in (2, 3):
        raise ValueError(
            f"{got}, expected (N, d), or (B, N, d) with one data set a trajectory; "
            "try x.reshape(len(x), -1)"
        )
    if x.numel() == 0:
        raise ValueError(f"{got}, which holds no numbers; expected at least one example")
    bad = int((~torch.isfinite(x)).sum())
    if bad:
        raise ValueError(f"x: got {bad} NaN or infinite entries, expected finite numbers")
    return x


def _fitted(net: Net, x: Tensor) -> tuple[Net, int]:
    """The net with its degree known, and C, its number of outputs; a net that does not fit the data
    is refused."""
    try:
        net = net.measured(x)
        return net, _outputs_of(net, x)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"x: the net does not accept examples of {x.shape[-1]} numbers: {reason}"
        ) from None


def _outputs_of(net: Net, x: Tensor) -> int:
    one = net.select(torch.tensor([0]))
    w = one.init(0).to(x)
    example = x.flatten(0, -2)[:1]
    return one.outputs(w, example).shape[-1]
