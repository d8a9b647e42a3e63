"""TODO."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from flowsim.motion.clocks import Target
from flowsim.motion.state import State


class Rule(Protocol):
    """How weights move. The one seam: flows and discrete optimisers are both behind it."""

    @property
    def label(self) -> str:
        """What plots and tables call this rule."""

    def start(self, problem: Any, w_or_state: Tensor | State) -> State:
        """A state that this rule can advance."""

    def advance(self, problem: Any, state: State, until: Target, budget: int) -> State:
        """Natural steps for each running trajectory until it has reached ``until``, at most
        ``budget`` of them."""


@runtime_checkable
class Refining(Protocol):
    """A rule that can improve what is read off its steps."""

    def settled(self, problem: Any, state: State, u: Float[Tensor, " B"], point: State) -> State:
        """``point``, read at u of the last step of ``state``, as near to the path as the rule can
        bring it."""


def advance_by_steps(
    step: Callable[[Any, State], State], problem: Any, state: State, until: Target, budget: int
) -> State:
    """`Rule.advance` for a rule that is one ``step`` of every trajectory at once.

    Trajectories leave the batch once they stop or have reached their own target; no step is
    shortened for it."""
    while budget > 0:
        rows = pending(state, until).nonzero().squeeze(1)
        if rows.numel() == 0:
            break
        whole = rows.numel() == len(state.w)
        part, local, goal = (problem, state, until) if whole else _rows(problem, state, until, rows)
        while budget > 0:
            local = step(part, local)
            budget -= 1
            if not bool(pending(local, goal).all()):
                break
        state = local if whole else state.scatter(rows, local)
    return state


def _rows(problem: Any, state: State, until: Target, rows: Tensor) -> tuple[Any, State, Target]:
    return problem.select(rows), state.select(rows), until.select(rows)


def pending(state: State, until: Target) -> Tensor:
    return state.running & (state.readings[until.clock.reading] < until.value)
