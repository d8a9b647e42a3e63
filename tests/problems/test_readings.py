"""Readings: their numbers, the adjoint of their derivative, margins, and targets they take."""

import pytest
import torch

import flowsim as fs
from flowsim.problems.readings import Pairwise, Residual, Signed, SoftPairwise, checked_targets

READINGS = {
    "signed": (Signed(), 1),
    "pairwise": (Pairwise(), 4),
    "pairwise of two": (Pairwise(), 2),
    "soft pairwise": (SoftPairwise(), 4),
    "soft pairwise of two": (SoftPairwise(), 2),
    "residual": (Residual(), 1),
    "residual of three": (Residual(), 3),
}


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def targets(reading, N, C):
    if reading.targets == "values":
        return draw(9, N, C)
    labels = torch.randint(0, max(C, 2), (N,), generator=torch.Generator().manual_seed(9))
    return labels if reading.targets == "classes" else 2.0 * labels - 1


def numbers(name, f, y):
    """q of one trajectory as a user would write it."""
    rivals = [[j for j in range(f.shape[1]) if j != int(label)] for label in y.flatten()]
    if name.startswith("signed"):
        return y * f[:, 0]
    if name.startswith("residual"):
        return (f - y).flatten()
    gaps = torch.stack([f[i, y[i]] - f[i, rivals[i]] for i in range(len(f))])
    return gaps.flatten() if name.startswith("pairwise") else -torch.logsumexp(-gaps, -1)


@pytest.mark.parametrize("name", READINGS)
def test_numbers_are_those_of_the_formula(name):
    reading, C = READINGS[name]
    f, y = draw(1, 3, 5, C), targets(reading, 5, C)
    q, _ = reading.read(f, y)
    for b in range(3):
        torch.testing.assert_close(q[b], numbers(name, f[b], y), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("name", READINGS)
def test_reading_maps_cotangents_back_as_its_adjoint(name):
    reading, C = READINGS[name]
    f, v, y = draw(1, 3, 5, C), draw(2, 3, 5, C), targets(reading, 5, C)
    q, back = reading.read(f, y)
    c = draw(3, *q.shape)
    moved = torch.func.jvp(lambda f: reading.read(f, y)[0], (f,), (v,))[1]
    torch.testing.assert_close((moved * c).sum(), (v * back(c)).sum(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", READINGS)
def test_hessian_is_that_of_a_sum_with_given_slopes(name):
    """Of Σ (−s q + ½ c (q − q₀)²) at q₀, whose slope is s and whose second derivative c."""
    reading, C = READINGS[name]
    f, y = draw(1, 1, 5, C), targets(reading, 5, C)
    q = reading.read(f, y)[0]
    slope, second = draw(2, *q.shape).abs(), draw(3, *q.shape).abs()

    def total(g):
        moved = reading.read(g.view_as(f), y)[0]
        return (-slope * moved + 0.5 * second * (moved - q) ** 2).sum()

    blocks = torch.func.hessian(total)(f.flatten()).view(5, C, 5, C)
    found = reading.hessian(f, y, slope, second)[0]
    for i in range(5):
        torch.testing.assert_close(found[i], blocks[i, :, i], rtol=1e-12, atol=1e-12)


def test_classification_margins_by_hand():
    f = torch.tensor([[[2.0, 5.0, -1.0], [0.0, 1.0, 4.0]]], dtype=torch.float64)
    y = torch.tensor([1, 0])
    for loss in (fs.cross_entropy, fs.pairwise_exponential):
        assert loss.reading.margins(f, y).tolist() == [[3.0, -4.0]]
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64)
    assert fs.logistic.reading.margins(f[..., :1], signs).tolist() == [[2.0, 0.0]]
    with pytest.raises(ValueError, match="no classification margins; try exponential or logistic"):
        fs.squared.reading.margins(f, f[0])


def test_targets_of_one_trajectory_are_for_all_and_take_the_form_of_the_reading():
    shape = torch.Size([3, 2])
    signs = checked_targets([0, 1], Signed(), "logistic", shape, 1)
    assert signs.tolist() == [-1.0, 1.0]
    classes = checked_targets([2.0, 0.0], Pairwise(), "pairwise", shape, 3)
    assert classes.dtype == torch.long
    assert classes.tolist() == [2, 0]
    values = checked_targets([1, 2], Residual(), "squared", shape, 1)
    assert values.tolist() == [[1.0], [2.0]]


def test_targets_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="y: got NaN or infinite entries"):
        checked_targets([1.0, torch.nan], Signed(), "logistic", torch.Size([2]), 1)
