"""Exact pieces: closed forms, linear programmes, tiny explicit steps, and everything degenerate."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

import flowsim as fs
from flowsim.flow.pieces.step import ExactPieces
from flowsim.layout import lay_out

NORMS = {"l1": fs.L1(), "linf": fs.Linf()}
BOTH = pytest.mark.parametrize("name", NORMS)
FIXTURE = torch.tensor([[3.0, 1, 0], [1, -2, 2], [1, 2, 1]]).double()


def flow(name, rtol=1e-6, **options):
    norm = NORMS[name] if isinstance(name, str) else name
    return fs.SteepestFlow(norm, rtol=rtol, method=ExactPieces(), **options)


def zeros(*shape):
    return torch.zeros(*shape, dtype=torch.float64)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(x, y, loss=fs.exponential, outputs=1):
    return fs.Problem(fs.Linear(x.shape[-1], outputs), x, y, loss=loss)


def separable(z):
    """Data in the form y·x, all labels one."""
    return linear(z, torch.ones(len(z)))


def random_quadratic(d, seed):
    A = randn(d + 2, d, seed=seed)
    return fs.Quadratic(A.T @ A / d, randn(d, seed=seed + 100))


def largest_margin(z, name):
    n, d = z.shape
    if name == "linf":
        bounds = [(-1, 1)] * d + [(None, None)]
        return -linprog(
            np.append(np.zeros(d), -1), np.c_[-z, np.ones(n)], np.zeros(n), bounds=bounds
        ).fun
    rows = np.vstack([np.c_[-z, z, np.ones(n)], np.append(np.ones(2 * d), 0)])
    bounds = [(0, None)] * (2 * d) + [(None, None)]
    return -linprog(
        np.append(np.zeros(2 * d), -1), rows, np.append(np.zeros(n), 1), bounds=bounds
    ).fun


def explicit(objective, norm, w, length, steps):
    """Tiny explicit steps of the same total length."""
    norm = norm.bind(objective.layout)
    for _ in range(steps):
        w = w + length / steps * norm.steepest(objective.ascent(w)[1])
    return w.numpy()


def follow(objective, norm, length, exact, counts):
    """Explicit steps come as near as they are short, and nearer the shorter they are."""
    errors = [
        np.abs(explicit(objective, norm, zeros(1, objective.size), length, k) - exact).max()
        for k in counts
    ]
    assert errors[0] < 100 * length / counts[0]
    assert errors[1] < max(0.5 * errors[0], 1e-12)


def gap(problem, norm, w, best):
    """‖∇Λ‖_*/γ* − 1, the relative duality gap."""
    return float(norm.dual(problem.ascent(w)[1])) / best - 1


# --------------------------------------------------------------------------------------------------
# Closed forms
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "turn", "time", "end", "first", "then"),
    [
        ("l1", 1.0, math.log(3) / 2, 5 / 3, (1.0, 0.0), (0.5, 0.5)),
        ("linf", 2 / 3, math.log(5) / 6, 4 / 3, (1.0, 1.0), (1.0, -0.5)),
    ],
)
def test_a_quadratic_of_two_weights_to_rounding(name, turn, time, end, first, then):
    """H = [[2, 1], [1, 2]]: two pieces, then the minimiser (4/3, 1/3) after a finite length."""
    goal = torch.tensor([4 / 3, 1 / 3], dtype=torch.float64)
    problem = fs.Quadratic(torch.tensor([[2.0, 1.0], [1.0, 2.0]]).double(), goal)
    points = [0.3, turn, 0.5 * (turn + end), 0.9 * end]
    run = fs.simulate(problem, flow(name), zeros(1, 2), until=fs.arclength(points), strict=True)
    for s, w in zip(points, run.weights[1:, 0], strict=True):
        exact = min(s, turn) * np.array(first) + max(s - turn, 0) * np.array(then)
        np.testing.assert_allclose(w, exact, atol=1e-12)
    # t = t(turn) + log(M/M')/κ
    kappa = {"l1": (2, 1.5), "linf": (6, 1.5)}[name]
    dual = float(NORMS[name].dual(problem.ascent(turn * torch.tensor([first]).double())[1]))
    assert math.exp(run["log_time"][2, 0]) == pytest.approx(time, rel=1e-12)
    late = time - math.log(1 - kappa[1] * (points[3] - turn) / dual) / kappa[1]
    assert run["log_time"][4, 0] == pytest.approx(math.log(late), abs=1e-3)
    whole = fs.simulate(problem, flow(name), zeros(1, 2), until=fs.arclength([10.0]))
    assert whole.statuses == [fs.Status.STATIONARY]
    np.testing.assert_allclose(whole.final.w[0], goal, atol=1e-12)
    assert float(whole.final.readings["arclength"]) == pytest.approx(end, abs=1e-12)


@BOTH
@pytest.mark.parametrize("seed", range(4))
def test_quadratics_end_at_the_minimiser_and_agree_with_tiny_steps(name, seed):
    d = 3 + 2 * seed
    problem = random_quadratic(d, seed)
    run = fs.simulate(problem, flow(name), zeros(1, d), until=fs.arclength([100.0]))
    assert run.statuses == [fs.Status.STATIONARY]
    np.testing.assert_allclose(run.final.w[0], problem.minimiser, atol=1e-10)
    # energy: the level rises by the integral of ‖∇level‖_*
    rise = run.final.readings["lam"] - run["lam"][0, 0]
    assert float(run.final.readings["dissipated"] - rise) == pytest.approx(
        0, abs=1e-10 * (1 + float(rise))
    )
    length = 0.6 * float(run.final.readings["arclength"])
    exact = fs.simulate(problem, flow(name), zeros(1, d), until=fs.arclength([length])).weights[-1]
    follow(problem, NORMS[name], length, exact, (100, 1000))


def test_an_isotropic_quadratic_is_a_soft_threshold_in_linf_and_a_clip_in_l1():
    r0 = randn(1, 7, seed=4)
    problem = fs.Quadratic(torch.eye(7).double(), zeros(7))
    points = [0.1, 0.4, 0.9, 1.4]
    run = fs.simulate(problem, flow("linf"), r0, until=fs.arclength(points), strict=True)
    for s, r in zip(points, run.weights[1:, 0], strict=True):
        np.testing.assert_allclose(r, r0[0].sign() * (r0[0].abs() - s).clamp_min(0), atol=1e-12)
    points = [0.2, 1.0, 2.0, 3.0]
    run = fs.simulate(problem, flow("l1"), r0, until=fs.arclength(points), strict=True)
    for s, r in zip(points, run.weights[1:, 0], strict=True):
        M = np.abs(r).max()
        assert float((r0.abs() - M).clamp_min(0).sum()) == pytest.approx(s, abs=1e-12)
        np.testing.assert_allclose(r, r0[0].clamp(-M, M), atol=1e-12)


@BOTH
def test_one_sample_moves_straight_and_logarithmically(name):
    x, w0 = torch.tensor([[2.0, -1.0, 0.0, 0.5]], dtype=torch.float64), randn(1, 4)
    run = fs.simulate(
        separable(x), flow(name), w0, until=fs.lam([1.0, 10.0, 1e3, 1e6]), strict=True
    )
    dual = float(NORMS[name].dual(x))
    start = run["lam"][0, 0]
    for lam, log_time, w in zip(
        run["lam"][1:, 0], run["log_time"][1:, 0], run.weights[1:, 0], strict=True
    ):
        # q = log(e^{q0} + ‖x‖_*² t)
        assert log_time == pytest.approx(
            lam + np.log1p(-np.exp(start - lam)) - 2 * math.log(dual), rel=1e-6
        )
        unit = NORMS[name].steepest(x)[0] * (lam - start) / dual
        np.testing.assert_allclose(w, w0[0] + unit, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "best"), [("l1", 17 / 15), ("linf", 5 / 2)])
def test_margins_obey_the_finite_time_bound_and_time_its_limit(name, best):
    problem, norm = separable(FIXTURE), NORMS[name]
    observe = {
        "margin": fs.diagnostics.margin(norm),
        "soft": lambda p, s: p.lam(s.w) / norm.value(s.w),
        "dual": lambda p, s: norm.dual(p.ascent(s.w)[1]),
    }
    points = [0.5, 1.0, 3.0, 9.0, 30.0, 300.0, 1e4]
    run = fs.simulate(
        problem, flow(name), zeros(1, 3), until=fs.arclength(points), observe=observe, strict=True
    )
    s, margin, soft, dual = (run[key][1:, 0] for key in ("arclength", "margin", "soft", "dual"))
    slack = 1e-9
    assert (soft >= best - math.log(3) / s - slack).all()
    assert (margin >= soft - slack).all()
    assert (margin <= best + slack).all()
    assert (dual >= best - slack).all()
    assert run["log_time"][-1, 0] - run["lam"][-1, 0] == pytest.approx(
        -2 * math.log(best), abs=1e-6
    )


def events(problem, rule, until):
    """States at the events of a run, by single steps."""
    state, found, seen = rule.start(problem, zeros(1, problem.size)), [], 0.0
    target = until.clock, torch.tensor([until.stop], dtype=torch.float64)
    while bool(state.running.all()) and float(state.readings[target[0].reading]) < until.stop:
        state = rule.advance(problem, state, fs.clocks.Target(*target), 1)
        if float(state.tallies["events"]) > seen:
            found, seen = [*found, state], float(state.tallies["events"])
    return found


@BOTH
def test_events_do_not_depend_on_the_tolerance(name):
    x, y = fs.data.gaussian_separable(30, 8, seed=2)
    problem = linear(x, y)
    loose, tight = (events(problem, flow(name, rtol), fs.lam([30.0])) for rtol in (1e-3, 1e-8))
    assert len(loose) == len(tight) > 3
    for a, b in zip(loose, tight, strict=True):
        np.testing.assert_allclose(a.w, b.w, rtol=0, atol=1e-12 * max(1.0, float(b.w.abs().max())))
        assert float(a.readings["arclength"]) == pytest.approx(
            float(b.readings["arclength"]), rel=1e-12, abs=1e-12
        )
        assert float(a.readings["log_time"]) == pytest.approx(
            float(b.readings["log_time"]), abs=1e-3
        )


@BOTH
def test_regression_in_l1_is_forward_stagewise_and_residuals_contract_in_time(name):
    x = randn(20, 5, seed=1)
    problem = linear(x, x @ randn(5, seed=2) + 0.3 * randn(20, seed=3), fs.squared)
    run = fs.simulate(problem, flow(name), zeros(1, 5), until=fs.arclength([0.5, 1.0]), strict=True)
    for s, w in zip([0.5, 1.0], run.weights[1:], strict=True):
        follow(problem, NORMS[name], s, w, (200, 1000))
    times = [0.001, 0.01, 0.03, 0.1, 0.2]
    pair = fs.simulate(problem, flow(name), randn(2, 5, seed=5), until=fs.time(times), strict=True)
    residuals = np.einsum("nd,tbd->tbn", x.numpy(), pair.weights)
    apart = np.linalg.norm(residuals[:, 0] - residuals[:, 1], axis=-1)
    assert (np.diff(apart) <= 1e-4 * apart[0]).all()


# --------------------------------------------------------------------------------------------------
# Deep runs against linear programmes
# --------------------------------------------------------------------------------------------------


@BOTH
def test_two_hundred_examples_reach_a_loss_of_exp_minus_a_million(name):
    x, y = fs.data.gaussian_separable(200, 50, margin=0.1, seed=0)
    problem, norm = linear(x, y), NORMS[name]
    run = fs.simulate(problem, flow(name), zeros(1, 50), until=fs.lam([1e4, 1e6]), strict=True)
    best = largest_margin((x * y[:, None]).numpy(), name)
    assert float(run.final.attempts) <= 250
    # rounding of the weights alone moves logits by 1e-16·Λ and more
    assert abs(gap(problem, norm, torch.from_numpy(run.weights[1]), best)) <= 1e-9
    assert abs(gap(problem, norm, torch.from_numpy(run.weights[2]), best)) <= 2e-8
    end = run.final.readings
    assert float(end["log_time"] - end["lam"]) == pytest.approx(-2 * math.log(best), abs=1e-6)
    assert run["log_time"][-1, 0] - run["lam"][-1, 0] == pytest.approx(
        -2 * math.log(best), abs=2e-3
    )


@pytest.mark.slow
@BOTH
def test_a_thousand_features(name):
    x, y = randn(200, 1000), torch.where(randn(200, seed=1) < 0, -1.0, 1.0)
    problem = linear(x, y)
    run = fs.simulate(problem, flow(name), zeros(1, 1000), until=fs.lam([1e5]), strict=True)
    best = largest_margin((x * y[:, None]).numpy(), name)
    assert abs(gap(problem, NORMS[name], run.final.w, best)) <= 1e-8


@BOTH
@pytest.mark.parametrize("loss", [fs.exponential, fs.logistic], ids=lambda loss: loss.name)
def test_the_soft_margin_rises_at_every_step(name, loss):
    x, y = fs.data.gaussian_separable(40, 8, seed=5)
    problem, norm = linear(x, y, loss), NORMS[name]
    run = fs.simulate(
        problem, flow(name), randn(1, 8), until=fs.steps(list(range(1, 80))), strict=True
    )
    lam = run["lam"][:, 0]
    soft = (
        loss.soft_minimum(torch.from_numpy(lam)).numpy()
        / norm.value(torch.from_numpy(run.weights[:, 0])).numpy()
    )
    positive = (soft > 0) & (lam < 1e4)
    assert positive.sum() > 8
    assert (np.diff(soft[positive]) >= -1e-12 * soft[positive][1:]).all()
    # Λ is concave along the flow: ‖∇Λ‖_* falls
    dual = norm.dual(problem.ascent(torch.from_numpy(run.weights[:, 0]))[1]).numpy()
    if loss is fs.exponential:
        assert (np.diff(dual[lam < 1e3]) <= 1e-9).all()


# --------------------------------------------------------------------------------------------------
# Other losses, degenerate data
# --------------------------------------------------------------------------------------------------

X, Y = fs.data.gaussian_separable(30, 6, seed=1)


@BOTH
@pytest.mark.parametrize(
    "loss", [fs.pairwise_exponential, fs.cross_entropy], ids=lambda loss: loss.name
)
def test_multi_class_models(name, loss):
    x = torch.cat(
        [3 * torch.eye(4)[[0, 1, 2, 3] * 5].double() + 0.3 * randn(20, 4), randn(20, 2, seed=1)], 1
    )
    problem = linear(x, torch.tensor([0, 1, 2, 3] * 5), loss, outputs=4)
    run = fs.simulate(problem, flow(name), zeros(1, 24), until=fs.lam([100.0]), strict=True)
    assert float(problem.margins(run.final.w).min()) > 90
    rise = float(run.final.readings["lam"]) - run["lam"][0, 0]
    assert float(run.final.readings["dissipated"]) == pytest.approx(rise, abs=1e-2)
    exact = fs.simulate(problem, flow(name), zeros(1, 24), until=fs.arclength([1.0])).weights[-1]
    # a shift of all classes alike is not seen by the loss
    apart = [explicit(problem, NORMS[name], zeros(1, 24), 1.0, k) - exact for k in (200, 1000)]
    errors = [np.abs(a - a.mean(0)).max() for a in np.reshape(apart, (2, 4, 6))]
    assert errors[1] < 0.5 * errors[0] < 0.05


@BOTH
@pytest.mark.parametrize("loss", [fs.exponential, fs.logistic], ids=lambda loss: loss.name)
def test_contradictory_labels_end_at_the_minimiser(name, loss):
    problem = linear(torch.cat([X, X[:10]]), torch.cat([Y, -Y[:10]]), loss)
    run = fs.simulate(problem, flow(name), randn(2, 6), until=fs.lam([100.0]))
    assert run.statuses == [fs.Status.STATIONARY] * 2
    assert float(problem.ascent(run.final.w)[1].abs().max()) < 1e-10
    np.testing.assert_allclose(run.final.w[0], run.final.w[1], atol=1e-9)


@BOTH
def test_interpolation_stops_at_rounding(name):
    problem = linear(randn(8, 20), randn(8, seed=1), fs.squared)
    run = fs.simulate(problem, flow(name), zeros(1, 20), until=fs.arclength([100.0]))
    assert run.statuses[0] in (fs.Status.STATIONARY, fs.Status.PRECISION_FLOOR)
    assert float(problem.lam(run.final.w)) > 45


@BOTH
def test_repeated_features_share_and_dead_ones_stay(name):
    x = torch.cat([X, X[:, :2], X[:, :1], zeros(30, 2)], 1)
    run = fs.simulate(
        linear(x, Y), flow(name), zeros(1, 11), until=fs.lam([1.0, 100.0]), strict=True
    )
    for w in run.weights[1:, 0]:
        np.testing.assert_allclose(w[[6, 8]], w[[0, 0]], rtol=1e-9)
        np.testing.assert_allclose(w[7], w[1], rtol=1e-9, atol=1e-12)
        assert (w[9:] == 0).all()
    if name == "l1":  # which changes nothing but the split
        plain = fs.simulate(
            linear(X, Y), flow(name), zeros(1, 6), until=fs.lam([1.0, 100.0]), strict=True
        )
        total = run.weights[1:, 0, :6].copy()
        total[:, :2] += run.weights[1:, 0, 6:8]
        total[:, 0] += run.weights[1:, 0, 8]
        np.testing.assert_allclose(total, plain.weights[1:, 0], atol=1e-5 * np.abs(total).max())


@BOTH
def test_repeated_examples_and_symmetric_data(name):
    problem = linear(torch.cat([X, X[:10]]), torch.cat([Y, Y[:10]]))
    run = fs.simulate(problem, flow(name), zeros(1, 6), until=fs.lam([1e3]), strict=True)
    best = largest_margin((X * Y[:, None]).numpy(), name)
    assert abs(gap(problem, NORMS[name], run.final.w, best)) < 1e-8
    run = fs.simulate(
        separable(torch.eye(4).double()),
        flow(name),
        zeros(1, 4),
        until=fs.lam([100.0]),
        strict=True,
    )
    np.testing.assert_allclose(run.final.w, run.final.w[:, :1].expand(1, 4))
    signs = torch.randint(-1, 2, (20, 5), generator=torch.Generator().manual_seed(0)).double()
    problem = linear(
        signs, torch.sign(signs[:, 0] + 0.5), fs.logistic
    )  # some examples are all zero
    run = fs.simulate(problem, flow(name), zeros(1, 5), until=fs.arclength([50.0]))
    assert run.statuses[0] in (fs.Status.DONE, fs.Status.STATIONARY)


def test_a_zero_gradient_stays_where_it_is():
    run = fs.simulate(
        linear(zeros(3, 4), torch.ones(3)), flow("l1"), randn(1, 4), until=fs.lam([1.0])
    )
    assert run.statuses == [fs.Status.STATIONARY]
    np.testing.assert_array_equal(run.final.w, randn(1, 4))


# --------------------------------------------------------------------------------------------------
# As a rule
# --------------------------------------------------------------------------------------------------


@BOTH
def test_a_resumed_run_is_the_same_to_the_bit(name):
    problem, rule, w0 = linear(X, Y), flow(name), randn(2, 6)
    whole = fs.simulate(problem, rule, w0, until=fs.lam([1.0, 3.0, 10.0]), strict=True)
    part = fs.simulate(problem, rule, w0, until=fs.lam([1.0, 3.0]), strict=True).final
    stored = fs.State.from_tensors(part.tensors())
    rest = fs.simulate(problem, rule, stored, until=fs.lam([1.0, 3.0, 10.0]), strict=True)
    assert torch.equal(rest.final.w, whole.final.w)
    for reading, value in whole.final.readings.items():
        assert torch.equal(rest.final.readings[reading], value), reading


@BOTH
def test_a_trajectory_does_not_know_its_batch_mates(name, agree):
    problem, w0 = linear(X, Y), randn(3, 6)
    together = fs.simulate(problem, flow(name), w0, until=fs.lam([1.0, 10.0]), strict=True)
    for b in range(3):
        alone = fs.simulate(
            problem, flow(name), w0[b : b + 1], until=fs.lam([1.0, 10.0]), strict=True
        )
        agree(alone.weights[:, 0], together.weights[:, b])


def test_the_path_does_not_depend_on_what_came_before():
    """On from another norm's state: as from its weights."""
    problem, w0 = linear(X, Y), randn(1, 6)
    run = fs.simulate(problem, flow("l1"), w0, until=fs.lam([10.0]))
    other = fs.simulate(problem, flow("linf"), run.final, until=fs.lam([100.0]), strict=True)
    fresh = fs.simulate(problem, flow("linf"), run.final.w, until=fs.lam([100.0]), strict=True)
    np.testing.assert_allclose(other.weights[-1], fresh.weights[-1], rtol=1e-6)


@dataclass(frozen=True)
class Blocks(fs.Quadratic):
    """A quadratic of two blocks of weights."""

    @property
    def layout(self):
        return lay_out({"a": (3,), "b": (self.size - 3,)})


@pytest.mark.parametrize(
    "norm",
    [
        fs.Max(fs.L1(), {"b": 2.0}),
        fs.Max({"a": fs.Linf(), "b": fs.L1()}, {"a": 0.5}),
        fs.Max(fs.Linf(), {"a": 3.0}),
        fs.Sum(fs.L1(), {"b": 2.0}),
    ],
    ids=lambda norm: norm.name,
)
@pytest.mark.parametrize("seed", range(3))
def test_blocks(norm, seed):
    plain = random_quadratic(7, seed)
    problem = Blocks(plain.matrix, plain.minimiser)
    run = fs.simulate(problem, flow(norm), zeros(1, 7), until=fs.arclength([100.0]))
    assert run.statuses == [fs.Status.STATIONARY]
    np.testing.assert_allclose(run.final.w[0], problem.minimiser, atol=1e-9)
    length = 0.7 * float(run.final.readings["arclength"])
    exact = fs.simulate(problem, flow(norm), zeros(1, 7), until=fs.arclength([length])).weights[-1]
    follow(problem, norm, length, exact, (100, 1000))


def test_what_it_cannot_do_is_refused_in_words():
    problem = Blocks(torch.eye(5).double(), zeros(5))
    with pytest.raises(ValueError, match="got the norm sum"):
        flow(fs.Sum(fs.Linf())).start(problem, randn(1, 5))
    with pytest.raises(ValueError, match="got the norm l2"):
        flow(fs.L2()).start(problem, randn(1, 5))
    net = fs.MLP([2, 3, 1], activation=fs.square)
    with pytest.raises(ValueError, match="not convex"):
        flow("l1").start(fs.Problem(net, randn(4, 2), torch.ones(4), fs.exponential), net.init())
    with pytest.raises(ValueError, match="float64"):
        flow("l1").start(linear(X, Y), zeros(1, 6).float())


def test_the_tallies_count_gradients_steps_and_events():
    calls = []

    @dataclass(frozen=True)
    class Counted(fs.Quadratic):
        def ascent(self, w):
            calls.append(1)
            return super().ascent(w)

        def lam(self, w):  # what saves ask for
            return super().ascent(w)[0]

    plain = random_quadratic(4, 0)
    problem = Counted(plain.matrix, plain.minimiser)
    run = fs.simulate(problem, flow("l1"), zeros(1, 4), until=fs.steps(10), strict=True)
    assert float(run.final.tallies["gradients"]) == len(calls)
    assert float(run.final.tallies["accepted"]) == 10
    assert 0 < float(run.final.tallies["events"]) <= 10


def test_a_state_whose_face_is_lost_selects_it_again():
    problem, rule = linear(X, Y), flow("linf")
    state = fs.simulate(problem, rule, zeros(1, 6), until=fs.lam([10.0]), strict=True).final
    again = fs.simulate(
        problem, rule, replace(state, memory={}), until=fs.lam([50.0]), strict=True
    ).final
    on = fs.simulate(problem, rule, state, until=fs.lam([50.0]), strict=True).final
    s = float(min(a.readings["arclength"] for a in (again, on)))
    assert s > 0
    np.testing.assert_allclose(again.w / again.readings["lam"], on.w / on.readings["lam"], rtol=0.2)
