"""What runs say of themselves: true where they are good, plain where they are not."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import flowsim as fs
from flowsim.diagnostics.certificate import Certificate

NET, START = fs.data.peers_net(5, 10, 10, seed=0)
FIXTURE = fs.Problem(fs.Linear(3), [[3, 1, 0], [1, -2, 2], [1, 2, 1]], [1, 1, 1], fs.exponential)


@pytest.fixture(scope="module")
def flow():
    return fs.simulate(
        NET, fs.SteepestFlow(fs.L2(), rtol=1e-3), START, until=fs.lam(30.0, saves=40)
    )


def test_a_flow_is_monotone_and_balances_its_energy(flow):
    found = flow.certificate
    assert len(found) == 1
    assert found.margin[0] > 30
    assert found.fall[0] == found.falls[0] == 0
    assert abs(found.energy[0]) < 1e-3
    assert found.energy[0] == pytest.approx(
        float(flow.final.readings["dissipated"] / (flow.final.readings["lam"] - flow["lam"][0, 0]))
        - 1,
        abs=2e-3,
    )
    assert found.aligning[0] > 0
    alpha = fs.diagnostics.alignment(fs.L2())(NET, flow.final)
    assert found.alignment[0] == pytest.approx(float(alpha), abs=5e-3)
    assert found.kinks[0] == 100
    assert found.sliding[0] == flow["tally_sliding"].max()
    tallies = flow.final.tallies
    assert found.rejected[0] == pytest.approx(
        float(tallies["rejected"] / (tallies["rejected"] + tallies["accepted"])), abs=1e-3
    )
    assert 12 < found.digits[0] < 16
    assert found.reasons == ({},)
    assert found.verdict.startswith("separated; soft margin monotone; energy balance closed to ")
    assert "of 100 kinks held" in found.verdict
    assert str(found) == found.verdict


def test_a_coarse_descent_is_called_what_it_is():
    x, y = fs.data.gaussian_separable(12, 4, margin=0.2, seed=0)
    problem = fs.Problem(fs.Linear(4), x, y, fs.exponential)
    run = fs.simulate(
        problem, fs.SignDescent(1.0, normalized=True), problem.net.init(0), until=fs.steps(100)
    )
    found = run.certificate
    assert found.energy[0] > 0.01
    assert found.fall[0] > 1e-3
    assert found.falls[0] >= 1
    assert "soft margin FALLS by" in found.verdict
    assert "energy balance OFF by" in found.verdict
    assert found.aligning[0] < 0
    assert "its integral beyond the bound by" in found.verdict


def test_digits_of_the_softmax_weights_go_as_the_level_rises():
    left = []
    for lam in (10.0, 1e4, 1e8):
        run = fs.simulate(
            FIXTURE, fs.SteepestFlow(fs.Linf()), torch.zeros(1, 3).double(), until=fs.lam([lam])
        )
        left.append(run.certificate.digits[0])
        assert left[-1] == pytest.approx(15.6 - math.log10(lam), abs=1.0)
    half = fs.simulate(NET, fs.SmallStep(fs.L2()), START.float(), until=fs.lam([3.0])).certificate
    assert 5 < half.digits[0] < 8


def test_data_that_are_not_separated_are_said_not_to_be():
    problem = fs.Problem(
        fs.Linear(2), [[1.0, 0.0], [-1.0, 0.1], [1.0, 0.1]], [1, 1, -1], fs.logistic
    )
    run = fs.simulate(
        problem, fs.SteepestFlow(fs.L2()), problem.net.init([0, 1]), until=fs.time(100.0, saves=10)
    )
    found = run.certificate
    for name in ("fall", "falls", "aligning", "alignment"):
        assert np.isnan(getattr(found, name)).all()
        assert all(name in reason for reason in found.reasons)
    assert found.reasons[0]["alignment"] == "not separated"
    assert "never came below ℓ(0)" in found.reasons[0]["fall"]
    assert found.verdict.startswith("NOT separated in 2 of 2 trajectories, least margin -")


@pytest.mark.parametrize(
    ("problem", "rule", "name", "why"),
    [
        (FIXTURE, fs.GradientDescent(0.01), "rejected", None),
        (NET, fs.SmallStep(fs.Linf()), "sliding", "does not select a gradient on kinks"),
        (
            fs.Problem(fs.Linear(2), [[1.0, 0.0]], [1.0], fs.squared),
            fs.SteepestFlow(fs.L2()),
            "margin",
            "not a classification problem",
        ),
        (
            fs.Problem(
                fs.Linear(2),
                [[1.0, 0.0]],
                [1],
                fs.exponential_tail(lambda u: u + u**3, lambda u: 1 + 3 * u**2),
            ),
            fs.SteepestFlow(fs.L2()),
            "fall",
            "no inverse",
        ),
    ],
    ids=["descent", "small steps", "regression", "no inverse"],
)
def test_a_number_that_cannot_be_had_is_nan_with_a_reason(problem, rule, name, why):
    w0 = START if problem is NET else problem.net.init(0)
    found = fs.simulate(problem, rule, w0, until=fs.steps(3)).certificate
    value = getattr(found, name)
    assert np.isnan(value).all() == (why is not None)
    assert why is None or why in found.reasons[0][name]
    assert set(found.reasons[0]) == {n for n in found.names() if np.isnan(getattr(found, n)[0])}
    assert found.verdict


def test_a_rule_without_a_norm_and_a_run_that_does_not_move():
    class Still:
        label = "still"

        def start(self, problem, w):
            return replace(fs.SmallStep(fs.L2()).start(problem, w))

        def advance(self, problem, state, until, budget):
            return state.stopped(state.running, fs.Status.STATIONARY)

    found = fs.simulate(FIXTURE, Still(), torch.ones(1, 3).double(), until=fs.steps(3)).certificate
    assert found.reasons[0]["fall"] == found.reasons[0]["alignment"] == "the rule has no norm"
    assert found.reasons[0]["energy"] == "the level did not rise"
    assert found.reasons[0]["rejected"] == "no step was tried"


def test_it_is_saved_with_the_run_and_selected_with_it(flow, tmp_path):
    back = fs.load(flow.save(tmp_path)).certificate
    for name in flow.certificate.names():
        assert np.array_equal(getattr(back, name), getattr(flow.certificate, name), equal_nan=True)
    assert back.reasons == flow.certificate.reasons
    record = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))["certificate"]
    assert record["verdict"] == flow.certificate.verdict

    problem = fs.Problem(NET.net, NET.x, NET.y, fs.exponential)
    both = fs.simulate(
        problem, fs.SmallStep(fs.L2()), NET.net.init([0, 1]), until=fs.lam(5.0, saves=5)
    )
    one = both.select(1).certificate
    assert len(one) == 1
    assert one.margin[0] == both.certificate.margin[1]
    assert one.reasons == (both.certificate.reasons[1],)


def test_a_run_that_was_saved_without_one_still_loads(flow, tmp_path):
    path = flow.save(tmp_path) / "run.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    del record["certificate"]
    path.write_text(json.dumps(record), encoding="utf-8")
    found = fs.load(tmp_path).certificate
    assert found.verdict.startswith("saved without one")
    assert all(np.isnan(getattr(found, name)).all() for name in found.names())


def test_nan_survives_the_record():
    numbers = {name: np.array([np.nan, 1.0]) for name in Certificate.names()}
    found = Certificate(**numbers, reasons=({"energy": "none"}, {}))
    record = json.loads(json.dumps(found.record()))
    back = Certificate.read(record)
    assert np.isnan(back.energy[0])
    assert back.reasons[0] == {"energy": "none"}


def test_the_certificate_changes_no_number_of_the_run():
    """Observing is reading: a run with one save and with many ends in the same place."""
    few, many = (
        fs.simulate(
            NET, fs.SteepestFlow(fs.L2(), rtol=1e-2), START, until=fs.lam(5.0, saves=n)
        ).final.w
        for n in (2, 50)
    )
    assert torch.equal(few, many)


def test_it_shows_itself_in_a_sentence_and_holds_no_array(flow):
    assert repr(flow.certificate) == f"Certificate, B = 1: {flow.certificate.verdict}"
    shown = flow.certificate._repr_html_()
    assert shown.count("<li>") == len(flow.certificate.verdict.split("; "))
    assert "array" not in shown + repr(flow.certificate)
