"""Batched products that round alike in any batch, and decompositions that survive rows of NaN."""

import torch
from torch import Tensor

from flowsim.numerics.shapes import Matrices, Vectors


def bmm(a: Matrices, b: Matrices) -> Matrices:
    """Batched product of a ``(B, n, k)`` and b ``(B, k, m)`` that adds up in the same order in any
    batch, so that batch-mates change an entry by little more than memory alignment does.

    BLAS gives a single product with one row or column to its matrix-vector routine, which adds up
    in another order than the batched one; so such a product is never sent alone."""
    B, n, _ = a.shape
    _, _, m = b.shape
    if B == 1 and 1 in (n, m):
        a = a.expand(2, -1, -1)
        b = b.expand(2, -1, -1)
        return torch.bmm(a, b)[:1]
    return torch.bmm(a, b)


def bmm_one_by_one(a: Matrices, b: Matrices) -> Matrices:
    """`bmm` one trajectory at a time: for an inner dimension so long that threads share it, in
    another way in a batch than alone."""
    pairs = zip(a, b, strict=True)
    products = [left @ right for left, right in pairs]
    return torch.stack(products)


def rows_times(v: Vectors, matrix: Tensor) -> Vectors:
    """v·matrix with every row rounded alike: BLAS adds up a single row in another order than
    several. v ``(*batch, P)``, matrix ``(P, Q)``."""
    rows = v.reshape(-1, v.shape[-1])
    several = rows
    if len(rows) == 1:
        several = rows.expand(2, -1)
    product = several @ matrix
    own = product[: len(rows)]
    return own.view(*v.shape[:-1], -1)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩ along the last axis."""
    return (a * b).sum(-1)


def svd(w: Matrices) -> tuple[Tensor, Tensor, Tensor]:
    """u ``(*batch, m, k)``, s ``(*batch, k)``, v ``(*batch, n, k)`` with ``w = u diag(s) vᵀ``; NaN
    where w is not finite."""
    clean, bad = _cleaned(w)
    u, s, vt = torch.linalg.svd(clean, full_matrices=False)
    s = s + bad[..., 0]
    v = vt.mT + bad
    return u + bad, s, v


def from_svd(u: Tensor, s: Tensor, v: Tensor) -> Vectors:
    """u diag(s) vᵀ, flat."""
    stretched = u * s[..., None, :]
    w = stretched @ v.mT
    return w.flatten(-2)


def singular_values(w: Matrices) -> Vectors:
    """The singular values, falling; NaN where w is not finite."""
    clean, bad = _cleaned(w)
    s = torch.linalg.svdvals(clean)
    return s + bad[..., 0]


def eigh(w: Matrices) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``(*batch, k)``, rising, and eigenvectors of symmetric matrices; values are NaN
    where w is not finite."""
    clean, bad = _cleaned(w)
    values, vectors = torch.linalg.eigh(clean)
    values = values + bad[..., 0]
    return values, vectors


def _cleaned(w: Matrices) -> tuple[Tensor, Tensor]:
    """The matrices with zeros for those that are not finite, and NaN there, 0 elsewhere, ``(*batch,
    1, 1)``: LAPACK refuses a whole batch for one such row."""
    entries = torch.isfinite(w)
    finite = entries.all((-2, -1), keepdim=True)
    clean = torch.where(finite, w, 0.0)
    bad = torch.where(finite, 0.0, torch.nan)
    return clean, bad.to(w)
