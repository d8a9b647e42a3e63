"""The programs that flowsim is measured against on two-layer ReLU nets: a loop of small steps, and
ODE solvers."""

import math
import os
from dataclasses import dataclass
from typing import Any

os.environ.setdefault(
    "XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false"
)  # diffrax on one thread, like the others

import numpy as np
import torch
from common import Spent, Stopwatch, counted
from torchdiffeq import odeint

import flowsim as fs

MOST = 60_000  # gradients of an ODE solver
ATOL = 1e-3  # its absolute tolerance, as a share of the relative one


@dataclass(frozen=True)
class Net:
    d: int
    n: int
    width: int = 64
    seed: int = 0

    def problem(self) -> tuple[fs.Problem, torch.Tensor]:
        return fs.data.peers_net(self.d, self.width, self.n, seed=self.seed)

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        problem, w0 = self.problem()
        return (
            problem.x.numpy().reshape(self.n, self.d),
            problem.y.numpy().ravel(),
            w0.numpy().ravel(),
        )

    @property
    def levels(self) -> dict[str, float]:
        small = {f"mean loss 1e-{k}": k * math.log(10) - math.log(self.n) for k in (10, 100)}
        return small | {f"level 1e{k}": 10.0**k for k in (3, 4, 5)}

    @property
    def columns(self) -> dict[str, Any]:
        return {"d": self.d, "n": self.n, "width": self.width, "seed": self.seed}


def gradient(w: Any, x: Any, y: Any, xp: Any = np) -> tuple[Any, Any]:
    """Λ and ∇Λ of the net, in numpy, torch or jax.numpy."""
    width = len(w) // (x.shape[1] + 1)
    a = w[-width:]
    z = x @ w[:-width].reshape(width, -1).T
    q = y * ((z * (z > 0)) @ a)
    least = q.min()
    p = xp.exp(least - q)
    total = p.sum()
    p = y * p / total
    inner = (p[:, None] * (z > 0) * a).T @ x
    return least - xp.log(total), xp.concatenate([inner.reshape(-1), (z * (z > 0)).T @ p])


def euler(net: Net, c: float, levels: list[float]) -> list[dict[str, Any]]:
    """w ← w + c/‖w‖² ∇Λ, with the soft margin Λ/‖w‖² read off at each level."""
    x, y, w = net.arrays()
    rows, before, gradients, watch = [], (-np.inf, 0.0), 0, Stopwatch()
    while len(rows) < len(levels):
        lam, h = gradient(w, x, y)
        gradients += 1
        size = w @ w
        while len(rows) < len(levels) and lam >= levels[len(rows)]:
            margin = np.interp(levels[len(rows)], *zip(before, (lam, lam / size), strict=True))
            rows.append(
                {"gradients": gradients, "steps": gradients - 1, "soft_margin": margin}
                | watch.read()
            )
        before = lam, lam / size
        w = w + (c / size) * h
    return [
        row | {"method": "Euler on the log-loss", "tolerance": c, "reached": True} for row in rows
    ]


def torch_solver(net: Net, end: float, rtol: float) -> dict[str, Any]:
    """dopri5 on dw/dt = −∇(mean loss), from t = 0 to ``end``."""
    x, y, w0 = (torch.from_numpy(a) for a in net.arrays())

    def velocity(_: Any, w: torch.Tensor) -> torch.Tensor:
        lam, h = gradient(w, x, y, torch)
        return torch.exp(-lam) / net.n * h

    field, calls = counted(velocity, MOST)
    watch = Stopwatch()
    try:
        w = odeint(field, w0, torch.tensor([0.0, end]).double(), rtol=rtol, atol=ATOL * rtol)[-1]
        done = {"reached": True, "lam": float(gradient(w, x, y, torch)[0])}
    except (Spent, AssertionError) as error:
        done = {"reached": False, "note": str(error) or f"stopped after {MOST} gradients"}
    row = {"method": "torchdiffeq dopri5", "tolerance": rtol}
    return row | done | {"gradients": min(calls[0], MOST)} | watch.read()


def jax_solver(net: Net, end: float, rtol: float) -> dict[str, Any]:
    """Tsit5 of diffrax on the same field, compiled beforehand."""
    row = {"method": "diffrax Tsit5", "tolerance": rtol}
    try:
        import diffrax
        import jax
    except ImportError:
        return row | {"reached": False, "note": "diffrax is not installed"}
    jax.config.update("jax_enable_x64", True)
    x, y, w0 = (jax.numpy.asarray(a) for a in net.arrays())

    def velocity(t: Any, w: Any, args: Any) -> Any:
        lam, h = gradient(w, x, y, jax.numpy)
        return jax.numpy.exp(-lam) / net.n * h

    control = diffrax.PIDController(rtol=rtol, atol=ATOL * rtol)
    options = {"stepsize_controller": control, "max_steps": MOST // 6, "throw": False}

    @jax.jit
    def solve(w: Any, end: Any) -> Any:
        term, adjoint = diffrax.ODETerm(velocity), diffrax.DirectAdjoint()
        return diffrax.diffeqsolve(
            term, diffrax.Tsit5(), 0.0, end, None, w, adjoint=adjoint, **options
        )

    solve(w0, 1e-6).ys.block_until_ready()
    watch = Stopwatch()
    found = solve(w0, end)
    w = found.ys[-1].block_until_ready()
    row |= watch.read()
    taken = {name: int(number) for name, number in found.stats.items() if name.startswith("num_")}
    row |= {"steps": taken["num_accepted_steps"], "rejected": taken["num_rejected_steps"]}
    row |= {
        "gradients": 6 * taken["num_steps"] + 1
    }  # the last stage of a step is the first of the next
    if found.result != diffrax.RESULTS.successful:
        return row | {"reached": False, "note": f"stopped after {taken['num_steps']} steps"}
    return row | {"reached": True, "lam": float(gradient(w, x, y, jax.numpy)[0])}
