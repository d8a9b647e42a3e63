"""The command line, called as a user calls it."""

import csv
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner

import flowsim as fs
from flowsim.experiment.cli import main

SMALL = """
name = "tiny"
seeds = [0, 1]
[data]
kind = "gaussian_separable"
n = 8
d = 3
[net]
kind = "mlp"
hidden = [4]
[init]
scale = 0.5
[until]
value = 5.0
saves = 8
[[rules]]
kind = "small_steps"
norm = "l2"
dlam = 0.2
[[rules]]
kind = "descent"
norm = "linf"
lr = 0.01
normalized = true
max_steps = 10
"""


def call(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(SMALL, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A configuration, the directory of its results, and what the command has said."""
    config, out = (tmp_path_factory.mktemp("run") / name for name in ("tiny.toml", "out"))
    config.write_text(SMALL, encoding="utf-8")
    return config, out, call("run", config, "-o", out, "--no-progress")


def test_run_writes_a_directory_that_loads_and_prints_why_each_run_stopped(finished):
    _, out, result = finished
    assert result.exit_code == 0, result.output
    assert "2 × DONE" in result.output
    assert "2 × MAX_STEPS" in result.output
    assert (
        "ℓ2 small steps, ΔΛ = 0.2: separated; soft margin monotone; energy balance" in result.output
    )
    made = {p.name for p in out.iterdir()}
    assert made > {"config.toml", "summary.csv", "margins.csv"}
    assert made > {"margins.pdf", "margins.png", "trust.pdf", "trust.png"}
    run = fs.load(out / "l2-small-steps-dlam-0.2")
    assert run["lam"][-1] == pytest.approx([5.0, 5.0], abs=1e-2)
    record = json.loads((out / "l2-small-steps-dlam-0.2" / "run.json").read_text())
    assert record["provenance"]["flowsim"] == fs.__version__
    assert record["provenance"]["commit"] is None or len(record["provenance"]["commit"]) >= 40


def test_results_are_not_overwritten_without_being_asked(finished):
    config, out, _ = finished
    again = call("run", config, "-o", out, "--no-progress")
    assert again.exit_code == 1
    assert "holds results already" in again.output
    assert call("run", config, "-o", out, "--no-progress", "--overwrite").exit_code == 0


def test_init_writes_the_commented_demo_and_never_over_a_file(tmp_path):
    path = tmp_path / "mine.toml"
    first = call("init", path)
    assert first.exit_code == 0
    assert f"flowsim run {path}" in first.output
    assert "# " in path.read_text()
    again = call("init", path)
    assert again.exit_code == 1
    assert "--overwrite" in again.output
    assert call("init", path, "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('kind = "mlp"', 'kind = "cnn"', "net"),
        ("lr = 0.01", "lr = 0", "lr"),
        ('norm = "l2"', 'norm = "ell2"', "got 'ell2'"),
        ('name = "tiny"', "name =", "not a TOML file"),
        ("dlam = 0.2", "dlam = 0.2\nstep = 3", "step"),
    ],
)
def test_mistakes_end_in_one_sentence_without_a_traceback(old, new, message, config, tmp_path):
    config.write_text(SMALL.replace(old, new), encoding="utf-8")
    result = call("run", config, "-o", tmp_path / "out", "--no-progress")
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()  # a corrected file runs without --overwrite


def test_a_missing_file_and_an_unknown_command_are_usage_errors(tmp_path):
    assert call("run", tmp_path / "none.toml").exit_code == 2
    assert call("simulate").exit_code == 2


def test_help_and_version_do_not_import_torch():
    for option in ("--help", "--version"):
        code = (
            "import sys; from flowsim.experiment.cli import main\n"
            f"try: main([{option!r}])\n"
            "except SystemExit: pass\n"
            "heavy = {'torch', 'scipy', 'matplotlib', 'sklearn', 'pydantic'} & set(sys.modules)\n"
            "assert not heavy, heavy"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


# Compare

COMPARED = """
name = "tiny"
seeds = [0, 1]
loss = "logistic"
[data]
kind = "gaussian_separable"
n = 8
d = 3
[net]
kind = "mlp"
hidden = []
[init]
scale = 0.5
[until]
clock = "time"
value = 2.0
saves = 5
[[rules]]
kind = "flow"
norm = "linf"
[[rules]]
kind = "descent"
norm = "linf"
lr = 0.01
"""


def test_the_command_saves_runs_distances_and_a_figure(tmp_path):
    config, out = tmp_path / "tiny.toml", tmp_path / "out"
    config.write_text(COMPARED, encoding="utf-8")
    result = call("compare", config, "-o", out, "--no-progress")
    assert result.exit_code == 0, result.output
    assert "weights, equal t" in result.output
    table = result.output.partition("weights, equal t")[2]
    shown = next(line for line in table.splitlines() if "sign descent" in line)
    distances = [
        float(word) for word in re.findall(r"\d[\d.e-]*", shown.partition("│")[2].partition("│")[2])
    ]
    assert max(distances) > 1e-3  # how far the discrete run is from the flow at most
    made = {p.name for p in out.iterdir()}
    assert {
        "config.toml",
        "summary.csv",
        "distances.csv",
        "compare.pdf",
        "compare.png",
        "compare.csv",
    } < made
    flow, run = fs.load(out / "linf-flow"), fs.load(out / "sign-descent-lr-0.01")
    with (out / "distances.csv").open(encoding="utf-8") as file:
        rows = [
            row
            for row in csv.DictReader(file)
            if row["at"] == "log_time" and row["trajectory"] == "1"
        ]
    assert len(rows) == 5
    last = rows[-1]
    assert float(last["lam"]) == pytest.approx(run["lam"][-1, 1])
    size = np.linalg.norm(flow.weights[-1, 1])
    same = np.linalg.norm(run.weights[-1, 1] - flow.weights[-1, 1]) / size  # both are at t = 2
    assert float(last["apart_weights"]) == pytest.approx(same, rel=1e-6)
    assert (fs.Experiment.read(out / "config.toml")).rules[0].kind == "flow"
    again = call("compare", config, "-o", out, "--no-progress")
    assert again.exit_code == 1
    assert "--overwrite" in again.output


def test_the_command_needs_a_flow_and_another_rule(tmp_path):
    config = tmp_path / "tiny.toml"
    config.write_text(COMPARED.replace('kind = "flow"', 'kind = "small_steps"'), encoding="utf-8")
    result = call("compare", config, "-o", tmp_path / "out", "--no-progress")
    assert result.exit_code == 1
    assert "expected a flow and one other at least" in result.output
    assert not (tmp_path / "out").exists()
