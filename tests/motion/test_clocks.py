"""Clocks and schedules: when to save, and how fast each clock runs."""

import math

import numpy as np
import pytest
import torch

import flowsim as fs
from flowsim.motion.clocks import ARCLENGTH, LAM, RELATIVE, STEPS, TIME, log_time_rate


def reading(*values):
    return torch.tensor(values, dtype=torch.float64)


def points(schedule, start):
    return schedule.targets(reading(start))


SCHEDULES = {
    "lam": (lambda saves: fs.lam(1e4, saves=saves), -3.0, 1e4),
    "lam_list": (lambda saves: fs.lam(np.linspace(9, 1, saves - 1)[::-1]), -3.0, 9.0),
    "arclength": (lambda saves: fs.arclength(7.5, saves=saves), 0.0, 7.5),
    "time": (lambda saves: fs.time(1e5, saves=saves), -math.inf, math.log(1e5)),
    "time_first": (lambda saves: fs.time(1e5, saves=saves, first=1e-3), -math.inf, math.log(1e5)),
    "steps": (lambda saves: fs.steps(10**6, saves=saves), 0.0, 1e6),
}


@pytest.mark.parametrize("saves", [2, 3, 4, 17, 100])
@pytest.mark.parametrize("name", SCHEDULES)
def test_save_points_increase_from_the_start_to_exactly_the_end(name, saves):
    make, start, stop = SCHEDULES[name]
    found = points(make(saves), start)
    assert found[-1] == stop
    assert all(b > a for a, b in zip([start, *found], found, strict=False))


@pytest.mark.parametrize("saves", [2, 3, 4, 17])
@pytest.mark.parametrize("name", SCHEDULES)
def test_there_are_as_many_saves_as_asked_for_with_the_start(name, saves):
    make, start, _ = SCHEDULES[name]
    assert 1 + len(points(make(saves), start)) == saves


def test_lam_points_are_dense_at_the_start_and_then_logarithmic_in_the_rise():
    rises = np.array([0.0, *points(fs.lam(1e4, saves=30), -3.0)]) - np.array([0.0, *[-3.0] * 29])
    assert np.diff(np.arcsinh(rises / 0.01)) == pytest.approx(
        math.asinh(10003 / 0.01) / 29, rel=1e-9
    )


def test_arclength_points_are_even():
    assert points(fs.arclength(3.0, saves=4), 0.0) == pytest.approx([1.0, 2.0, 3.0])


def test_time_points_are_even_in_log_time_from_first():
    found = points(fs.time(100.0, saves=6, first=0.01), -math.inf)
    assert found == pytest.approx([math.log(v) for v in (0.01, 0.1, 1.0, 10.0, 100.0)])
    assert points(fs.time(100.0, saves=5), -math.inf)[0] == pytest.approx(math.log(0.1))


def test_time_points_of_a_resumed_run_start_after_its_time():
    start = math.log(50.0)
    found = points(fs.time(100.0, saves=5), start)
    assert found == pytest.approx(np.linspace(start, math.log(100.0), 5)[1:])


def test_step_points_are_whole_and_the_first_ones_are_each_saved():
    found = points(fs.steps(1000, saves=60), 0.0)
    assert all(p == round(p) for p in found)
    assert found[:4] == [1.0, 2.0, 3.0, 4.0]
    assert points(fs.steps(5, saves=100), 0.0) == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert points(fs.steps(205, saves=4), 200.0)[-1] == 205.0


@pytest.mark.parametrize(
    ("schedule", "shown"),
    [
        (fs.lam([1, 2.5, 4]), [1.0, 2.5, 4.0]),
        (fs.arclength((0.5, 1.0)), [0.5, 1.0]),
        (fs.steps(range(2, 8, 2)), [2.0, 4.0, 6.0]),
        (fs.steps(np.arange(1, 4)), [1.0, 2.0, 3.0]),
        (fs.time([1.0, math.e]), [0.0, 1.0]),
        (fs.lam(np.logspace(0, 2, 3)), [1.0, 10.0, 100.0]),
    ],
)
def test_a_list_is_saved_at_exactly(schedule, shown):
    assert points(schedule, -math.inf if schedule.clock is TIME else 0.0) == pytest.approx(shown)


def test_points_begin_after_the_trajectory_that_is_furthest():
    assert fs.lam([1, 2, 3]).targets(reading(-1.0, 1.5)) == [2.0, 3.0]
    assert min(fs.lam(9.0, saves=20).targets(reading(-1.0, 4.0))) > 4.0


@pytest.mark.parametrize("schedule", [fs.lam(2.0), fs.lam([1.0, 2.0])])
def test_a_schedule_that_is_already_over_has_only_its_end(schedule):
    assert points(schedule, 5.0) == [2.0]


@pytest.mark.parametrize(
    "value", ["10", None, math.nan, math.inf, True, [], [1.0, math.nan], [3.0, 1.0], [1.0, 1.0]]
)
@pytest.mark.parametrize("make", [fs.lam, fs.arclength, fs.time])
def test_values_that_are_no_increasing_finite_numbers_are_refused(make, value):
    with pytest.raises(ValueError, match=rf"^{make.__name__}: got .*expected"):
        make(value)


@pytest.mark.parametrize("value", [-1, 2.5, "10", True, None, [], [3, 1], [1, 2.5]])
def test_steps_that_are_no_increasing_whole_numbers_are_refused(value):
    with pytest.raises(ValueError, match=r"^steps: got .*expected"):
        fs.steps(value)


@pytest.mark.parametrize("value", [0.0, -1.0, [0.0, 1.0]])
def test_time_must_be_positive(value):
    with pytest.raises(ValueError, match=r"^time: got .*expected"):
        fs.time(value)


@pytest.mark.parametrize("first", [0.0, -1.0, 10.0, 11.0, math.nan, "1"])
def test_first_must_lie_between_zero_and_the_end(first):
    with pytest.raises(ValueError, match=r"^time: got first=.*expected"):
        fs.time(10.0, first=first)


@pytest.mark.parametrize("saves", [1, 0, -5, 2.5, "9", True])
@pytest.mark.parametrize("make", [fs.lam, fs.arclength, fs.time, fs.steps])
def test_fewer_than_two_saves_are_refused(make, saves):
    with pytest.raises(ValueError, match=r"got saves=.*expected an integer ≥ 2"):
        make(10, saves=saves)


CLASSIFIER = fs.Problem(fs.Linear(2), [[1.0, 0.5]], [1], fs.exponential)
QUADRATIC = fs.Quadratic(torch.eye(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))


def test_speeds_are_arclength_per_unit_of_each_clock():
    lam, dual, size = reading(2.0, -1.0), reading(3.0, 0.5), reading(7.0, 0.25)
    force = torch.exp(-lam) * dual  # ‖∇𝓛‖_*, the speed in flow time
    expected = {LAM: 1 / dual, TIME: force, ARCLENGTH: torch.ones(2), RELATIVE: size}
    for clock, value in expected.items():
        speed = clock.speed(log_time_rate(CLASSIFIER, lam, dual), dual, size)
        assert torch.allclose(speed, value.double(), rtol=1e-14)


def test_time_of_an_ordinary_objective_runs_at_the_dual_norm_of_its_gradient():
    lam, dual, size = reading(-2.0), reading(3.0), reading(1.0)
    rate = log_time_rate(QUADRATIC, lam, dual)
    assert float(rate) == pytest.approx(-math.log(3.0))
    assert float(TIME.speed(rate, dual, size)) == pytest.approx(3.0)


def test_log_time_rate_does_not_overflow():
    assert float(log_time_rate(CLASSIFIER, reading(1e6), reading(2.0))) == pytest.approx(
        1e6 - math.log(2.0)
    )


def test_steps_cannot_be_integrated_against():
    assert STEPS.speed is None
