"""What discrete rules share: how they fail, and where they stop."""

import numpy as np
import torch

import flowsim as fs
from tests.oracles.small_descents import setting


def test_a_diverging_learning_rate_ends_as_nonfinite_with_the_path_and_the_last_finite_state():
    problem, w0 = setting()
    run = fs.simulate(problem, fs.GradientDescent(1e6), w0, until=fs.steps(range(1, 60)))
    assert run.statuses == [fs.Status.NONFINITE] * 2
    assert torch.isfinite(run.final.w).all()
    assert torch.isfinite(problem.lam(run.final.w)).all()
    for b in range(2):
        taken = int(run.final.readings["steps"][b])
        assert np.isfinite(run["lam"][: taken + 1, b]).all()
        assert np.isnan(run["lam"][taken + 1 :, b]).all()
        assert np.array_equal(run.weights[taken, b], run.final.w[b].numpy())


def test_a_start_without_a_gradient_is_stationary():
    problem, w0 = setting()
    w0[1] = 0
    run = fs.simulate(problem, fs.GradientDescent(1e-3), w0, until=fs.steps(5))
    assert run.statuses == [fs.Status.DONE, fs.Status.STATIONARY]
    assert (run.final.w[1] == 0).all()
