"""Numbers of a run ``(K, B)``, a row for each save and a column for each trajectory; NaN where they
are not known."""

from typing import TypeAlias

import numpy as np
from jaxtyping import Float
from numpy import ndarray as Array
from torch import Tensor

Series: TypeAlias = Float[Array, "K B"]
"""A number of each trajectory at each save."""

Column: TypeAlias = Float[Array, " B"]
"""A number of each trajectory."""


def as_array(tensor: Tensor) -> Array:
    """Its numbers in double precision, apart from its device and graph."""
    return tensor.detach().cpu().double().numpy()


def positive(values: Array) -> Array:
    """The values, and NaN where they are not positive."""
    return np.where(values > 0, values, np.nan)


def falls(values: Series) -> Float[Array, "K-1 B"]:
    """Relative falls of positive numbers from row to row: 0 where they rise."""
    before = values[:-1]
    after = values[1:]
    fall = 1 - after / before
    return np.maximum(fall, 0.0)


def changes(values: Series) -> Float[Array, "K-1 B"]:
    """Each row less the one before."""
    return np.diff(values, axis=0)


def peak(values: Series) -> Column:
    """Each column's largest known value."""
    return np.fmax.reduce(values, axis=0, initial=np.nan)


def last(values: Series) -> Column:
    """Each column's last known value."""
    known = ~np.isnan(values)
    behind = known[::-1].argmax(0)
    row = len(values) - 1 - behind
    found = np.take_along_axis(values, row[None], 0)
    return found[0]


def risen(values: Series) -> Column:
    """How much each column has risen from its first value to its last known one."""
    return last(values) - values[0]
