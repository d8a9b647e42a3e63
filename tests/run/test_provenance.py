"""What a run records of itself."""

import pytest
import torch

import flowsim as fs

X, Y = fs.data.gaussian_separable(15, 4, margin=0.5, seed=range(3))
SMOOTH = fs.MLP([4, 8, 1], activation=fs.squared_relu)
KINKED = fs.MLP([4, 8, 1], activation=fs.relu)


def problem(net, seeds=range(3)):
    return fs.Problem(net, X[list(seeds)], Y[list(seeds)], fs.exponential)


@pytest.fixture(scope="module")
def run():
    net = problem(KINKED)
    observe = {"entropy": fs.diagnostics.entropy, "margins": lambda p, s: p.margins(s.w)}
    rule, w0 = fs.SmallStep(fs.Linf()), KINKED.init(range(3))
    return fs.simulate(net, rule, w0, until=fs.lam(2.0, saves=7), observe=observe, max_steps=120)


def test_provenance_says_what_ran(run):
    record = run.provenance
    assert record["rule"] == repr(fs.SmallStep(fs.Linf()))
    assert record["flowsim"] == fs.__version__
    assert record["torch"] == torch.__version__
    assert (record["trajectories"], record["dtype"], record["device"]) == (3, "float64", "cpu")
    assert record["max_steps"] == 120
    assert record["objective"]["x"]["shape"] == [3, 15, 4]
    assert record["seconds"] > 0


def test_provenance_tells_data_and_weights_apart():
    def record(x, w0):
        p = fs.Problem(KINKED, x, Y, fs.exponential)
        return fs.simulate(p, fs.GradientDescent(0.1), w0, until=fs.steps(1)).provenance

    w = KINKED.init(range(3))
    base, data, weights = record(X, w), record(X + 1e-12, w), record(X, w + 1e-12)
    assert base["weights_sha256"] == data["weights_sha256"] != weights["weights_sha256"]
    assert base["objective"] == weights["objective"] != data["objective"]
