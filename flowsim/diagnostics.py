"""Measurements along a trajectory: plain functions of (problem, state) that return ``(B,)``.

Margins are named by the norm on the *weights* that normalises them: ``margin_linf`` divides by ‖w‖_∞^L and is what
sign descent raises. (Tsilivis et al. 2026 name margins dually: that one is their γ₁.)
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from flowsim.norms import L1, L2, Linf, Norm
from flowsim.problem import Problem
from flowsim.state import State

Diagnostic = Callable[[Problem, State], Tensor]


def size(norm: Norm) -> Diagnostic:
    """‖w‖."""
    return lambda problem, state: norm.bind(problem.layout).value(state.w)


def margin(norm: Norm) -> Diagnostic:
    """Normalised hard margin γ = min_i q_i / ‖w‖^L; negative while an example is misclassified, NaN at w = 0."""
    return lambda problem, state: problem.margins(state.w).amin(-1) / _power(problem, norm, state)


def soft_margin(norm: Norm) -> Diagnostic:
    """Normalised soft margin ℓ⁻¹(𝓛)/‖w‖^L, with 𝓛 the sum loss (Tsilivis et al. 2026, Thm 1 and 22).

    It never falls along a steepest flow in the same norm once 𝓛 < ℓ(0). Raises for a loss without an inverse.
    """
    return lambda problem, state: problem.loss.soft_minimum(problem.lam(state.w)) / _power(problem, norm, state)


def _power(problem: Problem, norm: Norm, state: State) -> Tensor:
    return norm.bind(problem.layout).value(state.w) ** problem.degree


def ascent(problem: Problem, state: State) -> Float[Tensor, "B P"]:
    """h = ∇Λ at a state: on kinks the element that the flow has selected, which its multipliers tell.

    States of discrete rules have no multipliers; there it is the element that autograd returns.
    """
    if state.multipliers is None or not problem.kinks:
        return problem.ascent(state.w)[1]
    hinges = problem.hinges(state.w)
    sliding = (state.multipliers > 0) & (state.multipliers < 1)
    return hinges.gradient(torch.where(sliding, state.multipliers, (hinges.z > 0).to(hinges.z)))


def alignment(norm: Norm) -> Diagnostic:
    """α = ⟨w, h⟩/(‖w‖‖h‖_*) ≤ 1, with the element h of ∇Λ that `ascent` gives; 1 at a KKT point."""

    def measure(problem: Problem, state: State) -> Tensor:
        bound = norm.bind(problem.layout)
        h = ascent(problem, state)
        return (state.w * h).sum(-1) / (bound.value(state.w) * bound.dual(h))

    return measure


def entropy(problem: Problem, state: State) -> Tensor:
    """H(p) = −Σ p_i log p_i of the weights in the descent, between 0 and log M."""
    p = problem.weights(state.w)
    return -torch.special.xlogy(p, p).sum(-1)


def accuracy(problem: Problem, state: State) -> Tensor:
    """The share of examples with a positive margin."""
    return (problem.margins(state.w) > 0).to(state.w).mean(-1)


def test_accuracy(test: Problem) -> Diagnostic:
    """Accuracy on another data set."""
    return lambda problem, state: accuracy(test.like(state.w), state)


def standard(
    problem: Problem, test: tuple[Any, Any] | None = None, norms: Sequence[Norm] = (L1(), L2(), Linf())
) -> dict[str, Diagnostic]:
    """The usual measurements by name, for ``simulate(…, observe=…)``; ``test`` is a pair (x, y).

    In each norm ``norm_…`` and ``alignment_…``; for classification ``margin_…`` (hard), ``soft_margin_…`` where the
    loss has an inverse, ``entropy``, ``accuracy`` and ``test_accuracy``.
    """
    found: dict[str, Diagnostic] = {}
    classifies = problem.loss.reading.targets != "values"
    for norm in norms:
        found[f"norm_{norm.name}"] = size(norm)
        found[f"alignment_{norm.name}"] = alignment(norm)
        if classifies:
            found[f"margin_{norm.name}"] = margin(norm)
        if classifies and problem.loss.tail.inverse is not None:
            found[f"soft_margin_{norm.name}"] = soft_margin(norm)
    if classifies:
        found |= {"entropy": entropy, "accuracy": accuracy}
        if test is not None:
            found["test_accuracy"] = test_accuracy(problem.with_data(*test))
    return found
