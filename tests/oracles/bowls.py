"""A quadratic bowl, its starts, and its gradient flow in closed form."""

import numpy as np
import torch

import flowsim as fs

MATRIX, MINIMISER = [[2.0, 0.5], [0.5, 1.0]], [1.0, -1.0]
BOWL = fs.Quadratic(MATRIX, MINIMISER)
CORNERS = torch.tensor([[0.0, 0.0], [3.0, 1.0], [-1.0, 2.0]], dtype=torch.float64)
FINE = tuple(0.02 / 2**k for k in range(7))
LADDER = tuple(0.04 / 2**k for k in range(7))
FLOW = fs.SteepestFlow(fs.L2(), rtol=1e-9, method=fs.DOPRI5)


def solution(t, start):
    """Gradient flow of the bowl, ``(K, B, 2)`` at times ``(K, B)``."""
    values, vectors = np.linalg.eigh(np.array(MATRIX))
    inner = (start - np.array(MINIMISER)) @ vectors
    return (inner * np.exp(-values * t[..., None])) @ vectors.T + MINIMISER
