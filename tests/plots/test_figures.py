"""Figures: what is drawn, not how it looks."""

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest

from flowsim import plots


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


def test_an_unknown_norm_is_refused_with_the_names_that_exist(runs):
    with pytest.raises(KeyError, match="margin_l7.*it has"):
        plots.margins(runs, "l7")


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
