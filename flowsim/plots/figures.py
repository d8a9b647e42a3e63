"""Figures for papers: functions of trajectories that draw on an Axes and return it.

``runs`` is a Trajectory or a mapping from labels to trajectories. A curve is the median over seeds,
its band the 10th to 90th percentile. Colours and dashes follow the order of the mapping, so that
they agree between figures. Pictures of a single run are in `portraits`, those of discrete runs
beside a flow in `beside`. Nothing here sets global state or shows a window; `save` writes vector
and pixel files and the data of the figure."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flowsim.plots.axes import (
    AXES,
    NORMS,
    Runs,
    bands,
    curves,
    degree,
    fresh_axes,
    key,
    legend,
    look,
    mathtext,
    named,
    power_of_ten,
    require,
    style,
    wide,
)
from flowsim.run.trajectory import Trajectory

_FORMATS: dict[str, dict[str, Any]] = {
    ".pdf": {"metadata": {"CreationDate": None}},
    ".png": {"dpi": 200},
}


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
    ax = curves(runs, f"{'soft_' if soft else ''}margin_{norm}", against, ax)
    ax.set_yscale("log", nonpositive="mask")
    size = NORMS.get(norm, r"\|w\|")
    value = r"\ell^{-1}(\mathcal{L})" if soft else r"\mathrm{min}_i\, q_i"
    ax.set_ylabel(rf"margin ${value}/{size}^{{{degree(runs)}}}$")
    return ax


def loss(runs: Runs, *, against: str = "log_time", ax: Axes | None = None) -> Axes:
    """Sum loss 𝓛, drawn from its logarithm: 10^(−400) is a point like any other."""
    ax = curves(runs, lambda run: _log10_loss(run["lam"]), against, ax)
    wide(ax, "y", power_of_ten)
    ax.set_ylabel(r"loss $\mathcal{L}$")
    start = max(_log10_loss(run["lam"][0]).max() for run in named(runs).values())
    ax.set_ylim(
        top=start + 1
    )  # a diverging run leaves the picture rather than flattening the others
    return ax


def _log10_loss(lam: np.ndarray) -> np.ndarray:
    return -lam / np.log(10)


def norms(
    runs: Runs, norm: str = "l2", *, against: str = "log_time", ax: Axes | None = None
) -> Axes:
    """Norm of the weights."""
    ax = curves(runs, f"norm_{norm}", against, ax)
    ax.set_yscale("log")
    ax.set_ylabel(rf"${NORMS.get(norm, '|w|')}$")
    return ax


def alignment_curves(
    runs: Runs, norm: str = "l2", *, against: str = "log_time", ax: Axes | None = None
) -> Axes:
    """1 − α, the distance of weights and gradient from being aligned: 0 at a KKT point of the
    max-margin problem."""
    ax = curves(runs, lambda run: 1 - run[f"alignment_{norm}"], against, ax)
    ax.set_yscale("log", nonpositive="mask")
    ax.set_ylabel(rf"$1 - \langle w, -g\rangle/({NORMS.get(norm, '|w|')}\,\|g\|_*)$")
    return ax


def energy_curves(runs: Runs, *, against: str = "log_time", ax: Axes | None = None) -> Axes:
    """The energy residual |∫‖h‖_* ds/ΔΛ − 1| from the first save on, as the method has summed it: 0
    along a flow."""
    ax = curves(runs, _energy, against, ax, marks=False)
    ax.set_yscale("log", nonpositive="mask")
    ax.set_ylabel("energy residual")
    return ax


def _energy(run: Trajectory) -> np.ndarray:
    risen, spent = (run[name] - run[name][:1] for name in ("lam", "dissipated"))
    return np.abs(spent / np.where(risen > 0, risen, np.nan) - 1)


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
    require(against)
    ax = ax or fresh_axes()
    for index, (label, run) in enumerate(named(runs).items()):
        x, low, middle, high = bands(run[against], best - run[f"margin_{norm}"])
        ax.plot(x, middle, label=mathtext(label), **look(index))
        if len(run) > 1:
            ax.fill_between(x, low, high, color=look(index)["color"], alpha=0.18, linewidth=0)
        if index == 0:
            right = x > 0
            x, middle = x[right], middle[right]
    ax.set(xscale="log", yscale="log")
    if slope is not None:
        start = len(x) // 2
        ax.plot(
            x[start:],
            middle[start] * (x[start:] / x[start]) ** slope,
            ":",
            color="0.4",
            label=f"slope ${slope:g}$",
        )
    if bound is not None:
        ax.plot(x, bound / x, "-", color="0.7", label=f"{bound:.3g}/x", zorder=0)
    ax.set_xlabel(r"logarithm of flow time, $\log t$" if against == "log_time" else AXES[against])
    ax.set_ylabel(rf"margin gap $\gamma^* - \gamma$, weights in ${NORMS.get(norm, '|w|')}$")
    return ax


def certificate(runs: Runs, *, ax: Axes | None = None) -> Axes:
    """The certificates of runs on one logarithmic axis, a row for each run and a point for each
    trajectory.

    All numbers are relative and small where a run can be trusted: the energy residual, the largest
    fall of the soft margin, 1 − α, and what rounding leaves of the softmax weights. Zeros are drawn
    at the left edge."""
    ax = ax or fresh_axes()
    rows = list(named(runs).items())
    for place, (_, run) in enumerate(rows):
        found = run.certificate
        numbers = (np.abs(found.energy), found.fall, 1 - found.alignment, 10.0**-found.digits)
        for index, (value, (marker, label)) in enumerate(
            zip(numbers, _CERTIFIED.items(), strict=True)
        ):
            known = value[np.isfinite(value)]
            height = np.full(known.shape, len(rows) - 1 - place + 0.12 * (1.5 - index))
            shown = {
                "label": label if place == 0 else None,
                "color": look(index)["color"],
                "alpha": 0.8,
            }
            ax.plot(
                np.maximum(known, _ZERO), height, marker, markersize=4, linestyle="none", **shown
            )
    ax.set_xscale("log")
    ax.set_xlim(_ZERO / 3, 30)
    ax.set_yticks(range(len(rows)), [mathtext(label) for label, _ in reversed(rows)])
    ax.set_ylim(-0.6, len(rows) - 0.4)
    ax.set_xlabel("relative size; 0 at the left edge")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    return ax


_CERTIFIED = {
    "o": "energy residual",
    "s": "largest fall of the soft margin",
    "^": r"$1 - \alpha$",
    "d": "rounding of the softmax weights",
}


_ZERO = 1e-17


def overview(runs: Mapping[str, Trajectory], *, against: str = "log_time") -> Figure:
    """Margins in ℓ1, ℓ2 and ℓ∞ and the loss, side by side, with one legend."""
    with style():
        fig, axes = plt.subplots(2, 2, figsize=(6.75, 5.4), layout="constrained", sharex=True)
        for ax, norm in zip(axes.flat, ("l1", "l2", "linf"), strict=False):
            margins(runs, norm, against=against, ax=ax)
        loss(runs, against=against, ax=axes[1, 1])
        for ax in axes[0]:
            ax.set_xlabel("")
        handles = [*legend(runs), *key()]
        fig.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    return fig


def trust(runs: Mapping[str, Trajectory], *, against: str = "log_time") -> Figure:
    """1 − α in ℓ1, ℓ2 and ℓ∞ and the energy residual, side by side, and the certificates below."""
    with style():
        fig = plt.figure(figsize=(6.75, 5.4 + 0.35 * len(runs)), layout="constrained")
        parts: Any = fig.subfigures(2, 1, height_ratios=[5.4, 0.7 + 0.35 * len(runs)])
        upper, lower = parts
        axes = upper.subplots(2, 2, sharex=True)
        for ax, norm in zip(axes.flat, ("l1", "l2", "linf"), strict=False):
            alignment_curves(runs, norm, against=against, ax=ax)
        energy_curves(runs, against=against, ax=axes[1, 1])
        for ax in axes[0]:
            ax.set_xlabel("")
        upper.legend(
            handles=[*legend(runs), *key()], loc="outside lower center", ncols=2, frameon=False
        )
        certificate(runs, ax=lower.subplots())
    return fig


def save(fig: Figure, path: str | Path, runs: Mapping[str, Trajectory] | None = None) -> list[Path]:
    """Write ``path`` as PDF and PNG, and beside them the values of ``runs`` as CSV. Same data, same
    bytes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    written = []
    with style():
        for suffix, options in _FORMATS.items():
            written.append(path.with_suffix(suffix))
            fig.savefig(written[-1], **options)
    if runs is not None:
        written.append(path.with_suffix(".csv"))
        _write_csv(runs, written[-1])
    return written


def _write_csv(runs: Mapping[str, Trajectory], path: Path) -> None:
    """One row for each run, trajectory and save point; the scalar values of any run as columns."""
    names = list(dict.fromkeys(n for run in runs.values() for n in run.names if run[n].ndim == 2))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["run", "trajectory", "save", *names])
        for label, run in runs.items():
            for b in range(len(run)):
                for k in range(run["lam"].shape[0]):
                    row = [run[n][k, b] if n in run else np.nan for n in names]
                    writer.writerow([label, b, k, *(f"{v:.12g}" for v in row)])
