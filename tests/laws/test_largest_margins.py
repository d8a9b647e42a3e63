"""Largest margins of linear nets, from independent solvers, against parameter margins."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, nnls

import flowsim as fs
from flowsim import diagnostics
from flowsim.motion.state import initial_state


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X = draw(1, 8, 4)


def margin(problem, norm, w):
    """min_i q_i / ‖w‖^L of each row."""
    return diagnostics.margin(norm)(problem, initial_state(problem, w))


Z = np.array([[3.0, 1.0, 0.0], [1.0, -2.0, 2.0], [1.0, 2.0, 1.0]])


def largest_margin(norm, Z=Z):
    """The unit predictor of largest margin min_i (Zu)_i, and that margin, in ℓ1, ℓ2 or ℓ∞."""
    n, d = Z.shape
    if norm == 2:  # least distance programming: Lawson and Hanson (1974), ch. 23
        E = np.vstack([Z.T, np.ones(n)])
        r = E @ nnls(E, np.eye(d + 1)[d])[0] - np.eye(d + 1)[d]
        w = -r[:d] / r[d]
        return torch.from_numpy(w / np.linalg.norm(w)), 1 / np.linalg.norm(w)
    budget = np.append(np.ones(2 * d), 0)[None]
    solution = linprog(  # u = positive − negative parts, and the margin
        np.append(np.zeros(2 * d), -1),
        A_ub=np.vstack([np.hstack([-Z, Z, np.ones((n, 1))]), *([budget] if norm == 1 else [])]),
        b_ub=np.append(np.zeros(n), [1.0] * (norm == 1)),
        bounds=[(0, 1)] * (2 * d) + [(0, None)],
    )
    return torch.from_numpy(solution.x[:d] - solution.x[d : 2 * d]), -solution.fun


@pytest.mark.parametrize(
    ("norm", "value"), [(1, 17 / 15), (2, math.sqrt(53 / 17)), (math.inf, 5 / 2)]
)
def test_solvers_find_the_margins_known_in_closed_form(norm, value):
    u, found = largest_margin(norm)
    assert found == pytest.approx(value, rel=1e-9)
    problem = fs.Problem(fs.Linear(3), Z, np.ones(3), fs.exponential)
    ours = {1: fs.L1(), 2: fs.L2(), math.inf: fs.Linf()}[norm]
    assert float(margin(problem, ours, u[None])) == pytest.approx(value, rel=1e-9)


def single_neuron(k, a, row):
    """W = e₁ rowᵀ, second layer a e₁."""
    W, second = torch.zeros(k, 3, dtype=torch.float64), torch.zeros(k, dtype=torch.float64)
    W[0], second[0] = row, a
    return torch.cat([W.flatten(), second])[None]


# norm on the parameters, norm on the predictor, γ_param/γ_predictor, optimal factors, by width k
TWO_LAYER = {
    "l2": (fs.L2(), 2, lambda k: 0.5, lambda k, u: single_neuron(k, 0.5**0.5, u * 0.5**0.5)),
    "l1": (fs.L1(), 1, lambda k: 0.25, lambda k, u: single_neuron(k, 0.5, u / 2)),
    "linf": (
        fs.Linf(),
        math.inf,
        lambda k: k,
        lambda k, u: torch.cat([u.repeat(k), torch.ones(k).to(u)])[None],
    ),
}


@pytest.mark.parametrize("k", [1, 3, 6])
@pytest.mark.parametrize("name", TWO_LAYER)
def test_largest_parameter_margin_of_a_two_layer_linear_net(name, k):
    norm, predictor_norm, ratio, factors = TWO_LAYER[name]
    problem = fs.Problem(fs.MLP([3, k, 1], fs.identity), Z, np.ones(3), fs.exponential)
    u, gamma = largest_margin(predictor_norm)
    best = factors(k, u)
    assert float(margin(problem, norm, best)) == pytest.approx(ratio(k) * gamma, rel=1e-9)
    others = torch.cat(
        [
            problem.net.init(range(300)),
            best + 0.1 * draw(1, 300, problem.size),
            best + 1e-3 * draw(2, 300, problem.size),
        ]
    )
    assert float(margin(problem, norm, others).max()) <= ratio(k) * gamma * (1 + 1e-9)


# norm on the parameters, norm on the predictor, γ_param/γ_predictor, by depth D: D^{−D/p} for ℓp
# and ℓ_{p/D}
DIAGONAL = {
    "l2, depth 2": (fs.L2(), 2, 1, 1 / 2),
    "l3, depth 3": (fs.Lp(3), 3, 1, 1 / 3),
    "l4, depth 2": (fs.Lp(4), 2, 2, 2**-0.5),
    "linf, depth 2": (fs.Linf(), 2, math.inf, 1.0),
    "linf, depth 4": (fs.Linf(), 4, math.inf, 1.0),
}


@pytest.mark.parametrize("name", DIAGONAL)
def test_largest_parameter_margin_of_a_diagonal_net(name):
    norm, depth, predictor_norm, ratio = DIAGONAL[name]
    problem = fs.Problem(fs.Diagonal(3, depth), Z, np.ones(3), fs.exponential)
    u, gamma = largest_margin(predictor_norm)
    root = u.abs() ** (1 / depth)
    best = torch.cat([u.sign() * root, *[root] * (depth - 1)])[None]
    assert float(margin(problem, norm, best)) == pytest.approx(ratio * gamma, rel=1e-9)
    others = torch.cat([problem.net.init(range(300)), best + 0.05 * draw(1, 300, problem.size)])
    assert float(margin(problem, norm, others).max()) <= ratio * gamma * (1 + 1e-9)


def factor(M, k):
    """The balanced factors W₁ (k, d), W₂ (C, k) of M as flat weights of a two-layer net."""
    U, S, Vt = torch.linalg.svd(M, full_matrices=False)
    root = S.sqrt()
    W1, W2 = torch.zeros(k, M.shape[1]).to(M), torch.zeros(M.shape[0], k).to(M)
    W1[: len(S)], W2[:, : len(S)] = root[:, None] * Vt, U * root
    return torch.cat([W1.flatten(), W2.flatten()])[None]


@pytest.mark.parametrize("k", [3, 5])
def test_frobenius_norm_of_factors_is_twice_the_nuclear_norm_at_best(k):
    net = fs.MLP([4, k, 3], fs.identity)
    M = draw(1, 3, 4)
    nuclear = float(torch.linalg.matrix_norm(M, "nuc"))
    w = factor(M, k)
    torch.testing.assert_close(net.outputs(w, X)[0], X @ M.T)
    assert float(w.square().sum()) == pytest.approx(2 * nuclear, rel=1e-12)
    for row in net.init(range(20)):
        W1, W2 = (block.of(row) for block in net.layout)
        product = float(torch.linalg.matrix_norm(W2 @ W1, "nuc"))
        assert float(row.square().sum()) >= 2 * product * (1 - 1e-12)


def test_largest_frobenius_margin_of_matrix_factors_is_half_the_nuclear_one():
    cp = pytest.importorskip("cvxpy")
    x, y = draw(3, 5, 4), torch.tensor([0, 1, 2, 0, 1])
    M, gamma = cp.Variable((3, 4)), cp.Variable()
    gaps = [
        (M[int(c)] - M[j]) @ x[i].numpy() >= gamma
        for i, c in enumerate(y)
        for j in range(3)
        if j != c
    ]
    cp.Problem(cp.Maximize(gamma), [*gaps, cp.normNuc(M) <= 1]).solve(solver=cp.CLARABEL)
    problem = fs.Problem(fs.MLP([4, 3, 3], fs.identity), x, y, fs.pairwise_exponential)
    best = factor(torch.from_numpy(M.value), 3)
    optimum = 0.5 * float(gamma.value)
    assert optimum > 0.01
    assert float(margin(problem, fs.L2(), best)) == pytest.approx(optimum, rel=1e-5)
    others = torch.cat([problem.net.init(range(300)), best + 0.02 * draw(1, 300, problem.size)])
    assert float(margin(problem, fs.L2(), others).max()) <= optimum * (1 + 1e-5)
