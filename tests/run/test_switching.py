"""One rule after another: the same as two runs by hand, trajectory by trajectory."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import flowsim as fs

B = 3
X, Y = fs.data.gaussian_separable(20, 4, margin=0.5, seed=range(B))
LEVEL = fs.Event(lambda problem, state: state.readings["lam"], -1.0, name="Λ")


def setting(activation=fs.identity, rows=slice(None)):
    net = fs.MLP([4, 8, 1], activation=activation)
    return fs.Problem(net, X[rows], Y[rows], fs.exponential), net.init(range(B), scale=0.5)[rows]


PAIRS = {
    "flow, sign": (fs.SteepestFlow(fs.L2()), fs.SignDescent(1e-2, normalized=True)),
    "Adam, flow": (fs.Adam(1e-2), fs.SteepestFlow(fs.L2())),
    "gradient, coordinate": (fs.GradientDescent(1e-2), fs.CoordinateDescent(1e-2, normalized=True)),
    "small steps, Adam": (fs.SmallStep(fs.L2()), fs.Adam(1e-2, eps=0.0)),
    "flow, small steps": (fs.SteepestFlow(fs.L2()), fs.SmallStep(fs.Linf())),
}


def simulate(problem, rule, w0, until, **options):
    return fs.simulate(problem, rule, w0, until=until, max_steps=1000, **options)


def by_hand(problem, first, then, w0, stop):
    """Two runs: up to the event, and on from its final state, each trajectory alone."""
    finals = []
    for b in range(len(w0)):
        part = problem.select(torch.tensor([b]))
        half = simulate(
            part, first, w0[b : b + 1], fs.lam(99.0), events={"now": replace(LEVEL, stop=True)}
        )
        assert half.statuses == [fs.Status.EVENT]
        finals.append(simulate(part, then, half.final, fs.lam([stop])).final)
    return finals


@pytest.mark.parametrize(
    ("pair", "activation"),
    [*((pair, fs.identity) for pair in PAIRS), ("Adam, flow", fs.relu)],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_switch_is_two_runs(pair, activation, agree):
    problem, w0 = setting(activation)
    first, then = PAIRS[pair]
    run = simulate(problem, fs.Switch(first, then, LEVEL), w0, fs.lam([0.5]))
    for b, final in enumerate(by_hand(problem, first, then, w0, 0.5)):
        agree(run.final.w[b], final.w[0])
        assert run.statuses[b] is final.statuses[0] is fs.Status.DONE
        for name, value in final.readings.items():
            agree(run.final.readings[name][b], value[0])


@pytest.mark.parametrize("pair", PAIRS)
def test_a_trajectory_alone_is_the_trajectory_in_a_batch_at_every_save(pair, agree):
    rule, until = fs.Switch(*PAIRS[pair], LEVEL), fs.lam([-2.0, -1.5, -1.0, -0.5, 0.5])
    problem, w0 = setting()
    batch = simulate(problem, rule, w0, until)
    for b in range(B):
        part, start = setting(rows=slice(b, b + 1))
        alone = simulate(part, rule, start, until)
        for name in alone.names:
            agree(alone[name][:, 0], batch[name][:, b])


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("stop", [-1.5, -0.5])
@pytest.mark.parametrize("rows", [slice(1), slice(None)], ids=["alone", "batch"])
def test_a_run_resumed_from_disk_is_the_unbroken_one(pair, stop, rows, tmp_path, agree):
    """From before the change, and from after it: alone to the last bit."""
    problem, w0 = setting(rows=rows)
    rel = 0 if len(w0) == 1 else 1e-9
    rule = fs.Switch(*PAIRS[pair], LEVEL)
    whole = simulate(problem, rule, w0, fs.lam([stop, 0.5]))
    simulate(problem, rule, w0, fs.lam([stop]), directory=tmp_path)
    rest = simulate(problem, rule, fs.load(tmp_path).final, fs.lam([0.5]))
    agree(rest.final.w, whole.final.w, rel)
    for name in ("lam", "log_time", "arclength", "steps"):
        agree(rest[name][-1], whole[name][-1], rel)


def test_saves_inside_the_step_that_changes_are_those_of_the_first_rule(agree):
    problem, w0 = setting()
    flow = fs.SteepestFlow(fs.L2(), rtol=1e-3)
    until = fs.lam(list(np.linspace(-2, -0.9, 30)))
    run = simulate(
        problem, fs.Switch(flow, fs.SignDescent(1e-2, normalized=True), LEVEL), w0, until
    )
    plain = simulate(problem, flow, w0, until)
    before = np.linspace(-2, -0.9, 30) < -1.0
    agree(run.weights[1:][before], plain.weights[1:][before], rel=1e-9)


def test_gradient_descent_up_to_accuracy_one_then_coordinate_descent():
    x, y = fs.data.gaussian_separable(30, 6, margin=0.3, seed=range(2))
    problem = fs.Problem(fs.Linear(6), x, y, fs.logistic)
    w0 = -2 * problem.net.init(range(2))
    separated = fs.Event(fs.diagnostics.accuracy, 1.0)
    rule = fs.Switch(
        fs.GradientDescent(0.05), fs.CoordinateDescent(0.02, normalized=True), separated
    )
    run = fs.simulate(
        problem,
        rule,
        w0,
        until=fs.steps(range(1, 200)),
        observe={"accuracy": fs.diagnostics.accuracy},
    )
    moved = (np.diff(run.weights, axis=0) != 0).sum(-1)
    for b in range(2):
        change = int(np.argmax(run["accuracy"][:, b] >= 1))
        assert 0 < change < 150
        assert (moved[:change, b] == 6).all()
        assert (moved[change:, b] == 1).all()


def test_an_event_that_is_true_at_the_start_leaves_nothing_for_the_first_rule(agree):
    problem, w0 = setting()
    at = replace(LEVEL, level=-100.0)
    rule = fs.Switch(fs.GradientDescent(1e-2), fs.SignDescent(1e-2, normalized=True), at)
    run = simulate(problem, rule, w0, fs.steps([20]))
    plain = simulate(problem, fs.SignDescent(1e-2, normalized=True), w0, fs.steps([20]))
    agree(run.final.w, plain.final.w)


def test_switches_nest(agree):
    problem, w0 = setting()
    a, b, c = (
        fs.GradientDescent(1e-2),
        fs.SteepestFlow(fs.L2()),
        fs.SignDescent(1e-2, normalized=True),
    )
    early, late = replace(LEVEL, level=-2.0), replace(LEVEL, level=0.0)
    left = simulate(problem, fs.Switch(fs.Switch(a, b, early), c, late), w0, fs.lam([1.0])).final
    right = simulate(problem, fs.Switch(a, fs.Switch(b, c, late), early), w0, fs.lam([1.0])).final
    agree(left.w, right.w)
    assert left.statuses == [fs.Status.DONE] * B


def test_a_falling_event_switches():
    problem, w0 = setting()
    at = fs.Event(lambda problem, state: -state.readings["lam"], 1.0, falling=True)
    rules = fs.Adam(1e-2), fs.SignDescent(1e-2, normalized=True)
    one, other = (
        simulate(problem, fs.Switch(*rules, event), w0, fs.lam([0.0])).final.w
        for event in (at, LEVEL)
    )
    assert torch.equal(one, other)


def test_what_the_second_rule_refuses_is_said_at_the_start():
    problem, w0 = setting(fs.relu)
    flow = fs.SteepestFlow(fs.L2(), method=fs.DOPRI5)
    with pytest.raises(ValueError, match="kinks"):
        simulate(problem, fs.Switch(fs.GradientDescent(1e-3), flow, LEVEL), w0, fs.steps([1]))


def test_a_trajectory_that_stops_before_the_event_stays():
    problem, w0 = setting()
    w0[1] = 0.0
    run = simulate(
        problem, fs.Switch(fs.GradientDescent(1e-2), fs.Adam(1e-2), LEVEL), w0, fs.lam([0.0])
    )
    assert run.statuses == [fs.Status.DONE, fs.Status.STATIONARY, fs.Status.DONE]


@pytest.mark.parametrize("rule", [fs.GradientDescent, None, "gd"])
def test_rules_must_be_rules(rule):
    for rules in ((rule, fs.Adam()), (fs.Adam(), rule)):
        with pytest.raises(TypeError, match="Switch: got .*expected a rule"):
            fs.Switch(*rules, LEVEL)


@pytest.mark.parametrize("at", [1.0, None, fs.lam(3)])
def test_the_event_must_be_one(at):
    with pytest.raises(TypeError, match="Switch: got at=.*expected an event"):
        fs.Switch(fs.Adam(), fs.Adam(), at)


def test_the_measure_must_have_one_number_for_each_trajectory():
    problem, w0 = setting()
    rule = fs.Switch(fs.Adam(), fs.Adam(), fs.Event(lambda problem, state: state.w, 1.0))
    with pytest.raises(
        ValueError, match=r"Switch: its measure returned .*expected a tensor of shape \(3,\)"
    ):
        simulate(problem, rule, w0, fs.steps([1]))
