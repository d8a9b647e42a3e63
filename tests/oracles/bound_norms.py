"""Norms of every kind, bound to a layout, with points for them."""

import torch

import flowsim as fs
from flowsim.layout import lay_out

LAYOUT = lay_out({"A": (3, 4)})
TWO = lay_out({"A": (3, 2), "b": (4,)})
MATRIX = torch.diag(torch.linspace(1, 3, 12, dtype=torch.float64)) + 0.1
NORMS = {
    "l1": fs.L1(),
    "l2": fs.L2(),
    "linf": fs.Linf(),
    "l1.5": fs.Lp(1.5),
    "l4": fs.Lp(4),
    "mahalanobis": fs.Mahalanobis(MATRIX),
    "spectral": fs.Spectral(),
    "nuclear": fs.Nuclear(),
    "schatten4": fs.Schatten(4),
}
BLOCKS = {
    "max": fs.Max({"A": fs.Spectral(), "b": fs.L2()}, {"A": 2.0}),
    "sum": fs.Sum({"A": fs.Nuclear(), "b": fs.Linf()}, {"A": 2.0}),
    "euclidean": fs.Euclidean({"A": fs.Spectral(), "b": fs.L1()}),
}
BOUND = {k: n.bind(LAYOUT) for k, n in NORMS.items()} | {k: n.bind(TWO) for k, n in BLOCKS.items()}


def gradient(seed=0, size=None):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size or 12, generator=generator, dtype=torch.float64)


def point(name, seed=0):
    return gradient(seed, 10 if name in BLOCKS else 12)
