"""Measurements by name, gathered for ``simulate(…, observe=…)``: the usual ones, and those of the
KKT conditions.

Each of them is in `margins`, `stationarity` and `lagrange`; theorems as numbers, at a point and
along a run, are in `theorems`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from flowsim.diagnostics.lagrange import best_multipliers
from flowsim.diagnostics.margins import (
    Observer,
    accuracy,
    classifies,
    entropy,
    margin,
    size,
    soft_margin,
    support_count,
    test_accuracy,
)
from flowsim.diagnostics.selected import ascent
from flowsim.diagnostics.stationarity import (
    Stationarity,
    alignment,
    dual,
)
from flowsim.motion.state import State
from flowsim.norms.norm import Norm
from flowsim.norms.vector import L1, L2, Linf
from flowsim.problems.problem import Problem


def standard(
    problem: Problem,
    test: tuple[Any, Any] | None = None,
    norms: Sequence[Norm] = (L1(), L2(), Linf()),
) -> dict[str, Observer]:
    """The usual measurements by name, for ``simulate(…, observe=…)``; ``test`` is a pair (x, y).

    In each norm ``norm_…``, ``dual_…`` and ``alignment_…``; for classification ``margin_…`` (hard),
    ``soft_margin_…`` where the loss has an inverse, ``entropy``, ``support``, ``accuracy`` and
    ``test_accuracy``. All share one gradient at each save point."""
    h = _Last(ascent)
    found: dict[str, Observer] = {}
    has_margins = classifies(problem)
    has_inverse = problem.loss.tail.inverse is not None
    for norm in norms:
        found[f"norm_{norm.name}"] = size(norm)
        found[f"dual_{norm.name}"] = dual(norm, ascent=h)
        found[f"alignment_{norm.name}"] = alignment(norm, ascent=h)
        if has_margins:
            found[f"margin_{norm.name}"] = margin(norm)
        if has_margins and has_inverse:
            found[f"soft_margin_{norm.name}"] = soft_margin(norm)
    if has_margins:
        found |= {"entropy": entropy, "support": support_count(), "accuracy": accuracy}
        if test is not None:
            held_out = problem.with_data(*test)
            found["test_accuracy"] = test_accuracy(held_out)
    return found


def kkt(norm: Norm, *, best: bool = False) -> dict[str, Observer]:
    """The KKT conditions in a norm by name, for ``simulate(…, observe=…)`` and ``plots.kkt``:
    ``alignment_…``, ``divergence_…``, ``residual_…``, ``slackness_…`` and ``multipliers_…``, and
    with ``best`` ``excess_…`` and ``floor_…`` of the best multipliers, which cost a small convex
    programme at each save point."""
    at = _Last(lambda problem, state: Stationarity.of(problem, state, norm))
    optimum = _Last(lambda problem, state: best_multipliers(problem, state, norm))
    found: dict[str, Observer] = {
        "alignment": lambda problem, state: at(problem, state).alignment,
        "divergence": lambda problem, state: at(problem, state).divergence,
        "residual": lambda problem, state: at(problem, state).residual()[1],
        "slackness": lambda problem, state: at(problem, state).slack,
        "multipliers": lambda problem, state: at(problem, state).multipliers,
    }
    if best:
        found |= {
            "excess": lambda problem, state: optimum(problem, state).excess,
            "floor": lambda problem, state: optimum(problem, state).floor,
        }
    return {f"{name}_{norm.name}": measure for name, measure in found.items()}


@dataclass
class _Last:
    """A function of (problem, state) that is not called again for the same two, so that several may
    share it."""

    function: Callable[[Problem, State], Any]
    problem: Problem | None = None
    state: State | None = None
    value: Any = None

    def __call__(self, problem: Problem, state: State) -> Any:
        same = problem is self.problem and state is self.state
        if not same:
            self.value = self.function(problem, state)
            self.problem = problem
            self.state = state
        return self.value
