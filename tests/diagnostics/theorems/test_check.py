"""A residual and its bound."""

import numpy as np
import torch

from flowsim.diagnostics.theorems.check import Check


def test_a_check_counts_only_what_is_known():
    assert Check(np.array([np.nan, 1.0]), 1.0).holds
    assert not Check(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 1.0])).holds


def test_a_ratio_is_compared_with_one():
    found = Check.of_ratio(torch.tensor([2.0, 3.0]), torch.tensor([2.0, 2.0]), 0.1)
    assert found.residual.tolist() == [0.0, 0.5]
    assert not found.holds
