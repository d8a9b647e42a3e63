"""Flows on which theorems are tried: nets and linear models in many norms."""

from functools import cache

import torch

import flowsim as fs

FIXTURE = fs.Problem(fs.Linear(3), [[3, 1, 0], [1, -2, 2], [1, 2, 1]], [1, 1, 1], fs.exponential)
KINKED, START = fs.data.peers_net(5, 10, 10, seed=0)
X, Y = KINKED.x, KINKED.y
SMOOTH = fs.Problem(fs.MLP([5, 10, 1], activation=fs.squared_relu), X, Y, fs.exponential)
CLASSES = fs.Problem(
    fs.MLP([5, 10, 3], activation=fs.squared_relu), X, torch.arange(10) % 3, fs.pairwise_exponential
)
CASES = {
    "relu, l2": (KINKED, fs.L2()),
    "relu, mahalanobis": (KINKED, fs.Mahalanobis(torch.linspace(0.5, 2, 60, dtype=torch.float64))),
    "smooth, l2": (SMOOTH, fs.L2()),
    "smooth, l3": (SMOOTH, fs.Lp(3.0)),
    "classes, l2": (CLASSES, fs.L2()),
    "linear, l1": (FIXTURE, fs.L1()),
    "linear, linf": (FIXTURE, fs.Linf()),
    "linear, spectral": (FIXTURE, fs.Spectral()),
}


@cache
def observed_flow(name):
    """The problem, the norm and a run of this case, observed by ``diagnostics.standard``."""
    problem, norm = CASES[name]
    w0 = START if problem is KINKED else problem.net.init(0, scale=0.5)
    observe = fs.diagnostics.standard(problem, norms=[norm])
    rule = fs.SteepestFlow(norm, rtol=1e-3)
    run = fs.simulate(
        problem, rule, w0, until=fs.lam(30.0, saves=120), observe=observe, max_steps=5000
    )
    assert run.statuses == [fs.Status.DONE]
    return problem, norm, run
