"""TODO."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor


def root(
    f: Callable[[Tensor], Tensor],
    low: Tensor,
    high: Tensor,
    *,
    xtol: float = 0.0,
    ftol: Tensor | float = 0.0,
) -> Float[Tensor, "*batch"]:
    """The zero of a decreasing ``f`` from ``low`` to ``high``, elementwise; the nearer end if there
    is none.

    Inverse quadratic interpolation inside a bracket, else bisection (Chandrupatla 1997), to the
    last bits; or to ``xtol`` times the bracket, or until ``|f| <= ftol``.

    >>> root(lambda x: 2 - x**2, torch.tensor([0.0, 3.0]), torch.tensor([2.0, 4.0]))
    tensor([1.4142, 3.0000])
    """
    eps = torch.finfo(low.dtype).eps
    x1, x2 = low, high
    f1, f2 = f(low), f(high)
    x1, x2, f1, f2 = torch.broadcast_tensors(x1, x2, f1, f2)
    ends, end = (f1 <= ftol) | (f2 >= -ftol), torch.where(f1 <= ftol, x1, x2)
    atol = max(xtol, eps**2) * (x2 - x1).abs()
    best, done = end, ends
    t = torch.full_like(x1, 0.5)
    for _ in range(150):
        x = torch.where(done, best, x1 + t * (x2 - x1))
        fx = f(x)
        same = (fx > 0) == (f1 > 0)
        x3, f3 = torch.where(same, x1, x2), torch.where(same, f1, f2)
        x2, f2 = torch.where(same, x2, x1), torch.where(same, f2, f1)
        x1, f1 = x, fx
        best = torch.where(done, best, torch.where(f1.abs() < f2.abs(), x1, x2))
        least = (2 * eps * best.abs() + atol) / (x2 - x1).abs()
        done = done | ~(least < 0.5) | (f1.abs() <= ftol)
        if bool(done.all()):
            break
        xi, phi = (x1 - x2) / (x3 - x2), (f1 - f2) / (f3 - f2)
        smooth = (phi**2 < xi) & ((1 - phi) ** 2 < 1 - xi)
        guess = f1 / (f2 - f1) * f3 / (f2 - f3) + (x3 - x1) / (x2 - x1) * f1 / (f3 - f1) * f2 / (
            f3 - f2
        )
        t = torch.where(smooth, guess, 0.5).maximum(least).minimum(1 - least)
    return best
