"""Numbers of a run ``(K, B)``, a row for each save and a column for each trajectory; NaN where they
are not known."""

import numpy as np
from jaxtyping import Float
from numpy import ndarray as Array


def positive(values: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The values, and NaN where they are not positive."""
    return np.where(values > 0, values, np.nan)


def falls(values: Float[Array, "K B"]) -> Float[Array, "K-1 B"]:
    """Relative falls of positive numbers from row to row: 0 where they rise."""
    return np.maximum(1 - values[1:] / values[:-1], 0.0)


def peak(values: Float[Array, "K B"]) -> Float[Array, " B"]:
    """Each column's largest known value."""
    return np.fmax.reduce(values, axis=0, initial=np.nan)


def last(values: Float[Array, "K B"]) -> Float[Array, " B"]:
    """Each column's last known value."""
    row = len(values) - 1 - (~np.isnan(values))[::-1].argmax(0)
    return np.take_along_axis(values, row[None], 0)[0]


def risen(values: Float[Array, "K B"]) -> Float[Array, " B"]:
    """How much each column has risen from its first value to its last known one."""
    return last(values) - values[0]
