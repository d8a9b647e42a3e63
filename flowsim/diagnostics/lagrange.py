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
from jaxtyping import Bool, Float
from torch import Tensor

from flowsim.convex.cones import conic_optimum
from flowsim.convex.games import game, nearest_by_products
from flowsim.convex.linear import BallProgramme, is_linear, linear_optimum
from flowsim.diagnostics.selected import margin_reading, selected_pullback, selected_sides
from flowsim.motion.state import State
from flowsim.norms.norm import Norm
from flowsim.problems.problem import Problem


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
    problem: Problem,
    state: State,
    norm: Norm,
    *,
    decades: float = 3.0,
    tol: float = 1e-9,
    rounds: int = 200,
) -> BestMultipliers:
    """The best multipliers over the examples with q_i ≤ q_min + log 10^decades, to a relative gap
    of ``tol``.

    On a kink, where the state's multiplier is strictly between 0 and 1, each example may take
    either side or any mean of them. A linear programme in ℓ1 and ℓ∞, least squares in quadratic
    norms; other norms need the extra ``convex``."""
    norm = norm.bind(problem.layout)
    q = margin_reading(problem).read(problem.outputs(state.w), problem.y)[0]
    rows = [_row(problem, state, norm, q, b, decades, (tol, rounds)) for b in range(len(q))]
    return BestMultipliers(*(torch.stack(parts) for parts in zip(*rows, strict=True)))


def _row(
    problem: Problem,
    state: State,
    norm: Norm,
    q: Tensor,
    b: int,
    decades: float,
    limits: tuple[float, int],
) -> tuple[Tensor, ...]:
    """The fields of `BestMultipliers` for one trajectory."""
    least = q[b].amin()
    if not least > 0:
        return (torch.full_like(q[b], torch.nan), *[torch.full_like(least, torch.nan)] * 4)
    active = q[b] <= least + decades * math.log(10)
    one = torch.tensor([b], device=q.device)
    p, dual, bound = _game(
        _Gradients.of(problem.select(one), state.select(one), active), norm, *limits
    )
    scale = problem.degree / norm.value(state.w[b])
    spread = torch.zeros_like(q[b]).masked_scatter(active, torch.from_numpy(p).to(q))
    return (
        spread,
        q.new_tensor(dual),
        q.new_tensor(bound),
        scale * least,
        scale * q[b][active].amax(),
    )


@dataclass(frozen=True)
class _Gradients:
    """The sets ∂q_i(w) of A margins: base_i + Σ_j D_ij jump_ij n_ij with D_ij in [0, 1] where
    ``free``, as selected elsewhere. The normal n_ij is ``x_i`` in the place of neuron j's incoming
    weights, which are the first block."""

    base: Float[Tensor, "A P"]
    jump: Float[Tensor, "A m"]
    x: Float[Tensor, "A d"]
    D: Float[Tensor, "A m"]
    free: Bool[Tensor, "A m"]

    @staticmethod
    def of(problem: Problem, state: State, active: Bool[Tensor, " M"]) -> "_Gradients":
        f = problem.outputs(state.w)
        q, back = margin_reading(problem).read(f, problem.y)
        units = torch.eye(q.shape[1], dtype=q.dtype, device=q.device)[active]
        cotangents = torch.stack([back(unit[None])[0] for unit in units])  # (A, N, C)
        sides = selected_sides(problem, state)
        if sides is None:
            pull = selected_pullback(problem, state)
            base = torch.cat([pull(c[None]) for c in cotangents])
            none = base.new_zeros(len(base), 0)
            return _Gradients(base, none, none, none, none.bool())
        net = problem.two_layer(1)
        point = net.at(state.w)
        example = cotangents.abs().amax(-1).argmax(-1)  # each margin belongs to one
        c, x = cotangents[torch.arange(len(example), device=q.device), example], net.x[0, example]
        D = net.spread(sides.view_as(point.z))[0, example]
        pull_back = c @ point.last[0]  # (A, m)
        last = c[:, :, None] * point.hidden[0, example][:, None, :]
        first = net.leak * pull_back[:, :, None] * x[:, None, :]
        base = torch.cat([first.flatten(1), last.flatten(1)], 1)
        return _Gradients(base, (1 - net.leak) * pull_back, x, D, (D > 0) & (D < 1))

    def at(self, D: Float[Tensor, "A m"]) -> Float[Tensor, "A P"]:
        """The gradients with these multipliers."""
        rows = self.base.clone()
        rows[:, : self.D.shape[1] * self.x.shape[1]] += (
            (self.jump * D)[:, :, None] * self.x[:, None, :]
        ).flatten(1)
        return rows

    def lowest(self, u: Float[Tensor, " P"]) -> Float[Tensor, "A P"]:
        """Of each set the gradient with the least ⟨·, u⟩."""
        along = (
            self.x
            @ u[: self.D.shape[1] * self.x.shape[1]].view(self.D.shape[1], self.x.shape[1]).mT
        )
        return self.at(torch.where(self.free, (self.jump * along < 0).to(self.D), self.D))

    def value(self, u: Float[Tensor, " P"], norm: Norm) -> float:
        """min ⟨h, u⟩/‖u‖ over all sets, which ‖Σ p_i h_i‖_* cannot be below."""
        size = norm.value(u)
        return float((self.lowest(u) @ u).amin() / size) if size > 0 else 0.0


# --------------------------------------------------------------------------------------------------
# Solvers: (sets, norm, tol, rounds) -> p over the sets, the dual norm it attains, and a bound that
# none is below
# --------------------------------------------------------------------------------------------------


def _game(sets: _Gradients, norm: Norm, tol: float, rounds: int) -> tuple[np.ndarray, float, float]:
    if norm.quadratic:
        return _by_vertices(sets, norm, tol, rounds)
    best = (linear_optimum if is_linear(norm) else conic_optimum)(_programme(sets), norm)
    u, multipliers = (torch.from_numpy(a).to(sets.base) for a in (best.u, best.multipliers))
    p, taken = multipliers.tensor_split([len(sets.D)])
    p = p.clamp_min(0) / p.clamp_min(0).sum()
    force = torch.zeros_like(sets.D).masked_scatter(sets.free, taken)
    D = (force / torch.where(p > 0, p, torch.inf)[:, None]).clamp(0, 1)
    attained = norm.dual(p @ sets.at(torch.where(sets.free, D, sets.D)))
    return p.cpu().numpy(), float(attained), sets.value(u, norm)


def _by_vertices(
    sets: _Gradients, norm: Norm, tol: float, rounds: int
) -> tuple[np.ndarray, float, float]:
    """The hull of few gradients, to which those are added that its answer w has overlooked."""
    rows, owner, bound = sets.at(sets.D), torch.arange(len(sets.D)), 0.0
    for _ in range(rounds):
        found = game(rows.double().cpu().numpy(), norm, nearest_by_products)
        p = np.bincount(owner.numpy(), found.p, len(sets.D))
        u = torch.from_numpy(found.w).to(rows)
        bound = max(bound, sets.value(u, norm))
        if found.bound - bound <= tol * found.bound:
            break
        new, used = sets.lowest(u), torch.from_numpy(found.p > 0)
        better = (new @ u) < found.bound * (1 - tol)
        rows, owner = (
            torch.cat([rows[used], new[better]]),
            torch.cat([owner[used], better.nonzero()[:, 0].cpu()]),
        )
    return p, found.bound, bound


def _lifted(sets: _Gradients) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows b_i with D = 0, normals jump_ij n_ij of the free kinks, and the margin that each kink
    belongs to."""
    owner, neuron = sets.free.nonzero(as_tuple=True)
    d = sets.x.shape[1]
    normals = sets.base.new_zeros(len(owner), sets.base.shape[1])
    place = neuron[:, None] * d + torch.arange(d, device=neuron.device)
    normals.scatter_(1, place, sets.jump[owner, neuron][:, None] * sets.x[owner])
    rows = sets.at(torch.where(sets.free, 0.0, sets.D))
    return tuple(part.cpu().numpy() for part in (rows, normals, owner))  # type: ignore[return-value]


def _programme(sets: _Gradients) -> BallProgramme:
    """max τ over ‖u‖ ≤ 1 and s ≥ 0 with ⟨b_i, u⟩ − Σ s_ij ≥ τ and s_ij ≥ −⟨jump_ij n_ij, u⟩."""
    rows, normals, owner = _lifted(sets)
    scale, A, K = np.abs(rows).max(), len(rows), len(owner)
    taken = np.zeros((A, K))
    taken[owner, np.arange(K)] = 1.0
    margins = np.hstack([-rows / scale, taken, np.ones((A, 1))])
    kinks = np.hstack([-normals / scale, -np.eye(K), np.zeros((K, 1))])
    goal = np.append(np.zeros(margins.shape[1] - 1), 1.0)
    return BallProgramme(goal, np.vstack([margins, kinks]), np.append(np.zeros(K), -np.inf))
