"""A run that can be read at any of its points: all natural steps of a rule, kept."""

from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from flowsim.motion.clocks import Clock, Target
from flowsim.motion.rule import Refining, Rule, pending
from flowsim.motion.segment import Segment
from flowsim.motion.state import State, tree_map
from flowsim.problems.objective import Objective

_MOST = 2**26  # numbers of one kind; 512 MiB in float64


_GOLDEN = 0.5 * (5**0.5 - 1)


PerPoint: TypeAlias = Float[Tensor, "K B"]
"""A number of each point of each trajectory."""


Points: TypeAlias = Float[Tensor, "K B P"]
"""Flat weights of each point of each trajectory."""


@dataclass(frozen=True, repr=False)
class Traced:
    """``rule``, which leaves its natural steps in ``steps``. Indivisible steps are kept as straight
    ones."""

    rule: Rule
    steps: list[Segment] = field(default_factory=list)

    def __repr__(self) -> str:
        return repr(self.rule)

    @property
    def label(self) -> str:
        return self.rule.label

    @property
    def norm(self) -> Any:
        return getattr(self.rule, "norm", None)

    def start(self, problem: Objective, w_or_state: Tensor | State) -> State:
        return self.rule.start(problem, w_or_state)

    def advance(self, problem: Objective, state: State, until: Target, budget: int) -> State:
        for _ in range(budget):
            before = state
            state = self.rule.advance(problem, state, until, 1)
            self._keep(before, state)
            behind = pending(state, until)
            if not bool(behind.any()):
                break
        return state

    def refined(self, problem: Objective, state: State, u: Tensor, point: State) -> State:
        if not isinstance(self.rule, Refining):
            return point
        return self.rule.refined(problem, state, u, point)

    def _keep(self, before: State, state: State) -> None:
        moved = state.readings["steps"] > before.readings["steps"]
        if not bool(moved.any()):
            return
        step = state.segment
        if step is None and isinstance(self.rule, Refining):
            raise ValueError(
                f"{self.label}: got a method whose steps cannot be read inside, expected one of "
                "flowsim's own"
            )
        taken = len(self.steps)
        numbers = (taken + 1) * state.w.numel()
        if numbers > _MOST:
            raise ValueError(
                f"{self.label}: got a path of more than {taken} steps, expected at most {_MOST} "
                "numbers to keep; try fewer trajectories, a shorter run or a looser rtol"
            )
        if step is None:
            step = _chord(before, state)
        kept = replace(step, multipliers0=None, multipliers1=None)
        self.steps.append(kept)


def _chord(a: State, b: State) -> Segment:
    """The straight step from a to b, walked evenly in all readings."""
    move = b.w - a.w
    rise = b.readings["lam"] - a.readings["lam"]
    even = torch.zeros_like(rise)
    readings = (a.readings, b.readings)
    return Segment.straight((a.w, b.w), move, readings, (rise, rise), (even, even))


@dataclass(frozen=True)
class TracedPath:
    """The natural steps of B trajectories, one after another: a `Segment` of tensors ``(S, B, …)``.

    Points are read ``(K, B)`` at a time and come as a State of K·B trajectories, all of the first
    reading first, so that everything that measures states measures them. They have no tallies,
    memory and multipliers."""

    problem: Objective
    steps: Segment

    @staticmethod
    def of(problem: Objective, traced: Traced) -> "TracedPath":
        """The path that a rule has left. Raises ValueError if it has not moved."""
        if not traced.steps:
            raise ValueError(f"{traced.label}: got a run without a step, expected a path")
        steps = tree_map(lambda *several: torch.stack(several), *traced.steps)
        return TracedPath(problem, steps)

    def at(self, clock: Clock, values: PerPoint) -> tuple[State, Bool[Tensor, "K B"]]:
        """Where the clock first shows these values, and which of them it shows: beyond the end it
        is the end."""
        shown = self.steps.readings1[clock.reading]
        ends = shown.cummax(0).values  # (S, B)
        sought = values.T.contiguous()
        index = torch.searchsorted(ends.T.contiguous(), sought).T
        inside = index < len(ends)
        final = len(ends) - 1
        step = self._step(index.clamp_max(final))
        reached = torch.where(inside, values, torch.inf)
        target = Target(clock, reached.flatten())
        u = step.locate(target)
        return self._state(step, u), inside

    def nearest(self, w: Points) -> State:
        """Where the path is nearest to these weights in ℓ2: in one of the two steps that meet in
        the nearest end."""
        apart = self._apart(w)
        final = apart.shape[-1] - 1
        # a trajectory that rests while others move repeats its end: one step leads to the first,
        # one leaves the last
        first = apart.argmin(-1)
        behind = apart.flip(-1).argmin(-1)
        last = final - behind
        leading = self._step((first - 1).clamp_min(0))
        leaving = self._step(last.clamp_max(final - 1))
        near = w.flatten(0, 1)
        before = _closest(leading, near)
        after = _closest(leaving, near)
        nearest = _nearer(before, after)
        return self._state(nearest.step, nearest.u)

    def _apart(self, w: Points) -> Float[Tensor, "K B S+1"]:
        """How far these weights are from the start and from the end of each step."""
        start = self.steps.w0[:1]
        ends = torch.cat([start, self.steps.w1])
        exact = "donot_use_mm_for_euclid_dist"
        sides = (w.transpose(0, 1), ends.transpose(0, 1))
        distances = torch.cdist(*sides, compute_mode=exact)
        known = distances.nan_to_num(torch.inf)
        return known.transpose(0, 1)

    def _step(self, index: Tensor) -> Segment:
        """The steps of this ``index (K, B)``, one for each row of a batch of K·B."""
        trajectories = torch.arange(index.shape[1], device=index.device)
        columns = trajectories.expand_as(index)

        def chosen(t: Tensor) -> Tensor:
            return t[index, columns].flatten(0, 1)

        return tree_map(chosen, self.steps)

    def _state(self, step: Segment, u: Tensor) -> State:
        w, readings = step.at(u)
        problem = self.problem_of(len(u))
        lam = problem.lam(w).double()
        readings["lam"] = torch.where(u < 1, lam, readings["lam"])
        status = torch.zeros_like(u, dtype=torch.long)
        unknown = u * torch.nan
        return State(w, readings, {}, status, step_size=unknown, memory={})

    def problem_of(self, rows: int) -> Objective:
        """The objective of the K·B trajectories of a reading."""
        w0 = self.steps.w0
        columns = torch.arange(w0.shape[1], device=w0.device)
        readings = rows // len(columns)
        return self.problem.select(columns.repeat(readings))


@dataclass(frozen=True)
class _Nearest:
    """Places ``u (R,)`` inside steps, and how far they are from what was looked for."""

    step: Segment
    u: Float[Tensor, " R"]
    distance: Float[Tensor, " R"]


def _closest(step: Segment, w: Float[Tensor, "R P"]) -> _Nearest:
    """Where each step is nearest to w, by golden section."""
    plain = replace(step, readings0={}, readings1={})

    def distance(u: Tensor) -> Tensor:
        at, _ = plain.at(u)
        return (at - w).norm(dim=-1).double()

    start = torch.zeros_like(step.lam_slope0)
    low = start
    high = start + 1
    for _ in range(45):
        width = _GOLDEN * (high - low)
        a = high - width
        b = low + width
        left = distance(a) <= distance(b)
        low = torch.where(left, low, a)
        high = torch.where(left, b, high)
    u = torch.stack([start, 0.5 * (low + high), start + 1])
    apart = torch.stack([distance(row) for row in u])
    best = apart.nan_to_num(torch.inf).argmin(0, keepdim=True)
    return _Nearest(step, u.gather(0, best)[0], apart.gather(0, best)[0])


def _nearer(a: _Nearest, b: _Nearest) -> _Nearest:
    """Of each pair the nearer one."""
    nearer = a.distance <= b.distance  # (R,)

    def chosen(x: Tensor, y: Tensor) -> Tensor:
        column = nearer.view(-1, *[1] * (x.ndim - 1))
        return torch.where(column, x, y)

    return tree_map(chosen, a, b)
