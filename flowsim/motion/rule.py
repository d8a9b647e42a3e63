"""The one seam between what moves weights and everything else: `Rule`, and how its trajectories
are taken to a target."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from html import escape
from types import FunctionType
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool
from torch import Tensor

from flowsim.checks import require_instance
from flowsim.motion.clocks import Target
from flowsim.motion.state import State, tree_map
from flowsim.numerics.shapes import PerTrajectory


@runtime_checkable
class Rule(Protocol):
    """How weights move. Flows and discrete optimisers are both behind it."""

    @property
    def label(self) -> str:
        """What plots and tables call this rule."""

    def start(self, problem: Any, w_or_state: Tensor | State) -> State:
        """A state that this rule can advance."""

    def advance(self, problem: Any, state: State, until: Target, budget: int) -> State:
        """Natural steps for each running trajectory until it has reached ``until``, at most
        ``budget`` of them."""


def require_rule(owner: str, **options: Any) -> None:
    """Raise TypeError where an option is no `Rule`."""
    require_instance(owner, Rule, "a rule, try flowsim.GradientDescent(0.1)", **options)


@runtime_checkable
class Refining(Protocol):
    """A rule that can improve what is read off its steps."""

    def refined(self, problem: Any, state: State, u: PerTrajectory, point: State) -> State:
        """``point``, read at u of the last step of ``state``, as near to the path as the rule can
        bring it."""


class Labelled(ABC):
    """How rules are shown: by their settings, in a notebook below their label."""

    @property
    @abstractmethod
    def label(self) -> str:
        """What plots and tables call the rule."""

    def __repr__(self) -> str:
        return in_words(self)

    def _repr_html_(self) -> str:
        return f"<b>{escape(self.label)}</b><br><code>{escape(repr(self))}</code>"


def in_words(setting: Any) -> str:
    """A setting as code would make it, with arrays by their shape and functions by their name.

    >>> in_words(torch.eye(3))
    'Tensor(3, 3)'
    """
    kind = type(setting).__name__
    if isinstance(setting, Tensor):
        return f"{kind}{tuple(setting.shape)}"
    if isinstance(setting, FunctionType):
        return setting.__qualname__
    if not is_dataclass(setting):
        return repr(setting)
    shown = []
    for field in fields(setting):
        if field.repr:
            shown.append(f"{field.name}={in_words(getattr(setting, field.name))}")
    return f"{kind}({', '.join(shown)})"


def pending(state: State, until: Target) -> Bool[Tensor, " B"]:
    """Trajectories that run and have not reached their target."""
    reading = state.readings[until.clock.reading]
    return state.running & (reading < until.value)


def advance_by_steps(
    step: Callable[[Any, State], State], problem: Any, state: State, until: Target, budget: int
) -> State:
    """`Rule.advance` for a rule that is one ``step`` of every trajectory at once.

    Trajectories leave the batch once they stop or have reached their own target; no step is
    shortened for it."""
    while budget > 0:
        waiting = pending(state, until)
        if not bool(waiting.any()):
            break
        rows = waiting.nonzero().squeeze(1)
        whole = bool(waiting.all())
        part = problem if whole else problem.select(rows)
        local = state if whole else state.select(rows)
        goal = until if whole else until.select(rows)
        while budget > 0 and bool(pending(local, goal).all()):
            local = step(part, local)
            budget -= 1
        state = local if whole else state.scatter(rows, local)
    return state


def one_by_one(run: Callable[..., State], problem: Any, state: State, *until: Target) -> State:
    """``run(problem, state, *until)`` of each trajectory on its own, put together again.

    For methods whose trajectories share no work, and for those in which a batch would round.
    Trajectories that are not pending for a target stay as they are."""
    done = []
    rows = torch.arange(len(state.w), device=state.w.device)
    for row in rows.split(1):
        local = state.select(row)
        goals = [target.select(row) for target in until]
        waiting = [bool(pending(local, goal)) for goal in goals]
        if all(waiting):
            part = problem.select(row)
            local = run(part, local, *goals)
        done.append(local)

    def joined(*parts: Tensor) -> Tensor:
        return torch.cat(parts)

    return tree_map(joined, *done)
