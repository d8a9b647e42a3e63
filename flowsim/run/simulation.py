"""The one loop: advance a rule, read saves off its steps, observe, checkpoint, and stop for a
stated reason."""

import time as wallclock
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowsim.diagnostics.certificate import certify, witness
from flowsim.diagnostics.margins import Observer
from flowsim.motion.clocks import Clock, SavePlan, Target
from flowsim.motion.rule import Refining, Rule
from flowsim.motion.state import READINGS, State, Status
from flowsim.problems.objective import Objective
from flowsim.run.events import Event, Watch, inside
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
    _check_options(until, observe, events, max_steps)
    weights = w0.w if isinstance(w0, State) else w0
    problem.check_weights(weights)
    problem = problem.like(weights)
    began = wallclock.monotonic()
    state = rule.start(problem, w0)
    begun_with = state.attempts
    recorder = _Recorder(problem, rule, until, state, dict(observe or {}), witness(problem, rule))
    watch = Watch(problem, dict(events or {}), state, until.clock)
    last_checkpoint, calls = began, 0
    with _bar(progress, rule, recorder) as bar:
        try:
            while True:
                state = recorder.sample(state, watch.limit)
                bar.update(recorder.progress() - bar.n)
                # a call takes at least one step, so calls end the loop even where a rule does not
                # count
                left = max_steps - (state.attempts - begun_with).clamp_min(calls)
                state = state.stopped(left <= 0, Status.MAX_STEPS)
                if not bool(state.running.any()):
                    break
                budget = 1 if events else min(_CHUNK, int(left[state.running].min()))
                state, calls = rule.advance(problem, state, recorder.target(), budget), calls + 1
                watch.look(state)
                if (
                    directory is not None
                    and wallclock.monotonic() - last_checkpoint > checkpoint_seconds
                ):
                    save_state(state, Path(directory))
                    last_checkpoint = wallclock.monotonic()
        except KeyboardInterrupt:
            state = state.stopped(state.running, Status.INTERRUPTED)
    provenance = describe(problem, rule, weights) | {"seconds": wallclock.monotonic() - began}
    provenance |= {"max_steps": max_steps, "until": _words(until)}
    provenance |= {"events": {name: event.sentence for name, event in (events or {}).items()}}
    run = recorder.trajectory(state, rule, provenance, watch)
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


def _check_options(until: SavePlan, observe: Any, events: Any, max_steps: int) -> None:
    if not isinstance(until, SavePlan):
        raise TypeError(
            f"simulate: got until={until!r}, expected a schedule, try until=flowsim.lam(100)"
        )
    if isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 1:
        raise ValueError(f"simulate: got max_steps={max_steps!r}, expected an integer ≥ 1")
    if observe is not None and not (
        isinstance(observe, Mapping) and all(callable(f) for f in observe.values())
    ):
        raise TypeError(
            "simulate: got observe that is not a mapping from names to functions of (problem, state); "
            "try observe=flowsim.diagnostics.standard(problem)"
        )
    if events is not None and not (
        isinstance(events, Mapping) and all(isinstance(event, Event) for event in events.values())
    ):
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
    return f"{until.clock.name} {until.stop:g}" + (
        " (log)" if until.clock.reading == "log_time" else ""
    )


def _bar(progress: bool, rule: Rule, recorder: "_Recorder") -> Any:
    if progress:
        from tqdm.auto import tqdm  # the notebook's bar where there is one
    else:
        from tqdm import tqdm
    return tqdm(
        total=recorder.total, desc=rule.label, disable=not progress, unit="save", leave=False
    )


class _Recorder:
    """Reads save points off states and keeps them."""

    def __init__(
        self,
        problem: Objective,
        rule: Rule,
        until: SavePlan,
        state: State,
        observers: dict[str, Observer],
        witnesses: dict[str, Observer],
    ) -> None:
        self.problem, self.rule, self.observers, self.witnesses = (
            problem,
            rule,
            observers,
            witnesses,
        )
        self.clock: Clock = until.clock
        self.targets = torch.tensor(
            [-torch.inf, *until.targets(state.readings[self.clock.reading])],
            dtype=torch.float64,
            device=state.w.device,
        )
        B, P = state.w.shape
        self.next = torch.zeros(B, dtype=torch.long, device=state.w.device)
        self.values: dict[str, np.ndarray] = {}
        self.witnessed: dict[str, np.ndarray] = {}
        self.weights = (
            np.full((len(self.targets), B, P), np.nan) if self._affordable(B * P) else None
        )

    def _affordable(self, numbers: int) -> bool:
        return len(self.targets) * numbers <= _WEIGHTS_LIMIT

    @property
    def total(self) -> int:
        return len(self.targets) * len(self.next)

    def progress(self) -> int:
        return int(self.next.sum())

    def target(self) -> Target:
        """Each trajectory's next save point."""
        return Target(self.clock, self.targets[self.next.clamp_max(len(self.targets) - 1)])

    def sample(self, state: State, limit: Tensor) -> State:
        """Keep every save point that the last step has reached, up to the clock's ``limit``, where
        an event stops a trajectory. Those that have them all are DONE."""
        shown = torch.minimum(state.readings[self.clock.reading], limit)
        while True:
            target = self.target()
            due = (self.next < len(self.targets)) & (shown >= target.value)
            if not bool(due.any()):
                break
            self._keep(self._read(state, target, due), due)
            self.next = self.next + due
        return state.stopped(self.next == len(self.targets), Status.DONE).stopped(
            limit < torch.inf, Status.EVENT
        )

    def _read(self, state: State, target: Target, due: Tensor) -> State:
        """The state at the save point where one is due, elsewhere the state itself."""
        first = self.next == 0
        if state.segment is None or bool((due & first).any()):
            return state
        u = torch.where(due, state.segment.locate(target), 1.0)
        point = inside(self.problem, state, u)
        return (
            self.rule.refined(self.problem, state, u, point)
            if isinstance(self.rule, Refining)
            else point
        )

    def _keep(self, point: State, due: Tensor) -> None:
        rows, index = due.nonzero().squeeze(1).cpu().numpy(), self.next[due].cpu().numpy()
        values = dict(point.readings) | {
            f"tally_{name}": tally for name, tally in point.tallies.items()
        }
        with torch.no_grad():
            values |= {
                name: observer(self.problem, point) for name, observer in self.observers.items()
            }
            witnessed = {
                name: observer(self.problem, point) for name, observer in self.witnesses.items()
            }
        for kept, new in ((self.values, values), (self.witnessed, witnessed)):
            for name, value in new.items():
                array = self._checked(name, value)
                if name not in kept:
                    kept[name] = np.full((len(self.targets), *array.shape), np.nan)
                kept[name][index, rows] = array[rows]
        if self.weights is not None:
            self.weights[index, rows] = point.w.detach().cpu().double().numpy()[rows]

    def _checked(self, name: str, value: Any) -> np.ndarray:
        if not isinstance(value, Tensor) or value.shape[:1] != self.next.shape:
            got = (
                f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            )
            raise ValueError(
                f"observer {name!r} returned {got}, expected a tensor with a leading trajectory axis of "
                f"{len(self.next)}"
            )
        return value.detach().cpu().double().numpy()

    def trajectory(
        self, state: State, rule: Rule, provenance: dict[str, Any], watch: Watch
    ) -> Trajectory:
        return Trajectory(
            values=self.values,
            weights=self.weights,
            final=state,
            label=rule.label,
            clock=self.clock.reading,
            provenance=provenance,
            certificate=certify(self.problem, self.values, self.witnessed, state),
            events={
                name: {k: v.cpu().numpy() for k, v in found.items()}
                for name, found in watch.found.items()
            },
        )
