"""TODO."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor


def check_exponent(p: float, ends: str) -> None:
    if not 1 < p < math.inf:
        raise ValueError(f"got p = {p}, expected 1 < p < infinity, try {ends} for the ends")


def check_row_weights(w: Tensor, size: int) -> None:
    """Raise where ``w`` is not ``(B, size)``, floating and finite."""
    if not isinstance(w, Tensor) or not w.is_floating_point():
        got = w.dtype if isinstance(w, Tensor) else type(w).__name__
        raise TypeError(
            f"weights: got {got}, expected a floating-point tensor, try net.init(seeds=range(3))"
        )
    if w.ndim != 2 or w.shape[1] != size or w.shape[0] == 0:
        raise ValueError(
            f"weights: got shape {tuple(w.shape)}, expected (B, {size}), one row for each trajectory; "
            "try net.init(seeds=range(3)), or w[None] for a single one"
        )
    if not torch.isfinite(w).all():
        raise ValueError("weights: got NaN or infinite entries, expected finite numbers")


def as_tensor(value: Any, what: str) -> Tensor:
    """An array of real numbers as a tensor."""
    try:
        tensor = (
            value if isinstance(value, Tensor) else torch.from_numpy(np.array(value, order="C"))
        )
    except (TypeError, ValueError) as error:
        reason = str(error).split(". ")[0]
        raise TypeError(
            f"{what}: got {type(value).__name__} ({reason}), expected an array of numbers"
        ) from None
    if tensor.is_complex():
        raise TypeError(f"{what}: got complex numbers, expected real ones")
    return tensor.detach()


def as_floats(x: Tensor) -> Tensor:
    """Floating-point numbers as they are, others in double precision."""
    return x if x.is_floating_point() else x.double()


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def require_positive(rule: str, **options: Any) -> None:
    """Raise where an option is not a finite number > 0."""
    for name, value in options.items():
        if not _positive(value):
            raise ValueError(f"{rule}: got {name}={value!r}, expected a finite number > 0")


def require_share(rule: str, **options: Any) -> None:
    """Raise where an option is not in [0, 1)."""
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            raise ValueError(f"{rule}: got {name}={value!r}, expected a number in [0, 1), try 0.9")


def require_not_negative(rule: str, **options: Any) -> None:
    """Raise where an option is not a finite number ≥ 0."""
    for name, value in options.items():
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not 0 <= value < math.inf
        ):
            raise ValueError(f"{rule}: got {name}={value!r}, expected a finite number ≥ 0")
