"""Pictures of discrete runs beside a flow: what each of them measures, how far apart they are, and
at which order they approach it."""

import re
from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flowsim.plots.axes import (
    BAND,
    CLOCKS,
    Style,
    along,
    bands,
    draw,
    look,
    mathtext,
    new_axes,
    style,
)
from flowsim.run.summary import position
from flowsim.study.comparison import Comparison
from flowsim.study.order import OrderStudy

_MARKERS = "osD^vPX*"
_FLOW: Style = {"color": "k", "linewidth": 1.0, "zorder": 1}
_POINTS: Style = {
    "markersize": 4,
    "linestyle": "none",
    "fillstyle": "none",
    "zorder": 2,
}

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
    ax = along(against, ax)
    draw(ax, position(found.flow, against), found.flow[what], _FLOW, found.flow.label)
    for index, (label, run) in enumerate(found.runs.items()):
        grid, _, middle, _ = bands(position(run, against), run[what])
        ax.plot(grid, middle, label=mathtext(label), **_marked(index) | _POINTS)
    ax.set_ylabel(CLOCKS.get(what, _words(what)))
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
    ax = along(against, ax)
    for index, (label, run) in enumerate(found.runs.items()):
        distance = np.abs(found[label, what, at])
        seen = np.where(distance > 0, distance, np.nan)
        draw(ax, position(run, against), seen, _marked(index), label)
    ax.set_yscale("log", nonpositive="mask")
    ax.set_ylabel(_distance(what, at))
    return ax


def comparison(found: Comparison, *, against: str | None = None) -> Figure:
    """Λ and a margin, and below them distances of weights and of directions, at equal t and Λ; one
    legend.

    ``against`` is for the panels on the left: by default "time", or "log_time" for runs beyond t =
    1000."""
    flow = found.flow
    long = np.nanmax(flow["log_time"]) > np.log(1000)
    against = against or ("log_time" if long else "time")
    margins = [name for name in flow.names if name.startswith("margin_")]
    own = f"margin_{flow.provenance.get('norm')}"
    value = own if own in margins else next(iter(margins), "arclength")
    with style():
        fig, axes = plt.subplots(2, 2, figsize=(6.75, 5.4), layout="constrained")
        beside_flow(found, "lam", against=against, ax=axes[0, 0])
        beside_flow(found, value, against="lam", ax=axes[0, 1])
        apart(found, "weights", "log_time", against=against, ax=axes[1, 0])
        apart(found, "direction", "lam", against="lam", ax=axes[1, 1])
        shown = axes[0, 0].get_legend_handles_labels()
        fig.legend(*shown, loc="outside lower center", ncols=2, frameon=False)
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
    ax = ax or new_axes()
    named = {"": studies} if isinstance(studies, OrderStudy) else studies
    for index, (label, study) in enumerate(named.items()):
        distances = study.distances(what, at)
        known = distances[:, np.isfinite(distances).all(0)]
        if known.size:
            fitted = study.order(what, at)
            words = f"{fitted.median:.2f} ({fitted.low:.2f} to {fitted.high:.2f})"
            words = mathtext(f"{label}: {words}" if label else words)
            look = _marked(index) | {"label": words}
            _draw_order(ax, np.array(study.ladder), known, look)
    ax.lines[-1].set_label("slope 1")
    ax.set(xscale="log", yscale="log", xlabel=r"learning rate $\eta$")
    ax.set_ylabel(f"largest {_distance(what, at)}")
    ax.legend(frameon=False)
    return ax


def _draw_order(ax: Axes, rates: np.ndarray, distances: np.ndarray, look: Style) -> None:
    """Distances ``(rates, B)``: their median, their range, and a line of slope 1 through the
    last."""
    low, middle, high = np.quantile(distances, [0.0, 0.5, 1.0], axis=1)
    slope = middle[-1] / rates[-1]
    ax.plot(rates, middle, **look)
    ax.fill_between(rates, low, high, color=look["color"], **BAND)
    ax.plot(rates, slope * rates, ":", color="0.4")


def _distance(what: str, at: str) -> str:
    return f"{_DISTANCES.get(what, 'gap in ' + _words(what))} {_PLACES[at]}"


def _words(what: str) -> str:
    """The name of a measured value in running text: margin_l2 becomes margin ℓ2."""
    words = what.replace("_", " ").replace("linf", "l∞")
    return mathtext(re.sub(r"\bl(?=\d|∞)", "ℓ", words))


def _marked(index: int) -> Style:
    marker = _MARKERS[index % len(_MARKERS)]
    return look(index) | {"marker": marker, "markersize": 3}
