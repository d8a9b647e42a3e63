"""Polyhedral balls against the norms that they are made of, and coordinates along their faces."""

import numpy as np
import pytest
import torch

import flowsim as fs
from flowsim.flow.pieces.polytope import REST, Corners, Polyhedral, is_polyhedral
from flowsim.layout import lay_out

BLOCKS = lay_out({"a": (3,), "b": (4,)})
NORMS = [
    fs.L1(),
    fs.Linf(),
    fs.Max(fs.L1(), {"b": 2.0}),
    fs.Max({"a": fs.Linf(), "b": fs.L1()}, {"a": 0.5}),
    fs.Sum(fs.L1(), {"b": 2.0}),
]
every_norm = pytest.mark.parametrize("norm", NORMS, ids=lambda n: n.name)


def some(seed, size=7):
    return np.random.default_rng(seed).normal(size=size)


@every_norm
def test_balls_are_those_of_the_norms(norm):
    norm = norm.bind(BLOCKS)
    ball = Polyhedral.of(norm, 7)
    assert is_polyhedral(norm)
    for seed in range(5):
        v = some(seed)
        assert ball.value(v) == pytest.approx(float(norm.value(torch.from_numpy(v))))
        assert ball.dual(v) == pytest.approx(float(norm.dual(torch.from_numpy(v))))
        u = Corners.steepest(ball, v).centre
        np.testing.assert_allclose(u, norm.steepest(torch.from_numpy(v)), atol=1e-12)


@pytest.mark.parametrize("norm", [fs.L2(), fs.Sum(fs.Linf()), fs.Max(fs.L2())], ids=str)
def test_other_balls_are_refused(norm):
    norm = norm.bind(BLOCKS)
    assert not is_polyhedral(norm)
    with pytest.raises(ValueError, match="ExactPieces: got the norm"):
        Polyhedral.of(norm, 7)


FACE = Corners(Polyhedral.of(NORMS[3].bind(BLOCKS), 7), np.array([REST, 1, -1, 1, 0, -1, 1]))


def test_velocities_along_a_face_keep_the_sum_of_shares_and_slopes_become_equal():
    E = np.stack([FACE.expand(y) for y in np.eye(3)])
    scale, code = FACE.ball.scale, FACE.code
    np.testing.assert_allclose((code * E / scale)[:, 3:].sum(-1), 0, atol=1e-14)
    assert (E[:, [1, 2, 4]] == 0).all()
    np.testing.assert_allclose((E / scale) @ (E / scale).T, np.eye(3), atol=1e-14)
    a = some(1)
    np.testing.assert_allclose(FACE.restrict(a), E @ a, atol=1e-14)
    equal = np.where(code == REST, 0.0, code / scale)
    np.testing.assert_allclose(FACE.restrict(equal), 0, atol=1e-14)
    np.testing.assert_allclose(FACE.sizes(np.ones(4)), [0.5, 1, 1])


def test_a_mixture_makes_the_velocity_and_its_corners_make_the_face():
    u = FACE.centre + FACE.expand(np.array([0.3, 0.1, -0.1]))
    plus, minus = FACE.mixture(u)
    np.testing.assert_allclose((plus - minus) * FACE.ball.scale, u, atol=1e-14)
    np.testing.assert_allclose(FACE.ball.sums(plus + minus), 1)
    assert np.array_equal(Corners.of(FACE.ball, np.stack([plus, minus]) > 0).code, FACE.code)


def test_corners_miss_what_is_steeper_and_a_negative_share_is_trimmed():
    h = np.array([0, 1, -2, 1, 0.4, -1, 1])
    missing = FACE.missing(h)
    np.testing.assert_allclose(missing[:, 4], [0.6, 1.4])
    assert np.isinf(missing[0, [0, 1, 3, 6]]).all()
    np.testing.assert_allclose(missing[0, [2, 5]], [2, 2])
    u = FACE.centre.copy()
    u[[3, 6]] += [-0.5, 0.5]
    assert FACE.shares(u)[3] < 0
    assert FACE.trimmed(u, 1e-9).code.tolist() == [REST, 1, -1, 0, 0, -1, 1]
    u = FACE.centre.copy()
    u[0] = -0.7  # out of its ball of radius ½
    assert FACE.trimmed(u, 1e-9).code[0] == -1
