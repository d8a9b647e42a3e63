"""Logarithms of integrals of e^r, and the cubic r through two values with slopes."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from flowsim.numerics.shapes import PerTrajectory

_Nodes = Float[Tensor, " nodes"]


def log_mean_exp(a: Tensor, b: Tensor) -> Tensor:
    """log ∫₀¹ e^{a + (b − a)u} du: the mean of a function whose logarithm is linear between its
    ends."""
    gap = (a - b).abs()
    small = gap < 1e-6
    safe = torch.where(small, 1.0, gap)
    exact = torch.log(-torch.expm1(-safe) / safe)
    below = torch.where(small, -gap / 2, exact)
    return torch.maximum(a, b) + below


def hermite(u: Tensor, a: Tensor, b: Tensor, da: Tensor, db: Tensor) -> Tensor:
    """The cubic with values a, b and derivatives da, db at u = 0 and 1."""
    gap = b - a
    square = 3 * gap - 2 * da - db
    cube = da + db - 2 * gap
    slope = da + u * (square + u * cube)
    return a + u * slope


def log_elapsed(
    rate0: PerTrajectory,
    rate1: PerTrajectory,
    slope0: PerTrajectory,
    slope1: PerTrajectory,
    u: PerTrajectory | None = None,
) -> PerTrajectory:
    """log ∫₀ᵘ e^{r(v)} dv, u = 1 by default: the logarithm of the time spent in a step up to u.

    r, the log of a rate, is the cubic with values ``rate`` and derivatives ``slope`` at 0 and 1.
    Good to 1e-6 where r rises by up to 10⁶ within the step."""
    if u is None:
        u = torch.ones_like(rate0)
    v = u[:, None] * _NODES.to(u)  # (B, nodes)
    ends = torch.stack([rate0, rate1, slope0, slope1])
    r = hermite(v, *ends[..., None])
    mean = torch.logsumexp(r + _LOG_WEIGHTS.to(u), -1)
    return torch.log(u) + mean


def _gauss_legendre() -> tuple[_Nodes, _Nodes]:
    """Five nodes on [-1, 1] and their weights (Abramowitz and Stegun, 25.4.30)."""
    spread = 2 * math.sqrt(10 / 7)
    near = math.sqrt(5 - spread) / 3
    far = math.sqrt(5 + spread) / 3
    tilt = 13 * math.sqrt(70)
    light = (322 - tilt) / 900
    heavy = (322 + tilt) / 900
    nodes = [-far, -near, 0.0, near, far]
    weights = [light, heavy, 128 / 225, heavy, light]
    return _doubles(nodes), _doubles(weights)


def _doubles(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _panels() -> tuple[_Nodes, _Nodes]:
    """Nodes and log weights on [0, 1]: panels that shrink towards both ends, where a large exponent
    has its mass, with five Gauss-Legendre nodes in each."""
    nodes, weights = _gauss_legendre()
    powers = [2.0**-k for k in range(24, 0, -1)]
    left = _doubles([0.0, *powers])
    right = 1 - left.flip(0)[1:]
    edges = torch.cat([left, right])
    widths = edges.diff()[:, None]
    at = edges[:-1, None] + widths * (1 + nodes) / 2
    log_weights = torch.log(widths * weights / 2)
    return at.flatten(), log_weights.flatten()


_NODES, _LOG_WEIGHTS = _panels()
