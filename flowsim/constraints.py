"""The constrained problem that weight decay solves."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from flowsim.norms import Norm
from flowsim.problem import Objective
from flowsim.state import State


def frank_wolfe_gap(norm: Norm, radius: float) -> Callable[[Objective, State], Float[Tensor, " B"]]:
    """A measurement: max ⟨g, w − v⟩ over ‖v‖ ≤ radius, g = ∇𝓛, which is ⟨g, w⟩ + radius·‖g‖_* (Jaggi 2013).

    Inside the ball it is ≥ 0, zero at the KKT points of min 𝓛(w) over ‖w‖ ≤ radius, and where 𝓛 is convex it bounds
    𝓛(w) − min 𝓛. Normalised steepest descent with decoupled weight decay λ, and AdamW in ℓ∞, are Frank–Wolfe steps of
    that problem for radius 1/λ.
    """

    def measure(problem: Objective, state: State) -> Tensor:
        lam, h = problem.ascent(state.w)
        gap = radius * norm.bind(problem.layout).dual(h) - (h * state.w).sum(-1)
        return torch.exp(-lam) * gap if problem.logarithmic else gap

    return measure
