"""Curves over clocks: bands at common positions, axes by their names."""

import numpy as np
import pytest

from flowsim import plots
from flowsim.plots.axes import curves


def test_a_wrong_axis_is_refused_by_name(runs):
    with pytest.raises(ValueError, match="got against='epoch', expected one of log_time"):
        plots.margins(runs, against="epoch")


def test_bands_read_each_trajectory_at_common_positions():
    x = np.array([[0.0, 0.0, 0.0], [1.0, 1.1, 0.9], [2.0, 2.2, 1.8]])
    grid, low, middle, high = plots.bands(x, 3 * x)
    assert middle == pytest.approx(3 * grid, abs=0.61)
    assert (low <= middle).all()
    assert (middle <= high).all()
    assert middle[1] == pytest.approx(3 * grid[1])


def test_bands_leave_out_save_points_that_a_trajectory_did_not_reach():
    x = np.array([[0.0, 0.0], [1.0, 1.0], [2.0, np.nan]])
    grid, *_ = plots.bands(x, x)
    assert grid == pytest.approx([0.0, 1.0])


def test_a_curve_is_a_median_with_marks_where_the_run_separates_and_at_t0(runs):
    ax = curves(runs["ℓ2 small"], lambda run: run["margin_l2"], "lam", None)
    curve, separated, start = ax.lines
    grid, _, middle, _ = plots.bands(runs["ℓ2 small"]["lam"], runs["ℓ2 small"]["margin_l2"])
    assert curve.get_xdata() == pytest.approx(grid)
    assert curve.get_ydata() == pytest.approx(middle)
    assert (separated.get_marker(), start.get_marker()) == ("o", "^")
    assert start.get_xdata() == pytest.approx([0.0], abs=1e-9)
    assert separated.get_xdata() == [plots.separation(runs["ℓ2 small"], "lam")]


def test_time_is_an_axis_like_the_readings(runs):
    ax = plots.loss(runs["ℓ2 small"].select(0), against="time")
    assert ax.lines[0].get_xdata() == pytest.approx(np.exp(runs["ℓ2 small"]["log_time"][:, 0]))
