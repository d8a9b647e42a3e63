"""TODO."""

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
