"""Pictures of a single trajectory: what is drawn, not how it looks."""

from dataclasses import replace

import numpy as np
import pytest

import flowsim as fs
from flowsim import plots


@pytest.fixture(scope="module")
def flow():
    problem, w0 = fs.data.peers_net(5, 10, 10, seed=0)
    observe = fs.diagnostics.kkt(fs.L2(), best=True) | {"margin_l2": fs.diagnostics.margin(fs.L2())}
    rule = fs.SteepestFlow(fs.L2(), rtol=1e-2)
    return problem, fs.simulate(problem, rule, w0, until=fs.lam(30.0, saves=20), observe=observe)


def test_kkt_residuals_are_drawn_as_observed(flow):
    _, run = flow
    ax = plots.kkt(run)
    assert ax.lines[0].get_ydata() == pytest.approx(1 - run["alignment_l2"][:, 0])
    assert [line.get_ydata()[-1] for line in ax.lines[1:]] == pytest.approx(
        [run["residual_l2"][-1, 0], run["slackness_l2"][-1, 0]]
    )
    assert len(ax.collections) == 1  # the band of the best multipliers


def test_multipliers_of_support_vectors_are_in_colour(flow):
    problem, run = flow
    ax = plots.multipliers(run)
    last = run["multipliers_l2"][-1, 0]
    assert len(ax.lines) == problem.examples
    coloured = [line for line in ax.lines if line.get_color() != "0.75"]
    assert len(coloured) == (last >= 0.1 * last.max()).sum()
    assert ax.lines[0].get_ydata()[-1] == last.max()


def test_the_curve_over_tolerances_falls(flow):
    problem, run = flow
    ax = plots.residuals(fs.diagnostics.Stationarity.of(problem, run.final, fs.Linf()))
    curve = ax.lines[0].get_ydata()
    assert (np.diff(curve) <= 1e-9).all()
    assert curve[0] > 0.5


def test_neurons_of_a_net_in_the_plane():
    x = np.array([[1.0, 0.2], [-1.0, 0.3], [0.1, -1.0]])
    problem = fs.Problem(fs.MLP([2, 3, 1]), x, [1, 1, -1], fs.exponential)
    run = fs.simulate(
        problem,
        fs.SteepestFlow(fs.L2(), rtol=1e-2),
        problem.net.init(0),
        until=fs.lam(3.0, saves=9),
    )
    ax = plots.neurons(problem, run)
    paths = [line for line in ax.lines if line.get_linestyle() == "-"]
    assert len(paths) == 3
    w = run.weights[-1, 0]
    ends = np.abs(w[6:])[:, None] * w[:6].reshape(3, 2)
    drawn = np.array([np.array(line.get_data())[:, -1] for line in paths])
    assert drawn == pytest.approx(ends / np.linalg.norm(ends, axis=1).max())
    with pytest.raises(ValueError, match="without weights"):
        plots.neurons(problem, replace(run, weights=None))
    wide = fs.Problem(fs.MLP([3, 2, 1]), np.ones((2, 3)), [1, 1], fs.exponential)
    with pytest.raises(ValueError, match=r"expected MLP\(\[2, m, 1\]\)"):
        plots.neurons(wide, run)
