"""Where trajectories are: State, why they stop: Status, and the one seam between rules and
everything else: Rule."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import IntEnum
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flowsim.motion.segment import Segment
from flowsim.problems.objective import Objective


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
    step, None for rules whose steps are indivisible."""

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
        return tree_map(
            lambda a, b: torch.where(mask.view(-1, *[1] * (a.ndim - 1)), a, b), self, other
        )

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
    mapped = {
        f.name: tree_map(function, *(getattr(o, f.name) for o in (first, *others)))
        for f in fields(first)
    }
    return replace(first, **mapped)  # type: ignore[type-var]


def _flatten(node: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(node, Tensor):
        yield prefix, node
    elif node is not None:
        items = (
            node.items()
            if isinstance(node, dict)
            else ((f.name, getattr(node, f.name)) for f in fields(node))
        )
        for name, child in items:
            yield from _flatten(child, f"{prefix}.{name}" if prefix else name)


def initial_state(objective: Objective, w_or_state: Tensor | State) -> State:
    """A state to start from. Weights start with all clocks at zero; a State keeps its readings and
    tallies, so that rules can be switched and runs resumed, and trajectories that could go on are
    running again."""
    if isinstance(w_or_state, State):
        state = w_or_state
        objective.check_weights(state.w)
        resumed = torch.tensor(
            [Status(int(s)).resumable for s in state.status], device=state.w.device
        )
        return replace(
            state, status=torch.where(resumed, torch.zeros_like(state.status), state.status)
        )
    objective.check_weights(w_or_state)
    w = w_or_state.detach().clone()
    zero = torch.zeros(w.shape[0], dtype=torch.float64, device=w.device)
    readings = {name: zero - torch.inf if name == "log_time" else zero.clone() for name in READINGS}
    tallies = {name: zero.clone() for name in TALLIES}
    return State(
        w,
        readings,
        tallies,
        status=zero.long(),
        step_size=torch.full_like(zero, torch.nan),
        memory={},
    )
