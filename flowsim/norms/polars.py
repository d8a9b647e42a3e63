"""The dual of a norm as a norm itself, and with it the subgradients of a norm.

`polar` of a norm ‖·‖ is the norm P with ``P.value = ‖·‖_*`` and ``P.dual = ‖·‖``. Its steepest
directions at w are the subgradients of ‖·‖ there,

    ∂‖w‖ = argmax { ⟨n, w⟩ : ‖n‖_* ≤ 1 } = P.face(w),

so that everything that is known about faces serves the KKT conditions, in which ∂½‖w‖² = ‖w‖ ∂‖w‖
stands."""

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from flowsim.norms.blocks import Euclidean, Max, Sum
from flowsim.norms.matrix import Nuclear, Schatten, Spectral
from flowsim.norms.norm import Norm
from flowsim.norms.vector import L1, L2, Frobenius, Linf, Lp, Mahalanobis


def polar(norm: Norm) -> Norm:
    """The norm whose value is the dual norm of ``norm``. Raises ValueError for norms that are not
    the package's.

    >>> polar(L1()), polar(Lp(3.0))
    (Linf(), Lp(p=1.5))
    """
    match norm:
        case L2() | Frobenius():
            return norm
        case L1():
            return Linf()
        case Linf():
            return L1()
        case Lp():
            return Lp(norm.q)
        case Mahalanobis():
            inverse = torch.linalg.inv(norm.matrix) if norm.matrix.ndim == 2 else 1 / norm.matrix
            return Mahalanobis((inverse + inverse.mT) / 2 if inverse.ndim == 2 else inverse)
        case Spectral():
            return Nuclear(shape=norm.shape)
        case Nuclear():
            return Spectral(shape=norm.shape)
        case Schatten():
            return Schatten(norm.p / (norm.p - 1), shape=norm.shape)
        case Max() | Sum() | Euclidean():
            return _of_blocks(norm)
    raise ValueError(
        f"got the norm {norm.name!r}, expected one whose dual flowsim knows, try L2(), Linf(), Spectral(), Max(...)"
    )


def _of_blocks(norm: Max | Sum | Euclidean) -> Norm:
    """max ‖W_l‖/c_l and Σ c_l‖G_l‖_* are dual to each other, and so are the square sums."""
    parts = (
        polar(norm.parts)
        if isinstance(norm.parts, Norm)
        else {k: polar(part) for k, part in norm.parts.items()}
    )
    scales = {name: 1 / scale for name, scale in (norm.scales or {}).items()}
    bound = tuple(replace(p, norm=polar(p.norm), scale=1 / p.scale) for p in norm._bound)
    kinds: dict[type, Callable[..., Norm]] = {Max: Sum, Sum: Max, Euclidean: Euclidean}
    return kinds[type(norm)](parts, scales or None, _bound=bound)


def smoothness(norm: Norm) -> float:
    """The least known c for which the gradient of ½‖·‖² is c-Lipschitz from ‖·‖ to ‖·‖_*; infinity
    where it is none.

    1 in quadratic norms, p − 1 in ℓp and Schatten norms with p ≥ 2 (Ball, Carlen and Lieb 1994).
    ½‖·‖² is not smooth in the other norms."""
    match norm:
        case _ if norm.quadratic:
            return 1.0
        case Lp() | Schatten():
            return norm.p - 1 if norm.p >= 2 else math.inf
        case Euclidean():
            return max(smoothness(part) for part in norm._norms())
    return math.inf
