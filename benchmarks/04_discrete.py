"""How long do 10⁵ full-batch steps of the demo's problem take, for eight seeds at once?

Baseline: eight plain loops of torch.optim, one seed after the other, each on one flat leaf tensor.
Both are first checked to give the same weights after a hundred steps. flowsim and the baseline are
measured in turn in the same run, and the best of several turns counts for both. Writes
results/04_discrete.csv. Usage: python benchmarks/04_discrete.py [--threads 2] [--steps 100000]"""

import argparse
import math
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import torch
from common import RESULTS, Stopwatch, surroundings, write
from torch import Tensor

import flowsim as fs
from flowsim.experiment.experiment import Experiment
from flowsim.motion.rule import Rule
from flowsim.problems.problem import Problem

SEEDS = 8
CHECKED, TURN, TURNS = 100, 500, 8  # steps compared, steps of a turn, and turns
RULES: dict[str, tuple[Rule, Callable[[list[Tensor]], torch.optim.Optimizer]]] = {
    "gradient descent": (fs.GradientDescent(5e-3), lambda p: torch.optim.SGD(p, lr=5e-3)),
    "heavy ball": (
        fs.GradientDescent(5e-4, momentum=fs.HeavyBall(0.9)),
        lambda p: torch.optim.SGD(p, lr=5e-4, momentum=0.9),
    ),
    "Adam": (fs.Adam(1e-3), lambda p: torch.optim.Adam(p, lr=1e-3)),
}


def loop(
    make: Callable[[list[Tensor]], torch.optim.Optimizer], problem: Problem, w0: Tensor, steps: int
) -> Tensor:
    """Weights after ``steps`` of torch.optim on Σ e^{−y f}, one seed after the other."""
    width = w0.shape[1] // (problem.x.shape[-1] + 1)
    rows = []
    for x, y, start in zip(problem.x, problem.y, w0, strict=True):
        w = start.clone().requires_grad_()
        optimiser = make([w])
        for _ in range(steps):
            optimiser.zero_grad()
            inner, outer = w[:-width].view(width, -1), w[-width:]
            torch.exp(-y * (torch.relu(x @ inner.T) @ outer)).sum().backward()
            optimiser.step()
        rows.append(w.detach())
    return torch.stack(rows)


def timed(function: Callable[[], Any]) -> dict[str, float]:
    watch = Stopwatch()
    function()
    return watch.read()


def measure(name: str, problem: Problem, w0: Tensor, steps: int) -> dict[str, Any]:
    rule, make = RULES[name]
    ours = fs.simulate(problem, rule, w0, until=fs.steps([CHECKED])).final
    theirs = loop(make, problem, w0, CHECKED)
    difference = float((ours.w - theirs).abs().max() / theirs.abs().max())
    assert difference < 1e-10, f"{name}: weights differ from torch.optim by {difference:g}"
    some, few = fs.steps([TURN]), TURN // 10
    step = plain = math.inf
    for _ in range(TURNS):
        step = min(
            step, timed(lambda: fs.simulate(problem, rule, w0, until=some))["seconds"] / TURN
        )
        plain = min(plain, timed(lambda: loop(make, problem, w0, few))["seconds"] / few)
    whole = timed(lambda: fs.simulate(problem, rule, w0, until=fs.steps(steps))) if steps else {}
    return {
        "rule": name,
        "seeds": len(w0),
        "weights": w0.shape[1],
        "us_per_step": round(1e6 * step, 1),
        "torch_us_per_step": round(1e6 * plain, 1),
        "times_faster": round(plain / step, 2),
        "seconds_of_1e5_at_best": round(1e5 * step, 1),
        "steps_run": steps,
        **{key: round(value, 1) for key, value in whole.items()},
        "weights_differ_by": f"{difference:.1e}",
        **surroundings(),
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--steps", type=int, default=100_000)
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    experiment = Experiment.read(str(files("flowsim") / "experiments" / "demo.toml"))
    problem, _, w0 = experiment.model_copy(update={"seeds": list(range(SEEDS))}).problem()
    rows = []
    for name in RULES:
        rows.append(measure(name, problem, w0, options.steps))
        print({key: rows[-1][key] for key in list(rows[-1])[:9]})
    write(rows, RESULTS / "04_discrete.csv")


if __name__ == "__main__":
    main()
