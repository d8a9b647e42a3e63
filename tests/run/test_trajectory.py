"""Saving, loading and going on: what is on disk is what was computed, and a resumed run is the
unbroken run."""

import json
import os
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch

import flowsim as fs
from flowsim.run import trajectory
from flowsim.run.trajectory import load_state, save_state

X, Y = fs.data.gaussian_separable(15, 4, margin=0.5, seed=range(3))
SMOOTH = fs.MLP([4, 8, 1], activation=fs.squared_relu)
KINKED = fs.MLP([4, 8, 1], activation=fs.relu)


def problem(net, seeds=range(3)):
    return fs.Problem(net, X[list(seeds)], Y[list(seeds)], fs.exponential)


@pytest.fixture(scope="module")
def run():
    net = problem(KINKED)
    observe = {"entropy": fs.diagnostics.entropy, "margins": lambda p, s: p.margins(s.w)}
    rule, w0 = fs.SmallStep(fs.Linf()), KINKED.init(range(3))
    return fs.simulate(net, rule, w0, until=fs.lam(2.0, saves=7), observe=observe, max_steps=120)


def test_a_run_shows_itself_in_a_few_lines_without_its_numbers(run):
    lines = repr(run).splitlines()
    assert lines[0] == f"{run.label}: 3 trajectories, 7 saves by lam"
    for status in set(run.statuses):
        assert f"{run.statuses.count(status)} × {status.name}: {status.sentence}" in lines
    assert lines[-1] == "values: " + ", ".join(run.names)
    assert run._repr_html_().startswith(f"<b>{lines[0]}</b><br>")
    assert "array" not in repr(run)


def test_saved_and_loaded_is_the_same(run, tmp_path):
    back = fs.load(run.save(tmp_path / "run"))
    assert set(back.names) == set(run.names)
    for name in run.names:
        assert np.array_equal(back[name], run[name], equal_nan=True), name
        assert back[name].dtype == run[name].dtype
    assert np.array_equal(back.weights, run.weights, equal_nan=True)
    assert back.statuses == run.statuses
    assert (back.label, back.clock) == (run.label, run.clock)
    assert back.provenance == json.loads(json.dumps(run.provenance))
    for name, tensor in run.final.tensors().items():
        assert torch.equal(tensor.nan_to_num(), back.final.tensors()[name].nan_to_num()), name


def test_names_keep_their_order_on_disk(run, tmp_path):
    assert fs.load(run.save(tmp_path)).names == run.names


def test_a_run_without_weights_has_none_when_loaded(run, tmp_path):
    assert fs.load(replace(run, weights=None).save(tmp_path)).weights is None


def test_the_file_opens_with_dimension_scales(run, tmp_path):
    run.save(tmp_path)
    with h5py.File(tmp_path / "trajectory.nc") as file:
        for name in (*run.names, "weights"):
            dims = file[name].dims
            assert [dims[0][0].name, dims[1][0].name] == ["/save", "/trajectory"], name
        assert file["save"].is_scale
        assert file["margins"].dims[2][0].shape == (15,)
        assert file["weights"].dims[2][0].shape == (KINKED.size,)


def test_run_json_says_why_each_trajectory_stopped(run, tmp_path):
    run.save(tmp_path)
    record = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert record["status"] == [{"name": s.name, "sentence": s.sentence} for s in run.statuses]
    assert record["label"] == run.label


def test_loading_what_is_not_a_run_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run.json; expected"):
        fs.load(tmp_path)


def test_an_unknown_name_is_answered_with_the_names_there_are(run):
    with pytest.raises(KeyError, match="no value 'loss'.*lam, log_time"):
        run["loss"]
    assert "loss" not in run
    assert "lam" in run


@pytest.mark.parametrize(("rows", "expected"), [(1, [1]), ([2, 0], [2, 0]), (range(2), [0, 1])])
def test_select_takes_trajectories(run, rows, expected):
    part = run.select(rows)
    assert len(part) == len(expected)
    assert part.statuses == [run.statuses[b] for b in expected]
    for name in run.names:
        assert np.array_equal(part[name], run[name][:, expected], equal_nan=True)
    assert np.array_equal(part.weights, run.weights[:, expected], equal_nan=True)
    assert torch.equal(part.final.w, run.final.w[expected])


@pytest.mark.parametrize("broken", ["save_values", "replace"])
def test_an_interrupted_write_leaves_the_old_run(run, tmp_path, monkeypatch, broken):
    run.save(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def killed(*arguments):
        if broken == "save_values":
            arguments[1].write_bytes(b"half a file")
        raise KeyboardInterrupt

    if broken == "save_values":
        monkeypatch.setattr(trajectory.Trajectory, "_write_values", killed)
    else:
        monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        run.select([0]).save(tmp_path)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after.keys() == before.keys()  # and no half-written file lies beside them
    assert after[tmp_path / "trajectory.nc"] == before[tmp_path / "trajectory.nc"]
    assert after[tmp_path / "run.json"] == before[tmp_path / "run.json"]
    assert len(fs.load(tmp_path)) in (1, 3)


def test_saving_again_replaces_the_run(run, tmp_path):
    run.save(tmp_path)
    run.select([0]).save(tmp_path)
    assert len(fs.load(tmp_path)) == 1
    assert {p.name for p in tmp_path.iterdir()} == {"run.json", "trajectory.nc", "checkpoints"}


def test_a_state_on_disk_keeps_dtypes_and_needs_nothing_else(tmp_path):
    w0 = KINKED.init(range(3)).float()
    state = fs.simulate(problem(KINKED), fs.SmallStep(fs.L2()), w0, until=fs.steps(3)).final
    save_state(state, tmp_path)
    back = load_state(tmp_path)
    assert back.w.dtype == torch.float32
    assert back.readings["lam"].dtype == torch.float64
    assert torch.equal(back.w, state.w)


# Going on

RULES = {
    "l2 small steps": (fs.SmallStep(fs.L2()), KINKED),
    "linf small steps": (fs.SmallStep(fs.Linf()), KINKED),
    "l1 small steps": (fs.SmallStep(fs.L1(), dlam=0.2), KINKED),
    "l2 descent": (fs.GradientDescent(0.01), KINKED),
    "linf normalised descent": (fs.SignDescent(0.005, normalized=True), KINKED),
    "l1 normalised descent": (fs.CoordinateDescent(0.05, normalized=True), KINKED),
    "l2 flow": (fs.SteepestFlow(fs.L2()), SMOOTH),
    "l3 flow": (fs.SteepestFlow(fs.Lp(3.0), rtol=1e-4, method=fs.BOSH3), SMOOTH),
    "l2 flow in lam": (fs.SteepestFlow(fs.L2(), clock=fs.clocks.LAM, method=fs.DOPRI5), SMOOTH),
}


@pytest.mark.parametrize("seeds", [[1], range(3)], ids=["alone", "batch"])
@pytest.mark.parametrize("name", RULES)
def test_a_resumed_run_is_the_unbroken_run(name, seeds, tmp_path, agree):
    """Alone to the last bit, in everything but the count of gradients: going on evaluates the
    gradient where it starts once more."""
    rule, net = RULES[name]
    p, w0 = problem(net, seeds), net.init(seeds)
    far, half = (
        (fs.steps(120), fs.steps(50)) if "descent" in name else (fs.lam([4.0]), fs.lam([2.0]))
    )
    whole = fs.simulate(p, rule, w0, until=far, max_steps=20_000)
    fs.simulate(p, rule, w0, until=half, directory=tmp_path)
    resumed = fs.simulate(p, rule, fs.load(tmp_path).final, until=far)
    assert resumed.statuses == whole.statuses == [fs.Status.DONE] * len(seeds)
    a, b = whole.final.tensors(), resumed.final.tensors()
    assert a.keys() == b.keys()
    assert (b.pop("tallies.gradients") == a.pop("tallies.gradients") + 1).all()
    for key in a:
        agree(b[key], a[key], rel=0 if len(seeds) == 1 else 1e-9)


def test_a_resumed_run_of_torchdiffeq_is_the_unbroken_run_with_the_same_save_points(tmp_path):
    rule = fs.SteepestFlow(fs.L2(), rtol=1e-4, method=fs.TorchDiffEq("dopri5"))
    p, w0 = problem(SMOOTH), SMOOTH.init(range(3))
    whole = fs.simulate(p, rule, w0, until=fs.arclength([1.0, 2.0]))
    fs.simulate(p, rule, w0, until=fs.arclength([1.0])).save(tmp_path)
    resumed = fs.simulate(p, rule, fs.load(tmp_path).final, until=fs.arclength([2.0]))
    assert torch.equal(resumed.final.w, whole.final.w)


@pytest.mark.parametrize("first", ["l2 flow", "l2 small steps", "l2 descent", "torchdiffeq"])
@pytest.mark.parametrize("second", ["l2 flow", "l2 small steps", "l2 descent", "torchdiffeq"])
def test_rules_can_be_switched_and_clocks_go_on(first, second):
    rules = {
        "l2 flow": fs.SteepestFlow(fs.L2(), rtol=1e-4),
        "l2 small steps": fs.SmallStep(fs.L2()),
        "l2 descent": fs.GradientDescent(0.01, normalized=True),
        "torchdiffeq": fs.SteepestFlow(fs.L2(), rtol=1e-4, method=fs.TorchDiffEq("dopri5")),
    }
    p, w0 = problem(SMOOTH), SMOOTH.init(range(3))
    one = fs.simulate(p, rules[first], w0, until=fs.arclength(0.2, saves=3))
    two = fs.simulate(p, rules[second], one.final, until=fs.arclength(0.5, saves=4))
    assert two.statuses == [fs.Status.DONE] * 3
    assert np.array_equal(two.weights[0], one.final.w.numpy())
    for name in ("lam", "log_time", "arclength", "relative", "steps"):
        assert (np.diff(two[name], axis=0) >= 0).all(), name
    lam = p.lam(torch.from_numpy(two.weights[-1]))
    assert two["lam"][-1] == pytest.approx(lam.numpy(), abs=1e-9)
    direct = fs.simulate(p, fs.SteepestFlow(fs.L2()), w0, until=fs.arclength(0.5, saves=2))
    assert np.abs(two.weights[-1] - direct.weights[-1]).max() < 0.05
