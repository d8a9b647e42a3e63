"""Nets of every kind with their degrees, and modules."""

import itertools

import torch
from torch import Tensor, nn

import flowsim as fs


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bias_free(*widths, activation=nn.ReLU):
    layers = itertools.chain.from_iterable(
        (nn.Linear(a, b, bias=False), activation()) for a, b in itertools.pairwise(widths)
    )
    return nn.Sequential(*list(layers)[:-1])


NETS = {
    "relu": (fs.MLP([3, 5, 4, 1]), 3),
    "leaky": (fs.MLP([3, 5, 2], fs.leaky_relu(0.1)), 2),
    "squared_relu": (fs.MLP([3, 4, 4, 1], fs.squared_relu), 7),
    "square": (fs.MLP([3, 4, 2], fs.square), 3),
    "deep linear": (fs.MLP([3, 4, 4, 4, 1], fs.identity), 4),
    "linear": (fs.Linear(3, 2), 1),
    "diagonal": (fs.Diagonal(3, 3), 3),
    "signed diagonal": (fs.Diagonal(3, 2, signed=True), 2),
    "frozen": (fs.Frozen(fs.MLP([3, 5, 4, 1]), {"W2": draw(5, 4, 5)}), 2),
    "frozen per trajectory": (fs.Frozen(fs.MLP([3, 5, 1]), {"W2": draw(5, 3, 1, 5)}), 1),
    "frozen diagonal": (fs.Frozen(fs.Diagonal(3, 3), {"w1": draw(5, 3)}), 2),
    "frozen squared": (fs.Frozen(fs.MLP([3, 5, 1], fs.squared_relu), {"W2": draw(5, 1, 5)}), 2),
    "module": (fs.ModuleNet(bias_free(3, 5, 2)), 2),
    "root": (fs.FunctionNet(lambda p, x: (x @ p["W1"][0]).abs().sqrt(), fs.Linear(3).layout), 0.5),
}
