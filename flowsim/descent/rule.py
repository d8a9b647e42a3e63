"""What discrete rules share: the bookkeeping of a step, and the base of rules whose step is one
gradient."""

import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from flowsim.motion.clocks import Target, log_time_rate
from flowsim.motion.rule import advance_by_steps
from flowsim.motion.state import State, Status, initial_state
from flowsim.norms.norm import Norm
from flowsim.numerics.quadrature import log_mean_exp
from flowsim.problems.objective import Objective


@dataclass(frozen=True)
class Step:
    """A straight step: ``move (B, P)`` of length ``length (B,)`` in the rule's norm.

    ``log_time`` is the logarithm of the time that it takes, None where that is the steepest flow's
    for this path."""

    move: Float[Tensor, "B P"]
    length: Float[Tensor, " B"]
    log_time: Float[Tensor, " B"] | None = None


def begin(objective: Objective, norm: Norm, w_or_state: Tensor | State) -> State:
    """A state with the gradient at hand, as `take` wants it. One gradient evaluation."""
    state = initial_state(objective, w_or_state)
    lam, h = objective.ascent(state.w)
    state = replace(
        state,
        readings=state.readings | {"lam": lam.double()},
        tallies=state.tallies | {"gradients": state.tallies["gradients"] + 1},
        memory={
            "ascent": h,
            "dual": norm.dual(h).double(),
            "size": norm.value(state.w).double(),
        },
        multipliers=None,
        segment=None,
    )
    return state.stopped(state.memory["dual"] == 0, Status.STATIONARY)


def take(
    objective: Objective,
    norm: Norm,
    state: State,
    step: Step,
    remembered: dict[str, Tensor] | None = None,
) -> State:
    """The state after a straight step of every trajectory, with what the rule has ``remembered``.
    One gradient evaluation. A trajectory that the step would take to numbers that are not finite
    stays and stops."""
    w = state.w + step.move
    lam, h = objective.ascent(w)
    lam = lam.double()
    before, readings = state.memory, state.readings
    dual, size = norm.dual(h).double(), norm.value(w).double()
    log_time = step.log_time
    if log_time is None:
        here, there = (
            log_time_rate(objective, a, b)
            for a, b in ((readings["lam"], before["dual"]), (lam, dual))
        )
        log_time = torch.log(step.length) + log_mean_exp(here, there)
    mean_size = 0.5 * (before["size"] + size)
    moved = State(
        w=w,
        readings={
            "steps": readings["steps"] + 1,
            "lam": lam,
            "log_time": torch.logaddexp(readings["log_time"], log_time),
            "arclength": readings["arclength"] + step.length,
            "relative": readings["relative"]
            + torch.where(mean_size > 0, step.length / mean_size, 0.0),
            "dissipated": readings["dissipated"] + step.length * 0.5 * (before["dual"] + dual),
        },
        tallies=state.tallies
        | {"gradients": state.tallies["gradients"] + 1, "accepted": state.tallies["accepted"] + 1},
        status=state.status,
        step_size=state.step_size,
        memory=before | {"ascent": h, "dual": dual, "size": size} | (remembered or {}),
    )
    if "age" in before:
        moved.memory["age"] = before["age"] + 1
    finite = torch.isfinite(lam + dual + size)
    if not bool(finite.all()):
        moved = (
            replace(moved, segment=state.segment)
            .where(finite, state)
            .stopped(~finite, Status.NONFINITE)
        )
    return moved


def stop_if_still(moved: State, before: State) -> State:
    """``moved`` with trajectories stopped whose next step would be the last one again: those that
    have not moved, and those without a gradient. For rules whose step is a function of the
    weights."""
    length = moved.readings["arclength"] - before.readings["arclength"]
    # a step that moves no weight is at most a unit of rounding long, times what the norm makes of
    # single entries
    short = ~(length > torch.finfo(moved.w.dtype).eps ** 0.5 * moved.memory["size"])
    flat = moved.memory["dual"] == 0
    if not bool((short | flat).any()):
        return moved
    still = short & (moved.w == before.w).all(-1) & moved.running
    if bool(still.any()):
        moved = moved.where(~still, replace(before, segment=moved.segment))
        moved = moved.stopped(still, Status.PRECISION_FLOOR)
    return moved.stopped(flat, Status.STATIONARY)


class Discrete(ABC):
    """A rule that takes one step of every trajectory from one gradient. A new one defines the
    abstract members, and where it remembers more than the gradient `blank`.

    States of rules of the same `kind` go on with its memory, so that a run can be resumed; others
    begin a new one."""

    memoryless: bool = True
    """Whether a step is a function of the weights alone, so that one that moves nothing is the
    last."""

    @property
    @abstractmethod
    def label(self) -> str:
        """What plots and tables call this rule."""

    @property
    def kind(self) -> str:
        """The rules that can go on with each other's memory."""
        return type(self).__name__

    @abstractmethod
    def bound(self, problem: Objective) -> Norm:
        """The norm that lengths are measured in, with the problem's shapes."""

    @abstractmethod
    def step(self, problem: Objective, norm: Norm, state: State) -> State:
        """The state one step later, by way of `take`."""

    def blank(self, problem: Objective, state: State) -> dict[str, Tensor]:
        """What the rule remembers before its first step."""
        return {}

    def start(self, problem: Objective, w_or_state: Tensor | State) -> State:
        state = begin(problem, self.bound(problem), w_or_state)
        kind = torch.full_like(state.status, zlib.crc32(self.kind.encode()))
        own = {"age": torch.zeros_like(state.step_size), "kind": kind} | self.blank(problem, state)
        if isinstance(w_or_state, State):
            own = _inherited(own, w_or_state.memory)
        return replace(state, memory=state.memory | own)

    def advance(self, problem: Objective, state: State, until: Target, budget: int) -> State:
        norm = self.bound(problem)

        def step(part: Objective, local: State) -> State:
            moved = self.step(part, norm, local)
            return stop_if_still(moved, local) if self.memoryless else moved

        return advance_by_steps(step, problem, state, until, budget)


def _inherited(own: dict[str, Tensor], old: dict[str, Tensor]) -> dict[str, Tensor]:
    """The memory ``old`` in the place of ``own`` where it is that of a rule of the same kind."""
    same = own.keys() <= old.keys() and all(own[name].shape == old[name].shape for name in own)
    return (
        {name: old[name] for name in own} if same and torch.equal(own["kind"], old["kind"]) else own
    )
