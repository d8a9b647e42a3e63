"""Step sizes, and how every method ends where it cannot go on."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import flowsim as fs
from flowsim.flow.explicit import BOSH3, DOPRI5
from flowsim.flow.field import Field
from flowsim.flow.steps import Controller, error_of_weights, excess_of, stop_if_stuck
from flowsim.layout import lay_out
from flowsim.motion.clocks import ARCLENGTH
from tests.oracles.scipy_flows import (
    by_arclength,
    distance,
    setting,
)


def factors(control, excess, **options):
    return control.factor(torch.tensor(excess, dtype=torch.float64), **options).tolist()


def test_the_next_step_size_follows_from_the_error_within_its_bounds():
    control = Controller(order=2, safety=0.8, least=0.2, most=3.0, retry=0.7, broken=0.4)
    excess = [0.25, 1e-9, 1.0, 1.0001, 4.0, 1e6, math.inf]
    expected = [1.6, 3.0, 0.8, 0.7, 0.4, 0.2, 0.4]
    assert factors(control, excess) == pytest.approx(expected)


def test_damping_looks_at_the_error_before_and_refusals_stop_growth():
    control = Controller(order=3, damping=0.1)
    before = torch.tensor([0.5, 0.01, 0.5], dtype=torch.float64)
    refused = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    found = factors(control, [0.1, 0.1, 0.1], before=before, refused=refused)
    plain = 0.9 * 0.1 ** (-1.1 / 3)
    assert found == pytest.approx([plain * 0.5 ** (0.2 / 3), plain * 0.01 ** (0.2 / 3), 1.0])


def test_an_error_is_measured_by_the_larger_end_and_by_what_else_is_to_be_small():
    problem, w = setting()
    field = Field(fs.L2(), ARCLENGTH, rtol=1e-3, atol=1e-2)
    last, error = field(problem, w), torch.full_like(w, 1e-3)
    tolerance = 1e-2 + 1e-3 * 2 * float(w.norm())
    weights = float(error.norm()) / tolerance
    assert float(error_of_weights(field, w, 2 * w, error)) == pytest.approx(weights)
    level = torch.tensor([0.5], dtype=torch.float64)
    assert float(excess_of(field, w, 2 * w, error, last, level)) == pytest.approx(500.0)
    assert float(excess_of(field, w, 2 * w, error * math.nan, last)) == math.inf


def test_a_step_within_rounding_of_the_weights_is_the_end():
    problem, w = setting()
    w = w.expand(3, -1).clone()
    state = fs.SteepestFlow(fs.L2()).start(problem, w)
    move = torch.tensor([1e-3, 1e-18, 1e-18], dtype=torch.float64)
    finite = torch.tensor([True, True, False])
    expected = [fs.Status.RUNNING, fs.Status.STEP_TOO_SMALL, fs.Status.NONFINITE]
    assert stop_if_stuck(state, move, finite).statuses == expected


@pytest.mark.parametrize("max_steps", [1, 7, 30])
@pytest.mark.parametrize("method", [DOPRI5, fs.TorchDiffEq("dopri5")], ids=["own", "torchdiffeq"])
def test_max_steps_stops_with_the_path_so_far(method, max_steps):
    problem, w0 = setting()
    rule = fs.SteepestFlow(fs.L2(), rtol=1e-8, method=method)
    run = fs.simulate(problem, rule, w0, until=fs.arclength(50.0, saves=3), max_steps=max_steps)
    assert run.statuses == [fs.Status.MAX_STEPS]
    assert float(run.final.attempts) == max_steps
    whole = float(run.final.readings["arclength"])
    if max_steps > 1:  # the one attempt may have been rejected
        assert 0 < whole < 50
        assert distance(run.final.w[0].numpy(), by_arclength("square", "exponential", whole)) < 1e-6


@dataclass(frozen=True)
class Valley:
    """F(w) = |w₁|, which says wrongly that it is smooth."""

    size: int = 2
    degree: float = 1.0
    kinks: bool = False
    logarithmic: bool = False

    @property
    def layout(self):
        return lay_out({"w": (2,)})

    def lam(self, w):
        return -w[:, 0].abs()

    def ascent(self, w):
        h = torch.zeros_like(w)
        h[:, 0] = -w[:, 0].sign()
        return self.lam(w), h

    def check_weights(self, w):
        assert w.shape[1] == 2

    def select(self, rows):
        return self

    def like(self, w):
        return self


@dataclass(frozen=True)
class Cliff(Valley):
    """F(w) = −w₁ for w₁ < 1 and no number beyond."""

    def lam(self, w):
        return torch.where(w[:, 0] < 1, w[:, 0], torch.nan)

    def ascent(self, w):
        h = torch.zeros_like(w)
        h[:, 0] = torch.where(w[:, 0] < 1, 1.0, torch.nan)
        return self.lam(w), h


@pytest.mark.parametrize(
    ("method", "rtol"),
    [(DOPRI5, 1e-17), (BOSH3, 1e-17), (fs.TorchDiffEq("dopri5"), 1e-12)],
    ids=["own 5", "own 3", "torchdiffeq"],
)
def test_a_discontinuous_field_ends_as_step_too_small_with_the_path_up_to_there(method, rtol):
    rule = fs.SteepestFlow(fs.L2(), rtol=rtol, atol=1e-18, method=method)
    w0 = torch.tensor([[1.0, 1.0], [9.0, 1.0]]).double()
    run = fs.simulate(Valley(), rule, w0, until=fs.arclength([0.5, 2.0]), max_steps=3000)
    assert run.statuses == [fs.Status.STEP_TOO_SMALL, fs.Status.DONE]
    assert run.weights[1, :, 0] == pytest.approx([0.5, 8.5], abs=1e-12)
    assert np.isnan(run.weights[2, 0]).all()
    assert run.weights[2, 1] == pytest.approx([7.0, 1.0], abs=1e-12)
    assert float(run.final.w[0, 0]) == pytest.approx(0.0, abs=1e-9)
    assert float(run.final.readings["arclength"][0]) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize(
    ("method", "status"),
    [
        (DOPRI5, fs.Status.NONFINITE),
        (BOSH3, fs.Status.NONFINITE),
        (fs.TorchDiffEq("dopri5"), fs.Status.STEP_TOO_SMALL),  # all that torchdiffeq says
    ],
    ids=["own 5", "own 3", "torchdiffeq"],
)
def test_a_field_that_is_no_number_ends_at_the_last_point_that_is_one(method, status):
    rule = fs.SteepestFlow(fs.L2(), rtol=1e-6, method=method)
    w0 = torch.tensor([[0.0, 1.0], [-9.0, 1.0]]).double()
    run = fs.simulate(Cliff(), rule, w0, until=fs.arclength([0.5, 2.0]), max_steps=3000)
    assert run.statuses == [status, fs.Status.DONE]
    assert torch.isfinite(run.final.w).all()
    assert 0 <= float(run.final.w[0, 0]) < 1
    if status is fs.Status.NONFINITE:
        assert run.weights[1, 0, 0] == pytest.approx(0.5)
        assert float(run.final.w[0, 0]) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("method", [DOPRI5, fs.TorchDiffEq("dopri5")], ids=["own", "torchdiffeq"])
def test_a_start_without_a_gradient_is_stationary(method):
    bowl = fs.Quadratic(torch.eye(2).double(), torch.ones(2).double())
    w0 = torch.tensor([[1.0, 1.0], [3.0, 1.0]]).double()
    run = fs.simulate(bowl, fs.SteepestFlow(fs.L2(), method=method), w0, until=fs.arclength([0.5]))
    assert run.statuses == [fs.Status.STATIONARY, fs.Status.DONE]
    assert run.final.w[0].tolist() == [1.0, 1.0]
