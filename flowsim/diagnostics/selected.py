"""The gradient that a flow has selected on kinks, as the multipliers of its state tell it."""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from flowsim.kernels import reference as kernels
from flowsim.motion.state import State
from flowsim.problems.problem import Problem
from flowsim.problems.readings import Pairwise, Reading


def ascent(problem: Problem, state: State) -> Float[Tensor, "B P"]:
    """h = ∇Λ at a state: on kinks the element that the flow has selected, which its multipliers
    tell.

    States of discrete rules have no multipliers; there it is the element that autograd returns.
    """
    sides = selected_sides(problem, state)
    return problem.ascent(state.w)[1] if sides is None else problem.hinges(state.w).gradient(sides)


def selected_sides(problem: Problem, state: State) -> Float[Tensor, "B K"] | None:
    """D of every kink, those that slide as the state has them, the others by their side; None
    without kinks."""
    if state.multipliers is None or not problem.kinks:
        return None
    z = problem.hinges(state.w).z
    sliding = (state.multipliers > 0) & (state.multipliers < 1)
    return torch.where(sliding, state.multipliers, (z > 0).to(z))


def selected_pullback(
    problem: Problem, state: State
) -> Callable[[Float[Tensor, "B N C"]], Float[Tensor, "B P"]]:
    """c ↦ Jᵀc, the outputs' Jacobian with the activations' slopes that the flow has selected."""
    sides = selected_sides(problem, state)
    if sides is None:
        return problem.net.linearize(state.w, problem.x)[1]
    point = problem.two_layer(len(state.w)).at(state.w)
    tape = point.tape(point.slopes(sides.view_as(point.z)))
    return partial(kernels.pullback, tape)


def margin_reading(problem: Problem) -> Reading:
    """The reading of homogeneous margins, which are what max-margin problems constrain: y f, or f_y
    − f_j for every wrong class j, whatever the loss makes of them."""
    if problem.loss.reading.targets == "values":
        raise ValueError(
            f"got the {problem.loss.name} loss, which has no margins; "
            "try exponential or logistic loss"
        )
    return Pairwise() if problem.loss.reading.targets == "classes" else problem.loss.reading


def loss_multipliers(
    problem: Problem, state: State
) -> tuple[Float[Tensor, "B M"], Float[Tensor, "B M"]]:
    """The margins q and the μ ≥ 0 with ∇Λ = Σ μ_i ∇q_i; for the exponential loss the softmax
    weights."""
    f = problem.outputs(state.w)
    cotangent = problem.loss.ascent(f, problem.y)[1]
    q = margin_reading(problem).read(f, problem.y)[0]
    if q.shape[1] == f.shape[1]:
        return q, cotangent[..., 0] * problem.y
    wrong = ~torch.nn.functional.one_hot(problem.y, f.shape[-1]).bool().expand_as(f)
    return q, -cotangent[wrong].view_as(q)
