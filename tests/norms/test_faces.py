"""Laws of the sets of steepest directions, over every norm and tie, and least points found by their
projections against convex solvers."""

import cvxpy as cp
import numpy as np
import pytest
import torch
from torch import Tensor

from flowsim.layout import lay_out
from flowsim.norms.blocks import Euclidean
from flowsim.norms.faces import onto_simplex
from flowsim.norms.matrix import Nuclear, Schatten, Spectral
from flowsim.norms.vector import L1, L2, Linf, Lp
from tests.oracles.least_points import assert_minimiser, curvature
from tests.oracles.norm_cases import (
    BLOCKS,
    CASES,
    SCALES,
    Case,
    assert_close,
    dot,
    slack,
    uniform,
)
from tests.oracles.projected_gradient import minimise


@pytest.fixture(scope="module", params=CASES)
def case(request) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module", params=[torch.float64, torch.float32], ids=["f64", "f32"])
def typed(request, case) -> Case:
    return case.to(request.param)


@pytest.fixture(scope="module")
def points(typed) -> Tensor:
    """Six projections of near points, two of far ones, eight means, the chosen steepest direction,
    the element."""
    v = uniform(6, *typed.g.shape, seed=11).to(typed.g)
    face = typed.norm.face(typed.g)
    x = torch.cat([face.project(3 * v), face.project(300 * v[:2])])
    mean = (x + x.roll(1, 0)) / 2
    return torch.cat([x, mean, typed.norm.steepest(typed.g)[None], face.element()[None]])


class TestFace:
    def test_every_point_attains_the_dual_norm_inside_the_ball(self, typed, points):
        assert_close(dot(typed.g, points), typed.norm.dual(typed.g).expand(points.shape[:-1]))
        assert (typed.norm.value(points) <= 1 + slack(points.dtype)).all()

    def test_every_point_is_its_own_projection(self, typed, points):
        near, far, mean = 0, 6, 8
        assert typed.norm.face(typed.g).contains(points[[near, far, mean, -2, -1]]).all()

    def test_other_points_are_not_contained(self, case):
        face = case.norm.face(case.g)
        assert not face.contains(2 * case.norm.steepest(case.g))[:-1].any()
        assert not face.contains(-case.norm.steepest(case.g))[:-1].any()
        assert not face.contains(uniform(*case.g.shape, seed=12) * 10).any()

    def test_element_is_the_shortest(self, typed, points):
        face, x = typed.norm.face(typed.g), points
        assert_close(face.element(), face.project(torch.zeros_like(typed.g)))
        assert (
            dot(face.element(), x) >= dot(face.element(), face.element()) - slack(x.dtype)
        ).all()

    def test_projection_is_the_nearest_point(self, case):
        """<v - Pv, u - Pv> <= 0 for every point u of the face, by its support function."""
        v = 3 * uniform(4, *case.g.shape, seed=13)
        face = case.norm.face(case.g)
        residual = v - (x := face.project(v))
        gap = face.support(residual) - dot(residual, x)
        assert (gap.abs() <= 1e-12 * (1 + v.norm(dim=-1))).all()

    def test_support_is_the_largest_inner_product(self, typed, points):
        face, x = typed.norm.face(typed.g), points
        c = uniform(*typed.g.shape, seed=14).to(typed.g)
        assert (dot(c, x) <= face.support(c) + slack(x.dtype) * c.norm(dim=-1)).all()
        # P(t c) loses at most diameter^2 / t
        far = 1e6 if typed.g.dtype == torch.float64 else 1e3
        assert (dot(c, face.project(far * c)) >= face.support(c) * (1 - 1e-14) - 400 / far).all()

    def test_where_the_gradient_vanishes_the_face_is_the_ball(self, case):
        face, v = case.norm.face(case.g), uniform(*case.g.shape, seed=15)
        assert_close(face.project(v)[-1], case.norm.project(v[-1]))
        assert_close(face.support(v)[-1], case.norm.dual(v[-1]))
        assert face.element()[-1].eq(0).all()

    def test_rows_do_not_influence_each_other(self, case):
        v = 3 * uniform(*case.g.shape, seed=16)
        together = case.norm.face(case.g).project(v)
        for row in (0, 3, len(v) - 1):
            assert_close(case.norm.face(case.g[row]).project(v[row]), together[row])

    def test_minimiser_satisfies_the_variational_inequality(self, case):
        """<H v, u - v> >= 0 for every u of the face, by its support function."""
        g = case.g[[0, 3, 4, -1]]
        if case.norm.name.startswith(("sum(W:schatten", "euclidean(W:schatten")):
            g = g[:-1]  # three roots inside each other: correct, but not for hundreds of steps
        hessian, face = curvature(case.size), case.norm.face(g)
        v = minimise(face, lambda v: v @ hessian, case.size)
        assert face.contains(v).all()
        assert (face.support(-v @ hessian) + dot(v @ hessian, v) <= 1e-8).all()


class TestTolerance:
    def test_is_relative_to_the_dual_norm(self):
        g = 1e-100 * torch.tensor([1.0, 1 - 1e-6, 1e-6], dtype=torch.float64)
        assert L1().face(g, tol=1e-5).signs.tolist() == [1, 1, 0]
        assert L1().face(g, tol=1e-7).signs.tolist() == [1, 0, 0]
        assert Linf().face(g, tol=1e-6).low.tolist() == [1, 1, -1]
        assert Linf().face(g, tol=1e-7).low.tolist() == [1, 1, 1]

    def test_singular_values(self):
        g = torch.diag(torch.tensor([1.0, 1 - 1e-6, 1e-6], dtype=torch.float64)).flatten()
        shape = lay_out({"W": (3, 3)})
        for tol, tied, rank in ((1e-5, 2, 2), (1e-8, 1, 3)):
            assert Nuclear().bind(shape).face(g, tol).top.sum() == tied
            assert Spectral().bind(shape).face(g, tol).u.square().sum().round() == rank


class TestLeastPointsAgainstConvexSolvers:
    """The sets are stated anew from theory, not from the faces' own formulas: v in the ball with
    <g, v> = dual(g)."""

    @pytest.mark.parametrize("zeros", [1, 4, 8])
    def test_box(self, zeros):
        g, v = uniform(8), cp.Variable(8)
        g[:zeros] = 0
        signs = [v[zeros:] == g[zeros:].sign().numpy()] if zeros < 8 else []
        assert_minimiser(Linf(), g, v, [cp.abs(v) <= 1, *signs])

    @pytest.mark.parametrize("ties", [1, 3, 8])
    def test_simplex(self, ties):
        g, v = uniform(8), cp.Variable(8)
        g[:ties] = 4 * g[:ties].sign()
        assert_minimiser(L1(), g, v, [cp.norm1(v) <= 1, g.numpy() @ v == 4])

    @pytest.mark.parametrize("rank", [1, 2])
    @pytest.mark.parametrize("shape", [(3, 4), (4, 3), (3, 3)])
    def test_spectral(self, shape, rank):
        m, n = shape
        g = (uniform(m, rank, seed=1) @ uniform(rank, n, seed=2)).flatten()
        u, _, vt = np.linalg.svd(g.reshape(m, n).numpy())
        left, right, c = u[:, rank:], vt[rank:], cp.Variable((m - rank, n - rank))
        v = cp.reshape(u[:, :rank] @ vt[:rank] + left @ c @ right, (m * n,), order="C")
        norm = Spectral().bind(lay_out({"W": shape}))
        assert_minimiser(norm, g, v, [cp.sigma_max(c) <= 1])

    @pytest.mark.parametrize("ties", [2, 3])
    @pytest.mark.parametrize("shape", [(3, 4), (4, 3)])
    def test_nuclear(self, shape, ties):
        m, n = shape
        u, s, vt = np.linalg.svd(uniform(m, n, seed=3).numpy(), full_matrices=False)
        s[:ties] = s[0]
        density = cp.Variable((ties, ties), PSD=True)
        v = cp.reshape(u[:, :ties] @ density @ vt[:ties], (m * n,), order="C")
        g = torch.from_numpy((u * s) @ vt).flatten()
        assert_minimiser(Nuclear().bind(lay_out({"W": shape})), g, v, [cp.trace(density) == 1])


class TestSimplexProjection:
    @pytest.mark.parametrize("scale", [1e-3, 1.0, 1e9])
    def test_optimality(self, scale):
        u = scale * uniform(50, 6)
        x = onto_simplex(u)
        assert (x >= 0).all()
        assert_close(x.sum(-1), torch.ones(50, dtype=torch.float64))
        residual = u - x
        assert (residual.amax(-1) - dot(residual, x) <= 1e-14 * scale + 1e-15).all()

    def test_forbidden_coordinates_stay_zero(self):
        x = onto_simplex(torch.tensor([5.0, 0.0, 0.5]), torch.tensor([False, True, True]))
        assert_close(x, torch.tensor([0.0, 0.25, 0.75]))


def test_smooth_norms_have_one_point():
    g = uniform(2, 23)
    for norm in (L2(), Lp(3), Euclidean(L2(), SCALES).bind(BLOCKS)):
        c = uniform(23, seed=1)
        assert_close(norm.face(g).support(c), -norm.face(g).support(-c))
    flat = Schatten(3).bind(lay_out({"W": (4, 5)}))
    assert_close(flat.face(uniform(2, 20)).element(), flat.steepest(uniform(2, 20)))
