"""Products that round alike in any batch; decompositions where a bad row spoils only itself."""

import pytest
import torch

from flowsim.numerics.batched import (
    bmm,
    bmm_one_by_one,
    dot,
    eigh,
    from_svd,
    rows_times,
    singular_values,
    svd,
)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("n", "m"), [(1, 7), (7, 1), (1, 1), (5, 6)])
def test_a_product_alone_is_that_of_the_batch(n, m):
    a, b = draw(1, 3, n, 40), draw(2, 3, 40, m)
    for product in (bmm, bmm_one_by_one):
        together = product(a, b)
        torch.testing.assert_close(together, torch.einsum("bnk,bkm->bnm", a, b))
        assert torch.equal(product(a[1:2], b[1:2])[0], together[1])


def test_a_row_alone_is_rounded_as_among_others():
    v, matrix = draw(1, 2, 3, 30), draw(2, 30, 20)
    together = rows_times(v, matrix)
    torch.testing.assert_close(together, torch.einsum("abk,km->abm", v, matrix))
    torch.testing.assert_close(rows_times(v[1, 2], matrix), together[1, 2], rtol=1e-15, atol=1e-14)
    torch.testing.assert_close(dot(v, v), v.square().sum(-1))


def test_decompositions_put_matrices_together_again():
    w = draw(1, 4, 3, 5)
    u, s, v = svd(w)
    torch.testing.assert_close(from_svd(u, s, v), w.flatten(-2))
    torch.testing.assert_close(singular_values(w), s)
    square = w @ w.mT
    values, vectors = eigh(square)
    torch.testing.assert_close(vectors @ torch.diag_embed(values) @ vectors.mT, square)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_matrix_spoils_only_itself(bad):
    w = draw(1, 3, 4, 4)
    w = w + w.mT
    spoilt = w.clone()
    spoilt[1, 0, 0] = bad
    for part, whole in zip(svd(spoilt), svd(w), strict=True):
        assert part[1].isnan().all()
        torch.testing.assert_close(part[[0, 2]], whole[[0, 2]])
    assert singular_values(spoilt)[1].isnan().all()
    assert eigh(spoilt)[0][1].isnan().all()
    assert torch.equal(eigh(spoilt)[0][2], eigh(w)[0][2])
