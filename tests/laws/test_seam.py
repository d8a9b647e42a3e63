"""What every rule promises to everything else: methods of the flow and discrete rules alike."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import flowsim as fs
from flowsim.motion.clocks import Target
from flowsim.motion.state import State
from tests.laws.cases import METHODS, RULES

every = pytest.mark.parametrize("case", METHODS + RULES, ids=lambda case: case.name)


def assert_same(one: State, other: State) -> None:
    """Bit for bit, in weights, readings, tallies and status."""
    assert torch.equal(one.w, other.w)
    assert torch.equal(one.status, other.status)
    for name, reading in one.readings.items():
        assert torch.equal(reading, other.readings[name]), name
    for name in one.tallies.keys() & other.tallies.keys() - {"gradients"}:
        assert torch.equal(one.tallies[name], other.tallies[name]), name


def reaching(case, value):
    """The target of an advance on the case's own clock."""
    return Target(case.end.clock, torch.full((len(case.w0),), value, dtype=torch.float64))


@every
def test_a_run_is_repeated_bit_for_bit(case):
    assert_same(case.run().final, case.whole.final)


@every
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(case, tmp_path):
    case = case.alone(1)
    unbroken, begun = case.run().final, case.run(case.cut)
    begun.save(tmp_path / "run")
    for state in (begun.final, fs.load(tmp_path / "run").final):
        resumed = case.run(w0=state).final
        if case.resumes:
            assert_same(resumed, unbroken)
        else:
            torch.testing.assert_close(resumed.w, unbroken.w, rtol=1e-3, atol=1e-4)


@every
def test_batch_mates_change_a_trajectory_by_rounding_only(case):
    together = case.whole.final
    for row in range(len(case.w0)):
        alone = case.alone(row).run().final
        torch.testing.assert_close(together.w[row], alone.w[0], rtol=1e-9, atol=1e-10)
        assert together.statuses[row] == alone.statuses[0]


@every
def test_save_points_do_not_change_the_path(case):
    often = replace(case.end, spread=lambda start, stop: np.linspace(start, stop, 7).tolist())
    several = case.run(often)
    assert len(several["steps"]) == 7
    if case.resumes:
        assert_same(several.final, case.whole.final)


@every
def test_no_more_attempts_are_made_than_the_budget_allows(case):
    state = case.rule.start(case.problem, case.w0)
    moved = case.rule.advance(case.problem, state, reaching(case, case.end.stop), 2)
    assert (moved.attempts - state.attempts <= 2).all()
    assert (moved.attempts > state.attempts).all()


@every
def test_a_trajectory_that_has_arrived_or_stopped_stays(case):
    state = case.rule.start(case.problem, case.w0)
    assert_same(case.rule.advance(case.problem, state, reaching(case, -math.inf), 5), state)
    done = state.stopped(torch.ones_like(state.running), fs.Status.DONE)
    assert_same(case.rule.advance(case.problem, done, reaching(case, case.end.stop), 5), done)


@every
def test_a_state_is_all_its_tensors(case):
    state = case.run(case.cut).final
    assert_same(State.from_tensors(state.tensors()), state)


@every
def test_readings_only_grow(case):
    run = case.whole
    for name in ("steps", "log_time", "arclength", "relative"):
        assert (np.diff(run[name], axis=0) >= 0).all(), name
