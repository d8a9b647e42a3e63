"""Shampoo, against the published formulas."""

import numpy as np
import pytest
import torch

import flowsim as fs
from tests.oracles.matrix_descents import NET, X, Y, gradient, matrices, setting


def power(M, p, eps):
    values, basis = np.linalg.eigh(M)
    return basis @ np.diag((values + eps) ** p) @ basis.T


@pytest.mark.parametrize(
    ("beta", "exponent", "eps"),
    [(None, 0.25, 1e-4), (0.9, 0.25, 1e-3), (None, 0.4, 0.1), (0, 0.3, 0.1)],
)
def test_shampoo_step_for_step(beta, exponent, eps):
    problem, w = setting()
    run = fs.simulate(
        problem, fs.Shampoo(0.02, beta, exponent, eps, 0.1), w, until=fs.steps(range(1, 16))
    )
    keep, share = (1, 1) if beta is None else (beta, 1 - beta)
    sides = [[(0.0, 0.0)] * 2 for _ in range(2)]
    for k in range(15):
        g, moves = matrices(gradient(problem, w)), []
        for b in range(2):
            row = []
            for i in range(2):
                G = g[i][b].numpy()
                L, R = sides[b][i]
                L, R = keep * L + share * G @ G.T, keep * R + share * G.T @ G
                sides[b][i] = (L, R)
                row.append((power(L, -exponent, eps) @ G @ power(R, -exponent, eps)).ravel())
            moves.append(np.concatenate(row))
        w = (1 - 0.02 * 0.1) * w - 0.02 * torch.from_numpy(np.stack(moves))
        assert torch.allclose(torch.from_numpy(run.weights[k + 1]), w, rtol=1e-8, atol=1e-11), k


def test_shampoo_without_accumulation_is_spectral_descent():
    problem, w0 = setting()
    shampoo = fs.simulate(problem, fs.Shampoo(0.02, beta=0), w0, until=fs.steps([30])).final
    plain = fs.SteepestDescent(fs.modular(NET.layout), 0.02, normalized=True)
    assert torch.allclose(
        shampoo.w, fs.simulate(problem, plain, w0, until=fs.steps([30])).final.w, rtol=1e-8
    )


def test_on_vectors_shampoo_is_the_full_matrix_method():
    net = fs.Diagonal(3)
    problem = fs.Problem(net, X[0, :, :3], Y[0], fs.logistic)
    w = net.init(0)
    run = fs.simulate(problem, fs.Shampoo(0.05, eps=1e-3), w, until=fs.steps([1]))
    g = matrices(gradient(problem, w), net)
    expected = [power(np.outer(a[0], a[0]), -0.5, 1e-3) @ a[0].numpy() for a in g]
    assert torch.allclose(
        run.final.w, w - 0.05 * torch.from_numpy(np.concatenate(expected))[None], rtol=1e-8
    )


@pytest.mark.parametrize("beta", [None, 0.9, 0.0])
def test_with_exponent_one_quarter_and_no_eps_the_scale_of_the_loss_does_not_matter(beta):
    H = torch.diag(torch.arange(1.0, 7.0)).double()
    target, w0 = torch.tensor([3.0, -2.0, 1.0, 4.0, -1.0, 2.0]).double(), torch.zeros(1, 6).double()
    finals = [
        fs.simulate(
            fs.Quadratic(c * H, target, (2, 3)), fs.Shampoo(0.01, beta), w0, until=fs.steps([100])
        ).final.w
        for c in (1.0, 1e-150, 1e-200)
    ]
    assert finals[0].abs().max() > 0.05
    assert torch.allclose(finals[1], finals[0], rtol=1e-9)
    assert torch.allclose(finals[2], finals[0], rtol=1e-9)


def test_the_times_of_shampoo():
    problem, w0 = setting()
    for rule, time in (
        (fs.Shampoo(0.02, 0.9), 0.2),
        (fs.Shampoo(0.02), 4e-3),
        (fs.Shampoo(0.02, None, 0.4), 10 * 0.02**5),
    ):
        run = fs.simulate(problem, rule, w0, until=fs.steps([10]))
        assert np.exp(run["log_time"][-1]) == pytest.approx(time, rel=1e-10)
