"""The protocol of objectives: each of them answers every verb, row by row."""

import pytest
import torch

import flowsim as fs
from flowsim.problems.objective import Objective
from flowsim.problems.quadratics import PiecewiseQuadratic

X, Y = torch.tensor([[1.0, 0.5], [-0.3, 2.0], [0.7, -1.0]]).double(), [1, -1, 1]
OBJECTIVES = {
    "problem": fs.Problem(fs.MLP([2, 3, 1], fs.relu), X, Y, fs.logistic),
    "linear problem": fs.Problem(fs.Linear(2), X, Y, fs.exponential),
    "quadratic": fs.Quadratic(torch.eye(3).double(), torch.ones(3).double()),
    "with kinks": PiecewiseQuadratic([-0.5, 1.0], [[1.0, 0.0], [1.0, 2.0]], [1.0, -0.8]),
}


def weights(objective: Objective, B=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(B, objective.size, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_gradient_is_the_derivative_of_the_level(name):
    objective = OBJECTIVES[name]
    w = weights(objective).requires_grad_()
    expected = torch.autograd.grad(objective.lam(w).sum(), w)[0]
    level, h = objective.ascent(w.detach())
    torch.testing.assert_close(level, objective.lam(w).detach())
    torch.testing.assert_close(h, expected)
    assert float(h.abs().max()) > 0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_rows_are_trajectories_and_follow_the_weights(name):
    objective = OBJECTIVES[name]
    w, rows = weights(objective), torch.tensor([2, 0])
    objective.check_weights(w)
    part = objective.select(rows)
    torch.testing.assert_close(part.ascent(w[rows])[1], objective.ascent(w)[1][rows])
    assert objective.like(w.float()).ascent(w.float())[1].dtype == torch.float32
    assert sum(block.size for block in objective.layout) == objective.size


@pytest.mark.parametrize("name", OBJECTIVES)
def test_kinks_are_given_where_they_are_said_to_be(name):
    objective = OBJECTIVES[name]
    w = weights(objective)
    if not objective.kinks:
        with pytest.raises(ValueError, match="kinks"):
            objective.hinges(w)
        return
    hinges = objective.hinges(w)
    torch.testing.assert_close(hinges.gradient((hinges.z > 0).to(w)), objective.ascent(w)[1])
