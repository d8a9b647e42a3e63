"""Matrix games between a ball and rows: certificates by plain numpy, solvers, edge cases."""

import math
import sys

import numpy as np
import pytest
import torch

import flowsim as fs
from flowsim.convex.games import cone_program, game, nearest_by_products
from flowsim.layout import lay_out

FIXTURE = np.array([[3.0, 1, 0], [1, -2, 2], [1, 2, 1]])
A = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
WEIGHTS = torch.linspace(0.5, 3, 24, dtype=torch.float64)
NORMS = {"l1": fs.L1(), "linf": fs.Linf(), "l2": fs.L2(), "mahalanobis": fs.Mahalanobis(WEIGHTS)}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def separable(m, d, seed):
    z = randn(m, d, seed=seed).numpy()
    return z * np.sign(z @ randn(d, seed=seed + 1).numpy())[:, None]


def singular(v, shape):
    return np.linalg.svd(np.reshape(v, shape), compute_uv=False)


@pytest.mark.parametrize("name", ["l2", "mahalanobis"])
def test_inner_products_do_as_well_as_the_metric(name):
    Z = separable(20, 24, 101)
    one, other = game(Z, NORMS[name]), game(Z, NORMS[name], nearest_by_products)
    assert other.margin == pytest.approx(one.margin, rel=1e-7)
    assert 0 <= other.gap + 1e-12 <= 1e-7


TWO = lay_out({"W": (2, 3), "b": (4,)})


def nuclear(g):
    return singular(g, (2, 3)).sum()


BLOCKS = {
    "max": (
        fs.Max({"W": fs.Spectral(), "b": fs.L2()}, {"b": 2.0}),
        lambda g: nuclear(g[:6]) + 2 * np.linalg.norm(g[6:]),
    ),
    "sum": (
        fs.Sum({"W": fs.Spectral(), "b": fs.Linf()}, {"W": 0.5}),
        lambda g: max(0.5 * nuclear(g[:6]), np.abs(g[6:]).sum()),
    ),
    "euclidean": (
        fs.Euclidean({"W": fs.Nuclear(), "b": fs.L1()}),
        lambda g: math.hypot(singular(g[:6], (2, 3)).max(), np.abs(g[6:]).max()),
    ),
    "quadratic": (
        fs.Euclidean(fs.L2(), {"W": 3.0}),
        lambda g: math.hypot(3 * np.linalg.norm(g[:6]), np.linalg.norm(g[6:])),
    ),
    "mixed": (
        fs.Max({"W": fs.Lp(4.0), "b": fs.Mahalanobis(torch.arange(1.0, 5.0).double())}),
        lambda g: np.linalg.norm(g[:6], 4 / 3) + math.sqrt(g[6:] @ (g[6:] / np.arange(1, 5))),
    ),
}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("seed", [0, 1])
def test_certificates_of_block_norms(name, seed):
    norm, dual = BLOCKS[name]
    Z, bound = separable(9, 10, 10 * seed), norm.bind(TWO)
    found = game(Z, bound)
    assert dual(found.p @ Z) == pytest.approx(found.bound, rel=1e-12)
    assert float(bound.value(torch.from_numpy(found.w))) == pytest.approx(1, abs=1e-12)
    assert -1e-12 <= found.gap <= 1e-6 * found.margin
    assert (Z @ found.w).min() == pytest.approx(found.margin, abs=1e-13)


@pytest.mark.parametrize("name", ["l1", "linf", "l2", "mahalanobis"])
@pytest.mark.parametrize(("m", "seed"), [(6, 0), (20, 1), (30, 2), (40, 3)])
def test_solvers_agree(name, m, seed):
    """HiGHS and nnls against Clarabel, in dimension 24."""
    norm, Z = NORMS[name], separable(m, 24, 100 + seed)
    one, other = game(Z, norm), game(Z, norm, cone_program)
    assert other.margin == pytest.approx(one.margin, rel=1e-7)
    np.testing.assert_allclose(other.w, one.w, atol=2e-4)
    for found in (one, other):
        assert -1e-12 <= found.gap <= 1e-7


@pytest.mark.parametrize("scale", [1e-100, 1e-8, 1e8, 1e100])
@pytest.mark.parametrize("norm", [fs.L1(), fs.L2(), fs.Linf(), fs.Lp(3.0)], ids=lambda n: n.name)
def test_the_scale_of_data_is_the_scale_of_the_margin(norm, scale):
    assert game(scale * FIXTURE, norm).margin == pytest.approx(
        scale * game(FIXTURE, norm).margin, rel=1e-8
    )


def test_a_mahalanobis_margin_is_an_l2_margin_in_its_own_coordinates():
    Z = separable(7, 2, 3)
    root = np.linalg.cholesky(A.numpy())
    straight = game(Z @ np.linalg.inv(root).T, fs.L2())
    assert game(Z, fs.Mahalanobis(A)).margin == pytest.approx(straight.margin, rel=1e-12)


@pytest.mark.parametrize("norm", [fs.L1(), fs.L2(), fs.Linf(), fs.Lp(3.0)], ids=lambda n: n.name)
@pytest.mark.parametrize(
    "rows", [[[1, 2], [-1, -2]], [[0, 0], [1, 0]], [[0.1, 0.3], [0.2, 0.6], [-0.1, -0.3]]]
)
def test_contradictions_and_empty_examples_are_not_separated(norm, rows):
    found = game(rows, norm)
    assert not found.separated
    assert found.bound <= 1e-9


@pytest.mark.parametrize("norm", [fs.L1(), fs.L2(), fs.Linf()], ids=lambda n: n.name)
@pytest.mark.parametrize("margin", [1e-3, 1e-6, 1e-9])
def test_small_margins_are_separated_or_left_open_by_the_bound(norm, margin):
    """Two nearly opposite rows with the largest margin ``margin`` in every norm; never a claim that
    is false."""
    found = game([[1, margin], [-1, margin]], norm)
    assert found.margin <= margin * (1 + 1e-6)
    assert found.bound >= margin * (1 - 1e-6)
    if margin > 1e-8:
        assert found.margin == pytest.approx(margin, rel=1e-6)


def test_a_missing_cvxpy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cvxpy", None)
    with pytest.raises(ImportError, match=r"pip install flowsim\[convex\]"):
        game(FIXTURE, fs.Lp(3.0))
    assert game(FIXTURE, fs.L1()).separated
