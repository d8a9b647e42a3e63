"""What tests of several rooms share."""

import os
import sys

import numpy as np
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


@pytest.fixture(scope="session")
def agree():
    """A check that two states, tensors or arrays are equal to rounding, as batch-mates are promised
    to leave them: ``rel`` of the largest number of each, over a short run, but for the tensors of a
    state in ``but``. NaN is equal to NaN, and whole numbers are equal; with ``rel=0`` all are."""

    def check(got, expected, rel=1e-9, but=()):
        if isinstance(got, fs.State):
            got, expected = got.tensors(), expected.tensors()
            assert got.keys() == expected.keys()
            for name in got.keys() - set(but):
                near(name, np.asarray(got[name]), np.asarray(expected[name]), rel)
        else:
            near("", np.asarray(got), np.asarray(expected), rel)

    return check


def near(name, got, expected, rel):
    finite = np.abs(expected[np.isfinite(expected)])
    exact = rel == 0 or expected.dtype.kind in "bi"
    atol = 0 if exact else rel * finite.max(initial=0) + 1e-15
    np.testing.assert_allclose(got, expected, rtol=0, atol=atol, err_msg=name)
