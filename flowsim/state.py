"""Where trajectories are: State, why they stop: Status, and the one seam between rules and everything else: Rule."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import IntEnum
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flowsim.clocks import Target, hermite, log_elapsed
from flowsim.problem import Objective


class Status(IntEnum):
    """Why a trajectory is where it is. ``status.sentence`` is what the user reads."""

    RUNNING = 0
    DONE = 1
    MAX_STEPS = 2
    INTERRUPTED = 3
    STEP_TOO_SMALL = 4
    NONFINITE = 5
    STATIONARY = 6
    PRECISION_FLOOR = 7
    EVENT = 8

    @property
    def sentence(self) -> str:
        return _SENTENCES[self]

    @property
    def resumable(self) -> bool:
        """Whether a later call may go on from here."""
        return self <= Status.INTERRUPTED or self is Status.EVENT


_SENTENCES = {
    Status.RUNNING: "still running",
    Status.DONE: "reached the end that was asked for",
    Status.MAX_STEPS: "stopped at max_steps before the end that was asked for; raise max_steps to go on",
    Status.INTERRUPTED: "interrupted; simulate from the final state to go on",
    Status.STEP_TOO_SMALL: "the step size fell below the resolution of the number format: the field is "
    "discontinuous or too stiff here for this method",
    Status.NONFINITE: "the next step gives NaN or infinite numbers; the state is the last finite one",
    Status.STATIONARY: "the gradient is exactly zero, so nothing moves",
    Status.PRECISION_FLOOR: "the step no longer changes the weights, or their level, in this number format",
    Status.EVENT: "stopped at an event that was asked for",
}

READINGS = ("steps", "lam", "log_time", "arclength", "relative", "dissipated")
"""The readings of every State: natural steps taken, the level Λ, log of flow time t, arclength ∫‖dw‖ and relative
arclength ∫‖dw‖/‖w‖ in the rule's own norm, and ∫‖∇Λ‖_* ds, the rise of Λ along an exact steepest flow."""

TALLIES = ("gradients", "accepted", "rejected")
"""The tallies of every State: gradient evaluations, accepted and rejected steps."""


@dataclass(frozen=True)
class Segment:
    """The last natural step, from u = 0 to u = 1: both ends, and derivatives in u. Its dense output is `at`."""

    w0: Float[Tensor, "B P"]
    w1: Float[Tensor, "B P"]
    slope0: Float[Tensor, "B P"]
    slope1: Float[Tensor, "B P"]
    readings0: dict[str, Float[Tensor, " B"]]
    readings1: dict[str, Float[Tensor, " B"]]
    lam_slope0: Float[Tensor, " B"]
    lam_slope1: Float[Tensor, " B"]
    time_rate0: Float[Tensor, " B"]  # log dt/du
    time_rate1: Float[Tensor, " B"]
    time_slope0: Float[Tensor, " B"] | None = None  # its derivative in u; None: linear
    time_slope1: Float[Tensor, " B"] | None = None
    bend: Float[Tensor, "B P"] | None = None  # what the cubic through both ends lacks at u = 1/2
    multipliers0: Float[Tensor, "B K"] | None = None  # of kinks, None for rules that do not select them
    multipliers1: Float[Tensor, "B K"] | None = None

    def at(self, u: Float[Tensor, " B"]) -> tuple[Float[Tensor, "B P"], dict[str, Float[Tensor, " B"]]]:
        """Weights and readings inside the step; exact at both ends.

        Weights and Λ by cubic Hermite interpolation, whose error is of fourth order in the step (of fifth for weights
        with a ``bend``); time with log dt/du the cubic of its ends; the other readings linear.
        """
        part = u.to(self.w0)[:, None]
        inner = hermite(part, self.w0, self.w1, self.slope0, self.slope1)
        if self.bend is not None:
            inner = inner + 16 * (part * (1 - part)) ** 2 * self.bend
        w = torch.where(part <= 0, self.w0, torch.where(part >= 1, self.w1, inner))
        return w, {name: self.reading(name, u) for name in self.readings0}

    def multipliers(self, u: Float[Tensor, " B"]) -> Float[Tensor, "B K"] | None:
        """Multipliers of kinks inside the step; exact at both ends.

        Linear in u, also for a pair that begins or ceases to slide in the step: when is not known. NaN for one that
        crosses, for which the sign of z decides.
        """
        a, b = self.multipliers0, self.multipliers1
        if a is None or b is None:
            return None
        part = u.to(a)[:, None]
        inner = torch.where((a - b).abs() == 1, torch.nan, a + part * (b - a))
        return torch.where(part <= 0, a, torch.where(part >= 1, b, inner))

    def reading(self, name: str, u: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        a, b = self.readings0[name], self.readings1[name]
        if name == "lam":
            inner = hermite(u, a, b, self.lam_slope0, self.lam_slope1)
        elif name == "dissipated":
            # it rises with Λ, and the energy defect, their difference, evenly over the step
            defect = (b - a) - (self.readings1["lam"] - self.readings0["lam"])
            inner = a + u * defect + (self.reading("lam", u) - self.readings0["lam"])
        elif name == "log_time":
            inner = self._log_time(u)
        else:
            inner = a + u * (b - a)
        return torch.where(u <= 0, a, torch.where(u >= 1, b, inner))

    def _log_time(self, u: Tensor) -> Tensor:
        """log t, with the time spent in the step scaled to end at the recorded reading."""
        a, b = self.readings0["log_time"], self.readings1["log_time"]
        gap = self.time_rate1 - self.time_rate0
        slope0 = gap if self.time_slope0 is None else self.time_slope0
        slope1 = gap if self.time_slope1 is None else self.time_slope1
        part = log_elapsed(self.time_rate0, self.time_rate1, slope0, slope1, u)
        whole = log_elapsed(self.time_rate0, self.time_rate1, slope0, slope1)
        step = b + torch.log(-torch.expm1(torch.minimum(a - b, torch.zeros_like(a))))  # log(t1 − t0)
        return torch.logaddexp(a, part - whole + step)

    def locate(self, target: Target) -> Float[Tensor, " B"]:
        """The first u, to rounding, at which the clock shows the target's value; 1 where the end is the first."""
        low, high = torch.zeros_like(target.value), torch.ones_like(target.value)
        name = target.clock.reading
        for _ in range(52):
            middle = 0.5 * (low + high)
            reached = self.reading(name, middle) >= target.value
            low, high = torch.where(reached, low, middle), torch.where(reached, middle, high)
        return torch.where(self.readings0[name] >= target.value, torch.zeros_like(high), high)


@dataclass(frozen=True)
class State:
    """Where B trajectories are, with all that going on needs. Frozen; every tensor has the trajectory axis first.

    ``w`` weights; ``readings`` by name (`READINGS`); ``tallies`` by name (`TALLIES` and the rule's own); ``status``
    codes of `Status`; ``step_size`` of adaptive rules; ``memory`` of the rule; ``multipliers`` of kinks, None for
    rules that do not select them; ``segment``, the last natural step, None for rules whose steps are indivisible.
    """

    w: Float[Tensor, "B P"]
    readings: dict[str, Float[Tensor, " B"]]
    tallies: dict[str, Float[Tensor, " B"]]
    status: Int[Tensor, " B"]
    step_size: Float[Tensor, " B"]
    memory: dict[str, Any]
    multipliers: Tensor | None = None
    segment: Segment | None = None

    @property
    def running(self) -> Tensor:
        return self.status == Status.RUNNING

    @property
    def attempts(self) -> Float[Tensor, " B"]:
        """Steps tried, accepted or not."""
        return self.readings["steps"] + self.tallies["rejected"]

    @property
    def statuses(self) -> list[Status]:
        return [Status(int(code)) for code in self.status]

    def select(self, rows: Tensor) -> "State":
        """The state of these trajectories."""
        return tree_map(lambda t: t[rows], self)

    def scatter(self, rows: Tensor, part: "State") -> "State":
        """This state with ``part`` in the place of these trajectories."""
        return tree_map(lambda whole, new: whole.index_copy(0, rows, new), self, part)

    def where(self, mask: Tensor, other: "State") -> "State":
        """This state for the trajectories of ``mask``, ``other`` for the rest."""
        return tree_map(lambda a, b: torch.where(mask.view(-1, *[1] * (a.ndim - 1)), a, b), self, other)

    def stopped(self, where: Tensor, status: Status) -> "State":
        """This state with running trajectories stopped where asked."""
        code = torch.full_like(self.status, int(status))
        return replace(self, status=torch.where(where & self.running, code, self.status))

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by dotted name, for saving."""
        return dict(_flatten(self, ""))

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor]) -> "State":
        """The inverse of `tensors`."""
        tree: dict[str, Any] = {"readings": {}, "tallies": {}, "memory": {}}
        for name, tensor in tensors.items():
            *path, leaf = name.split(".")
            node = tree
            for key in path:
                node = node.setdefault(key, {})
            node[leaf] = tensor
        if "segment" in tree:
            tree["segment"] = Segment(**tree["segment"])
        return State(**tree)


T = TypeVar("T")


def tree_map(function: Callable[..., Tensor], first: T, *others: T) -> T:
    """``function`` applied to every tensor of nested dataclasses and dicts of the same form."""
    if first is None:
        return first
    if isinstance(first, Tensor):
        return function(first, *others)  # type: ignore[return-value]
    if isinstance(first, dict):
        return {k: tree_map(function, v, *(o[k] for o in others)) for k, v in first.items()}  # type: ignore
    assert is_dataclass(first)
    mapped = {f.name: tree_map(function, *(getattr(o, f.name) for o in (first, *others))) for f in fields(first)}
    return replace(first, **mapped)  # type: ignore[type-var]


def _flatten(node: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(node, Tensor):
        yield prefix, node
    elif node is not None:
        items = node.items() if isinstance(node, dict) else ((f.name, getattr(node, f.name)) for f in fields(node))
        for name, child in items:
            yield from _flatten(child, f"{prefix}.{name}" if prefix else name)


def fresh(objective: Objective, w_or_state: Tensor | State) -> State:
    """A state to start from. Weights start with all clocks at zero; a State keeps its readings and tallies, so that
    rules can be switched and runs resumed, and trajectories that could go on are running again."""
    if isinstance(w_or_state, State):
        state = w_or_state
        objective.check_weights(state.w)
        resumed = torch.tensor([Status(int(s)).resumable for s in state.status], device=state.w.device)
        return replace(state, status=torch.where(resumed, torch.zeros_like(state.status), state.status))
    objective.check_weights(w_or_state)
    w = w_or_state.detach().clone()
    zero = torch.zeros(w.shape[0], dtype=torch.float64, device=w.device)
    readings = {name: zero - torch.inf if name == "log_time" else zero.clone() for name in READINGS}
    tallies = {name: zero.clone() for name in TALLIES}
    return State(w, readings, tallies, status=zero.long(), step_size=torch.full_like(zero, torch.nan), memory={})


class Rule(Protocol):
    """How weights move. The one seam: flows and discrete optimisers are both behind it."""

    @property
    def label(self) -> str:
        """What plots and tables call this rule."""

    def start(self, problem: Any, w_or_state: Tensor | State) -> State:
        """A state that this rule can advance."""

    def advance(self, problem: Any, state: State, until: Target, budget: int) -> State:
        """Natural steps for each running trajectory until it has reached ``until``, at most ``budget`` of them."""


@runtime_checkable
class Settling(Protocol):
    """A rule that can improve what is read off its steps."""

    def settled(self, problem: Any, state: State, u: Float[Tensor, " B"], point: State) -> State:
        """``point``, read at u of the last step of ``state``, as near to the path as the rule can bring it."""


def march(step: Callable[[Any, State], State], problem: Any, state: State, until: Target, budget: int) -> State:
    """`Rule.advance` for a rule that is one ``step`` of every trajectory at once.

    Trajectories leave the batch once they stop or have reached their own target; no step is shortened for it.
    """
    while budget > 0:
        rows = _pending(state, until).nonzero().squeeze(1)
        if rows.numel() == 0:
            break
        whole = rows.numel() == len(state.w)
        part, local, goal = (problem, state, until) if whole else _rows(problem, state, until, rows)
        while budget > 0:
            local = step(part, local)
            budget -= 1
            if not bool(_pending(local, goal).all()):
                break
        state = local if whole else state.scatter(rows, local)
    return state


def _rows(problem: Any, state: State, until: Target, rows: Tensor) -> tuple[Any, State, Target]:
    return problem.select(rows), state.select(rows), until.select(rows)


def _pending(state: State, until: Target) -> Tensor:
    return state.running & (state.readings[until.clock.reading] < until.value)
