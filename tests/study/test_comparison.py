"""Discrete runs beside a flow: distances against closed forms."""

from dataclasses import FrozenInstanceError

import numpy as np
import pytest

import flowsim as fs
from tests.oracles.bowls import BOWL, CORNERS, FLOW, solution


@pytest.fixture(scope="module")
def bowl():
    rules = {f"{lr:g}": fs.GradientDescent(lr) for lr in (0.1, 0.05)}
    return fs.compare(BOWL, FLOW, rules, CORNERS, until=fs.time(2.0, saves=9))


def test_distances_at_equal_time_are_those_from_the_closed_form(bowl):
    for label, run in bowl.runs.items():
        w, v = run.weights[1:], solution(np.exp(run["log_time"][1:]), CORNERS.numpy())
        size = np.linalg.norm(v, axis=-1)
        apart = np.linalg.norm(w - v, axis=-1) / size
        turned = np.linalg.norm(
            w / np.linalg.norm(w, axis=-1, keepdims=True) - v / size[..., None], axis=-1
        )
        for what, expected in (("weights", apart), ("direction", turned)):
            assert bowl[label, what, "log_time"][1:] == pytest.approx(expected, abs=2e-6)
            assert (bowl[label, what, "log_time"][0] == 0).all()  # at the origin too


def test_equal_levels_and_lengths_are_equal_and_the_nearest_point_is_nearest(bowl):
    for label in bowl.labels:
        for at in ("log_time", "lam", "arclength"):
            assert np.nanmax(np.abs(bowl[label, at, at])) < 1e-6
            assert (
                bowl[label, "weights", "nearest"] <= bowl[label, "weights", at] * 1.05 + 1e-9
            ).all()


def test_the_flow_goes_as_far_as_the_runs_on_every_clock(bowl):
    assert all(
        np.isfinite(bowl[label, "weights", at]).all()
        for label in bowl.labels
        for at in ("lam", "arclength")
    )


def test_without_runs_the_flow_goes_alone():
    alone = fs.compare(BOWL, FLOW, {}, CORNERS, until=fs.time(2.0, saves=9))
    run = fs.simulate(BOWL, FLOW, CORNERS, until=fs.time(2.0, saves=9))
    assert alone.labels == []
    assert np.array_equal(alone.flow.weights, run.weights)
    with pytest.raises(KeyError, match="expected one of"):
        alone["gd", "weights", "log_time"]
    with pytest.raises(ValueError, match="without a step"):
        fs.compare(BOWL, FLOW, {}, CORNERS, until=fs.steps(3))


def test_slopes_are_rises_over_lengths(bowl):
    ours, flows = bowl.slopes("0.05")
    run = bowl.runs["0.05"]
    moved = np.diff(run["steps"], axis=0) > 0
    rise, walked = (np.diff(run[name], axis=0)[moved] for name in ("lam", "arclength"))
    assert ours[moved] == pytest.approx(rise / walked)
    assert np.median(ours[moved] / flows[moved]) == pytest.approx(1, abs=0.1)
    assert np.isnan(ours[~moved]).all()


def test_the_flow_of_a_comparison_is_the_run_of_simulate(bowl):
    run = fs.simulate(BOWL, FLOW, CORNERS, until=fs.time(2.0, saves=9))
    assert np.array_equal(bowl.flow.weights, run.weights)
    assert bowl.flow.provenance["rule"] == run.provenance["rule"]
    with pytest.raises(FrozenInstanceError):
        bowl.flow = run


def test_outputs_margins_and_runs_that_exist():
    x, y = fs.data.gaussian_separable(12, 4, margin=0.3, seed=0)
    problem = fs.Problem(fs.Linear(4), x, y, fs.logistic)
    w0 = problem.net.init(range(2), scale=0.5)
    observe = {"margin": fs.diagnostics.margin(fs.L2())}
    rule = fs.GradientDescent(0.05)
    run = fs.simulate(problem, rule, w0, until=fs.steps(100, saves=12), observe=observe)
    found = fs.compare(
        problem,
        FLOW,
        {"run": run, "rule": rule},
        w0,
        until=fs.steps(100, saves=12),
        observe=observe,
    )
    for what in ("outputs", "margin", "weights"):
        assert np.array_equal(found["run", what, "log_time"], found["rule", what, "log_time"])
    assert found.flow["log_time"][1:, 0] == pytest.approx(run["log_time"][1:, 0], abs=1e-9)
    gap = run["margin"] - found.flow["margin"]
    assert found["run", "margin", "log_time"][1:] == pytest.approx(gap[1:], abs=1e-6)
    f = [(p.weights @ problem.x.numpy().T) for p in (run, found.flow)]
    relative = np.linalg.norm(f[0] - f[1], axis=-1) / np.linalg.norm(f[1], axis=-1)
    assert found["run", "outputs", "log_time"][1:] == pytest.approx(relative[1:], abs=1e-6)


def test_a_run_that_diverges_leaves_nan_and_the_flow_in_peace():
    rules = {"far": fs.GradientDescent(1e200), "near": fs.GradientDescent(0.01)}
    found = fs.compare(BOWL, FLOW, rules, CORNERS, until=fs.steps(20, saves=5))
    assert set(found.runs["far"].statuses) == {fs.Status.NONFINITE}
    assert np.isnan(found["far", "weights", "log_time"][-1]).all()
    assert np.isfinite(found["near", "weights", "log_time"]).all()


def test_what_is_asked_wrongly_is_said(bowl):
    with pytest.raises(KeyError, match="expected one of weights, direction, steps"):
        bowl["0.1", "angle", "lam"]
    with pytest.raises(KeyError, match="expected one of log_time, lam, arclength, nearest"):
        bowl["0.1", "weights", "time"]
    with pytest.raises(KeyError, match=r"expected \[label, what, at\]"):
        bowl["0.1"]
    with pytest.raises(ValueError, match="two rules labelled"):
        fs.compare(BOWL, FLOW, [fs.GradientDescent(0.1)] * 2, CORNERS, until=fs.time(1.0))
    with pytest.raises(ValueError, match="expected one start of all runs"):
        fs.compare(BOWL, FLOW, bowl.runs, CORNERS + 1, until=fs.time(1.0))
    with pytest.raises(ValueError, match="at least three falling"):
        fs.order_study(
            BOWL, fs.GradientDescent, CORNERS, ladder=(0.1, 0.2, 0.05), until=fs.time(1.0)
        )
