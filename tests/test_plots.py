"""Figures: what is drawn, not how it looks."""

from dataclasses import replace

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest

import flowsim as fs
from flowsim import plots

mpl.use("Agg")


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def runs():
    x, y = fs.data.gaussian_separable(12, 4, margin=0.3, seed=0)
    net = fs.MLP([4, 6, 1])
    problem = fs.Problem(net, x, y, fs.exponential)
    observe = fs.diagnostics.standard(problem)
    w0 = net.init(range(3), scale=0.5)
    rules = {"ℓ2 small": fs.SmallStep(fs.L2(), 0.2), "ℓ∞ small": fs.SmallStep(fs.Linf(), 0.2)}
    return {k: fs.simulate(problem, r, w0, until=fs.lam(400, saves=30), observe=observe) for k, r in rules.items()}


@pytest.mark.parametrize("draw", [plots.margins, plots.loss, plots.norms, plots.alignment])
@pytest.mark.parametrize("against", ["log_time", "lam", "steps", "arclength", "relative"])
def test_every_plot_returns_the_axes_it_was_given_with_a_curve_for_each_run(runs, draw, against):
    ax = plt.subplots()[1]
    assert draw(runs, against=against, ax=ax) is ax
    curves = [line for line in ax.lines if len(line.get_xdata()) > 1]
    assert len(curves) == len(runs)
    assert len({line.get_color() for line in curves}) == len({line.get_linestyle() for line in curves}) == len(runs)
    assert ax.get_xlabel()
    assert ax.get_ylabel()
    assert len(ax.collections) == len(runs)  # a band for each


def test_the_loss_is_drawn_where_no_float_could_hold_it(runs):
    ax = plots.loss(runs)
    lowest = min(line.get_ydata().min() for line in ax.lines)
    assert lowest == pytest.approx(-400 / np.log(10), abs=0.01)


def test_margins_against_time_follow_the_saved_values(runs):
    one = runs["ℓ2 small"].select(0)
    ax = plots.margins(one, "l2", against="lam")
    x, y = ax.lines[0].get_data()
    assert y == pytest.approx(np.interp(x, one["lam"][:, 0], one["margin_l2"][:, 0]))


def test_the_degree_is_on_the_axis(runs):
    assert "^{2}" in plots.margins(runs).get_ylabel()


def test_a_wrong_axis_is_refused_by_name(runs):
    with pytest.raises(ValueError, match="got against='epoch', expected one of log_time"):
        plots.margins(runs, against="epoch")


def test_an_unknown_norm_is_refused_with_the_names_that_exist(runs):
    with pytest.raises(KeyError, match="margin_l7.*it has"):
        plots.margins(runs, "l7")


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


def test_t0_is_interpolated_and_separation_is_the_first_perfect_save(runs):
    run = runs["ℓ2 small"].select(0)
    k = np.nonzero(run["lam"][:, 0] > 0)[0][0]
    before, after = run["log_time"][k - 1 : k + 1, 0] / np.log(10)
    assert before <= plots.crossing(run) <= after
    j = np.nonzero(run["accuracy"][:, 0] == 1)[0][0]
    assert plots.separation(run) == run["log_time"][j, 0] / np.log(10)


def test_t0_of_a_run_that_never_separates_is_nan(runs):
    run = runs["ℓ2 small"]
    never = replace(run, values=run.values | {"lam": np.full_like(run["lam"], -1.0)})
    assert np.isnan(plots.crossing(never))


def test_nothing_global_is_changed(runs):
    before = dict(mpl.rcParams)
    plots.overview(runs)
    assert dict(mpl.rcParams) == before


def test_saved_figures_are_vector_pixel_and_data_and_repeat_to_the_byte(runs, tmp_path):
    first = plots.save(plots.overview(runs), tmp_path / "a", runs)
    second = plots.save(plots.overview(runs), tmp_path / "b", runs)
    assert [p.suffix for p in first] == [".pdf", ".png", ".csv"]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert b"/Type3" not in first[0].read_bytes()
    rows = first[2].read_text().splitlines()
    assert rows[0].startswith("run,trajectory,save,steps,lam")
    assert len(rows) == 1 + 2 * 3 * 30
