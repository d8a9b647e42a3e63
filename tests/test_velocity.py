"""Velocities at ties and kinks: against convex solvers, minimising movements, and small steps where these differ."""

import pytest
import torch
from torch import Tensor

import flowsim as fs
from flowsim.block_norms import Euclidean, Max, Sum, modular
from flowsim.faces import Ball
from flowsim.layout import layout
from flowsim.matrix_norms import Nuclear, Spectral
from flowsim.norms import L1, L2, Frobenius, Linf, Lp, Mahalanobis, Norm
from flowsim.problem import PiecewiseQuadratic, Problem, Quadratic
from flowsim.velocity import Selection, select, variation

ORIGIN = torch.zeros(1, 3, dtype=torch.float64)
TOY1 = PiecewiseQuadratic(slope=[-3.0, -1.0, 1.0], normals=[[1.0, 0.5, 0.1]], weights=[4.0])
TOY2 = PiecewiseQuadratic(slope=[-1.0, -0.6, -0.3], normals=[[1.0, 1.0, 1.0]], weights=[2.0])


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_close(a: Tensor, b: Tensor, atol: float = 1e-9) -> None:
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype), rtol=0, atol=atol)


# ---------------------------------------------------------------------------------------------------------------
# Toys
# ---------------------------------------------------------------------------------------------------------------


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
        assert small_step_rate(TOY1, 1e-3, 6000)[0] == pytest.approx(19 / 15, abs=2e-3)

    def test_small_steps_may_stall_where_the_flow_goes_on(self):
        assert_close(select(TOY2, Linf(), ORIGIN).dual, [0.7])
        assert small_step_rate(TOY2, 1e-3, 3000)[1] <= 3e-3

    @pytest.mark.parametrize("second", [[1.0], [2.0], [-0.5]])
    @pytest.mark.parametrize("norm", [L2(), Linf(), Lp(3.0)], ids=lambda n: n.name)
    def test_parallel_kinks_share_their_multiplier(self, norm, second):
        """F = −w/2 + max(w, 0) − 0.8 max(second·w, 0)/|second|, which has no stationary point at 0."""
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


# ---------------------------------------------------------------------------------------------------------------
# Ties
# ---------------------------------------------------------------------------------------------------------------

SHAPE = {"l1": (12,), "linf": (12,), "spectral": (3, 4), "nuclear": (3, 4), "max": (12,), "sum": (12,)}
BLOCKS = layout({"a": (4,), "b": (2, 4)})


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
            [h[:2], torch.zeros(2), s[0] * (left[0, 0] * right[:1].T @ normal(1, 2, seed=9)).T.flatten()]
        )
    pairs = h.split([4, 8])
    return torch.cat([v / v.norm() for v in pairs])


def tied_norm(name: str) -> Norm:
    norms = {"l1": L1(), "linf": Linf(), "spectral": Spectral(), "nuclear": Nuclear()}
    if name in norms:
        return norms[name].bind(layout({"w": SHAPE[name]}))
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
    """The point of least curvature on the face of h, from a description of the face written down here."""
    cp = pytest.importorskip("cvxpy")
    g = h.numpy()
    v = cp.Variable(12)
    U, s, Vt = torch.linalg.svd(h.view(SHAPE[name] if len(SHAPE[name]) == 2 else (3, 4)))
    if name == "l1":
        top = abs(g) >= 1 - 1e-12
        face = [v[~top] == 0, cp.multiply(torch.sign(h).numpy(), v)[top] >= 0, torch.sign(h).numpy() @ v == 1]
    elif name == "linf":
        face = [v[g != 0] == torch.sign(h).numpy()[g != 0], cp.abs(v) <= 1]
    elif name == "spectral":
        free = cp.Variable((2, 3))
        whole = (U[:, :1] @ Vt[:1]).numpy() + U[:, 1:].numpy() @ free @ Vt[1:].numpy()
        face = [cp.sigma_max(free) <= 1, cp.reshape(v, (3, 4), order="C") == whole]
    elif name == "nuclear":
        S = cp.Variable((2, 2), PSD=True)
        face = [cp.trace(S) == 1, cp.reshape(v, (3, 4), order="C") == U[:, :2].numpy() @ S @ Vt[:2].numpy()]
    elif name == "max":
        U, s, Vt = torch.linalg.svd(h[4:].view(2, 4))
        free = cp.Variable((1, 3))
        whole = (U[:, :1] @ Vt[:1]).numpy() + U[:, 1:].numpy() @ free @ Vt[1:].numpy()
        face = [v[:2] == torch.sign(h[:2]).numpy(), cp.abs(v[2:4]) <= 1, cp.norm(free) <= 1]
        face += [cp.reshape(v[4:], (2, 4), order="C") == whole]
    else:
        r = cp.Variable()
        face = [r >= 0, r <= 1, v[:4] == r * g[:4], v[4:] == (1 - r) * g[4:]]
    cp.Problem(cp.Minimize(cp.quad_form(v, cp.psd_wrap(H.numpy()))), face).solve(solver="CLARABEL", **TIGHT)
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
            v = Ball(norm, torch.zeros_like(w)).minimise(gradient, start=u, tol=1e-13, max_steps=40000)
            errors.append(float((v - u).norm()))
        assert errors[0] < 0.5
        assert errors[1] < 0.2 * errors[0] + 1e-6

