"""Which targets do the measurements reach? Reads the tables in results/ and writes
results/targets.md.

The targets are the data below; "measured" is the worst over problems and seeds. Costs are the
cheapest that reach an accuracy among the tolerances of the table. Usage: python
benchmarks/targets.py"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from common import RESULTS, read

Rows = list[dict[str, Any]]
LEVELS = ("mean loss 1e-10", "mean loss 1e-100", "level 1e3", "level 1e4", "level 1e5")


@dataclass(frozen=True)
class Target:
    """``measure`` gives a number for every problem, which is to lie between ``least`` and
    ``most``."""

    row: str
    what: str
    most: float
    measure: Callable[[dict[str, Rows]], Iterable[float]]
    least: float = -math.inf

    def line(self, tables: dict[str, Rows]) -> str:
        found = list(self.measure(tables))
        goal = f"≤ {self.most:g}" if self.least == -math.inf else f"{self.least:g} … {self.most:g}"
        if not found:
            return f"| {self.row} | {self.what} | {goal} | not measured | – |"
        low, high = min(found), max(found)
        within = sum(self.least <= value <= self.most for value in found)
        shown = words(high) if self.least == -math.inf else f"{words(low)} … {words(high)}"
        reached = "yes" if within == len(found) else f"no: {within} of {len(found)}"
        return f"| {self.row} | {self.what} | {goal} | {shown} | {reached} |"


def words(value: float) -> str:
    if not math.isfinite(value):
        return "accuracy not reached"
    return f"{value:.0f}" if value == round(value) and abs(value) < 1e6 else f"{value:.3g}"


def problems(rows: Rows) -> list[Rows]:
    """The rows of each problem."""
    names = ("d", "n", "width", "seed", "norm")
    keys = [tuple(row.get(name) for name in names) for row in rows]
    return [
        [row for row, k in zip(rows, keys, strict=True) if k == key] for key in dict.fromkeys(keys)
    ]


def at(rows: Rows, method: str = "flowsim", tolerance: float | None = None, **where: Any) -> Rows:
    """The rows of a method, a tolerance, and whatever else."""
    where |= {"method": method} | ({} if tolerance is None else {"tolerance": tolerance})
    return [row for row in rows if all(row[name] == value for name, value in where.items())]


def errors(rows: Rows, level: str, method: str = "flowsim") -> dict[float, float]:
    """The error at a level by tolerance, where it is not measured against itself."""
    found = at(rows, method, milestone=level)
    return {
        r["tolerance"]: r["error"]
        for r in found
        if r["reference"] != f"{method}, {r['tolerance']:g}"
    }


def cheapest(
    level: str,
    error: float,
    judged: tuple[str, ...],
    unit: str = "gradients",
    method: str = "flowsim",
):
    """The least cost to a level among the tolerances whose error is small enough at the levels
    ``judged``."""

    def measure(rows: Rows) -> float:
        small = [
            {t for t, e in errors(rows, name, method).items() if e <= error} for name in judged
        ]
        good = set.intersection(*small)
        return min(
            (r[unit] for r in at(rows, method, milestone=level) if r["tolerance"] in good),
            default=math.inf,
        )

    return measure


def nets(measure: Callable[[Rows], float]) -> Callable[[dict[str, Rows]], Iterable[float]]:
    return lambda tables: [measure(rows) for rows in problems(tables["02_l2_relu_net"])]


def against_euler(rows: Rows) -> float:
    """CPU seconds of the flow over those of the loop for the same accuracy at the last level of
    both."""
    flow, loop = (
        cheapest(LEVELS[1], 1e-4, LEVELS[1:2], "cpu_seconds", method)
        for method in ("flowsim", "Euler on the log-loss")
    )
    return flow(rows) / loop(rows)


def order(rows: Rows) -> float:
    """Minus the slope of log error in log steps over the tolerances, at the first level."""
    found = errors(rows, LEVELS[0])
    steps = [at(rows, tolerance=t, milestone=LEVELS[0])[0]["steps"] for t in found]
    return -float(np.polyfit(np.log(steps), np.log(list(found.values())), 1)[0])


def milliseconds(rows: Rows) -> float:
    (row,) = at(rows, tolerance=1e-3, milestone=LEVELS[1])
    return 1e3 * row["cpu_seconds"] / (row["steps"] + row["rejected"])


def time_error(rows: Rows) -> float:
    """|log t| apart from the finest run's, at any level."""
    coarse, fine = (
        [at(rows, tolerance=t, milestone=name)[0]["log_time"] for name in LEVELS]
        for t in (1e-3, 1e-5)
    )
    return max(abs(a - b) for a, b in zip(coarse, fine, strict=True))


def late_time(tolerance: float) -> Callable[[Rows], float]:
    """|4γΛ·t𝓛 − 1| at Λ = 10⁴, which late in the flow of a model of degree 2 falls like 1 − α²."""

    def measure(rows: Rows) -> float:
        (row,) = at(rows, tolerance=tolerance, milestone="level 1e4")
        return abs(math.expm1(row["log_time"] - 1e4 + math.log(4e4 * row["soft_margin"])))

    return measure


def defect(*levels: str) -> Callable[[Rows], float]:
    return lambda rows: max(
        at(rows, tolerance=1e-3, milestone=name)[0]["energy_defect"] for name in levels
    )


def linear(d: int, column: str) -> Callable[[dict[str, Rows]], Iterable[float]]:
    rows = lambda tables: [r for r in at(tables["03_linear_models"], level=1e6) if r["d"] == d]  # noqa: E731
    return lambda tables: [abs(r[column]) if r["reached"] else math.inf for r in rows(tables)]


def wider(tables: dict[str, Rows]) -> list[float]:
    """Steps at the largest width over those at the smallest, for the same data sizes and seed."""
    rows = [r for r in at(tables["02_width"], milestone=LEVELS[0]) if r["seed"] == 0]
    steps = {r["width"]: r["steps"] for r in rows}
    return [steps[max(steps)] / steps[min(steps)]] if len(steps) > 1 else []


def papers_size(tables: dict[str, Rows]) -> list[float]:
    """CPU seconds of a step at d = 232, in each chunk of steps."""
    rows = [r for r in tables["02_width"] if r["d"] == 232]
    totals = [(0, 0.0), *((r["steps"] + r["rejected"], r["cpu_seconds"]) for r in rows)]
    return [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(totals)]


def polyhedral(
    norm: str, measure: Callable[[Rows], float]
) -> Callable[[dict[str, Rows]], Iterable[float]]:
    """Of each problem of the flows in one norm."""

    def each(tables: dict[str, Rows]) -> list[float]:
        rows = [
            r
            for r in tables.get("05_polyhedral_nets", [])
            if (r["part"], r["norm"]) == ("flows", norm)
        ]
        return [measure(found) for found in problems(rows)]

    return each


def last(column: str, tolerance: float) -> Callable[[Rows], float]:
    """What a flow has at Λ = 10⁴."""

    def measure(rows: Rows) -> float:
        found = at(rows, tolerance=tolerance, milestone=LEVELS[3])
        return found[0][column] if found else math.inf

    return measure


def refined(level: str) -> Callable[[Rows], float]:
    """How far the soft margins of two tolerances are apart."""

    def measure(rows: Rows) -> float:
        found = [
            r["soft_margin"] for t in (1e-2, 3e-3) for r in at(rows, tolerance=t, milestone=level)
        ]
        return abs(found[0] / found[1] - 1) if len(found) == 2 else math.inf

    return measure


def wider_in(norm: str) -> Callable[[dict[str, Rows]], list[float]]:
    """Steps to Λ = 2 at the largest width over those at the smallest."""

    def measure(tables: dict[str, Rows]) -> list[float]:
        rows = [
            r
            for r in tables.get("05_polyhedral_nets", [])
            if (r["part"], r["norm"]) == ("width", norm)
        ]
        steps = {r["width"]: r["steps"] for r in rows}
        return [steps[max(steps)] / steps[min(steps)]] if len(steps) > 1 else []

    return measure


def coordinates(tables: dict[str, Rows]) -> list[float]:
    """CPU seconds of the flow in ℓ1 to Λ = 20."""
    rows = [r for r in tables.get("05_polyhedral_nets", []) if r["part"] == "l1"]
    return [r["cpu_seconds"] if r["milestone"] == "level 20" else math.inf for r in rows]


def ladder(
    goals: dict[str, int], error: float, judged: Callable[[str], tuple[str, ...]], words: str
) -> list[Target]:
    return [
        Target(
            "ℓ2", f"gradients to {name}, {words}", most, nets(cheapest(name, error, judged(name)))
        )
        for name, most in goals.items()
    ]


TARGETS = [
    *ladder(
        {LEVELS[1]: 700, LEVELS[3]: 900, LEVELS[4]: 1100},
        1e-4,
        lambda name: LEVELS[: LEVELS.index(name) + 1],
        "soft margin to 1e-4 at every level on the way",
    ),
    *ladder(
        {LEVELS[1]: 300, LEVELS[3]: 500, LEVELS[4]: 700},
        5e-5,
        lambda name: LEVELS[1:2],
        f"5e-5 at {LEVELS[1]}",
    ),
    *ladder({LEVELS[1]: 1500}, 1e-6, lambda name: LEVELS[1:2], "1e-6 there"),
    Target("ℓ2", "CPU ms a step, rtol 1e-3, to mean loss 1e-100", 3, nets(milliseconds)),
    Target(
        "ℓ2",
        "CPU time over that of Euler, both to 1e-4 at mean loss 1e-100",
        1,
        nets(against_euler),
    ),
    Target("ℓ2", "order, from error and steps at mean loss 1e-10", 2.3, nets(order), least=1.7),
    Target(
        "energy balance",
        "abs(∫‖h‖_* ds/ΔΛ − 1), whole run, rtol 1e-3",
        1e-4,
        nets(defect(LEVELS[-1])),
    ),
    Target("energy balance", "the same, up to any level", 1e-4, nets(defect(*LEVELS))),
    Target(
        "soft margin",
        "largest relative fall in a step, rtol 1e-3",
        1e-12,
        nets(lambda rows: max(r["largest_fall"] for r in rows if r["largest_fall"] is not None)),
    ),
    *(Target("linear", f"steps to Λ = 10⁶, d = {d}", 250, linear(d, "steps")) for d in (50, 1000)),
    *(
        Target("linear", f"duality gap at Λ = 10⁶, d = {d}", 1e-8, linear(d, "dual_gap"))
        for d in (50, 1000)
    ),
    Target(
        "time", "log t against the finest tolerance at any level, rtol 1e-3", 1e-3, nets(time_error)
    ),
    *(
        Target("time", f"abs(4γΛ·t𝓛 − 1) at Λ = 10⁴, rtol {rtol:g}", 1e-2, nets(late_time(rtol)))
        for rtol in (1e-3, 1e-5)
    ),
    Target(
        "paper's size",
        "CPU seconds a step in the first steps, d = 232, width 1024, n = 250",
        2,
        papers_size,
    ),
    Target(
        "diagnostics",
        "standard diagnostics and certificates at 100 saves over the rest of the demo, CPU time",
        0.2,
        lambda tables: [
            row["share"] for row in tables["04_diagnostics"] if row["rule"] == "all of the demo"
        ],
    ),
    Target("width", "steps to mean loss 1e-10, largest width over 64", 1.5, wider),
    *(
        Target(f"{name}, nets", what, most, polyhedral(norm, measure))
        for norm, name in (("linf", "ℓ∞"), ("max l2", "max of ℓ2"))
        for what, most, measure in (
            ("CPU seconds to Λ = 10⁴, rtol 1e-2", 5, last("cpu_seconds", 1e-2)),
            (f"soft margins of rtol 1e-2 and 3e-3 apart at {LEVELS[0]}", 1e-3, refined(LEVELS[0])),
            (f"the same at {LEVELS[1]}", 3e-3, refined(LEVELS[1])),
            ("energy balance to Λ = 10⁴, rtol 3e-3", 1e-4, last("energy_defect", 3e-3)),
        )
    ),
    *(
        Target(f"{name}, nets", "steps to Λ = 2, largest width over 64", 1.5, wider_in(norm))
        for norm, name in (("linf", "ℓ∞"), ("max l2", "max of ℓ2"))
    ),
    Target("ℓ1, nets", "CPU seconds to Λ = 20, rtol 1e-2", 10, coordinates),
]


def main() -> None:
    names = (
        "02_l2_relu_net",
        "02_width",
        "03_linear_models",
        "04_diagnostics",
        "05_polyhedral_nets",
    )
    tables = {
        name: read(RESULTS / f"{name}.csv") for name in names if (RESULTS / f"{name}.csv").exists()
    }
    every = [row for rows in tables.values() for row in rows]
    settled = [row for row in at(tables["02_l2_relu_net"]) if row["milestone"] in LEVELS[:2]]
    finest = min(row["tolerance"] for row in settled)
    apart = max(row["error"] for row in settled if row["tolerance"] == finest)
    spread = max(row["reference_spread"] for row in settled)
    loads = [row["load"] for row in every]
    commits = sorted({row["commit"][:8] for row in every})
    processors = sorted({row["processor"] for row in every})
    text = [
        "# Targets and measurements",
        "",
        f"Worst over problems and seeds. Commits {', '.join(commits)};",
        f"{', '.join(processors)}, one thread, load average {min(loads)} … {max(loads)}.",
        f"The reference for soft margins is settled to {spread:.1e}; "
        f"the finest flow agrees with it to {apart:.1e}.",
        "",
        "| row | target for | target | measured | reached |",
        "|---|---|---|---|---|",
        *(target.line(tables) for target in TARGETS),
        "",
    ]
    (RESULTS / "targets.md").write_text("\n".join(text), encoding="utf-8")
    print("\n".join(text))


if __name__ == "__main__":
    main()
