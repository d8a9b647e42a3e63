"""Norms composed over blocks: closed forms, names, and what is refused."""

import pytest
import torch

from flowsim.layout import lay_out
from flowsim.norms.blocks import Euclidean, Max, Sum, modular
from flowsim.norms.matrix import Spectral
from flowsim.norms.vector import L1, L2
from tests.oracles.norm_cases import BLOCKS, SCALES, assert_close, uniform


def test_block_norms_divide_by_their_scales():
    shapes = lay_out({"a": (2,), "b": (2,)})
    v, scales = torch.tensor([3.0, 4.0, 0.0, 2.0]), {"a": 5.0, "b": 0.5}
    for combine, value, dual in (
        (Max, 4.0, 26.0),
        (Sum, 5.0, 25.0),
        (Euclidean, 17.0**0.5, 626.0**0.5),
    ):
        norm = combine(L2(), scales).bind(shapes)
        assert_close(norm.value(v), torch.tensor(value))
        assert_close(norm.dual(v), torch.tensor(dual))
    assert_close(Max(L2(), scales).bind(shapes).steepest(v), torch.tensor([3.0, 4.0, 0.0, 0.5]))
    assert_close(Sum(L2(), scales).bind(shapes).steepest(v), torch.tensor([3.0, 4.0, 0.0, 0.0]))
    euclidean = Euclidean(L2(), scales).bind(shapes).steepest(v)
    assert_close(euclidean, torch.tensor([75.0, 100.0, 0.0, 0.5]) / 626**0.5)


def test_euclidean_of_l2_is_l2():
    g = uniform(5, 23)
    assert_close(Euclidean(L2()).bind(BLOCKS).steepest(g), L2().steepest(g))


def test_sum_moves_the_first_of_tied_blocks():
    first = Sum(L2()).bind(lay_out({"a": (1,), "b": (2,)})).steepest(torch.tensor([2.0, 0.0, -2.0]))
    assert first.tolist() == [1, 0, 0]


def test_modular_is_max_of_spectral_and_l2():
    g = uniform(3, 23)
    explicit = Max({"W": Spectral(), "b": L2(), "K": Spectral()}, SCALES).bind(BLOCKS)
    assert torch.equal(modular(BLOCKS, SCALES).steepest(g), explicit.steepest(g))


def test_names():
    assert modular(BLOCKS).name == "max(W:spectral,b:l2,K:spectral)"
    assert Sum(L2()).name == "sum(l2)"
    assert modular(BLOCKS).symbol == r"$\mathrm{max}(S_\infty, \ell_2)$"


@pytest.mark.parametrize(
    "norm", [Max(L2()), Sum({"W": L1()}), Euclidean(L2())], ids=lambda n: n.word
)
def test_unbound(norm):
    for use in (norm.value, norm.dual, norm.steepest, norm.face):
        with pytest.raises(ValueError, match=r"got .*, expected a bound norm, try norm.bind"):
            use(torch.ones(4))


def test_wrong_number_of_weights():
    with pytest.raises(ValueError, match=r"got 7 weights .*, expected 23"):
        modular(BLOCKS).steepest(torch.ones(7))


def test_block_names_and_scales():
    with pytest.raises(ValueError, match=r"got norms for \['W'\] .* expected the layout's blocks"):
        Max({"W": Spectral()}).bind(BLOCKS)
    with pytest.raises(ValueError, match=r"scales for \['V'\]"):
        Max(L2(), {"V": 1.0}).bind(BLOCKS)
    with pytest.raises(
        ValueError, match=r"got scale 0.0 for block 'W', expected a positive number"
    ):
        Max(L2(), {"W": 0.0})


def test_nesting():
    with pytest.raises(ValueError, match="expected a norm of one block"):
        Max(Sum(L2()))
    with pytest.raises(ValueError, match="expected a norm of one block"):
        Max({"W": L2})
