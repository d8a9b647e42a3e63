r"""A quadratic over a product of simplices: which unknowns are positive at its minimum.

    minimise ½ xᵀHx + cᵀx   over x ≥ 0, Σ x = 1 in each group.

The method of active sets ends with the set itself, to rounding, after finitely many steps. Of a
convex set that is known by its projection only, `admm` finds the minimum as a point."""

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray as Array
from scipy.linalg import cho_factor, cho_solve

_Vector = Float[Array, " m"]
_Set = Bool[Array, " m"]
_Index = Int[Array, " m"]


def positive_at_minimum(
    H: Float[Array, "m m"], c: _Vector, group: _Index, x: _Vector, used: _Set
) -> _Set:
    """Which x are positive at the minimum, from a mixture ``x`` of those that are ``used``; of the
    others the one that improves most is added at a time. Groups are numbered from 0."""
    used = used.copy()
    for _ in range(20 + 10 * len(x)):
        base = _largest(x, used, group)
        goal = _minimum_on(used, base, H, c)
        if (goal[used] >= 0).all():
            slope = H @ goal + c
            excess = slope - slope[base]
            excess[used] = 0
            rounding = 1e-11 * np.abs(H).max(initial=0.0)
            if excess.min(initial=0.0) >= -rounding:
                break
            x = goal
            used[excess.argmin()] = True
        else:
            falling = np.flatnonzero(used & (goal < 0))
            held = x[falling]
            reach = held / (held - goal[falling])
            x = x + reach.min() * (goal - x)
            x = np.maximum(x, 0)
            used[falling[reach.argmin()]] = False
            x[~used] = 0
    return used


def _largest(x: _Vector, used: _Set, group: _Index) -> _Index:
    """The largest that is used, of the group of each unknown."""
    order = np.lexsort((-x, ~used, group))
    begins = np.diff(group[order], prepend=-1)
    first = np.flatnonzero(begins)
    return order[first][group]


def _minimum_on(used: _Set, base: _Index, H: Float[Array, "m m"], c: _Vector) -> _Vector:
    """The minimum over the x that are used, of either sign; each group's base takes what the others
    leave."""
    is_base = base == np.arange(len(base))
    others = np.flatnonzero(used & ~is_base)
    b = base[others]
    x = np.zeros(len(base))
    x[base] = 1
    slope = H @ x + c
    # the Hessian along the differences e_i − e_b
    K = H[others] - H[b]
    K = K[:, others] - K[:, b]
    y = _solve(K, slope[b] - slope[others])
    x[others] = y
    np.subtract.at(x, b, y)
    return x


def _solve(K: Float[Array, "k k"], r: Float[Array, " k"]) -> Float[Array, " k"]:
    try:
        root = cho_factor(K, check_finite=False)
        return cho_solve(root, r, check_finite=False)
    except np.linalg.LinAlgError:
        return np.linalg.lstsq(K, r, rcond=None)[0]
