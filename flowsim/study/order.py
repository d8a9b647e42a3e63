"""How fast discrete training approaches a flow as its learning rate shrinks: the order, fitted,
with an interval."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torch import Tensor

from flowsim.checks import as_ladder
from flowsim.diagnostics.margins import Observer
from flowsim.diagnostics.series import Column, positive
from flowsim.motion.clocks import SavePlan
from flowsim.motion.rule import Rule
from flowsim.motion.state import State
from flowsim.problems.objective import Objective
from flowsim.study.comparison import Comparison, compare

_FINER = 8  # than the last learning rate: the reference where there is no flow


@dataclass(frozen=True)
class Order:
    """Fitted orders of B trajectories, ``each (B,)``; their median, and an interval from ``low`` to
    ``high`` that holds the median of the seeds' distribution with probability ``coverage``,
    whatever that distribution is."""

    each: Column
    median: float
    low: float
    high: float
    coverage: float

    def __str__(self) -> str:
        interval = f"{self.low:.3f} to {self.high:.3f}"
        return f"{self.median:.3f} ({interval}, {self.coverage:.1%} interval of the median)"

    @staticmethod
    def of(each: Column, confidence: float = 0.95) -> "Order":
        """The narrowest interval between the k-th smallest and the k-th largest that covers the
        median with ``confidence``, or all of them: 1 − 2·P(fewer than k of n fair coins fall
        heads). NaNs are left out."""
        known = np.sort(each[np.isfinite(each)])
        n = len(known)
        if n == 0:
            return Order(each, math.nan, math.nan, math.nan, 0.0)
        ways = [math.comb(n, k) for k in range(n)]
        below = np.cumsum(ways) / 2.0**n
        covered = 1 - 2 * below
        half = range((n + 1) // 2)
        k = max((k for k in half if covered[k] >= confidence), default=0)
        coverage = max(0.0, covered[k])
        median = float(np.median(known))
        return Order(each, median, known[k], known[n - 1 - k], coverage)


@dataclass(frozen=True)
class OrderStudy:
    """Runs of one method with the learning rates of ``ladder``, coarse to fine, and what they tend
    to."""

    ladder: tuple[float, ...]
    comparison: Comparison

    def distances(self, what: str = "weights", at: str = "log_time") -> Float[np.ndarray, "R B"]:
        """The largest distance of each run over its save points, as `Comparison` measures it; NaN
        for a run that has stopped."""
        largest = []
        for label in self.comparison.labels:
            apart = np.abs(self.comparison[label, what, at])
            flat = apart.reshape(*apart.shape[:2], -1)
            largest.append(flat.max((0, 2)))
        return np.stack(largest)

    def order(self, what: str = "weights", at: str = "log_time") -> Order:
        """p of a least-squares line log distance = p log η + c through the ladder, for each
        trajectory."""
        y = np.log(positive(self.distances(what, at)))
        log_lr = np.log(self.ladder)
        x = log_lr - log_lr.mean()
        centred = y - y.mean(0)
        return Order.of(x @ centred / (x @ x))


def order_study(
    problem: Objective,
    method: Callable[[float], Rule],
    w0: Tensor | State,
    *,
    ladder: Sequence[float],
    until: SavePlan,
    flow: Rule | None = None,
    observe: Mapping[str, Observer] | None = None,
    max_steps: int = 1_000_000,
) -> OrderStudy:
    """Run ``method(η)`` for each η of ``ladder`` and fit the order at which it approaches ``flow``
    as η → 0.

    Without a flow, as for norms with ties on smooth nets, an eighth of the last η stands for it.
    That shows at which order runs approach each other, and not what; fitted orders are then too
    large, by 0.03 on a ladder of 64.

    Give the flow an ``rtol`` that leaves it more exact than the finest run. ``until`` is best
    `flowsim.time`, or for normalised rules `flowsim.arclength`."""
    ladder = as_ladder("order_study", ladder)
    rules = {f"η = {lr:g}": method(lr) for lr in ladder}
    if len(rules) < len(ladder):
        raise ValueError(
            f"order_study: got ladder={ladder}, expected learning rates that differ by more than "
            "1e-6"
        )
    reference = method(ladder[-1] / _FINER) if flow is None else flow
    found = compare(
        problem, reference, rules, w0, until=until, observe=observe, max_steps=max_steps
    )
    return OrderStudy(ladder, found)
