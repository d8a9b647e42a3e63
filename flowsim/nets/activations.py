"""TODO."""

import torch
from torch import Tensor

from flowsim.kernels.reference import Activation


def _step(z: Tensor) -> Tensor:
    """1 where z > 0, else 0; in one pass, without truth values in between."""
    return torch.gt(z, 0, out=torch.empty_like(z))


relu = Activation("relu", 1, True, torch.relu, _step)


identity = Activation("identity", 1, False, lambda z: z, torch.ones_like)


squared_relu = Activation(
    "squared_relu", 2, False, lambda z: torch.relu(z).square(), lambda z: 2 * torch.relu(z)
)


square = Activation("square", 2, False, torch.square, lambda z: 2 * z)


def leaky_relu(slope: float = 0.01) -> Activation:
    """max(z, 0) + slope·min(z, 0), with 0 ≤ slope ≤ 1."""
    if not 0 <= slope <= 1:
        raise ValueError(f"leaky_relu: got slope {slope}, expected a number in [0, 1]")
    return Activation(
        f"leaky_relu({slope:g})",
        1,
        0 <= slope < 1,
        lambda z: torch.where(z > 0, z, slope * z),
        lambda z: torch.where(z > 0, torch.ones_like(z), slope),
    )
