"""The field that methods integrate: its velocity, its rates, and how a state remembers it."""

import pytest
import torch

import flowsim as fs
from flowsim.flow.explicit import DOPRI5
from flowsim.flow.field import Field, memory_of, require_smooth, sample_of
from flowsim.motion.clocks import ARCLENGTH, LAM, RELATIVE, TIME
from tests.oracles.scipy_flows import (
    X,
    Y,
    setting,
)


def test_the_relative_clock_does_not_run_at_the_origin():
    problem = fs.Problem(fs.Linear(4), X, Y, fs.exponential)
    rule = fs.SteepestFlow(fs.L2(), clock=RELATIVE, method=DOPRI5)
    run = fs.simulate(problem, rule, torch.zeros(1, 4).double(), until=fs.lam([1.0]), max_steps=500)
    assert run.statuses[0] not in (fs.Status.DONE, fs.Status.MAX_STEPS)
    assert (run.final.w == 0).all()


@pytest.mark.parametrize("clock", [ARCLENGTH, LAM, RELATIVE, TIME], ids=lambda c: c.name)
@pytest.mark.parametrize("norm", [fs.L2(), fs.Lp(3.0)], ids=lambda n: n.name)
def test_the_velocity_is_steepest_and_its_rates_are_those_of_the_readings(norm, clock):
    problem, w = setting()
    norm = norm.bind(problem.layout)
    sample = Field(norm, clock)(problem, w)
    dt = 1e-6
    speed = sample.rates["arclength"]
    ends = [w + sign * dt * sample.velocity / speed[:, None] for sign in (-1, 1)]
    lower, upper = (problem.lam(end) for end in ends)
    rise = (upper - lower) / (2 * dt)  # dΛ/ds by central differences
    torch.testing.assert_close(sample.rates["dissipated"] / speed, rise, rtol=1e-7, atol=0)
    torch.testing.assert_close(norm.value(sample.velocity), speed)
    torch.testing.assert_close(sample.rates["relative"], speed / norm.value(w))
    log_time_rate = sample.lam - torch.log(norm.dual(sample.ascent)) + torch.log(speed)
    torch.testing.assert_close(sample.log_time_rate, log_time_rate)


def test_a_state_remembers_a_sample():
    problem, w = setting()
    sample = Field(fs.L2(), ARCLENGTH)(problem, w)
    state = fs.SteepestFlow(fs.L2()).start(problem, w)
    state.memory.update(memory_of(sample))
    again = sample_of(state)
    for name, value in vars(sample).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(again, name), value), name
    assert again.rates == sample.rates


def test_fields_that_jump_are_refused():
    smooth, kinked = setting()[0], fs.Problem(fs.MLP([4, 6, 1]), X, Y, fs.exponential)
    require_smooth(Field(fs.L2(), ARCLENGTH), smooth)
    with pytest.raises(ValueError, match=r"the net has kinks \(ReLU\), .*try method=None"):
        require_smooth(Field(fs.L2(), ARCLENGTH), kinked)
    with pytest.raises(ValueError, match="the linf norm has ties, .*try method=None"):
        require_smooth(Field(fs.Linf(), ARCLENGTH), smooth)
