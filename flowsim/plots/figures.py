"""Figures of runs over a clock: margins, losses, norms, alignment, energy, gaps and certificates.

Each function draws on the Axes that it is given, or on a new one, and returns it; `overview` and
`trust` make whole figures, and `save` writes them with their data."""

import csv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from numpy import ndarray as Array

from flowsim.plots.axes import (
    Runs,
    Style,
    along,
    curves,
    degree,
    draw,
    dressed,
    labelled,
    legend_below,
    look,
    mathtext,
    new_axes,
    norm_symbol,
    power_of_ten,
    style,
    wide,
)
from flowsim.run.trajectory import Trajectory

_FORMATS: dict[str, Style] = {
    ".pdf": {"metadata": {"CreationDate": None}},
    ".png": {"dpi": 200},
}

# --------------------------------------------------------------------------------------------------
# One value
# --------------------------------------------------------------------------------------------------


def margins(
    runs: Runs,
    norm: str = "l2",
    *,
    against: str = "log_time",
    soft: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """Normalised margin of the weights' ``norm`` (its column name, such as "l1", "l2", "linf") on a
    log axis.

    A circle marks the first time that every training example is classified, a triangle the time t₀
    where Λ > 0."""
    name = f"soft_margin_{norm}" if soft else f"margin_{norm}"
    value = r"\ell^{-1}(\mathcal{L})" if soft else r"\mathrm{min}_i\, q_i"
    ax = curves(runs, lambda run: run[name], against, ax)
    ax.set_ylabel(rf"margin ${value}/{norm_symbol(norm)}^{{{degree(runs)}}}$")
    return ax


def loss(runs: Runs, *, against: str = "log_time", ax: Axes | None = None) -> Axes:
    """Sum loss 𝓛, drawn from its logarithm: 10^(−400) is a point like any other."""
    ax = curves(runs, _log_loss, against, ax)
    wide(ax, "y", power_of_ten)
    ax.set_ylabel(r"loss $\mathcal{L}$")
    starts = [_log_loss(run)[0].max() for run in labelled(runs).values()]
    ax.set_ylim(top=max(starts) + 1)  # a run that diverges leaves the picture and flattens no other
    return ax


def _log_loss(run: Trajectory) -> Array:
    return -run["lam"] / np.log(10)


def norms(
    runs: Runs, norm: str = "l2", *, against: str = "log_time", ax: Axes | None = None
) -> Axes:
    """Norm of the weights."""
    ax = curves(runs, lambda run: run[f"norm_{norm}"], against, ax)
    ax.set_ylabel(f"${norm_symbol(norm)}$")
    return ax


def alignment_curves(
    runs: Runs, norm: str = "l2", *, against: str = "log_time", ax: Axes | None = None
) -> Axes:
    """1 − α, the distance of weights and gradient from being aligned: 0 at a KKT point of the
    max-margin problem."""
    ax = curves(runs, lambda run: 1 - run[f"alignment_{norm}"], against, ax)
    ax.set_ylabel(rf"$1 - \langle w, -g\rangle/({norm_symbol(norm)}\,\|g\|_*)$")
    return ax


def energy_curves(runs: Runs, *, against: str = "log_time", ax: Axes | None = None) -> Axes:
    """The energy residual |∫‖h‖_* ds/ΔΛ − 1| from the first save on, as the method has summed it: 0
    along a flow."""
    ax = curves(runs, _energy_residual, against, ax, marks=False)
    ax.set_ylabel("energy residual")
    return ax


def _energy_residual(run: Trajectory) -> Array:
    risen = run["lam"] - run["lam"][:1]
    spent = run["dissipated"] - run["dissipated"][:1]
    risen = np.where(risen > 0, risen, np.nan)
    return np.abs(spent / risen - 1)


def gap(
    runs: Runs,
    best: float,
    norm: str = "l2",
    *,
    against: str = "lam",
    slope: float | None = -1.0,
    bound: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """γ* − γ on logarithmic axes, for the largest margin γ* ``best``, over Λ, s or log t.

    A dotted line has the given ``slope`` and starts where the first curve is half way; a grey one
    is ``bound``/x, which for ``bound`` = log M and x = s no flow of a linear model from 0 exceeds.
    """
    ax = along(against, ax)
    drawn = [
        draw(ax, run[against], best - run[f"margin_{norm}"], look, label)
        for label, run, look in dressed(labelled(runs))
    ]
    x, first = drawn[0]
    x, first = x[x > 0], first[x > 0]
    if slope is not None:
        half = len(x) // 2
        guide = first[half] * (x[half:] / x[half]) ** slope
        ax.plot(x[half:], guide, ":", color="0.4", label=f"slope ${slope:g}$")
    if bound is not None:
        ax.plot(x, bound / x, "-", color="0.7", label=f"{bound:.3g}/x", zorder=0)
    ax.set(xscale="log", yscale="log")
    if against == "log_time":
        ax.set_xlabel(r"logarithm of flow time, $\log t$")
    ax.set_ylabel(rf"margin gap $\gamma^* - \gamma$, weights in ${norm_symbol(norm)}$")
    return ax


# --------------------------------------------------------------------------------------------------
# Certificates
# --------------------------------------------------------------------------------------------------


_CERTIFIED = (
    "energy residual",
    "largest fall of the soft margin",
    r"$1 - \alpha$",
    "rounding of the softmax weights",
)
_MARKERS = "os^d"
_POINTS: Style = {"markersize": 4, "alpha": 0.8}
_LEGEND: Style = {
    "loc": "lower center",
    "bbox_to_anchor": (0.5, 1.0),
    "ncols": 2,
    "frameon": False,
}
_ZERO = 1e-17


def certificate(runs: Runs, *, ax: Axes | None = None) -> Axes:
    """The certificates of runs on one logarithmic axis, a row for each run and a point for each
    trajectory.

    All numbers are relative and small where a run can be trusted: the energy residual, the largest
    fall of the soft margin, 1 − α, and what rounding leaves of the softmax weights. Zeros are drawn
    at the left edge."""
    ax = ax or new_axes()
    rows = labelled(runs)
    for row, run in enumerate(rows.values()):
        found = run.certificate
        energy = np.abs(found.energy)
        rounding = 10.0**-found.digits
        sizes = (energy, found.fall, 1 - found.alignment, rounding)
        for index, size in enumerate(sizes):
            known = np.maximum(size[np.isfinite(size)], _ZERO)
            height = np.full_like(known, 0.12 * (1.5 - index) - row)
            ax.plot(known, height, _MARKERS[index], color=look(index)["color"], **_POINTS)
    labels = [mathtext(label) for label in rows]
    ax.set_yticks(range(1 - len(rows), 1), labels[::-1])
    ax.set_ylim(0.4 - len(rows), 0.6)
    ax.set_xscale("log")
    ax.set_xlim(_ZERO / 3, 30)
    ax.set_xlabel("relative size; 0 at the left edge")
    ax.legend(ax.lines[-4:], _CERTIFIED, **_LEGEND)
    return ax


# --------------------------------------------------------------------------------------------------
# Whole figures
# --------------------------------------------------------------------------------------------------


def overview(runs: Mapping[str, Trajectory], *, against: str = "log_time") -> Figure:
    """Margins in ℓ1, ℓ2 and ℓ∞ and the loss, side by side, with one legend."""
    with style():
        fig = plt.figure(figsize=(6.75, 5.4), layout="constrained")
        _panels(fig, runs, margins, loss, against)
    return fig


def trust(runs: Mapping[str, Trajectory], *, against: str = "log_time") -> Figure:
    """1 − α in ℓ1, ℓ2 and ℓ∞ and the energy residual, side by side, and the certificates below."""
    rows = 0.35 * len(runs)
    with style():
        fig = plt.figure(figsize=(6.75, 5.4 + rows), layout="constrained")
        parts: Any = fig.subfigures(2, 1, height_ratios=[5.4, 0.7 + rows])
        upper, lower = parts
        _panels(upper, runs, alignment_curves, energy_curves, against)
        certificate(runs, ax=lower.subplots())
    return fig


def _panels(
    figure: Figure | SubFigure,
    runs: Runs,
    of_norm: Callable[..., Axes],
    last: Callable[..., Axes],
    against: str,
) -> None:
    """What is drawn for a norm, in ℓ1, ℓ2 and ℓ∞, and one panel more, above one legend."""
    axes = figure.subplots(2, 2, sharex=True)
    for norm, ax in zip(("l1", "l2", "linf"), axes.flat, strict=False):
        of_norm(runs, norm, against=against, ax=ax)
    last(runs, against=against, ax=axes[1, 1])
    for ax in axes[0]:
        ax.set_xlabel("")
    legend_below(figure, runs)


def save(fig: Figure, path: str | Path, runs: Mapping[str, Trajectory] | None = None) -> list[Path]:
    """Write ``path`` as PDF and PNG, and beside them the values of ``runs`` as CSV. Same data, same
    bytes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    written = [path.with_suffix(suffix) for suffix in _FORMATS]
    with style():
        for file in written:
            fig.savefig(file, **_FORMATS[file.suffix])
    if runs is not None:
        written.append(path.with_suffix(".csv"))
        _write_csv(runs, written[-1])
    return written


def _write_csv(runs: Mapping[str, Trajectory], path: Path) -> None:
    """One row for each run, trajectory and save point; the scalar values of any run as columns."""
    scalars = [name for run in runs.values() for name in run.names if run[name].ndim == 2]
    names = list(dict.fromkeys(scalars))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["run", "trajectory", "save", *names])
        for label, run in runs.items():
            unknown = np.full_like(run["lam"], np.nan)
            values = np.stack([run.values.get(name, unknown) for name in names])
            for b, saves in enumerate(values.T):  # (K, names)
                for k, row in enumerate(saves):
                    writer.writerow([label, b, k, *(f"{value:.12g}" for value in row)])
