"""One rule after another on the same trajectories: training that changes its method where something
has happened."""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from flowsim.checks import require_instance
from flowsim.motion.clocks import Target
from flowsim.motion.rule import Labelled, Rule, pending, require_rule
from flowsim.motion.segment import Segment
from flowsim.motion.state import State
from flowsim.problems.objective import Objective
from flowsim.run.events import Event

_BEFORE, _AFTER = "first", "then"


@dataclass(frozen=True, repr=False)
class Switch(Labelled):
    """``first`` until the event, ``then`` from there on; each trajectory changes at its own time.

    Flows and discrete rules go together in any order, and either may be a `Switch` itself. Steps
    are not shortened: the second rule begins at the end of the natural step in which the event has
    happened, and the readings go on. An event that is true at the start leaves nothing for the
    first rule.

    >>> import flowsim as fs
    >>> separated = fs.Event(fs.diagnostics.accuracy, 1.0)
    >>> Switch(fs.GradientDescent(0.1), fs.SignDescent(0.01), separated).label
    'gradient descent, lr = 0.1; from accuracy ≥ 1 sign descent, lr = 0.01'
    """

    first: Rule
    then: Rule
    at: Event

    def __post_init__(self) -> None:
        require_rule("Switch", first=self.first, then=self.then)
        expected = "an event, try flowsim.Event(flowsim.diagnostics.accuracy, 1.0)"
        require_instance("Switch", Event, expected, at=self.at)

    @property
    def label(self) -> str:
        return f"{self.first.label}; from {self.at.sentence} {self.then.label}"

    def start(self, problem: Objective, w_or_state: Tensor | State) -> State:
        if isinstance(w_or_state, State):
            both = w_or_state.memory.keys() == {"phase", _BEFORE, _AFTER}
            if both:
                return self._resumed(problem, w_or_state)
        before = self.first.start(problem, w_or_state)
        # the second rule starts as well: what it refuses is said now, and its place in the state is
        # made
        after = self.then.start(problem, _bare(before))
        phase = torch.zeros_like(before.status)
        state = _joined(before, after, phase)
        return self._handed_over(problem, state, before)

    def _resumed(self, problem: Objective, state: State) -> State:
        before = self.first.start(problem, _part(state, _BEFORE))
        after = self.then.start(problem, _part(state, _AFTER))
        return _joined(before, after, state.memory["phase"])

    def advance(self, problem: Objective, state: State, until: Target, budget: int) -> State:
        phase = state.memory["phase"]  # of now: a trajectory that changes goes on in the next call
        for number, walk in enumerate((self._walk_first, self._walk_then)):
            waiting = pending(state, until) & (phase == number)
            rows = waiting.nonzero().squeeze(1)
            if rows.numel() > 0:
                part = state.select(rows)
                part = walk(problem.select(rows), part, until.select(rows), budget)
                state = state.scatter(rows, part)
        return state

    def _walk_then(self, problem: Objective, state: State, until: Target, budget: int) -> State:
        local = _part(state, _AFTER)
        local = self.then.advance(problem, local, until, budget)
        return _packed(state, _AFTER, local)

    def _walk_first(self, problem: Objective, state: State, until: Target, budget: int) -> State:
        """Step by step, until a trajectory changes."""
        local = _part(state, _BEFORE)
        for _ in range(budget):
            local = self.first.advance(problem, local, until, 1)
            reached = self.at.reached(problem, local, "Switch")
            if bool((reached | ~pending(local, until)).any()):
                break
        state = _packed(state, _BEFORE, local)
        return self._handed_over(problem, state, local)

    def _handed_over(self, problem: Objective, state: State, before: State) -> State:
        """``state`` with the second rule started where the event has happened, at ``before``."""
        reached = self.at.reached(problem, before, "Switch") & before.running
        rows = reached.nonzero().squeeze(1)
        if rows.numel() == 0:
            return state
        given = _bare(before.select(rows))
        after = self.then.start(problem.select(rows), given)
        here = state.select(rows)
        phase = torch.ones_like(here.status)
        part = _packed(here, _AFTER, after)
        part = replace(
            part,
            memory=part.memory | {"phase": phase},
            # of the step that has led here, for saves inside of it
            segment=here.segment,
            multipliers=here.multipliers,
        )
        return state.scatter(rows, part)


def _bare(state: State) -> State:
    """Where trajectories are, without what a rule has left there."""
    return replace(state, memory={}, segment=None)


def _joined(before: State, after: State, phase: Tensor) -> State:
    """The states of both rules as one, each trajectory with that of its phase."""
    parts = {"phase": phase, _BEFORE: _own(before), _AFTER: _own(after)}
    zero = torch.zeros_like(after.step_size)
    tallies = dict.fromkeys((*before.tallies, *after.tallies), zero) | after.tallies
    dense = before.segment is not None or after.segment is not None
    multipliers = before.multipliers
    if multipliers is None:
        multipliers = after.multipliers
    whole = replace(
        before,
        tallies=tallies,
        memory=parts,
        segment=_resting(before) if dense else None,
        multipliers=multipliers,
    )
    first = _packed(whole, _BEFORE, before)
    then = _packed(whole, _AFTER, after)
    chosen = first.where(phase == 0, then)
    return replace(chosen, tallies=tallies, memory=parts)


def _own(state: State) -> dict[str, Any]:
    """What a rule leaves in a state beside weights and readings, in the form that it gave it."""
    return {
        "memory": state.memory,
        "segment": state.segment,
        "multipliers": state.multipliers,
        "tallies": state.tallies,
    }


def _part(state: State, name: str) -> State:
    """The state as one of the two rules has left it."""
    own = state.memory[name]
    segment = own.get("segment")
    if isinstance(segment, dict):  # where it comes from disk
        segment = Segment(**segment)
    return replace(
        state,
        tallies={key: state.tallies[key] for key in own["tallies"]},
        memory=own["memory"],
        segment=segment,
        multipliers=own.get("multipliers"),
    )


def _packed(state: State, name: str, part: State) -> State:
    """``state`` with one rule's ``part`` in it, in a form that does not depend on which rule has
    moved."""
    multipliers = part.multipliers
    if multipliers is None and state.multipliers is not None:
        multipliers = torch.full_like(state.multipliers, torch.nan)
    segment = None
    if state.segment is not None:
        segment = _complete(part.segment or _resting(part), multipliers)
    return replace(
        part,
        tallies=state.tallies | part.tallies,
        memory=state.memory | {name: _own(part)},
        multipliers=multipliers,
        segment=segment,
    )


def _resting(state: State) -> Segment:
    """A step of no length that has led to the state: what indivisible steps show."""
    zero = torch.zeros_like(state.w)
    none = torch.zeros_like(state.step_size)
    w = (state.w, state.w)
    readings = (state.readings, state.readings)
    return Segment.straight(w, zero, readings, (none, none), (none, none))


def _complete(segment: Segment, multipliers: Tensor | None) -> Segment:
    """The same step with every part of a `Segment` written out."""
    gap = segment.time_rate1 - segment.time_rate0
    usual: dict[str, Any] = {
        "time_slope0": gap,
        "time_slope1": gap,
        "bend": torch.zeros_like(segment.w0),
        "multipliers0": multipliers,
        "multipliers1": multipliers,
    }
    missing = [f.name for f in fields(segment) if getattr(segment, f.name) is None]
    return replace(segment, **{name: usual[name] for name in missing})
