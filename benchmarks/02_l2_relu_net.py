"""What does the true ℓ2 flow of a ReLU net cost, and how accurate is it, against plain loops and
ODE solvers?

Two-layer nets on random labels, exponential loss. The reference for soft margins is a loop of small
Euler steps on the log-loss, refined until it settles; it takes too long beyond a mean loss of
1e-100, where the reference is the flow at its finest tolerance. Times t are of the mean loss. Both
gradients are first checked to be the same. Where sliding pairs were *released*, flow and loop may
have left on different sides, so that both can be right.

Writes results/02_l2_relu_net.csv, results/02_width.csv and results/02_work_precision.pdf.
Usage: python benchmarks/02_l2_relu_net.py [--part loops|flows|times|width|plot ...] [--seeds 3]
"""

import argparse
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import torch
from common import RESULTS, read, surroundings, timing, write
from loops import Net, euler, gradient, jax_solver, torch_solver

import flowsim as fs

TOLERANCES = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 1e-5)
EULER = (4.0, 2.0, 1.0, 0.5, 0.2, 0.05, 0.02, 0.005, 0.002)
TABLE = RESULTS / "02_l2_relu_net.csv"
TIMES, SOLVERS = (3.0, 30.0), (1e-4, 1e-6)  # flow times, and tolerances of the ODE solvers


# --------------------------------------------------------------------------------------------------
# What is compared
# --------------------------------------------------------------------------------------------------


def flow(
    net: Net, rtol: float, until: Any, max_steps: int = 100_000
) -> tuple[fs.Trajectory, list[dict[str, Any]]]:
    """The flow, and a row for each save point after the start."""
    problem, w0 = net.problem()
    rule = fs.SteepestFlow(fs.L2(), rtol=rtol)
    observe = {"soft_margin": fs.diagnostics.soft_margin(fs.L2()), **timing()}
    run = fs.simulate(problem, rule, w0, until=until, observe=observe, max_steps=max_steps)
    spent, rise = run["dissipated"][:, 0], run["lam"][:, 0] - run["lam"][0, 0]
    rows = [
        {
            "method": "flowsim",
            "tolerance": rtol,
            "reached": True,
            **{
                name: int(run[f"tally_{name}"][k, 0])
                for name in ("gradients", "rejected", "releases", "sliding")
            },
            "steps": int(run["tally_accepted"][k, 0]),
            **{
                name: run[name][k, 0]
                for name in ("seconds", "cpu_seconds", "lam", "log_time", "soft_margin")
            },
            "energy_defect": abs(spent[k] / rise[k] - 1),
        }
        for k in range(1, len(rise))
    ]
    return run, [row for row in rows if np.isfinite(row["lam"])]


# --------------------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------------------


def check(net: Net) -> None:
    """The loop's gradient is the flow's, away from kinks; this also warms up."""
    problem, w0 = net.problem()
    lam, h = gradient(net.arrays()[2], *net.arrays()[:2])
    expected_lam, expected = problem.ascent(w0)
    assert abs(lam - float(expected_lam)) < 1e-12 * abs(lam)
    assert np.abs(h - expected.numpy()[0]).max() < 1e-12 * np.abs(h).max()
    flow(net, 1e-3, fs.lam([lam + 0.5]))


def largest_fall(net: Net, steps: int) -> float:
    """The largest relative fall of the soft margin in any step, from the first positive one."""
    margin = flow(net, 1e-3, fs.steps(range(1, steps + 1)))[0]["soft_margin"][:, 0]
    margin = margin[margin > 0]
    return max((1 - b / a for a, b in pairwise(margin)), default=0.0)


def loops(net: Net) -> list[dict[str, Any]]:
    names, levels = list(net.levels)[:2], list(net.levels.values())[:2]
    return [
        {"milestone": name} | row
        for c in EULER
        for name, row in zip(names, euler(net, c, levels), strict=True)
    ]


def flows(net: Net) -> list[dict[str, Any]]:
    runs = [flow(net, rtol, fs.lam(list(net.levels.values())))[1] for rtol in TOLERANCES]
    rows = [
        {"milestone": name} | row for run in runs for name, row in zip(net.levels, run, strict=True)
    ]
    rows[-1]["largest_fall"] = largest_fall(net, runs[TOLERANCES.index(1e-3)][-1]["steps"])
    return rows


def times(net: Net) -> list[dict[str, Any]]:
    """The loss at given times, by flows and by ODE solvers."""
    runs = [flow(net, rtol, fs.time([t / net.n for t in TIMES]))[1] for rtol in TOLERANCES]
    rows = []
    for k, t in enumerate(TIMES):
        solved = [solver(net, t, rtol) for rtol in SOLVERS for solver in (torch_solver, jax_solver)]
        rows += [{"milestone": f"t = {t:g}"} | row for row in [*(run[k] for run in runs), *solved]]
    return rows


def judge(rows: list[dict[str, Any]]) -> None:
    """Write errors into all rows of one problem: of the soft margin at levels, of the loss at
    times."""
    for milestone in {row["milestone"] for row in rows}:
        here = [row for row in rows if row["milestone"] == milestone and row["reached"]]
        small_steps = [row for row in here if row["method"].startswith("Euler")]
        trusted = small_steps or [row for row in here if row["method"] == "flowsim"]
        best, second = sorted(trusted, key=lambda row: row["tolerance"])[:2]
        for row in here:
            row["reference"] = f"{best['method']}, {best['tolerance']:g}"
            row["reference_spread"] = f"{apart(second, best):.4g}"
            row["error"] = f"{apart(row, best):.4g}"


def apart(row: dict[str, Any], best: dict[str, Any]) -> float:
    if row["milestone"].startswith("t ="):
        return abs(math.expm1(best["lam"] - row["lam"]))
    return abs(row["soft_margin"] / best["soft_margin"] - 1)


def update(path: Path, net: Net, part: str, fresh: list[dict[str, Any]]) -> None:
    """Put a part of one problem into the table in the place of what was there."""
    rows = read(path) if path.exists() else []
    problem = {"part": part} | net.columns
    rows = [row for row in rows if any(row[name] != value for name, value in problem.items())]
    rows += [{"part": part} | row for row in fresh]
    write(rows, path)
    rows = read(path)
    for key in {tuple(row[name] for name in net.columns) for row in rows}:
        judge([row for row in rows if tuple(row[name] for name in net.columns) == key])
    write(sorted(rows, key=lambda row: (row["d"], row["seed"], row["part"])), path)


def width(
    net: Net, levels: list[str], max_steps: int = 100_000, chunk: int = 0
) -> list[dict[str, Any]]:
    """Steps to each level or, where no level is in reach, the cost of steps in chunks."""
    if not chunk:
        rows = flow(net, 1e-3, fs.lam([net.levels[name] for name in levels]))[1]
        named = zip(levels, rows, strict=True)
    else:
        points = list(range(chunk, max_steps + 1, chunk))
        rows = flow(net, 1e-3, fs.steps(points))[1]
        named = zip((f"step {k}" for k in points), rows, strict=False)
    return [line(net, {"milestone": name} | row) for name, row in named]


def line(net: Net, row: dict[str, Any]) -> dict[str, Any]:
    """A row as it is written."""
    row = {name: row[name] for name in ("method", "tolerance", "milestone")} | row
    digits = {"soft_margin": 10, "lam": 10, "log_time": 10, "mean_loss": 8}
    printed = {
        k: f"{v:.{digits.get(k, 4)}g}" if isinstance(v, float) else v for k, v in row.items()
    }
    return net.columns | printed | surroundings()


def plot(rows: list[dict[str, Any]]) -> None:
    """Error of the soft margin against gradients: a line for each seed, open where kinks were
    released."""
    looks = {
        "flowsim": ("-", "o", "true flow"),
        "Euler on the log-loss": ("--", "s", "Euler, small steps"),
    }
    sizes = list(dict.fromkeys((row["d"], row["n"]) for row in rows))
    names = ("mean loss 1e-10", "mean loss 1e-100")
    with fs.plots.style():
        fig, axes = plt.subplots(
            len(sizes),
            2,
            figsize=(6.75, 2.4 * len(sizes)),
            sharey=True,
            layout="constrained",
            squeeze=False,
        )
        for ax, (size, name) in zip(axes.flat, ((s, m) for s in sizes for m in names), strict=True):
            here = [r for r in rows if (r["d"], r["n"]) == size and r["milestone"] == name]
            for (method, (dash, marker, label)), colour in zip(
                looks.items(), mpl.color_sequences["petroff10"], strict=False
            ):
                for seed in sorted({r["seed"] for r in here}):
                    curve = [
                        r for r in here if (r["method"], r["seed"]) == (method, seed) and r["error"]
                    ]
                    ax.plot(
                        [r["gradients"] for r in curve],
                        [r["error"] for r in curve],
                        dash,
                        color=colour,
                        lw=0.8,
                    )
                    for r in curve:
                        face = "white" if r["releases"] else colour
                        ax.plot(r["gradients"], r["error"], marker, color=colour, mfc=face, ms=3.5)
                ax.plot([], [], dash, marker=marker, color=colour, ms=3.5, label=label)
            spread = [r["reference_spread"] for r in here if r["method"] == "flowsim"]
            ax.axhspan(
                1e-9, max(spread), color="0.5", alpha=0.15, lw=0, label="reference not settled"
            )
            ax.set(
                xscale="log",
                yscale="log",
                title=f"$d = {size[0]}$, $n = {size[1]}$, {name}",
                ylim=(1e-7, 0.2),
            )
        fig.supxlabel("gradient evaluations", fontsize=8)
        fig.supylabel("relative error of the soft margin", fontsize=8)
        axes[0, 0].legend(frameon=False)
    fs.plots.save(fig, RESULTS / "02_work_precision.pdf")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument(
        "--part", nargs="+", default=["loops", "flows", "times", "width", "plot"]
    )
    arguments.add_argument("--seeds", type=int, default=3)
    options = arguments.parse_args()
    torch.set_num_threads(1)
    for seed in range(options.seeds):
        for net in (Net(20, 50, seed=seed), Net(100, 20, seed=seed)):
            check(net)
            for part in (loops, flows, times):
                if part.__name__ in options.part:
                    update(TABLE, net, part.__name__, [line(net, row) for row in part(net)])
    if "width" in options.part:
        rows = []
        check(Net(20, 50))
        for seed in range(options.seeds):
            for m in (64, 256):
                rows += width(Net(20, 50, m, seed), ["mean loss 1e-10", "mean loss 1e-100"])
        rows += width(Net(20, 50, 1024), ["mean loss 1e-10"])
        write(rows, RESULTS / "02_width.csv")
        rows += width(Net(232, 250, 1024), [], max_steps=60, chunk=10)
        write(rows, RESULTS / "02_width.csv")
    if "plot" in options.part:
        plot(read(TABLE))


if __name__ == "__main__":
    main()
