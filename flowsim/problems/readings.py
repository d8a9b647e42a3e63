"""Readings: from a net's outputs (B, N, C) and targets to the numbers q (B, M) that a tail sees."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from flowsim.checks import as_tensor
from flowsim.numerics.shapes import Outputs

Back = Callable[[Tensor], Tensor]
"""From a cotangent of q (B, M) to the cotangent of f (B, N, C)."""

Read: TypeAlias = tuple[Float[Tensor, "B M"], Back]
"""The numbers q, and the way back."""


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
    def read(self, f: Outputs, y: Tensor) -> Read:
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
    if not torch.isfinite(y).all():
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
        got = f"y: got labels {_shown(labels)}"
        expected = "expected −1 and +1, or 0 and 1"
        if {-1.0, 0.0} <= labels:
            raise ValueError(f"{got}, which mix two conventions; {expected}")
        if not (labels <= {-1.0, 1.0} or labels <= {0.0, 1.0}):
            raise ValueError(f"{got}, {expected}")
        signs = torch.where(y > 0, 1.0, -1.0)
        return signs.double()

    def read(self, f: Tensor, y: Tensor) -> Read:
        def back(c: Tensor) -> Tensor:
            cotangent = c * y
            return cotangent[..., None]

        return self.margins(f, y), back

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
        classes = range(outputs)
        expected = f"0 … {outputs - 1}"
        if not all(label.is_integer() for label in labels):
            raise ValueError(f"y: got class labels that are not integers, expected {expected}")
        if not labels <= set(classes):
            raise ValueError(
                f"y: got classes {_shown(labels)}, expected integers {expected}, because the net "
                f"has {outputs} outputs"
            )
        return y.long()

    def margins(self, f: Tensor, y: Tensor) -> Tensor:
        rivals = _rivals(f, y)
        return _at_label(f, y) - rivals.amax(-1)


class Pairwise(OfClasses):
    """q = f_y − f_j for every example and every wrong class j: M = N(C − 1) (theory of the binary
    case applies)."""

    def read(self, f: Tensor, y: Tensor) -> Read:
        wrong = ~_one_hot(f, y)
        gaps = f.gather(-1, _index(f, y)) - f
        B = len(f)
        q = gaps[wrong].view(B, -1)

        def back(c: Tensor) -> Tensor:
            rivals = torch.zeros_like(f).masked_scatter(wrong, -c)
            total = rivals.sum(-1, keepdim=True)
            return rivals.scatter(-1, _index(f, y), -total)

        return q, back

    def hessian(self, f: Tensor, y: Tensor, slope: Tensor, second: Tensor) -> Tensor:
        label = _one_hot(f, y)
        rivals = torch.zeros_like(f).masked_scatter(~label, second)
        C = f.shape[-1]
        each = torch.eye(C, dtype=f.dtype, device=f.device)
        gap = label.to(f)[..., None, :] - each  # ∂(f_y − f_j)/∂f in row j
        weighted = gap * rivals[..., None]
        return weighted.mT @ gap


class SoftPairwise(OfClasses):
    """q = −log Σ_{j≠y} e^{f_j − f_y}, the soft minimum of an example's pairwise gaps."""

    def read(self, f: Tensor, y: Tensor) -> Read:
        rivals = _rivals(f, y)
        q = _at_label(f, y) - torch.logsumexp(rivals, -1)

        def back(c: Tensor) -> Tensor:
            column = c[..., None]
            to_rivals = -column * torch.softmax(rivals, -1)
            return to_rivals.scatter(-1, _index(f, y), column)

        return q, back

    def hessian(self, f: Tensor, y: Tensor, slope: Tensor, second: Tensor) -> Tensor:
        p = torch.softmax(_rivals(f, y), -1)
        dq = _one_hot(f, y).to(f) - p
        covariance = torch.diag_embed(p) - _outer(p)  # −∂²q/∂f²
        convex = second[..., None, None] * _outer(dq)
        return convex + slope[..., None, None] * covariance


class Residual(Reading):
    """q = f − y for real targets, all outputs of an example in a row."""

    targets = "values"
    axes = 2

    def as_targets(self, y: Tensor, loss: str, examples: torch.Size, outputs: int) -> Tensor:
        full = (*examples, outputs)
        shared = (examples[-1], outputs)
        shape = tuple(y.shape)
        y = y.double()
        if shape in (full, shared):
            return y
        alone = shape in (full[:-1], shared[:-1])
        if alone and outputs == 1:
            return y[..., None]
        raise ValueError(f"y: got shape {shape}, expected {full}: one target for each output")

    def read(self, f: Tensor, y: Tensor) -> Read:
        if y.shape[-2:] != f.shape[-2:]:
            y = y[..., None]
        residual = f - y

        def back(c: Tensor) -> Tensor:
            return c.view_as(f)

        return residual.flatten(1), back

    def hessian(self, f: Tensor, y: Tensor, slope: Tensor, second: Tensor) -> Tensor:
        return torch.diag_embed(second.view_as(f))

    def margins(self, f: Tensor, y: Tensor) -> Tensor:
        raise ValueError(
            "a regression loss has no classification margins; try exponential or logistic loss"
        )


def _one_hot(f: Outputs, y: Tensor) -> Bool[Tensor, "B N C"]:
    label = F.one_hot(y, f.shape[-1]).bool()
    return label.expand_as(f)


def _rivals(f: Outputs, y: Tensor) -> Outputs:
    """The outputs of the wrong classes, −∞ at the right one."""
    return f.masked_fill(_one_hot(f, y), -torch.inf)


def _index(f: Outputs, y: Tensor) -> Tensor:
    return y.expand(f.shape[:2])[..., None]  # (B, N, 1)


def _at_label(f: Outputs, y: Tensor) -> Float[Tensor, "B N"]:
    right = f.gather(-1, _index(f, y))
    return right[..., 0]


def _outer(v: Outputs) -> Float[Tensor, "B N C C"]:
    return v[..., :, None] * v[..., None, :]


def _labels(y: Tensor, examples: torch.Size) -> set[float]:
    """The labels that occur, one for each example; those of one trajectory may be for all."""
    if y.shape not in (examples, examples[-1:]):
        expected = f"{tuple(examples)}: one label for each example"
        raise ValueError(f"y: got shape {tuple(y.shape)}, expected {expected}")
    labels = torch.unique(y).double()
    return set(labels.tolist())


def _shown(labels: set[float]) -> str:
    first = sorted(labels)[:6]
    shown = [f"{label:g}" for label in first]
    if len(labels) > 6:
        shown.append("…")
    return f"{{{', '.join(shown)}}}"
