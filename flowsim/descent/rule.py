"""What discrete rules share: the bookkeeping of a step, and the bases of rules whose step is one
gradient."""

import zlib
from abc import abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from flowsim.checks import require_not_negative
from flowsim.descent.learning_rates import LearningRate, LearningRateLike, as_learning_rate
from flowsim.motion.clocks import Target, log_time_rate
from flowsim.motion.rule import Labelled, advance_by_steps
from flowsim.motion.state import State, Status, initial_state
from flowsim.norms.norm import Norm
from flowsim.numerics.quadrature import log_mean_exp
from flowsim.numerics.shapes import PerTrajectory, Rows
from flowsim.problems.objective import Objective

Memory = dict[str, Tensor]


@dataclass(frozen=True)
class Step:
    """A straight step: ``move (B, P)`` of length ``length (B,)`` in the rule's norm, measured where
    it is None.

    ``log_time`` is the logarithm of the time that it takes, None where that is the steepest flow's
    for this path."""

    move: Rows
    length: PerTrajectory | None = None
    log_time: PerTrajectory | None = None


def _seen(objective: Objective, norm: Norm, w: Tensor) -> tuple[Tensor, Memory]:
    """Λ at w, and what a step wants to know there: h = ∇Λ, ‖h‖_* and ‖w‖. One gradient."""
    lam, h = objective.ascent(w)
    dual_norm = norm.dual(h).double()
    size = norm.value(w).double()
    here = {"ascent": h, "dual_norm": dual_norm, "size": size}
    return lam.double(), here


def begin(objective: Objective, norm: Norm, w_or_state: Tensor | State) -> State:
    """A state with the gradient at hand, as `take` wants it. One gradient evaluation."""
    state = initial_state(objective, w_or_state)
    lam, here = _seen(objective, norm, state.w)
    gradients = state.tallies["gradients"] + 1
    state = replace(
        state,
        readings=state.readings | {"lam": lam},
        tallies=state.tallies | {"gradients": gradients},
        memory=here,
        multipliers=None,
        segment=None,
    )
    flat = here["dual_norm"] == 0
    return state.stopped(flat, Status.STATIONARY)


def take(
    objective: Objective, norm: Norm, state: State, step: Step, remembered: Memory | None = None
) -> State:
    """The state after a straight step of every trajectory, with what the rule has ``remembered``.
    One gradient evaluation. A trajectory that the step would take to numbers that are not finite
    stays and stops."""
    w = state.w + step.move
    lam, here = _seen(objective, norm, w)
    memory = state.memory | here | (remembered or {})
    if "age" in memory:
        memory["age"] = memory["age"] + 1
    there = here | {"lam": lam}
    counted = {name: state.tallies[name] + 1 for name in ("gradients", "accepted")}
    moved = State(
        w=w,
        readings=_readings(objective, norm, state, step, there),
        tallies=state.tallies | counted,
        status=state.status,
        step_size=state.step_size,
        memory=memory,
    )
    total = lam + here["dual_norm"] + here["size"]
    finite = torch.isfinite(total)
    if bool(finite.all()):
        return moved
    moved = replace(moved, segment=state.segment)
    moved = moved.where(finite, state)
    return moved.stopped(~finite, Status.NONFINITE)


def _readings(
    objective: Objective, norm: Norm, state: State, step: Step, there: Memory
) -> dict[str, PerTrajectory]:
    """The readings at the end of a step that has led ``there``, by the trapezoidal rule."""
    before = state.readings
    here = state.memory | {"lam": before["lam"]}
    length = step.length
    if length is None:
        length = norm.value(step.move).double()
    log_time = step.log_time
    if log_time is None:
        rate0 = log_time_rate(objective, here["lam"], here["dual_norm"])
        rate1 = log_time_rate(objective, there["lam"], there["dual_norm"])
        log_time = torch.log(length) + log_mean_exp(rate0, rate1)
    dual_norm = 0.5 * (here["dual_norm"] + there["dual_norm"])
    size = 0.5 * (here["size"] + there["size"])
    relative = torch.where(size > 0, length / size, 0.0)
    return {
        "steps": before["steps"] + 1,
        "lam": there["lam"],
        "log_time": torch.logaddexp(before["log_time"], log_time),
        "arclength": before["arclength"] + length,
        "relative": before["relative"] + relative,
        "dissipated": before["dissipated"] + length * dual_norm,
    }


def stop_if_still(moved: State, before: State) -> State:
    """``moved`` with trajectories stopped whose next step would be the last one again: those that
    have not moved, and those without a gradient. For rules whose step is a function of the
    weights."""
    length = moved.readings["arclength"] - before.readings["arclength"]
    # a step that moves no weight is at most a unit of rounding long, times what the norm makes of
    # single entries
    unit = torch.finfo(moved.w.dtype).eps
    short = ~(length > unit**0.5 * moved.memory["size"])
    flat = moved.memory["dual_norm"] == 0
    if not bool((short | flat).any()):
        return moved
    same = (moved.w == before.w).all(-1)
    still = short & same & moved.running
    if bool(still.any()):
        stays = replace(before, segment=moved.segment)
        moved = moved.where(~still, stays)
        moved = moved.stopped(still, Status.PRECISION_FLOOR)
    return moved.stopped(flat, Status.STATIONARY)


class Discrete(Labelled):
    """A rule that takes one step of every trajectory from one gradient. A new one defines the
    abstract members, and where it remembers more than the gradient `blank`.

    States of rules of the same `kind` go on with its memory, so that a run can be resumed; others
    begin a new one."""

    norm: Norm
    """The norm that lengths are measured in."""

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

    def bound(self, problem: Objective) -> Norm:
        """The norm with the problem's shapes."""
        return self.norm.bind(problem.layout)

    @abstractmethod
    def step(self, problem: Objective, norm: Norm, state: State) -> State:
        """The state one step later, by way of `take`."""

    def blank(self, problem: Objective, state: State) -> Memory:
        """What the rule remembers before its first step."""
        return {}

    def start(self, problem: Objective, w_or_state: Tensor | State) -> State:
        norm = self.bound(problem)
        state = begin(problem, norm, w_or_state)
        number = zlib.crc32(self.kind.encode())
        age = torch.zeros_like(state.step_size)
        kind = torch.full_like(state.status, number)
        blank = self.blank(problem, state)
        own = {"age": age, "kind": kind, **blank}
        old = w_or_state.memory if isinstance(w_or_state, State) else {}
        same = all(name in old and old[name].shape == own[name].shape for name in own)
        if same and torch.equal(kind, old["kind"]):
            own = {name: old[name] for name in own}
        return replace(state, memory=state.memory | own)

    def advance(self, problem: Objective, state: State, until: Target, budget: int) -> State:
        norm = self.bound(problem)

        def step(part: Objective, local: State) -> State:
            moved = self.step(part, norm, local)
            return stop_if_still(moved, local) if self.memoryless else moved

        return advance_by_steps(step, problem, state, until, budget)


class WithLearningRate(Discrete):
    """A discrete rule with a learning rate η_k and decay λ of the weights: w ← (1 − ηλ)w + (the
    move that it plans)."""

    lr: LearningRateLike
    decay: float

    def __post_init__(self) -> None:
        as_learning_rate(self.title, self.lr)
        require_not_negative(self.title, decay=self.decay)

    @property
    def title(self) -> str:
        """What errors call this rule, and labels begin with."""
        return type(self).__name__

    @property
    def details(self) -> list[str]:
        """What its label says beside learning rate and decay."""
        return []

    @property
    def label(self) -> str:
        words = [self.title, self.schedule.label, *self.details]
        if self.decay:
            words.append(f"λ = {self.decay:g}")
        return ", ".join(words)

    @cached_property
    def schedule(self) -> LearningRate:
        return as_learning_rate(self.title, self.lr)

    @abstractmethod
    def plan(
        self, problem: Objective, norm: Norm, state: State, log_lr: PerTrajectory
    ) -> tuple[Step, Memory]:
        """The step with log η_k = ``log_lr`` and without decay, and what is remembered after
        it."""

    def start(self, problem: Objective, w_or_state: Tensor | State) -> State:
        self.schedule.check(self.title, problem)
        return super().start(problem, w_or_state)

    def step(self, problem: Objective, norm: Norm, state: State) -> State:
        age = state.memory["age"]
        lam = state.readings["lam"]
        log_lr = self.schedule.log(age, lam)
        step, remembered = self.plan(problem, norm, state, log_lr)
        if self.decay:
            fraction = self.decay * torch.exp(log_lr)
            lost = fraction.to(state.w)[:, None] * state.w
            move = step.move - lost
            step = Step(move, log_time=step.log_time)
        return take(problem, norm, state, step, remembered)
