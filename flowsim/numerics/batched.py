"""Batched products that round alike in any batch, and decompositions that survive rows of NaN."""

import torch
from jaxtyping import Float
from torch import Tensor


def bmm(a: Float[Tensor, "B n k"], b: Float[Tensor, "B k m"]) -> Float[Tensor, "B n m"]:
    """Batched product that adds up in the same order in any batch, so that batch-mates change an
    entry by little more than memory alignment does.

    BLAS gives a single product with one row or column to its matrix-vector routine, which adds up
    in another order than the batched one; so such a product is never sent alone."""
    if a.shape[0] == 1 and (a.shape[1] == 1 or b.shape[2] == 1):
        return torch.bmm(a.expand(2, -1, -1), b.expand(2, -1, -1))[:1]
    return torch.bmm(a, b)


def bmm_one_by_one(a: Float[Tensor, "B n k"], b: Float[Tensor, "B k m"]) -> Float[Tensor, "B n m"]:
    """`bmm` one trajectory at a time: for an inner dimension so long that threads share it, in
    another way in a batch than alone."""
    return torch.stack([left @ right for left, right in zip(a, b, strict=True)])


def rows_times(
    v: Float[Tensor, "*batch P"], matrix: Float[Tensor, "P Q"]
) -> Float[Tensor, "*batch Q"]:
    """v·matrix with every row rounded alike: BLAS adds up a single row in another order than
    several."""
    rows = v.reshape(-1, v.shape[-1])
    several = rows.expand(2, -1) if len(rows) == 1 else rows
    product = several @ matrix
    return product[: len(rows)].view(*v.shape[:-1], -1)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩ along the last axis."""
    return (a * b).sum(-1)


def svd(w: Float[Tensor, "*batch m n"]) -> tuple[Tensor, Tensor, Tensor]:
    """u ``(*batch, m, k)``, s ``(*batch, k)``, v ``(*batch, n, k)`` with ``w = u diag(s) vᵀ``; NaN
    where w is not finite."""
    clean, bad = _cleaned(w)
    u, s, vt = torch.linalg.svd(clean, full_matrices=False)
    return u + bad, s + bad[..., 0], vt.mT + bad


def from_svd(u: Tensor, s: Tensor, v: Tensor) -> Float[Tensor, "*batch mn"]:
    """u diag(s) vᵀ, flat."""
    return ((u * s[..., None, :]) @ v.mT).flatten(-2)


def singular_values(w: Float[Tensor, "*batch m n"]) -> Float[Tensor, "*batch k"]:
    """The singular values, falling; NaN where w is not finite."""
    clean, bad = _cleaned(w)
    return torch.linalg.svdvals(clean) + bad[..., 0]


def eigh(w: Float[Tensor, "*batch k k"]) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``(*batch, k)``, rising, and eigenvectors of symmetric matrices; values are NaN
    where w is not finite."""
    clean, bad = _cleaned(w)
    values, vectors = torch.linalg.eigh(clean)
    return values + bad[..., 0], vectors


def _cleaned(w: Tensor) -> tuple[Tensor, Tensor]:
    """The matrices with zeros for those that are not finite, and NaN there, 0 elsewhere, ``(*batch,
    1, 1)``: LAPACK refuses a whole batch for one such row."""
    fine = torch.isfinite(w).all(-1, keepdim=True).all(-2, keepdim=True)
    bad = torch.where(fine, 0.0, torch.nan).to(w)
    return torch.where(fine, w, 0.0), bad
