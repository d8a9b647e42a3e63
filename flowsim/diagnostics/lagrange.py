r"""The best multipliers of a point: whether it is a KKT point, whatever the softmax weights say.

At weights w of a net of degree L every choice of p on the simplex and h_i ∈ ∂q_i(w) has, by Euler's
identity,

    ‖Σ p_i h_i‖_* ≥ ⟨w, Σ p_i h_i⟩/‖w‖ = L Σ p_i q_i/‖w‖ ≥ L q_min/‖w‖,

with equality for some p and h exactly at the KKT points of the max-margin problem. The least ‖Σ p_i
h_i‖_* over the examples near the least margin, and over the gradients of each at its kinks, is the
value of a matrix game between w and rows, solved in any norm by `reference.game`. Its rows are
vertices of the sets ∂q_i(w); those that matter are found one after the other."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray as Array
from torch import Tensor

from flowsim.convex.cones import conic_optimum
from flowsim.convex.games import game, nearest_by_products
from flowsim.convex.linear import BallProgramme, is_linear, linear_optimum
from flowsim.diagnostics.gradient_sets import GradientSets
from flowsim.diagnostics.selected import margin_reading
from flowsim.motion.state import State
from flowsim.norms.norm import Norm
from flowsim.problems.problem import Problem

_GAP = 1e-9  # relative, between what multipliers attain and what none is below

_ROUNDS = 200  # of adding gradients to a hull


@dataclass(frozen=True)
class BestMultipliers:
    """The least ‖Σ p_i h_i‖_* over multipliers p on the active examples and gradients h_i ∈
    ∂q_i(w).

    ``p (B, M)`` attains ``dual (B,)``; no choice is below ``least (B,)``, which differs from it by
    the solver's gap. ``lower`` = L q_min/‖w‖ and ``upper`` = L max q_i/‖w‖ over the active examples
    frame ⟨w, Σ p_i h_i⟩/‖w‖. All are NaN where an example is misclassified."""

    p: Float[Tensor, "B M"]
    dual: Float[Tensor, " B"]
    least: Float[Tensor, " B"]
    lower: Float[Tensor, " B"]
    upper: Float[Tensor, " B"]

    @property
    def excess(self) -> Float[Tensor, " B"]:
        """1 − L q_min/(‖w‖‖Σ p_i h_i‖_*) ≥ 0: zero exactly at KKT points, and 1 − α of these
        multipliers up to the spread of the active margins."""
        return 1 - self.lower / self.dual

    @property
    def floor(self) -> Float[Tensor, " B"]:
        """What 1 − α is at least, for any multipliers on the active examples."""
        return (1 - self.upper / self.least).clamp_min(0)


def best_multipliers(
    problem: Problem, state: State, norm: Norm, *, decades: float = 3.0
) -> BestMultipliers:
    """The best multipliers over the examples with q_i ≤ q_min + log 10^decades, to a relative gap
    of 1e-9.

    On a kink, where the state's multiplier is strictly between 0 and 1, each example may take
    either side or any mean of them. A linear programme in ℓ1 and ℓ∞, least squares in quadratic
    norms; other norms need the extra ``convex``."""
    norm = norm.bind(problem.layout)
    rows = []
    for b in torch.arange(len(state.w), device=state.w.device).split(1):
        rows.append(_of_one(problem.select(b), state.select(b), norm, decades))
    return BestMultipliers(*(torch.stack(parts) for parts in zip(*rows, strict=True)))


def _of_one(problem: Problem, state: State, norm: Norm, decades: float) -> tuple[Tensor, ...]:
    """The fields of `BestMultipliers` for one trajectory."""
    q = margin_reading(problem).read(problem.outputs(state.w), problem.y)[0][0]  # (M,)
    least = q.amin()
    if not least > 0:
        return (torch.full_like(q, torch.nan), *[torch.full_like(least, torch.nan)] * 4)
    active = (q <= least + decades * math.log(10)).nonzero()[:, 0]
    best = best_mixture(GradientSets.of(problem, state, active), norm)
    p = torch.zeros_like(q).index_put((active,), best.p)
    scale = problem.degree / norm.value(state.w[0])
    dual, bound = q.new_tensor(best.dual), q.new_tensor(best.bound)
    return p, dual, bound, scale * least, scale * q[active].amax()


# --------------------------------------------------------------------------------------------------
# Solvers
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BestMixture:
    """Weights ``p (A,)`` of sets of gradients, the dual norm that some gradients attain with them,
    and a bound that no weights and gradients are below."""

    p: Float[Tensor, " A"]
    dual: float
    bound: float


def best_mixture(sets: GradientSets, norm: Norm) -> BestMixture:
    """The least ‖Σ p_i h_i‖_* over h_i of the sets."""
    if norm.quadratic:
        return _by_vertices(sets, norm)
    optimum = (linear_optimum if is_linear(norm) else conic_optimum)(lifted(sets), norm)
    u, multipliers = (torch.from_numpy(a).to(sets.base) for a in (optimum.u, optimum.multipliers))
    p, force = multipliers.tensor_split([len(sets.base)])  # (A,), (K,)
    p = p.clamp_min(0) / p.clamp_min(0).sum()
    weight = p[sets.kinks.owner]
    D = (force / torch.where(weight > 0, weight, torch.inf)).clamp(0, 1)
    return BestMixture(p, float(norm.dual(p @ sets.at(D))), sets.value(u, norm))


def _by_vertices(sets: GradientSets, norm: Norm) -> BestMixture:
    """The hull of few gradients, to which those are added that its answer w has overlooked."""
    A, bound = len(sets.base), 0.0
    rows, owner = sets.at(sets.kinks.D), torch.arange(A)
    for _ in range(_ROUNDS):
        found = game(rows.double().cpu().numpy(), norm, nearest_by_products)
        u = torch.from_numpy(found.w).to(rows)
        bound = max(bound, sets.value(u, norm))
        p = np.bincount(owner.numpy(), found.p, A)
        if found.bound - bound <= _GAP * found.bound:
            break
        new, used = sets.lowest(u), torch.from_numpy(found.p > 0)
        better = (new @ u) < found.bound * (1 - _GAP)
        rows = torch.cat([rows[used], new[better]])
        owner = torch.cat([owner[used], better.nonzero()[:, 0].cpu()])
    return BestMixture(torch.from_numpy(p).to(rows), found.bound, bound)


def lifted(sets: GradientSets) -> BallProgramme:
    """max τ over ‖u‖ ≤ 1 and s ≥ 0 with ⟨b_i, u⟩ − Σ s_k ≥ τ, k of i, and s_k ≥ −⟨n_k, u⟩."""
    (A, P), K = sets.base.shape, len(sets.kinks)
    b, n, owner = (
        part.cpu().numpy() for part in (sets.base, sets.kinks.normals(P), sets.kinks.owner)
    )
    scale = np.abs(b).max()
    margins = np.hstack([-b / scale, _belongs(owner, A), np.ones((A, 1))])
    hinges = np.hstack([-n / scale, -np.eye(K), np.zeros((K, 1))])
    goal = np.append(np.zeros(P + K), 1.0)
    return BallProgramme(goal, np.vstack([margins, hinges]), np.append(np.zeros(K), -np.inf))


def _belongs(owner: Array, A: int) -> Float[Array, "A K"]:
    """One where kink k belongs to set i."""
    return (owner == np.arange(A)[:, None]).astype(float)
