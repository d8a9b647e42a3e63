"""What is descended: the Objective protocol, and learning problems."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flowsim.checks import as_floats, as_tensor, require_weights
from flowsim.layout import Layout
from flowsim.nets.mlp import MLP
from flowsim.nets.net import Net
from flowsim.problems.kinks import Hinges, TwoLayer
from flowsim.problems.losses import Loss


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
    """

    net: Net
    x: Any
    y: Any
    loss: Loss

    def __post_init__(self) -> None:
        if not isinstance(self.net, Net):
            raise TypeError(
                f"Problem: got net {type(self.net).__name__}, expected a flowsim Net, try flowsim.MLP(...) or "
                "flowsim.ModuleNet(module)"
            )
        if not isinstance(self.loss, Loss):
            raise TypeError(
                f"Problem: got loss {self.loss!r}, expected a flowsim Loss, try loss=flowsim.exponential"
            )
        x = _inputs(self.x)
        net, outputs = _fitted(self.net, x)
        y = _targets(self.y, self.loss, shape=x.shape[:-1], outputs=outputs)
        for name, value in {"net": net, "x": x, "y": y}.items():
            object.__setattr__(self, name, value)

    @property
    def size(self) -> int:
        return self.net.size

    @property
    def layout(self) -> Layout:
        return self.net.layout

    @property
    def degree(self) -> float:
        assert self.net.degree is not None  # `measured` has set it
        return self.net.degree

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

    def outputs(self, w: Float[Tensor, "B P"]) -> Float[Tensor, "B N C"]:
        """f(x; w) on the data."""
        return self.net.outputs(w, self.x)

    def lam(self, w: Float[Tensor, "B P"]) -> Float[Tensor, " B"]:
        """Λ = log(1/𝓛), finite where 𝓛 itself underflows."""
        return self.loss.lam(self.outputs(w), self.y)

    def ascent(self, w: Float[Tensor, "B P"]) -> tuple[Float[Tensor, " B"], Float[Tensor, "B P"]]:
        """Λ and h = ∇Λ = −∇𝓛/𝓛."""
        outputs, pull = self.net.linearize(w, self.x)
        lam, cotangent = self.loss.ascent(outputs, self.y)
        return lam, pull(cotangent)

    def two_layer(self, trajectories: int) -> TwoLayer:
        """The kinks of a two-layer net on these data. Raises for other nets."""
        net = self.net
        if not (isinstance(net, MLP) and net.kinks and len(net.widths) == 3):
            raise ValueError(
                "the true flow across kinks is known for two-layer MLPs with relu or leaky_relu; got "
                f"{type(net).__name__}, try flowsim.MLP([inputs, width, outputs]), a smooth activation such as "
                "flowsim.squared_relu, or flowsim.SmallStep for the small-step path"
            )
        if self._kinks.x.shape[0] == 1:
            return self._kinks.expanded(trajectories)
        return self._kinks

    @cached_property
    def _kinks(self) -> TwoLayer:
        assert isinstance(self.net, MLP)
        x = self.x if self.x.ndim == 3 else self.x[None]
        return TwoLayer.of(x, self.y, self.loss, self.net.activation, self.net.widths[1])

    def hinges(self, w: Float[Tensor, "B P"]) -> Hinges:
        return self.two_layer(w.shape[0]).at(w).hinges()

    def curvature(self, w: Float[Tensor, "B P"]) -> Float[Tensor, "B NC P"]:
        """FᵀJ, with J the Jacobian of the outputs and F the root of the loss's curvature
        (`Loss.curvature`)."""
        return self.loss.curved(self.outputs(w), self.y, self.net.jacobian(w, self.x))

    def margins(self, w: Float[Tensor, "B P"]) -> Float[Tensor, "B N"]:
        """The margin of each example, y f(x) or f_y − max of the others: positive where it is
        classified right."""
        return self.loss.reading.margins(self.outputs(w), self.y)

    def weights(self, w: Float[Tensor, "B P"]) -> Float[Tensor, "B M"]:
        """p = |ℓ'| / Σ|ℓ'|, the share of each example (of each pairwise gap, for that loss) in the
        descent."""
        return self.loss.weights(self.outputs(w), self.y)

    def check_weights(self, w: Tensor) -> None:
        require_weights(w, self.size)
        if self.x.ndim == 3 and self.x.shape[0] != w.shape[0]:
            raise ValueError(
                f"weights: got {w.shape[0]} trajectories, but the data holds {self.x.shape[0]} data sets; "
                "expected as many, one for each trajectory"
            )

    def select(self, rows: Tensor) -> Self:
        own_x, own_y = self.x.ndim == 3, self.y.ndim == _axes(self.loss) + 1
        return self._replaced(
            net=self.net.select(rows),
            x=self.x[rows] if own_x else self.x,
            y=self.y[rows] if own_y else self.y,
        )

    def examples_of(self, index: Int[Tensor, "B n"]) -> Self:
        """The problem on some of its examples, of each trajectory its own."""
        own_x, own_y = self.x.ndim == 3, self.y.ndim == _axes(self.loss) + 1
        rows = torch.arange(len(index), device=index.device)[:, None]
        return self._replaced(
            x=self.x[rows, index] if own_x else self.x[index],
            y=self.y[rows, index] if own_y else self.y[index],
        )

    def like(self, w: Tensor) -> Self:
        y = self.y.to(w.device) if self.loss.reading.targets == "classes" else self.y.to(w)
        return self._replaced(net=self.net, x=self.x.to(w), y=y)

    def with_data(self, x: Any, y: Any) -> "Problem":
        """The same net and loss on other data, such as a test set."""
        return replace(self, x=x, y=y)

    def _replaced(self, **values: Any) -> Self:
        """A copy that skips validation: its data have passed it."""
        copy = object.__new__(type(self))
        for name in ("net", "x", "y", "loss"):
            object.__setattr__(copy, name, values.get(name, getattr(self, name)))
        return copy


def _axes(loss: Loss) -> int:
    """Axes of targets that all trajectories share: (N,), or (N, C) for regression."""
    return 2 if loss.reading.targets == "values" else 1


def _inputs(x: Any) -> Tensor:
    x = as_tensor(x, "x")
    if x.ndim not in (2, 3):
        raise ValueError(
            f"x: got shape {tuple(x.shape)}, expected (N, d), or (B, N, d) with one data set a trajectory; "
            "try x.reshape(len(x), -1)"
        )
    if x.numel() == 0:
        raise ValueError(
            f"x: got shape {tuple(x.shape)}, which holds no numbers; expected at least one example"
        )
    x = as_floats(x)
    if not torch.isfinite(x).all():
        bad = int((~torch.isfinite(x)).sum())
        raise ValueError(f"x: got {bad} NaN or infinite entries, expected finite numbers")
    return x


def _fitted(net: Net, x: Tensor) -> tuple[Net, int]:
    """The net with its degree known, and C, its number of outputs; a net that does not fit the data
    is refused."""
    example = (x[0] if x.ndim == 3 else x)[:1]
    try:
        net = net.measured(x)
        single = net.select(torch.tensor([0]))
        return net, single.outputs(single.init(0).to(example), example).shape[-1]
    except RuntimeError as error:
        raise ValueError(
            f"x: the net does not accept examples of {x.shape[-1]} numbers: {str(error).splitlines()[0]}"
        ) from None


def _targets(y: Any, loss: Loss, *, shape: torch.Size, outputs: int) -> Tensor:
    """Targets in the loss's own form: signs ±1 as floats, classes as integers, values as (…, N,
    C)."""
    y = as_tensor(y, "y")
    if y.is_floating_point() and not torch.isfinite(y).all():
        raise ValueError("y: got NaN or infinite entries, expected finite targets")
    kind = loss.reading.targets
    if kind == "values":
        return _values(y, shape=shape, outputs=outputs)
    if tuple(y.shape) not in {tuple(shape), tuple(shape[-1:])}:
        raise ValueError(
            f"y: got shape {tuple(y.shape)}, expected {tuple(shape)}: one label for each example"
        )
    return _signs(y, loss, outputs) if kind == "signs" else _classes(y, loss, outputs)


def _signs(y: Tensor, loss: Loss, outputs: int) -> Tensor:
    if outputs != 1:
        raise ValueError(
            f"the {loss.name} loss is binary, but the net has {outputs} outputs; "
            "try one output, or loss=flowsim.cross_entropy or flowsim.pairwise_exponential"
        )
    labels = {float(v) for v in torch.unique(y)}
    if -1.0 in labels and 0.0 in labels:
        raise ValueError(
            f"y: got labels {_listed(labels)}, which mix two conventions; expected −1 and +1, or 0 and 1"
        )
    if not (labels <= {-1.0, 1.0} or labels <= {0.0, 1.0}):
        raise ValueError(f"y: got labels {_listed(labels)}, expected −1 and +1, or 0 and 1")
    y = y.double()
    return torch.where(y > 0, 1.0, -1.0).to(y)


def _classes(y: Tensor, loss: Loss, outputs: int) -> Tensor:
    if outputs < 2:
        raise ValueError(
            f"the {loss.name} loss needs one output for each class, but the net has {outputs}; "
            "try more outputs, or loss=flowsim.logistic"
        )
    if y.is_floating_point() and not torch.equal(y, y.round()):
        raise ValueError(f"y: got class labels that are not integers, expected 0 … {outputs - 1}")
    if int(y.min()) < 0 or int(y.max()) >= outputs:
        raise ValueError(
            f"y: got classes {_listed({float(v) for v in torch.unique(y)})}, expected integers 0 … {outputs - 1}, "
            f"because the net has {outputs} outputs"
        )
    return y.long()


def _values(y: Tensor, *, shape: torch.Size, outputs: int) -> Tensor:
    full, shared = (*shape, outputs), (shape[-1], outputs)
    if tuple(y.shape) in {full, shared}:
        return y.double()
    if outputs == 1 and tuple(y.shape) in {full[:-1], shared[:-1]}:
        return y.double()[..., None]
    raise ValueError(f"y: got shape {tuple(y.shape)}, expected {full}: one target for each output")


def _listed(labels: set[float]) -> str:
    shown = ", ".join(f"{v:g}" for v in sorted(labels)[:6])
    return f"{{{shown}{', …' if len(labels) > 6 else ''}}}"
