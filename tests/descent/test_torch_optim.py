"""Optimisers of torch behind the seam: the same as outside of flowsim, and as flowsim's own."""

import numpy as np
import pytest
import torch

import flowsim as fs

X, Y = fs.data.gaussian_separable(12, 5, margin=0.5, seed=range(2))
NET = fs.MLP([5, 6, 1], activation=fs.relu)
OPTIMISERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, dampening=0.5),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=1e-2),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


def setting(rows=slice(None)):
    return fs.Problem(NET, X[rows], Y[rows], fs.logistic), NET.init(range(2))[rows]


def outside(make, b, steps, blocks):
    w0 = NET.init(range(2))[b]
    leaves = [block.of(w0).clone() for block in NET.layout] if blocks else [w0.clone()]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    optimiser = make(leaves)
    for _ in range(steps):
        optimiser.zero_grad()
        W, a = leaves if blocks else (leaves[0][:30].view(6, 5), leaves[0][30:].view(1, 6))
        torch.nn.functional.softplus(-Y[b] * (torch.relu(X[b] @ W.T) @ a.T)[:, 0]).sum().backward()
        optimiser.step()
    return torch.cat([leaf.detach().flatten() for leaf in leaves])


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_run_is_the_one_outside(name, blocks):
    problem, w0 = setting()
    rule = fs.TorchOptimiser(OPTIMISERS[name], blocks=blocks)
    run = fs.simulate(problem, rule, w0, until=fs.steps([40]), strict=True)
    for b in range(2):
        assert torch.allclose(
            run.final.w[b], outside(OPTIMISERS[name], b, 40, blocks), rtol=1e-10, atol=1e-12
        )


@pytest.mark.parametrize("rows", [slice(1), slice(None)], ids=["alone", "batch"])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_resumed_run_is_the_unbroken_one(name, rows, tmp_path, agree):
    problem, w0 = setting(rows)
    rule = fs.TorchOptimiser(OPTIMISERS[name])
    whole = fs.simulate(problem, rule, w0, until=fs.steps([10, 25])).final
    fs.simulate(problem, rule, w0, until=fs.steps([10]), directory=tmp_path)
    rest = fs.simulate(problem, rule, fs.load(tmp_path).final, until=fs.steps([25])).final
    agree(rest.w, whole.w, rel=0 if len(w0) == 1 else 1e-9)


def test_it_is_an_oracle_of_flowsims_own():
    problem, w0 = setting()
    theirs = fs.TorchOptimiser(lambda p: torch.optim.Adam(p, lr=1e-2), lr=1e-2, norm=fs.Linf())
    runs = [
        fs.simulate(problem, rule, w0, until=fs.steps(range(1, 101)))
        for rule in (theirs, fs.Adam(1e-2))
    ]
    for name in ("lam", "log_time", "arclength", "relative", "dissipated", "steps"):
        assert runs[0][name][1:] == pytest.approx(runs[1][name][1:], rel=1e-9), name
    assert np.abs(runs[0].weights - runs[1].weights).max() < 1e-12


def test_it_switches_with_other_rules():
    problem, w0 = setting()
    at = fs.Event(lambda problem, state: state.readings["steps"], 5.0)
    sgd = fs.TorchOptimiser(lambda p: torch.optim.SGD(p, lr=1e-3))
    run = fs.simulate(
        problem, fs.Switch(sgd, fs.GradientDescent(1e-3), at), w0, until=fs.steps([12])
    )
    plain = fs.simulate(problem, fs.GradientDescent(1e-3), w0, until=fs.steps([12]))
    assert torch.allclose(run.final.w, plain.final.w, rtol=1e-12)


def test_it_sees_zeros_where_the_gradient_underflows():
    problem = fs.Problem(fs.Linear(1), [[1.0]], [1], fs.exponential)
    rule = fs.TorchOptimiser(lambda p: torch.optim.SGD(p, lr=1.0), lr=1.0)
    final = fs.simulate(
        problem, rule, torch.full((1, 1), 800.0).double(), until=fs.steps([3])
    ).final
    assert final.w.item() == 800.0
    assert final.readings["steps"].item() == 3


def test_a_trajectory_alone_is_the_trajectory_in_a_batch(agree):
    problem, w0 = setting()
    rule = fs.TorchOptimiser(OPTIMISERS["Adam"])
    batch = fs.simulate(problem, rule, w0, until=fs.lam([-1.8]), max_steps=40).final
    for b in range(2):
        part, start = setting(slice(b, b + 1))
        alone = fs.simulate(part, rule, start, until=fs.lam([-1.8]), max_steps=40)
        agree(alone.final.w[0], batch.w[b])


def test_a_diverging_run_is_a_status():
    problem, w0 = setting()
    rule = fs.TorchOptimiser(lambda p: torch.optim.SGD(p, lr=1e200))
    run = fs.simulate(problem, rule, w0, until=fs.steps([30]))
    assert run.statuses == [fs.Status.NONFINITE] * 2
    assert torch.isfinite(run.final.w).all()


@pytest.mark.parametrize("make", [None, lambda p: p, "SGD"])
def test_what_makes_no_optimiser_is_refused(make):
    with pytest.raises(TypeError, match="TorchOptimiser: got .*expected a function"):
        fs.TorchOptimiser(make)


def test_an_optimiser_that_keeps_lists_is_refused():
    problem, w0 = setting()
    with pytest.raises(
        ValueError, match="TorchOptimiser: LBFGS of torch cannot step from a gradient alone"
    ):
        fs.simulate(
            problem, fs.TorchOptimiser(lambda p: torch.optim.LBFGS(p)), w0, until=fs.steps([1])
        )


def test_the_time_of_a_step_is_positive():
    with pytest.raises(ValueError, match="TorchOptimiser: got lr=0"):
        fs.TorchOptimiser(OPTIMISERS["SGD"], lr=0)
