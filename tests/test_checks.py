"""Validators: what they let pass, and the sentence with which they refuse."""

import math

import numpy as np
import pytest
import torch

from flowsim import checks

NUMBERS = {
    checks.require_finite: ([0, -3, 2.5, np.float32(1)], [math.inf, math.nan, "1", True, None]),
    checks.require_positive: ([1e-300, 3, np.int64(2)], [0, -1.0, math.inf, math.nan, True, "1"]),
    checks.require_not_negative: ([0, 1.5], [-1e-300, math.inf, math.nan, False, None]),
    checks.require_fraction: ([0.5, 1e-9], [0, 1, 1.0, math.nan, True]),
    checks.require_share: ([0, 0.99], [1, -0.1, math.nan, False]),
    checks.require_whole: ([1, np.int64(5)], [0, 1.0, True, "1", None]),
    checks.require_flag: ([True, False], [1, 0, "no", None]),
    lambda owner, **options: checks.require_callable(owner, "a function", **options): (
        [len],
        [3, None],
    ),
}
CASES = [(check, *values) for check, values in NUMBERS.items()]


@pytest.mark.parametrize(("check", "good", "bad"), CASES)
def test_refused_by_name(check, good, bad):
    for value in good:
        check("Rule", option=value)
    for value in bad:
        with pytest.raises((TypeError, ValueError), match=r"^Rule: got option=.*, expected "):
            check("Rule", option=value)


def test_whole_numbers_from_the_least_on():
    checks.require_whole("Rule", 0, option=0)
    with pytest.raises(ValueError, match="got option=1, expected an integer ≥ 2"):
        checks.require_whole("Rule", 2, option=1)


def test_a_class_is_no_instance():
    checks.require_instance("Rule", int | str, "a word", option="a")
    for value in (int, 2.0):
        with pytest.raises(TypeError, match="Rule: got option=.*, expected a word"):
            checks.require_instance("Rule", int | str, "a word", option=value)


def test_weights():
    checks.require_weights(torch.ones(2, 3), 3)
    for bad in ([[1.0]], torch.ones(2, 3, dtype=torch.long)):
        with pytest.raises(TypeError, match=r"weights: got .*, expected a floating-point tensor"):
            checks.require_weights(bad, 3)
    for bad in (torch.ones(3), torch.ones(2, 4), torch.ones(0, 3)):
        with pytest.raises(ValueError, match=r"weights: got shape .*, expected \(B, 3\)"):
            checks.require_weights(bad, 3)
    with pytest.raises(ValueError, match="NaN or infinite"):
        checks.require_weights(torch.full((2, 3), math.nan), 3)


def test_arrays_become_tensors():
    assert checks.as_tensor([[1, 2]], "x").tolist() == [[1, 2]]
    assert checks.as_tensor(np.ones((2, 3))[:, ::-1], "x").shape == (2, 3)
    assert not checks.as_tensor(torch.ones(2, requires_grad=True), "x").requires_grad
    assert checks.as_floats(torch.tensor([1])).dtype == torch.float64
    assert checks.as_floats(torch.ones(1)).dtype == torch.float32
    for bad, match in (
        ("a", "x: got str"),
        ([[1], [1, 2]], "x: got list"),
        ([1j], "x: got complex"),
    ):
        with pytest.raises(TypeError, match=match):
            checks.as_tensor(bad, "x")


def test_a_ladder_has_three_steps_that_fall():
    assert checks.as_ladder("study", [1, 0.5, 0.1]) == (1.0, 0.5, 0.1)
    for ladder in ([0.1, 0.05], [0.1, 0.1, 0.05], [0.1, 0.2, 0.05], [0.2, 0.1, 0.0]):
        with pytest.raises(ValueError, match=r"study: got ladder=.*three falling steps, try"):
            checks.as_ladder("study", ladder)
