"""The splitting method, against projections and solutions by hand."""

import pytest
import torch

import flowsim as fs
from flowsim.convex.admm import Form, split


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def free(v, _):
    return v


@pytest.mark.parametrize("rows", [3, 9], ids=["wide", "tall"])
def test_the_solver_inverts_its_matrix(rows):
    form, n, rho = Form(numbers(rows, 6), 0.2, numbers(6)), numbers(2, 6, seed=1), 0.7
    whole = form.C.mT @ form.C + (0.2 + rho) * torch.eye(6).double() + rho * n.mT @ n
    r = numbers(6, seed=2)
    torch.testing.assert_close(form.solver(n, rho)(r), torch.linalg.solve(whole, r))


@pytest.mark.parametrize("norm", [fs.L1(), fs.L2(), fs.Linf()], ids=lambda n: n.name)
def test_the_nearest_point_of_a_ball_is_its_projection(norm):
    target = 2 * numbers(6)
    form = Form(torch.zeros(0, 6).double(), 1.0, target)
    found = split(form, norm.project, torch.zeros(0, 6).double(), free, start=0.1 * target)
    torch.testing.assert_close(found.at, norm.project(target), rtol=0, atol=1e-9)


def test_rows_are_held_by_their_multipliers():
    """max u₁ + u₂ − 3 max(u₁, 0) in ℓ∞: u = (0, 1), the force on the kink is 1."""
    form = Form(torch.zeros(0, 2).double(), 0.0, torch.ones(2).double())

    def prox(z, rho):
        return torch.where(z > 0, (z - 3 / rho).clamp_min(0), z)

    n = torch.tensor([[1.0, 0.0]]).double()
    found = split(form, fs.Linf().project, n, prox, start=torch.ones(2).double())
    torch.testing.assert_close(found.at, torch.tensor([0.0, 1.0]).double(), rtol=0, atol=1e-9)
    assert float(found.force) == pytest.approx(1, abs=1e-9)
