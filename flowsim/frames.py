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

from flowsim.problem import Objective
from flowsim.state import State


@dataclass(frozen=True)
class Frame:
    """S ``(B,)``, and the factors ``(B, 1)`` that bring what is kept and h to its units; the second in two parts
    where it would overflow."""

    log_unit: Float[Tensor, " B"]
    keep: Float[Tensor, "B 1"]
    add: Float[Tensor, "B 1"]
    rest: Float[Tensor, "B 1"] | None

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
        most = 0.9 * math.log(torch.finfo(state.w.dtype).max)
        excess = (log_add - most).clamp_min(0.0)
        logs = torch.stack([(before - scale) + log_add, log_add - excess, excess])
        factors = torch.exp(logs).to(state.w)[..., None]
        return Frame(log_unit, factors[0], factors[1], factors[2] if bool((excess > 0).any()) else None)

    def gradient(self, state: State) -> Float[Tensor, "B P"]:
        """−g in the frame's units."""
        g = self.add * state.memory["ascent"]
        return g if self.rest is None else g.mul_(self.rest)


def no_frame(state: State) -> Float[Tensor, " B"]:
    """S before the first gradient."""
    return torch.full_like(state.step_size, -torch.inf)
