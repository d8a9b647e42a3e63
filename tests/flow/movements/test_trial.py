"""The quadrature of a step of minimising movements."""

import pytest
import torch

import flowsim as fs
from flowsim.flow.field import Field
from flowsim.flow.movements.movement import Movement
from flowsim.flow.movements.trial import STAGE, MovementTrial
from flowsim.motion.clocks import ARCLENGTH


def trial_with(rates=(1.0, 1.0, 1.0), directions=(1.0, 1.0, 1.0), eps=0.5):
    """A step whose rates and directions at 0, γ and 1 are these numbers."""
    quadratic = fs.Quadratic(torch.eye(2).double(), torch.zeros(2).double())
    w = torch.ones(1, 2).double()
    field = Field(fs.L2().bind(quadratic.layout), ARCLENGTH, 1e-6, 1e-9)
    lam, h = quadratic.ascent(w)
    samples = []
    for rate, direction in zip(rates, directions, strict=True):
        sample = field.sample(quadratic, w, lam, h, direction * torch.ones_like(w))
        sample.rates["relative"] = torch.tensor([rate]).double()
        samples.append(sample)
    stage, end = (
        Movement(v * w[0], w[0], w=w[0], gap=gap, lam=lam[0], ascent=h[0], newton=newton)
        for v, gap, newton in zip(directions[1:], (0.1, 0.3), (2, 5), strict=True)
    )
    first, middle, last = samples
    return MovementTrial(eps, first, stage, end, middle, last, eps, False)


@pytest.mark.parametrize("power", [0, 1, 2])
def test_means_are_exact_to_second_order(power):
    rates = [t**power for t in (0.0, STAGE, 1.0)]
    assert trial_with(rates=rates).mean("relative") == pytest.approx(1 / (power + 1))


def test_the_error_is_what_the_stages_lack_against_the_quadrature():
    directions = [t**2 for t in (0.0, STAGE, 1.0)]
    trial = trial_with(directions=directions)
    stages = (1 - STAGE) * directions[1] + STAGE * directions[2]
    torch.testing.assert_close(trial.error, 0.5 * (stages - 1 / 3) * torch.ones_like(trial.error))
    assert float(trial_with().error.abs().max()) < 1e-15


def test_a_step_is_no_better_than_its_worse_movement():
    trial = trial_with()
    assert trial.gap == 0.3
    assert trial.newton == 7
