"""Margins and norms along a trajectory: plain functions of (problem, state) that return ``(B,)`` or
``(B, …)``.

Margins are named by the norm on the *weights* that normalises them: ``margin_linf`` divides by
‖w‖_∞^L and is what sign descent raises. Tsilivis et al. (2026) name margins dually; `paper` has
them under those names."""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from flowsim.layout import Block
from flowsim.motion.state import State
from flowsim.norms.blocks import modular
from flowsim.norms.norm import Norm
from flowsim.norms.vector import L1, L2, Linf
from flowsim.problems.objective import Objective
from flowsim.problems.problem import Problem

Observer = Callable[[Any, State], Tensor]
"""A function of (problem, state) that returns ``(B, …)``, for ``simulate(…, observe=…)``."""


def classifies(problem: Objective) -> TypeGuard[Problem]:
    """Whether there are margins: a loss of a net that is not a regression."""
    return isinstance(problem, Problem) and problem.loss.reading.targets != "values"


def size(norm: Norm) -> Observer:
    """‖w‖."""
    return lambda problem, state: norm.bind(problem.layout).value(state.w)


def margin(norm: Norm) -> Observer:
    """Normalised hard margin γ = min_i q_i / ‖w‖^L; negative while an example is misclassified, NaN
    at w = 0.

    With several classes the minimum is over examples and wrong classes.
    """
    return lambda problem, state: problem.margins(state.w).amin(-1) / _power(problem, norm, state)


def soft_margin(norm: Norm) -> Observer:
    """Normalised soft margin ℓ⁻¹(𝓛)/‖w‖^L, with 𝓛 the sum loss (Tsilivis et al. 2026, Thm 1 and
    22).

    It never falls along a steepest flow in the same norm once 𝓛 < ℓ(0). Raises for a loss without
    an inverse."""
    return lambda problem, state: (
        problem.loss.soft_minimum(problem.lam(state.w)) / _power(problem, norm, state)
    )


def _power(problem: Problem, norm: Norm, state: State) -> Tensor:
    return norm.bind(problem.layout).value(state.w) ** problem.degree


def paper(problem: Problem) -> dict[str, Observer]:
    """Margins under the names of Tsilivis et al. (2026), Eq. 13 and §4.3, for ``simulate(…,
    observe=…)``.

    ``gamma_1`` divides by ‖w‖_∞^L, ``gamma_2`` by ‖w‖₂^L, ``gamma_inf`` by ‖w‖₁^L, and
    ``gamma_sigma``, which is not named dually, by the largest spectral norm of a layer."""
    norms: dict[str, Norm] = {"gamma_1": Linf(), "gamma_2": L2(), "gamma_inf": L1()}
    return {
        name: margin(norm)
        for name, norm in (norms | {"gamma_sigma": modular(problem.layout)}).items()
    }


# --------------------------------------------------------------------------------------------------
# By layers
# --------------------------------------------------------------------------------------------------


def layer_norms(norm: Norm) -> Observer:
    """‖W_l‖ of each layer ``(B, layers)``, in a norm of one block, such as L2() or Spectral()."""

    def measure(problem: Problem, state: State) -> Tensor:
        alone = [Block(b.name, 0, b.shape) for b in problem.layout]
        pairs = zip(problem.layout, alone, strict=True)
        return torch.stack(
            [norm.bind((own,)).value(state.w[:, block.slice]) for block, own in pairs], -1
        )

    return measure


def product_margin(norm: Norm) -> Observer:
    """min_i q_i over Π_l ‖W_l‖^{d_l}, d_l the degree of the net in layer l (Lyu and Li 2020,
    normalised by layers).

    It does not change when one layer is scaled alone. NaN for a net that is not homogeneous in each
    layer."""
    each = layer_norms(norm)

    def measure(problem: Problem, state: State) -> Tensor:
        degrees = block_degrees(problem, state)
        return problem.margins(state.w).amin(-1) / (each(problem, state) ** degrees).prod(-1)

    return measure


def block_degrees(problem: Problem, state: State) -> Float[Tensor, "B layers"]:
    """The degree of the outputs in each block, measured by doubling it; NaN where they are not
    homogeneous in it."""
    f = problem.outputs(state.w)
    found = []
    for block in problem.layout:
        doubled = state.w.clone()
        doubled[:, block.slice] *= 2
        degree = torch.log2(_largest(problem.outputs(doubled)) / _largest(f))
        off = _largest(problem.outputs(doubled) - 2 ** degree[:, None, None] * f)
        found.append(torch.where(off <= 1e-6 * _largest(f), degree, torch.nan))
    return torch.stack(found, -1)


def _largest(f: Tensor) -> Tensor:
    return f.flatten(1).abs().amax(-1)


# --------------------------------------------------------------------------------------------------
# By examples
# --------------------------------------------------------------------------------------------------


def support_vectors(decades: float = 1.0) -> Observer:
    """Which examples have a margin within log 10^k of the least ``(B, N)``, so that their share of
    the exponential loss is at least 10^−k of the largest; none where an example is
    misclassified."""

    def measure(problem: Problem, state: State) -> Bool[Tensor, "B N"]:
        q = problem.margins(state.w)
        least = q.amin(-1, keepdim=True)
        return (q <= least + decades * math.log(10)) & (least > 0)

    return measure


def support_count(decades: float = 1.0) -> Observer:
    """The number of `support_vectors`."""
    return lambda problem, state: support_vectors(decades)(problem, state).sum(-1)


def margin_quantiles(norm: Norm, shares: Sequence[float] = (0.0, 0.1, 0.5, 0.9, 1.0)) -> Observer:
    """Quantiles over examples of the normalised margins q_i/‖w‖^L, ``(B, len(shares))``: the margin
    distribution."""

    def measure(problem: Problem, state: State) -> Tensor:
        q = problem.margins(state.w)
        return (
            torch.quantile(q, q.new_tensor(shares), dim=-1).mT
            / _power(problem, norm, state)[:, None]
        )

    return measure


def entropy(problem: Problem, state: State) -> Tensor:
    """H(p) = −Σ p_i log p_i of the weights in the descent, between 0 and log M."""
    p = problem.weights(state.w)
    return -torch.special.xlogy(p, p).sum(-1)


def accuracy(problem: Problem, state: State) -> Tensor:
    """The share of examples with a positive margin."""
    return (problem.margins(state.w) > 0).to(state.w).mean(-1)


def test_accuracy(test: Problem) -> Observer:
    """Accuracy on another data set."""
    return lambda problem, state: accuracy(test.like(state.w), state)
