"""The least point of a quadratic form over a face, by its projection and nothing else."""

from collections.abc import Callable

import torch
from torch import Tensor

from flowsim.norms.faces import Face


def minimise(
    face: Face,
    gradient: Callable[[Tensor], Tensor],
    size: int,
    *,
    start: Tensor | None = None,
    tol: float = 1e-10,
    max_steps: int = 40000,
) -> Tensor:
    """Accelerated projected gradient (Beck and Teboulle 2009) with restart (O'Donoghue and Candès
    2015), for an affine ``gradient`` of ``size`` weights, all rows with one step length."""
    unit = torch.eye(size, dtype=torch.float64)
    hessian = gradient(unit) - gradient(torch.zeros_like(unit))
    step = 1 / torch.linalg.eigvalsh(hessian)[-1]
    v = face.element() if start is None else start
    y, momentum = v, 1.0
    for _ in range(max_steps):
        new = face.project(y - step * gradient(y))
        if float((new - y).norm()) <= tol:
            break
        if float(((y - new) * (new - v)).sum()) > 0:
            momentum = 1.0
        larger = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        y = new + (momentum - 1) / larger * (new - v)
        v, momentum = new, larger
    return new
