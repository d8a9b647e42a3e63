"""Curves of runs on an Axes: looks that agree between figures, bands over seeds, axes over many
decades."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias, TypeVar

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, NullLocator
from numpy import ndarray as Array

from flowsim.run.summary import crossing, position, separation
from flowsim.run.trajectory import Trajectory

Runs: TypeAlias = Trajectory | Mapping[str, Trajectory]
Style: TypeAlias = dict[str, Any]
Thing = TypeVar("Thing")

DASHES = (
    "-",
    "--",
    "-.",
    ":",
    (0, (5, 1, 1, 1, 1, 1)),
    (0, (8, 2, 2, 2)),
)

CLOCKS = {
    "log_time": "flow time $t$",
    "lam": r"level $\Lambda = \log(1/\mathcal{L})$",
    "steps": "steps",
    "arclength": "arclength $s$ in the rule's norm",
    "relative": r"relative arclength $\sigma = \int \|dw\|/\|w\|$",
    "time": r"flow time $t$, for discrete rules $\eta k$",
}

NORMS = {"l1": r"\|w\|_1", "l2": r"\|w\|_2", "linf": r"\|w\|_\infty"}

BAND: Style = {"alpha": 0.18, "linewidth": 0}
MOMENT: Style = {"markersize": 4, "markeredgecolor": "white", "zorder": 3}

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


def curves(
    runs: Runs,
    value: Callable[[Trajectory], Array],
    against: str,
    ax: Axes | None,
    *,
    marks: bool = True,
) -> Axes:
    """A curve of each run over a clock, of the values ``(K, B)`` that a function gives, on a
    logarithmic axis. With ``marks``, a circle where the run separated and a triangle at its t₀."""
    ax = along(against, ax)
    for label, run, look in dressed(labelled(runs)):
        places = position(run, against)
        x, middle = draw(ax, places, value(run), look, label)
        moments = {"o": separation(run, against), "^": crossing(run, against)}
        for marker, moment in moments.items():
            if marks and np.isfinite(moment):
                height = np.interp(moment, x, middle)
                ax.plot(moment, height, marker, color=look["color"], **MOMENT)
    ax.set_yscale("log", nonpositive="mask")
    return ax


def draw(ax: Axes, x: Array, y: Array, look: Style, label: str) -> tuple[Array, Array]:
    """The median over trajectories of y(x), both ``(K, B)``, with its band; its points are
    returned."""
    grid, low, middle, high = bands(x, y)
    ax.plot(grid, middle, label=mathtext(label), **look)
    trajectories = x.shape[1]
    if trajectories > 1:
        colour = look["color"]
        ax.fill_between(grid, low, high, color=colour, **BAND)
    return grid, middle


def bands(x: Array, y: Array) -> tuple[Array, Array, Array, Array]:
    """Grid, 10th percentile, median and 90th percentile over trajectories of y(x), both ``(K, B)``.

    Trajectories pass their save points at different x, so each is first read at the median
    positions; the result covers the x that all trajectories which go on to the end of the curve
    have reached."""
    reached = _known(x, y).all(1)
    if not reached.any():
        return (np.full(1, np.nan),) * 4
    medians = np.median(x[reached], axis=1)
    grid = np.sort(medians)
    columns = zip(x.T, y.T, strict=True)
    read = np.array([_read(grid, *column) for column in columns])
    fractions = [0.1, 0.5, 0.9]
    low, middle, high = np.quantile(read, fractions, axis=0)
    return grid, low, middle, high


def _known(x: Array, y: Array) -> Array:
    return np.isfinite(x) & np.isfinite(y)


def _read(grid: Array, x: Array, y: Array) -> Array:
    """One trajectory's y(x), where both are known, at the places of a grid."""
    known = _known(x, y)
    x = x[known]
    y = y[known]
    order = np.argsort(x, kind="stable")
    return np.interp(grid, x[order], y[order])


# --------------------------------------------------------------------------------------------------
# Looks and words
# --------------------------------------------------------------------------------------------------


def labelled(runs: Runs) -> Mapping[str, Trajectory]:
    return {runs.label: runs} if isinstance(runs, Trajectory) else runs


def look(index: int) -> Style:
    """Colour and dashes of the curve at a place in the order."""
    colours = mpl.color_sequences["petroff10"]
    colour = colours[index % len(colours)]
    dashes = DASHES[index % len(DASHES)]
    return {"color": colour, "linestyle": dashes}


def dressed(things: Mapping[str, Thing]) -> Iterator[tuple[str, Thing, Style]]:
    """Each label and its thing, with the look of its place."""
    for index, (label, thing) in enumerate(things.items()):
        yield label, thing, look(index)


def mathtext(label: str) -> str:
    """A plain label as matplotlib sets it: ℓ2 becomes ℓ with a subscript."""
    label = label.replace("ΔΛ", r"$\Delta\Lambda$").replace("ℓ∞", r"$\ell_{\infty}$")
    return re.sub(r"ℓ([\d.]*\d)", r"$\\ell_{\1}$", label)


def norm_symbol(norm: str) -> str:
    """The norm of the weights by its column name, in math mode."""
    return NORMS.get(norm, r"\|w\|")


def degree(runs: Runs) -> str:
    """The exponent that normalises a margin: a number if all runs have it in common."""
    records = [run.provenance for run in labelled(runs).values()]
    objectives = [record.get("objective", {}) for record in records]
    first, *others = {objective.get("degree") for objective in objectives}
    return "L" if others or first is None else f"{first:g}"


def legend_below(figure: Figure | SubFigure, runs: Runs) -> None:
    """The legend of a whole figure: its curves, and what marks and bands mean."""
    grey: Style = {"color": "0.4", "linestyle": "none", "markersize": 4}
    handles = [
        *(
            Line2D([], [], label=mathtext(name), **look)
            for name, _, look in dressed(labelled(runs))
        ),
        Line2D([], [], marker="o", label="training accuracy 1", **grey),
        Line2D([], [], marker="^", label=r"$t_0$: first $\Lambda > 0$", **grey),
        Patch(color="0.4", label="10th to 90th percentile over seeds", **BAND),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)


# --------------------------------------------------------------------------------------------------
# Axes
# --------------------------------------------------------------------------------------------------


def along(against: str, ax: Axes | None = None) -> Axes:
    """The Axes that was given, or a new one, with a clock along its horizontal axis."""
    if against not in CLOCKS:
        raise ValueError(f"plots: got against={against!r}, expected one of {', '.join(CLOCKS)}")
    ax = ax or new_axes()
    if against == "log_time":
        wide(ax, "x", power_of_ten)
    elif against == "lam":
        wide(ax, "x", whole)
    elif against == "steps":
        ax.set_xscale("log")
    ax.set_xlabel(CLOCKS[against])
    return ax


def new_axes() -> Axes:
    return plt.subplots(layout="constrained")[1]


def wide(ax: Axes, which: str, words: Callable[[float, Any], str]) -> None:
    """An axis that is linear near 0 and logarithmic far out, on both sides."""
    decades = 10.0 ** np.arange(6)
    right = [*3 * decades, *10 * decades]
    left = [-place for place in right]
    axis = getattr(ax, f"{which}axis")
    getattr(ax, f"set_{which}scale")("asinh", linear_width=3)
    axis.set_major_locator(FixedLocator([*left, 0.0, *right]))
    axis.set_major_formatter(words)
    axis.set_minor_locator(NullLocator())


def power_of_ten(exponent: float, _: Any = None) -> str:
    return f"$10^{{{exponent:.0f}}}$"


def whole(value: float, _: Any = None) -> str:
    return f"{value:,.0f}".replace(",", "\u2009")
