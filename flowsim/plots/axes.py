"""Curves of runs on an Axes: looks that agree between figures, bands over seeds, axes over many
decades."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from flowsim.run.summary import crossing, position, separation
from flowsim.run.trajectory import Trajectory

Runs: TypeAlias = Trajectory | Mapping[str, Trajectory]


DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2, 2, 2)))


AXES = {
    "log_time": "flow time $t$",
    "lam": r"level $\Lambda = \log(1/\mathcal{L})$",
    "steps": "steps",
    "arclength": "arclength $s$ in the rule's norm",
    "relative": r"relative arclength $\sigma = \int \|dw\|/\|w\|$",
}


NORMS = {"l1": r"\|w\|_1", "l2": r"\|w\|_2", "linf": r"\|w\|_\infty"}


TICKS = [
    0.0,
    *(sign * p for sign in (-1, 1) for k in range(6) for p in (3 * 10.0**k, 10.0 ** (k + 1))),
]


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


# --------------------------------------------------------------------------------------------------
# Curves
# --------------------------------------------------------------------------------------------------


def require(against: str) -> None:
    if against not in AXES:
        raise ValueError(f"plots: got against={against!r}, expected one of {', '.join(AXES)}")


def fresh_axes() -> Axes:
    return plt.subplots(layout="constrained")[1]


def named(runs: Runs) -> Mapping[str, Trajectory]:
    return {runs.label: runs} if isinstance(runs, Trajectory) else runs


def look(index: int) -> dict[str, Any]:
    colours = mpl.color_sequences["petroff10"]
    return {"color": colours[index % len(colours)], "linestyle": DASHES[index % len(DASHES)]}


def curves(
    runs: Runs,
    value: str | Callable[[Trajectory], np.ndarray],
    against: str,
    ax: Axes | None,
    *,
    marks: bool = True,
) -> Axes:
    """A curve of each run: the values of a name, or a function of the run that gives them ``(K,
    B)``."""
    require(against)
    ax = ax or fresh_axes()
    for index, (label, run) in enumerate(named(runs).items()):
        style = look(index)
        x, low, middle, high = bands(
            position(run, against), run[value] if isinstance(value, str) else value(run)
        )
        ax.plot(x, middle, label=mathtext(label), **style)
        if len(run) > 1:
            ax.fill_between(x, low, high, color=style["color"], alpha=0.18, linewidth=0)
        for marker, moment in (
            (("o", separation(run, against)), ("^", crossing(run, against))) if marks else ()
        ):
            if np.isfinite(moment):
                height = np.interp(moment, x, middle)
                mark = {
                    "color": style["color"],
                    "markersize": 4,
                    "markeredgecolor": "white",
                    "zorder": 3,
                }
                ax.plot(moment, height, marker, **mark)
    along(ax, against)
    return ax


def along(ax: Axes, against: str) -> None:
    """The horizontal axis of a clock."""
    if against == "log_time":
        wide(ax, "x", power_of_ten)
    elif against == "lam":
        wide(ax, "x", plain)
    elif against == "steps":
        ax.set_xscale("log")
    ax.set_xlabel(AXES[against])


def bands(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Grid, 10th percentile, median and 90th percentile over trajectories of y(x), both ``(K, B)``.

    Trajectories pass their save points at different x, so each is first read at the median
    positions; the result covers the x that all trajectories which go on to the end of the curve
    have reached."""
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


# --------------------------------------------------------------------------------------------------
# Axes
# --------------------------------------------------------------------------------------------------


def wide(ax: Axes, which: str, words: Callable[[float], str]) -> None:
    """An axis that is linear near 0 and logarithmic far out, on both sides."""
    set_scale, axis = (ax.set_xscale, ax.xaxis) if which == "x" else (ax.set_yscale, ax.yaxis)
    set_scale("asinh", linear_width=3)
    axis.set_major_locator(FixedLocator(TICKS))
    axis.set_major_formatter(FuncFormatter(lambda value, _: words(value)))
    axis.set_minor_locator(NullLocator())


def power_of_ten(exponent: float) -> str:
    return f"$10^{{{exponent:.0f}}}$"


def plain(value: float) -> str:
    return f"{value:,.0f}".replace(",", "\u2009")


def degree(runs: Runs) -> str:
    degrees = {run.provenance.get("objective", {}).get("degree") for run in named(runs).values()}
    return f"{degrees.pop():g}" if len(degrees) == 1 and None not in degrees else "L"


def legend(runs: Runs) -> list[Artist]:
    return [Line2D([], [], label=mathtext(label), **look(i)) for i, label in enumerate(named(runs))]


def key() -> list[Artist]:
    """What marks and bands mean."""
    grey: dict[str, Any] = {"color": "0.4", "linestyle": "none", "markersize": 4}
    return [
        Line2D([], [], marker="o", label="training accuracy 1", **grey),
        Line2D([], [], marker="^", label=r"$t_0$: first $\Lambda > 0$", **grey),
        Patch(color="0.4", alpha=0.18, linewidth=0, label="10th to 90th percentile over seeds"),
    ]


def mathtext(label: str) -> str:
    """A plain label as matplotlib sets it: ℓ2 becomes ℓ with a subscript."""
    label = re.sub(
        r"ℓ(∞|[\d.]*\d)", lambda m: rf"$\ell_{{{m[1].replace('∞', chr(92) + 'infty')}}}$", label
    )
    return label.replace("ΔΛ", r"$\Delta\Lambda$")
