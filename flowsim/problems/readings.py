"""Readings: from a net's outputs (B, N, C) and targets to the numbers q (B, M) that a tail sees."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from flowsim.checks import as_tensor
from flowsim.numerics.shapes import Outputs

Back = Callable[[Tensor], Tensor]
"""From a cotangent of q (B, M) to the cotangent of f (B, N, C)."""


class Reading(ABC):
    """How outputs and targets become numbers q, and back."""

    targets: str
    """The kind of target it wants: "signs" (±1), "classes" (0 … C−1) or "values" (real numbers)."""

    axes: int = 1
    """Axes of targets that all trajectories share: (N,), or (N, C) for values."""

    @abstractmethod
    def as_targets(self, y: Tensor, loss: str, examples: torch.Size, outputs: int) -> Tensor:
        """``y`` as targets of a net with so many outputs at examples (N,) or (B, N). Raises where
        they are none; ``loss`` says for which."""

    @abstractmethod
    def read(self, f: Outputs, y: Tensor) -> tuple[Float[Tensor, "B M"], Back]:
        """The numbers q, and the map from a cotangent of q to the cotangent of f."""

    @abstractmethod
    def hessian(
        self,
        f: Outputs,
        y: Tensor,
        slope: Float[Tensor, "B M"],
        second: Float[Tensor, "B M"],
    ) -> Float[Tensor, "B N C C"]:
        """∂²/∂f² of Σ ℓ(q) for each example, from ``slope`` = |ℓ'(q)| and ``second`` = ℓ''(q)."""

    @abstractmethod
    def margins(self, f: Outputs, y: Tensor) -> Float[Tensor, "B N"]:
        """The classification margin of each example: positive where it is classified correctly."""


def checked_targets(
    y: Any, reading: Reading, loss: str, examples: torch.Size, outputs: int
) -> Tensor:
    """What users pass as targets, in the reading's own form."""
    y = as_tensor(y, "y")
    if y.is_floating_point() and not torch.isfinite(y).all():
        raise ValueError("y: got NaN or infinite entries, expected finite targets")
    return reading.as_targets(y, loss, examples, outputs)


# --------------------------------------------------------------------------------------------------
# Two classes, several classes, real numbers
# --------------------------------------------------------------------------------------------------


class Signed(Reading):
    """q = y f for labels ±1 and one output."""

    targets = "signs"

    def as_targets(self, y: Tensor, loss: str, examples: torch.Size, outputs: int) -> Tensor:
        if outputs != 1:
            raise ValueError(
                f"the {loss} loss is binary, but the net has {outputs} outputs; try one output, "
                "or loss=flowsim.cross_entropy or flowsim.pairwise_exponential"
            )
        labels = _labels(y, examples)
        expected = "expected −1 and +1, or 0 and 1"
        if {-1.0, 0.0} <= labels:
            raise ValueError(
                f"y: got labels {_shown(labels)}, which mix two conventions; {expected}"
            )
        if not (labels <= {-1.0, 1.0} or labels <= {0.0, 1.0}):
            raise ValueError(f"y: got labels {_shown(labels)}, {expected}")
        return torch.where(y > 0, 1.0, -1.0).double()

    def read(self, f: Tensor, y: Tensor) -> tuple[Tensor, Back]:
        return self.margins(f, y), lambda c: (c * y)[..., None]

    def hessian(self, f: Tensor, y: Tensor, slope: Tensor, second: Tensor) -> Tensor:
        return second[..., None, None]

    def margins(self, f: Tensor, y: Tensor) -> Tensor:
        return y * f[..., 0]


class OfClasses(Reading):
    """A reading of one output for each class."""

    targets = "classes"

    def as_targets(self, y: Tensor, loss: str, examples: torch.Size, outputs: int) -> Tensor:
        if outputs < 2:
            raise ValueError(
                f"the {loss} loss needs one output for each class, but the net has {outputs}; "
                "try more outputs, or loss=flowsim.logistic"
            )
        labels = _labels(y, examples)
        expected = f"0 … {outputs - 1}"
        if not all(label.is_integer() for label in labels):
            raise ValueError(f"y: got class labels that are not integers, expected {expected}")
        if not labels <= set(range(outputs)):
            raise ValueError(
                f"y: got classes {_shown(labels)}, expected integers {expected}, because the net "
                f"has {outputs} outputs"
            )
        return y.long()

    def margins(self, f: Tensor, y: Tensor) -> Tensor:
        wrong = f.masked_fill(_one_hot(f, y), -torch.inf)
        return _at_label(f, y) - wrong.amax(-1)


class Pairwise(OfClasses):
    """q = f_y − f_j for every example and every wrong class j: M = N(C − 1) (theory of the binary
    case applies)."""

    def read(self, f: Tensor, y: Tensor) -> tuple[Tensor, Back]:
        wrong = ~_one_hot(f, y)
        gaps = (_at_label(f, y)[..., None] - f)[wrong].view(len(f), -1)

        def back(c: Tensor) -> Tensor:
            rivals = torch.zeros_like(f).masked_scatter(wrong, -c)
            return rivals.scatter(-1, _index(f, y), -rivals.sum(-1, keepdim=True))

        return gaps, back

    def hessian(self, f: Tensor, y: Tensor, slope: Tensor, second: Tensor) -> Tensor:
        label = _one_hot(f, y)
        rivals = torch.zeros_like(f).masked_scatter(~label, second)
        each = torch.eye(f.shape[-1], dtype=f.dtype, device=f.device)
        gap = label.to(f)[..., None, :] - each  # ∂(f_y − f_j)/∂f in row j
        return (gap * rivals[..., None]).mT @ gap


class SoftPairwise(OfClasses):
    """q = −log Σ_{j≠y} e^{f_j − f_y}, the soft minimum of an example's pairwise gaps."""

    def read(self, f: Tensor, y: Tensor) -> tuple[Tensor, Back]:
        rivals = f.masked_fill(_one_hot(f, y), -torch.inf)
        q = _at_label(f, y) - torch.logsumexp(rivals, -1)

        def back(c: Tensor) -> Tensor:
            to_rivals = -c[..., None] * torch.softmax(rivals, -1)
            return to_rivals.scatter(-1, _index(f, y), c[..., None])

        return q, back

    def hessian(self, f: Tensor, y: Tensor, slope: Tensor, second: Tensor) -> Tensor:
        label = _one_hot(f, y)
        p = torch.softmax(f.masked_fill(label, -torch.inf), -1)  # of the rivals
        dq = label.to(f) - p
        covariance = torch.diag_embed(p) - _outer(p)  # −∂²q/∂f²
        return second[..., None, None] * _outer(dq) + slope[..., None, None] * covariance


class Residual(Reading):
    """q = f − y for real targets, all outputs of an example in a row."""

    targets = "values"
    axes = 2

    def as_targets(self, y: Tensor, loss: str, examples: torch.Size, outputs: int) -> Tensor:
        full = (*examples, outputs)
        shared = (examples[-1], outputs)
        shape = tuple(y.shape)
        if shape in (full, shared):
            return y.double()
        if outputs == 1 and shape in (full[:-1], shared[:-1]):
            return y.double()[..., None]
        raise ValueError(f"y: got shape {shape}, expected {full}: one target for each output")

    def read(self, f: Tensor, y: Tensor) -> tuple[Tensor, Back]:
        target = y if y.shape[-2:] == f.shape[-2:] else y[..., None]
        return (f - target).flatten(1), lambda c: c.view_as(f)

    def hessian(self, f: Tensor, y: Tensor, slope: Tensor, second: Tensor) -> Tensor:
        return torch.diag_embed(second.view_as(f))

    def margins(self, f: Tensor, y: Tensor) -> Tensor:
        raise ValueError(
            "a regression loss has no classification margins; try exponential or logistic loss"
        )


def _one_hot(f: Outputs, y: Tensor) -> Bool[Tensor, "B N C"]:
    return F.one_hot(y, f.shape[-1]).bool().expand_as(f)


def _index(f: Outputs, y: Tensor) -> Tensor:
    return y.expand(f.shape[:2])[..., None]  # (B, N, 1)


def _at_label(f: Outputs, y: Tensor) -> Float[Tensor, "B N"]:
    return f.gather(-1, _index(f, y))[..., 0]


def _outer(v: Outputs) -> Float[Tensor, "B N C C"]:
    return v[..., :, None] * v[..., None, :]


def _labels(y: Tensor, examples: torch.Size) -> set[float]:
    """The labels that occur, one for each example; those of one trajectory may be for all."""
    if y.shape not in (examples, examples[-1:]):
        expected = f"{tuple(examples)}: one label for each example"
        raise ValueError(f"y: got shape {tuple(y.shape)}, expected {expected}")
    return set(torch.unique(y).double().tolist())


def _shown(labels: set[float]) -> str:
    first = ", ".join(f"{label:g}" for label in sorted(labels)[:6])
    return f"{{{first}{', …' if len(labels) > 6 else ''}}}"
