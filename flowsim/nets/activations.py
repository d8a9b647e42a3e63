"""The scalar functions φ between layers, positively homogeneous."""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from flowsim.kernels.reference import Activation


def leaky_relu(slope: float = 0.01) -> Activation:
    """max(z, 0) + slope·min(z, 0), with 0 ≤ slope ≤ 1."""
    if not 0 <= slope <= 1:
        raise ValueError(f"leaky_relu: got slope {slope}, expected a number in [0, 1]")
    name = f"leaky_relu({slope:g})"
    value = partial(functional.leaky_relu, negative_slope=slope)
    step = partial(_leaky_step, slope)
    return Activation(name, 1, slope < 1, value, step)


def _step(z: Tensor) -> Tensor:
    """1 where z > 0, else 0; in one pass, without truth values in between."""
    return torch.gt(z, 0, out=torch.empty_like(z))


def _leaky_step(slope: float, z: Tensor) -> Tensor:
    return torch.where(z > 0, torch.ones_like(z), slope)


def _same(z: Tensor) -> Tensor:
    return z


def _squared_relu(z: Tensor) -> Tensor:
    return torch.relu(z).square()


def _twice_relu(z: Tensor) -> Tensor:
    return 2 * torch.relu(z)


def _twice(z: Tensor) -> Tensor:
    return 2 * z


relu = Activation("relu", 1, True, torch.relu, _step)
identity = Activation("identity", 1, False, _same, torch.ones_like)
squared_relu = Activation("squared_relu", 2, False, _squared_relu, _twice_relu)
square = Activation("square", 2, False, torch.square, _twice)
