"""Pairs that are exactly stationary, near points that are not."""

import pytest
import torch

import flowsim as fs
from flowsim.diagnostics.stationarity import Stationarity

NET, W0 = fs.data.peers_net(5, 10, 10, seed=0)
NORMS = [
    fs.L1(),
    fs.L2(),
    fs.Linf(),
    fs.Lp(3.0),
    fs.Mahalanobis(torch.linspace(0.5, 2, 60, dtype=torch.float64)),
    fs.modular(NET.layout),
    fs.Sum(fs.Nuclear()),
    fs.Euclidean({"W1": fs.Linf(), "W2": fs.L2()}),
]


@pytest.fixture(scope="module")
def slid():
    final = fs.simulate(NET, fs.SteepestFlow(fs.L2(), rtol=1e-2), W0, until=fs.lam([15.0])).final
    assert int(final.tallies["sliding"]) > 5
    return final


@pytest.mark.parametrize("norm", NORMS, ids=lambda n: n.name)
def test_the_nearby_pair_is_a_kkt_pair_within_the_promised_distance(norm, slid):
    at = Stationarity.of(NET, slid, norm)
    found, bound = at.nearby(), float((1 - at.alignment).sqrt())
    assert float(found.moved) <= bound * (1 + 1e-6)
    assert float(found.missed) <= bound * (1 + 1e-6)
    # k ∈ ∂½‖w‖²: both have the same size, and the pairing attains its square
    size, dual = float(at.norm.value(found.w)), float(at.norm.dual(found.force))
    assert size == pytest.approx(dual, rel=1e-5)
    assert float((found.w * found.force).sum()) == pytest.approx(size * dual, rel=1e-5)
    assert float(at.norm.value(found.w - at.w)) == pytest.approx(float(found.moved * at.size))
