"""Discrete training beside a flow: runs from one start, and how far they are from the flow where
both have come equally far."""

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from flowsim.diagnostics.margins import Observer, classifies, margin
from flowsim.diagnostics.series import Series, as_array, changes, positive
from flowsim.motion.clocks import ARCLENGTH, LAM, STEPS, TIME, Clock, SavePlan, Target, at_points
from flowsim.motion.rule import Rule, pending
from flowsim.motion.state import State, Status
from flowsim.norms.norm import Norm
from flowsim.norms.vector import L1, L2, Linf
from flowsim.problems.objective import Objective
from flowsim.problems.problem import Problem
from flowsim.run.simulation import simulate
from flowsim.run.trajectory import Trajectory
from flowsim.study.traced_path import Traced, TracedPath

Rules: TypeAlias = Rule | Sequence[Rule] | Mapping[str, Rule | Trajectory]


EQUAL = {"log_time": TIME, "lam": LAM, "arclength": ARCLENGTH}


PLACES = (*EQUAL, "nearest")


APART = ("weights", "direction", "outputs")


FlatWeights: TypeAlias = Float[Tensor, "B P"]
"""Flat weights of each trajectory."""


PerInterval: TypeAlias = Float[np.ndarray, "K-1 B"]
"""A number of each trajectory from one save to the next."""


Beside: TypeAlias = dict[str, Float[np.ndarray, "K B *shape"]]
"""Readings, observations and distances by name, at each save."""


@dataclass(frozen=True)
class Comparison:
    """Runs from one start and the flow beside them, at each of the runs' save points.

    ``comparison[label, what, at]`` is how far a run is from the flow, ``(K, B)``. ``at`` says which
    point of the flow a save point is held against:

        "log_time", "lam", "arclength"   where the flow has come to the same t, Λ or s, s being in
                                         the norm of each
        "nearest"                        where the flow is nearest in ℓ2

    and ``what`` how their distance is measured:

        "weights"      ‖w − v‖₂/‖v‖₂, v the weights of the flow
        "direction"    ‖w/‖w‖₂ − v/‖v‖₂‖₂
        "outputs"      ‖f(x; w) − f(x; v)‖₂/‖f(x; v)‖₂, over all examples and outputs of the net
        anything observed, or a reading of a clock: value of the run less value of the flow

    NaN where a run has stopped, and where the flow has not come that far. What is observed of the
    flow is observed of its weights, on kinks too."""

    flow: Trajectory
    runs: dict[str, Trajectory]
    matched: dict[str, dict[str, Beside]]
    """``matched[label][at][name]``: the flow's values at the points that the save points are held
    against."""

    def __getitem__(self, key: tuple[str, str, str]) -> Float[np.ndarray, "K B *shape"]:
        label, what, at = self._checked(key)
        there = self.matched[label][at]
        if what in APART:
            return there[f"apart_{what}"]
        ours = self.runs[label][what]
        theirs = there[what]
        differ = ours != theirs
        same = np.zeros_like(ours)  # also log t = −∞ at the start
        return np.subtract(ours, theirs, out=same, where=differ)

    def _checked(self, key: Any) -> tuple[str, str, str]:
        three = isinstance(key, tuple) and len(key) == 3
        if not three:
            raise KeyError(
                f"comparison: got {key!r}, expected [label, what, at], "
                'try ["…", "weights", "log_time"]'
            )
        choices = (self.labels, self._measured, PLACES)
        for value, known in zip(key, choices, strict=True):
            if value not in known:
                raise KeyError(f"comparison: got {value!r}, expected one of {', '.join(known)}")
        return key

    @property
    def _measured(self) -> list[str]:
        """Distances, of which an objective that is no loss has none of outputs, and values."""
        places = [there["nearest"] for there in self.matched.values()]
        distances = [what for what in APART if all(f"apart_{what}" in there for there in places)]
        values = [name for name in self.flow.names if not name.startswith("tally_")]
        return distances + values

    @property
    def labels(self) -> list[str]:
        return list(self.runs)

    def slopes(self, label: str) -> tuple[PerInterval, PerInterval]:
        """dΛ/ds, the mean from save to save, of a run and of the flow between the same values of
        Λ."""
        run = self.runs[label]
        there = self.matched[label]["lam"]
        ours = _slope(run["lam"], run["arclength"])
        flows = _slope(there["lam"], there["arclength"])
        return ours, flows

    def write(self, path: str | Path) -> Path:
        """Write all distances as a CSV file: a row for each run, place, trajectory and save point,
        with the run's readings of the clocks. Returns the path."""
        names = [what for what in self._measured if self._is_number(what)]
        distances = [f"apart_{name}" for name in names]
        header = ["run", "at", "trajectory", "save", *EQUAL, *distances]
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(header)
            writer.writerows(self._rows(names))
        return Path(path)

    def _rows(self, names: list[str]) -> Iterator[list[Any]]:
        """Where each row is, the run's readings there, and these distances."""
        for (label, run), at in product(self.runs.items(), PLACES):
            readings = [run[clock] for clock in EQUAL]
            apart = [self[label, name, at] for name in names]
            columns = np.stack(readings + apart)
            for b, k in np.ndindex(len(run), columns.shape[1]):
                numbers = [f"{value:.12g}" for value in columns[:, k, b]]
                yield [label, at, b, k, *numbers]

    def _is_number(self, what: str) -> bool:
        """Whether it is one number of each trajectory."""
        return what in APART or self.flow[what].ndim == 2


def _slope(lam: Series, length: Series) -> PerInterval:
    walked = changes(length)
    return changes(lam) / positive(walked)


def compare(
    problem: Objective,
    flow: Rule,
    rules: Rules,
    w0: Tensor | State,
    *,
    until: SavePlan,
    observe: Mapping[str, Observer] | None = None,
    max_steps: int = 1_000_000,
    progress: bool = False,
) -> Comparison:
    """Run ``rules`` and ``flow`` on ``problem`` from ``w0 (B, P)``, and hold them against each
    other.

    ``rules`` is one rule, several, or a mapping from labels to rules, or to runs from the same
    start that exist. The flow goes on until it has covered t, Λ and s of all runs, or
    ``max_steps``, and is read inside its natural steps, so that it is as exact there as its
    ``rtol`` makes it. Any rule may take its place, such as the same method with a much smaller
    learning rate; indivisible steps are read as straight ones.

    ``observe`` is by default the margin in ℓ1, ℓ2, ℓ∞ and the flow's norm, for classification.
    """
    start = w0.w if isinstance(w0, State) else w0
    problem.check_weights(start)
    problem = problem.like(start)
    flow.start(problem, w0)  # what it refuses is said before anything runs
    observe = _margins(problem, flow) if observe is None else observe
    options: dict[str, Any] = {"observe": observe, "max_steps": max_steps, "progress": progress}
    runs = {}
    for label, rule in _labelled(rules).items():
        run = rule
        if not isinstance(run, Trajectory):
            run = simulate(problem, run, w0, until=until, **options)
        _require_weights(label, run, start)
        runs[label] = run
    traced = Traced(flow)
    until = _on_time(until, runs)
    walked = simulate(problem, traced, w0, until=until, **options)
    _go_on(problem, traced, walked.final, runs, max_steps)
    path = TracedPath.of(problem, traced)
    matched = {}
    for label, run in runs.items():
        matched[label] = _matched(problem, path, run, observe)
    return Comparison(walked, runs, matched)


def _margins(problem: Objective, flow: Rule) -> dict[str, Observer]:
    if not classifies(problem):
        return {}
    norms: list[Norm] = [L1(), L2(), Linf()]
    own = getattr(flow, "norm", None)
    if isinstance(own, Norm):
        norms.append(own)
    return {f"margin_{norm.name}": margin(norm) for norm in norms}


def _labelled(rules: Rules) -> dict[str, Rule | Trajectory]:
    if isinstance(rules, Mapping):
        return dict(rules)
    several = rules if isinstance(rules, Sequence) else [rules]
    named: dict[str, Rule | Trajectory] = {}
    for rule in several:
        if rule.label in named:
            raise ValueError(
                f"compare: got two rules labelled {rule.label!r}, expected different labels, "
                "try a mapping"
            )
        named[rule.label] = rule
    return named


def _require_weights(label: str, run: Trajectory, start: Tensor) -> None:
    if run.weights is None:
        raise ValueError(
            f"compare: {label!r} holds no weights, expected them at each save point; "
            "try fewer saves"
        )
    given = as_array(start)
    if not np.array_equal(run.weights[0], given):
        raise ValueError(
            f"compare: {label!r} begins at other weights than w0, expected one start of all runs"
        )


def stacked_weights(owner: str, runs: Iterable[Trajectory]) -> Float[np.ndarray, "R K B P"]:
    """The weights of all runs at their common saves. Raises ValueError where they hold none."""
    kept = []
    for run in runs:
        if run.weights is None:
            raise ValueError(
                f"{owner}: the runs hold no weights, expected them at each save; try fewer saves"
            )
        kept.append(run.weights)
    return np.stack(kept)


# --------------------------------------------------------------------------------------------------
# The flow, as far as the runs go
# --------------------------------------------------------------------------------------------------


def _on_time(until: SavePlan, runs: Mapping[str, Trajectory]) -> SavePlan:
    """``until`` for the flow; instead of steps, which mean nothing to it, times at which runs save:
    those of the run with most save points that all of its trajectories reach, and of these of the
    longest."""
    if until.clock is not STEPS:
        return until
    times = [_common_times(run) for run in runs.values()]
    most = max(map(len, times), default=0)
    longest = [points for points in times if len(points) == most]
    points = max(longest, key=lambda points: points[-1:], default=())
    if not points:
        raise ValueError(
            "compare: got runs without a step that all their trajectories take, "
            "expected longer ones"
        )
    return at_points(TIME, points)


def _common_times(run: Trajectory) -> tuple[float, ...]:
    """Medians over trajectories of log t at the save points that all have reached, after the
    start."""
    log_t = run["log_time"]
    common = np.isfinite(log_t).all(1)
    medians = np.median(log_t[common], axis=1)
    return tuple(np.unique(medians).tolist())


def _go_on(
    problem: Objective, traced: Traced, state: State, runs: Mapping[str, Trajectory], max_steps: int
) -> None:
    """Walk on to the furthest that any run has come to on each clock, trajectories that fail
    aside."""
    if not runs:
        return
    begun = state.attempts
    finals = [run.final for run in runs.values()]
    for clock in EQUAL.values():
        shown = [_come_to(final, clock, state) for final in finals]
        furthest = torch.stack(shown).amax(0)
        goal = Target(clock, furthest)
        state = traced.start(problem, state)
        attempts = state.attempts - begun
        left = max_steps - int(attempts.max())
        behind = pending(state, goal)
        if left > 0 and bool(behind.any()):
            state = traced.advance(problem, state, goal, left)


def _come_to(final: State, clock: Clock, like: State) -> Float[Tensor, " B"]:
    """What the clock shows at the end, −∞ for a trajectory that has failed."""
    failed = final.status == Status.NONFINITE
    shown = final.readings[clock.reading]
    reached = torch.where(failed, -torch.inf, shown)
    return reached.to(like.step_size)


def _matched(
    problem: Objective, path: TracedPath, run: Trajectory, observe: Mapping[str, Observer]
) -> dict[str, Beside]:
    """The flow's values beside each save point of a run, by the place they are taken at."""
    steps = path.steps
    weights = torch.from_numpy(run.weights).to(steps.w0)  # (K, B, P)
    found = {}
    for place, clock in EQUAL.items():
        shown = torch.from_numpy(run[place])
        point, inside = path.at(clock, shown.to(steps.lam_slope0))
        found[place] = _values(problem, point, inside, weights, observe)
    nearest = path.nearest(weights)
    known = torch.isfinite(weights).all(-1)
    found["nearest"] = _values(problem, nearest, known, weights, observe)
    return found


def _values(
    problem: Objective,
    state: State,
    inside: Tensor,
    weights: Tensor,
    observe: Mapping[str, Observer],
) -> Beside:
    """Readings, observations and distances ``(K, B, …)`` at the points of ``state``, NaN where not
    ``inside``."""
    several = []
    # save by save, because an observer may hold data of its own for each trajectory
    rows = torch.arange(inside.numel(), device=inside.device)
    saves = rows.view_as(inside)
    for save, w in zip(saves, weights, strict=True):
        point = state.select(save)
        values = dict(point.readings)
        with torch.no_grad():
            for name, measure in observe.items():
                values[name] = measure(problem, point)
            values |= _apart(problem, w, point.w)
        several.append(values)
    return {name: _stacked(name, several, inside) for name in several[0]}


def _stacked(name: str, several: list[dict[str, Tensor]], inside: Tensor) -> np.ndarray:
    """One value at all saves."""
    arrays = [as_array(values[name]) for values in several]
    numbers = np.stack(arrays)
    axes = [1] * (numbers.ndim - 2)
    known = inside.cpu().view(*inside.shape, *axes)
    return np.where(known, numbers, np.nan)


def _apart(problem: Objective, w: FlatWeights, v: FlatWeights) -> dict[str, Tensor]:
    """Distances from the flow's weights v, ``(B,)``."""
    found = {}
    found["apart_weights"] = _relative(w, v)
    found["apart_direction"] = _relative(_unit(w), _unit(v))
    if isinstance(problem, Problem):
        ours = problem.outputs(w).flatten(1)
        flows = problem.outputs(v).flatten(1)
        found["apart_outputs"] = _relative(ours, flows)
    return found


def _relative(a: Tensor, b: Tensor) -> Float[Tensor, " B"]:
    """‖a − b‖₂/‖b‖₂; 0 where both are at the origin."""
    apart = (a - b).norm(dim=-1)
    ratio = apart / b.norm(dim=-1)
    return torch.where(apart == 0, apart, ratio)


def _unit(w: FlatWeights) -> FlatWeights:
    size = w.norm(dim=-1, keepdim=True)
    return torch.where(size > 0, w / size, w)
