"""The one loop: advance a rule, read saves off its steps, observe, checkpoint, and stop for a
stated reason."""

import math
import time as wallclock
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from flowsim.checks import require_instance, require_whole
from flowsim.diagnostics.certificate import certify, witness
from flowsim.diagnostics.margins import Observer
from flowsim.motion.clocks import SavePlan, Target
from flowsim.motion.rule import Refining, Rule, require_rule
from flowsim.motion.state import READINGS, State, Status
from flowsim.problems.objective import Objective
from flowsim.run.events import Event, Watch, inside, shape_of
from flowsim.run.provenance import describe
from flowsim.run.trajectory import Trajectory, save_state

_CHUNK = 256  # natural steps between looks at the wall clock, the progress bar and Ctrl-C


_WEIGHTS_LIMIT = 2**24  # numbers; 128 MiB in float64


# the names of what a Trajectory has anyway, also on disk
_TAKEN = {*READINGS, "weights", "save", "trajectory", "events"}


_ASKED = (Status.DONE, Status.EVENT)  # how trajectories stop that have done what was asked for


def simulate(
    problem: Objective,
    rule: Rule,
    w0: Tensor | State,
    *,
    until: SavePlan,
    observe: Mapping[str, Observer] | None = None,
    events: Mapping[str, Event] | None = None,
    max_steps: int = 1_000_000,
    progress: bool = False,
    strict: bool = False,
    directory: str | Path | None = None,
    checkpoint_seconds: float = 60.0,
) -> Trajectory:
    """Run ``rule`` on ``problem`` from ``w0 (B, P)``, or on from a State, and return the
    Trajectory.

    ``until`` is `flowsim.lam`, `time`, `steps` or `arclength`. The first save is the start. Natural
    steps are never shortened for a save: flows are read off the step's dense output, discrete rules
    at the first iterate that has reached the save point. Λ at a save is that of the weights there;
    where save points are values of Λ it misses them by the error of the dense output. ``observe``
    maps names to functions of (problem, state) that return ``(B, …)``. Weights are kept at the save
    points while they are at most 2²⁴ numbers.

    ``events`` maps names to `Event`s; ``run.events[name]`` says where each trajectory first comes
    to one. They are looked for from where this run starts to the end of the last natural step,
    which may lie beyond the last save. They change no number, but each natural step is then a call
    of its own.

    A trajectory that cannot go on stops with a `Status` and leaves NaN behind, as does one that
    stops at an event, with EVENT; the others go on. Ctrl-C returns what there is. With
    ``strict=True`` any status but DONE and EVENT raises `SimulationError`, which carries the
    Trajectory. With a ``directory``, the state is written there every ``checkpoint_seconds``, and
    the Trajectory at the end."""
    _check_descent(problem, rule)
    _check_options(until, observe, events, max_steps)
    began = wallclock.monotonic()
    weights = w0.w if isinstance(w0, State) else w0
    problem.check_weights(weights)
    problem = problem.like(weights)
    state = rule.start(problem, w0)
    recorder = _Recorder(problem, rule, until, state, observe or {})
    watch = Watch(problem, events or {}, state, until.clock)
    allowance = _Allowance(max_steps, 1 if events else _CHUNK, state.attempts)
    checkpoint = _Checkpoint(directory, checkpoint_seconds, began)
    with _bar(progress, rule, recorder) as bar:
        try:
            while True:
                state = recorder.sample(state, watch.limit)
                bar.update(recorder.progress() - bar.n)
                state, budget = allowance.next(state)
                if budget == 0:
                    break
                state = rule.advance(problem, state, recorder.target(), budget)
                watch.look(state)
                checkpoint.write(state)
        except KeyboardInterrupt:
            state = state.stopped(state.running, Status.INTERRUPTED)
    provenance = describe(problem, rule, weights) | {
        "seconds": wallclock.monotonic() - began,
        "max_steps": max_steps,
        "until": _words(until),
        "events": {name: event.sentence for name, event in watch.events.items()},
    }
    run = recorder.trajectory(state, provenance, watch)
    if directory is not None:
        run.save(directory)
    if strict and any(s not in _ASKED for s in run.statuses):
        raise SimulationError(run)
    return run


class SimulationError(RuntimeError):
    """Some trajectories did not reach the end; ``trajectory`` holds what there is of all of
    them."""

    def __init__(self, trajectory: Trajectory) -> None:
        self.trajectory = trajectory
        failed = [
            f"trajectory {b}: {s.sentence}"
            for b, s in enumerate(trajectory.statuses)
            if s not in _ASKED
        ]
        super().__init__("; ".join(failed))


def _check_descent(problem: Any, rule: Any) -> None:
    require_rule("simulate", rule=rule)
    if isinstance(problem, type) or not hasattr(problem, "check_weights"):
        raise TypeError(
            f"simulate: got problem={problem!r}, expected a problem, "
            "try flowsim.Problem(net, x, y, loss=flowsim.exponential)"
        )


def _check_options(until: SavePlan, observe: Any, events: Any, max_steps: int) -> None:
    expected = "a schedule, try until=flowsim.lam(100)"
    require_instance("simulate", SavePlan, expected, until=until)
    require_whole("simulate", max_steps=max_steps)
    mapped = isinstance(observe, Mapping) and all(callable(f) for f in observe.values())
    if observe is not None and not mapped:
        raise TypeError(
            "simulate: got observe that is not a mapping from names to functions of (problem, "
            "state); try observe=flowsim.diagnostics.standard(problem)"
        )
    mapped = isinstance(events, Mapping) and all(isinstance(e, Event) for e in events.values())
    if events is not None and not mapped:
        raise TypeError(
            "simulate: got events that are not a mapping from names to events; "
            'try events={"separated": flowsim.Event(flowsim.diagnostics.accuracy, 1.0)}'
        )
    _check_names("observer", observe or {}, _TAKEN)
    _check_names("event", events or {}, {*_TAKEN, *(observe or {})})


def _check_names(kind: str, names: Iterable[Any], taken: set[str]) -> None:
    for name in names:
        if not isinstance(name, str) or not name or "/" in name:
            raise ValueError(f"simulate: got an {kind} named {name!r}, expected a word without '/'")
        if name in taken or name.startswith("tally_"):
            raise ValueError(
                f"simulate: got an {kind} named {name!r}, expected a name that is not taken yet"
            )


def _words(until: SavePlan) -> str:
    unit = " (log)" if until.clock.reading == "log_time" else ""
    return f"{until.clock.name} {until.stop:g}{unit}"


def _bar(progress: bool, rule: Rule, recorder: "_Recorder") -> Any:
    if progress:
        from tqdm.auto import tqdm  # the notebook's bar where there is one
    else:
        from tqdm import tqdm
    shown = {"desc": rule.label, "unit": "save", "leave": False}
    return tqdm(total=recorder.total, disable=not progress, **shown)


@dataclass
class _Allowance:
    """How many steps each trajectory may still try: ``most`` beyond those ``before`` the run, and
    no more than ``at_once`` in a call."""

    most: int
    at_once: int
    before: Float[Tensor, " B"]
    calls: int = 0

    def next(self, state: State) -> tuple[State, int]:
        """The state, stopped where nothing is left, and the budget of the next call; 0 where none
        runs. A call takes a step at least, so that calls end the loop even where a rule does not
        count."""
        left = self.most - (state.attempts - self.before).clamp_min(self.calls)
        self.calls += 1
        state = state.stopped(left <= 0, Status.MAX_STEPS)
        running = left[state.running]
        if len(running) == 0:
            return state, 0
        return state, min(self.at_once, int(running.min()))


@dataclass
class _Checkpoint:
    """Writes the state into the directory of a run, every so many seconds of wall time."""

    directory: str | Path | None
    seconds: float
    last: float

    def write(self, state: State) -> None:
        """Write it if it is time."""
        if self.directory is not None and wallclock.monotonic() - self.last > self.seconds:
            save_state(state, Path(self.directory))
            self.last = wallclock.monotonic()


class _Recorder:
    """Reads save points off states and keeps them."""

    def __init__(
        self,
        problem: Objective,
        rule: Rule,
        until: SavePlan,
        state: State,
        observers: Mapping[str, Observer],
    ) -> None:
        self.problem = problem
        self.rule = rule
        self.clock = until.clock
        self.observers = observers
        self.witnesses = witness(problem, rule)
        start = state.readings[self.clock.reading]
        points = [-torch.inf, *until.targets(start)]
        self.targets = torch.tensor(points, dtype=torch.float64, device=state.w.device)
        self.next = torch.zeros_like(state.status)
        self.values: dict[str, np.ndarray] = {}
        self.witnessed: dict[str, np.ndarray] = {}
        shape = (len(points), *state.w.shape)
        kept = math.prod(shape) <= _WEIGHTS_LIMIT
        self.weights = np.full(shape, np.nan) if kept else None

    @property
    def total(self) -> int:
        return len(self.targets) * len(self.next)

    def progress(self) -> int:
        return int(self.next.sum())

    def target(self) -> Target:
        """Each trajectory's next save point."""
        next_or_last = self.next.clamp_max(len(self.targets) - 1)
        return Target(self.clock, self.targets[next_or_last])

    def sample(self, state: State, limit: Tensor) -> State:
        """Keep every save point that the last step has reached, up to the clock's ``limit``, where
        an event stops a trajectory. Those that have them all are DONE."""
        shown = torch.minimum(state.readings[self.clock.reading], limit)
        while True:
            target = self.target()
            due = (self.next < len(self.targets)) & (shown >= target.value)
            if not bool(due.any()):
                break
            point = self._read(state, target, due)
            self._keep(point, due)
            self.next = self.next + due
        state = state.stopped(self.next == len(self.targets), Status.DONE)
        return state.stopped(limit < torch.inf, Status.EVENT)

    def _read(self, state: State, target: Target, due: Tensor) -> State:
        """The state at the save point where one is due, elsewhere the state itself."""
        at_start = bool((due & (self.next == 0)).any())
        if state.segment is None or at_start:
            return state
        u = torch.where(due, state.segment.locate(target), 1.0)
        point = inside(self.problem, state, u)
        if isinstance(self.rule, Refining):
            point = self.rule.refined(self.problem, state, u, point)
        return point

    def _keep(self, point: State, due: Tensor) -> None:
        rows = due.nonzero().squeeze(1).cpu().numpy()
        index = self.next[due].cpu().numpy()
        tallies = {f"tally_{name}": tally for name, tally in point.tallies.items()}
        with torch.no_grad():
            observed, witnessed = (
                {name: observer(self.problem, point) for name, observer in observers.items()}
                for observers in (self.observers, self.witnesses)
            )
        values = point.readings | tallies | observed
        for kept, new in ((self.values, values), (self.witnessed, witnessed)):
            for name, value in new.items():
                array = self._checked(name, value)
                if name not in kept:
                    kept[name] = np.full((len(self.targets), *array.shape), np.nan)
                kept[name][index, rows] = array[rows]
        if self.weights is not None:
            w = point.w.detach().cpu().double()
            self.weights[index, rows] = w.numpy()[rows]

    def _checked(self, name: str, value: Any) -> np.ndarray:
        if not isinstance(value, Tensor) or value.shape[:1] != self.next.shape:
            raise ValueError(
                f"observer {name!r} returned {shape_of(value)}, expected a tensor with a leading "
                f"trajectory axis of {len(self.next)}"
            )
        return value.detach().cpu().double().numpy()

    def trajectory(self, state: State, provenance: dict[str, Any], watch: Watch) -> Trajectory:
        events = {
            name: {key: value.cpu().numpy() for key, value in found.items()}
            for name, found in watch.found.items()
        }
        return Trajectory(
            values=self.values,
            weights=self.weights,
            final=state,
            label=self.rule.label,
            clock=self.clock.reading,
            provenance=provenance,
            certificate=certify(self.problem, self.values, self.witnessed, state),
            events=events,
        )
