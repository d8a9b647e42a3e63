"""A smooth net by its matrices, and the true gradient of its loss."""

import torch

import flowsim as fs

X, Y = fs.data.gaussian_separable(12, 5, margin=0.5, seed=range(2))
NET = fs.MLP([5, 7, 1], activation=fs.squared_relu)


def setting(rows=slice(None), net=NET):
    return fs.Problem(net, X[rows], Y[rows], fs.logistic), net.init(range(2))[rows]


def gradient(problem, w):
    lam, h = problem.ascent(w)
    return -torch.exp(-lam)[:, None] * h


def matrices(w, net=NET):
    return [block.of(w) for block in net.layout]


def flat(parts):
    return torch.cat([part.flatten(1) for part in parts], 1)
