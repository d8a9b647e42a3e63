"""Pictures of discrete runs beside a flow: what each of them measures, how far apart they are, and
at which order they approach it."""

import re
from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flowsim.plots.axes import (
    AXES,
    along,
    bands,
    fresh_axes,
    look,
    mathtext,
    require,
    style,
)
from flowsim.run.summary import position
from flowsim.run.trajectory import Trajectory
from flowsim.study.comparison import Comparison
from flowsim.study.order import OrderStudy

_MARKERS = "osD^vPX*"


_PLACES = {
    "log_time": "at equal $t$",
    "lam": r"at equal $\Lambda$",
    "arclength": "at equal $s$",
    "nearest": "from the nearest point",
}


_DISTANCES = {
    "weights": r"$\|w - v\|_2/\|v\|_2$",
    "direction": r"$\|w/\|w\|_2 - v/\|v\|_2\|_2$",
    "outputs": r"$\|f(w) - f(v)\|_2/\|f(v)\|_2$",
}


def beside_flow(
    found: Comparison, what: str = "lam", *, against: str = "time", ax: Axes | None = None
) -> Axes:
    """A measured value of the flow as a line and of discrete runs as markers, medians over seeds.

    ``against`` is a clock, or "time" for t on a linear axis, where markers of a run with learning
    rate η are at x = ηk."""
    ax = _axes(against, ax)
    grid, low, middle, high = bands(_position(found.flow, against), found.flow[what])
    ax.plot(grid, middle, color="k", linewidth=1.0, label=mathtext(found.flow.label), zorder=1)
    if len(found.flow) > 1:
        ax.fill_between(grid, low, high, color="k", alpha=0.12, linewidth=0)
    for index, (label, run) in enumerate(found.runs.items()):
        grid, _, middle, _ = bands(_position(run, against), run[what])
        ax.plot(grid, middle, **_marks(index), label=mathtext(label))
    ax.set_ylabel(AXES.get(what, _words(what)))
    return ax


def apart(
    found: Comparison,
    what: str = "weights",
    at: str = "log_time",
    *,
    against: str = "time",
    ax: Axes | None = None,
) -> Axes:
    """The distance of discrete runs from the flow, in absolute value, along a clock of theirs;
    medians over seeds."""
    ax = _axes(against, ax)
    for index, (label, run) in enumerate(found.runs.items()):
        far = np.abs(found[label, what, at])
        grid, low, middle, high = bands(_position(run, against), np.where(far > 0, far, np.nan))
        line = _line(index)
        ax.plot(grid, middle, **line, label=mathtext(label))
        if len(run) > 1:
            ax.fill_between(grid, low, high, color=line["color"], alpha=0.18, linewidth=0)
    ax.set_yscale("log", nonpositive="mask")
    ax.set_ylabel(f"{_DISTANCES.get(what, 'gap in ' + _words(what))} {_PLACES[at]}")
    return ax


def comparison(found: Comparison, *, against: str | None = None) -> Figure:
    """Λ and a margin, and below them distances of weights and of directions, at equal t and Λ; one
    legend.

    ``against`` is for the panels on the left: by default "time", or "log_time" for runs beyond t =
    1000."""
    if against is None:
        against = "log_time" if np.nanmax(found.flow["log_time"]) > np.log(1000) else "time"
    margins = [name for name in found.flow.names if name.startswith("margin_")]
    own = f"margin_{found.flow.provenance.get('norm')}"
    value = own if own in margins else next(iter(margins), "arclength")
    with style():
        fig, axes = plt.subplots(2, 2, figsize=(6.75, 5.4), layout="constrained")
        beside_flow(found, "lam", against=against, ax=axes[0, 0])
        beside_flow(found, value, against="lam", ax=axes[0, 1])
        apart(found, "weights", "log_time", against=against, ax=axes[1, 0])
        apart(found, "direction", "lam", against="lam", ax=axes[1, 1])
        handles, labels = axes[0, 0].get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return fig


def order(
    studies: OrderStudy | Mapping[str, OrderStudy],
    what: str = "weights",
    at: str = "log_time",
    *,
    ax: Axes | None = None,
) -> Axes:
    """Largest distance from the flow over the learning rate, on logarithmic axes, with a dotted
    guide of slope 1.

    Lines are medians over seeds and bands their range; labels have the fitted order.
    """
    ax = ax or fresh_axes()
    named = {"": studies} if isinstance(studies, OrderStudy) else studies
    for index, (label, study) in enumerate(named.items()):
        far, fitted, line = study.distances(what, at), study.order(what, at), _line(index)
        far = far[:, np.isfinite(far).all(0)]
        if far.size == 0:
            continue
        words = f"{label}: " if label else ""
        words += f"{fitted.median:.2f} ({fitted.low:.2f} to {fitted.high:.2f})"
        ax.plot(study.ladder, np.median(far, 1), **line, label=mathtext(words))
        ax.fill_between(
            study.ladder, far.min(1), far.max(1), color=line["color"], alpha=0.12, linewidth=0
        )
        guide = np.median(far[-1]) * np.array(study.ladder) / study.ladder[-1]
        ax.plot(study.ladder, guide, ":", color="0.4", label="slope 1" if index == 0 else None)
    ax.set(xscale="log", yscale="log", xlabel=r"learning rate $\eta$")
    ax.set_ylabel(f"largest {_DISTANCES.get(what, 'gap in ' + _words(what))} {_PLACES[at]}")
    ax.legend(frameon=False)
    return ax


def _axes(against: str, ax: Axes | None) -> Axes:
    ax = ax or fresh_axes()
    if against == "time":
        ax.set_xlabel(r"flow time $t = \eta k$")
    else:
        require(against)
        along(ax, against)
    return ax


def _position(run: Trajectory, against: str) -> np.ndarray:
    return np.exp(run["log_time"]) if against == "time" else position(run, against)


def _words(what: str) -> str:
    """The name of a measured value in running text: margin_l2 becomes margin ℓ2."""
    return mathtext(re.sub(r"\bl(?=\d|∞)", "ℓ", what.replace("_", " ").replace("linf", "l∞")))


def _line(index: int) -> dict[str, Any]:
    return {**look(index), "marker": _MARKERS[index % len(_MARKERS)], "markersize": 3}


def _marks(index: int) -> dict[str, Any]:
    return {**_line(index), "markersize": 4, "linestyle": "none", "fillstyle": "none", "zorder": 2}
