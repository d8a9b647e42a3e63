"""Lengths and directions of vectors of any representable size: no square under- or overflows."""

import math

import torch
from torch import Tensor

from flowsim.numerics.shapes import PerVector, Vectors


def lengths(v: Tensor) -> PerVector:
    """The Euclidean norm.

    >>> lengths(torch.tensor([[3.0, 4.0], [3e-30, 4e-30]]))
    tensor([5.0000e+00, 5.0000e-30])
    """
    plain = torch.linalg.vector_norm(v, dim=-1)
    if bool(_sound(plain).all()):
        return plain
    u, exponent = _near_one(v)
    length = torch.linalg.vector_norm(u, dim=-1)
    return torch.ldexp(length, exponent)


def unit(v: Tensor) -> Vectors:
    """``v`` over its Euclidean norm; zero rows stay zero."""
    plain = torch.linalg.vector_norm(v, dim=-1)
    if not bool(_sound(plain).all()):
        v, _ = _near_one(v)
        plain = torch.linalg.vector_norm(v, dim=-1)
    return v / nonzero(plain)[..., None]


def scaled(v: Tensor) -> tuple[Tensor, Tensor]:
    """``v`` divided by its largest entry, and that entry ``(*batch)``; zero rows stay zero."""
    largest = v.abs().amax(-1)
    u = v / nonzero(largest)[..., None]
    return u, largest


def nonzero(a: Tensor) -> Tensor:
    """``a`` as a divisor: 1 in the place of 0."""
    return torch.where(a == 0, 1.0, a)


def _sound(plain: Tensor) -> Tensor:
    """Where no square that matters has under- or overflowed."""
    tiny = torch.finfo(plain.dtype).tiny ** 0.25
    return (plain > tiny) & (plain < 1 / tiny)


def _near_one(v: Tensor) -> tuple[Tensor, Tensor]:
    """v over a power of two, which changes no digit, with entries up to 1; and the power, for
    `ldexp`."""
    limit = math.log2(torch.finfo(v.dtype).max) - 1
    largest = v.abs().amax(-1)
    exponent = torch.frexp(largest).exponent.clamp(-limit, limit)
    exponent = exponent.to(v)  # of an integer, `ldexp` takes the power in single precision
    u = torch.ldexp(v, -exponent[..., None])
    return u, exponent
