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
from torch import Tensor

from flowsim.convex.cones import conic_optimum
from flowsim.convex.games import game, nearest_by_products
from flowsim.convex.linear import BallProgramme, is_linear, linear_optimum
from flowsim.diagnostics.gradient_sets import GradientSets
from flowsim.diagnostics.selected import PerMargin, margin_reading
from flowsim.diagnostics.series import as_array
from flowsim.motion.state import State, tree_map
from flowsim.norms.norm import Norm
from flowsim.numerics.shapes import PerTrajectory
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

    p: PerMargin
    dual: PerTrajectory
    least: PerTrajectory
    lower: PerTrajectory
    upper: PerTrajectory

    @property
    def excess(self) -> PerTrajectory:
        """1 − L q_min/(‖w‖‖Σ p_i h_i‖_*) ≥ 0: zero exactly at KKT points, and 1 − α of these
        multipliers up to the spread of the active margins."""
        return 1 - self.lower / self.dual

    @property
    def floor(self) -> PerTrajectory:
        """What 1 − α is at least, for any multipliers on the active examples."""
        missing = 1 - self.upper / self.least
        return missing.clamp_min(0)


def best_multipliers(
    problem: Problem, state: State, norm: Norm, *, decades: float = 3.0
) -> BestMultipliers:
    """The best multipliers over the examples with q_i ≤ q_min + log 10^decades, to a relative gap
    of 1e-9.

    On a kink, where the state's multiplier is strictly between 0 and 1, each example may take
    either side or any mean of them. A linear programme in ℓ1 and ℓ∞, least squares in quadratic
    norms; other norms need the extra ``convex``."""
    norm = norm.bind(problem.layout)
    several = []
    for b in torch.arange(len(state.w)).split(1):
        row = b.to(state.w.device)
        one = problem.select(row)
        found = _of_one(one, state.select(row), norm, decades)
        several.append(found)
    return tree_map(lambda *rows: torch.cat(rows), *several)


def _of_one(problem: Problem, state: State, norm: Norm, decades: float) -> BestMultipliers:
    """The same for one trajectory."""
    reading = margin_reading(problem)
    f = problem.outputs(state.w)
    q, _ = reading.read(f, problem.y)  # (1, M)
    least = q.amin(-1)
    unknown = least * torch.nan
    if not least > 0:
        nowhere = q * torch.nan
        return BestMultipliers(nowhere, unknown, unknown, unknown, unknown)
    near = q[0] <= least + decades * math.log(10)
    active = near.nonzero()[:, 0]
    sets = GradientSets.of(problem, state, active)
    best = best_mixture(sets, norm)
    p = torch.zeros_like(q)
    p[0, active] = best.p
    scale = problem.degree / norm.value(state.w)
    return BestMultipliers(
        p=p,
        dual=torch.full_like(least, best.dual),
        least=torch.full_like(least, best.bound),
        lower=scale * least,
        upper=scale * q[:, active].amax(-1),
    )


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
    solve = linear_optimum if is_linear(norm) else conic_optimum
    optimum = solve(lifted(sets), norm)
    u = torch.from_numpy(optimum.u).to(sets.base)
    multipliers = torch.from_numpy(optimum.multipliers).to(sets.base)
    share, force = multipliers.tensor_split([len(sets.base)])  # (A,), (K,)
    positive = share.clamp_min(0)
    p = positive / positive.sum()
    weight = p[sets.kinks.owner]
    weight = torch.where(weight > 0, weight, torch.inf)
    D = (force / weight).clamp(0, 1)
    h = p @ sets.at(D)
    dual = float(norm.dual(h))
    return BestMixture(p, dual, bound=sets.value(u, norm))


def _by_vertices(sets: GradientSets, norm: Norm) -> BestMixture:
    """The hull of few gradients, to which those are added that its answer w has overlooked."""
    A = len(sets.base)
    bound = 0.0
    rows = sets.at(sets.kinks.D)
    owner = torch.arange(A)
    for _ in range(_ROUNDS):
        found = game(as_array(rows), norm, nearest_by_products)
        u = torch.from_numpy(found.w).to(rows)
        bound = max(bound, sets.value(u, norm))
        p = np.bincount(owner.numpy(), found.p, A)
        if found.bound - bound <= _GAP * found.bound:
            break
        new = sets.lowest(u)
        better = new @ u < found.bound * (1 - _GAP)
        added = better.nonzero()[:, 0].cpu()
        used = torch.from_numpy(found.p > 0)
        rows = torch.cat([rows[used], new[better]])
        owner = torch.cat([owner[used], added])
    weights = torch.from_numpy(p).to(rows)
    return BestMixture(weights, found.bound, bound)


def lifted(sets: GradientSets) -> BallProgramme:
    """max τ over ‖u‖ ≤ 1 and s ≥ 0 with ⟨b_i, u⟩ − Σ s_k ≥ τ, k of i, and s_k ≥ −⟨n_k, u⟩."""
    A, P = sets.base.shape
    K = len(sets.kinks)
    b = as_array(sets.base)
    n = as_array(sets.kinks.normals(P))
    owner = as_array(sets.kinks.owner)
    scale = np.abs(b).max()
    belongs = owner == np.arange(A)[:, None]  # (A, K)
    tau = np.repeat([1.0, 0.0], [A, K])[:, None]
    normals = np.vstack([b, n]) / scale
    hinges = np.vstack([belongs, -np.eye(K)])
    return BallProgramme(
        goal=np.append(np.zeros(P + K), 1.0),
        rows=np.hstack([-normals, hinges, tau]),
        lowest=np.append(np.zeros(K), -np.inf),
    )
