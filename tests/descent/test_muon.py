"""Muon: its matrices against independent programs, its limits against spectral descent."""

import math

import numpy as np
import pytest
import torch

import flowsim as fs
from tests.oracles.matrix_descents import NET, X, Y, flat, gradient, matrices, setting

# Newton–Schulz


def newton_schulz(G):
    """Ten lines of the published iteration, one matrix at a time."""
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G / np.linalg.norm(G)
    X = X.T if G.shape[0] > G.shape[1] else X
    for _ in range(5):
        A = X @ X.T
        X = a * X + b * A @ X + c * A @ A @ X
    return X.T if G.shape[0] > G.shape[1] else X


@pytest.mark.parametrize("shape", [(4, 4), (3, 6), (6, 3), (1, 5)])
def test_newton_schulz_is_the_published_iteration(shape):
    G = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)).double()
    expected = torch.stack([torch.from_numpy(newton_schulz(g.numpy())) for g in G])
    assert torch.allclose(fs.NewtonSchulz()(G), expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(fs.NewtonSchulz()(torch.zeros(1, *shape)), torch.zeros(1, *shape))


def test_the_band_of_newton_schulz_is_what_its_documentation_says():
    """diag(s, √(1 − s²)) has Frobenius norm 1; s through all magnitudes."""
    s = torch.logspace(-6, -0.16, 6001, dtype=torch.float64)
    image = fs.NewtonSchulz()(torch.diag_embed(torch.stack([s, (1 - s**2).sqrt()], -1)))[:, 0, 0]
    low, high = image[s >= 6e-3].aminmax()
    assert float(low) == pytest.approx(0.682, abs=1e-3)
    assert float(high) == pytest.approx(1.134, abs=1e-3)
    assert float(image[s >= 2e-3].max()) == pytest.approx(1.202, abs=1e-3)
    assert float(image[s >= 2e-3].min()) == pytest.approx(0.682, abs=1e-3)
    assert float(image[0] / s[0]) == pytest.approx(485, abs=0.5)


# Muon


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("polar", [None, fs.NewtonSchulz()])
def test_muon_step_for_step(polar, nesterov):
    problem, w = setting()
    rule = fs.Muon(0.01, 0.9, nesterov, polar, {"W1": 2.0}, 0.1)
    run = fs.simulate(problem, rule, w, until=fs.steps(range(1, 16)))
    m = [torch.zeros_like(part) for part in matrices(w)]
    for k in range(15):
        g = matrices(gradient(problem, w))
        m = [0.9 * a + (1.0 if nesterov else 0.1) * b for a, b in zip(m, g, strict=True)]
        v = [b + 0.9 * a for a, b in zip(m, g, strict=True)] if nesterov else m
        if polar is None:
            factors = []
            for part in v:
                u, s, vt = torch.linalg.svd(part, full_matrices=False)
                factors.append((u * (s > 1e-12 * s[:, :1])[:, None]) @ vt)
        else:
            factors = [
                torch.stack([torch.from_numpy(newton_schulz(row.numpy())) for row in part])
                for part in v
            ]
        w = 0.999 * w - 0.01 * flat([2.0 * factors[0], factors[1]])
        assert torch.allclose(torch.from_numpy(run.weights[k + 1]), w, rtol=1e-9, atol=1e-11), k


def test_against_torchs_muon_which_rounds_to_bfloat16():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    problem, w0 = setting()
    rule = fs.Muon(0.01, 0.95, polar=fs.NewtonSchulz(), scales={"W1": math.sqrt(7 / 5)}, decay=0.1)
    run = fs.simulate(problem, rule, w0, until=fs.steps([20]))
    for b in range(2):
        leaves = [part[b].clone().requires_grad_() for part in matrices(w0)]
        muon = torch.optim.Muon(leaves, lr=0.01, weight_decay=0.1, momentum=0.95)
        for _ in range(20):
            muon.zero_grad()
            q = Y[b] * (torch.relu(X[b] @ leaves[0].T) ** 2 @ leaves[1].T)[:, 0]
            torch.nn.functional.softplus(-q).sum().backward()
            muon.step()
        w = torch.cat([leaf.detach().flatten() for leaf in leaves])
        assert (run.final.w[b] - w).norm() <= 1e-2 * w.norm()
        assert (run.final.w[b] - w).norm() <= 5e-2 * (w - w0[b]).norm()


def test_singular_values_of_a_step_are_one_above_the_rank_and_zero_below():
    """Three examples give the gradient of a (6, 5) matrix rank 3; also at Λ ≈ 5000."""
    net = fs.Linear(5, outputs=6)
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).double()
    problem = fs.Problem(net, x, [0, 1, 2], fs.cross_entropy)
    classes = torch.eye(6).double()[:3]
    far = (6e3 * torch.linalg.pinv(x) @ classes).T.flatten()[None]
    assert float(problem.lam(far)) > 4000
    for w in (net.init(0), far):
        rule = fs.Muon(1.0)
        state = rule.start(problem, w)
        moved = rule.step(problem, rule.bound(problem), state)
        s = torch.linalg.svdvals((moved.w - w).view(6, 5))
        rank = (
            3
            if w is not far
            else int((torch.linalg.svdvals(state.memory["ascent"].view(6, 5)) > 1e-14).sum())
        )
        # a difference of weights of size 10³ has lost their rounding
        rounding = 1e-12 + 4 * torch.finfo(w.dtype).eps * float(w.abs().max())
        assert (s[:rank] - 1).abs().max() <= rounding
        assert s[rank:].max() <= rounding


def test_without_momentum_muon_is_normalised_modular_descent():
    problem, w0 = setting()
    muon = fs.simulate(problem, fs.Muon(0.02, 0.0), w0, until=fs.steps([30])).final
    plain = fs.SteepestDescent(fs.modular(NET.layout), 0.02, normalized=True)
    assert torch.allclose(
        muon.w, fs.simulate(problem, plain, w0, until=fs.steps([30])).final.w, rtol=1e-9
    )


def test_the_arclength_of_muon_is_the_sum_of_its_learning_rates():
    problem, w0 = setting()
    run = fs.simulate(problem, fs.Muon(0.02), w0, until=fs.steps([30]))
    assert run["arclength"][-1] == pytest.approx(0.6, rel=1e-10)


# Memory and errors

RULES = [
    fs.Muon(0.01),
    fs.Muon(0.01, polar=fs.NewtonSchulz()),
    fs.Shampoo(0.01),
    fs.Shampoo(0.01, 0.9, eps=1e-3),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.label)
def test_a_resumed_run_is_the_unbroken_one(rule, tmp_path):
    problem, w0 = setting()
    whole = fs.simulate(problem, rule, w0, until=fs.steps([10, 25])).final
    fs.simulate(problem, rule, w0, until=fs.steps([10]), directory=tmp_path)
    rest = fs.simulate(problem, rule, fs.load(tmp_path).final, until=fs.steps([25])).final
    assert torch.equal(whole.w, rest.w)


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.label)
def test_a_trajectory_alone_is_the_trajectory_in_a_batch(rule):
    problem, w0 = setting()
    batch = fs.simulate(problem, rule, w0, until=fs.steps([25])).final
    for b in range(2):
        part, start = setting(slice(b, b + 1))
        assert torch.allclose(
            fs.simulate(part, rule, start, until=fs.steps([25])).final.w[0], batch.w[b], rtol=1e-10
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fs.Muon(0), "Muon: got lr=0"),
        (lambda: fs.Muon(0.1, 1.0), r"Muon: got beta=1.0, expected a number in \[0, 1\)"),
        (lambda: fs.Muon(0.1, decay=-1), "Muon: got decay=-1"),
        (lambda: fs.Shampoo(-0.1), "Shampoo: got lr=-0.1"),
        (lambda: fs.Shampoo(0.1, 1.0), "Shampoo: got beta=1.0"),
        (
            lambda: fs.Shampoo(0.1, exponent=0.5),
            "Shampoo: got exponent=0.5, expected a number between 0 and ½",
        ),
        (lambda: fs.Shampoo(0.1, eps=-1), "Shampoo: got eps=-1"),
        (lambda: fs.NewtonSchulz(0), "NewtonSchulz: got steps=0"),
        (lambda: fs.NewtonSchulz(5, (1.0,)), "NewtonSchulz: got coefficients="),
    ],
)
def test_bad_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("option", "value"), [("nesterov", 1), ("polar", fs.NewtonSchulz), ("polar", "exact")]
)
def test_options_of_muon_have_types(option, value):
    with pytest.raises(TypeError, match=f"Muon: got {option}="):
        fs.Muon(0.1, **{option: value})
