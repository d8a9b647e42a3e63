"""What do the measurements cost? Standard diagnostics and certificates at 100 save points of the
demo's runs.

Every measurement is timed where it is made, in CPU time, and compared with the rest of its run.
Writes results/04_diagnostics.csv. Usage: python benchmarks/04_diagnostics.py"""

import time
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import torch
from common import RESULTS, Stopwatch, surroundings, write

import flowsim as fs
from flowsim.diagnostics.certificate import witness
from flowsim.experiment.experiment import Experiment

SAVES = 100


def timed(
    measures: dict[str, Callable[..., Any]], spent: list[float]
) -> dict[str, Callable[..., Any]]:
    """The measures, which add their CPU seconds to ``spent``."""

    def wrapped(measure: Callable[..., Any]) -> Callable[..., Any]:
        def call(problem: Any, state: Any) -> Any:
            began = time.process_time()
            value = measure(problem, state)
            spent[0] += time.process_time() - began
            return value

        return call

    return {name: wrapped(measure) for name, measure in measures.items()}


def measure(experiment: Experiment) -> list[dict[str, Any]]:
    problem, test, w0 = experiment.problem()
    rows = []
    for part in experiment.rules:
        rule, until = part.rule(problem.layout), part.until or experiment.until
        standard, certificate = [0.0], [0.0]
        observe = timed(fs.diagnostics.standard(problem, test), standard)
        # what `simulate` observes for a certificate, once more and under other names
        observe |= timed({f"own_{k}": f for k, f in witness(problem, rule).items()}, certificate)
        watch = Stopwatch()
        schedule = until.model_copy(update={"saves": SAVES}).schedule()
        run = fs.simulate(
            problem, rule, w0, until=schedule, observe=observe, max_steps=part.max_steps
        )
        total = watch.read()["cpu_seconds"]
        rest = total - standard[0] - 2 * certificate[0]
        costs = {"rest": rest, "standard": standard[0], "certificate": certificate[0]}
        rows.append({"rule": rule.label, "saves": len(run["lam"]), **costs})
        print({name: f"{v:.2f}" if isinstance(v, float) else v for name, v in rows[-1].items()})
    whole = {name: sum(row[name] for row in rows) for name in ("rest", "standard", "certificate")}
    rows.append({"rule": "all of the demo", "saves": SAVES, **whole})
    return [
        row | {"share": (row["standard"] + row["certificate"]) / row["rest"]} | surroundings()
        for row in rows
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    demo = Experiment.read(str(files("flowsim") / "experiments" / "demo.toml"))
    write(measure(demo), RESULTS / "04_diagnostics.csv")
