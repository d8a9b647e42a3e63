"""Norms of vectors: closed forms, isometries, names, and what is refused."""

import numpy as np
import pytest
import torch

from flowsim.norms.vector import L1, L2, Frobenius, Linf, Lp, Mahalanobis
from tests.oracles.norm_cases import BLOCKS, assert_close, dot, spd, uniform


@pytest.mark.parametrize("p", [1.0, 1.1, 1.5, 2.0, 3.0, 40.0, np.inf])
def test_lp(p):
    norm = {1.0: L1(), 2.0: L2(), np.inf: Linf()}.get(p) or Lp(p)
    g = uniform(5, 7)
    q = {1.0: np.inf, np.inf: 1.0}.get(p) or p / (p - 1)
    assert_close(norm.value(g), torch.from_numpy(np.linalg.norm(g.numpy(), p, axis=-1)))
    assert_close(norm.dual(g), torch.from_numpy(np.linalg.norm(g.numpy(), q, axis=-1)))


@pytest.mark.parametrize("p", [1.1, 1.5, 2.0, 3.0, 40.0])
def test_the_steepest_direction_of_lp_is_that_of_hoelder(p):
    """u ∝ sign g |g|^{q−1} with ‖u‖_p = 1, where Hölder's inequality is an equality."""
    g = uniform(5, 7)
    followed = g.sign() * g.abs() ** (p / (p - 1) - 1)
    length = torch.from_numpy(np.linalg.norm(followed.numpy(), p, axis=-1))
    assert_close(Lp(p).steepest(g), followed / length[:, None])


def test_mahalanobis():
    a, g = spd(6), uniform(5, 6)
    for norm, dense in ((Mahalanobis(a), a), (Mahalanobis(a.diagonal()), a.diagonal().diag())):
        solved = torch.linalg.solve(dense, g.T).T
        assert_close(norm.value(g), torch.einsum("bi,ij,bj->b", g, dense, g).sqrt())
        assert_close(norm.dual(g), dot(g, solved).sqrt())
        assert_close(norm.steepest(g), solved / dot(g, solved).sqrt()[:, None])


def test_ties_are_broken_as_documented():
    g = torch.tensor([[-2.0, 2.0, 0.0], [0.0, -1.0, -1.0]])
    assert L1().steepest(g).tolist() == [[-1, 0, 0], [0, -1, 0]]
    assert Linf().steepest(g).tolist() == [[-1, 1, 0], [0, -1, -1]]


@pytest.mark.parametrize("norm", [L1(), L2(), Linf(), Lp(3), Lp(1.5)], ids=lambda n: n.name)
def test_signed_permutations(norm):
    g = uniform(4, 8)
    order, sign = (
        torch.randperm(8, generator=torch.Generator().manual_seed(0)),
        uniform(8).sign(),
    )
    assert_close(norm.value((sign * g)[:, order]), norm.value(g))
    assert_close(norm.steepest((sign * g)[:, order]), (sign * norm.steepest(g))[:, order])


def test_vector_norms_need_no_layout():
    for norm in (L1(), L2(), Linf(), Lp(3), Frobenius()):
        assert norm.bind(BLOCKS) is norm


@pytest.mark.parametrize("p", [1, 0.5, np.inf, np.nan])
def test_exponents(p):
    with pytest.raises(ValueError, match=r"expected 1 < p < infinity, try L1\(\) or Linf\(\)"):
        Lp(p)


@pytest.mark.parametrize(
    ("matrix", "match"),
    [
        (torch.ones(2, 3), r"got a matrix of shape \(2, 3\)"),
        (torch.ones(2, 2, 2), "got a matrix of shape"),
        (torch.tensor([1.0, torch.nan]), "not finite"),
        (torch.tensor([[1.0, 0.5], [0.4, 1.0]]), "asymmetry 0.1"),
        (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), "eigenvalues from -1 to 3"),
        (torch.ones(3, 3), "expected a positive definite one"),
        (torch.tensor([1.0, 0.0]), "eigenvalues from 0 to 1"),
    ],
)
def test_mahalanobis_matrices(matrix, match):
    with pytest.raises(ValueError, match=match):
        Mahalanobis(matrix)


def test_mahalanobis_of_another_size():
    with pytest.raises(ValueError, match="for 6 weights and a layout with 23"):
        Mahalanobis(spd(6)).bind(BLOCKS)


def test_names():
    norms = [L1(), L2(), Linf(), Lp(3), Lp(1.5), Mahalanobis(spd(2)), Frobenius()]
    names = ["l1", "l2", "linf", "l3", "l1.5", "mahalanobis", "frobenius"]
    assert [norm.name for norm in norms] == names
    assert Linf().symbol == r"$\ell_\infty$"
