"""Runs as rows of a table: when each separated, where it ended, what it cost, why it stopped."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy import ndarray as Array

from flowsim.run.trajectory import Trajectory

_MARGINS = ("margin_l1", "margin_l2", "margin_linf")


def summarise(runs: Mapping[str, Trajectory]) -> list[dict[str, Any]]:
    """One row for each run: medians over seeds of t₀, the final readings, margins, alignment and
    work, and why it stopped. Values are those at each trajectory's last save; NaN where a run has
    none."""
    return [_row(label, run) for label, run in runs.items()]


def _row(label: str, run: Trajectory) -> dict[str, Any]:
    own = run.provenance.get("norm") or "l2"
    margins = [name for name in _MARGINS if name in run]
    stopped = Counter(status.name for status in run.statuses)
    reasons = [f"{count} × {name}" for name, count in stopped.items()]
    return {
        "run": label,
        "t0": 10 ** crossing(run),
        "lam": _median_at_end(run, "lam"),
        **{name: _median_at_end(run, name) for name in margins},
        "alignment": _median_at_end(run, f"alignment_{own}"),
        "energy": np.median(_energy_excess(run)),
        "sliding": _median_at_end(run, "tally_sliding"),
        "releases": _median_at_end(run, "tally_releases"),
        "steps": _median_at_end(run, "steps"),
        "gradients": _median_at_end(run, "tally_gradients"),
        "seconds": run.provenance["seconds"],
        "stopped": ", ".join(reasons),
    }


def _energy_excess(run: Trajectory) -> Array:
    """∫‖∇Λ‖_* ds over the rise of Λ, less one, up to the final state: zero along an exact steepest
    flow. NaN for a trajectory that did not rise."""
    end = run.final.readings
    risen = end["lam"].cpu().numpy() - run["lam"][0]
    spent = end["dissipated"].cpu().numpy() - run["dissipated"][0]
    unknown = np.full_like(risen, np.nan)
    return np.divide(spent, risen, out=unknown, where=risen > 0) - 1


def _median_at_end(run: Trajectory, name: str) -> float:
    """NaN where the run has no such value."""
    if name not in run:
        return np.nan
    return _median(_last_known, run[name])


def position(run: Trajectory, against: str) -> Array:
    """A coordinate along a run ``(K, B)``: the reading of a clock, for "log_time" as a decimal
    logarithm; for "time", t itself."""
    if against == "time":
        return np.exp(run["log_time"])
    if against == "log_time":
        return run["log_time"] / np.log(10)
    return run[against]


def crossing(run: Trajectory, against: str = "log_time") -> float:
    """Median over trajectories of the coordinate where Λ first exceeds 0 (t₀), by interpolation;
    NaN if never."""
    x = position(run, against)
    return _median(_where_positive, x, run["lam"])


def separation(run: Trajectory, against: str = "log_time") -> float:
    """Median over trajectories of the first save point at which every training example is
    classified; NaN if never, or if the accuracy was not observed."""
    if "accuracy" not in run:
        return np.nan
    x = position(run, against)
    return _median(_where_right, x, run["accuracy"])


def _median(of_one: Callable[..., float], *values: Array) -> float:
    """Median over trajectories of a function of each one's values, from ``(K, B)``."""
    columns = [value.T for value in values]
    trajectories = zip(*columns, strict=True)
    found = [of_one(*trajectory) for trajectory in trajectories]
    return float(np.median(found))


def _last_known(value: Array) -> float:
    known = value[np.isfinite(value)]
    if known.size == 0:
        return np.nan
    return known[-1]


def _where_right(x: Array, accuracy: Array) -> float:
    found = x[accuracy >= 1]
    if found.size == 0:
        return np.nan
    return found[0]


def _where_positive(x: Array, lam: Array) -> float:
    above = np.flatnonzero(lam > 0)
    if not above.size:
        return np.nan
    k = above[0]
    known = k > 0 and np.isfinite(x[k - 1])
    if not known:
        return x[k]
    x = x[k - 1 : k + 1]
    lam = lam[k - 1 : k + 1]
    return np.interp(0.0, lam, x)
