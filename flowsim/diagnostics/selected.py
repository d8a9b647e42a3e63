"""The gradient that a flow has selected on kinks, as the multipliers of its state tell it."""

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import one_hot

from flowsim.kernels import reference as kernels
from flowsim.motion.state import State
from flowsim.numerics.shapes import Outputs, PerKink, Rows
from flowsim.problems.problem import Problem
from flowsim.problems.readings import Pairwise, Reading

PerMargin: TypeAlias = Float[Tensor, "B M"]
"""One number for each margin: of an example, or of an example and a wrong class."""


def ascent(problem: Problem, state: State) -> Rows:
    """h = ∇Λ at a state: on kinks the element that the flow has selected, which its multipliers
    tell.

    States of discrete rules have no multipliers; there it is the element that autograd returns.
    """
    sides = selected_sides(problem, state)
    if sides is None:
        return problem.ascent(state.w)[1]
    return problem.hinges(state.w).gradient(sides)


def selected_sides(problem: Problem, state: State) -> PerKink | None:
    """D of every kink, those that slide as the state has them, the others by their side; None
    without kinks."""
    D = state.multipliers
    if D is None or not problem.kinks:
        return None
    z = problem.hinges(state.w).z
    side = (z > 0).to(z)
    return torch.where(strictly_between(D), D, side)


def strictly_between(D: Tensor) -> Bool[Tensor, "*shape"]:
    """Which multipliers are those of kinks that slide."""
    return (D > 0) & (D < 1)


def selected_pullback(problem: Problem, state: State) -> Callable[[Outputs], Rows]:
    """c ↦ Jᵀc, the outputs' Jacobian with the activations' slopes that the flow has selected."""
    sides = selected_sides(problem, state)
    if sides is None:
        _, pullback = problem.net.linearize(state.w, problem.x)
        return pullback
    net = problem.two_layer(len(state.w))
    point = net.at(state.w)
    D = sides.view_as(point.z)
    tape = point.tape(point.slopes(D))
    return partial(kernels.pullback, tape)


def margin_reading(problem: Problem) -> Reading:
    """The reading of homogeneous margins, which are what max-margin problems constrain: y f, or f_y
    − f_j for every wrong class j, whatever the loss makes of them."""
    reading = problem.loss.reading
    if reading.targets == "values":
        raise ValueError(
            f"got the {problem.loss.name} loss, which has no margins; "
            "try exponential or logistic loss"
        )
    return Pairwise() if reading.targets == "classes" else reading


def loss_multipliers(problem: Problem, state: State) -> tuple[PerMargin, PerMargin]:
    """The margins q and the μ ≥ 0 with ∇Λ = Σ μ_i ∇q_i; for the exponential loss the softmax
    weights."""
    f = problem.outputs(state.w)
    _, cotangent = problem.loss.ascent(f, problem.y)
    reading = margin_reading(problem)
    q, _ = reading.read(f, problem.y)
    one_for_each_example = q.shape[1] == f.shape[1]
    if one_for_each_example:
        return q, cotangent[..., 0] * problem.y
    classes = f.shape[-1]
    right = one_hot(problem.y, classes).bool()
    wrong = ~right.expand_as(f)
    mu = -cotangent[wrong]
    return q, mu.view_as(q)
