"""Discrete training: step for step what it says, at every scale of the loss."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

import flowsim as fs
from tests.oracles.small_descents import NET, NORMS, X, Y, gradient, iterates, setting


@pytest.mark.parametrize("loss", [fs.exponential, fs.logistic], ids=lambda loss: loss.name)
def test_gradient_descent_is_torch_sgd_step_for_step(loss):
    problem, w0 = setting(loss)
    _, w = iterates(problem, fs.GradientDescent(2e-3), w0, 200)
    for b in range(2):
        module = torch.nn.Sequential(
            torch.nn.Linear(5, 8, bias=False), torch.nn.ReLU(), torch.nn.Linear(8, 1, bias=False)
        )
        module.double()
        blocks = [block.of(w0[b]) for block in NET.layout]
        for parameter, block in zip(module.parameters(), blocks, strict=True):
            parameter.data = block.clone()
        sgd = torch.optim.SGD(module.parameters(), lr=2e-3)
        for k in range(201):
            flat = torch.cat([p.detach().flatten() for p in module.parameters()])
            assert torch.allclose(w[k, b], flat, rtol=1e-12, atol=1e-13), k
            sgd.zero_grad()
            q = Y[b] * module(X[b])[:, 0]
            total = (
                torch.exp(-q).sum()
                if loss is fs.exponential
                else torch.nn.functional.softplus(-q).sum()
            )
            total.backward()
            sgd.step()


def test_sign_descent():
    problem, w0 = setting()
    _, w = iterates(problem, fs.SignDescent(1e-3, normalized=True), w0, 30)
    for now, then in pairwise(w):
        assert torch.allclose(then, now - 1e-3 * gradient(problem, now).sign(), rtol=0, atol=1e-15)


def test_sign_descent_without_normalisation_is_scaled_by_the_l1_norm_of_the_gradient():
    problem, w0 = setting()
    _, w = iterates(problem, fs.SignDescent(1e-6), w0, 30)
    for now, then in pairwise(w):
        g = gradient(problem, now)
        assert torch.allclose(
            then - now, -1e-6 * g.abs().sum(1, keepdim=True) * g.sign(), rtol=1e-9, atol=1e-15
        )


@pytest.mark.parametrize("normalized", [True, False])
def test_coordinate_descent_moves_the_one_coordinate_of_largest_gradient(normalized):
    problem, w0 = setting()
    _, w = iterates(problem, fs.CoordinateDescent(1e-3, normalized=normalized), w0, 50)
    for now, then in pairwise(w):
        g = gradient(problem, now)
        largest = g.abs().argmax(1)
        assert ((then != now).sum(1) == 1).all()
        moved = (then - now).gather(1, largest[:, None])[:, 0]
        expected = -1e-3 * g.gather(1, largest[:, None])[:, 0]
        expected = 1e-3 * expected.sign() if normalized else expected
        assert torch.allclose(moved, expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("norm", NORMS, ids=lambda n: n.name)
def test_a_step_has_the_steepest_direction_and_the_length_that_is_asked_for(norm):
    problem, w0 = setting()
    bound = norm.bind(problem.layout)
    g = gradient(problem, w0)
    for normalized in (False, True):
        _, w = iterates(problem, fs.SteepestDescent(norm, 1e-4, normalized), w0, 1)
        move = w[1] - w[0]
        length = 1e-4 * (torch.ones(2) if normalized else bound.dual(g))
        assert torch.allclose(bound.value(move), length.double(), rtol=1e-8)
        assert torch.allclose((-g * move).sum(1), length * bound.dual(g), rtol=1e-8)


@pytest.mark.parametrize("norm", NORMS, ids=lambda n: n.name)
def test_flow_time_is_lr_times_steps_and_normalised_arclength_is_lr_times_steps(norm):
    problem, w0 = setting()
    run, _ = iterates(problem, fs.SteepestDescent(norm, 1e-5), w0, 40)
    assert np.exp(run["log_time"][1:]) == pytest.approx(1e-5 * run["steps"][1:], rel=1e-12)
    run, w = iterates(problem, fs.SteepestDescent(norm, 1e-3, True), w0, 40)
    assert run["arclength"] == pytest.approx(1e-3 * run["steps"], rel=1e-12)
    # the time that the flow takes for a step of this length at the force where it starts
    force = norm.bind(problem.layout).dual(gradient(problem, w[0]))
    assert np.exp(run["log_time"][1]) == pytest.approx((1e-3 / force).numpy(), rel=1e-10)


@pytest.mark.parametrize("norm", NORMS, ids=lambda n: n.name)
def test_arclength_and_relative_arclength_add_up_the_steps(norm):
    problem, w0 = setting()
    run, w = iterates(problem, fs.SmallStep(norm), w0, 30)
    bound = norm.bind(problem.layout)
    length = bound.value(w[1:] - w[:-1])
    size = (bound.value(w[1:]) + bound.value(w[:-1])) / 2
    assert run["arclength"][1:] == pytest.approx(length.cumsum(0).numpy(), rel=1e-10)
    assert run["relative"][1:] == pytest.approx((length / size).cumsum(0).numpy(), rel=1e-10)


def far_out():
    """Weights of a separating net, scaled until Λ is about 2000."""
    problem, w0 = setting()
    w = fs.simulate(
        problem, fs.SmallStep(fs.L2()), w0, until=fs.lam([5.0]), max_steps=5000, strict=True
    ).final.w
    return problem, w * (2000 / problem.lam(w))[:, None].sqrt()


def test_normalised_descent_goes_on_where_the_gradient_itself_is_zero():
    problem, w = far_out()
    assert (gradient(problem, w) == 0).all()
    run = fs.simulate(
        problem, fs.SignDescent(1e-4, normalized=True), w, until=fs.steps(20), strict=True
    )
    assert (run["lam"][-1] > run["lam"][0]).all()


def test_descent_that_no_longer_moves_stops_at_the_precision_floor_where_it_was():
    problem, w = far_out()
    run = fs.simulate(problem, fs.GradientDescent(1.0), w, until=fs.steps(20))
    assert run.statuses == [fs.Status.PRECISION_FLOOR] * 2
    assert torch.equal(run.final.w, w)
    assert run.final.readings["arclength"].tolist() == [0.0, 0.0]
    assert run.final.readings["steps"].tolist() == [0.0, 0.0]


# Options


def final(rule, **options):
    problem, w0 = setting()
    options = {"until": fs.steps(25)} | options
    return fs.simulate(problem, rule, w0, **options).final.w


@pytest.mark.parametrize(
    ("rule", "other"),
    [
        (fs.SmallStep(fs.L2()), fs.SmallStep(fs.L2(), dlam=0.01)),
        (fs.SmallStep(fs.L2(), dlam=1.0), fs.SmallStep(fs.L2(), dlam=1.0, relative=0.01)),
        (fs.SmallStep(fs.L2()), fs.SmallStep(fs.Linf())),
        (fs.GradientDescent(1e-3), fs.GradientDescent(2e-3)),
        (fs.GradientDescent(1e-3), fs.GradientDescent(1e-3, normalized=True)),
        (fs.SignDescent(1e-5), fs.SignDescent(1e-5, normalized=True)),
        (fs.CoordinateDescent(1e-3), fs.CoordinateDescent(1e-3, normalized=True)),
        (fs.GradientDescent(1e-3), fs.CoordinateDescent(1e-3)),
    ],
)
def test_every_option_changes_the_result(rule, other):
    assert not torch.equal(final(rule), final(other))
    assert rule.label != other.label or "relative" in repr(rule)


def test_max_steps_changes_the_result():
    assert not torch.equal(
        final(fs.GradientDescent(1e-3)), final(fs.GradientDescent(1e-3), max_steps=9)
    )


@pytest.mark.parametrize(
    "value", [0, -1.0, math.nan, math.inf, "0.1", True, None, torch.tensor(0.1)]
)
@pytest.mark.parametrize("name", ["lr", "dlam", "relative"])
def test_step_sizes_must_be_finite_positive_numbers(name, value):
    rule = fs.SteepestDescent if name == "lr" else fs.SmallStep
    with pytest.raises(
        ValueError, match=rf"^{rule.__name__}: got {name}=.*expected a finite number > 0"
    ):
        rule(fs.L2(), **{name: value})


@pytest.mark.parametrize("make", [fs.GradientDescent, fs.SignDescent, fs.CoordinateDescent])
def test_named_rules_check_their_learning_rate(make):
    with pytest.raises(ValueError, match="got lr=-1"):
        make(-1)


@pytest.mark.parametrize("norm", [fs.L2, "l2", None, 2])
@pytest.mark.parametrize("make", [lambda n: fs.SmallStep(n), lambda n: fs.SteepestDescent(n, 0.1)])
def test_a_norm_must_be_an_instance(make, norm):
    with pytest.raises(
        TypeError, match=r"got norm=.*expected a flowsim norm, try flowsim\.Linf\(\)"
    ):
        make(norm)


def test_normalized_must_be_a_truth_value():
    with pytest.raises(TypeError, match="got normalized='no', expected True or False"):
        fs.GradientDescent(0.1, normalized="no")


def test_a_rule_shows_its_label_and_what_it_is_made_of():
    shown = fs.SignDescent(fs.Decay(0.1))._repr_html_()
    assert shown.startswith(
        "<b>sign descent, lr = 0.1·(k + 1)^(−0.5)</b><br><code>SteepestDescent("
    )
