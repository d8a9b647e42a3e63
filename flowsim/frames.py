"""The moving frame: averages of gradients that are kept in units of the gradient.

With h = ∇Λ the true gradient is g = −e^{−Λ}h, which no float holds late in a run. An average m of gradients is kept
as m e^{−S}, with S the logarithm of a unit that follows ‖g‖_*: it rises to it at once, and falls no faster than the
average forgets. So what is kept neither under- nor overflows, and a scale of the loss changes nothing.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from flowsim.clocks import log_time_rate
from flowsim.problem import Objective
from flowsim.state import State


@dataclass(frozen=True)
class Frame:
    """S ``(B,)``; the factor ``(B, 1)`` that brings what is kept to its units, and the root of the one for h."""

    log_unit: Float[Tensor, " B"]
    keep: Float[Tensor, "B 1"]
    root: Float[Tensor, "B 1"]

    @staticmethod
    def follow(objective: Objective, state: State, forget: float, head: float = 0.0) -> "Frame":
        """The frame that the gradient at ``state`` leads to; ``forget`` is what an average keeps of itself in a step,
        and ``head`` the logarithm of the largest ‖g‖_* in its units."""
        lam, before = state.readings["lam"], state.memory["frame"]
        scale = -lam if objective.logarithmic else torch.zeros_like(lam)  # of g over h
        newest = head - torch.log(state.memory["dual"])
        oldest = (scale - before) - math.log(forget) if forget > 0 else torch.full_like(lam, torch.inf)
        log_add = torch.minimum(newest, oldest)
        log_unit = scale - log_add
        log_add = torch.where(log_add < torch.inf, log_add, 0.0)  # no gradient so far
        keep, root = torch.exp((before - scale) + log_add), torch.exp(0.5 * log_add)
        return Frame(log_unit, keep.to(state.w)[:, None], root.to(state.w)[:, None])

    def gradient(self, state: State) -> Float[Tensor, "B P"]:
        """−g in the frame's units. The factor itself may overflow where h is tiny, its root does not."""
        return (self.root * state.memory["ascent"]).mul_(self.root)


def no_frame(state: State) -> Float[Tensor, " B"]:
    """S before the first gradient."""
    return torch.full_like(state.step_size, -torch.inf)


def log_force(objective: Objective, state: State) -> Float[Tensor, " B"]:
    """log ‖g‖_* of the gradient at hand: one over the rate dt/ds of a steepest flow."""
    return -log_time_rate(objective, state.readings["lam"], state.memory["dual"])
