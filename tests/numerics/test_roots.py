"""Zeros of falling functions, to the last bits."""

import torch

from flowsim.numerics.roots import find_zero


def test_hard_functions_to_the_last_bits():
    one = torch.ones(4, dtype=torch.float64)
    target = torch.tensor([1e-3, 0.3, 0.999, 0.5], dtype=torch.float64)
    for f in (
        lambda x: target**9 - x**9,
        lambda x: (target - x).sign() * (target - x).abs().sqrt(),
    ):
        torch.testing.assert_close(find_zero(f, 0 * one, one), target, rtol=1e-14, atol=0)


def test_ends_where_there_is_no_find_zero():
    low, high = torch.tensor([0.0, 0.0]), torch.tensor([1.0, 1.0])
    shift = torch.tensor([-1.0, 3.0])
    assert find_zero(lambda x: shift - x, low, high).tolist() == [0, 1]


def test_a_jump_is_found():
    found = find_zero(lambda x: torch.where(x < 0.7, 1.0, -1.0), torch.zeros(1), torch.ones(1))
    torch.testing.assert_close(found, torch.tensor([0.7]), rtol=1e-6, atol=0)


def test_tolerances_end_the_search_early():
    calls = []

    def f(x):
        calls.append(x)
        return 0.3 - x**3

    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    exact = find_zero(f, zero, one)
    used = len(calls)
    assert abs(float(f(find_zero(f, zero, one, ftol=1e-3)))) <= 1e-3
    torch.testing.assert_close(find_zero(f, zero, one, xtol=1e-3), exact, rtol=0, atol=1e-3)
    assert len(calls) < 3 * used
