"""Positively homogeneous nets with flat weights: f(x; cw) = c^degree f(x; w) for c > 0.

Every net reads weights ``w (B, P)``, one row a trajectory, and inputs ``x``: vectors ``(N, d)``
shared by all trajectories, or ``(B, N, d)`` with data of their own. It gives outputs ``(B, N, C)``.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from flowsim.checks import require_not_negative
from flowsim.layout import Layout

Pullback = Callable[[Tensor], Tensor]


class Net(ABC):
    """A positively homogeneous map. ``degree`` is None while it waits to be measured on data (see
    `measured`)."""

    layout: Layout
    degree: float | None
    kinks: bool
    linear: bool = False
    """Whether the outputs are linear in the weights."""

    @property
    def size(self) -> int:
        """P, the number of weights."""
        return sum(block.size for block in self.layout)

    @abstractmethod
    def outputs(self, w: Float[Tensor, "B P"], x: Tensor) -> Float[Tensor, "B N C"]:
        """f(x; w)."""

    @abstractmethod
    def linearize(
        self, w: Float[Tensor, "B P"], x: Tensor
    ) -> tuple[Float[Tensor, "B N C"], Pullback]:
        """Outputs and the map c ↦ Jᵀc, which share one forward pass. c is ``(B, N, C)``, Jᵀc ``(B,
        P)``."""

    @abstractmethod
    def pushforward(
        self, w: Float[Tensor, "B P"], x: Tensor, v: Float[Tensor, "B P"]
    ) -> Float[Tensor, "B N C"]:
        """Jv, the derivative of the outputs along v."""

    def pullback(self, w: Tensor, x: Tensor, c: Float[Tensor, "B N C"]) -> Float[Tensor, "B P"]:
        """Jᵀc. At a kink one element of Clarke's set: the one that autograd returns."""
        _, pull = self.linearize(w, x)
        return pull(c)

    def jacobian(self, w: Tensor, x: Tensor) -> Float[Tensor, "B N C P"]:
        """J, dense: for small nets and for tests."""
        outputs, pull = self.linearize(w, x)
        _, N, C = outputs.shape
        rows = []
        for unit in torch.eye(N * C, dtype=w.dtype, device=w.device):
            cotangent = unit.view(N, C).expand_as(outputs)
            rows.append(pull(cotangent))
        return torch.stack(rows, 1).unflatten(1, (N, C))

    def gram(self, w: Tensor, x: Tensor) -> Float[Tensor, "B NC NC"]:
        """JJᵀ, the neural tangent kernel."""
        J = self.jacobian(w, x).flatten(1, 2)
        return J @ J.mT

    def init(self, seeds: int | Iterable[int] = 0, scale: float = 1.0) -> Float[Tensor, "B P"]:
        """Gaussian weights, one row a seed: entries of a block are N(0, scale²/fan_in), vectors
        N(0, scale²).

        A seed gives the same row whatever the other seeds are. float64 on the CPU; move it where
        the run should be."""
        require_not_negative("init", scale=scale)
        several = seeds if isinstance(seeds, Iterable) else [seeds]
        rows = [self._drawn(int(seed), scale) for seed in several]
        if not rows:
            raise ValueError(
                "init: got no seeds, expected an integer or a non-empty sequence, "
                "try seeds=range(3)"
            )
        return torch.stack(rows)

    def _drawn(self, seed: int, scale: float) -> Float[Tensor, " P"]:
        generator = torch.Generator().manual_seed(seed)
        parts = []
        for block in self.layout:
            fan_in = math.prod(block.shape[1:])
            draw = torch.randn(block.size, generator=generator, dtype=torch.float64)
            deviation = scale / fan_in**0.5
            parts.append(draw * deviation)
        return torch.cat(parts)

    def measured(self, x: Tensor) -> Self:
        """This net with its degree of homogeneity known, measured on a few rows of ``x`` where need
        be."""
        return self

    def select(self, rows: Tensor) -> Self:
        """The net of these trajectories, for nets that hold something of each trajectory."""
        return self


def measured_degree(net: Net, x: Tensor, *, declared: float | None = None) -> float:
    """The degree L with f(x; cw) = c^L f(x; w), from random weights, a few rows of x, and c = ½, 2,
    3.

    Raises ValueError with the measured values where no single L fits to 1e-8, where it is not the
    ``declared`` one, or where repeated calls differ."""
    x = few_examples(x)
    w = net.init([11, 12]).to(x)
    f = net.outputs(w, x)
    if not torch.equal(f, net.outputs(w, x)):
        raise ValueError(
            "two evaluations of the net at the same weights differ; expected a deterministic net"
        )
    if not (f.abs() > 0).any():
        raise ValueError(
            "the net's outputs are all zero at random weights, so its degree cannot be measured"
        )
    degrees = []
    misfits = []
    for c in (0.5, 2, 3):
        degree, misfit = _fitted(f, net.outputs(c * w, x), c)
        degrees.append(degree)
        misfits.append(misfit)
    one = max(degrees) - min(degrees) <= 1e-6
    if not one or not max(misfits) <= 1e-8:
        got = ", ".join(f"{degree:.4g}" for degree in degrees)
        raise ValueError(
            "the net is not positively homogeneous in its weights: scaling them by ½, 2, 3 gives "
            f"degrees {got}; expected one degree, try a net without biases or normalisation"
        )
    degree = sum(degrees) / 3
    if abs(degree - round(degree)) < 1e-6:
        degree = round(degree)
    if declared is not None and abs(degree - declared) > 1e-6:
        raise ValueError(
            f"the net was declared homogeneous of degree {declared:g}, but its measured degree is "
            f"{degree:g}; leave `degree` out to use the measured one"
        )
    return degree


def few_examples(x: Tensor) -> Float[Tensor, "n *d"]:
    """The first examples of the first data set, in double precision."""
    shared = x[0] if x.ndim == 3 else x
    return shared[:8].double()


def _fitted(f: Tensor, scaled: Tensor, c: float) -> tuple[float, float]:
    """The degree that the lengths of the outputs give, and the relative error of f c^degree."""
    ratio = scaled.norm() / f.norm()
    degree = float(torch.log(ratio)) / math.log(c)
    errors = (scaled - c**degree * f).abs()
    misfit = errors.max() / scaled.abs().max()
    return degree, float(misfit)
