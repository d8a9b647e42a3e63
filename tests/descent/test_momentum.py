"""Momentum: step for step that of torch.optim, in every norm what its formula says, at every scale
of the loss."""

import math

import numpy as np
import pytest
import torch

import flowsim as fs

X, Y = fs.data.gaussian_separable(20, 5, margin=0.5, seed=range(2))
NET = fs.MLP([5, 8, 1], activation=fs.relu)
KINDS = [fs.HeavyBall(0.9), fs.Nesterov(0.8), fs.Average(0.95)]


def setting(rows=slice(None)):
    return fs.Problem(NET, X[rows], Y[rows], fs.logistic), NET.init(range(2))[rows]


def gradient(problem, w):
    lam, h = problem.ascent(w)
    return -torch.exp(-lam)[:, None] * h


@pytest.mark.parametrize(
    ("momentum", "options"),
    [
        (fs.HeavyBall(0.9), {"momentum": 0.9}),
        (fs.Nesterov(0.8), {"momentum": 0.8, "nesterov": True}),
    ],
)
def test_gradient_descent_with_momentum_is_torch_sgd_step_for_step(momentum, options):
    problem, w0 = setting()
    rule = fs.GradientDescent(2e-3, momentum=momentum)
    run = fs.simulate(problem, rule, w0, until=fs.steps(range(1, 201)), strict=True)
    for b in range(2):
        w = w0[b].clone().requires_grad_()
        sgd = torch.optim.SGD([w], lr=2e-3, **options)
        for k in range(201):
            expected = w.detach().numpy()
            assert np.abs(run.weights[k, b] - expected).max() <= 1e-12 * np.abs(expected).max(), k
            sgd.zero_grad()
            q = Y[b] * (torch.relu(X[b] @ w[:40].view(8, 5).T) @ w[40:])
            torch.nn.functional.softplus(-q).sum().backward()
            sgd.step()


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("momentum", KINDS)
@pytest.mark.parametrize(
    "norm", [fs.L1(), fs.L2(), fs.Linf(), fs.Lp(3.0), fs.modular(NET.layout)], ids=lambda n: n.name
)
def test_steps_follow_the_average(norm, momentum, normalized):
    problem, w = setting()
    rule = fs.SteepestDescent(norm, 1e-4, normalized, momentum=momentum, decay=0.3)
    run = fs.simulate(problem, rule, w, until=fs.steps(range(1, 26)))
    m, beta = torch.zeros_like(w), momentum.beta
    for k in range(25):
        g = gradient(problem, w)
        m = beta * m + (1 - beta if isinstance(momentum, fs.Average) else 1) * g
        v = g + beta * m if isinstance(momentum, fs.Nesterov) else m
        strength = torch.ones(2).double() if normalized else norm.dual(v)
        w = w - 1e-4 * strength[:, None] * norm.steepest(v) - 1e-4 * 0.3 * w
        assert torch.allclose(torch.from_numpy(run.weights[k + 1]), w, rtol=1e-9, atol=1e-13), k


def far_out():
    """A linear model at Λ ≈ 5000, where loss and gradient are zero in any float."""
    problem = fs.Problem(fs.Linear(2), [[1.0, 0.2], [0.5, 1.0]], [1, 1], fs.exponential)
    return problem, torch.tensor([[5000.0, 4000.0]]).double()


@pytest.mark.parametrize("momentum", KINDS)
@pytest.mark.parametrize("norm", [fs.L2(), fs.Linf()], ids=lambda n: n.name)
def test_normalised_steps_do_not_depend_on_the_scale_of_the_loss(norm, momentum):
    """A move along which all margins grow alike only scales the loss."""
    problem, far = far_out()
    shift = torch.linalg.solve(problem.x, torch.full((2,), 4000.0).double())
    rule = fs.SteepestDescent(norm, 0.1, True, momentum=momentum)
    moves = [
        fs.simulate(problem, rule, w, until=fs.steps([40]), strict=True).final.w - w
        for w in (far, far - shift)
    ]
    assert (problem.lam(far) - problem.lam(far - shift)).item() == pytest.approx(4000, rel=1e-9)
    assert torch.allclose(*moves, rtol=1e-8)


def test_a_loss_based_learning_rate_has_the_momentum_of_the_true_gradients():
    problem, w0 = far_out()
    rule = fs.GradientDescent(fs.LossBased(1.0), momentum=fs.HeavyBall(0.5))
    run = fs.simulate(problem, rule, w0, until=fs.steps([1, 2]), strict=True)
    w = torch.from_numpy(run.weights)
    (lam0, h0), (lam1, h1) = problem.ascent(w[0]), problem.ascent(w[1])
    assert torch.allclose(w[2] - w[1], h1 + 0.5 * torch.exp(lam1 - lam0)[:, None] * h0, rtol=1e-7)


# The map of clocks


@pytest.mark.parametrize("momentum", KINDS)
def test_time_is_the_sum_of_learning_rates_times_the_gain(momentum):
    problem, w0 = setting()
    run = fs.simulate(
        problem, fs.GradientDescent(1e-4, momentum=momentum), w0, until=fs.steps([30])
    )
    gain = 1 if isinstance(momentum, fs.Average) else 1 / (1 - momentum.beta)
    assert np.exp(run["log_time"][-1]) == pytest.approx(30e-4 * gain, rel=1e-12)


@pytest.mark.parametrize("momentum", KINDS)
def test_at_equal_times_descent_with_momentum_tends_to_the_flow(momentum):
    """𝓛 = e^{−w}: w(t) = log(1 + t), to first order in the learning rate."""
    problem, errors = fs.Problem(fs.Linear(1), [[1.0]], [1], fs.exponential), []
    for lr in (2e-3, 1e-3, 5e-4):
        rule = fs.GradientDescent(lr / momentum.gain, momentum=momentum)
        final = fs.simulate(problem, rule, torch.zeros(1, 1).double(), until=fs.time([2.0])).final
        errors.append(abs(float(final.w) - math.log1p(math.exp(float(final.readings["log_time"])))))
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.2)
    assert errors[1] / errors[2] == pytest.approx(2, abs=0.2)


def test_signum_has_the_arclength_of_its_learning_rates():
    problem, w0 = setting()
    run = fs.simulate(problem, fs.Signum(1e-3), w0, until=fs.steps([25]))
    assert run["arclength"][-1] == pytest.approx(25e-3, rel=1e-12)
    assert np.isfinite(run["log_time"][-1]).all()


# Ends and memory


def test_momentum_carries_weights_through_a_point_without_a_gradient():
    bowl = fs.Quadratic(torch.eye(1).double(), torch.zeros(1).double())
    rule = fs.GradientDescent(1.0, momentum=fs.HeavyBall(0.5))
    run = fs.simulate(bowl, rule, torch.ones(1, 1).double(), until=fs.steps([1, 2, 3]))
    assert run.weights[:, 0, 0] == pytest.approx([1.0, 0.0, -0.5, -0.25], rel=1e-14)
    assert run.statuses == [fs.Status.DONE]


def test_sign_descent_with_decay_comes_to_rest_in_its_ball():
    """Frank–Wolfe steps: min ½|w − w*|² over |w|_∞ ≤ 1/λ is w* clipped."""
    target = torch.tensor([5.0, -0.5, 0.3, -7.0]).double()
    bowl = fs.Quadratic(torch.eye(4).double(), target)
    gap = fs.frank_wolfe_gap(fs.Linf(), 2.0)
    rule = fs.Signum(fs.Decay(1.0, power=0.8), beta=0.5, decay=0.5)
    run = fs.simulate(
        bowl, rule, torch.zeros(1, 4).double(), until=fs.steps([5000]), observe={"gap": gap}
    )
    assert torch.allclose(run.final.w, target.clamp(-2, 2), atol=5e-3)
    assert abs(run["gap"][-1, 0]) <= 2e-2 < run["gap"][0, 0]


@pytest.mark.parametrize("momentum", KINDS)
def test_a_resumed_run_is_the_unbroken_one(momentum, tmp_path):
    problem, w0 = setting()
    rule = fs.SteepestDescent(fs.Linf(), 1e-3, True, momentum=momentum)
    whole = fs.simulate(problem, rule, w0, until=fs.steps([20, 50])).final
    fs.simulate(problem, rule, w0, until=fs.steps([20]), directory=tmp_path)
    rest = fs.simulate(problem, rule, fs.load(tmp_path).final, until=fs.steps([50])).final
    assert torch.equal(whole.w, rest.w)
    assert torch.equal(whole.memory["momentum"], rest.memory["momentum"])


@pytest.mark.parametrize("momentum", KINDS)
def test_a_trajectory_alone_is_the_trajectory_in_a_batch(momentum, agree):
    problem, w0 = setting()
    rule = fs.GradientDescent(1e-3, momentum=momentum)
    batch = fs.simulate(problem, rule, w0, until=fs.steps([30])).final
    for b in range(2):
        part, start = setting(slice(b, b + 1))
        agree(fs.simulate(part, rule, start, until=fs.steps([30])).final.w[0], batch.w[b])


@pytest.mark.parametrize("kind", [fs.HeavyBall, fs.Nesterov, fs.Average])
@pytest.mark.parametrize("beta", [1.0, 1.5, -0.1, math.nan, "0.9", None])
def test_beta_is_below_one(kind, beta):
    with pytest.raises(
        ValueError, match=rf"{kind.__name__}: got beta=.*expected a number in \[0, 1\), try 0.9"
    ):
        kind(beta)


@pytest.mark.parametrize("momentum", [0.9, fs.HeavyBall, "heavy"])
def test_momentum_is_one_of_its_kinds(momentum):
    with pytest.raises(TypeError, match="SteepestDescent: got momentum=.*try flowsim.HeavyBall"):
        fs.GradientDescent(0.1, momentum=momentum)
