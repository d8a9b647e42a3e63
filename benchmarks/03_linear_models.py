"""How many steps take the flow of a linear model to its largest margin, in ℓ1, ℓ2 and ℓ∞?

Exponential loss on separable Gaussian data, from w = 0. γ* is the largest margin by a convex
solver, and ‖∇Λ‖_*/γ* − 1 ≥ 0 a certificate: it is zero only at the largest margin. Baselines: small
explicit steps and, in ℓ2, torchdiffeq's dopri5 on the log-loss. Weak duality is checked before
anything is timed. Writes results/03_linear_models.csv. Usage: python benchmarks/03_linear_models.py
[--seeds 3]"""

import argparse
from typing import Any

import numpy as np
import torch
from common import RESULTS, Spent, Stopwatch, counted, surroundings, timing, write
from scipy.optimize import linprog, nnls
from torchdiffeq import odeint

import flowsim as fs

N = 200
MARGINS = {50: 0.5, 1000: 0.0}  # of the separating direction, by the number of inputs
NORMS = {"l1": fs.L1(), "l2": fs.L2(), "linf": fs.Linf()}
LEVELS = [230.0, 1e3, 1e5, 1e6]
BASELINE_LEVELS, SMALL_STEP, MOST = [230.0, 1e3], 0.1, 100_000


def largest_margin(z: np.ndarray, norm: str) -> float:
    """max of min_i (Zw)_i over the unit ball."""
    n, d = z.shape
    if norm == "l2":  # the point of the convex hull of the rows that is nearest to the origin
        p = nnls(np.vstack([1e3 * np.ones(n), z.T]), np.append(1e3, np.zeros(d)))[0]
        w = z.T @ p
        return (z @ w).min() / np.linalg.norm(w)
    if norm == "linf":
        bounds = [(-1, 1)] * d + [(None, None)]
        return -linprog(
            np.append(np.zeros(d), -1), np.c_[-z, np.ones(n)], np.zeros(n), bounds=bounds
        ).fun
    bounds = [(0, None)] * (2 * d) + [(None, None)]
    constraints = (
        np.vstack([np.c_[-z, z, np.ones(n)], np.append(np.ones(2 * d), 0)]),
        np.append(np.zeros(n), 1),
    )
    return -linprog(np.append(np.zeros(2 * d), -1), *constraints, bounds=bounds).fun


def simulated(
    rule: Any, problem: fs.Problem, norm: fs.L2, best: float, levels: list[float]
) -> list[dict[str, Any]]:
    """A row for each level that the run has reached."""
    w0, bound = torch.zeros(1, problem.size, dtype=torch.float64), norm.bind(problem.layout)
    observe = {
        "margin": fs.diagnostics.margin(norm),
        "dual": lambda problem, state: bound.dual(problem.ascent(state.w)[1]),
        **timing(),
    }
    run = fs.simulate(problem, rule, w0, until=fs.lam(levels), observe=observe, max_steps=MOST)
    rows = []
    for k, level in enumerate(levels, 1):
        row = {"level": f"{level:g}", "reached": bool(np.isfinite(run["lam"][k, 0]))}
        if row["reached"]:
            row |= {
                "steps": int(run["tally_accepted"][k, 0]),
                "rejected": int(run["tally_rejected"][k, 0]),
            }
            row |= {"events": int(run["tally_events"][k, 0])} if "tally_events" in run else {}
            row |= {"gradients": int(run["tally_gradients"][k, 0])}
            row |= {name: float(run[name][k, 0]) for name in ("seconds", "cpu_seconds")}
            row |= {
                "margin_gap": 1 - run["margin"][k, 0] / best,
                "dual_gap": run["dual"][k, 0] / best - 1,
            }
        else:
            row |= {"note": run.statuses[0].sentence, "lam": float(run.final.readings["lam"])}
        rows.append(row)
    return rows


def solver(problem: fs.Problem, best: float, level: float, rtol: float) -> dict[str, Any]:
    """dopri5 on dw/dΛ = ∇Λ/‖∇Λ‖₂² up to the level: nothing but the path in question."""
    z = (problem.x * problem.y[..., None]).reshape(-1, problem.size)

    def gradient(w: torch.Tensor) -> torch.Tensor:
        return torch.softmax(-(z @ w), 0) @ z

    def velocity(_: Any, w: torch.Tensor) -> torch.Tensor:
        h = gradient(w)
        return h / (h @ h)

    field, calls = counted(velocity, MOST)
    w0 = torch.zeros(problem.size, dtype=torch.float64)
    start = -float(torch.logsumexp(-(z @ w0), 0))
    row: dict[str, Any] = {"level": f"{level:g}"}
    watch = Stopwatch()
    try:
        w = odeint(field, w0, torch.tensor([start, level]).double(), rtol=rtol, atol=1e-3 * rtol)[
            -1
        ]
        gaps = 1 - float((z @ w).min() / w.norm()) / best, float(gradient(w).norm()) / best - 1
        row |= {"reached": True, "margin_gap": gaps[0], "dual_gap": gaps[1]}
        row |= {"lam": -float(torch.logsumexp(-(z @ w), 0))}
    except (Spent, AssertionError) as error:
        row |= {"reached": False, "note": str(error) or f"stopped after {MOST} gradients"}
    return row | {"gradients": min(calls[0], MOST)} | watch.read()


def measure(d: int, seed: int) -> list[dict[str, Any]]:
    x, y = fs.data.gaussian_separable(N, d, margin=MARGINS[d], seed=seed)
    problem, z = fs.Problem(fs.Linear(d), x, y, fs.exponential), (x * y[:, None]).numpy()
    rows = []
    for name, norm in NORMS.items():
        watch = Stopwatch()
        best = largest_margin(z, name)
        found = [{"method": "convex solver"} | watch.read()]
        early = simulated(fs.SteepestFlow(norm), problem, norm, best, [50.0])[0]  # also warms up
        assert early["margin_gap"] > -1e-9, (
            f"{name}: margin above the largest one by {-early['margin_gap']:g}"
        )
        assert early["dual_gap"] > -1e-9, (
            f"{name}: dual norm below the largest margin by {-early['dual_gap']:g}"
        )
        runs = {
            ("flowsim", fs.SteepestFlow(norm).rtol): (fs.SteepestFlow(norm), LEVELS),
            ("small steps", SMALL_STEP): (fs.SmallStep(norm, dlam=SMALL_STEP), BASELINE_LEVELS),
        }
        for (method, tolerance), (rule, levels) in runs.items():
            rows_here = simulated(rule, problem, norm, best, levels)
            found += [{"method": method, "tolerance": tolerance} | row for row in rows_here]
        if name == "l2":
            for rtol in (1e-4, 1e-6):
                row = solver(problem, best, BASELINE_LEVELS[0], rtol)
                found.append({"method": "torchdiffeq dopri5", "tolerance": rtol} | row)
        columns = {"n": N, "d": d, "seed": seed, "norm": name, "largest_margin": f"{best:.10g}"}
        rows += [columns | printable(row) | surroundings() for row in found]
    return rows


def printable(row: dict[str, Any]) -> dict[str, Any]:
    return {
        k: f"{v:.{10 if k == 'lam' else 4}g}" if isinstance(v, float) else v for k, v in row.items()
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--seeds", type=int, default=3)
    options = arguments.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        for d in MARGINS:
            rows += measure(d, seed)
            write(rows, RESULTS / "03_linear_models.csv")


if __name__ == "__main__":
    main()
