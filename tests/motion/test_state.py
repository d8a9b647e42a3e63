"""State: rows in and out, names in and out."""

import math
from dataclasses import fields, replace

import pytest
import torch

import flowsim as fs
from flowsim.motion.segment import Segment
from flowsim.motion.state import READINGS, State, initial_state

OBJECTIVE = fs.Problem(
    fs.MLP([3, 4, 1], activation=fs.squared_relu), torch.eye(3), [1, -1, 1], fs.logistic
)


def stepped(B=4):
    """A state with every part that a state can have, after a few accepted steps."""
    w0 = OBJECTIVE.net.init(range(B))
    state = fs.simulate(OBJECTIVE, fs.SteepestFlow(fs.L2()), w0, until=fs.steps(5)).final
    multipliers = torch.arange(2.0 * B, dtype=torch.float64).view(B, 2)
    ends = replace(state.segment, multipliers0=multipliers / 100, multipliers1=multipliers / 50)
    return replace(state, multipliers=multipliers, segment=ends)


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name].nan_to_num(nan=-7.25), b[name].nan_to_num(nan=-7.25)), name


def test_from_tensors_inverts_tensors():
    state = stepped()
    back = State.from_tensors(state.tensors())
    assert isinstance(back.segment, Segment)
    same(back.tensors(), state.tensors())


def test_from_tensors_of_a_state_without_segment_memory_or_multipliers():
    state = initial_state(OBJECTIVE, OBJECTIVE.net.init([0]))
    back = State.from_tensors(state.tensors())
    assert (back.segment, back.multipliers, back.memory) == (None, None, {})
    same(back.tensors(), state.tensors())


def test_every_tensor_of_a_state_has_the_trajectory_axis_first():
    assert {t.shape[0] for t in stepped(3).tensors().values()} == {3}


def test_select_takes_rows_of_every_tensor():
    state, rows = stepped(), torch.tensor([2, 0])
    same(state.select(rows).tensors(), {name: t[rows] for name, t in state.tensors().items()})


def test_scatter_of_a_selection_is_the_identity_and_leaves_the_others_alone():
    state, rows = stepped(), torch.tensor([3, 1])
    same(state.scatter(rows, state.select(rows)).tensors(), state.tensors())
    part = replace(state.select(rows), w=torch.zeros(2, OBJECTIVE.size, dtype=torch.float64))
    new = state.scatter(rows, part)
    assert (new.w[rows] == 0).all()
    assert torch.equal(new.w[[0, 2]], state.w[[0, 2]])
    assert not (state.w[rows] == 0).all()


def test_stopped_changes_only_running_rows_where_asked():
    state = replace(stepped(), status=torch.tensor([0, 0, 5, 5]))
    stopped = state.stopped(torch.tensor([True, False, True, False]), fs.Status.MAX_STEPS)
    assert stopped.statuses == [
        fs.Status.MAX_STEPS,
        fs.Status.RUNNING,
        fs.Status.NONFINITE,
        fs.Status.NONFINITE,
    ]


def test_a_state_is_frozen():
    for part in (stepped(1), stepped(1).segment):
        for field in fields(part):
            with pytest.raises(AttributeError):
                setattr(part, field.name, None)


def test_every_status_has_a_sentence_of_its_own():
    sentences = [status.sentence for status in fs.Status]
    assert len(set(sentences)) == len(fs.Status)


def test_the_codes_of_saved_states_keep_their_meaning():
    names = ["RUNNING", "DONE", "MAX_STEPS", "INTERRUPTED", "STEP_TOO_SMALL", "NONFINITE"]
    names += ["STATIONARY", "PRECISION_FLOOR", "EVENT"]
    assert [status.name for status in sorted(fs.Status)] == names
    assert [int(status) for status in sorted(fs.Status)] == list(range(9))


def test_fresh_weights_start_with_clocks_at_zero_and_do_not_alias_the_input():
    w = OBJECTIVE.net.init([0, 1])
    state = initial_state(OBJECTIVE, w)
    for name in READINGS:
        assert (state.readings[name] == (-math.inf if name == "log_time" else 0.0)).all()
    w.zero_()
    assert state.w.abs().max() > 0


@pytest.mark.parametrize("status", fs.Status)
def test_fresh_restarts_exactly_the_resumable(status):
    state = replace(stepped(1), status=torch.tensor([int(status)]))
    again = initial_state(OBJECTIVE, state).statuses[0]
    assert again is (fs.Status.RUNNING if status.resumable else status)
    resumable = {
        fs.Status.RUNNING,
        fs.Status.DONE,
        fs.Status.MAX_STEPS,
        fs.Status.INTERRUPTED,
        fs.Status.EVENT,
    }
    assert status.resumable == (status in resumable)


def test_a_state_shows_its_numbers_and_no_arrays():
    state = replace(stepped(3), status=torch.tensor([1, 5, 1]))
    shown = repr(state)
    for part in (
        "3 trajectories",
        f"{OBJECTIVE.size} weights",
        "DONE: 2",
        "NONFINITE: 1",
        "steps 5",
    ):
        assert part in shown
    assert len(shown.splitlines()) <= 4
    assert shown in state._repr_html_()
