"""What does the true flow of a ReLU net cost where the norm is not quadratic, and is the balance of
energy kept?

Two-layer nets on random labels, exponential loss, in ℓ∞, the maximum over layers of ℓ2, and ℓ1. The
baseline, small steps of steepest descent, tends to something else on kinks: its margins show by how
much, and its gradients what it costs. `alpha` is the alignment of weights and gradient, 1 at a KKT
point.

Writes results/05_polyhedral_nets.csv.
Usage: python benchmarks/05_polyhedral_nets.py [--part flows|steps|width|l1 ...] [--seeds 3]
"""

import argparse
from typing import Any

import numpy as np
import torch
from common import RESULTS, Stopwatch, read, surroundings, timing, write
from loops import Net

import flowsim as fs

NORMS = {"linf": fs.Linf(), "max l2": fs.Max(fs.L2()), "l1": fs.L1()}
TOLERANCES = (1e-2, 3e-3)
STEPS = (0.1, 0.02)  # of the baseline: gain in Λ, and share of the largest weight
LEVELS = ("mean loss 1e-10", "mean loss 1e-100", "level 1e3", "level 1e4")
LONGEST = 60.0  # CPU seconds of the flow in ℓ1
TABLE = RESULTS / "05_polyhedral_nets.csv"


def observed(norm: fs.L1) -> dict[str, Any]:
    return {
        "soft_margin": fs.diagnostics.soft_margin(norm),
        "alpha": fs.diagnostics.alignment(norm),
        **timing(),
    }


def rows_of(run: fs.Trajectory, names: list[str]) -> list[dict[str, Any]]:
    """A row for each save point after the start that the run has reached."""
    spent, rise = run["dissipated"][:, 0], run["lam"][:, 0] - run["lam"][0, 0]
    tallies = [name for name in run.names if name.startswith("tally_")]
    return [
        {
            "milestone": name,
            "steps": int(run["tally_accepted"][k, 0]),
            **{t.removeprefix("tally_"): run[t][k, 0] for t in tallies if t != "tally_accepted"},
            **{
                n: run[n][k, 0]
                for n in ("seconds", "cpu_seconds", "lam", "log_time", "soft_margin", "alpha")
            },
            "energy_defect": abs(spent[k] / rise[k] - 1),
        }
        for k, name in enumerate(names, 1)
        if np.isfinite(run["lam"][k, 0])
    ]


def flows(net: Net) -> list[dict[str, Any]]:
    problem, w0 = net.problem()
    until = fs.lam([net.levels[name] for name in LEVELS])
    rows = []
    for name in ("linf", "max l2"):
        for rtol in TOLERANCES:
            rule = fs.SteepestFlow(NORMS[name], rtol=rtol)
            run = fs.simulate(
                problem, rule, w0, until=until, observe=observed(NORMS[name]), max_steps=5000
            )
            found = {"norm": name, "method": "flowsim", "tolerance": rtol}
            rows += [found | row for row in rows_of(run, list(LEVELS))] or [found | stopped(run)]
    return rows


def stopped(run: fs.Trajectory) -> dict[str, Any]:
    return {
        "milestone": "none",
        "lam": float(run.final.readings["lam"]),
        "note": run.statuses[0].sentence,
    }


def steps(net: Net) -> list[dict[str, Any]]:
    """Small steps of steepest descent, to the levels where they have time to settle."""
    problem, w0 = net.problem()
    rows = []
    for name in ("linf", "max l2"):
        for h in STEPS:
            rule = fs.SmallStep(NORMS[name], dlam=h, relative=h)
            until = fs.lam([net.levels[level] for level in LEVELS[:2]])
            run = fs.simulate(
                problem, rule, w0, until=until, observe=observed(NORMS[name]), max_steps=100_000
            )
            found = {"norm": name, "method": "small steps", "tolerance": h}
            rows += [found | row for row in rows_of(run, list(LEVELS[:2]))]
    return rows


def width(net: Net) -> list[dict[str, Any]]:
    """Steps and seconds to Λ = 2."""
    problem, w0 = net.problem()
    rows = []
    for name in ("linf", "max l2"):
        rule = fs.SteepestFlow(NORMS[name], rtol=1e-2)
        run = fs.simulate(
            problem, rule, w0, until=fs.lam([2.0]), observe=observed(NORMS[name]), max_steps=500
        )
        found = {"norm": name, "method": "flowsim", "tolerance": 1e-2}
        rows += [found | row for row in rows_of(run, ["level 2"])] or [found | stopped(run)]
    return rows


def l1(net: Net) -> list[dict[str, Any]]:
    """To Λ = 20, or as far as it gets in a time that one can wait."""
    problem, state = net.problem()
    norm, watch, began = NORMS["l1"], Stopwatch(), None
    rule = fs.SteepestFlow(norm, rtol=1e-2)
    for k in range(2, 1000, 2):
        run = fs.simulate(problem, rule, state, until=fs.steps([k]), observe=observed(norm))
        state, began = run.final, began or (run["lam"][0, 0], run["dissipated"][0, 0])
        lam, spent = (float(state.readings[name]) for name in ("lam", "dissipated"))
        if (
            lam >= 20
            or watch.read()["cpu_seconds"] > LONGEST
            or run.statuses[0] is not fs.Status.DONE
        ):
            break
    row = rows_of(run, ["level 20" if lam >= 20 else "time is up"])[0] | watch.read()
    row["energy_defect"] = abs((spent - began[1]) / (lam - began[0]) - 1)
    return [{"norm": "l1", "method": "flowsim", "tolerance": 1e-2} | row]


def update(net: Net, part: str, fresh: list[dict[str, Any]]) -> None:
    """Put a part of one problem into the table in the place of what was there."""
    rows = read(TABLE) if TABLE.exists() else []
    here = {"part": part} | net.columns
    rows = [row for row in rows if any(row[name] != value for name, value in here.items())]
    for row in fresh:
        printed = {
            k: f"{v:.{10 if k in ('lam', 'log_time') else 6}g}" if isinstance(v, float) else v
            for k, v in row.items()
        }
        rows.append(here | printed | surroundings())
    write(rows, TABLE)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--part", nargs="+", default=["flows", "steps", "width", "l1"])
    arguments.add_argument("--seeds", type=int, default=3)
    options = arguments.parse_args()
    torch.set_num_threads(1)
    for seed in range(options.seeds):
        for part in (flows, steps):
            if part.__name__ in options.part:
                update(Net(20, 50, seed=seed), part.__name__, part(Net(20, 50, seed=seed)))
    if "l1" in options.part:
        update(Net(20, 50), "l1", l1(Net(20, 50)))
    if "width" in options.part:
        for m in (64, 256, 1024):
            update(Net(20, 50, m), "width", width(Net(20, 50, m)))


if __name__ == "__main__":
    main()
