"""What the benchmarks share: tables as CSV files, and the machine that they were measured on."""

import csv
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from flowsim.run.provenance import machine, software

RESULTS = Path(__file__).parent / "results"


def surroundings(dtype: str = "float64") -> dict[str, Any]:
    """Columns that every row ends with; ``load`` is the machine's load average, over one minute,
    right now."""
    return {"dtype": dtype, "load": f"{os.getloadavg()[0]:.1f}", **machine(), **software()}


def write(rows: list[dict[str, Any]], path: Path) -> None:
    """One line for each row; a row without a column leaves it empty."""
    path.parent.mkdir(exist_ok=True)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    columns.sort(key=list(surroundings()).count)  # those of the machine last
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {path}")


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a table, with numbers and truth values as such and empty cells as None."""
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: _parsed(cell) for name, cell in row.items()} for row in csv.DictReader(file)]


def _parsed(cell: str) -> Any:
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            pass
    return {"True": True, "False": False, "": None}.get(cell, cell)


class Stopwatch:
    """Seconds since it was made: on the wall and, what a busy machine does not change, of this
    process's CPU time."""

    def __init__(self) -> None:
        self.began = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        wall, cpu = self.began
        return {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


def timing() -> dict[str, Callable[..., torch.Tensor]]:
    """Observers that read a stopwatch, started now, at every save point."""
    watch = Stopwatch()
    names = list(watch.read())
    return {
        n: lambda problem, state, n=n: torch.full_like(state.step_size, watch.read()[n])
        for n in names
    }


class Spent(Exception):
    """A baseline has used up its gradient evaluations."""


def counted(field: Callable[..., Any], most: int) -> tuple[Callable[..., Any], list[int]]:
    """The function with a count of its calls, which raises `Spent` after ``most`` of them."""
    calls = [0]

    def call(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] > most:
            raise Spent
        return field(*arguments)

    return call, calls
