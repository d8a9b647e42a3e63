"""Flows from given weights, to be held against what is known of them."""

import numpy as np
import pytest
import torch

import flowsim as fs
from flowsim.flow.rosenbrock import ROS34PW2
from flowsim.motion.clocks import TIME

RTOL = 1e-6
LOG_TIME = 3e-4  # absolute accuracy of log t inside a step
METHODS = pytest.mark.parametrize("method", [fs.DOPRI5, ROS34PW2], ids=lambda m: m.name)
METRIC = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, 0.3], [0.0, 0.3, 3.0]], dtype=torch.float64)
QUADRATIC = pytest.mark.parametrize("norm", [fs.L2(), fs.Mahalanobis(METRIC)], ids=lambda n: n.name)
H, TARGET = np.array([[2.0, 1.0], [1.0, 2.0]]), np.array([4 / 3, 1 / 3])
SHAPE = (3, 4)


def run(problem, w0, until, *, norm=None, method=None, rtol=RTOL):
    """Saves at given times are read off a clock that is regular in time; implicit methods have
    their own."""
    explicit = method is fs.DOPRI5
    clock = TIME if explicit and until.clock is TIME else None
    rule = fs.SteepestFlow(norm or fs.L2(), rtol=rtol, method=method, clock=clock)
    return fs.simulate(
        problem, rule, torch.as_tensor(w0).double().reshape(1, -1), until=until, strict=True
    )


def close(value, true, tolerance=10 * RTOL):
    """Equal relative to the size of each exact point."""
    true = np.asarray(true)
    error = np.linalg.norm(np.atleast_2d(value - true), axis=-1)
    assert (error <= tolerance * np.linalg.norm(np.atleast_2d(true), axis=-1)).all(), error


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spd(d, seed):
    root = randn(d + 2, d, seed=seed).numpy()
    return root.T @ root / d


def nearly(value, **tolerance):
    return pytest.approx(value, **tolerance)
