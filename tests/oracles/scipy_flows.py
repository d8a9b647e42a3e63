"""Flows of a small smooth net in ℓ2 by SciPy, and by flowsim on the same problem."""

import math
from functools import cache

import numpy as np
import torch
from scipy.integrate import solve_ivp

import flowsim as fs

X = torch.randn(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.where(X[:, 0] > 0, 1.0, -1.0)
LOSSES = {"exponential": fs.exponential, "logistic": fs.logistic}
# `square` makes an analytic field. `squared_relu` has jumps in its second derivative, which a
# step's error estimate does not see in full, so the error of a whole path is a larger multiple of
# the tolerance.
ACTIVATIONS = {"square": fs.square, "squared_relu": fs.squared_relu}


def setting(activation="square", loss="exponential"):
    net = fs.MLP([4, 6, 1], activation=ACTIVATIONS[activation])
    return fs.Problem(net, X, Y, LOSSES[loss]), net.init([0], scale=0.7)


def ascent(problem, w):
    lam, h = problem.ascent(torch.from_numpy(w[None].copy()))
    return float(lam), h[0].numpy()


@cache
def by_arclength(activation, loss, s):
    """SciPy's ℓ2 flow: the weights after arclength s."""
    problem, w0 = setting(activation, loss)

    def field(_, w):
        h = ascent(problem, w)[1]
        return h / np.linalg.norm(h)

    return solve_ivp(field, (0, s), w0[0].numpy(), method="DOP853", rtol=1e-13, atol=1e-13).y[:, -1]


@cache
def by_lam(activation, loss, lam):
    """SciPy's ℓ2 flow at this Λ: weights and log t, from z = t·e^{−Λ}, dz/dΛ = 1/‖∇Λ‖² − z."""
    problem, w0 = setting(activation, loss)

    def field(_, y):
        h = ascent(problem, y[:-1])[1]
        return np.append(h, 1.0) / (h @ h) - np.append(0 * h, y[-1])

    start = float(problem.lam(w0))
    y = solve_ivp(
        field, (start, lam), np.append(w0[0], 0), method="DOP853", rtol=1e-13, atol=1e-13
    ).y[:, -1]
    return y[:-1], math.log(y[-1]) + lam


def distance(w, reference):
    return float(np.linalg.norm(w - reference) / np.linalg.norm(reference))


def flow(activation, loss, until, *, rtol=1e-6, clock=None, method=fs.DOPRI5, **options):
    problem, w0 = setting(activation, loss)
    rule = fs.SteepestFlow(fs.L2(), rtol=rtol, clock=clock, method=method)
    return fs.simulate(problem, rule, w0, until=until, strict=True, **options)
