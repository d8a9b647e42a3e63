"""Runs in a table: medians over seeds, t0, and why each run stopped."""

from dataclasses import replace

import numpy as np
import pytest

from flowsim import plots
from flowsim.run.summary import summarise


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


def test_rows_hold_medians_and_reasons(runs):
    short = replace(runs["ℓ2 small"].select([0, 1]), label="short")
    row, other = summarise({"long": runs["ℓ2 small"], "short": short})
    run = runs["ℓ2 small"]
    assert (row["run"], other["run"]) == ("long", "short")
    assert (row["stopped"], other["stopped"]) == ("3 × DONE", "2 × DONE")
    assert row["lam"] == pytest.approx(400.0, rel=1e-3)
    assert row["margin_l2"] == pytest.approx(np.median(run["margin_l2"][-1]))
    assert row["alignment"] == pytest.approx(np.median(run["alignment_l2"][-1]))
    end = {name: run.final.readings[name].numpy() for name in ("lam", "dissipated")}
    spent, risen = (end[name] - run[name][0] for name in ("dissipated", "lam"))
    assert row["energy"] == pytest.approx(np.median(spent / risen - 1))
    assert row["gradients"] == np.median(run["tally_gradients"][-1])
    assert np.isnan(row["sliding"])
    assert np.isfinite(row["t0"])


def test_values_are_those_before_a_trajectory_stopped(runs):
    run = runs["ℓ2 small"]
    margin = run["margin_l2"].copy()
    margin[-3:, 1] = np.nan
    stopped = replace(run, values=run.values | {"margin_l2": margin})
    ends = [margin[-1, 0], margin[-4, 1], margin[-1, 2]]
    assert summarise({"": stopped})[0]["margin_l2"] == pytest.approx(np.median(ends))
