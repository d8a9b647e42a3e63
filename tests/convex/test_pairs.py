"""Slacks and forces: products, targets, boundaries and steps, by hand."""

import math

import pytest
import torch

from flowsim.convex.pairs import Pairs

ONE = torch.tensor([1.0, 2.0]).double()
AT = Pairs((ONE, torch.tensor(4.0).double()), (3 * ONE, torch.tensor(0.5).double()))
STEP = Pairs((-ONE, torch.tensor(-8.0).double()), (ONE, torch.tensor(-0.1).double()))


def test_products_are_summed_and_counted():
    assert AT.products() == (pytest.approx(3 + 12 + 2), 3)
    assert Pairs().products() == (0.0, 0)


def test_targets_are_corrected_by_the_products_of_a_direction():
    assert [t.tolist() for t in AT.targets(0.1)] == [[0.1, 0.1], 0.1]
    first, second = AT.targets(0.1, STEP)
    assert first.tolist() == pytest.approx([1.1, 4.1])
    assert float(second) == pytest.approx(0.1 - 0.8)


def test_a_direction_ends_where_the_first_number_is_zero():
    assert AT.to_boundary(STEP) == (0.5, pytest.approx(5.0))
    assert Pairs().to_boundary(Pairs()) == (math.inf, math.inf)
    moved = AT.after(STEP, 0.5, 1.0)
    assert moved.slacks[0].tolist() == [0.5, 1.0]
    assert float(moved.slacks[1]) == 0
    assert moved.forces[0].tolist() == [4.0, 8.0]
    assert float(moved.forces[1]) == pytest.approx(0.4)
