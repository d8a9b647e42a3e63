"""Multipliers of attracting kinks: saddle points of every kind of norm."""

import pytest
import torch

from flowsim.norms.vector import L1, L2, Linf, Lp, Mahalanobis
from flowsim.velocity.multipliers import AttractingKinks, least_dual_norm


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


ROOT = randn(6, 6, seed=9)
NORMS = [L1(), L2(), Linf(), Lp(3.0), Mahalanobis(ROOT @ ROOT.mT + torch.eye(6).double())]


def kinks(seed):
    return AttractingKinks(
        randn(6, seed=seed),
        randn(4, 6, seed=seed + 1),
        randn(4, seed=seed + 2).abs(),
        torch.arange(4),
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("norm", NORMS, ids=lambda n: n.name)
def test_the_dual_norm_is_the_slope_of_a_steepest_direction(norm, seed):
    here = kinks(10 * seed)
    D, u = least_dual_norm(norm, here)
    least = norm.dual(here.gradient(D))
    assert ((D >= 0) & (D <= 1)).all()
    assert float(norm.value(u)) == pytest.approx(1, abs=1e-8)
    assert float(here.slope(u)) == pytest.approx(float(least), rel=1e-8)
    for other in range(40):
        size = 10.0 ** -(other % 4)
        near = (D + size * randn(4, seed=other)).clamp(0, 1)
        assert norm.dual(here.gradient(near)) >= least * (1 - 1e-9)
    slabs = here.respected(D)
    along = slabs.n @ u
    assert (along >= slabs.low - 1e-8).all()
    assert (along <= slabs.high + 1e-8).all()


def test_without_kinks_it_is_steepest():
    none = AttractingKinks(randn(6), randn(0, 6), randn(0), torch.arange(0))
    D, u = least_dual_norm(Linf(), none)
    assert len(D) == 0
    assert torch.equal(u, none.b.sign())
