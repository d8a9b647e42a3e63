"""Velocities at ties and kinks: against convex solvers, minimising movements, and small steps where
these differ."""

from functools import cache

import pytest
import torch
from torch import Tensor

import flowsim as fs
from flowsim.layout import lay_out
from flowsim.norms.blocks import Euclidean, Max, Sum, modular
from flowsim.norms.faces import WholeBall
from flowsim.norms.matrix import Nuclear, Spectral
from flowsim.norms.norm import Norm
from flowsim.norms.vector import L1, L2, Linf, Lp, Mahalanobis
from flowsim.problems.problem import Problem
from flowsim.problems.quadratics import PiecewiseQuadratic, Quadratic
from flowsim.velocity.selection import Selection, select, variation
from tests.oracles.projected_gradient import minimise

ORIGIN = torch.zeros(1, 3, dtype=torch.float64)
TOY1 = PiecewiseQuadratic(slope=[-3.0, -1.0, 1.0], normals=[[1.0, 0.5, 0.1]], weights=[4.0])
TOY2 = PiecewiseQuadratic(slope=[-1.0, -0.6, -0.3], normals=[[1.0, 1.0, 1.0]], weights=[2.0])


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_close(a: Tensor, b: Tensor, atol: float = 1e-9) -> None:
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype), rtol=0, atol=atol)


# --------------------------------------------------------------------------------------------------
# Toys
# --------------------------------------------------------------------------------------------------


def small_step_rate(toy: PiecewiseQuadratic, dlam: float, steps: int) -> tuple[float, float]:
    run = fs.simulate(toy, fs.SmallStep(Linf(), dlam=dlam), ORIGIN, until=fs.steps(steps))
    readings = run.final.readings
    return float(readings["lam"] / readings["arclength"]), float(readings["lam"].abs())


class TestToys:
    def test_flow_takes_the_direction_of_the_averaged_gradient(self):
        chosen = select(TOY1, Linf(), ORIGIN)
        assert_close(chosen.dual, [1.8])
        assert_close(chosen.direction, [[0.6, -1.0, -1.0]])
        assert_close(chosen.multipliers, [[0.75]])
        assert chosen.sliding.all()

    def test_small_steps_average_directions_instead(self):
        assert small_step_rate(TOY1, 1e-3, 2000)[0] == pytest.approx(19 / 15, abs=2e-3)

    def test_small_steps_may_stall_where_the_flow_goes_on(self):
        assert_close(select(TOY2, Linf(), ORIGIN).dual, [0.7])
        assert small_step_rate(TOY2, 1e-3, 2000)[1] <= 3e-3

    @pytest.mark.parametrize("second", [[1.0], [2.0], [-0.5]])
    @pytest.mark.parametrize("norm", [L2(), Linf(), Lp(3.0)], ids=lambda n: n.name)
    def test_parallel_kinks_share_their_multiplier(self, norm, second):
        """F = −w/2 + max(w, 0) − 0.8 max(second·w, 0)/|second|, which has no stationary point at
        0."""
        toy = PiecewiseQuadratic([-0.5], [[1.0], second], [1.0, -0.8 / abs(second[0])])
        chosen = select(toy, norm, ORIGIN[:, :1])
        right = second[0] > 0
        assert_close(chosen.ascent, [[0.3 if right else -0.3]])
        assert_close(chosen.direction, [[1.0 if right else -1.0]])
        assert not chosen.sliding.any()

    def test_gradients_are_those_of_the_value(self):
        for toy in (TOY1, PiecewiseQuadratic([-0.5], [[1.0], [-2.0]], [1.0, -0.8], [[2.0]], [0.3])):
            w = normal(5, toy.size, seed=1)
            level, h = toy.ascent(w)
            hinges = toy.hinges(w)
            assert_close(hinges.gradient((hinges.z > 0).to(w)), h)
            moved = w + 1e-7 * normal(5, toy.size, seed=2)
            assert_close(toy.lam(moved) - level, (h * (moved - w)).sum(-1), 1e-12)

    @pytest.mark.parametrize(
        "changes",
        [
            {"slope": [1.0]},
            {"matrix": [[1.0, 2.0], [0.0, 1.0]]},
            {"matrix": [[1.0]]},
            {"normals": [[0.0, 0.0]]},
            {"weights": [float("nan")]},
            {"shape": (3,)},
        ],
    )
    def test_wrong_toys_are_refused(self, changes):
        fine = {"slope": [1.0, 2.0], "normals": [[1.0, 0.0]], "weights": [1.0]}
        PiecewiseQuadratic(**fine)
        with pytest.raises(ValueError, match="PiecewiseQuadratic"):
            PiecewiseQuadratic(**(fine | changes))


# --------------------------------------------------------------------------------------------------
# Ties
# --------------------------------------------------------------------------------------------------

SHAPE = {
    "l1": (12,),
    "linf": (12,),
    "spectral": (3, 4),
    "nuclear": (3, 4),
    "max": (12,),
    "sum": (12,),
}
BLOCKS = lay_out({"a": (4,), "b": (2, 4)})


def tied_gradient(name: str, seed: int) -> Tensor:
    """A gradient whose steepest direction is not unique."""
    h = normal(12, seed=seed)
    if name == "l1":
        h = h / h.abs().max() * 0.9
        return torch.cat([h[:9], torch.tensor([1.0, -1.0, 1.0])])
    if name == "linf":
        return torch.cat([h[:8], torch.zeros(4)])
    left, s, right = torch.linalg.svd(h.view(3, 4), full_matrices=False)
    if name == "spectral":
        return (s[0] * left[:, :1] @ right[:1]).flatten()
    if name == "nuclear":
        return ((left * torch.tensor([2.0, 2.0, 0.5])) @ right).flatten()
    if name == "max":
        return torch.cat(
            [
                h[:2],
                torch.zeros(2),
                s[0] * (left[0, 0] * right[:1].T @ normal(1, 2, seed=9)).T.flatten(),
            ]
        )
    pairs = h.split([4, 8])
    return torch.cat([v / v.norm() for v in pairs])


def tied_norm(name: str) -> Norm:
    norms = {"l1": L1(), "linf": Linf(), "spectral": Spectral(), "nuclear": Nuclear()}
    if name in norms:
        return norms[name].bind(lay_out({"w": SHAPE[name]}))
    return (Max({"a": Linf(), "b": Spectral()}) if name == "max" else Sum(L2())).bind(BLOCKS)


class InBlocks(Quadratic):
    """A quadratic whose weights are two blocks."""

    layout = BLOCKS


def tied_quadratic(name: str, seed: int) -> tuple[Quadratic, Tensor, Tensor]:
    """A random positive definite quadratic and a place where its gradient is tied."""
    root = normal(12, 16, seed=seed + 100)
    H = root @ root.T / 12
    h = tied_gradient(name, seed)
    make = InBlocks if name in ("max", "sum") else Quadratic
    shape = SHAPE[name] if name in ("spectral", "nuclear") else None
    return make(H, torch.linalg.solve(H, h), shape), torch.zeros(1, 12, dtype=torch.float64), h


def face_program(name: str, h: Tensor, H: Tensor) -> Tensor:
    """The point of least curvature on the face of h, from a description of the face written down
    here."""
    cp = pytest.importorskip("cvxpy")
    g = h.numpy()
    v = cp.Variable(12)
    U, _, Vt = torch.linalg.svd(h.view(SHAPE[name] if len(SHAPE[name]) == 2 else (3, 4)))
    if name == "l1":
        top = abs(g) >= 1 - 1e-12
        face = [
            v[~top] == 0,
            cp.multiply(torch.sign(h).numpy(), v)[top] >= 0,
            torch.sign(h).numpy() @ v == 1,
        ]
    elif name == "linf":
        face = [v[g != 0] == torch.sign(h).numpy()[g != 0], cp.abs(v) <= 1]
    elif name == "spectral":
        free = cp.Variable((2, 3))
        whole = (U[:, :1] @ Vt[:1]).numpy() + U[:, 1:].numpy() @ free @ Vt[1:].numpy()
        face = [cp.sigma_max(free) <= 1, cp.reshape(v, (3, 4), order="C") == whole]
    elif name == "nuclear":
        S = cp.Variable((2, 2), PSD=True)
        face = [
            cp.trace(S) == 1,
            cp.reshape(v, (3, 4), order="C") == U[:, :2].numpy() @ S @ Vt[:2].numpy(),
        ]
    elif name == "max":
        U, _, Vt = torch.linalg.svd(h[4:].view(2, 4))
        free = cp.Variable((1, 3))
        whole = (U[:, :1] @ Vt[:1]).numpy() + U[:, 1:].numpy() @ free @ Vt[1:].numpy()
        face = [v[:2] == torch.sign(h[:2]).numpy(), cp.abs(v[2:4]) <= 1, cp.norm(free) <= 1]
        face += [cp.reshape(v[4:], (2, 4), order="C") == whole]
    else:
        r = cp.Variable()
        face = [r >= 0, r <= 1, v[:4] == r * g[:4], v[4:] == (1 - r) * g[4:]]
    cp.Problem(cp.Minimize(cp.quad_form(v, cp.psd_wrap(H.numpy()))), face).solve(
        solver="CLARABEL", **TIGHT
    )
    return torch.from_numpy(v.value)


TIGHT = {"tol_gap_abs": 1e-13, "tol_gap_rel": 1e-13, "tol_feas": 1e-13}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", SHAPE)
class TestTies:
    def test_least_curvature_on_the_face(self, name, seed):
        F, w, h = tied_quadratic(name, seed)
        chosen = select(F, tied_norm(name), w)
        assert_close(chosen.ascent[0], h, 1e-12)
        assert chosen.gap.abs().max() < 1e-10
        assert_close(chosen.direction[0], face_program(name, h, F.matrix), 1e-6)
        assert variation(F, tied_norm(name), w, chosen).abs().max() < 1e-8

    def test_limit_of_minimising_movements_to_first_order(self, name, seed):
        """argmin F(w + εv) over the unit ball, for ε → 0."""
        F, w, h = tied_quadratic(name, seed)
        norm = tied_norm(name)
        u = select(F, norm, w).direction
        errors = []
        for eps in (0.02, 0.002):
            gradient = lambda v, eps=eps: v @ F.matrix - h / eps
            ball = WholeBall(norm, torch.zeros_like(w))
            v = minimise(ball, gradient, w.shape[-1], start=u, tol=1e-13)
            errors.append(float((v - u).norm()))
        assert errors[0] < 0.5
        assert errors[1] < 0.2 * errors[0] + 1e-6


LOSSES = {"exponential": fs.exponential, "logistic": fs.logistic, "squared": fs.squared}
ORIGIN12 = torch.zeros(1, 12, dtype=torch.float64)


def linear_model(loss: str, name: str, seed: int) -> Problem:
    """A linear model whose gradient at w = 0 is a multiple of a given one: the mean of y x is, in
    all losses."""
    y = torch.tensor([1.0, -1.0] * 10, dtype=torch.float64)
    x = normal(20, 12, seed=seed + 50)
    x = x + y[:, None] * (tied_gradient(name, seed) - (y[:, None] * x).mean(0))
    return Problem(fs.Linear(12), x, y, loss=LOSSES[loss])


def hessian(problem: Problem, w: Tensor) -> Tensor:
    """∇²𝓛/𝓛, by differentiation."""
    return torch.func.hessian(lambda v: torch.exp(-problem.lam(v[None])[0]))(w[0]) * torch.exp(
        problem.lam(w)
    )


class TestLinearModels:
    @pytest.mark.parametrize("loss", LOSSES)
    @pytest.mark.parametrize("name", ["l1", "linf"])
    def test_least_curvature_by_the_losss_own_hessian(self, loss, name):
        problem = linear_model(loss, name, seed=4)
        chosen = select(problem, tied_norm(name), ORIGIN12)
        g = chosen.ascent[0]
        g = torch.where(g.abs() < 1e-12, 0.0, g / g.abs().max())
        assert_close(chosen.direction[0], face_program(name, g, hessian(problem, ORIGIN12)), 1e-6)
        assert variation(problem, tied_norm(name), ORIGIN12, chosen).abs().max() < 1e-8

    def test_pairwise_loss_in_the_spectral_norm(self):
        """Three classes at w = 0, where the gradient Σ_i Σ_{j≠y} (e_y − e_j) x_iᵀ has rank two at
        most."""
        x, y = normal(12, 4, seed=5), torch.arange(12) % 3
        problem = Problem(fs.Linear(4, 3), x, y, loss=fs.pairwise_exponential)
        norm, w = Spectral(), ORIGIN12
        chosen = select(problem, norm, w)
        H = hessian(problem, w)
        U, s, Vt = torch.linalg.svd(chosen.ascent[0].view(3, 4))
        assert s[2] < 1e-12
        cp = pytest.importorskip("cvxpy")
        free, v = cp.Variable((1, 2)), cp.Variable(12)
        whole = (U[:, :2] @ Vt[:2]).numpy() + U[:, 2:].numpy() @ free @ Vt[2:].numpy()
        face = [cp.norm(free) <= 1, cp.reshape(v, (3, 4), order="C") == whole]
        cp.Problem(cp.Minimize(cp.quad_form(v, cp.psd_wrap(H.numpy()))), face).solve(
            solver="CLARABEL", **TIGHT
        )
        u = chosen.direction[0]
        assert_close(H @ u, H @ torch.from_numpy(v.value), 1e-6)
        # a shift common to all classes is not seen, hence not made
        assert_close(u.view(3, 4).sum(0), torch.zeros(4))

    def test_of_equal_curvatures_the_shortest(self):
        """Duplicate columns: only their sum is determined, and each takes half; unseen columns
        stay."""
        problem = linear_model("exponential", "linf", seed=4)
        x = torch.cat([problem.x, problem.x[:, 8:10], torch.zeros(20, 2)], 1)
        wide = Problem(fs.Linear(16), x, problem.y, loss=fs.exponential)
        w = torch.zeros(1, 16, dtype=torch.float64)
        u = select(wide, Linf(), w).direction[0]
        assert_close(u[8:10], u[12:14])
        assert u[8:10].abs().max() > 1e-3
        assert_close(u[14:], torch.zeros(2))
        cp = pytest.importorskip("cvxpy")
        v = cp.Variable(16)
        C = wide.curvature(w)[0]
        face = [v[:8] == u[:8].numpy(), cp.abs(v) <= 1]
        cp.Problem(cp.Minimize(cp.sum_squares(C.numpy() @ v)), face).solve(
            solver="CLARABEL", **TIGHT
        )
        assert_close(C @ u, C @ torch.from_numpy(v.value), 1e-6)

    def test_zero_gradients_rest(self):
        F = Quadratic(torch.eye(12, dtype=torch.float64), torch.zeros(12, dtype=torch.float64))
        for norm in (L1(), L2(), Linf()):
            chosen = select(F, norm, ORIGIN12)
            assert chosen.direction.eq(0).all()
            assert chosen.dual.eq(0).all()


class TestBranches:
    """The variational inequality of a right derivative, for Hessians of either sign along a free
    coordinate."""

    def residual(self, first: float, free: float) -> tuple[Tensor, Tensor]:
        """h = (1, 0) in ℓ∞, so that u = (1, u₂), and ⟨Hu, v − u⟩ ≥ 0 wants u₂ = −1/(2 free) inside
        [−1, 1]."""
        H = torch.tensor([[first, 0.5], [0.5, free]], dtype=torch.float64)
        F, w = PiecewiseQuadratic([-1.0, 0.0], [[1.0, 0.0]], [0.1], H), ORIGIN[:, :2]
        chosen = select(F, Linf(), w)
        return chosen.direction, variation(F, Linf(), w, chosen)

    def test_attracting_tie_slides(self):
        u, residual = self.residual(1.0, 2.0)
        assert_close(u, [[1.0, -0.25]])
        assert_close(residual, [0.0])

    def test_a_choice_that_an_indefinite_hessian_spoils_is_reported(self):
        assert self.residual(0.1, 0.2)[1] > 0.02


# --------------------------------------------------------------------------------------------------
# Kinks
# --------------------------------------------------------------------------------------------------


def on_kinks(
    d: int, N: int, m: int, touched: int, seed: int, loss: str = "exponential", activation=fs.relu
) -> tuple[Problem, Tensor]:
    """A two-layer net with ``touched`` examples of each neuron exactly on their kinks, up to
    rounding."""
    x, y = normal(N, d, seed=seed), torch.where(normal(N, seed=seed + 1) > 0, 1.0, -1.0)
    problem = Problem(fs.MLP([d, m, 1], activation), x, y, loss=LOSSES[loss])
    w = 0.5 * normal(1, problem.size, seed=seed + 2)
    return problem, placed(w, x, m, touched, seed)


def placed(w: Tensor, x: Tensor, m: int, touched: int, seed: int) -> Tensor:
    first = w[0, : m * x.shape[1]].view(m, -1)
    for j in range(m):
        near = x[
            torch.randperm(len(x), generator=torch.Generator().manual_seed(seed + j))[:touched]
        ]
        for _ in range(2):
            first[j] -= torch.linalg.pinv(near) @ (near @ first[j])
    return w


def norms_of(problem: Problem) -> dict[str, Norm]:
    root = normal(problem.size, problem.size, seed=77)
    A = root @ root.T / problem.size + torch.eye(problem.size, dtype=torch.float64)
    return {
        "l2": L2(),
        "mahalanobis": Mahalanobis(A),
        "euclidean": Euclidean(L2(), {"W1": 2.0}),
        "l1": L1(),
        "linf": Linf(),
        "l3": Lp(3.0),
        "max": Max(L2()),
        "modular": modular(problem.layout),
    }


NORMS = ["l2", "mahalanobis", "euclidean", "l1", "linf", "l3", "max", "modular"]
QUADRATIC = NORMS[:3]


def corner(problem: Problem, w: Tensor, chosen: Selection) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradient with every attracting kink at 0, jumps times normals, normals, and which kinks
    these are."""
    hinges = problem.hinges(w)
    free = (hinges.z.abs()[0] < 1e-12) & (hinges.jump[0] < 0)
    at = torch.where(free, 0.0, chosen.multipliers)
    unit = torch.eye(len(free), dtype=torch.float64)[free]
    n = torch.cat([hinges.combine(e[None]) for e in unit])
    return hinges.gradient(at)[0], hinges.jump[0][free, None] * n, n, free


def cvx_norm(cp, name: str, problem: Problem, norm: Norm, v):
    if name in ("l1", "linf", "l2", "l3"):
        return cp.pnorm(v, {"l1": 1, "linf": "inf", "l2": 2, "l3": 3}[name])
    if name == "mahalanobis":
        return cp.norm(torch.linalg.cholesky(norm.matrix).T.numpy() @ v)
    parts = [v[b.slice] for b in problem.layout]
    if name == "euclidean":
        return cp.norm(cp.hstack([parts[0] / 2, parts[1]]))
    if name == "max":
        return cp.maximum(*[cp.norm(part) for part in parts])
    return cp.maximum(
        *[cp.sigma_max(cp.reshape(v[b.slice], b.shape, order="C")) for b in problem.layout]
    )


SOLVED = {
    "plain": {"d": 4, "N": 8, "m": 5, "touched": 2, "seed": 0},
    "leaky": {"d": 4, "N": 8, "m": 5, "touched": 3, "seed": 10, "activation": fs.leaky_relu(0.2)},
    "squared": {"d": 3, "N": 10, "m": 6, "touched": 2, "seed": 20, "loss": "squared"},
    "logistic": {"d": 5, "N": 12, "m": 6, "touched": 4, "seed": 30, "loss": "logistic"},
}


@cache
def solved(case: str, name: str) -> tuple[Problem, Tensor, Norm, Selection]:
    problem, w = on_kinks(**SOLVED[case])
    norm = norms_of(problem)[name].bind(problem.layout)
    return problem, w, norm, select(problem, norm, w)


@pytest.mark.parametrize("case", SOLVED)
@pytest.mark.parametrize("name", NORMS)
class TestKinks:
    def test_slope_is_the_optimum_of_a_convex_program(self, case, name):
        """max ⟨b, u⟩ + Σ jump max(⟨n, u⟩, 0) over the ball, attained by a u that respects D."""
        cp = pytest.importorskip("cvxpy")
        problem, w, norm, chosen = solved(case, name)
        b, jumps, n, free = corner(problem, w, chosen)
        assert free.any()
        v = cp.Variable(problem.size)
        c = -torch.linalg.vecdot(jumps, n) / torch.linalg.vecdot(n, n)
        slope = b.numpy() @ v - c.numpy() @ cp.pos(n.numpy() @ v)
        best = cp.Problem(cp.Maximize(slope), [cvx_norm(cp, name, problem, norm, v) <= 1]).solve(
            solver="CLARABEL"
        )
        assert float(chosen.dual) == pytest.approx(best, rel=1e-6)
        assert chosen.gap.abs() < 1e-9
        D, along = chosen.multipliers[0, free], n @ chosen.direction[0]
        assert ((D >= 0) & (D <= 1)).all()
        assert (along[D == 0] <= 1e-8).all()
        assert (along[D == 1] >= -1e-8).all()
        assert (along[(D > 0) & (D < 1)].abs() <= 1e-8).all()
        assert norm.value(chosen.direction) <= 1 + 1e-9

    def test_slope_is_that_of_the_level(self, case, name):
        problem, w, _, chosen = solved(case, name)
        rise = problem.lam(w + 1e-6 * chosen.direction) - problem.lam(w)
        assert_close(rise / 1e-6, chosen.dual, 1e-4 * float(chosen.dual))

    def test_no_other_multipliers_give_less(self, case, name):
        problem, w, norm, chosen = solved(case, name)
        free = corner(problem, w, chosen)[3]
        for seed in range(50):
            other = (
                chosen.multipliers + normal(1, len(free), seed=seed) * 10.0 ** -(seed % 4)
            ).clamp(0, 1)
            h = problem.hinges(w).gradient(torch.where(free, other, chosen.multipliers))
            assert norm.dual(h) >= chosen.dual * (1 - 1e-9)


@pytest.mark.parametrize("name", QUADRATIC)
def test_multipliers_solve_the_box_program(name):
    cp = pytest.importorskip("cvxpy")
    problem, w = on_kinks(d=6, N=10, m=5, touched=3, seed=40)
    norm = norms_of(problem)[name]
    chosen = select(problem, norm, w)
    b, jumps, _, free = corner(problem, w, chosen)
    root = torch.eye(problem.size, dtype=torch.float64)
    if name == "mahalanobis":
        root = torch.linalg.inv(torch.linalg.cholesky(norm.matrix))
    if name == "euclidean":
        root[problem.layout[0].slice] *= 2
    D = cp.Variable(len(jumps))
    value = cp.sum_squares((root @ b).numpy() + (root @ jumps.T).numpy() @ D)
    cp.Problem(cp.Minimize(value), [D >= 0, D <= 1]).solve(solver="CLARABEL", **TIGHT)
    assert chosen.sliding.any()
    assert_close(chosen.multipliers[0, free], torch.from_numpy(D.value), 1e-6)


class TestSides:
    """F = −max(w₁, 0) − w₂: a kink that repels. Leaving it to the positive side falls, the negative
    side is level."""

    RIDGE = PiecewiseQuadratic([0.0, -1.0], [[1.0, 0.0]], [-1.0], torch.zeros(2, 2))
    SADDLE = PiecewiseQuadratic([0.5, -1.0], [[1.0, 0.0]], [-1.0])

    @pytest.mark.parametrize("norm", [L2(), Linf()], ids=lambda n: n.name)
    def test_undecided_sides_follow_the_rule_and_the_option_flips_it(self, norm):
        at = lambda D, **options: select(self.SADDLE, norm, ORIGIN[:, :2], D, **options)
        D = lambda value: torch.full((1, 1), value, dtype=torch.float64)
        expected = [
            (at(None), 0.0),
            (at(None, opposite=True), 1.0),
            (at(D(0.4)), 0.0),
            (at(D(0.6)), 1.0),
            (at(D(0.6), opposite=True), 0.0),
            (at(D(0.0), opposite=True), 0.0),
            (at(D(1.0), opposite=True), 1.0),
        ]
        for chosen, side in expected:
            assert chosen.multipliers.item() == side
            assert (chosen.direction[0, 0] > 0) == bool(side)
            assert not chosen.sliding.any()

    def test_a_side_that_the_velocity_leaves_is_not_kept(self):
        ridge = PiecewiseQuadratic([-0.5, -1.0], [[1.0, 0.0]], [-1.0])
        for stored in (None, torch.zeros(1, 1)):
            chosen = select(ridge, L2(), ORIGIN[:, :2], stored)
            assert chosen.multipliers.item() == 1
            assert_close(chosen.ascent, [[1.5, 1.0]])

    def test_away_from_kinks_the_sign_decides_unless_a_multiplier_says_otherwise(self):
        w = torch.tensor([[1e-3, 0.0, 0.0]], dtype=torch.float64)
        off = select(TOY1, Linf(), w, torch.zeros(1, 1, dtype=torch.float64))
        assert off.multipliers.item() == 1
        held = select(TOY1, Linf(), w, torch.full((1, 1), 0.5, dtype=torch.float64))
        assert_close(held.dual, [1.8])


class TestNets:
    def test_batch_equals_loop_also_with_data_of_their_own(self):
        x, y = normal(3, 7, 4, seed=60), torch.where(normal(3, 7, seed=61) > 0, 1.0, -1.0)
        problem = Problem(fs.MLP([4, 5, 1]), x, y, loss=fs.exponential)
        w = 0.5 * normal(3, problem.size, seed=62)
        w = torch.cat([placed(w[i : i + 1], x[i], 5, i, seed=i) for i in range(3)])
        for norm in (L2(), Linf(), L1(), Max(L2())):
            batch = select(problem, norm, w)
            assert batch.sliding[0].sum() == 0
            for i in range(3):
                rows = torch.tensor([i])
                alone = select(problem.select(rows), norm, w[rows])
                assert_close(alone.direction, batch.direction[rows], 1e-8)
                assert_close(alone.multipliers, batch.multipliers[rows], 1e-8)

    @pytest.mark.parametrize("norm", [L2(), Linf(), L1()], ids=lambda n: n.name)
    def test_duplicates_change_only_weights(self, norm):
        problem, w = on_kinks(d=4, N=8, m=5, touched=2, seed=0)
        double = problem.with_data(
            torch.cat([problem.x, problem.x]), torch.cat([problem.y, problem.y])
        )
        one, two = select(problem, norm, w), select(double, norm, w)
        assert_close(one.direction, two.direction, 1e-7)
        assert_close(one.dual, two.dual)

    @pytest.mark.parametrize("norm", [L2(), Linf(), L1()], ids=lambda n: n.name)
    def test_slopes_with_antiparallel_and_contradictory_inputs(self, norm):
        problem, w = on_kinks(d=4, N=6, m=5, touched=2, seed=70)
        x = torch.cat([problem.x, -2 * problem.x, problem.x[:3]])
        y = torch.cat([problem.y, problem.y, -problem.y[:3]])
        mixed = problem.with_data(x, y)
        chosen = select(mixed, norm, w)
        rise = mixed.lam(w + 1e-7 * chosen.direction) - mixed.lam(w)
        assert_close(rise / 1e-7, chosen.dual, 1e-4 * float(chosen.dual))
        others = norm.project(normal(200, mixed.size, seed=71) * 10)
        rises = mixed.lam(w + 1e-7 * others) - mixed.lam(w)
        assert (rises / 1e-7 <= chosen.dual * (1 + 1e-4)).all()

    @pytest.mark.parametrize("norm", [L2(), Linf(), L1()], ids=lambda n: n.name)
    def test_dead_neurons(self, norm):
        """A neuron with w_j = 0 sits on all of its kinks."""
        problem, w = on_kinks(d=3, N=6, m=4, touched=1, seed=80)
        w[0, :3] = 0
        chosen = select(problem, norm, w)
        assert chosen.gap.abs() < 1e-10
        rise = problem.lam(w + 1e-7 * chosen.direction) - problem.lam(w)
        assert_close(rise / 1e-7, chosen.dual, 1e-4 * float(chosen.dual))
        w.zero_()
        rest = select(problem, norm, w)
        assert rest.direction.eq(0).all()

    @pytest.mark.parametrize("norm", [L2(), Linf(), L1()], ids=lambda n: n.name)
    def test_far_out_where_most_weights_vanish(self, norm):
        """Λ near 10⁴: the jumps of most kinks are zero or nearly so."""
        problem, w = on_kinks(d=4, N=8, m=8, touched=2, seed=0)
        y = problem.outputs(w)[0, :, 0].sign()
        problem = problem.with_data(problem.x, y)
        w = w * (1e4 / problem.outputs(w).abs().min()) ** 0.5
        assert problem.lam(w) > 9e3
        chosen = select(problem, norm, w)
        assert torch.isfinite(chosen.direction).all()
        assert chosen.gap.abs() < 1e-9
        assert variation(problem, norm, w, chosen).isfinite().all()

    def test_scale_of_the_objective_does_not_matter(self):
        for scale in (1e-150, 1e150):
            toy = PiecewiseQuadratic(scale * TOY1.slope, TOY1.normals, scale * TOY1.weights)
            for norm in (L2(), L1(), Linf(), Lp(3.0)):
                assert_close(
                    select(toy, norm, ORIGIN).direction, select(TOY1, norm, ORIGIN).direction
                )

    @pytest.mark.parametrize("norm", [L2(), Linf(), L1()], ids=lambda n: n.name)
    def test_zero_inputs_have_no_kinks(self, norm):
        problem, w = on_kinks(d=4, N=6, m=5, touched=2, seed=70)
        more = problem.with_data(
            torch.cat([problem.x, torch.zeros(1, 4)]), torch.cat([problem.y, torch.ones(1)])
        )
        chosen = select(more, norm, w)
        rise = more.lam(w + 1e-7 * chosen.direction) - more.lam(w)
        assert_close(rise / 1e-7, chosen.dual, 1e-4 * float(chosen.dual))
        assert not chosen.sliding[0, -5:].any()
