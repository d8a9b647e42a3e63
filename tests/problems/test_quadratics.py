"""Quadratic objectives: levels and gradients against automatic differentiation, kinks, refusals."""

import pytest
import torch

import flowsim as fs
from flowsim.problems.quadratics import PiecewiseQuadratic

EYE, ZERO = torch.eye(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_quadratic_is_minus_its_value_with_minus_its_gradient():
    A, target = draw(1, 5, 4), draw(2, 4)
    H = A.T @ A
    problem = fs.Quadratic(H, target)
    w = draw(3, 3, 4).requires_grad_()
    F = 0.5 * torch.einsum("bi,ij,bj->b", w - target, H, w - target)
    gradient = torch.autograd.grad(F.sum(), w)[0]
    torch.testing.assert_close(problem.ascent(w.detach()), (-F.detach(), -gradient))
    torch.testing.assert_close(problem.lam(w.detach()), -F.detach())
    assert not problem.logarithmic
    assert problem.layout[0].shape == (4,)
    assert fs.Quadratic(H, target, shape=(2, 2)).layout[0].shape == (2, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gram_matrix_of_low_rank_is_positive_semidefinite_to_rounding(dtype):
    A = draw(1, 2, 30).to(dtype)
    assert fs.Quadratic(A.T @ A, torch.zeros(30, dtype=dtype)).size == 30


def toy(**changes):
    parts = {"slope": [-0.5, 0.2], "normals": [[1.0, 0.5], [-2.0, 1.0]], "weights": [1.0, -0.8]}
    return PiecewiseQuadratic(**(parts | changes))


def test_a_piecewise_quadratic_is_minus_its_value_with_minus_its_gradient():
    problem = toy(matrix=[[2.0, 0.3], [0.3, 1.0]], minimiser=[0.1, -0.4])
    w = draw(3, 6, 2).requires_grad_()
    r = w - problem.minimiser
    F = 0.5 * (r @ problem.matrix * r).sum(-1) + w @ problem.slope
    F = F + (w @ problem.normals.T).clamp_min(0) @ problem.weights
    gradient = torch.autograd.grad(F.sum(), w)[0]
    torch.testing.assert_close(problem.ascent(w.detach()), (-F.detach(), -gradient))


def test_hinges_of_a_piecewise_quadratic_give_its_gradient_on_either_side():
    problem, w = toy(matrix=[[2.0, 0.3], [0.3, 1.0]]), draw(4, 6, 2)
    hinges = problem.hinges(w)
    torch.testing.assert_close(hinges.gradient((hinges.z > 0).to(w)), problem.ascent(w)[1])


REFUSED = {
    "quadratic shapes": (
        lambda: fs.Quadratic(EYE, torch.zeros(3)),
        r"Quadratic: got matrix \(2, 2\) and minimiser \(3,\), expected \(P, P\) and \(P,\)",
    ),
    "quadratic indefinite": (
        lambda: fs.Quadratic(-EYE, ZERO),
        "Quadratic: got a matrix that is not symmetric positive",
    ),
    "quadratic asymmetric": (
        lambda: fs.Quadratic(EYE + 1e-6 * torch.tensor([[0.0, 1.0], [0.0, 0.0]]), ZERO),
        "Quadratic: got a matrix that is not symmetric positive semidefinite, try",
    ),
    "quadratic nan": (
        lambda: fs.Quadratic(EYE, ZERO * torch.nan),
        "Quadratic: got NaN or infinite entries, expected",
    ),
    "quadratic block": (
        lambda: fs.Quadratic(EYE, ZERO, (3, 3)),
        r"Quadratic: got shape \(3, 3\), expected one that",
    ),
    "quadratic weights": (
        lambda: fs.Quadratic(EYE, ZERO).check_weights(torch.zeros(1, 3)),
        r"weights: got shape \(1, 3\), expected \(B, 2\)",
    ),
    "quadratic weights nan": (
        lambda: fs.Quadratic(EYE, ZERO).check_weights(ZERO[None] * torch.nan),
        "weights: got NaN or infinite entries, expected",
    ),
    "piecewise shapes": (
        lambda: toy(weights=[1.0]),
        r"PiecewiseQuadratic: got slope \(2,\) and normals \(2, 2\) and weights \(1,\).*expected",
    ),
    "piecewise asymmetric": (
        lambda: toy(matrix=[[1.0, 1.0], [0.0, 1.0]]),
        "PiecewiseQuadratic: got a matrix that is not symmetric",
    ),
    "piecewise normal": (
        lambda: toy(normals=[[1.0, 0.5], [0.0, 0.0]]),
        "PiecewiseQuadratic: got a normal that is zero",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_sentence_that_says_why(name):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        call()
