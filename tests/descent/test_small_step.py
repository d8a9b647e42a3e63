"""Small steps of the steepest flow."""

import numpy as np
import pytest
import torch

import flowsim as fs
from tests.oracles.small_descents import NORMS, X, Y, iterates, setting


@pytest.mark.parametrize("norm", NORMS, ids=lambda n: n.name)
@pytest.mark.parametrize(("dlam", "relative"), [(0.01, 10.0), (10.0, 0.01)])
def test_a_small_step_is_bounded_by_its_gain_and_by_the_largest_weight(norm, dlam, relative):
    problem, w0 = setting()
    _, w = iterates(problem, fs.SmallStep(norm, dlam=dlam, relative=relative), w0, 1)
    move, h = w[1] - w[0], problem.ascent(w0)[1]
    gain, share = (h * move).sum(1), move.abs().amax(1) / w0.abs().amax(1)
    if dlam < 1:
        assert torch.allclose(gain, torch.tensor(dlam).double(), rtol=1e-9)
    else:
        assert torch.allclose(share, torch.tensor(relative).double(), rtol=1e-9)


def test_a_linear_model_may_start_at_zero():
    problem = fs.Problem(fs.Linear(5), X, Y, fs.exponential)
    run = fs.simulate(
        problem, fs.SmallStep(fs.L2()), torch.zeros(2, 5).double(), until=fs.lam([1.0]), strict=True
    )
    assert (run["lam"][-1] >= 1.0 - 1e-9).all()


def far_out():
    """Weights of a separating net, scaled until Λ is about 2000."""
    problem, w0 = setting()
    w = fs.simulate(
        problem, fs.SmallStep(fs.L2()), w0, until=fs.lam([5.0]), max_steps=5000, strict=True
    ).final.w
    return problem, w * (2000 / problem.lam(w))[:, None].sqrt()


@pytest.mark.parametrize("norm", [fs.L1(), fs.L2(), fs.Linf()], ids=lambda n: n.name)
def test_small_steps_go_on_where_the_loss_itself_is_zero(norm):
    problem, w = far_out()
    lam = problem.lam(w)
    assert (torch.exp(-lam) == 0).all()
    run = fs.simulate(problem, fs.SmallStep(norm), w, until=fs.steps(100), strict=True)
    assert (run["lam"][-1] > run["lam"][0] + 1).all()
    assert np.isfinite(run["log_time"][1:]).all()
    assert (np.diff(run["log_time"][1:], axis=0) > 0).all()


def test_a_path_of_small_steps_tends_to_the_flow():
    problem, w0 = setting(net=fs.MLP([5, 8, 1], activation=fs.squared_relu))
    flow = fs.simulate(
        problem, fs.SteepestFlow(fs.L2(), rtol=1e-8), w0, until=fs.arclength([1.0]), strict=True
    )
    errors = []
    for dlam in (0.02, 0.01, 0.005):
        run = fs.simulate(
            problem, fs.SmallStep(fs.L2(), dlam=dlam), w0, until=fs.arclength([1.0]), strict=True
        )
        errors.append(np.abs(run.weights[-1] - flow.weights[-1]).max())
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.3)
    assert errors[1] / errors[2] == pytest.approx(2, abs=0.3)
