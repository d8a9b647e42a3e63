"""Rules by their words: every section makes the rule that it names, and every key of it counts."""

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

import flowsim as fs
from flowsim.experiment.sections import AnyRule, method_from_word, norm_from_word

NET = fs.MLP([4, 6, 1], activation=fs.squared_relu)
X, Y = fs.data.gaussian_separable(10, 4, margin=0.5, seed=range(2))
PROBLEM, W0 = fs.Problem(NET, X, Y, fs.logistic), NET.init(range(2), scale=0.5)


def rule(**section):
    return TypeAdapter(AnyRule).validate_python(section).rule(NET.layout)


HEAVY = {"kind": "heavy_ball", "beta": 0.5}
SECTIONS = [
    ({"kind": "adam", "lr": 0.1}, fs.Adam(0.1)),
    (
        {"kind": "adam", "lr": 0.1, "betas": [0.5, 0.6], "eps": 0},
        fs.Adam(0.1, betas=(0.5, 0.6), eps=0.0),
    ),
    ({"kind": "adam", "lr": 0.1, "corrected": False}, fs.Adam(0.1, corrected=False)),
    ({"kind": "adamw", "lr": 0.1, "decay": 0.5, "eps": 0.1}, fs.AdamW(0.1, decay=0.5, eps=0.1)),
    ({"kind": "rmsprop", "lr": 0.1, "beta": 0.5}, fs.RMSProp(0.1, beta=0.5)),
    ({"kind": "adagrad", "lr": 0.1, "eps": 1e-3}, fs.AdaGrad(0.1, eps=1e-3)),
    ({"kind": "muon", "lr": 0.1, "beta": 0.5, "decay": 0.1}, fs.Muon(0.1, 0.5, decay=0.1)),
    (
        {"kind": "muon", "lr": 0.1, "newton_schulz": 3, "nesterov": False},
        fs.Muon(0.1, 0.95, False, fs.NewtonSchulz(3)),
    ),
    ({"kind": "shampoo", "lr": 0.1, "eps": 0.1}, fs.Shampoo(0.1, eps=0.1)),
    ({"kind": "shampoo", "lr": 0.1, "beta": 0, "exponent": 0.3}, fs.Shampoo(0.1, 0.0, 0.3)),
    (
        {"kind": "descent", "lr": 0.1, "momentum": HEAVY},
        fs.GradientDescent(0.1, momentum=fs.HeavyBall(0.5)),
    ),
    (
        {
            "kind": "descent",
            "norm": "linf",
            "lr": 0.1,
            "normalized": True,
            "momentum": {"kind": "average"},
            "decay": 0.1,
        },
        fs.Signum(0.1, decay=0.1),
    ),
    (
        {"kind": "descent", "lr": {"kind": "decay", "lr": 0.1, "power": 1, "delay": 2}},
        fs.GradientDescent(fs.Decay(0.1, 1.0, 2.0)),
    ),
    (
        {"kind": "descent", "lr": {"kind": "loss_based", "lr": 0.1}},
        fs.GradientDescent(fs.LossBased(0.1)),
    ),
    (
        {"kind": "descent", "lr": {"kind": "loss_based", "lr": {"kind": "decay", "lr": 0.1}}},
        fs.GradientDescent(fs.LossBased(fs.Decay(0.1))),
    ),
    (
        {"kind": "adam", "lr": {"kind": "per_step", "lr": [0.1, 0.2]}},
        fs.Adam(fs.PerStep([0.1, 0.2])),
    ),
    (
        {"kind": "adam", "lr": 0.1, "batch": {"size": 3, "seed": 2, "replacement": True}},
        fs.MiniBatches(fs.Adam(0.1), 3, 2, True),
    ),
    (
        {"kind": "dissipation", "potential": "smooth_sign", "level": 0.1},
        fs.DissipationFlow(fs.SmoothSign(0.1)),
    ),
    ({"kind": "dissipation", "potential": "huber", "level": 2}, fs.DissipationFlow(fs.Huber(2.0))),
    (
        {"kind": "dissipation", "potential": "clipping", "level": 2, "rtol": 0.1},
        fs.DissipationFlow(fs.Clipping(2.0), 0.1),
    ),
]


@pytest.mark.parametrize(("section", "expected"), SECTIONS, ids=lambda value: str(value)[:60])
def test_a_section_makes_the_rule_that_it_names(section, expected):
    assert rule(**section) == expected


def test_a_switch_has_the_sections_of_both_rules():
    first, then = {"kind": "adam", "lr": 0.01}, {"kind": "flow", "norm": "l2"}
    for at, event in (
        (
            {"measure": "lam", "level": -1.5},
            fs.Event(lambda problem, state: state.readings["lam"], -1.5),
        ),
        ({"measure": "accuracy", "level": 1}, fs.Event(fs.diagnostics.accuracy, 1.0)),
        (
            {"measure": "steps", "level": 3},
            fs.Event(lambda problem, state: state.readings["steps"], 3.0),
        ),
    ):
        made = rule(kind="switch", first=first, then=then, at=at)
        plain = fs.Switch(fs.Adam(0.01), fs.SteepestFlow(fs.L2()), event)
        ends = [
            fs.simulate(PROBLEM, r, W0, until=fs.lam([-1.0]), max_steps=500).final.w
            for r in (made, plain)
        ]
        assert torch.equal(*ends)


def test_switches_nest_in_words():
    leaf = {"kind": "adam", "lr": 0.01}
    at = {"measure": "steps", "level": 3}
    inner = {"kind": "switch", "first": leaf, "then": leaf, "at": at}
    assert isinstance(rule(kind="switch", first=inner, then=leaf, at=at).first, fs.Switch)


@pytest.mark.parametrize(
    "section",
    [
        {"kind": "adam", "lr": 0},
        {"kind": "adam", "lr": "fast"},
        {"kind": "adam", "lr": {"kind": "cosine", "lr": 0.1}},
        {"kind": "adam", "lr": 0.1, "betas": [0.9, 1.0]},
        {"kind": "adam", "lr": 0.1, "beta": 0.9},
        {"kind": "adam", "lr": 0.1, "norm": "l2"},
        {"kind": "adam", "lr": 0.1, "batch": {"size": 0}},
        {"kind": "descent", "lr": 0.1, "momentum": {"kind": "heavy_ball", "beta": 1.0}},
        {"kind": "shampoo", "lr": 0.1, "exponent": 0.5},
        {"kind": "dissipation", "potential": "square", "level": 1},
        {
            "kind": "switch",
            "first": {"kind": "adam", "lr": 0.1},
            "at": {"measure": "lam", "level": 1},
        },
        {"kind": "sgd", "lr": 0.1},
    ],
    ids=str,
)
def test_mistakes_are_refused(section):
    with pytest.raises(ValidationError):
        rule(**section)


def test_every_word_for_a_norm_makes_it():
    words = ["l1", "l2", "linf", "l3", "l1.5", "spectral", "nuclear", "frobenius", "schatten4"]
    assert [norm_from_word(w, NET.layout).name for w in words] == words
    assert norm_from_word("modular", NET.layout).name.startswith("max(")


def test_every_word_for_a_method_makes_it():
    assert method_from_word("auto") is None
    assert method_from_word("dopri5") is fs.DOPRI5
    assert method_from_word("bosh3") is fs.BOSH3
    assert method_from_word("torchdiffeq:dopri8") == fs.TorchDiffEq("dopri8")
