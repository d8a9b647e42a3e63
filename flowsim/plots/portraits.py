"""Pictures of a single trajectory: its multipliers, its KKT residuals, its neurons."""

from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes

from flowsim.diagnostics.stationarity import Stationarity
from flowsim.plots.axes import NORMS, along, fresh_axes, look, require
from flowsim.problems.problem import Problem
from flowsim.run.summary import position
from flowsim.run.trajectory import Trajectory

_KKT = {
    "alignment": r"$1 - \alpha$",
    "residual": r"distance of $\Gamma$ from $\partial\frac{1}{2}\|\tilde w\|^2$, over $\|\tilde w\|$",
    "slackness": r"slackness $\sum \lambda_i (q_i(\tilde w) - 1)$",
}


def kkt_residuals(
    run: Trajectory,
    norm: str = "l2",
    *,
    trajectory: int = 0,
    against: str = "lam",
    ax: Axes | None = None,
) -> Axes:
    """What ``diagnostics.kkt`` has observed in this norm: 1 − α, ε and δ, and between floor and
    excess of the best multipliers a band."""
    require(against)
    ax = ax or fresh_axes()
    x = position(run, against)[:, trajectory]
    for index, (name, label) in enumerate(_KKT.items()):
        if f"{name}_{norm}" in run:
            y = run[f"{name}_{norm}"][:, trajectory]
            ax.plot(x, 1 - y if name == "alignment" else y, label=label, **look(index))
    if f"excess_{norm}" in run:
        low, high = (run[f"{name}_{norm}"][:, trajectory] for name in ("floor", "excess"))
        ax.fill_between(
            x, low, high, color="0.5", alpha=0.25, linewidth=0, label="best multipliers"
        )
    ax.set_yscale("log", nonpositive="mask")
    along(ax, against)
    ax.set_ylabel(rf"KKT residuals, weights in ${NORMS.get(norm, '|w|')}$")
    ax.legend(frameon=False)
    return ax


def multiplier_paths(
    run: Trajectory,
    norm: str = "l2",
    *,
    trajectory: int = 0,
    against: str = "lam",
    ax: Axes | None = None,
) -> Axes:
    """λ_i of every margin over time, from the observation ``multipliers_…``; those of the support
    vectors at the end, within a factor 10 of the largest, in colour."""
    require(against)
    ax = ax or fresh_axes()
    x, lam = position(run, against)[:, trajectory], run[f"multipliers_{norm}"][:, trajectory]
    last = lam[np.isfinite(lam).all(-1)][-1]
    order = np.argsort(-last)
    for rank, i in enumerate(order):
        supports = last[i] >= 0.1 * last[order[0]]
        shown: dict[str, Any] = (
            look(rank) if supports else {"color": "0.75", "linewidth": 0.6, "zorder": 1}
        )
        ax.plot(x, lam[:, i], **shown)
    ax.set_yscale("log", nonpositive="mask")
    ax.set_ylim(1e-6 * last.max(), 3 * np.nanmax(lam))
    along(ax, against)
    ax.set_ylabel(r"multipliers $\lambda_i$")
    return ax


def residuals(at: Stationarity, *, trajectory: int = 0, ax: Axes | None = None) -> Axes:
    """ε(η), the distance of Γ from ∂½‖w̃‖² over ‖w̃‖ in ‖·‖_* if everything within η‖w̃‖ of the
    maximum counts, and √(1 − α), within which a KKT pair lies."""
    ax = ax or fresh_axes()
    tols = np.concatenate([[0.0], np.logspace(-6, 0, 121)])
    curve = at.residuals(tols.tolist())[1][:, trajectory].cpu().numpy()
    ax.plot(np.maximum(tols, 1e-7), curve, drawstyle="steps-post", **look(0))
    ax.axhline(
        float((1 - at.alignment[trajectory]).clamp_min(0).sqrt()), color="0.5", linestyle=":"
    )
    ax.set(xscale="log", ylim=(0, None))
    ax.set_xlabel(r"face tolerance $\eta$")
    ax.set_ylabel(rf"$\varepsilon(\eta)$, {at.norm.symbol}")
    return ax


def neurons(
    problem: Problem, run: Trajectory, *, trajectory: int = 0, ax: Axes | None = None
) -> Axes:
    """A two-layer net on inputs in the plane: the paths of its neurons abs(a_j)·w_j, scaled by the
    largest at the end, the data, and where the net decides.

    Orange neurons vote for the class of the crosses, blue ones for that of the circles; a dot is
    where a path ends. Raises ValueError for other nets and inputs, and for runs without weights.
    """
    if (
        len(problem.layout) != 2
        or problem.layout[0].shape[-1] != 2
        or problem.layout[1].shape[0] != 1
    ):
        raise ValueError("neurons: got another net, expected MLP([2, m, 1]) on inputs in the plane")
    if run.weights is None:
        raise ValueError(
            "neurons: got a run without weights, expected one that has kept them; try fewer saves"
        )
    ax = ax or fresh_axes()
    known = run.weights[np.isfinite(run.weights[:, trajectory]).all(-1), trajectory]
    w = torch.from_numpy(known)
    first, last = (block.of(w).numpy() for block in problem.layout)  # (K, m, 2), (K, 1, m)
    path = np.abs(last[:, 0, :, None]) * first
    x = problem.x[trajectory] if problem.x.ndim == 3 else problem.x
    y = problem.y[trajectory] if problem.y.ndim == 2 else problem.y
    reach = 1.3 * float(x.abs().max())
    path = path * (reach / 1.3 / np.linalg.norm(path[-1], axis=-1).max())
    _decision(problem, w[-1:], reach, ax)
    for j in range(path.shape[1]):
        colour = look(1 if last[-1, 0, j] > 0 else 0)["color"]
        ax.plot(*path[:, j].T, "-", color=colour, linewidth=0.7, alpha=0.7)
        ax.plot(*path[-1, j], ".", color=colour, markersize=4)
    for sign, marker in ((1, "x"), (-1, "o")):
        ax.plot(*x[y == sign].T.numpy(), marker, color="black", markersize=4, fillstyle="none")
    ax.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    ax.set_xlabel(r"$x_1$; neurons $|a_j| w_{j1}$, scaled")
    ax.set_ylabel(r"$x_2$; neurons $|a_j| w_{j2}$, scaled")
    return ax


def _decision(problem: Problem, w: torch.Tensor, reach: float, ax: Axes) -> None:
    """Where the net's output changes its sign."""
    grid = torch.linspace(-reach, reach, 121, dtype=torch.float64)
    points = torch.cartesian_prod(grid, grid)
    f = problem.net.select(torch.tensor([0])).outputs(w, points)[0, :, 0].view(121, 121).mT.numpy()
    ax.contourf(
        grid, grid, np.sign(f), levels=[-1.5, 0, 1.5], colors=["#dce8f5", "#fdeedd"], zorder=0
    )
    ax.contour(grid, grid, f, levels=[0.0], colors="0.3", linewidths=0.8)
