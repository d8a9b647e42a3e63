"""Tails: the scalar loss ℓ of one number q, by logarithms, so that e^(−10⁶) is an ordinary one."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Elementwise = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Tail:
    """A positive scalar loss ℓ(q), by logarithms.

    ``log_value`` is log ℓ(q); ``log_slope`` is log |ℓ'(q)|; ``inverse`` maps Λ to ℓ⁻¹(e^{−Λ}), the
    soft minimum of the q, and is None where ℓ has no inverse (then soft margins are refused). A
    ``decreasing`` tail rewards large q, the others pull q to 0. ``decay`` is −ℓ''/ℓ' of a
    decreasing one, by automatic differentiation where it is None."""

    name: str
    log_value: Elementwise
    log_slope: Elementwise
    inverse: Elementwise | None = None
    decreasing: bool = True
    decay: Elementwise | None = None

    def fall(self, q: Tensor) -> Tensor:
        """−ℓ''/ℓ', at which rate the slope of a decreasing tail falls."""
        if self.decay:
            return self.decay(q)

        def fallen(q: Tensor) -> Tensor:
            return -self.log_slope(q).sum()

        return torch.func.grad(fallen)(q)


def _log_logistic(q: Tensor) -> Tensor:
    """log log(1 + e^{−q}), exact to rounding for every q.

    For large q, log(1 + z) = z(1 − z/2 + …) with z = e^{−q} gives −q + log1p(−z/2) without
    underflow."""
    large = q > 30
    middle = torch.where(large, torch.zeros_like(q), q)
    z = torch.exp(-q)
    series = -q + torch.log1p(-0.5 * z)
    plain = torch.log(-F.logsigmoid(middle))
    return torch.where(large, series, plain)


def _log_logistic_slope(q: Tensor) -> Tensor:
    return F.logsigmoid(-q)


def _logistic_inverse(lam: Tensor) -> Tensor:
    """−log(expm1(𝓛)) at 𝓛 = e^{−Λ}; for small 𝓛 it is Λ − 𝓛/2 + O(𝓛²), for large 𝓛 −𝓛 −
    log1p(−e^{−𝓛})."""
    loss = torch.exp(-lam)
    tiny = loss < 1e-8
    large = loss > 1
    middle = torch.where(tiny | large, torch.ones_like(loss), loss)
    plain = -torch.log(torch.expm1(middle))
    small = torch.where(tiny, lam - loss / 2, plain)
    beyond = -loss - torch.log1p(-torch.exp(-loss))
    return torch.where(large, beyond, small)


def _logistic_decay(q: Tensor) -> Tensor:
    log_sigmoid = F.logsigmoid(q)
    return torch.exp(log_sigmoid)  # torch.sigmoid rounds by an element's place in the batch


def _log_half_square(r: Tensor) -> Tensor:
    return 2 * torch.log(r.abs()) - math.log(2)


def _log_magnitude(r: Tensor) -> Tensor:
    return torch.log(r.abs())


EXPONENTIAL = Tail(
    "exponential", torch.neg, torch.neg, inverse=torch.positive, decay=torch.ones_like
)
LOGISTIC = Tail(
    "logistic", _log_logistic, _log_logistic_slope, _logistic_inverse, decay=_logistic_decay
)
HALF_SQUARE = Tail("half square", _log_half_square, _log_magnitude, decreasing=False)
