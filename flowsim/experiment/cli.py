"""The command line: ``flowsim demo``, ``init``, ``run`` and ``compare``. Heavy imports wait inside
the commands."""

import csv
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

    from flowsim.experiment.experiment import Experiment
    from flowsim.run.trajectory import Trajectory
    from flowsim.study.comparison import Comparison

TableRows = list[dict[str, Any]]

_DEMO = files("flowsim.experiment") / "demo.toml"

# --------------------------------------------------------------------------------------------------
# Commands
# --------------------------------------------------------------------------------------------------


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="flowsim")
def main() -> None:
    """Steepest flow of neural networks in any norm: trajectories, margins and certificates."""


_FOLDER = click.Path(file_okay=False, path_type=Path)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_NEW_FILE = click.Path(dir_okay=False, path_type=Path)

_output = click.option("-o", "--output", type=_FOLDER, help="Directory for the results.")
_quiet = click.option("--no-progress", is_flag=True, help="Show no progress bars.")
_overwrite = click.option(
    "--overwrite", is_flag=True, help="Replace results that are in the directory already."
)


def _of_a_file(command: Callable[..., None]) -> Callable[..., None]:
    """A command of a configuration file, with the options of all such commands."""
    config = click.argument("config", type=_FILE)
    return config(_output(_overwrite(_quiet(command))))


@main.command("demo")
@_output
@_quiet
def demo_command(output: Path | None, no_progress: bool) -> None:
    """Margins of a ReLU net on handwritten digits under steepest descent in three norms; about a
    minute."""
    experiment = _read(Path(str(_DEMO)))
    _run(experiment, output or Path("flowsim-demo"), progress=not no_progress)


@main.command("init")
@click.argument("config", type=_NEW_FILE, default=Path("experiment.toml"))
@click.option("--overwrite", is_flag=True, help="Replace the file if it exists.")
def init_command(config: Path, overwrite: bool) -> None:
    """Write a commented configuration to CONFIG, ready to edit and run."""
    if config.exists() and not overwrite:
        raise click.ClickException(f"{config} exists; choose another name, or add --overwrite")
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(_DEMO.read_text(encoding="utf-8"), encoding="utf-8")
    click.echo(f"Wrote {config}. Next: flowsim run {config}")


@main.command("run")
@_of_a_file
def run_command(config: Path, output: Path | None, overwrite: bool, no_progress: bool) -> None:
    """Run the experiment that CONFIG describes; results go to runs/<its name> unless --output says
    where."""
    experiment = _read(config)
    directory = _writable(experiment, output, overwrite)
    _run(experiment, directory, progress=not no_progress)


@main.command("compare")
@_of_a_file
def compare_command(config: Path, output: Path | None, overwrite: bool, no_progress: bool) -> None:
    """Hold the rules that CONFIG describes against the first flow among them, with a figure and
    distances.csv."""
    experiment = _read(config)
    directory = _writable(experiment, output, overwrite)
    _compare(experiment, directory, progress=not no_progress)


# --------------------------------------------------------------------------------------------------
# What they do
# --------------------------------------------------------------------------------------------------


@contextmanager
def _mistakes_in_a_sentence() -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        raise click.ClickException(str(error)) from None


def _read(config: Path) -> "Experiment":
    from flowsim.experiment.experiment import Experiment

    with _mistakes_in_a_sentence():
        return Experiment.read(config)


def _writable(experiment: "Experiment", output: Path | None, overwrite: bool) -> Path:
    """The directory for the results, if it may be written."""
    directory = output or Path("runs") / experiment.name
    if (directory / "config.toml").exists() and not overwrite:
        raise click.ClickException(
            f"{directory} holds results already; choose another --output, or add --overwrite"
        )
    return directory


def _run(experiment: "Experiment", directory: Path, *, progress: bool) -> None:
    """Run, save, print and draw."""
    from flowsim import plots

    console = _console(experiment)
    with _mistakes_in_a_sentence():
        runs = experiment.run(directory, progress=progress)
    _print_summary(console, runs, directory)
    for label, run in runs.items():
        console.print(f"{label}: {run.certificate.verdict}", style="dim")
    if all("margin_l2" in run for run in runs.values()):
        figures = plots.save(plots.overview(runs), directory / "margins", runs)
        figures += plots.save(plots.trust(runs), directory / "trust")
        _print_paths(console, figures)
    console.print(f"Runs:   {directory}/  (load one with flowsim.load)")


def _compare(experiment: "Experiment", directory: Path, *, progress: bool) -> None:
    """Run, hold against the flow, save, print and draw."""
    from flowsim import plots

    console = _console(experiment)
    with _mistakes_in_a_sentence():
        found = experiment.compare(directory, progress=progress)
    runs = {found.flow.label: found.flow, **found.runs}
    _print_summary(console, runs, directory)
    caption = "Largest distance from the flow; medians over seeds."
    _print_table(console, _largest_distances(found), caption)
    _print_paths(console, plots.save(plots.comparison(found), directory / "compare", runs))
    console.print(f"Runs:   {directory}/  (distances at every save point in distances.csv)")


# --------------------------------------------------------------------------------------------------
# What they print
# --------------------------------------------------------------------------------------------------

_TITLES = {
    "t0": "t₀",
    "lam": "Λ",
    "margin_l1": "margin ℓ1",
    "margin_l2": "margin ℓ2",
    "margin_linf": "margin ℓ∞",
    "alignment": "α",
    "stopped": "why it stopped",
}
_COUNTS = ("steps", "gradients", "sliding", "releases")

_DISTANCES = {
    "weights, equal t": ("weights", "log_time"),
    "weights, nearest point": ("weights", "nearest"),
    "direction, equal Λ": ("direction", "lam"),
    "outputs, equal t": ("outputs", "log_time"),
}


def _console(experiment: "Experiment") -> "Console":
    from rich.console import Console

    from flowsim import __version__

    console = Console(width=None if sys.stdout.isatty() else 190, highlight=False)
    runs = f"{len(experiment.rules)} runs of {len(experiment.seeds)} seeds"
    console.print(f"flowsim {__version__}: {experiment.name}, {runs}")
    return console


def _print_summary(console: "Console", runs: "dict[str, Trajectory]", directory: Path) -> None:
    """The table of runs, which is written to summary.csv as well."""
    from flowsim.run.summary import summarise

    rows = summarise(runs)
    with (directory / "summary.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    _print_table(console, rows, "Medians over seeds.")


def _largest_distances(found: "Comparison") -> TableRows:
    """Of each run from the flow, medians over seeds."""
    import numpy as np

    rows: TableRows = []
    for label in found.labels:
        row: dict[str, Any] = {"run": label}
        for title, (what, at) in _DISTANCES.items():
            largest = np.fmax.reduce(found[label, what, at], axis=0)  # of what is known
            row[title] = float(np.median(largest))
        rows.append(row)
    return rows


def _print_table(console: "Console", rows: TableRows, caption: str) -> None:
    from rich.table import Table

    table = Table(caption=caption, caption_justify="left")
    for name, value in rows[0].items():
        title = _TITLES.get(name, name)
        table.add_column(title, justify="left" if isinstance(value, str) else "right")
    for row in rows:
        table.add_row(*(_short(name, value) for name, value in row.items()))
    console.print(table)


def _short(name: str, value: str | float) -> str:
    if isinstance(value, str):
        return value
    if value != value:
        return "–"
    if name in _COUNTS:
        return f"{value:.0f}"
    return f"{value:+.1g}" if name == "energy" else f"{value:.4g}"


def _print_paths(console: "Console", figures: list[Path]) -> None:
    console.print("Figures: " + ", ".join(str(path) for path in figures))
