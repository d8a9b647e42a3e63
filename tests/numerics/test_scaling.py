"""Lengths and directions at the ends of the range of floating-point numbers."""

import pytest
import torch

from flowsim.numerics.scaling import lengths, nonzero, scaled, unit


@pytest.mark.parametrize("power", [-1020, -600, 0, 600, 1020])
def test_no_size_is_special(power):
    v = torch.tensor([[3.0, 4.0], [0.0, -1.0], [0.0, 0.0]], dtype=torch.float64)
    far = torch.ldexp(v, torch.tensor(float(power), dtype=torch.float64))
    expected = torch.tensor([5.0, 1.0, 0.0], dtype=torch.float64)
    assert torch.equal(lengths(far), torch.ldexp(expected, torch.tensor(float(power)).double()))
    direction = torch.tensor([[0.6, 0.8], [0.0, -1.0], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(unit(far), direction, rtol=1e-15, atol=0)
    over, largest = scaled(far)
    assert torch.equal(over * largest[:, None], far)
    assert over.abs().amax(-1).tolist() == [1, 1, 0]


def test_zero_is_no_divisor():
    assert nonzero(torch.tensor([0.0, -2.0])).tolist() == [1, -2]
