"""The command line: ``flowsim demo``, ``init``, ``run`` and ``compare``. Heavy imports wait inside
the commands."""

import sys
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flowsim import __version__

if TYPE_CHECKING:
    from rich.console import Console

    from flowsim.experiment.experiment import Experiment
    from flowsim.run.trajectory import Trajectory
    from flowsim.study.comparison import Comparison


_DEMO = files("flowsim.experiment") / "demo.toml"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="flowsim")
def main() -> None:
    """Steepest flow of neural networks in any norm: trajectories, margins and certificates."""


_output = click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="Directory for the results.",
)


_quiet = click.option("--no-progress", is_flag=True, help="Show no progress bars.")


_overwrite = click.option(
    "--overwrite", is_flag=True, help="Replace results that are in the directory already."
)


@main.command("demo")
@_output
@_quiet
def demo_command(output: Path | None, no_progress: bool) -> None:
    """Margins of a ReLU net on handwritten digits under steepest descent in three norms; about a
    minute."""
    directory = output or Path("flowsim-demo")
    _execute(_experiment(Path(str(_DEMO))), directory, progress=not no_progress)


@main.command("init")
@click.argument(
    "config", type=click.Path(dir_okay=False, path_type=Path), default=Path("experiment.toml")
)
@click.option("--overwrite", is_flag=True, help="Replace the file if it exists.")
def init_command(config: Path, overwrite: bool) -> None:
    """Write a commented configuration to CONFIG, ready to edit and run."""
    if config.exists() and not overwrite:
        raise click.ClickException(f"{config} exists; choose another name, or add --overwrite")
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(_DEMO.read_text(encoding="utf-8"), encoding="utf-8")
    click.echo(f"Wrote {config}. Next: flowsim run {config}")


@main.command("run")
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@_output
@_overwrite
@_quiet
def run_command(config: Path, output: Path | None, overwrite: bool, no_progress: bool) -> None:
    """Run the experiment that CONFIG describes; results go to runs/<its name> unless --output says
    where."""
    experiment = _experiment(config)
    _execute(experiment, _free(experiment, output, overwrite), progress=not no_progress)


@main.command("compare")
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@_output
@_overwrite
@_quiet
def compare_command(config: Path, output: Path | None, overwrite: bool, no_progress: bool) -> None:
    """Hold the rules that CONFIG describes against the first flow among them, with a figure and
    distances.csv."""
    from flowsim import plots

    experiment = _experiment(config)
    directory = _free(experiment, output, overwrite)
    console = _console(experiment)
    try:
        found = experiment.compare(directory, progress=not no_progress)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        raise click.ClickException(str(error)) from None
    runs = {found.flow.label: found.flow, **found.runs}
    _print_table(console, runs, directory)
    _print_distances(console, found)
    figures = plots.save(plots.comparison(found), directory / "compare", runs)
    console.print("Figures: " + ", ".join(str(path) for path in figures))
    console.print(f"Runs:   {directory}/  (distances at every save point in distances.csv)")


def _free(experiment: "Experiment", output: Path | None, overwrite: bool) -> Path:
    """The directory for the results, if it may be written."""
    directory = output or Path("runs") / experiment.name
    if (directory / "config.toml").exists() and not overwrite:
        raise click.ClickException(
            f"{directory} holds results already; choose another --output, or add --overwrite"
        )
    return directory


def _console(experiment: "Experiment") -> "Console":
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 190, highlight=False)
    console.print(
        f"flowsim {__version__}: {experiment.name}, {len(experiment.rules)} runs of {len(experiment.seeds)} seeds"
    )
    return console


def _experiment(config: Path) -> "Experiment":
    from flowsim.experiment.experiment import Experiment

    try:
        return Experiment.read(config)
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from None


def _execute(experiment: "Experiment", directory: Path, *, progress: bool) -> None:
    """Run, save, draw and print."""
    from flowsim import plots

    console = _console(experiment)
    try:
        runs = experiment.run(directory, progress=progress)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        raise click.ClickException(str(error)) from None
    _print_table(console, runs, directory)
    for label, run in runs.items():
        console.print(f"{label}: {run.certificate.verdict}", style="dim")
    if all("margin_l2" in r for r in runs.values()):
        figures = plots.save(plots.overview(runs), directory / "margins", runs)
        figures += plots.save(plots.trust(runs), directory / "trust")
        console.print("Figures: " + ", ".join(str(path) for path in figures))
    console.print(f"Runs:   {directory}/  (load one with flowsim.load)")


def _print_table(console: "Console", runs: "dict[str, Trajectory]", directory: Path) -> None:
    import csv

    from rich.table import Table

    from flowsim.run.summary import summarise

    rows = summarise(runs)
    with (directory / "summary.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    table = Table(caption="Medians over seeds.", caption_justify="left")
    for name in rows[0]:
        table.add_column(
            _TITLES.get(name, name), justify="left" if name in ("run", "stopped") else "right"
        )
    for row in rows:
        table.add_row(
            *(
                value if isinstance(value, str) else _short(name, value)
                for name, value in row.items()
            )
        )
    console.print(table)


def _print_distances(console: "Console", found: "Comparison") -> None:
    """The largest distances of each run from the flow, as medians over seeds."""
    import numpy as np
    from rich.table import Table

    table = Table(
        caption="Largest distance from the flow; medians over seeds.", caption_justify="left"
    )
    columns = [
        ("weights", "log_time"),
        ("weights", "nearest"),
        ("direction", "lam"),
        ("outputs", "log_time"),
    ]
    table.add_column("run")
    for what, at in columns:
        table.add_column(f"{what}, {_PLACES[at]}", justify="right")
    for label in found.labels:
        far = [found[label, what, at] for what, at in columns]
        largest = [np.fmax.reduce(value, axis=0) for value in far]  # of what is known
        table.add_row(label, *(_short("distance", float(np.median(value))) for value in largest))
    console.print(table)


_PLACES = {"log_time": "equal t", "lam": "equal Λ", "nearest": "nearest point"}


_TITLES = {
    "t0": "t₀",
    "lam": "Λ",
    "margin_l1": "margin ℓ1",
    "margin_l2": "margin ℓ2",
    "margin_linf": "margin ℓ∞",
    "alignment": "α",
    "energy": "energy",
    "stopped": "why it stopped",
}


def _short(name: str, value: float) -> str:
    if value != value:
        return "–"
    if name in ("steps", "gradients", "sliding", "releases"):
        return f"{value:.0f}"
    return f"{value:+.1g}" if name == "energy" else f"{value:.4g}"
