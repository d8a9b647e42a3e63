"""The loop, tested with stub rules whose readings advance by known amounts, and its contracts with
real ones."""

import io
from contextlib import redirect_stderr
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

import flowsim as fs
from flowsim.motion.rule import advance_by_steps
from flowsim.motion.segment import Segment
from flowsim.motion.state import initial_state
from flowsim.run import simulation
from flowsim.run.trajectory import load_state

P = 3
OBJECTIVE = fs.Quadratic(torch.eye(P, dtype=torch.float64), torch.ones(P, dtype=torch.float64))


def same(a, b):
    """Whether two states are equal to the last bit."""
    a, b = a.tensors(), b.tensors()
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name].nan_to_num(nan=-7.25), b[name].nan_to_num(nan=-7.25)), name
    return True


def start(B=2):
    return torch.zeros(B, P, dtype=torch.float64)


def row(*values):
    return torch.tensor(values, dtype=torch.float64)


@dataclass
class Stub:
    """Each step adds ``speed (B,)`` to Λ and arclength, and to every weight. ``stop`` maps a
    trajectory to the step at which it stops and with what status; ``interrupt`` is the call of
    `advance` in which Ctrl-C arrives."""

    speed: torch.Tensor
    stop: dict = field(default_factory=dict)
    interrupt: int | None = None
    dense: bool = False
    counts: bool = True
    calls: int = 0
    label: str = "stub"

    def start(self, problem, w_or_state):
        state = initial_state(problem, w_or_state)
        if not state.memory:
            state = replace(state, memory={"row": torch.arange(len(state.w))})
        return replace(state, segment=self.straight(state, state) if self.dense else None)

    def advance(self, problem, state, until, budget):
        self.calls += 1
        if self.calls == self.interrupt:
            raise KeyboardInterrupt
        return advance_by_steps(
            lambda problem, local: self.step(local), problem, state, until, budget
        )

    def step(self, state):
        speed = self.speed[state.memory["row"]]
        moved = {name: state.readings[name] + speed for name in ("lam", "arclength")}
        readings = state.readings | moved | {"steps": state.readings["steps"] + float(self.counts)}
        tallies = state.tallies | {"accepted": state.tallies["accepted"] + float(self.counts)}
        new = replace(state, w=state.w + speed[:, None], readings=readings, tallies=tallies)
        if self.dense:
            new = replace(new, segment=self.straight(state, new))
        for trajectory, (at, status) in self.stop.items():
            new = new.stopped(
                (state.memory["row"] == trajectory) & (new.readings["steps"] >= at), status
            )
        return new

    @staticmethod
    def straight(a, b):
        move, rise, zero = (
            b.w - a.w,
            b.readings["lam"] - a.readings["lam"],
            torch.zeros(len(a.w)).double(),
        )
        return Segment(a.w, b.w, move, move, a.readings, b.readings, rise, rise, zero, zero)


def run(rule, until, B=2, **options):
    return fs.simulate(OBJECTIVE, rule, start(B), until=until, **options)


# Save points


def test_discrete_rules_are_saved_at_the_first_iterate_that_has_reached_the_save_point():
    r = run(Stub(row(1.0, 0.75)), fs.arclength([1.0, 2.5, 4.0]))
    assert r["arclength"].T.tolist() == [[0, 1, 3, 4], [0, 1.5, 3.0, 4.5]]
    assert r["steps"].T.tolist() == [[0, 1, 3, 4], [0, 2, 4, 6]]
    assert np.array_equal(r.weights[:, :, 0], r["arclength"])
    assert r.statuses == [fs.Status.DONE] * 2


def test_dense_rules_are_saved_at_exactly_the_save_points():
    r = run(Stub(row(1.0, 0.4), dense=True), fs.arclength([1.0, 2.5, 4.0]))
    assert r["arclength"] == pytest.approx(np.array([[0, 1, 2.5, 4]] * 2).T, abs=1e-12)
    assert r.weights[:, :, 0] == pytest.approx(r["arclength"], abs=1e-12)


def test_the_level_at_a_save_is_that_of_the_weights_which_are_saved():
    r = run(Stub(row(0.7, 0.3), dense=True), fs.arclength([1.0, 2.5]))
    for weights, lam in zip(r.weights[1:], r["lam"][1:], strict=True):
        assert np.array_equal(lam, OBJECTIVE.lam(torch.from_numpy(weights)).numpy())


def test_saves_in_level_are_off_the_save_points_by_the_error_of_the_dense_output():
    x, y = fs.data.gaussian_separable(12, 4, margin=0.5, seed=0)
    net = fs.MLP([4, 6, 1], activation=fs.squared_relu)
    problem, points, errors = fs.Problem(net, x, y, fs.logistic), [-1.5, -1.0, -0.5], []
    for rtol in (1e-3, 1e-6):
        rule = fs.SteepestFlow(fs.L2(), rtol=rtol, method=fs.DOPRI5)
        r = fs.simulate(problem, rule, net.init([0]), until=fs.lam(points))
        lam = problem.lam(torch.from_numpy(r.weights[1:, 0])).numpy()
        assert r["lam"][1:, 0] == pytest.approx(lam, rel=1e-14)
        errors.append(np.abs(lam - points).max())
    assert errors[0] < 1e-2
    assert errors[1] < 0.05 * errors[0]


@pytest.mark.parametrize("dense", [False, True])
def test_several_saves_fall_inside_one_step(dense):
    r = run(Stub(row(10.0, 3.0), dense=dense), fs.arclength([1.0, 2.0, 3.0, 4.0]))
    if dense:
        assert r["arclength"] == pytest.approx(np.array([[0, 1, 2, 3, 4]] * 2).T, abs=1e-12)
    else:
        assert r["arclength"].T.tolist() == [[0, 10, 10, 10, 10], [0, 3, 3, 3, 6]]
    assert r.final.readings["steps"].tolist() == [1.0, 2.0]


def test_the_first_save_is_the_start():
    w0 = torch.randn(2, P, dtype=torch.float64)
    r = fs.simulate(OBJECTIVE, Stub(row(1.0, 1.0)), w0, until=fs.arclength(3.0, saves=4))
    assert np.array_equal(r.weights[0], w0.numpy())
    assert (r["steps"][0] == 0).all()
    assert (r["log_time"][0] == -np.inf).all()


def test_steps_clock_takes_exactly_that_many_steps():
    r = run(Stub(row(1.0, 0.1)), fs.steps([3, 700]))
    assert r["steps"].T.tolist() == [[0, 3, 700]] * 2
    assert r.statuses == [fs.Status.DONE] * 2


def test_a_trajectory_that_is_already_there_is_done_without_a_step():
    state = replace(initial_state(OBJECTIVE, start(1)), memory={"row": torch.tensor([0])})
    state = replace(state, readings=state.readings | {"arclength": row(9.0)})
    r = fs.simulate(OBJECTIVE, Stub(row(1.0)), state, until=fs.arclength(5.0))
    assert (r.statuses, r.final.readings["steps"].item()) == ([fs.Status.DONE], 0.0)


@pytest.mark.parametrize("dense", [False, True])
def test_natural_steps_do_not_depend_on_the_save_points(dense):
    finals = [
        run(Stub(row(0.3, 0.7), dense=dense), fs.arclength(50.0, saves=n)).final
        for n in (2, 5, 200)
    ]
    assert same(finals[0], finals[1])
    assert same(finals[0], finals[2])


def test_every_schedule_value_is_saved_once_and_nothing_is_left_unset():
    r = run(Stub(row(0.3, 0.7)), fs.arclength(50.0, saves=321))
    assert r["arclength"].shape == (321, 2)
    assert all(np.isfinite(r[name]).all() for name in r.names if name != "log_time")


# Statuses and caps


@pytest.mark.parametrize(
    "status",
    [s for s in fs.Status if s not in (fs.Status.RUNNING, fs.Status.DONE)],
    ids=lambda s: s.name,
)
def test_a_stopped_trajectory_leaves_nan_and_the_others_go_on(status):
    rule = Stub(row(1.0, 1.0, 1.0), stop={1: (3, status)})
    r = run(rule, fs.arclength(10.0, saves=11), B=3)
    assert r.statuses == [fs.Status.DONE, status, fs.Status.DONE]
    assert np.isfinite(r["arclength"][:4, 1]).all()
    for name in r.names:
        assert np.isnan(r[name][4:, 1]).all(), name
    assert np.isnan(r.weights[4:, 1]).all()
    assert r["arclength"][:, [0, 2]].T.tolist() == [list(range(11))] * 2
    assert r.final.readings["arclength"].tolist() == [10.0, 3.0, 10.0]


def test_a_trajectory_that_stops_in_its_last_step_is_still_saved_there():
    r = run(Stub(row(1.0, 1.0), stop={0: (2, fs.Status.STATIONARY)}), fs.arclength([1.0, 2.0]))
    assert r["arclength"][:, 0].tolist() == [0, 1, 2]
    assert r.statuses[0] is fs.Status.STATIONARY


@pytest.mark.parametrize("max_steps", [1, 2, 255, 256, 257, 600])
def test_max_steps_is_exact_for_each_trajectory(max_steps):
    r = run(Stub(row(1e-3, 1.0)), fs.arclength(5.0, saves=7), max_steps=max_steps)
    assert r.statuses[0] is fs.Status.MAX_STEPS
    assert r.final.readings["steps"].tolist() == [max_steps, min(5, max_steps)]
    assert r.statuses[1] is (fs.Status.DONE if max_steps >= 5 else fs.Status.MAX_STEPS)


def test_max_steps_counts_from_where_this_run_starts():
    rule = Stub(row(1e-3, 1e-3))
    first = run(rule, fs.arclength(5.0), max_steps=10)
    second = fs.simulate(OBJECTIVE, rule, first.final, until=fs.arclength(5.0), max_steps=7)
    assert second.final.readings["steps"].tolist() == [17.0, 17.0]


@pytest.mark.parametrize("counts", [True, False])
def test_a_rule_that_never_advances_its_reading_is_stopped_by_the_cap(counts):
    r = run(Stub(row(0.0, 0.0), counts=counts), fs.arclength(5.0), max_steps=300)
    assert r.statuses == [fs.Status.MAX_STEPS] * 2


def test_a_rule_that_does_nothing_at_all_is_stopped_by_the_cap():
    class Idle(Stub):
        def advance(self, problem, state, until, budget):
            return state

    assert (
        run(Idle(row(1.0, 1.0)), fs.arclength(5.0), max_steps=50).statuses
        == [fs.Status.MAX_STEPS] * 2
    )


def test_readings_that_become_nan_are_stopped_by_the_cap():
    r = run(Stub(row(torch.nan, 1.0)), fs.arclength(5.0), max_steps=50)
    assert r.statuses == [fs.Status.MAX_STEPS, fs.Status.DONE]


# Ctrl-C and strict


@pytest.mark.parametrize("call", [1, 3])
def test_ctrl_c_returns_what_there_is(call):
    r = run(Stub(row(1.0, 9.0), interrupt=call), fs.arclength(10.0, saves=6))
    assert r.statuses[0] is fs.Status.INTERRUPTED
    assert np.isfinite(r["arclength"][:call, 0]).all()
    assert np.isnan(r["arclength"][call:, 0]).all()
    if call == 3:
        assert r.statuses[1] is fs.Status.DONE


def test_an_interrupted_run_goes_on_to_the_same_end():
    rule, until = Stub(row(0.3, 0.7), interrupt=3), fs.arclength(10.0, saves=6)
    resumed = fs.simulate(OBJECTIVE, rule, run(rule, until).final, until=until).final
    whole = run(Stub(row(0.3, 0.7)), until).final
    assert same(resumed, whole)


def test_strict_names_trajectories_and_reasons_and_carries_the_trajectory():
    rule = Stub(
        row(1.0, 1.0, 1.0), stop={0: (2, fs.Status.NONFINITE), 2: (3, fs.Status.STATIONARY)}
    )
    with pytest.raises(fs.SimulationError) as caught:
        run(rule, fs.arclength(5.0, saves=6), B=3, strict=True)
    message, partial = str(caught.value), caught.value.trajectory
    assert f"trajectory 0: {fs.Status.NONFINITE.sentence}" in message
    assert f"trajectory 2: {fs.Status.STATIONARY.sentence}" in message
    assert "trajectory 1" not in message
    assert partial["arclength"][:, 1].tolist() == [0, 1, 2, 3, 4, 5]
    assert np.isnan(partial["arclength"][3:, 0]).all()


def test_strict_is_silent_where_all_are_done():
    assert run(Stub(row(1.0, 1.0)), fs.arclength(3.0), strict=True).statuses == [fs.Status.DONE] * 2


# Observers


def test_observers_are_measured_at_the_save_points():
    seen = {
        "double": lambda problem, state: 2 * state.w,
        "size": lambda problem, state: state.w.norm(dim=1),
    }
    r = run(Stub(row(1.0, 0.5), dense=True), fs.arclength([0.75, 2.0]), observe=seen)
    assert r["double"].shape == (3, 2, P)
    assert np.array_equal(r["double"], 2 * r.weights)
    assert r["size"] == pytest.approx(np.linalg.norm(r.weights, axis=2))


@pytest.mark.parametrize(
    "observer",
    [
        lambda p, s: s.w.sum(),
        lambda p, s: s.w[:1, 0],
        lambda p, s: s.w.T,
        lambda p, s: 1.0,
        lambda p, s: None,
    ],
    ids=["scalar", "one row", "transposed", "float", "nothing"],
)
def test_observers_without_a_trajectory_axis_are_refused_by_name(observer):
    with pytest.raises(ValueError, match=r"observer 'mine' returned .*expected"):
        run(Stub(row(1.0, 0.5)), fs.arclength(2.0), observe={"mine": observer})


@pytest.mark.parametrize("observe", [[1], {"a": 3}, "lam", {"a"}])
def test_observe_must_map_names_to_functions(observe):
    with pytest.raises(TypeError, match="got observe"):
        run(Stub(row(1.0, 0.5)), fs.arclength(2.0), observe=observe)


@pytest.mark.parametrize("name", ["lam", "weights", "save", "trajectory", "tally_gradients"])
def test_observers_may_not_take_the_names_of_what_a_trajectory_has(name):
    with pytest.raises(ValueError, match=f"got an observer named '{name}'"):
        run(Stub(row(1.0, 0.5)), fs.arclength(2.0), observe={name: lambda p, s: s.w[:, 0]})


def test_observers_do_not_record_gradients():
    seen = {}

    def look(problem, state):
        seen["enabled"] = torch.is_grad_enabled()
        return state.w[:, 0]

    run(Stub(row(1.0, 1.0)), fs.arclength(1.0), observe={"look": look})
    assert seen == {"enabled": False}


# Options


@pytest.mark.parametrize("until", [100, 5.0, None, "lam"])
def test_until_must_be_a_schedule(until):
    with pytest.raises(TypeError, match="got until=.*try until=flowsim.lam"):
        run(Stub(row(1.0, 1.0)), until)


@pytest.mark.parametrize("max_steps", [0, -1, 2.5, "9", None, True])
def test_max_steps_must_be_a_positive_integer(max_steps):
    with pytest.raises(ValueError, match="got max_steps=.*expected an integer"):
        run(Stub(row(1.0, 1.0)), fs.arclength(1.0), max_steps=max_steps)


def test_weights_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="weights: got"):
        fs.simulate(
            OBJECTIVE,
            Stub(row(1.0)),
            torch.zeros(1, P + 1, dtype=torch.float64),
            until=fs.arclength(1.0),
        )


def test_the_progress_bar_changes_nothing():
    shown = io.StringIO()
    with redirect_stderr(shown):
        loud = run(Stub(row(0.3, 0.7)), fs.arclength(9.0, saves=20), progress=True)
    quiet = run(Stub(row(0.3, 0.7)), fs.arclength(9.0, saves=20))
    assert "stub" in shown.getvalue()
    assert all(np.array_equal(loud[name], quiet[name], equal_nan=True) for name in quiet.names)
    assert torch.equal(loud.final.w, quiet.final.w)


def test_weights_are_kept_only_while_they_are_few(monkeypatch):
    monkeypatch.setattr(simulation, "_WEIGHTS_LIMIT", 6 * 2 * P)
    assert run(Stub(row(1.0, 1.0)), fs.arclength(5.0, saves=6)).weights is not None
    assert run(Stub(row(1.0, 1.0)), fs.arclength(5.0, saves=7)).weights is None


def test_the_input_weights_are_not_changed():
    w0 = start()
    fs.simulate(OBJECTIVE, fs.GradientDescent(0.1), w0, until=fs.steps(5))
    assert (w0 == 0).all()


# Checkpoints


def test_checkpoints_are_written_while_the_run_goes_on(tmp_path):
    class Killed(Stub):
        def advance(self, problem, state, until, budget):
            if self.calls == 3:
                raise RuntimeError("killed")
            return super().advance(problem, state, until, budget)

    rule = Killed(row(1.0, 1.0))
    with pytest.raises(RuntimeError, match="killed"):
        run(rule, fs.arclength(10.0, saves=11), directory=tmp_path, checkpoint_seconds=0.0)
    found = load_state(tmp_path)
    assert found.readings["arclength"].tolist() == [3.0, 3.0]
    resumed = fs.simulate(OBJECTIVE, Stub(row(1.0, 1.0)), found, until=fs.arclength(10.0))
    assert resumed.final.readings["steps"].tolist() == [10.0, 10.0]


def test_rare_checkpoints_are_not_written(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(simulation, "save_state", lambda state, path: written.append(path))
    run(Stub(row(1.0, 1.0)), fs.arclength(9.0), directory=tmp_path, checkpoint_seconds=3600.0)
    assert written == []


def test_a_directory_gets_the_trajectory_at_the_end(tmp_path):
    r = run(Stub(row(1.0, 1.0)), fs.arclength(9.0, saves=4), directory=tmp_path / "new" / "run")
    found = fs.load(tmp_path / "new" / "run")
    assert np.array_equal(found["arclength"], r["arclength"])


def test_a_strict_failure_leaves_its_trajectory_in_the_directory(tmp_path):
    rule = Stub(row(1.0, 1.0), stop={0: (2, fs.Status.NONFINITE)})
    with pytest.raises(fs.SimulationError):
        run(rule, fs.arclength(9.0), directory=tmp_path, strict=True)
    assert fs.load(tmp_path).statuses == [fs.Status.NONFINITE, fs.Status.DONE]


# A trajectory's path depends on its batch-mates by rounding only, and on its save points not at all


SEEDS = (0, 1, 2)


def demo(seeds, activation, widths=(64, 128, 1)):
    x, y = fs.data.digits(n=100, seed=seeds)
    net = fs.MLP(list(widths), activation=activation)
    return fs.Problem(net, x, y, fs.exponential), net.init(seeds, scale=0.5)


DEMO_RULES = {
    "l2 small steps": (fs.SmallStep(fs.L2(), dlam=0.2), fs.relu),
    "linf small steps": (fs.SmallStep(fs.Linf(), dlam=0.2), fs.relu),
    "l1 small steps": (fs.SmallStep(fs.L1(), dlam=0.2), fs.relu),
    "l2 flow": (fs.SteepestFlow(fs.L2(), rtol=1e-4), fs.squared_relu),
    "l3 flow": (fs.SteepestFlow(fs.Lp(3.0), rtol=1e-3, method=fs.BOSH3), fs.squared_relu),
    "sign descent": (fs.SignDescent(1e-4, normalized=True), fs.relu),
    "gradient descent": (fs.GradientDescent(1e-3), fs.relu),
}


@pytest.mark.parametrize("name", DEMO_RULES)
def test_a_trajectory_alone_is_the_trajectory_in_a_batch(name, agree):
    rule, activation = DEMO_RULES[name]
    until = fs.steps([4, 12] if "flow" in name else [10, 60])
    batch = fs.simulate(*_first(demo(SEEDS, activation), rule), until=until)
    for b, seed in enumerate(SEEDS):
        alone = fs.simulate(*_first(demo((seed,), activation), rule), until=until)
        agree(alone.final.w[0], batch.final.w[b])
        assert alone.statuses[0] is batch.statuses[b]
        for value in alone.names:
            agree(alone[value][:, 0], batch[value][:, b])


def _first(setting, rule):
    problem, w0 = setting
    return problem, rule, w0


@pytest.mark.parametrize(
    "rule",
    [
        fs.SteepestFlow(fs.L2(), rtol=1e-4),
        fs.SmallStep(fs.L2()),
        fs.SmallStep(fs.Linf()),
        fs.SmallStep(fs.L1()),
    ],
    ids=lambda rule: rule.label,
)
@pytest.mark.parametrize(
    ("n", "widths"), [(12, (4, 6, 1)), (11, (3, 7, 5, 1)), (1, (2, 1, 1)), (30, (5, 1))]
)
def test_batch_mates_change_rounding_only_at_odd_shapes_too(rule, n, widths, agree):
    seeds = range(9)
    x, y = fs.data.gaussian_separable(n, widths[0], seed=seeds)
    net = fs.MLP(list(widths), activation=fs.squared_relu)
    w0, until = net.init(seeds), fs.steps([20])
    batch = fs.simulate(fs.Problem(net, x, y, fs.logistic), rule, w0, until=until)
    for rows in ([0], [3, 8], [7, 1, 2, 4, 5]):
        part = fs.simulate(
            fs.Problem(net, x[rows], y[rows], fs.logistic), rule, w0[rows], until=until
        )
        agree(part.final, batch.final.select(torch.tensor(rows)))


def test_trajectories_that_leave_the_batch_at_different_steps_do_not_disturb_the_others(agree):
    problem, w0 = demo(SEEDS, fs.relu)
    until, rule = fs.lam([-3.0, 0.0]), fs.SmallStep(fs.Linf(), dlam=0.2)
    batch = fs.simulate(problem, rule, w0, until=until)
    assert len(set(batch.final.readings["steps"].tolist())) > 1
    for b, seed in enumerate(SEEDS):
        alone = fs.simulate(*_first(demo((seed,), fs.relu), rule), until=until)
        agree(alone.final.w[0], batch.final.w[b])


@pytest.mark.parametrize(
    ("rule", "activation"),
    [
        (fs.SmallStep(fs.Linf(), dlam=0.1), fs.relu),
        (fs.SteepestFlow(fs.L2(), rtol=1e-4), fs.squared_relu),
        (fs.GradientDescent(1e-3), fs.relu),
    ],
    ids=["small steps", "flow", "descent"],
)
def test_a_trajectory_that_fails_does_not_change_the_others(rule, activation, agree):
    x, y = fs.data.gaussian_separable(20, 5, seed=SEEDS)
    net = fs.MLP([5, 8, 1], activation=activation)
    w0 = net.init(SEEDS)
    w0[1] *= 1e160  # outputs overflow at once
    until = fs.steps([5, 40])
    r = fs.simulate(fs.Problem(net, x, y, fs.exponential), rule, w0, until=until)
    assert r.statuses == [fs.Status.DONE, fs.Status.NONFINITE, fs.Status.DONE]
    assert torch.equal(r.final.w[1], w0[1])
    kept = [0, 2]
    pair = fs.simulate(
        fs.Problem(net, x[kept], y[kept], fs.exponential), rule, w0[kept], until=until
    )
    agree(pair.final.w, r.final.w[kept])


@pytest.mark.parametrize(
    ("rule", "activation"),
    [
        (fs.SmallStep(fs.L1()), fs.relu),
        (fs.SteepestFlow(fs.L2()), fs.squared_relu),
        (fs.SignDescent(1e-3), fs.relu),
    ],
    ids=["small steps", "flow", "descent"],
)
def test_the_final_state_does_not_depend_on_the_number_of_saves(rule, activation, agree):
    x, y = fs.data.gaussian_separable(12, 4, margin=0.5, seed=0)
    net = fs.MLP([4, 6, 1], activation=activation)
    problem = fs.Problem(net, x, y, fs.logistic)
    for seeds in ([0], [0, 1]):
        few, many = (
            fs.simulate(problem, rule, net.init(seeds), until=fs.lam(0.0, saves=n), max_steps=400)
            for n in (5, 50)
        )
        assert few.statuses == many.statuses
        if len(seeds) == 1:
            assert same(few.final, many.final)
        agree(few.final, many.final, rel=1e-7)


@pytest.mark.parametrize(
    ("problem", "rule", "message"),
    [
        (fs.Linear(2), fs.GradientDescent(0.1), "got problem=.*expected a problem, try"),
        (None, "gd", "got rule='gd', expected a rule, try"),
        (None, fs.L2(), "got rule=.*expected a rule, try"),
        (None, fs.GradientDescent, "got rule=.*expected a rule, try"),
    ],
)
def test_what_is_no_problem_and_no_rule_is_refused_at_once(problem, rule, message):
    data = torch.eye(2, dtype=torch.float64), torch.ones(2)
    problem = problem or fs.Problem(fs.Linear(2), *data, loss=fs.exponential)
    w0 = torch.zeros(1, 2, dtype=torch.float64)
    with pytest.raises(TypeError, match=message):
        fs.simulate(problem, rule, w0, until=fs.lam(1.0))
