"""The dual of a norm as a norm itself, and with it the subgradients of a norm.

`polar` of a norm ‖·‖ is the norm P with ``P.value = ‖·‖_*`` and ``P.dual = ‖·‖``. Its steepest
directions at w are the subgradients of ‖·‖ there,

    ∂‖w‖ = argmax { ⟨n, w⟩ : ‖n‖_* ≤ 1 } = P.face(w),

so that everything that is known about faces serves the KKT conditions, in which ∂½‖w‖² = ‖w‖ ∂‖w‖
stands."""

import math
from dataclasses import replace

import torch
from torch import Tensor

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
            return Mahalanobis(_inverse(norm.matrix))
        case Spectral():
            return Nuclear(shape=norm.shape)
        case Nuclear():
            return Spectral(shape=norm.shape)
        case Schatten():
            return Schatten(norm.p / (norm.p - 1), shape=norm.shape)
        case Max() | Sum() | Euclidean():
            return _of_blocks(norm)
    raise ValueError(
        f"got the norm {norm.name!r}, expected one whose dual flowsim knows, "
        "try L2(), Linf(), Spectral(), Max(...)"
    )


def _inverse(matrix: Tensor) -> Tensor:
    if matrix.ndim == 1:
        return 1 / matrix
    inverse = torch.linalg.inv(matrix)
    return (inverse + inverse.mT) / 2


def _of_blocks(norm: Max | Sum | Euclidean) -> Norm:
    """max ‖W_l‖/c_l and Σ c_l‖G_l‖_* are dual to each other, and so are the square sums."""
    if isinstance(norm.parts, Norm):
        parts: Norm | dict[str, Norm] = polar(norm.parts)
    else:
        parts = {name: polar(part) for name, part in norm.parts.items()}
    scales = {name: 1 / scale for name, scale in (norm.scales or {}).items()}
    blocks = tuple(replace(b, norm=polar(b.norm), scale=1 / b.scale) for b in norm.blocks)
    return _KINDS[type(norm)](parts, scales or None, blocks=blocks)


_KINDS: dict[type, type[Max | Sum | Euclidean]] = {Max: Sum, Sum: Max, Euclidean: Euclidean}


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
            return max(smoothness(part) for part in norm.norms)
    return math.inf
