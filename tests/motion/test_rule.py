"""The seam: which trajectories go on, together or one by one, and when each leaves the batch."""

from dataclasses import dataclass, field, replace
from html import escape

import pytest
import torch

import flowsim as fs
from flowsim.motion.clocks import LAM, Target
from flowsim.motion.rule import advance_by_steps, in_words, one_by_one, pending
from flowsim.motion.state import Status, initial_state

OBJECTIVE = fs.Quadratic(torch.eye(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))


def row(*values):
    return torch.tensor(values, dtype=torch.float64)


@dataclass
class Rows:
    """A problem that remembers which of its trajectories were selected."""

    index: torch.Tensor
    asked: list = field(default_factory=list)

    def select(self, rows):
        self.asked.append(self.index[rows].tolist())
        return Rows(self.index[rows])


def start(B=3):
    return initial_state(OBJECTIVE, torch.ones(B, OBJECTIVE.size, dtype=torch.float64))


def step(problem, state):
    """Λ rises by 1, 2, 3, … for the trajectories 0, 1, 2, …"""
    readings = state.readings | {"lam": state.readings["lam"] + problem.index + 1}
    return replace(state, readings=readings | {"steps": state.readings["steps"] + 1})


def stop_second(state):
    return state.stopped(torch.tensor([False, True, False]), Status.NONFINITE)


def test_pending_are_those_that_run_and_are_short_of_their_target():
    state = replace(start(4), status=torch.tensor([0, 0, 0, 5]))
    state = replace(state, readings=state.readings | {"lam": row(0, 2, 3, 0)})
    found = pending(state, Target(LAM, row(1, 2, 4, 1)))
    assert found.tolist() == [True, False, True, False]


def test_each_trajectory_takes_natural_steps_until_it_has_reached_its_own_target():
    problem = Rows(torch.arange(3))
    state = advance_by_steps(step, problem, start(), Target(LAM, row(5, 5, 5)), 100)
    assert state.readings["lam"].tolist() == [5, 6, 6]
    assert state.readings["steps"].tolist() == [5, 3, 2]
    assert problem.asked == [[0, 1], [0]]


def test_trajectories_may_share_one_problem():
    """`select` of an objective without data of its own is the objective itself."""

    def step(problem, state):
        readings = state.readings | {"lam": state.readings["lam"] + state.w[:, 0]}
        return replace(state, readings=readings)

    state = replace(start(), w=torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]]).double())
    state = advance_by_steps(step, OBJECTIVE, state, Target(LAM, row(5, 5, 5)), 100)
    assert state.readings["lam"].tolist() == [5, 6, 6]


def test_no_more_steps_are_taken_than_the_budget():
    state = advance_by_steps(step, Rows(torch.arange(3)), start(), Target(LAM, row(5, 5, 5)), 3)
    assert state.readings["steps"].tolist() == [3, 3, 2]
    state = advance_by_steps(step, Rows(torch.arange(3)), start(), Target(LAM, row(5, 5, 5)), 0)
    assert state.readings["steps"].tolist() == [0, 0, 0]


def test_stopped_trajectories_do_not_move():
    state = stop_second(start())
    state = advance_by_steps(step, Rows(torch.arange(3)), state, Target(LAM, row(3, 3, 3)), 9)
    assert state.readings["lam"].tolist() == [3, 0, 3]


def test_one_by_one_runs_each_pending_trajectory_on_its_own_rows():
    problem, state = Rows(torch.arange(3)), stop_second(start())

    def run(part, local, goal):
        assert len(part.index) == len(local.w) == len(goal.value) == 1
        return advance_by_steps(step, part, local, goal, 100)

    done = one_by_one(run, problem, state, Target(LAM, row(2, 2, 4)))
    assert problem.asked == [[0], [2]]
    assert done.readings["lam"].tolist() == [2, 0, 6]
    assert done.statuses == state.statuses


def test_one_by_one_without_a_target_runs_all_and_may_add_to_their_memory():
    def run(part, local):
        return replace(local, memory={"number": part.index.double()})

    done = one_by_one(run, Rows(torch.arange(3)), stop_second(start()))
    assert done.memory["number"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("B", [1, 4])
def test_one_by_one_of_separate_trajectories_is_the_batch(B):
    problem, target = Rows(torch.arange(B)), Target(LAM, torch.full((B,), 7.0).double())
    batch = advance_by_steps(step, problem, start(B), target, 100)
    each = one_by_one(
        lambda part, local, goal: advance_by_steps(step, part, local, goal, 100),
        problem,
        start(B),
        target,
    )
    found = each.tensors()
    for name, expected in batch.tensors().items():
        assert torch.allclose(found[name], expected, rtol=0, atol=0, equal_nan=True), name


EVENT = fs.Event(fs.diagnostics.accuracy, 1.0)
METRIC = fs.Mahalanobis(torch.eye(20, dtype=torch.float64))


@pytest.mark.parametrize(
    "rule",
    [
        fs.SmallStep(METRIC),
        fs.MiniBatches(fs.GradientDescent(0.1), size=3),
        fs.Switch(fs.GradientDescent(0.1), fs.SteepestFlow(METRIC), EVENT),
        fs.SteepestFlow(METRIC),
        fs.DissipationFlow(fs.SmoothSign(1e-2)),
        fs.SteepestDescent(METRIC, 0.1),
    ],
)
def test_rules_show_their_label_and_their_settings(rule):
    assert repr(rule).startswith(f"{type(rule).__name__}(")
    assert "tensor" not in repr(rule)
    assert " at 0x" not in repr(rule)
    title, settings = rule._repr_html_().split("<br>")
    assert title == f"<b>{escape(rule.label)}</b>"
    assert settings == f"<code>{escape(repr(rule))}</code>"


def test_settings_in_words_are_those_that_code_would_give():
    assert in_words(fs.SmallStep(fs.L1(), dlam=0.5)) == (
        "SmallStep(norm=L1(), dlam=0.5, relative=0.05)"
    )
    assert in_words(METRIC) == "Mahalanobis(matrix=Tensor(20, 20))"
    assert in_words(EVENT).startswith("Event(measure=accuracy, level=1.0,")
