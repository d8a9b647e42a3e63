"""TODO."""

import math

import torch
from torch import Tensor


def _sound(length: Tensor) -> Tensor:
    """Where no square that matters has under- or overflowed."""
    tiny = torch.finfo(length.dtype).tiny ** 0.25
    return (length > tiny) & (length < 1 / tiny)


def _near_one(v: Tensor) -> tuple[Tensor, Tensor]:
    """v over a power of two, which changes no digit, with entries up to 1; and the power, for
    `ldexp`."""
    limit = math.log2(torch.finfo(v.dtype).max) - 1
    exponent = torch.frexp(v.abs().amax(-1)).exponent.clamp(-limit, limit)
    exponent = exponent.to(v)  # of an integer, `ldexp` takes the power in single precision
    return torch.ldexp(v, -exponent[..., None]), exponent


def scaled(v: Tensor) -> tuple[Tensor, Tensor]:
    """``v`` divided by its largest entry, and that entry ``(*batch)``; zero rows stay zero."""
    size = v.abs().amax(-1)
    return v / nonzero(size)[..., None], size


def nonzero(a: Tensor) -> Tensor:
    return torch.where(a == 0, 1.0, a)
