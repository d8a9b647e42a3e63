"""Events: found where closed forms have them, on every kind of rule, without touching the path."""

import math
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch

import flowsim as fs
from flowsim.motion.rule import advance_by_steps
from flowsim.motion.segment import Segment
from flowsim.motion.state import READINGS, initial_state
from flowsim.run.events import Event
from flowsim.run.trajectory import load_state

# Λ = w₁ and w₂ stays, so that the margin is w₁/√(w₁² + w₂²), arclength is the rise of Λ and t = e^Λ
# − e^Λ₀
LINE = fs.Problem(fs.Linear(2), torch.tensor([[1.0, 0.0]]), [1], fs.exponential)
STARTS = torch.tensor([[-1.5, 2.0], [-0.25, 0.5], [0.75, 3.0]], dtype=torch.float64)
FLOW = fs.SteepestFlow(fs.L2())
MARGIN = fs.diagnostics.margin(fs.L2())


def level(problem, state):
    return state.readings["lam"]


def line(events, rule=FLOW, until=None, w0=STARTS, **options):
    return fs.simulate(
        LINE, rule, w0, until=until or fs.lam(20.0, saves=5), events=events, **options
    )


def crossing(margin):
    """Λ at which the margin of each start has this value."""
    return STARTS[:, 1].numpy() * margin / math.sqrt(1 - margin**2)


# Where events are


@pytest.mark.parametrize(
    "rule", [FLOW, fs.SmallStep(fs.L2(), dlam=0.3)], ids=["flow", "small steps"]
)
def test_a_margin_level_is_located_in_every_reading(rule):
    found = line({"margin": Event(MARGIN, 0.6)}, rule).events["margin"]
    lam = crossing(0.6)
    start = STARTS[:, 0].numpy()
    assert set(found) == {*READINGS, "value"}
    assert found["lam"] == pytest.approx(lam, abs=1e-11)
    assert found["value"] == pytest.approx(0.6, abs=1e-11)
    assert found["arclength"] == pytest.approx(lam - start, abs=1e-11)
    assert found["dissipated"] == pytest.approx(lam - start, abs=1e-11)
    assert np.exp(found["log_time"]) == pytest.approx(np.exp(lam) - np.exp(start), rel=1e-6)
    assert (found["value"] >= 0.6).all()


def test_a_falling_event():
    share = Event(lambda problem, state: state.w[:, 1] / state.w.norm(dim=1), 0.6, falling=True)
    found = line({"share": share}).events["share"]
    assert found["lam"][:2] == pytest.approx(crossing(0.8)[:2], abs=1e-11)
    assert (found["value"] <= 0.6).all()


def test_an_event_at_a_jump_is_where_it_jumps():
    found = line({"separated": Event(fs.diagnostics.accuracy, 1.0)}).events["separated"]
    assert found["lam"][:2] == pytest.approx(0.0, abs=1e-11)
    assert (found["lam"][:2] > 0).all()
    assert found["value"].tolist() == [1.0, 1.0, 1.0]


def test_an_event_that_is_true_at_the_start_is_at_the_start():
    found = line({"separated": Event(fs.diagnostics.accuracy, 1.0)}).events["separated"]
    at_start = {"steps": 0.0, "lam": 0.75, "log_time": -math.inf, "arclength": 0.0, "relative": 0.0}
    assert {name: found[name][2] for name in at_start} == at_start


def test_an_event_that_never_happens_is_nan_everywhere():
    found = line({"never": Event(MARGIN, 1.5)}).events["never"]
    assert all(np.isnan(value).all() for value in found.values())


def test_a_measure_that_is_no_number_has_not_reached_the_level():
    w0 = torch.zeros(1, 2, dtype=torch.float64)  # its margin is 0/0
    found = line({"margin": Event(MARGIN, 0.5)}, w0=w0).events["margin"]
    assert 0 < found["lam"].item() < 1e-11


def test_readings_and_tallies_may_be_measured():
    events = {
        "level": Event(level, 3.0),
        "second": Event(lambda p, s: s.readings["steps"], 2),
        "late": Event(lambda p, s: s.readings["log_time"], 10.0),
        "work": Event(lambda p, s: s.tallies["accepted"], 2),
    }
    run = line(events, fs.SmallStep(fs.L2(), dlam=0.3))
    assert run.events["level"]["lam"] == pytest.approx(3.0, abs=1e-11)
    assert run.events["second"]["arclength"] == pytest.approx(0.6, abs=1e-11)
    assert run.events["late"]["log_time"] == pytest.approx(10.0, abs=1e-11)
    assert run.events["work"]["steps"].tolist() == [2.0] * 3  # tallies count whole steps


def test_several_events_in_one_step_are_each_located():
    rule = fs.SmallStep(fs.L2(), dlam=1000.0)
    events = {f"{q}": Event(level, q) for q in (2.0, 7.0, 400.0)}
    run = line(events, rule, fs.lam(900.0, saves=2))
    assert run.final.readings["steps"].tolist() == [1.0] * 3
    for name, found in run.events.items():
        assert found["lam"] == pytest.approx(float(name), abs=1e-9)
        assert ((found["steps"] > 0) & (found["steps"] < 1)).all()


def test_an_event_between_the_last_save_and_the_end_of_its_step_counts():
    rule = fs.SmallStep(fs.L2(), dlam=1000.0)
    found = line({"late": Event(level, 500.0)}, rule, fs.lam(10.0)).events["late"]
    assert found["lam"] == pytest.approx(500.0, abs=1e-9)


def test_rules_without_dense_output_have_events_at_the_first_iterate():
    rule = fs.GradientDescent(0.4, normalized=True)
    run = line({"level": Event(level, 1.0)}, rule, fs.steps(20))
    steps = np.ceil((1.0 - STARTS[:, 0].numpy()) / 0.4)
    assert run.events["level"]["steps"].tolist() == steps.tolist()
    assert run.events["level"]["lam"] == pytest.approx(
        STARTS[:, 0].numpy() + 0.4 * steps, abs=1e-12
    )


def test_an_event_is_read_as_a_save_at_the_same_place_would_be():
    x, y = fs.data.gaussian_separable(12, 4, margin=0.5, seed=0)
    net = fs.MLP([4, 6, 1], activation=fs.squared_relu)
    problem, w0 = fs.Problem(net, x, y, fs.logistic), net.init([0, 1])
    travelled = Event(lambda p, s: s.readings["arclength"], 0.7)
    run = fs.simulate(
        problem,
        FLOW,
        w0,
        until=fs.arclength([0.7, 1.5]),
        events={"far": travelled},
        observe={"margin": MARGIN},
    )
    for name in READINGS:
        assert run.events["far"][name] == pytest.approx(run[name][1], abs=1e-9), name


# The path


def rules():
    kinked = fs.MLP([4, 6, 1], activation=fs.relu)
    smooth = fs.MLP([4, 6, 1], activation=fs.squared_relu)
    return {
        "flow": (FLOW, smooth),
        "flow on kinks": (fs.SteepestFlow(fs.L2(), rtol=1e-3), kinked),
        "small steps": (fs.SmallStep(fs.Linf()), kinked),
        "descent": (fs.GradientDescent(0.01, normalized=True), kinked),
    }


def setting(name, seeds):
    x, y = fs.data.gaussian_separable(6, 4, margin=0.5, seed=seeds)
    rule, net = rules()[name]
    return fs.Problem(net, x, y, fs.exponential), rule, net.init(seeds)


ALONE_AND_NOT = pytest.mark.parametrize("seeds", [[0], range(2)], ids=["alone", "batch"])


@ALONE_AND_NOT
@pytest.mark.parametrize("name", rules())
def test_events_change_no_number_of_a_run(name, seeds, agree):
    """Alone no bit; in a batch by rounding, since each step is a call of its own."""
    problem, rule, w0 = setting(name, seeds)
    rel = 0 if len(seeds) == 1 else 1e-9
    events = {"separated": Event(fs.diagnostics.accuracy, 1.0), "margin": Event(MARGIN, 0.05)}
    until = fs.lam([-1.0, 0.0, 1.0])
    with_events = fs.simulate(problem, rule, w0, until=until, events=events, max_steps=2000)
    without = fs.simulate(problem, rule, w0, until=until, max_steps=2000)
    agree(with_events.final, without.final, rel)
    for value in without.names:
        agree(with_events[value], without[value], rel)
    assert without.events == {}


@ALONE_AND_NOT
@pytest.mark.parametrize("name", rules())
def test_a_run_goes_on_from_an_event_to_the_same_end(name, seeds, agree):
    problem, rule, w0 = setting(name, seeds)
    until = fs.lam([-1.0, 0.0, 1.0])
    stop = {"stop": Event(level, 0.5, stop=True)}
    half = fs.simulate(problem, rule, w0, until=until, events=stop, max_steps=2000)
    assert half.statuses == [fs.Status.EVENT] * len(seeds)
    rest = fs.simulate(problem, rule, half.final, until=until, max_steps=2000)
    whole = fs.simulate(problem, rule, w0, until=until, max_steps=2000)
    assert rest.statuses == whole.statuses
    # the gradient at the start is evaluated again
    agree(rest.final, whole.final, 0 if len(seeds) == 1 else 1e-9, but={"tallies.gradients"})


def test_without_events_rules_get_their_whole_budget(monkeypatch):
    budgets = []
    advance = fs.SmallStep.advance

    def counted(self, problem, state, until, budget):
        budgets.append(budget)
        return advance(self, problem, state, until, budget)

    monkeypatch.setattr(fs.SmallStep, "advance", counted)
    line(None, fs.SmallStep(fs.L2(), dlam=0.3), max_steps=200)
    assert min(budgets) > 1
    budgets.clear()
    line({"level": Event(level, 1.0)}, fs.SmallStep(fs.L2(), dlam=0.3), max_steps=200)
    assert set(budgets) == {1}


@pytest.mark.parametrize(
    "rule", [FLOW, fs.SmallStep(fs.L2(), dlam=0.3)], ids=["flow", "small steps"]
)
def test_a_trajectory_alone_has_the_events_that_it_has_in_a_batch(rule, agree):
    events = {"margin": Event(MARGIN, 0.6), "separated": Event(fs.diagnostics.accuracy, 1.0)}
    batch = line(events, rule)
    for b in range(3):
        alone = line(events, rule, w0=STARTS[b : b + 1])
        for name in events:
            for key, value in alone.events[name].items():
                agree(value[0], batch.events[name][key][b])


# Stopping


def test_a_trajectory_stops_at_its_own_event_and_the_others_go_on():
    events = {"stop": Event(MARGIN, 0.8, stop=True), "seen": Event(level, 3.0)}
    until = fs.lam([1.0, 2.0, 3.0, 3.5])
    run = line(events, fs.SmallStep(fs.L2(), dlam=0.3), until)
    assert crossing(0.8) == pytest.approx([8 / 3, 2 / 3, 4.0])
    assert run.statuses == [fs.Status.EVENT, fs.Status.EVENT, fs.Status.DONE]
    assert run["lam"][1:] == pytest.approx(
        np.array([[1, np.nan, 1], [2, np.nan, 2], [np.nan, np.nan, 3], [np.nan, np.nan, 3.5]]),
        nan_ok=True,
    )
    assert np.isnan(run.weights[3:, 0]).all()
    assert run.events["stop"]["lam"][:2] == pytest.approx([8 / 3, 2 / 3], abs=1e-11)
    assert np.isnan(run.events["stop"]["lam"][2])


def test_the_final_state_is_the_end_of_the_natural_step():
    run = line({"stop": Event(level, 1.0, stop=True)}, fs.SmallStep(fs.L2(), dlam=0.3))
    steps = np.ceil((1.0 - STARTS[:, 0].numpy()) / 0.3)
    assert run.final.readings["steps"].tolist() == steps.tolist()
    assert run.final.readings["lam"].numpy() == pytest.approx(STARTS[:, 0].numpy() + 0.3 * steps)


@pytest.mark.parametrize(
    "until", [fs.arclength([3.0, 4.0, 6.0]), fs.time([50.0, 100.0, 1000.0], first=None)]
)
def test_save_points_inside_the_last_step_are_kept_up_to_the_event(until):
    rule, w0 = fs.SmallStep(fs.L2(), dlam=1000.0), torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    run = line({"stop": Event(level, 4.5, stop=True)}, rule, until, w0)  # t = 89 there
    assert run.statuses == [fs.Status.EVENT]
    kept = np.isfinite(run[until.clock.reading][1:, 0])
    assert kept.tolist() == (
        [True, True, False] if until.clock.name == "arclength" else [True, False, False]
    )
    assert run.final.readings["lam"].item() == 1000.0


def test_a_trajectory_with_all_its_saves_is_done_though_an_event_follows_in_the_same_step():
    rule = fs.SmallStep(fs.L2(), dlam=1000.0)
    run = line({"stop": Event(level, 500.0, stop=True)}, rule, fs.lam(10.0))
    assert run.statuses == [fs.Status.DONE] * 3
    assert run.events["stop"]["lam"] == pytest.approx(500.0, abs=1e-9)


def test_the_first_of_two_stops_in_a_step_ends_the_saves():
    rule = fs.SmallStep(fs.L2(), dlam=1000.0)
    events = {"second": Event(level, 30.0, stop=True), "first": Event(level, 20.0, stop=True)}
    run = line(events, rule, fs.lam([15.0, 25.0, 35.0]))
    assert np.isfinite(run["lam"]).all(axis=1).tolist() == [True, True, False, False]
    assert run.events["second"]["lam"] == pytest.approx(
        30.0, abs=1e-9
    )  # the step was taken to its end


def test_a_stop_at_the_start_takes_no_step():
    run = line({"stop": Event(fs.diagnostics.accuracy, 1.0, stop=True)}, w0=STARTS[2:])
    assert (run.statuses, run.final.readings["steps"].item()) == ([fs.Status.EVENT], 0.0)
    assert np.isfinite(run["lam"]).all(axis=1).tolist() == [True, False, False, False, False]


def test_an_indivisible_rule_is_saved_at_the_iterate_where_it_stops():
    run = line(
        {"stop": Event(level, 1.0, stop=True)},
        fs.GradientDescent(0.4, normalized=True),
        fs.steps([1, 3, 9]),
    )
    assert run.statuses == [fs.Status.EVENT] * 3
    assert run["steps"][:, 2].tolist()[:2] == [0, 1]
    assert np.isnan(run["steps"][2:, 2]).all()


def test_strict_takes_an_event_for_an_end_but_no_cap():
    events = {"stop": Event(level, 1.0, stop=True)}
    assert line(events, strict=True).statuses == [fs.Status.EVENT] * 3
    with pytest.raises(fs.SimulationError, match="trajectory 0: stopped at max_steps"):
        line(events, fs.SmallStep(fs.L2(), dlam=0.3), strict=True, max_steps=5)


@pytest.mark.parametrize("max_steps", [1, 7])
def test_max_steps_is_exact_with_events(max_steps):
    run = line({"never": Event(MARGIN, 2.0)}, fs.SmallStep(fs.L2(), dlam=0.01), max_steps=max_steps)
    assert run.final.readings["steps"].tolist() == [max_steps] * 3
    assert run.statuses == [fs.Status.MAX_STEPS] * 3


def test_ctrl_c_returns_the_events_so_far(monkeypatch):
    advance, calls = fs.SmallStep.advance, []

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return advance(self, *arguments)

    monkeypatch.setattr(fs.SmallStep, "advance", interrupted)
    run = line({"level": Event(level, 1.0)}, fs.SmallStep(fs.L2(), dlam=0.3))
    assert run.statuses == [fs.Status.INTERRUPTED] * 3
    assert run.events["level"]["lam"] == pytest.approx([np.nan, 1.0, 1.0], nan_ok=True)


def test_progress_and_checkpoints_go_on(tmp_path, capsys):
    events = {"stop": Event(level, 1.0, stop=True)}
    run = line(events, progress=True, directory=tmp_path, checkpoint_seconds=0.0)
    assert load_state(tmp_path).statuses == run.statuses == [fs.Status.EVENT] * 3
    assert FLOW.label in capsys.readouterr().err


# Rejected steps, and kinks


class Halting:
    """Takes every other step of 1 only, and counts a rejected one between them."""

    label = "halting"

    def start(self, problem, w_or_state):
        state = initial_state(problem, w_or_state)
        kinks = torch.zeros(len(state.w), 1, dtype=torch.float64)
        state = replace(state, memory={"turn": torch.zeros(len(state.w))}, multipliers=kinks)
        return replace(state, segment=self.straight(state, state))

    def advance(self, problem, state, until, budget):
        return advance_by_steps(lambda part, local: self.step(local), problem, state, until, budget)

    def step(self, state):
        turn = state.memory["turn"]
        state = replace(state, memory={"turn": 1 - turn})
        if turn[0] == 0:
            return replace(
                state, tallies=state.tallies | {"rejected": state.tallies["rejected"] + 1}
            )
        gain = {name: state.readings[name] + 1 for name in ("steps", "lam", "arclength")}
        moved = replace(
            state,
            w=state.w + 1,
            readings=state.readings | gain,
            multipliers=0 * state.multipliers + 0.5,
        )
        return replace(moved, segment=self.straight(state, moved))

    @staticmethod
    def straight(a, b):
        move, zero = b.w - a.w, torch.zeros(len(a.w)).double()
        rise = b.readings["lam"] - a.readings["lam"]
        ends = {"multipliers0": a.multipliers, "multipliers1": b.multipliers}
        return Segment(a.w, b.w, move, move, a.readings, b.readings, rise, rise, zero, zero, **ends)


BOWL = fs.Quadratic(torch.eye(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))


def test_what_rejected_steps_reach_is_found_where_the_trajectory_then_is():
    events = {"rejected": Event(lambda p, s: s.tallies["rejected"], 3)}
    run = fs.simulate(
        BOWL, Halting(), torch.zeros(1, 2).double(), until=fs.arclength(5.0), events=events
    )
    assert run.events["rejected"]["arclength"].tolist() == [2.0]


def test_multipliers_at_saves_and_events_are_those_inside_the_step():
    def slides(problem, state):
        return state.multipliers[:, 0]

    run = fs.simulate(
        BOWL,
        Halting(),
        torch.zeros(1, 2).double(),
        until=fs.arclength([0.5, 1.0, 1.5]),
        events={"on": Event(slides, 0.5)},
        observe={"slides": slides},
    )
    assert run["slides"][:, 0] == pytest.approx([0, 0.25, 0.5, 0.5])
    assert run.events["on"]["arclength"] == pytest.approx(1.0, abs=1e-11)


# On disk, and by trajectory


@pytest.fixture(scope="module")
def found():
    events = {
        "separated": Event(fs.diagnostics.accuracy, 1.0),
        "aligned": Event(fs.diagnostics.alignment(fs.L2()), 0.9, name="KKT", stop=True),
        "never": Event(MARGIN, 1.5),
    }
    return line(events, fs.SmallStep(fs.L2(), dlam=0.3), fs.lam(5.0, saves=4))


def test_events_are_saved_and_loaded(found, tmp_path):
    back = fs.load(found.save(tmp_path))
    assert list(back.events) == list(found.events)
    assert back.names == found.names
    for name, expected in found.events.items():
        assert list(back.events[name]) == list(expected)
        for key, value in expected.items():
            assert np.array_equal(back.events[name][key], value, equal_nan=True), (name, key)
    assert back.statuses == found.statuses


def test_events_on_disk_have_the_trajectories_dimension(found, tmp_path):
    found.save(tmp_path)
    with h5py.File(tmp_path / "trajectory.nc") as file:
        assert file["events/aligned/lam"].dims[0][0].name == "/trajectory"


def test_a_file_without_events_loads(found, tmp_path):
    found.save(tmp_path)
    with h5py.File(tmp_path / "trajectory.nc", "a") as file:
        del file["events"]
    back = fs.load(tmp_path)
    assert back.events == {}
    assert back.names == found.names


def test_select_takes_events_along(found):
    part = found.select([2, 0])
    for name, expected in found.events.items():
        for key, value in part.events[name].items():
            assert np.array_equal(value, expected[key][[2, 0]], equal_nan=True)


def test_the_record_says_what_was_looked_for(found):
    said = found.provenance["events"]
    assert said == {
        "separated": "accuracy ≥ 1",
        "aligned": "KKT ≥ 0.9, then stop",
        "never": "margin ≥ 1.5",
    }
    assert Event(level, 2, falling=True).sentence == "level ≤ 2"


# Messages


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (
            (0.5, 1.0),
            {},
            r"got measure=0.5, expected a function .*try flowsim.diagnostics.accuracy",
        ),
        ((level, math.nan), {}, "got level=nan, expected a finite number"),
        ((level, math.inf), {}, "got level=inf, expected a finite number"),
        ((level, "1"), {}, "got level='1', expected a finite number"),
        ((level, True), {}, "got level=True, expected a finite number"),
        ((level, 1.0), {"falling": 1}, "got falling=1, expected True or False"),
        ((level, 1.0), {"stop": "yes"}, "got stop='yes', expected True or False"),
    ],
)
def test_an_event_says_what_is_wrong_with_it(arguments, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Event(*arguments, **options)


@pytest.mark.parametrize("events", [[Event(level, 1.0)], {"a": level}, {"a": (level, 1.0)}, "lam"])
def test_events_must_map_names_to_events(events):
    with pytest.raises(TypeError, match="got events that are not a mapping .*try events="):
        line(events)


@pytest.mark.parametrize("name", ["lam", "weights", "events", "tally_gradients", "seen"])
def test_events_may_not_take_names_that_a_trajectory_has(name):
    with pytest.raises(
        ValueError, match=f"got an event named '{name}', expected a name that is not taken"
    ):
        line({name: Event(level, 1.0)}, observe={"seen": MARGIN})


@pytest.mark.parametrize("name", ["", "a/b", 3])
def test_names_must_be_words(name):
    with pytest.raises(ValueError, match="got an event named .*expected a word"):
        line({name: Event(level, 1.0)})


@pytest.mark.parametrize(
    "measure",
    [lambda p, s: s.w, lambda p, s: s.w.sum(), lambda p, s: s.w[:1, 0], lambda p, s: 1.0],
    ids=["weights", "scalar", "one row", "float"],
)
def test_a_measure_must_give_one_number_for_each_trajectory(measure):
    with pytest.raises(
        ValueError,
        match=r"event 'mine': its measure returned .*expected a tensor of shape \(3,\).*try",
    ):
        line({"mine": Event(measure, 1.0)})


def test_measures_do_not_record_gradients():
    seen = set()

    def look(problem, state):
        seen.add(torch.is_grad_enabled())
        return state.w[:, 0]

    line({"look": Event(look, 1.0)})
    assert seen == {False}
