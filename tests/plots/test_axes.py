"""Curves over clocks: bands at common positions, axes by their names."""

import numpy as np
import pytest

from flowsim import plots


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
