"""What do the demo's rules cost, in gradient evaluations and seconds?

Baseline: the same updates as a plain loop of torch autograd, one seed after the other. Both are
first checked to give the same weights. Writes results/01_demo_rules.csv. Usage: python
benchmarks/01_demo_rules.py [--device cuda]"""

import argparse
import csv
import time
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

import flowsim as fs
from flowsim.descent.small_step import SmallStep
from flowsim.experiment.experiment import Experiment
from flowsim.run.provenance import machine, software

CHECKED, TIMED = 50, 400  # baseline steps compared, and timed
RESULTS = Path(__file__).parent / "results" / "01_demo_rules.csv"


def steepest(norm, h: Tensor) -> tuple[Tensor, Tensor]:
    """Steepest direction and dual norm of one gradient, written out for the demo's three norms."""
    if norm.name == "l2":
        return h / h.norm(), h.norm()
    if norm.name == "linf":
        return h.sign(), h.abs().sum()
    first = h.abs().argmax()
    return torch.zeros_like(h).index_fill(0, first, 1.0) * h[first].sign(), h[first].abs()


def baseline_step(rule, x: Tensor, y: Tensor, w: Tensor, width: int) -> Tensor:
    """One update of ``rule`` on Λ = −log Σ e^{−y f(x)}, by autograd."""
    w = w.detach().requires_grad_()
    inner, outer = w[: width * x.shape[1]].view(width, -1), w[width * x.shape[1] :]
    lam = -torch.logsumexp(-y * (torch.relu(x @ inner.T) @ outer), 0)
    (h,) = torch.autograd.grad(lam, w)
    u, dual = steepest(rule.norm, h)
    w = w.detach()
    if isinstance(rule, SmallStep):
        length = torch.minimum(rule.dlam / dual, rule.relative * w.abs().max() / u.abs().max())
    elif rule.normalized:
        length = rule.lr
    else:
        length = rule.lr * torch.exp(-lam.detach()) * dual
    return w + length * u


def baseline(rule, problem, w0: Tensor, width: int, steps: int) -> tuple[Tensor, float]:
    """Weights after ``steps`` updates of every seed, and seconds for one update of one seed."""
    rows, began = [], time.perf_counter()
    for x, y, w in zip(problem.x, problem.y, w0, strict=True):
        for _ in range(steps):
            w = baseline_step(rule, x, y, w, width)
        rows.append(w)
    weights = torch.stack(rows).cpu()
    return weights, (time.perf_counter() - began) / (steps * len(w0))


def measure(experiment: Experiment, device: str) -> list[dict]:
    problem, _, w0 = experiment.problem()
    w0 = w0.to(device)
    problem, width = problem.like(w0), experiment.net.hidden[0]
    rows = []
    for part in experiment.rules:
        rule = part.rule(problem.layout)
        few = fs.simulate(problem, rule, w0, until=fs.steps([CHECKED]))  # also warms up
        same, _ = baseline(rule, problem, w0, width, CHECKED)
        difference = float((few.final.w.cpu() - same).abs().max() / same.abs().max())
        assert difference < 1e-9, (
            f"{rule.label}: weights differ from the baseline by {difference:g}"
        )
        began = time.perf_counter()
        run = fs.simulate(
            problem,
            rule,
            w0,
            until=(part.until or experiment.until).schedule(),
            max_steps=part.max_steps,
        )
        seconds = time.perf_counter() - began
        gradients = float(run.final.tallies["gradients"].sum())
        _, plain = baseline(rule, problem, w0, width, TIMED)
        rows.append(
            {
                "rule": rule.label,
                "seeds": len(w0),
                "final_lam": f"{float(run.final.readings['lam'].median()):.4g}",
                "gradients_per_seed": f"{gradients / len(w0):.0f}",
                "seconds": f"{seconds:.3f}",
                "us_per_gradient": f"{1e6 * seconds / gradients:.1f}",
                "baseline_us_per_gradient": f"{1e6 * plain:.1f}",
                "speedup": f"{plain * gradients / seconds:.2f}",
                "weights_differ_by": f"{difference:.1e}",
                "device": device,
                "dtype": experiment.dtype,
                **machine(),
                **software(),
            }
        )
        print({k: rows[-1][k] for k in list(rows[-1])[:8]})
    return rows


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--device", default="cpu")
    device = arguments.parse_args().device
    experiment = Experiment.read(str(files("flowsim") / "experiments" / "demo.toml"))
    torch.set_num_threads(experiment.threads or torch.get_num_threads())
    rows = measure(experiment, device)
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {RESULTS}")


if __name__ == "__main__":
    main()
