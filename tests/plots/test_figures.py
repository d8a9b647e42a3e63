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
    return {
        k: fs.simulate(problem, r, w0, until=fs.lam(400, saves=30), observe=observe)
        for k, r in rules.items()
    }


@pytest.mark.parametrize(
    "draw", [plots.margins, plots.loss, plots.norms, plots.alignment, plots.energy]
)
@pytest.mark.parametrize("against", ["log_time", "lam", "steps", "arclength", "relative"])
def test_every_plot_returns_the_axes_it_was_given_with_a_curve_for_each_run(runs, draw, against):
    ax = plt.subplots()[1]
    assert draw(runs, against=against, ax=ax) is ax
    curves = [line for line in ax.lines if len(line.get_xdata()) > 1]
    assert len(curves) == len(runs)
    assert (
        len({line.get_color() for line in curves})
        == len({line.get_linestyle() for line in curves})
        == len(runs)
    )
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


# Figures of convergence and of trust


@pytest.fixture(scope="module")
def flow():
    problem, w0 = fs.data.peers_net(5, 10, 10, seed=0)
    observe = fs.diagnostics.kkt(fs.L2(), best=True) | {"margin_l2": fs.diagnostics.margin(fs.L2())}
    rule = fs.SteepestFlow(fs.L2(), rtol=1e-2)
    return problem, fs.simulate(problem, rule, w0, until=fs.lam(30.0, saves=20), observe=observe)


def test_the_energy_residual_is_that_of_the_readings(runs):
    one = runs["ℓ∞ small"].select(0)
    ax = plots.energy(one, against="lam")
    risen, spent = (one[name][-1, 0] - one[name][0, 0] for name in ("lam", "dissipated"))
    assert ax.lines[0].get_ydata()[-1] == pytest.approx(abs(spent / risen - 1))


@pytest.mark.parametrize("against", ["lam", "arclength", "log_time"])
def test_the_gap_is_logarithmic_with_guide_and_bound(runs, against):
    one = runs["ℓ2 small"].select(0)
    best = 1.1 * one["margin_l2"].max()
    ax = plots.gap(one, best, against=against, slope=-2.0, bound=3.0)
    curve, guide, line = (line.get_data() for line in ax.lines)
    assert curve[1][-1] == pytest.approx(best - one["margin_l2"][-1, 0])
    assert np.diff(np.log(guide[1])) / np.diff(np.log(guide[0])) == pytest.approx(-2.0)
    assert line[0] * line[1] == pytest.approx(3.0)
    assert ax.get_xscale() == ax.get_yscale() == "log"


def test_the_certificate_has_a_row_for_each_run_and_a_point_for_each_trajectory(runs):
    ax = plots.certificate(runs)
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        r"$\ell_{\infty}$ small",
        r"$\ell_{2}$ small",
    ]
    assert len(ax.lines) == 4 * len(runs)
    found = runs["ℓ2 small"].certificate
    assert ax.lines[0].get_xdata() == pytest.approx(np.abs(found.energy))
    assert ax.lines[2].get_xdata() == pytest.approx(1 - found.alignment)
    assert all(len(line.get_xdata()) == 3 for line in ax.lines)


def test_trust_is_one_figure_that_repeats_to_the_byte(runs, tmp_path):
    one, other = (plots.save(plots.trust(runs), tmp_path / name) for name in "ab")
    assert [p.suffix for p in one] == [".pdf", ".png"]
    assert one[0].read_bytes() == other[0].read_bytes()


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
