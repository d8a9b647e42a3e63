"""Pictures of discrete runs beside a flow: what is drawn, not how it looks."""

import numpy as np
import pytest
import torch

import flowsim as fs
from flowsim import plots

BOWL = fs.Quadratic([[2.0, 0.5], [0.5, 1.0]], [1.0, -1.0])
CORNERS = torch.tensor([[0.0, 0.0], [3.0, 1.0], [-1.0, 2.0]], dtype=torch.float64)
FLOW = fs.SteepestFlow(fs.L2(), rtol=1e-9, method=fs.DOPRI5)


@pytest.fixture(scope="module")
def bowl():
    rules = {f"{lr:g}": fs.GradientDescent(lr) for lr in (0.1, 0.05)}
    return fs.compare(BOWL, FLOW, rules, CORNERS, until=fs.time(2.0, saves=9))


def test_markers_are_at_the_learning_rate_times_the_step(bowl):
    ax = plots.compare(bowl, "lam")
    line, *markers = ax.lines
    assert line.get_linestyle() == "-"
    assert [m.get_label() for m in markers] == bowl.labels
    for lr, mark in zip((0.1, 0.05), markers, strict=True):
        steps = mark.get_xdata() / lr
        assert steps == pytest.approx(np.round(steps), abs=1e-6)
        assert mark.get_linestyle() == "None"
    assert plots.compare(bowl, "lam", against="arclength", ax=ax) is ax
    with pytest.raises(ValueError, match="got against='epochs'"):
        plots.compare(bowl, against="epochs")


def test_distances_are_drawn_as_they_are(bowl):
    ax = plots.apart(bowl, "weights", "lam")
    far = np.median(bowl["0.1", "weights", "lam"][-1])
    assert ax.lines[0].get_ydata()[-1] == pytest.approx(far)
    assert ax.get_yscale() == "log"


def test_the_figure_of_orders_has_a_guide_of_slope_one():
    until, ladder = fs.time(2.0, saves=5), (0.04, 0.02, 0.01)
    study = fs.order_study(BOWL, fs.GradientDescent, CORNERS, ladder=ladder, until=until, flow=FLOW)
    ax = plots.order({"bowl": study})
    line, guide = ax.lines
    assert line.get_ydata() == pytest.approx(np.median(study.distances(), 1))
    x, y = guide.get_data()
    assert np.diff(np.log(y)) == pytest.approx(np.diff(np.log(x)))
    assert f"{study.order().median:.2f}" in line.get_label()


def test_the_whole_figure_has_values_above_distances(bowl):
    level, value, weights, direction = plots.comparison(bowl).axes
    assert level.lines[0].get_ydata() == pytest.approx(np.median(bowl.flow["lam"], 1))
    assert value.get_ylabel().startswith("arclength")
    assert len(weights.lines) == len(direction.lines) == len(bowl.labels)
    assert weights.lines[0].get_ydata()[-1] == pytest.approx(
        np.median(bowl["0.1", "weights", "log_time"][-1])
    )
    assert direction.get_xlabel() == level.get_ylabel()
