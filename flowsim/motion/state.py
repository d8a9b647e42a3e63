"""Where trajectories are: State, and why they stop: Status."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import IntEnum
from html import escape
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from flowsim.motion.segment import Segment
from flowsim.numerics.shapes import PerTrajectory, Rows
from flowsim.problems.objective import Objective

# --------------------------------------------------------------------------------------------------
# Why trajectories stop
# --------------------------------------------------------------------------------------------------


class Status(IntEnum):
    """Why a trajectory is where it is: a code, as saved, and ``sentence``, what the user reads."""

    sentence: str

    def __new__(cls, code: int, sentence: str = "") -> "Status":
        status = int.__new__(cls, code)
        status._value_ = code
        status.sentence = sentence
        return status

    RUNNING = 0, "still running"
    DONE = 1, "reached the end that was asked for"
    MAX_STEPS = (
        2,
        "stopped at max_steps before the end that was asked for; raise max_steps to go on",
    )
    INTERRUPTED = 3, "interrupted; simulate from the final state to go on"
    STEP_TOO_SMALL = (
        4,
        "the step size fell below the resolution of the number format: the field is discontinuous "
        "or too stiff here for this method",
    )
    NONFINITE = 5, "the next step gives NaN or infinite numbers; the state is the last finite one"
    STATIONARY = 6, "the gradient is exactly zero, so nothing moves"
    PRECISION_FLOOR = (
        7,
        "the step no longer changes the weights, or their level, in this number format",
    )
    EVENT = 8, "stopped at an event that was asked for"

    @property
    def resumable(self) -> bool:
        """Whether a later call may go on from here."""
        return self <= Status.INTERRUPTED or self is Status.EVENT


# --------------------------------------------------------------------------------------------------
# Where trajectories are
# --------------------------------------------------------------------------------------------------

READINGS = ("steps", "lam", "log_time", "arclength", "relative", "dissipated")
"""The readings of every State: natural steps taken, the level Λ, log of flow time t, arclength
∫‖dw‖ and relative arclength ∫‖dw‖/‖w‖ in the rule's own norm, and ∫‖∇Λ‖_* ds, the rise of Λ along
an exact steepest flow."""

TALLIES = ("gradients", "accepted", "rejected")
"""The tallies of every State: gradient evaluations, accepted and rejected steps."""


@dataclass(frozen=True)
class State:
    """Where B trajectories are, with all that going on needs. Frozen; every tensor has the
    trajectory axis first.

    ``w`` weights; ``readings`` by name (`READINGS`); ``tallies`` by name (`TALLIES` and the rule's
    own); ``status`` codes of `Status`; ``step_size`` of adaptive rules; ``memory`` of the rule;
    ``multipliers`` of kinks, None for rules that do not select them; ``segment``, the last natural
    step, None for rules whose steps are indivisible.

    >>> import flowsim as fs
    >>> toy = fs.Quadratic(torch.eye(2), torch.ones(2))
    >>> initial_state(toy, torch.zeros(3, 2))
    State of 3 trajectories, 2 weights each
      RUNNING: 3
      lam 0, steps 0
    """

    w: Rows
    readings: dict[str, PerTrajectory]
    tallies: dict[str, PerTrajectory]
    status: Int[Tensor, " B"]
    step_size: PerTrajectory
    memory: dict[str, Any]
    multipliers: Tensor | None = None
    segment: Segment | None = None

    @property
    def running(self) -> Bool[Tensor, " B"]:
        return self.status == Status.RUNNING

    @property
    def attempts(self) -> PerTrajectory:
        """Steps tried, accepted or not."""
        return self.readings["steps"] + self.tallies["rejected"]

    @property
    def statuses(self) -> list[Status]:
        return [Status(code) for code in self.status.tolist()]

    def select(self, rows: Tensor) -> "State":
        """The state of these trajectories."""
        return tree_map(lambda t: t[rows], self)

    def scatter(self, rows: Tensor, part: "State") -> "State":
        """This state with ``part`` in the place of these trajectories."""
        return tree_map(lambda whole, new: whole.index_copy(0, rows, new), self, part)

    def where(self, mask: Bool[Tensor, " B"], other: "State") -> "State":
        """This state for the trajectories of ``mask``, ``other`` for the rest."""

        def choose(here: Tensor, there: Tensor) -> Tensor:
            ones = [1] * (here.ndim - 1)
            return torch.where(mask.view(-1, *ones), here, there)

        return tree_map(choose, self, other)

    def stopped(self, where: Bool[Tensor, " B"], status: Status) -> "State":
        """This state with running trajectories stopped where asked."""
        return replace(self, status=self.status.masked_fill(where & self.running, status))

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by dotted name, for saving."""
        return {".".join(path): tensor for path, tensor in _leaves(self)}

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

    def __repr__(self) -> str:
        B, P = self.w.shape
        counts = Counter(status.name for status in self.statuses)
        ended = ", ".join(f"{name}: {count}" for name, count in counts.items())
        shown = ", ".join(f"{name} {_range(self.readings[name])}" for name in ("lam", "steps"))
        return f"State of {B} trajectories, {P} weights each\n  {ended}\n  {shown}"

    def _repr_html_(self) -> str:
        return f"<pre>{escape(repr(self))}</pre>"


def _range(values: PerTrajectory) -> str:
    low, high = (f"{float(end):.6g}" for end in torch.aminmax(values))
    return low if low == high else f"{low} … {high}"


def initial_state(objective: Objective, w_or_state: Tensor | State) -> State:
    """A state to start from. Weights start with all clocks at zero; a State keeps its readings and
    tallies, so that rules can be switched and runs resumed, and trajectories that could go on are
    running again."""
    if isinstance(w_or_state, State):
        state = w_or_state
        objective.check_weights(state.w)
        status = [0 if status.resumable else int(status) for status in state.statuses]
        return replace(state, status=state.status.new_tensor(status))
    objective.check_weights(w_or_state)
    w = w_or_state.detach().clone()
    zero = torch.zeros(len(w), dtype=torch.float64, device=w.device)
    readings = {name: zero.clone() for name in READINGS}
    return State(
        w,
        readings | {"log_time": zero - torch.inf},
        tallies={name: zero.clone() for name in TALLIES},
        status=zero.long(),
        step_size=zero + torch.nan,
        memory={},
    )


# --------------------------------------------------------------------------------------------------
# Nested dataclasses and dicts of tensors
# --------------------------------------------------------------------------------------------------

T = TypeVar("T")


def tree_map(function: Callable[..., Tensor], first: T, *others: T) -> T:
    """``function`` applied to every tensor of nested dataclasses and dicts of the same form."""
    trees: tuple[Any, ...] = (first, *others)
    if first is None:
        return first
    if isinstance(first, Tensor):
        return function(*trees)  # type: ignore[return-value]
    parts = [_children(tree) for tree in trees]
    mapped = {name: tree_map(function, *(part[name] for part in parts)) for name in parts[0]}
    return mapped if isinstance(first, dict) else replace(trees[0], **mapped)  # type: ignore


def _leaves(tree: Any, *path: str) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    if isinstance(tree, Tensor):
        yield path, tree
    elif tree is not None:
        for name, child in _children(tree).items():
            yield from _leaves(child, *path, name)


def _children(tree: Any) -> dict[str, Any]:
    return tree if isinstance(tree, dict) else vars(tree)
