"""Pictures of a single trajectory: its multipliers, its KKT residuals, its neurons."""

import numpy as np
import torch
from matplotlib.axes import Axes

from flowsim.diagnostics.stationarity import Stationarity
from flowsim.plots.axes import BAND, Style, along, look, new_axes, norm_symbol
from flowsim.problems.problem import Problem
from flowsim.run.summary import position
from flowsim.run.trajectory import Trajectory

_KKT = {
    "alignment": r"$1 - \alpha$",
    "residual": r"distance of $\Gamma$ from $\partial\frac{1}{2}\|\tilde w\|^2$"
    r", over $\|\tilde w\|$",
    "slackness": r"slackness $\sum \lambda_i (q_i(\tilde w) - 1)$",
}
_REST: Style = {"color": "0.75", "linewidth": 0.6, "zorder": 1}
_CIRCLES, _CROSSES = 0, 1  # the looks of the two classes
_DATA: Style = {"color": "black", "markersize": 4, "fillstyle": "none"}
_SIDES = ["#dce8f5", "#fdeedd"]


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
    ax = along(against, ax)
    x = position(run, against)[:, trajectory]
    observed = [name for name in _KKT if f"{name}_{norm}" in run]
    for index, name in enumerate(observed):
        y = run[f"{name}_{norm}"][:, trajectory]
        if name == "alignment":
            y = 1 - y
        ax.plot(x, y, label=_KKT[name], **look(index))
    if f"excess_{norm}" in run:
        low = run[f"floor_{norm}"][:, trajectory]
        high = run[f"excess_{norm}"][:, trajectory]
        ax.fill_between(x, low, high, color="0.5", label="best multipliers", **BAND)
    ax.set_yscale("log", nonpositive="mask")
    ax.set_ylabel(rf"KKT residuals, weights in ${norm_symbol(norm)}$")
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
    ax = along(against, ax)
    x = position(run, against)[:, trajectory]
    multipliers = run[f"multipliers_{norm}"][:, trajectory]  # (K, N)
    known = np.isfinite(multipliers).all(-1)
    last = multipliers[known][-1]
    largest = last.max()
    for rank, i in enumerate(np.argsort(-last)):
        supports = last[i] >= 0.1 * largest
        style = look(rank) if supports else _REST
        ax.plot(x, multipliers[:, i], **style)
    ax.set_yscale("log", nonpositive="mask")
    top = 3 * np.nanmax(multipliers)
    ax.set_ylim(1e-6 * largest, top)
    ax.set_ylabel(r"multipliers $\lambda_i$")
    return ax


def residuals(at: Stationarity, *, trajectory: int = 0, ax: Axes | None = None) -> Axes:
    """ε(η), the distance of Γ from ∂½‖w̃‖² over ‖w̃‖ in ‖·‖_* if everything within η‖w̃‖ of the
    maximum counts, and √(1 − α), within which a KKT pair lies."""
    ax = ax or new_axes()
    tols = [0.0, *np.logspace(-6, 0, 121)]
    places = np.maximum(tols, 1e-7)
    _, residual = at.residuals(tols)
    residual = residual[:, trajectory].cpu()
    misaligned = 1 - at.alignment[trajectory].item()
    near = max(misaligned, 0.0) ** 0.5
    ax.plot(places, residual, drawstyle="steps-post", **look(0))
    ax.axhline(near, color="0.5", linestyle=":")
    ax.set_xscale("log")
    ax.set_ylim(bottom=0)
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
    _require_plane(problem)
    if run.weights is None:
        raise ValueError(
            "neurons: got a run without weights, expected one that has kept them; try fewer saves"
        )
    ax = ax or new_axes()
    problem = problem.select(torch.tensor([trajectory]))
    x = problem.x.reshape(-1, 2)  # (N, 2)
    y = problem.y.reshape(-1)
    largest = float(x.abs().max())

    w = torch.from_numpy(run.weights[:, trajectory])
    w = w[w.isfinite().all(-1)]  # (K, P)
    _draw_decision(problem, w[-1:], 1.3 * largest, ax)
    _draw_paths(problem, w, largest, ax)
    crosses = x[y == 1]
    circles = x[y == -1]
    ax.plot(*crosses.T, "x", **_DATA)
    ax.plot(*circles.T, "o", **_DATA)
    ax.set_xlabel(r"$x_1$; neurons $|a_j| w_{j1}$, scaled")
    ax.set_ylabel(r"$x_2$; neurons $|a_j| w_{j2}$, scaled")
    return ax


def _require_plane(problem: Problem) -> None:
    shapes = [tuple(block.shape) for block in problem.layout]
    neurons = shapes[0][0]
    if shapes != [(neurons, 2), (1, neurons)]:
        raise ValueError("neurons: got another net, expected MLP([2, m, 1]) on inputs in the plane")


def _draw_paths(problem: Problem, w: torch.Tensor, reach: float, ax: Axes) -> None:
    """The neurons along weights ``(K, P)``, scaled to end within ``reach`` of 0."""
    first, last = (block.of(w) for block in problem.layout)  # (K, m, 2), (K, 1, m)
    paths = last.abs().mT * first
    ends = paths[-1].norm(dim=-1)
    paths *= reach / ends.max()
    votes = last[-1, 0]
    for path, vote in zip(paths.unbind(1), votes, strict=True):
        voted = _CROSSES if vote > 0 else _CIRCLES
        colour = look(voted)["color"]
        ax.plot(*path.T, "-", color=colour, linewidth=0.7, alpha=0.7)
        ax.plot(*path[-1], ".", color=colour, markersize=4)


def _draw_decision(problem: Problem, w: torch.Tensor, reach: float, ax: Axes) -> None:
    """Where the output of the net with weights ``(1, P)`` changes its sign, within ``reach`` of
    0."""
    ticks = torch.linspace(-reach, reach, 121, dtype=torch.float64)
    points = torch.cartesian_prod(ticks, ticks)
    outputs = problem.net.outputs(w, points)
    f = outputs.view(121, 121).mT
    halves = [-1.5, 0, 1.5]
    ax.contourf(ticks, ticks, f.sign(), levels=halves, colors=_SIDES, zorder=0)
    ax.contour(ticks, ticks, f, levels=[0.0], colors="0.3", linewidths=0.8)
    ax.set_xlim(-reach, reach)
    ax.set_ylim(-reach, reach)
    ax.set_aspect("equal")
