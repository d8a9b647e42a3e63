"""What users pass in, checked where it enters: "got …, expected …, try …".

`require_…` raises or returns nothing; its first argument says who asks, the options follow by name.
`as_…` gives the value in the form that the package works with.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor


def require_instance(owner: str, kind: Any, expected: str, **options: Any) -> None:
    """Raise TypeError where an option is no instance of ``kind``, which may be a union or a
    protocol; ``expected`` names it in words, with what to try.

    >>> require_instance("Flow", float, "a float, try 1.0", time="soon")
    Traceback (most recent call last):
    TypeError: Flow: got time='soon', expected a float, try 1.0
    """
    for name, value in options.items():
        # a class has the verbs of its protocol, but is none of its instances
        if isinstance(value, type) or not isinstance(value, kind):
            raise TypeError(f"{owner}: got {name}={value!r}, expected {expected}")


def require_callable(owner: str, expected: str, **options: Any) -> None:
    """Raise TypeError where an option cannot be called; ``expected`` names the function."""
    for name, value in options.items():
        if not callable(value):
            raise TypeError(f"{owner}: got {name}={value!r}, expected {expected}")


def require_flag(owner: str, **options: Any) -> None:
    """Raise TypeError where an option is neither True nor False."""
    require_instance(owner, bool, "True or False", **options)


def require_whole(owner: str, least: int = 1, **options: Any) -> None:
    """Raise ValueError where an option is not an integer ≥ ``least``."""
    for name, value in options.items():
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        if not whole or value < least:
            raise ValueError(f"{owner}: got {name}={value!r}, expected an integer ≥ {least}")


def require_finite(owner: str, **options: Any) -> None:
    """Raise ValueError where an option is not a finite number."""
    _require_number(owner, "a finite number, try 1.0", lambda value: True, options)


def is_finite(value: Any) -> bool:
    """Whether ``value`` is a finite number."""
    real = isinstance(value, Real) and not isinstance(value, bool)
    return real and math.isfinite(value)


def is_positive(value: Any) -> bool:
    """Whether ``value`` is a finite number > 0."""
    return is_finite(value) and value > 0


def require_positive(owner: str, **options: Any) -> None:
    """Raise ValueError where an option is not a finite number > 0."""
    _require_number(owner, "a finite number > 0", is_positive, options)


def require_not_negative(owner: str, **options: Any) -> None:
    """Raise ValueError where an option is not a finite number ≥ 0."""
    _require_number(owner, "a finite number ≥ 0", lambda value: value >= 0, options)


def require_fraction(owner: str, **options: Any) -> None:
    """Raise ValueError where an option is not in (0, 1), as a tolerance is."""
    _require_number(owner, "a number between 0 and 1", lambda value: 0 < value < 1, options)


def require_share(owner: str, **options: Any) -> None:
    """Raise ValueError where an option is not in [0, 1)."""
    _require_number(owner, "a number in [0, 1), try 0.9", lambda value: 0 <= value < 1, options)


def _require_number(
    owner: str, expected: str, holds: Callable[[Any], bool], options: dict[str, Any]
) -> None:
    for name, value in options.items():
        if not (is_finite(value) and holds(value)):
            raise ValueError(f"{owner}: got {name}={value!r}, expected {expected}")


def require_exponent(p: float, ends: str) -> None:
    """Raise ValueError where ``p`` is not in (1, ∞); ``ends`` are the norms at the ends."""
    if not 1 < p < math.inf:
        raise ValueError(f"got p = {p}, expected 1 < p < infinity, try {ends} for the ends")


def as_ladder(owner: str, ladder: Sequence[float]) -> tuple[float, ...]:
    """Steps, coarse to fine. Raises ValueError unless three or more fall towards 0."""
    steps = tuple(float(step) for step in ladder)
    falling = all(0 < b < a < math.inf for a, b in pairwise(steps))
    if len(steps) < 3 or not falling:
        raise ValueError(
            f"{owner}: got ladder={steps}, expected at least three falling steps, "
            "try (0.1, 0.05, 0.025)"
        )
    return steps


def require_weights(w: Tensor, size: int) -> None:
    """Raise where ``w`` is not ``(B, size)``, floating and finite."""
    if not isinstance(w, Tensor) or not w.is_floating_point():
        got = w.dtype if isinstance(w, Tensor) else type(w).__name__
        raise TypeError(
            f"weights: got {got}, expected a floating-point tensor, try net.init(seeds=range(3))"
        )
    shape = tuple(w.shape)
    if len(shape) != 2 or shape[1] != size or shape[0] == 0:
        raise ValueError(
            f"weights: got shape {shape}, expected (B, {size}), one row for each "
            "trajectory; try net.init(seeds=range(3)), or w[None] for a single one"
        )
    if not torch.isfinite(w).all():
        raise ValueError("weights: got NaN or infinite entries, expected finite numbers")


def as_tensor(value: Any, what: str) -> Tensor:
    """An array of real numbers as a tensor without a graph. Raises TypeError for anything else."""
    tensor = value if isinstance(value, Tensor) else _from_array(value, what)
    if tensor.is_complex():
        raise TypeError(f"{what}: got complex numbers, expected real ones")
    return tensor.detach()


def _from_array(value: Any, what: str) -> Tensor:
    try:
        array = np.array(value, order="C")
        return torch.from_numpy(array)
    except (TypeError, ValueError) as error:
        reason, *_ = str(error).split(". ")
        got = type(value).__name__
        raise TypeError(f"{what}: got {got} ({reason}), expected an array of numbers") from None


def as_floats(x: Tensor) -> Tensor:
    """Floating-point numbers as they are, others in double precision."""
    return x if x.is_floating_point() else x.double()
