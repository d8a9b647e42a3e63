"""Norms of singular values: closed forms, isometries, binding, and what is refused."""

import numpy as np
import pytest
import torch
from torch import Tensor

from flowsim.layout import lay_out
from flowsim.norms.blocks import Max
from flowsim.norms.matrix import Nuclear, Schatten, Spectral
from flowsim.norms.vector import L2, Frobenius
from tests.oracles.norm_cases import BLOCKS, assert_close, uniform


@pytest.mark.parametrize("shape", [(3, 4), (5, 2), (2, 3, 2)])
def test_schatten(shape):
    g = uniform(5, *shape)
    s = np.linalg.svd(g.flatten(2).numpy(), compute_uv=False)
    expected = {
        Spectral(): (s.max(-1), s.sum(-1)),
        Nuclear(): (s.sum(-1), s.max(-1)),
        Schatten(3): ((s**3).sum(-1) ** (1 / 3), (s**1.5).sum(-1) ** (2 / 3)),
        Frobenius(): (np.sqrt((s**2).sum(-1)),) * 2,
    }
    for norm, (value, dual) in expected.items():
        bound = norm.bind(lay_out({"W": shape}))
        assert_close(bound.value(g.flatten(1)), torch.from_numpy(value))
        assert_close(bound.dual(g.flatten(1)), torch.from_numpy(dual))


def test_schatten_two_is_frobenius():
    g = uniform(5, 12)
    schatten = Schatten(2).bind(lay_out({"W": (3, 4)}))
    assert_close(schatten.steepest(g), L2().steepest(g))


def test_polar_factor_is_zero_on_the_null_space():
    """A product of rank two, which rounding makes full rank."""
    g = uniform(50, 30, 2) @ uniform(50, 2, 20, seed=1)
    polar = Spectral().bind(lay_out({"W": (30, 20)})).steepest(g.flatten(1)).unflatten(1, (30, 20))
    s = torch.linalg.svdvals(polar)
    assert_close(s[:, :2], torch.ones_like(s[:, :2]))
    assert (s[:, 2:] < 1e-13).all()


@pytest.mark.parametrize(
    "norm", [Spectral(), Nuclear(), Schatten(3), Frobenius()], ids=lambda n: n.name
)
def test_left_and_right_rotations(norm):
    norm, g = norm.bind(lay_out({"W": (3, 4)})), uniform(4, 12)
    left, right = torch.linalg.qr(uniform(3, 3)).Q, torch.linalg.qr(uniform(4, 4)).Q

    def turn(v: Tensor) -> Tensor:
        return (left @ v.unflatten(1, (3, 4)) @ right).flatten(1)

    assert_close(norm.value(turn(g)), norm.value(g))
    assert_close(norm.steepest(turn(g)), turn(norm.steepest(g)))


def test_kernels_are_flattened_to_matrices():
    g = uniform(3, 8)
    kernel = Spectral().bind(lay_out({"K": (2, 2, 2)}))
    assert torch.equal(kernel.steepest(g), Spectral().bind(lay_out({"K": (2, 4)})).steepest(g))


def test_names():
    norms = [Spectral(), Nuclear(), Schatten(3)]
    assert [norm.name for norm in norms] == ["spectral", "nuclear", "schatten3"]


@pytest.mark.parametrize("norm", [Spectral(), Nuclear(), Schatten(3)], ids=lambda n: n.name)
def test_unbound(norm):
    for use in (norm.value, norm.dual, norm.steepest, norm.face):
        with pytest.raises(ValueError, match=r"got .*, expected a bound norm, try norm.bind"):
            use(torch.ones(4))


@pytest.mark.parametrize(
    "shapes", [{"a": (2, 2), "b": (2,)}, {"a": (3,)}, {"a": (2, 2), "b": (2, 2)}]
)
def test_matrix_norm_on_other_layouts(shapes):
    with pytest.raises(
        ValueError, match=r"expected exactly one block .* try modular\(layout\) or Max"
    ):
        Spectral().bind(lay_out(shapes))


def test_matrix_norm_for_every_block_meets_a_vector():
    with pytest.raises(ValueError, match=r"got blocks b \(3,\)"):
        Max(Spectral()).bind(BLOCKS)


def test_wrong_number_of_weights():
    with pytest.raises(ValueError, match=r"got 7 weights .*, expected 12"):
        Spectral().bind(lay_out({"W": (3, 4)})).steepest(torch.ones(7))


@pytest.mark.parametrize("p", [1, 0.5, np.inf, np.nan])
def test_exponents(p):
    with pytest.raises(ValueError, match=r"try Nuclear\(\) or Spectral\(\)"):
        Schatten(p)
