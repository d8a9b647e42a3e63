"""Learning rates: what each step is worth, by logarithms, and the age that they count."""

import math
from itertools import pairwise

import pytest
import torch

import flowsim as fs
from flowsim.descent.learning_rates import Constant, as_learning_rate

X, Y = fs.data.gaussian_separable(20, 5, margin=0.5, seed=range(2))
NET = fs.MLP([5, 8, 1], activation=fs.relu)
RULES = {
    "gradient": (fs.GradientDescent, fs.L2()),
    "sign": (fs.SignDescent, fs.Linf()),
    "coordinate": (fs.CoordinateDescent, fs.L1()),
    "l3": (lambda lr, normalized=False: fs.SteepestDescent(fs.Lp(3.0), lr, normalized), fs.Lp(3.0)),
}
SCHEDULES = {
    "decay": (fs.Decay(1e-3, power=0.7, delay=2), lambda k, loss: 1e-3 * (k + 2) ** -0.7),
    "per step": (fs.PerStep([1e-3, 3e-3, 2e-3]), lambda k, loss: [1e-3, 3e-3, 2e-3][min(k, 2)]),
    "loss": (fs.LossBased(1e-3), lambda k, loss: 1e-3 / loss),
    "loss decay": (fs.LossBased(fs.Decay(1e-3, power=1.0)), lambda k, loss: 1e-3 / (k + 1) / loss),
}


def setting():
    return fs.Problem(NET, X, Y, fs.exponential), NET.init(range(2), scale=0.3)


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_steps_are_those_of_the_formula(rule, schedule, normalized):
    """Against w ← w − η‖g‖_*·u or w ← w − η·u, written with 𝓛 and ∇𝓛 themselves."""
    problem, w = setting()
    (make, norm), (lr, rate) = RULES[rule], SCHEDULES[schedule]
    run = fs.simulate(problem, make(lr, normalized=normalized), w, until=fs.steps(range(1, 31)))
    time = torch.zeros(2).double()
    for k in range(30):
        lam, h = problem.ascent(w)
        loss = torch.exp(-lam)
        g = -loss[:, None] * h
        eta = torch.stack([torch.as_tensor(rate(k, value), dtype=torch.float64) for value in loss])
        time += eta
        w = w - (eta if normalized else eta * norm.dual(g))[:, None] * norm.steepest(g)
        assert torch.allclose(torch.from_numpy(run.weights[k + 1]), w, rtol=1e-11, atol=1e-13), k
        clock = run["arclength"][k + 1] if normalized else run["log_time"][k + 1]
        assert torch.allclose(
            torch.from_numpy(clock), time if normalized else time.log(), rtol=1e-11
        ), k


def test_dividing_by_the_loss_goes_on_where_the_loss_is_zero():
    """At Λ = 5000 a step is lr·∇Λ, and log t about Λ."""
    problem = fs.Problem(fs.Linear(2), [[1.0, 0.2], [0.5, 1.0]], [1, 1], fs.exponential)
    w0 = torch.tensor([[5000.0, 4000.0]]).double()
    run = fs.simulate(
        problem, fs.GradientDescent(fs.LossBased(0.1)), w0, until=fs.steps([1]), strict=True
    )
    lam, h = problem.ascent(w0)
    assert float(lam) > 5000
    assert torch.allclose(run.final.w - w0, 0.1 * h, rtol=1e-8)
    assert run["log_time"][-1] == pytest.approx((lam + math.log(0.1)).numpy(), rel=1e-12)


def test_a_resumed_run_goes_on_in_the_schedule_and_another_rule_begins_it():
    problem, w0 = setting()
    lr = fs.Decay(0.01, power=1.0)
    rule = fs.GradientDescent(lr, normalized=True)
    whole = fs.simulate(problem, rule, w0, until=fs.steps([30])).final
    half = fs.simulate(problem, rule, w0, until=fs.steps([12])).final
    assert torch.equal(fs.simulate(problem, rule, half, until=fs.steps([30])).final.w, whole.w)
    other = fs.simulate(
        problem, fs.SignDescent(lr, normalized=True), half, until=fs.steps([13])
    ).final
    assert torch.allclose((other.w - half.w).abs().amax(1), torch.tensor(0.01).double(), rtol=1e-9)


def test_trajectories_that_begin_at_different_times_have_schedules_of_their_own(agree):
    problem, w0 = setting()
    rule = fs.GradientDescent(fs.Decay(0.05, power=1.0), normalized=True)
    run = fs.simulate(problem, rule, w0, until=fs.arclength([0.1, 0.15, 0.2]))
    for b in range(2):
        part = problem.select(torch.tensor([b]))
        alone = fs.simulate(part, rule, w0[b : b + 1], until=fs.arclength([0.1, 0.15, 0.2]))
        agree(alone.final.w[0], run.final.w[b])


def test_a_sum_of_decaying_steps():
    rates = torch.exp(
        fs.Decay(0.3, power=1.0).log(torch.arange(100).double(), torch.zeros(100).double())
    )
    assert float(rates.sum()) == pytest.approx(0.3 * sum(1 / k for k in range(1, 101)), rel=1e-13)
    assert all(a > b for a, b in pairwise(rates.tolist()))


@pytest.mark.parametrize("lr", [0.1, 3, fs.Decay(0.1), fs.LossBased(0.1), fs.PerStep([0.1])])
def test_labels_name_the_learning_rate(lr):
    assert fs.GradientDescent(lr).label == f"gradient descent, {as_learning_rate('rule', lr).label}"


def test_numbers_are_constant_schedules():
    assert as_learning_rate("rule", 0.1) == Constant(0.1)


# Errors


@pytest.mark.parametrize(
    "lr", ["cosine", None, 0, -0.1, math.inf, math.nan, True, [0.1, 0.2], lambda k: 0.1]
)
def test_unknown_learning_rates_are_refused(lr):
    with pytest.raises(
        ValueError, match=r"SteepestDescent: got lr=.*expected a finite number > 0 or a schedule"
    ):
        fs.GradientDescent(lr)
    with pytest.raises(
        ValueError, match=r"LossBased: got lr=.*expected a finite number > 0 or a schedule"
    ):
        fs.LossBased(lr)


@pytest.mark.parametrize("option", ["lr", "power", "delay"])
@pytest.mark.parametrize("value", [0, -1.0, math.nan, "1"])
def test_options_of_decay_are_positive_numbers(option, value):
    with pytest.raises(ValueError, match=f"Decay: got {option}=.*expected a finite number > 0"):
        fs.Decay(**({"lr": 0.1} | {option: value}))


@pytest.mark.parametrize("values", [[], 3, "0.1", None])
def test_a_sequence_of_steps_is_not_empty(values):
    with pytest.raises(ValueError, match="PerStep: got lr=.*expected a non-empty sequence"):
        fs.PerStep(values)


def test_a_sequence_names_the_bad_entry():
    with pytest.raises(ValueError, match=r"PerStep: got lr\[1\]=-2"):
        fs.PerStep([1, -2])


def test_dividing_by_a_loss_that_may_be_negative_is_refused():
    bowl = fs.Quadratic(torch.eye(2).double(), torch.ones(2).double())
    rule = fs.GradientDescent(fs.LossBased(0.1))
    with pytest.raises(ValueError, match="expected a positive loss, try lr=0.1"):
        fs.simulate(bowl, rule, torch.zeros(1, 2).double(), until=fs.steps([1]))
