"""Figures for papers: functions of trajectories that draw on an Axes and return it.

``runs`` is a Trajectory or a mapping from labels to trajectories. A curve is the median over seeds, its band the 10th
to 90th percentile. Colours and dashes follow the order of the mapping, so that they agree between figures. Nothing
here sets global state or shows a window; `save` writes vector and pixel files and the data of the figure.
"""

import csv
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from flowsim.trajectory import Trajectory

Runs: TypeAlias = Trajectory | Mapping[str, Trajectory]

_DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2, 2, 2)))
_AXES = {
    "log_time": "flow time $t$",
    "lam": r"level $\Lambda = \log(1/\mathcal{L})$",
    "steps": "steps",
    "arclength": "arclength $s$ in the rule's norm",
    "relative": r"relative arclength $\sigma = \int \|dw\|/\|w\|$",
}
_NORMS = {"l1": r"\|w\|_1", "l2": r"\|w\|_2", "linf": r"\|w\|_\infty"}
_TICKS = [0.0, *(sign * p for sign in (-1, 1) for k in range(6) for p in (3 * 10.0**k, 10.0 ** (k + 1)))]

_FORMATS: dict[str, dict[str, Any]] = {".pdf": {"metadata": {"CreationDate": None}}, ".png": {"dpi": 200}}

STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "legend.fontsize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "lines.linewidth": 1.2,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "pdf.fonttype": 42,
    "svg.hashsalt": "flowsim",
}


@contextmanager
def style() -> Iterator[None]:
    """Matplotlib settings for a paper's figure, within a ``with`` block only."""
    with mpl.rc_context(STYLE):
        yield


def margins(
    runs: Runs, norm: str = "l2", *, against: str = "log_time", soft: bool = False, ax: Axes | None = None
) -> Axes:
    """Normalised margin of the weights' ``norm`` (its column name, such as "l1", "l2", "linf") on a log axis.

    A circle marks the first time that every training example is classified, a triangle the time t₀ where Λ > 0.
    """
    ax = _curves(runs, f"{'soft_' if soft else ''}margin_{norm}", against, ax)
    ax.set_yscale("log", nonpositive="mask")
    size = _NORMS.get(norm, r"\|w\|")
    value = r"\ell^{-1}(\mathcal{L})" if soft else r"\mathrm{min}_i\, q_i"
    ax.set_ylabel(rf"margin ${value}/{size}^{{{_degree(runs)}}}$")
    return ax


def loss(runs: Runs, *, against: str = "log_time", ax: Axes | None = None) -> Axes:
    """Sum loss 𝓛, drawn from its logarithm: 10^(−400) is a point like any other."""
    ax = _curves(runs, "lam", against, ax, transform=_log10_loss)
    _wide(ax, "y", _power_of_ten)
    ax.set_ylabel(r"loss $\mathcal{L}$")
    start = max(_log10_loss(run["lam"][0]).max() for run in _named(runs).values())
    ax.set_ylim(top=start + 1)  # a diverging run leaves the picture rather than flattening the others
    return ax


def _log10_loss(lam: np.ndarray) -> np.ndarray:
    return -lam / np.log(10)


def norms(runs: Runs, norm: str = "l2", *, against: str = "log_time", ax: Axes | None = None) -> Axes:
    """Norm of the weights."""
    ax = _curves(runs, f"norm_{norm}", against, ax)
    ax.set_yscale("log")
    ax.set_ylabel(rf"${_NORMS.get(norm, '|w|')}$")
    return ax


def alignment(runs: Runs, norm: str = "l2", *, against: str = "log_time", ax: Axes | None = None) -> Axes:
    """1 − α, the distance of weights and gradient from being aligned: 0 at a KKT point of the max-margin problem."""
    ax = _curves(runs, f"alignment_{norm}", against, ax, transform=lambda a: 1 - a)
    ax.set_yscale("log", nonpositive="mask")
    ax.set_ylabel(rf"$1 - \langle w, -g\rangle/({_NORMS.get(norm, '|w|')}\,\|g\|_*)$")
    return ax


def overview(runs: Mapping[str, Trajectory], *, against: str = "log_time") -> Figure:
    """Margins in ℓ1, ℓ2 and ℓ∞ and the loss, side by side, with one legend."""
    with style():
        fig, axes = plt.subplots(2, 2, figsize=(6.75, 5.4), layout="constrained", sharex=True)
        for ax, norm in zip(axes.flat, ("l1", "l2", "linf"), strict=False):
            margins(runs, norm, against=against, ax=ax)
        loss(runs, against=against, ax=axes[1, 1])
        for ax in axes[0]:
            ax.set_xlabel("")
        handles = [*_legend(runs), *_key()]
        fig.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    return fig


def save(fig: Figure, path: str | Path, runs: Mapping[str, Trajectory] | None = None) -> list[Path]:
    """Write ``path`` as PDF and PNG, and beside them the values of ``runs`` as CSV. Same data, same bytes."""
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


# ---------------------------------------------------------------------------------------------------------------
# Curves
# ---------------------------------------------------------------------------------------------------------------


def _named(runs: Runs) -> Mapping[str, Trajectory]:
    return {runs.label: runs} if isinstance(runs, Trajectory) else runs


def _look(index: int) -> dict[str, Any]:
    colours = mpl.color_sequences["petroff10"]
    return {"color": colours[index % len(colours)], "linestyle": _DASHES[index % len(_DASHES)]}


def _curves(
    runs: Runs,
    name: str,
    against: str,
    ax: Axes | None,
    transform: Callable[[np.ndarray], np.ndarray] = lambda y: y,
) -> Axes:
    if against not in _AXES:
        raise ValueError(f"plots: got against={against!r}, expected one of {', '.join(_AXES)}")
    if ax is None:
        ax = plt.subplots(layout="constrained")[1]
    for index, (label, run) in enumerate(_named(runs).items()):
        look = _look(index)
        x, low, middle, high = bands(position(run, against), transform(run[name]))
        ax.plot(x, middle, label=_mathtext(label), **look)
        if len(run) > 1:
            ax.fill_between(x, low, high, color=look["color"], alpha=0.18, linewidth=0)
        for marker, moment in (("o", separation(run, against)), ("^", crossing(run, against))):
            if np.isfinite(moment):
                height = np.interp(moment, x, middle)
                ax.plot(
                    moment,
                    height,
                    marker,
                    color=look["color"],
                    markersize=4,
                    markeredgecolor="white",
                    zorder=3,
                )
    if against == "log_time":
        _wide(ax, "x", _power_of_ten)
    elif against == "lam":
        _wide(ax, "x", _plain)
    elif against == "steps":
        ax.set_xscale("log")
    ax.set_xlabel(_AXES[against])
    return ax


def position(run: Trajectory, against: str) -> np.ndarray:
    """The horizontal coordinate ``(K, B)``: a reading, for time its decimal logarithm."""
    x = run[against]
    return x / np.log(10) if against == "log_time" else x


def bands(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Grid, 10th percentile, median and 90th percentile over trajectories of y(x), both ``(K, B)``.

    Trajectories pass their save points at different x, so each is first read at the median positions; the result
    covers the x that all trajectories which go on to the end of the curve have reached.
    """
    finite = np.isfinite(x) & np.isfinite(y)
    usable = finite.all(1)
    if not usable.any():
        nothing = np.full(1, np.nan)
        return nothing, nothing, nothing, nothing
    grid = np.sort(np.median(x[usable], axis=1))
    read = []
    for b in range(x.shape[1]):
        order = np.argsort(x[finite[:, b], b], kind="stable")
        xs, ys = x[finite[:, b], b][order], y[finite[:, b], b][order]
        read.append(np.interp(grid, xs, ys))
    low, middle, high = np.quantile(np.array(read), [0.1, 0.5, 0.9], axis=0)
    return grid, low, middle, high


def crossing(run: Trajectory, against: str = "log_time") -> float:
    """Median over trajectories of the coordinate where Λ first exceeds 0 (t₀), by interpolation; NaN if never."""
    return _first(position(run, against), run["lam"])


def separation(run: Trajectory, against: str = "log_time") -> float:
    """Median over trajectories of the first save point at which every training example is classified."""
    if "accuracy" not in run:
        return np.nan
    x, right = position(run, against), run["accuracy"] >= 1
    found = [x[right[:, b].argmax(), b] if right[:, b].any() else np.nan for b in range(len(run))]
    return float(np.median(found))


def _first(x: np.ndarray, level: np.ndarray) -> float:
    found = []
    for b in range(x.shape[1]):
        above = np.nonzero(level[:, b] > 0)[0]
        k = above[0] if above.size else -1
        if k <= 0 or not np.isfinite(x[k - 1, b]):
            found.append(x[k, b] if k >= 0 else np.nan)
        else:
            share = -level[k - 1, b] / (level[k, b] - level[k - 1, b])
            found.append(x[k - 1, b] + share * (x[k, b] - x[k - 1, b]))
    return float(np.median(found))


# ---------------------------------------------------------------------------------------------------------------
# Axes
# ---------------------------------------------------------------------------------------------------------------


def _wide(ax: Axes, which: str, words: Callable[[float], str]) -> None:
    """An axis that is linear near 0 and logarithmic far out, on both sides."""
    set_scale, axis = (ax.set_xscale, ax.xaxis) if which == "x" else (ax.set_yscale, ax.yaxis)
    set_scale("asinh", linear_width=3)
    axis.set_major_locator(FixedLocator(_TICKS))
    axis.set_major_formatter(FuncFormatter(lambda value, _: words(value)))
    axis.set_minor_locator(NullLocator())


def _power_of_ten(exponent: float) -> str:
    return f"$10^{{{exponent:.0f}}}$"


def _plain(value: float) -> str:
    return f"{value:,.0f}".replace(",", "\u2009")


def _degree(runs: Runs) -> str:
    degrees = {run.provenance.get("objective", {}).get("degree") for run in _named(runs).values()}
    return f"{degrees.pop():g}" if len(degrees) == 1 and None not in degrees else "L"


def _legend(runs: Runs) -> list[Artist]:
    return [Line2D([], [], label=_mathtext(label), **_look(i)) for i, label in enumerate(_named(runs))]


def _key() -> list[Artist]:
    """What marks and bands mean."""
    plain: dict[str, Any] = {"color": "0.4", "linestyle": "none", "markersize": 4}
    return [
        Line2D([], [], marker="o", label="training accuracy 1", **plain),
        Line2D([], [], marker="^", label=r"$t_0$: first $\Lambda > 0$", **plain),
        Patch(color="0.4", alpha=0.18, linewidth=0, label="10th to 90th percentile over seeds"),
    ]


def _mathtext(label: str) -> str:
    """A plain label as matplotlib sets it: ℓ2 becomes ℓ with a subscript."""
    label = re.sub(r"ℓ(∞|[\d.]*\d)", lambda m: rf"$\ell_{{{m[1].replace('∞', chr(92) + 'infty')}}}$", label)
    return label.replace("ΔΛ", r"$\Delta\Lambda$")
