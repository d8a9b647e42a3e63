"""What small steps tend to, as a measurement: the same run with smaller and smaller steps, and what
the steps still change.

On smooth fields, and in ℓ2 also across kinks, small steps of steepest descent tend to the steepest
flow. On nets with kinks in ℓ1, ℓ∞ or spectral norms they tend to something else. At a kink they go
to and fro, so that their velocity is a mean of *directions*, an element of conv{u⁻, u⁺} that stays
on the kink (Filippov 1988); the steepest flow takes the direction of a mean of *gradients*, that of
least dual norm (Tsilivis et al. 2026, Prop. 7). Where both sides ask for opposite directions the
mean is zero, and small steps stall where the flow goes on. Where many kinks are crossed at once,
the hull of directions does not determine a velocity. There is no equation to integrate then, and
whether there is a limit at all is a matter of trying."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from flowsim.checks import as_ladder
from flowsim.descent.small_step import SmallStep
from flowsim.descent.steepest import SteepestDescent
from flowsim.diagnostics.margins import Observer, classifies, margin
from flowsim.diagnostics.series import Column, Series, as_array, positive
from flowsim.flow.steepest import SteepestFlow
from flowsim.motion.clocks import STEPS, SavePlan, Target, arclength, steps
from flowsim.motion.rule import pending
from flowsim.motion.state import State, Status
from flowsim.norms.norm import Norm
from flowsim.problems.objective import Objective
from flowsim.run.events import Event
from flowsim.run.simulation import simulate
from flowsim.run.trajectory import Trajectory
from flowsim.study.comparison import stacked_weights
from flowsim.velocity.selection import select

_WATCHED = 500  # steps that decide whether a run stalls


_IDLE = 0.02  # of their predicted gain: a run that gains less stalls


KinkFlags: TypeAlias = Bool[Tensor, "B K"]
"""A yes or no for each kink: whether z > 0, or whether it was crossed."""


@dataclass(frozen=True)
class SmallStepLimit:
    """Small-step runs from one start with the steps of a ladder, coarse to fine, and what their
    differences tell.

    ``stalled`` are the trajectories that no longer rise with the finest steps. ``slope`` is the
    rise of Λ per arclength that the steepest flow has there, counting the kinks that the steps
    cross as kinks that they are on. It is zero at a point that is stationary to within the step,
    and NaN for trajectories that go on and for nets whose kinks are not at hand."""

    ladder: tuple[float, ...]
    runs: tuple[Trajectory, ...]
    stalled: Bool[np.ndarray, " B"]
    slope: Column

    @property
    def finest(self) -> Trajectory:
        return self.runs[-1]

    def __getitem__(self, name: str) -> Float[np.ndarray, "R K B *shape"]:
        """A value of all runs at the common saves; ``"direction"`` is w/‖w‖₂."""
        if name == "direction":
            weights = stacked_weights("direction", self.runs)
            length = np.linalg.norm(weights, axis=-1, keepdims=True)
            return weights / length
        values = [run[name] for run in self.runs]
        return np.stack(values)

    def differences(self, name: str) -> Float[np.ndarray, "R-1 K B"]:
        """What each run changes against the one before, over the largest value of all runs and
        saves."""
        value = self[name]
        value = value.reshape(*value.shape[:3], -1)
        change = np.diff(value, axis=0)
        difference = np.linalg.norm(change, axis=-1)
        size = np.linalg.norm(value, axis=-1)
        largest = np.nanmax(size, axis=(0, 1))
        scale = np.where(largest > 0, largest, 1.0)
        return difference / scale

    def order(self, name: str) -> Float[np.ndarray, "R-2 K B"]:
        """p, where a difference falls like the step to the p; NaN where nothing differs."""
        d = positive(self.differences(name))
        fall = np.log(d[:-1] / d[1:])
        log_steps = np.log(self.ladder)
        shrink = -np.diff(log_steps)[1:]
        return fall / shrink[:, None, None]

    def error(self, name: str) -> Series:
        """Richardson's estimate of what the finest run is off, on the scale of `differences`.

        d/(ρᵖ − 1), with the ladder's last ratio ρ and the observed order, but 1 where it is higher
        and ½ where it is lower. d is the last difference, or the one before over ρ if that is
        larger: one may be small by chance."""
        ratio = self.ladder[-2] / self.ladder[-1]
        before, last = self.differences(name)[-2:]
        order = self.order(name)[-1]
        known = np.nan_to_num(order, nan=1.0)
        p = np.clip(known, 0.5, 1.0)
        d = np.maximum(last, before / ratio)
        return d / (ratio**p - 1)

    def verdicts(self, name: str = "margin", tol: float = 0.01) -> list[str]:
        """One sentence for each trajectory: whether ``name`` has converged to ``tol`` at all saves,
        on the scale of `differences`, or why not."""
        trajectories = range(len(self.finest))
        return [self._verdict(b, name, tol) for b in trajectories]

    def _verdict(self, b: int, name: str, tol: float) -> str:
        if self.stalled[b]:
            return self._stall(b)
        value = self[name][-1, -1, b]
        error = self.error(name)[:, b]
        last = self.differences(name)[-1, :, b]
        if not np.isfinite(error).all():
            names = [run.statuses[b].name for run in self.runs]
            stops = ", ".join(names)
            level = self._level(b)
            return f"not reached: the runs stopped with {stops}, the finest at level {level:.4g}"
        if error.max() > tol:
            return (
                f"not converged: the two finest runs differ by {last.max():.1%} in {name}, "
                f"the finest is off by an estimated {error.max():.1%}"
            )
        where = f"{name} {value:.4g}" if value.ndim == 0 else name
        worst = last.argmax()
        order = self.order(name)[-1, worst, b]
        falls = f"fall with order {order:.1f}" if order >= 0.5 else "no longer fall"
        estimate = f"{where} with an estimated error of {error.max():.1%}"
        return f"converged: {estimate}; differences {falls}"

    def _stall(self, b: int) -> str:
        at = f"level {self._level(b):.4g}"
        slope = self.slope[b]
        if math.isnan(slope):
            return f"stalls at {at}; whether that point is stationary is not known for this net"
        if slope == 0:
            return f"stalls at {at}, at a stationary point to within the step"
        rises = f"at {at} the steepest flow rises with slope {slope:.3g}"
        return f"stalls at a non-stationary point: {rises}"

    def _level(self, b: int) -> float:
        lam = self.finest.final.readings["lam"]
        return float(lam[b])


def small_step_limit(
    problem: Objective,
    norm: Norm,
    w0: Tensor | State,
    *,
    until: SavePlan,
    ladder: Sequence[float] = (0.1, 0.05, 0.025, 0.0125),
    observe: Mapping[str, Observer] | None = None,
    max_steps: int = 100_000,
    **options: Any,
) -> SmallStepLimit:
    """What small-step steepest descent tends to as its steps shrink: `SmallStep` with each step of
    ``ladder``, from one start to one end, with a report of convergence.

    A step η predicts the gain ``dlam`` = η in Λ and moves no weight by more than ``relative`` = η
    of the largest. On smooth fields, and in ℓ2, the limit is the steepest flow. On nets with kinks
    in ℓ1, ℓ∞ or spectral norms it is another object, Filippov's mean of directions, or none; see
    the module. Where branches or chatter of many kinks scatter the weights, margins may settle long
    before directions do.

    ``observe`` is by default the margin in ``norm``, for classification. The finest run takes at
    most ``max_steps`` steps and coarser ones in proportion to their steps, so that all may go
    equally far; ``options`` are those of `simulate`. A run that gains next to nothing of what its
    steps predict is watched for a while longer, to tell a stall from slow progress."""
    ladder = as_ladder("small_step_limit", ladder)
    if observe is None:
        observe = {"margin": margin(norm)} if classifies(problem) else {}
    options |= {"until": until, "observe": observe}
    runs = []
    for step in ladder:
        most = math.ceil(max_steps * ladder[-1] / step)
        rule = SmallStep(norm, dlam=step, relative=step)
        run = simulate(problem, rule, w0, max_steps=most, **options)
        runs.append(run)
    stalled, slope = _stalls(problem, norm, runs[-1], ladder[-1])
    return SmallStepLimit(ladder, tuple(runs), stalled, slope)


def gain_ratio(
    problem: Objective, flow: SteepestFlow, w0: Tensor | State, *, length: float, tiny: int = 2000
) -> Float[Tensor, " B"]:
    """How much faster the flow raises Λ than tiny steps of steepest descent do, from one state over
    one arclength.

    The flow goes on from ``w0`` by ``length``, in its own norm. Steps of length/tiny go until they
    are as far from ``w0`` as the flow is: *net*, since much of what they do across kinks is undone
    by the next step. The ratio of the rises is 1 where small steps tend to the flow, up to an error
    of order 1/tiny. NaN where the flow stops early, and where 10·tiny steps do not get there.

    A State of a flow carries the multipliers of the kinks that ``w0`` is on.
    """
    norm = flow.norm.bind(problem.layout)
    w = w0.w if isinstance(w0, State) else w0
    start = flow.start(problem.like(w), w0)
    nowhere = {"arclength": torch.zeros_like(start.step_size)}
    start = replace(start, readings=start.readings | nowhere)
    until = arclength([length])
    observe = {"away": _away(norm, start.w)}
    walked = simulate(problem, flow, start, until=until, observe=observe)
    net = torch.from_numpy(walked["away"][-1])
    lam = walked["lam"]
    rise = lam[-1] - lam[0]
    rule = SteepestDescent(flow.norm, length / tiny, normalized=True)
    gained = _gain_of_steps(problem, rule, start.w, net.to(w), most=10 * tiny)
    return torch.from_numpy(rise / gained)


def _away(norm: Norm, start: Tensor) -> Observer:
    """‖w − w₀‖."""
    return lambda problem, state: norm.value(state.w - start)


def _gain_of_steps(
    problem: Objective, rule: SteepestDescent, w: Tensor, net: Tensor, most: int
) -> Column:
    """The rise of Λ by steps from w until they are ``net`` away; NaN where ``most`` steps are
    not."""
    away = _away(rule.norm.bind(problem.layout), w)

    def covered(problem: Objective, state: State) -> Tensor:
        return away(problem, state) / net

    there = Event(covered, 1.0, stop=True)
    until = steps([most])
    run = simulate(problem, rule, w, until=until, events={"there": there})
    found = run.events["there"]
    rise = found["lam"] - run["lam"][0]
    return rise / found["value"]


# --------------------------------------------------------------------------------------------------
# Stalls
# --------------------------------------------------------------------------------------------------


def _stalls(
    problem: Objective, norm: Norm, run: Trajectory, step: float
) -> tuple[np.ndarray, np.ndarray]:
    """Which trajectories of the finest run stall, and the slope of the steepest flow where they
    do."""
    stalled = _efficiency(run) < 0.1
    slope = np.full(len(run), np.nan)
    if not stalled.any():
        return stalled, slope
    problem = problem.like(run.final.w)
    rule = SmallStep(norm, dlam=step, relative=step)
    end, more, crossed = _watched(problem, rule, run.final)
    idle = more["lam"] < _IDLE * more["dissipated"]
    stalled &= idle.cpu().numpy()
    if crossed is not None and stalled.any():
        length = more["arclength"] / _WATCHED
        ahead = _slope_ahead(problem, norm, end.w, crossed, length)
        slope[stalled] = as_array(ahead)[stalled]
    return stalled, slope


def _efficiency(run: Trajectory) -> Column:
    """The rise of Λ over what the steps predicted, from the last save that was reached before the
    end."""
    done = [status is Status.DONE for status in run.statuses]
    reached = np.isfinite(run["lam"]).sum(0)
    save = reached - 1 - done
    last = (save, np.arange(len(run)))
    end = run.final.readings
    gained = as_array(end["lam"]) - run["lam"][last]
    predicted = as_array(end["dissipated"]) - run["dissipated"][last]
    return gained / positive(predicted)


def _watched(
    problem: Objective, rule: SmallStep, state: State
) -> tuple[State, dict[str, Tensor], KinkFlags | None]:
    """Some more steps: where they end, what they add to the readings, and which kinks they cross
    (None if not known)."""
    state = rule.start(problem, state)
    before = state.readings
    until = Target(STEPS, state.readings["steps"] + _WATCHED)
    side = _sides(problem, state.w)
    crossed = None if side is None else torch.zeros_like(side)
    while bool(pending(state, until).any()):
        state = rule.advance(problem, state, until, 1)
        if crossed is not None:
            here = _sides(problem, state.w)
            crossed = crossed | (here != side)
            side = here
    after = state.readings
    more = {name: after[name] - before[name] for name in before}
    return state, more, crossed


def _sides(problem: Objective, w: Tensor) -> KinkFlags | None:
    """On which side of its kinks w is; None for nets whose kinks are not at hand."""
    if not problem.kinks:
        return w[:, :0] > 0
    try:
        return problem.hinges(w).z > 0
    except ValueError:
        return None


def _slope_ahead(
    problem: Objective,
    norm: Norm,
    w: Float[Tensor, "B P"],
    crossed: KinkFlags,
    length: Float[Tensor, " B"],
) -> Float[Tensor, " B"]:
    """The slope of the steepest flow at w, taken to be on the crossed kinks; zero if straight on by
    ``length``, one step, Λ does not rise by half of what the slope says."""
    multipliers = None
    if problem.kinks:
        side = problem.hinges(w).z > 0
        multipliers = torch.where(crossed, 0.5, side.to(w))
    flow = select(problem, norm, w, multipliers)
    step = length.to(w)[:, None] * flow.direction
    level = problem.lam(w)
    gained = problem.lam(w + step) - level
    rises = gained > 0.5 * length * flow.dual
    return torch.where(rises, flow.dual, 0.0)
