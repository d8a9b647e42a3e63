"""A small net on separable data, the true gradient of its loss, and a rule's iterates."""

import torch

import flowsim as fs

X, Y = fs.data.gaussian_separable(20, 5, margin=0.5, seed=range(2))
NET = fs.MLP([5, 8, 1], activation=fs.relu)
NORMS = [fs.L1(), fs.L2(), fs.Linf(), fs.Lp(3.0), fs.Max(fs.L2()), fs.modular(NET.layout)]


def setting(loss=fs.exponential, net=NET):
    return fs.Problem(net, X, Y, loss), net.init(range(2))


def gradient(problem, w):
    lam, h = problem.ascent(w)
    return -torch.exp(-lam)[:, None] * h


def iterates(problem, rule, w0, steps):
    run = fs.simulate(problem, rule, w0, until=fs.steps(range(1, steps + 1)))
    return run, torch.from_numpy(run.weights)
