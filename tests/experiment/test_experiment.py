"""Configurations: everything in the file changes the run, and every mistake in it is said at
once."""

import tomllib
from importlib.resources import files

import numpy as np
import pytest
import torch

import flowsim as fs
from flowsim.experiment.experiment import Experiment, slug

BASE = """
name = "tiny"
seeds = [0, 1]
[data]
kind = "gaussian_separable"
n = 10
d = 4
[net]
kind = "mlp"
hidden = [6]
activation = "squared_relu"
[init]
scale = 0.5
[until]
clock = "lam"
value = 3.0
saves = 6
[[rules]]
kind = "flow"
norm = "l2"
max_steps = 100
"""
SMALL = 'kind = "small_steps"\nnorm = "l2"\nmax_steps = 100'
DESCENT = (
    'kind = "descent"\nnorm = "l2"\nlr = 0.01\nuntil = { clock = "steps", value = 20, saves = 3 }'
)
FLOW = 'kind = "flow"\nnorm = "l2"\nmax_steps = 100'


def read(text, tmp_path) -> Experiment:
    path = tmp_path / "experiment.toml"
    path.write_text(text, encoding="utf-8")
    return Experiment.read(path)


def outcome(text, tmp_path) -> tuple:
    """Everything a run gives, as comparable numbers."""
    runs = read(text, tmp_path).run()
    return tuple(
        (
            (label, run.label, sorted(run.names), run.final.w.dtype),
            np.nan_to_num(run["lam"]).tolist(),
            run.final.w.tolist(),
            run.final.readings["steps"].tolist(),
        )
        for label, run in runs.items()
    )


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict:
    """The outcomes of the configurations that are changed, by their text."""
    texts = (BASE, BASE.replace(FLOW, SMALL), BASE.replace(FLOW, DESCENT))
    return {text: outcome(text, tmp_path_factory.mktemp("plain")) for text in texts}


CHANGES = {
    "seeds": ("seeds = [0, 1]", "seeds = [0, 2]"),
    "loss": ('name = "tiny"', 'name = "tiny"\nloss = "logistic"'),
    "dtype": ('name = "tiny"', 'name = "tiny"\ndtype = "float32"'),
    "data.n": ("n = 10", "n = 9"),
    "data.d": ("d = 4", "d = 5"),
    "data.margin": ("d = 4", "d = 4\nmargin = 0.5"),
    "data.kind": (
        'kind = "gaussian_separable"\nn = 10\nd = 4',
        'kind = "teacher_student"\nn = 10\nd = 4\nteacher_width = 3\nactive = 2',
    ),
    "net.hidden": ("hidden = [6]", "hidden = [7]"),
    "net.activation": ('activation = "squared_relu"', 'activation = "identity"'),
    "net.kind": ('kind = "mlp"\nhidden = [6]\nactivation = "squared_relu"', 'kind = "diagonal"'),
    "net.frozen": ("hidden = [6]", 'hidden = [6]\nfrozen = ["W2"]'),
    "init.scale": ("scale = 0.5", "scale = 0.6"),
    "until.clock": ('clock = "lam"', 'clock = "arclength"'),
    "until.value": ("value = 3.0", "value = 2.0"),
    "until.saves": ("saves = 6", "saves = 7"),
    "rule.kind small steps": (FLOW, SMALL),
    "rule.kind descent": (FLOW, DESCENT),
    "rule.norm": (FLOW, 'kind = "flow"\nnorm = "l1.5"\nmax_steps = 100'),
    "rule.label": (FLOW, FLOW + '\nlabel = "mine"'),
    "rule.until": (FLOW, FLOW + '\nuntil = { clock = "time", value = 0.5, saves = 4 }'),
    "rule.max_steps": (FLOW, FLOW.replace("100", "3")),
    "flow.rtol": (FLOW, FLOW + "\nrtol = 1e-3"),
    "flow.atol": (FLOW, FLOW + "\natol = 1e-2"),
    "flow.method": (FLOW, FLOW + '\nmethod = "bosh3"'),
    "flow.method torchdiffeq": (FLOW, FLOW + '\nclock = "lam"\nmethod = "torchdiffeq:dopri5"'),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_option_changes_a_result(change, plain, tmp_path):
    old, new = CHANGES[change]
    assert old in BASE
    assert outcome(BASE.replace(old, new), tmp_path) != plain[BASE]


def test_the_clock_of_an_explicit_flow_changes_its_steps(tmp_path):
    plain = BASE.replace(FLOW, FLOW + '\nmethod = "dopri5"')
    relative = plain.replace(FLOW, FLOW + '\nclock = "relative"')
    assert outcome(relative, tmp_path) != outcome(plain, tmp_path)


RULE_CHANGES = {
    "dlam": (SMALL, "dlam = 0.2"),
    "relative": (SMALL, "relative = 0.001"),
    "lr": (DESCENT.replace("lr = 0.01", ""), "lr = 0.02"),
    "normalized": (DESCENT, "normalized = true"),
}


@pytest.mark.parametrize("option", RULE_CHANGES)
def test_every_option_of_a_discrete_rule_changes_a_result(option, plain, tmp_path):
    rule, new = RULE_CHANGES[option]
    changed = BASE.replace(FLOW, f"{rule}\n{new}")
    assert (
        outcome(changed, tmp_path) != plain[BASE.replace(FLOW, SMALL if rule is SMALL else DESCENT)]
    )


def test_leaky_slope_threads_and_digits_classes_are_used(tmp_path):
    leaky = BASE.replace(FLOW, SMALL).replace('"squared_relu"', '"leaky_relu"\nslope = 0.1')
    assert outcome(leaky, tmp_path) != outcome(leaky.replace("0.1", "0.2"), tmp_path)
    before = torch.get_num_threads()
    try:
        run = read(BASE.replace('name = "tiny"', 'name = "tiny"\nthreads = 1'), tmp_path).run()
        assert torch.get_num_threads() == 1
        assert run["ℓ2 flow"].provenance["threads"] == 1
    finally:
        torch.set_num_threads(before)
    digits = BASE.replace(
        'kind = "gaussian_separable"\nn = 10\nd = 4', 'kind = "digits"\nclasses = [3, 6]\nn = 10'
    )
    assert outcome(digits, tmp_path) != outcome(digits.replace("[3, 6]", "[1, 7]"), tmp_path)


def test_an_npz_file_is_read_by_its_arrays(tmp_path):
    x, y = fs.data.gaussian_separable(8, 3, seed=4)
    np.savez(tmp_path / "mine.npz", X=x.numpy(), y=y.numpy())
    text = BASE.replace(
        'kind = "gaussian_separable"\nn = 10\nd = 4', f'kind = "npz"\npath = "{tmp_path}/mine.npz"'
    )
    problem, test, w = read(text, tmp_path).problem()
    assert torch.equal(problem.x, x)
    assert test is None
    assert w.shape == (2, problem.size)
    np.savez(tmp_path / "mine.npz", x=x.numpy())
    with pytest.raises(ValueError, match="expected X"):
        read(text, tmp_path).problem()


def test_several_classes_take_a_multiclass_loss(tmp_path):
    text = BASE.replace(
        'kind = "gaussian_separable"\nn = 10\nd = 4', 'kind = "digits"\nclasses = [1, 4, 7]\nn = 12'
    )
    for loss in ("cross_entropy", "pairwise_exponential"):
        problem, *_ = read(
            text.replace('name = "tiny"', f'name = "tiny"\nloss = "{loss}"'), tmp_path
        ).problem()
        assert problem.outputs(problem.net.init([0, 1])).shape == (2, 12, 3)


def test_a_written_configuration_is_complete_and_reads_back_the_same(tmp_path):
    experiment = read(BASE, tmp_path)
    experiment.write(tmp_path / "written.toml")
    assert Experiment.read(tmp_path / "written.toml") == experiment
    assert tomllib.loads((tmp_path / "written.toml").read_text())["rules"][0]["rtol"] == 1e-4


def test_the_same_configuration_gives_the_same_bits(plain, tmp_path):
    assert outcome(BASE, tmp_path) == plain[BASE]


BAD = {
    "unknown key": ('name = "tiny"', 'name = "tiny"\nsede = 1', "sede"),
    "wrong type": ("n = 10", 'n = "ten"', "data.*n"),
    "unknown kind": ('kind = "mlp"', 'kind = "rnn"', "net"),
    "unknown loss": ('name = "tiny"', 'name = "tiny"\nloss = "hinge"', "loss"),
    "no rules": ('[[rules]]\nkind = "flow"\nnorm = "l2"', "rules = []", "rules"),
    "negative rate": (FLOW, DESCENT.replace("0.01", "-1"), "rules.0.descent.lr"),
    "one save": ("saves = 6", "saves = 1", "until.saves"),
    "twice the same seed": ("[0, 1]", "[1, 1]", "seeds"),
    "not TOML": ('name = "tiny"', "name = tiny", "not a TOML file"),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_named_with_their_place(case, tmp_path):
    old, new, place = BAD[case]
    assert old in BASE
    with pytest.raises(ValueError, match=f"(?s){place}"):
        read(BASE.replace(old, new), tmp_path)


def test_all_mistakes_of_a_file_are_reported_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"(?s)seeds.*until\.saves"):
        read(BASE.replace("saves = 6", "saves = 1").replace("[0, 1]", '["a"]'), tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('norm = "l2"', 'norm = "ell2"', "norm: got 'ell2', expected one of l1"),
        ('norm = "l2"', 'norm = "l0.5"', "got p = 0.5, expected 1 < p"),
        ("hidden = [6]", 'hidden = [6]\nfrozen = ["W9"]', "net.frozen"),
        (FLOW, FLOW + "\n[[rules]]\n" + FLOW, "two rules are labelled"),
        (FLOW, FLOW + '\nmethod = "rk45"', "method: got 'rk45', expected auto, dopri5"),
    ],
)
def test_words_that_mean_nothing_are_refused(old, new, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read(BASE.replace(old, new), tmp_path).run()


def test_a_flow_that_nothing_can_follow_is_refused(tmp_path):
    text = BASE.replace(FLOW, FLOW.replace("l2", "modular"))
    with pytest.raises(ValueError, match="SmallStep"):
        read(text, tmp_path).run()


def test_file_names_are_plain():
    assert slug("normalised sign descent, lr = 0.001") == "normalised-sign-descent-lr-0.001"
    assert slug("ℓ∞ small steps, ΔΛ = 0.1") == "linf-small-steps-dlam-0.1"


def test_the_demo_is_a_valid_experiment_on_real_images():
    demo = Experiment.read(str(files("flowsim.experiment") / "demo.toml"))
    problem, test, w = demo.problem()
    assert w.shape == (3, 128 * 65)
    assert problem.x.shape == (3, 100, 64)
    assert test is not None
    assert test.x.shape[1] == 364 - 100


def test_the_first_flow_is_held_against_the_other_rules(tmp_path):
    both = BASE + f"[[rules]]\n{DESCENT}\n"
    path = tmp_path / "both.toml"
    path.write_text(both, encoding="utf-8")
    found = Experiment.read(path).compare()
    assert found.labels == ["gradient descent, lr = 0.01"]
    apart = found[found.labels[0], "weights", "lam"]
    assert apart.shape[1] == 2
    assert 0 < np.nanmax(apart) < 0.5
