"""Margins and norms along a trajectory: plain functions of (problem, state) that return ``(B,)`` or
``(B, …)``.

Margins are named by the norm on the *weights* that normalises them: ``margin_linf`` divides by
‖w‖_∞^L and is what sign descent raises. Tsilivis et al. (2026) name margins dually; `paper` has
them under those names."""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor

from flowsim.layout import Block
from flowsim.motion.state import State
from flowsim.norms.blocks import modular
from flowsim.norms.norm import Norm
from flowsim.norms.vector import L1, L2, Linf
from flowsim.numerics.shapes import Outputs, PerTrajectory
from flowsim.problems.objective import Objective
from flowsim.problems.problem import Problem

Observer = Callable[[Any, State], Tensor]
"""A function of (problem, state) that returns ``(B, …)``, for ``simulate(…, observe=…)``."""

PerLayer: TypeAlias = Float[Tensor, "B layers"]
"""One number for each layer."""

_SHARES = (0.0, 0.1, 0.5, 0.9, 1.0)  # of examples, at which quantiles are taken


def classifies(problem: Objective) -> TypeGuard[Problem]:
    """Whether there are margins: a loss of a net that is not a regression."""
    return isinstance(problem, Problem) and problem.loss.reading.targets != "values"


def size(norm: Norm) -> Observer:
    """‖w‖."""

    def measure(problem: Objective, state: State) -> PerTrajectory:
        bound = norm.bind(problem.layout)
        return bound.value(state.w)

    return measure


def margin(norm: Norm) -> Observer:
    """Normalised hard margin γ = min_i q_i / ‖w‖^L; negative while an example is misclassified, NaN
    at w = 0.

    With several classes the minimum is over examples and wrong classes.
    """

    def measure(problem: Problem, state: State) -> PerTrajectory:
        hard = problem.margins(state.w).amin(-1)
        return hard / _power(problem, norm, state)

    return measure


def soft_margin(norm: Norm) -> Observer:
    """Normalised soft margin ℓ⁻¹(𝓛)/‖w‖^L, with 𝓛 the sum loss (Tsilivis et al. 2026, Thm 1 and
    22).

    It never falls along a steepest flow in the same norm once 𝓛 < ℓ(0). Raises for a loss without
    an inverse."""

    def measure(problem: Problem, state: State) -> PerTrajectory:
        lam = problem.lam(state.w)
        soft = problem.loss.soft_minimum(lam)
        return soft / _power(problem, norm, state)

    return measure


def _power(problem: Problem, norm: Norm, state: State) -> PerTrajectory:
    """‖w‖^L."""
    bound = norm.bind(problem.layout)
    return bound.value(state.w) ** problem.degree


def paper(problem: Problem) -> dict[str, Observer]:
    """Margins under the names of Tsilivis et al. (2026), Eq. 13 and §4.3, for ``simulate(…,
    observe=…)``.

    ``gamma_1`` divides by ‖w‖_∞^L, ``gamma_2`` by ‖w‖₂^L, ``gamma_inf`` by ‖w‖₁^L, and
    ``gamma_sigma``, which is not named dually, by the largest spectral norm of a layer."""
    return {
        "gamma_1": margin(Linf()),
        "gamma_2": margin(L2()),
        "gamma_inf": margin(L1()),
        "gamma_sigma": margin(modular(problem.layout)),
    }


# --------------------------------------------------------------------------------------------------
# By layers
# --------------------------------------------------------------------------------------------------


def layer_norms(norm: Norm) -> Observer:
    """‖W_l‖ of each layer ``(B, layers)``, in a norm of one block, such as L2() or Spectral()."""

    def measure(problem: Problem, state: State) -> PerLayer:
        lengths = []
        for block in problem.layout:
            alone = Block(block.name, 0, block.shape)
            bound = norm.bind((alone,))
            weights = state.w[:, block.slice]
            lengths.append(bound.value(weights))
        return torch.stack(lengths, -1)

    return measure


def product_margin(norm: Norm) -> Observer:
    """min_i q_i over Π_l ‖W_l‖^{d_l}, d_l the degree of the net in layer l (Lyu and Li 2020,
    normalised by layers).

    It does not change when one layer is scaled alone. NaN for a net that is not homogeneous in each
    layer."""
    lengths = layer_norms(norm)

    def measure(problem: Problem, state: State) -> PerTrajectory:
        degrees = block_degrees(problem, state)
        powers = lengths(problem, state) ** degrees
        hard = problem.margins(state.w).amin(-1)
        return hard / powers.prod(-1)

    return measure


def block_degrees(problem: Problem, state: State) -> PerLayer:
    """The degree of the outputs in each block, measured by doubling it; NaN where they are not
    homogeneous in it."""
    f = problem.outputs(state.w)
    largest = _largest(f)
    found = []
    for block in problem.layout:
        doubled = state.w.clone()
        doubled[:, block.slice] *= 2
        grown = problem.outputs(doubled)
        degree = torch.log2(_largest(grown) / largest)
        factor = 2 ** degree[:, None, None]
        error = _largest(grown - factor * f)
        homogeneous = error <= 1e-6 * largest
        known = torch.where(homogeneous, degree, torch.nan)
        found.append(known)
    return torch.stack(found, -1)


def _largest(f: Outputs) -> PerTrajectory:
    sizes = f.flatten(1).abs()
    return sizes.amax(-1)


# --------------------------------------------------------------------------------------------------
# By examples
# --------------------------------------------------------------------------------------------------


def support_vectors(decades: float = 1.0) -> Observer:
    """Which examples have a margin within log 10^k of the least ``(B, N)``, so that their share of
    the exponential loss is at least 10^−k of the largest; none where an example is
    misclassified."""

    def measure(problem: Problem, state: State) -> Tensor:
        q = problem.margins(state.w)
        least = q.amin(-1, keepdim=True)
        near = q <= least + decades * math.log(10)
        return near & (least > 0)

    return measure


def support_count(decades: float = 1.0) -> Observer:
    """The number of `support_vectors`."""
    support = support_vectors(decades)

    def measure(problem: Problem, state: State) -> Tensor:
        near = support(problem, state)
        return near.sum(-1)

    return measure


def margin_quantiles(norm: Norm, shares: Sequence[float] = _SHARES) -> Observer:
    """Quantiles over examples of the normalised margins q_i/‖w‖^L, ``(B, len(shares))``: the margin
    distribution."""

    def measure(problem: Problem, state: State) -> Tensor:
        q = problem.margins(state.w)
        fractions = q.new_tensor(shares)
        quantiles = torch.quantile(q, fractions, dim=-1)
        power = _power(problem, norm, state)
        return quantiles.mT / power[:, None]

    return measure


def entropy(problem: Problem, state: State) -> PerTrajectory:
    """H(p) = −Σ p_i log p_i of the weights in the descent, between 0 and log M."""
    p = problem.weights(state.w)
    terms = torch.special.xlogy(p, p)
    return -terms.sum(-1)


def accuracy(problem: Problem, state: State) -> PerTrajectory:
    """The share of examples with a positive margin."""
    correct = problem.margins(state.w) > 0
    return correct.to(state.w).mean(-1)


def test_accuracy(test: Problem) -> Observer:
    """Accuracy on another data set."""

    def measure(problem: Problem, state: State) -> PerTrajectory:
        own = test.like(state.w)
        return accuracy(own, state)

    return measure
