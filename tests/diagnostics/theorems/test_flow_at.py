"""What theorems speak of at a point, by differences and along flows."""

import numpy as np
import torch

import flowsim as fs
from flowsim import identities
from flowsim.diagnostics.selected import selected_sides
from flowsim.motion.state import initial_state
from tests.oracles.observed_flows import (
    KINKED,
    SMOOTH,
    START,
)


def test_neurons_keep_their_balance_in_l2_and_reach_it_in_the_limit():
    observe = {
        "kept": lambda p, s: (lambda a, b: a**2 - b**2)(*identities.neuron_balance(p, s, fs.L2())),
        "ratio": lambda p, s: (lambda a, b: a / b)(*identities.neuron_balance(p, s, fs.L2())),
    }
    run = fs.simulate(
        KINKED,
        fs.SteepestFlow(fs.L2(), rtol=1e-3),
        START,
        until=fs.lam([1.0, 60.0]),
        observe=observe,
    )
    kept, ratio = run["kept"][:, 0], run["ratio"][:, 0]
    assert np.abs(kept - kept[0]).max() < 1e-2 * np.abs(kept[0]).max()
    alive = (KINKED.x @ KINKED.layout[0].of(run.final.w)[0].mT > 1e-9).any(0).numpy()
    assert np.abs(ratio[-1][alive] - 1).max() < 0.2 < np.abs(ratio[0][alive] - 1).max()


def test_the_radial_speed_is_the_derivative_of_the_norm():
    for norm in (fs.L1(), fs.L2(), fs.Linf(), fs.Lp(3.0), fs.modular(SMOOTH.layout)):
        w = SMOOTH.net.init(0)
        state = initial_state(SMOOTH, w)
        u, bound = SMOOTH.net.init(1), norm.bind(SMOOTH.layout)
        step = (bound.value(w + 1e-7 * u) - bound.value(w)) / 1e-7
        torch.testing.assert_close(
            identities.radial(SMOOTH, state, norm, u), step, rtol=1e-5, atol=1e-6
        )


def test_the_rise_along_a_direction_is_the_derivative_of_the_level_also_on_kinks():
    run = fs.simulate(KINKED, fs.SteepestFlow(fs.L2(), rtol=1e-3), START, until=fs.lam([5.0]))
    sides = selected_sides(KINKED, run.final)
    assert ((sides > 0) & (sides < 1)).any()
    w, u = (
        run.final.w,
        torch.randn(1, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    )
    step = (KINKED.lam(w + 1e-7 * u) - KINKED.lam(w)) / 1e-7
    torch.testing.assert_close(identities.rise(KINKED, run.final, u), step, rtol=1e-5, atol=1e-6)
