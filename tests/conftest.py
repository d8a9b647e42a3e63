"""What tests of several rooms share."""

import os
import sys

import pytest

import flowsim as fs

os.environ.setdefault("MPLBACKEND", "Agg")  # figures are drawn, and no window opens


@pytest.fixture(autouse=True)
def _figures_closed():
    yield
    if pyplot := sys.modules.get("matplotlib.pyplot"):
        pyplot.close("all")


@pytest.fixture(scope="session")
def runs() -> dict[str, fs.Trajectory]:
    """Small steps of a two-layer net in ℓ2 and ℓ∞, three trajectories each, to a loss of e^-400."""
    x, y = fs.data.gaussian_separable(12, 4, margin=0.3, seed=0)
    net = fs.MLP([4, 6, 1])
    problem = fs.Problem(net, x, y, fs.exponential)
    observe = fs.diagnostics.standard(problem)
    w0 = net.init(range(3), scale=0.5)
    rules = {"ℓ2 small": fs.SmallStep(fs.L2(), 0.2), "ℓ∞ small": fs.SmallStep(fs.Linf(), 0.2)}
    return {
        k: fs.simulate(problem, r, w0, until=fs.lam(400, saves=30), observe=observe)
        for k, r in rules.items()
    }
