"""Faces of several blocks: which blocks tie, and their least points against convex solvers."""

import cvxpy as cp
import numpy as np
import torch

from flowsim.layout import lay_out
from flowsim.norms.block_faces import Mixture, Product
from flowsim.norms.blocks import Euclidean, Max, Sum
from flowsim.norms.faces import Single
from flowsim.norms.matrix import Nuclear, Spectral
from flowsim.norms.vector import L1, L2, Linf
from tests.oracles.least_points import assert_minimiser
from tests.oracles.norm_cases import uniform

SLICES = (slice(0, 1), slice(1, 3))
DIRECTIONS = (Single(torch.tensor([[2.0]])), Single(torch.tensor([[0.0, 1.0]])))


def test_product_has_each_block_in_its_own_face():
    face = Product(SLICES, DIRECTIONS)
    assert face.element().tolist() == [[2, 0, 1]]
    assert face.project(torch.ones(1, 3)).tolist() == [[2, 0, 1]]
    assert face.support(torch.tensor([[1.0, 7.0, 3.0]])).tolist() == [5]


def test_mixture_of_tied_blocks_is_a_segment():
    tied = torch.tensor([[True, True], [True, False]])
    face = Mixture(SLICES, DIRECTIONS, tied)
    c = torch.tensor([[1.0, 7.0, 3.0]])
    assert face.support(c).tolist() == [3, 2]
    nearest = torch.tensor([[0.4, 0.0, 0.8], [2.0, 0.0, 0.0]])
    torch.testing.assert_close(face.element(), nearest)


class TestTolerance:
    def test_blocks_of_max_inherit_it_from_the_whole_gradient(self):
        shapes = lay_out({"a": (2,), "b": (2,)})
        g = torch.tensor([3.0, 1.0, 1e-12, 0.0], dtype=torch.float64)
        c = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64)
        for tol, free in ((1e-9, 1.0), (1e-13, 0.0)):
            assert Max(L2()).bind(shapes).face(g, tol).support(c) == free

    def test_blocks_of_sum_tie_when_their_scaled_duals_do(self):
        shapes, g = lay_out({"a": (2,), "b": (2,)}), torch.tensor([2.0, 0.0, 4.0, 0.0])
        assert Sum(L2(), {"a": 2.0}).bind(shapes).face(g).tied.tolist() == [True, True]
        assert Sum(L2()).bind(shapes).face(g).tied.tolist() == [False, True]


class TestLeastPointsAgainstConvexSolvers:
    """The sets are stated anew from theory, not from the faces' own formulas."""

    def test_product_and_hull_of_blocks(self):
        """Box times simplex, each scaled; and their mixtures."""
        g, scales = (
            torch.tensor([2.0, 0.0, 0.0, 4.0, -4.0, 1.0], dtype=torch.float64),
            {"a": 3.0, "b": 0.5},
        )
        shapes, parts = lay_out({"a": (3,), "b": (3,)}), {"a": Linf(), "b": L1()}
        v = cp.Variable(6)
        a, b = cp.norm_inf(v[:3]) / 3, cp.norm1(v[3:]) / 0.5
        assert_minimiser(
            Max(parts, scales).bind(shapes), g, v, [a <= 1, b <= 1, g.numpy() @ v == 8]
        )
        g = g * torch.tensor([1, 1, 1, 3, 3, 3])
        assert_minimiser(Sum(parts, scales).bind(shapes), g, v, [a + b <= 1, g.numpy() @ v == 6])
        dual = 72**0.5
        fixed = [a <= 6 / dual, b <= 6 / dual, g.numpy() @ v == dual]
        assert_minimiser(Euclidean(parts, scales).bind(shapes), g, v, fixed)

    def test_mixture_of_spectral_and_nuclear_blocks(self):
        shapes = lay_out({"W": (2, 3), "V": (2, 2)})
        norm = Sum({"W": Spectral(), "V": Nuclear()}).bind(shapes)
        u, _, vt = np.linalg.svd(uniform(2, 3).numpy())
        g = torch.cat(
            [
                torch.from_numpy(2 * np.outer(u[:, 0], vt[0])).flatten(),
                2 * torch.eye(2).flatten().double(),
            ]
        )
        r, c = cp.Variable(), cp.Variable((1, 2))
        density = cp.Variable((2, 2), PSD=True)
        w = r * np.outer(u[:, 0], vt[0]) + u[:, 1:] @ c @ vt[1:]
        v = cp.hstack([cp.reshape(w, (6,), order="C"), cp.reshape(density, (4,), order="C")])
        assert_minimiser(norm, g, v, [r >= 0, cp.sigma_max(c) <= r, r + cp.trace(density) == 1])
