"""Mini-batches: which examples a step sees, that their gradient is unbiased, and that streams are
their own."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch

import flowsim as fs
from flowsim.motion.clocks import STEPS, Target

N = 12
X, Y = fs.data.gaussian_separable(N, 5, margin=0.5, seed=range(3))
NET = fs.MLP([5, 6, 1], activation=fs.relu)
ONE_STEP = Target(STEPS, torch.ones(1).double())


def setting(rows=slice(None), shared=False):
    x, y = (X[0], Y[0]) if shared else (X[rows], Y[rows])
    return fs.Problem(NET, x, y, fs.logistic), NET.init(range(3))[rows]


def iterates(rule, steps, shared=False):
    problem, w0 = setting(shared=shared)
    return problem, torch.from_numpy(
        fs.simulate(problem, rule, w0, until=fs.steps(range(1, steps + 1))).weights
    )


def batches_of(x, y, move, w, lr, size):
    """The batches, as sets of indices, whose gradient explains a step of gradient descent."""
    found = []
    for chosen in combinations(range(N), size):
        part = fs.Problem(NET, x[list(chosen)], y[list(chosen)], fs.logistic)
        lam, h = part.ascent(w[None])
        if torch.allclose(
            move, lr * N / size * (torch.exp(-lam)[:, None] * h)[0], rtol=1e-6, atol=1e-13
        ):
            found.append(set(chosen))
    return found


@pytest.mark.parametrize("shared", [False, True])
def test_an_epoch_without_replacement_sees_every_example_once(shared):
    _, w = iterates(fs.MiniBatches(fs.GradientDescent(1e-3), 4), 6, shared)
    for b in range(1, 3):
        x, y = (X[0], Y[0]) if shared else (X[b], Y[b])
        batches = [batches_of(x, y, w[k + 1, b] - w[k, b], w[k, b], 1e-3, 4) for k in range(6)]
        assert all(len(found) == 1 for found in batches)
        for epoch in (batches[:3], batches[3:]):
            assert set.union(*(found[0] for found in epoch)) == set(range(N))
        assert [f[0] for f in batches[:3]] != [f[0] for f in batches[3:]]


def test_batches_of_all_examples_are_full_batch_training():
    _, w = iterates(fs.MiniBatches(fs.Adam(1e-2), N), 20)
    _, full = iterates(fs.Adam(1e-2), 20)
    assert torch.allclose(w, full, rtol=1e-10, atol=1e-13)


def test_a_step_is_unbiased():
    problem, w0 = setting(slice(0, 1))
    moves = []
    for seed in range(400):
        rule = fs.MiniBatches(fs.GradientDescent(1.0), 3, seed, replacement=bool(seed % 2))
        state = rule.start(problem, w0)
        moves.append((rule.advance(problem, state, ONE_STEP, 1).w - w0)[0])
    lam, h = problem.ascent(w0)
    mean, spread = torch.stack(moves).mean(0), torch.stack(moves).std(0) / math.sqrt(400)
    exact = (torch.exp(-lam)[:, None] * h)[0]
    assert ((mean - exact).abs() <= 4.5 * spread + 1e-12).all()


def test_the_level_is_that_of_all_examples():
    problem, w0 = setting()
    run = fs.simulate(problem, fs.MiniBatches(fs.Adam(1e-2), 3), w0, until=fs.steps(range(1, 20)))
    for k, weights in enumerate(run.weights):
        assert np.allclose(
            run["lam"][k], problem.lam(torch.from_numpy(weights)).numpy(), rtol=1e-13
        )


RULES = [
    fs.GradientDescent(1e-2),
    fs.GradientDescent(1e-3, momentum=fs.HeavyBall(0.9)),
    fs.Adam(1e-2, eps=0.0),
    fs.Muon(1e-2),
    fs.CoordinateDescent(1e-2, normalized=True),
]


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.label)
def test_a_resumed_run_is_the_unbroken_one(rule, replacement, tmp_path):
    problem, w0 = setting()
    rule = fs.MiniBatches(rule, 5, 1, replacement)
    whole = fs.simulate(problem, rule, w0, until=fs.steps([11, 30])).final
    fs.simulate(problem, rule, w0, until=fs.steps([11]), directory=tmp_path)
    rest = fs.simulate(problem, rule, fs.load(tmp_path).final, until=fs.steps([30])).final
    assert torch.equal(whole.w, rest.w)
    assert torch.equal(whole.readings["lam"], rest.readings["lam"])


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.label)
def test_a_trajectory_alone_is_the_trajectory_in_a_batch(rule):
    problem, w0 = setting()
    rule = fs.MiniBatches(rule, 5)
    batch = fs.simulate(problem, rule, w0, until=fs.lam([-2.2]), max_steps=40).final
    for b in range(3):
        part, start = setting(slice(b, b + 1))
        alone = fs.simulate(part, rule, start, until=fs.lam([-2.2]), max_steps=40).final
        assert torch.allclose(alone.w[0], batch.w[b], rtol=1e-11)


def test_seeds_and_trajectories_have_streams_of_their_own():
    problem, w0 = setting(shared=True)
    ends = [
        fs.simulate(problem, fs.MiniBatches(fs.Adam(1e-2), 3, seed), w0, until=fs.steps([5])).final
        for seed in (0, 1)
    ]
    assert not torch.equal(ends[0].w, ends[1].w)
    assert len({int(s) for end in ends for s in end.memory["stream"]}) == 6
    again = fs.simulate(problem, fs.MiniBatches(fs.Adam(1e-2), 3), w0, until=fs.steps([5])).final
    assert torch.equal(again.w, ends[0].w)


def test_a_late_batch_of_easy_examples_is_followed_by_normalised_steps_and_stops_nothing():
    """Margins of 1000 and 3000: the second example alone has a gradient e^{−2000} times the whole
    one."""
    problem = fs.Problem(fs.Linear(2), [[1.0, 0.0], [0.0, 3.0]], [1, 1], fs.exponential)
    w0 = torch.full((1, 2), 1000.0).double()
    rule = fs.MiniBatches(fs.SignDescent(1.0, normalized=True), 1)
    run = fs.simulate(problem, rule, w0, until=fs.steps(range(1, 11)), strict=True)
    assert run.final.w.tolist() == [[1005.0, 1005.0]]
    plain = fs.simulate(
        problem, fs.MiniBatches(fs.GradientDescent(1.0), 1), w0, until=fs.steps([10])
    )
    assert plain.statuses == [fs.Status.DONE]


def test_stochastic_training_separates_the_data():
    problem, w0 = setting()
    rule = fs.MiniBatches(fs.Adam(0.05), 4)
    run = fs.simulate(
        problem,
        rule,
        w0,
        until=fs.steps([500]),
        observe={"a": fs.diagnostics.accuracy},
        strict=True,
    )
    assert (run["a"][-1] == 1).all()


@pytest.mark.parametrize(
    ("option", "value"), [("size", 0), ("size", 2.5), ("seed", -1), ("size", True)]
)
def test_sizes_and_seeds_are_integers(option, value):
    with pytest.raises(ValueError, match=f"MiniBatches: got {option}=.*expected an integer"):
        fs.MiniBatches(fs.Adam(), **({"size": 2} | {option: value}))


def test_the_rule_is_a_discrete_one():
    with pytest.raises(TypeError, match="MiniBatches: got rule=.*expected a discrete rule"):
        fs.MiniBatches(fs.SteepestFlow(fs.L2()), 2)
    with pytest.raises(TypeError, match="MiniBatches: got replacement='no'"):
        fs.MiniBatches(fs.Adam(), 2, replacement="no")


def test_a_batch_has_at_most_all_examples():
    problem, w0 = setting()
    with pytest.raises(ValueError, match="MiniBatches: got size=13, expected at most 12"):
        fs.simulate(problem, fs.MiniBatches(fs.Adam(), 13), w0, until=fs.steps([1]))
    bowl = fs.Quadratic(torch.eye(2).double(), torch.zeros(2).double())
    with pytest.raises(TypeError, match="MiniBatches: got Quadratic, expected a Problem"):
        fs.simulate(
            bowl, fs.MiniBatches(fs.Adam(), 1), torch.ones(1, 2).double(), until=fs.steps([1])
        )
