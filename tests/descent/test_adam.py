"""Adam and its relatives: step for step those of torch.optim, and right where those fail."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import flowsim as fs
from flowsim.descent.rule import begin

X, Y = fs.data.gaussian_separable(20, 5, margin=0.5, seed=range(2))
NET = fs.MLP([5, 8, 1], activation=fs.relu)
# max-margin problem with three exact solutions: 17/15 in l1, sqrt(53/17) in l2, 5/2 in linf
FIXTURE = torch.tensor([[3, 1, 0], [1, -2, 2], [1, 2, 1]]).double()
BEST = {"l1": 17 / 15, "l2": math.sqrt(53 / 17), "linf": 2.5}


def row(values):
    return torch.tensor(values, dtype=torch.float64)


def setting(loss=fs.exponential, rows=slice(None)):
    return fs.Problem(NET, X[rows], Y[rows], loss), NET.init(range(2))[rows]


def linear(loss=fs.logistic):
    return fs.Problem(fs.Linear(3), FIXTURE, torch.ones(3), loss), torch.zeros(1, 3).double()


@dataclass(frozen=True)
class Pull:
    """F(w) = −⟨h, w⟩ + const with a level that may be that of a tiny loss: every gradient is
    −e^{−lam}h, or −h."""

    h: torch.Tensor
    level: float = 0.0
    logarithmic: bool = True
    degree: float = 1.0
    kinks: bool = False
    convex: bool = True

    @property
    def size(self):
        return len(self.h)

    @property
    def layout(self):
        return fs.Quadratic(torch.eye(self.size), torch.ones(self.size)).layout

    def ascent(self, w):
        return torch.full_like(w[:, 0], self.level), self.h.expand_as(w).clone()

    def lam(self, w):
        return self.ascent(w)[0]

    def check_weights(self, w):
        pass

    def select(self, rows):
        return self

    def like(self, w):
        return self


# Step for step


def torch_path(make, problem, w0, steps):
    """The same training by torch.optim, on the sum loss by autograd."""
    rows = []
    for b, start in enumerate(w0):
        w = start.clone().requires_grad_()
        optimiser, path = make([w]), [start]
        for _ in range(steps):
            optimiser.zero_grad()
            q = Y[b] * (torch.relu(X[b] @ w[:40].view(8, 5).T) @ w[40:])
            loss = (
                torch.exp(-q)
                if problem.loss is fs.exponential
                else torch.nn.functional.softplus(-q)
            )
            loss.sum().backward()
            optimiser.step()
            path.append(w.detach().clone())
        rows.append(torch.stack(path))
    return torch.stack(rows, 1)


PAIRS = {
    "Adam": (fs.Adam(1e-2), lambda p: torch.optim.Adam(p, lr=1e-2)),
    "Adam, large eps": (
        fs.Adam(3e-2, betas=(0.8, 0.99), eps=0.1),
        lambda p: torch.optim.Adam(p, lr=3e-2, betas=(0.8, 0.99), eps=0.1),
    ),
    "AdamW": (fs.AdamW(1e-2, decay=0.1), lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1)),
    "RMSProp": (fs.RMSProp(1e-3), lambda p: torch.optim.RMSprop(p, lr=1e-3)),
    "AdaGrad": (fs.AdaGrad(1e-2), lambda p: torch.optim.Adagrad(p, lr=1e-2)),
}


@pytest.mark.parametrize("loss", [fs.exponential, fs.logistic], ids=lambda loss: loss.name)
@pytest.mark.parametrize("name", PAIRS)
def test_step_for_step_as_torch(name, loss):
    problem, w0 = setting(loss)
    rule, make = PAIRS[name]
    run = fs.simulate(problem, rule, w0, until=fs.steps(range(1, 201)), strict=True)
    path = torch_path(make, problem, w0, 200)
    difference = (torch.from_numpy(run.weights) - path).abs().amax((1, 2)) / path.abs().amax((1, 2))
    assert difference.max() <= 1e-12


def test_without_bias_correction_the_first_step_is_that_of_the_plain_averages():
    problem, w0 = setting()
    run = fs.simulate(problem, fs.Adam(0.1, eps=0, corrected=False), w0, until=fs.steps([1]))
    sign = problem.ascent(w0)[1].sign()
    assert torch.allclose(run.final.w - w0, 0.1 * 0.1 / math.sqrt(0.001) * sign, rtol=1e-12)


# Every scale of the gradient


def trained(problem, rule, w0, steps):
    return fs.simulate(problem, rule, w0, until=fs.steps([steps]), strict=True).final.w


@pytest.mark.parametrize("steps", [500, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "rule", [fs.Adam(1e-3, eps=0.0), fs.RMSProp(1e-3, eps=0.0), fs.AdaGrad(1e-2, eps=0.0)]
)
def test_without_eps_a_factor_of_the_loss_changes_nothing(rule, steps):
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(4, 4, generator=generator).double()
    H, target = A @ A.T + torch.eye(4), torch.randn(4, generator=generator).double() * 100
    w0 = torch.zeros(1, 4).double()
    whole = trained(fs.Quadratic(H, target), rule, w0, steps)
    assert whole.abs().max() > 0.1
    small = trained(fs.Quadratic(1e-200 * H, target), rule, w0, steps)
    assert torch.allclose(small, whole, rtol=1e-9)


@pytest.mark.parametrize("level", [0.0, 300.0, 5000.0, 1e6])
@pytest.mark.parametrize("factor", [1.0, 1e-200])
def test_without_eps_every_coordinate_moves_by_the_learning_rate_at_any_loss(level, factor):
    """Down to a gradient of e^{−10⁶}·1e-200, also where coordinates differ by 280 orders; those
    without stay."""
    pull = Pull(factor * row([1.0, -1e-100, 1e-100, 0.0]), level)
    w = trained(pull, fs.Adam(0.01, eps=0.0), torch.zeros(1, 4).double(), 30)
    assert torch.allclose(w, 0.3 * row([1.0, -1.0, 1.0, 0.0]), rtol=1e-10)
    wide = Pull(row([1.0, -1e-280]), level)
    assert torch.allclose(
        trained(wide, fs.Adam(0.01, eps=0.0), torch.zeros(1, 2).double(), 30).abs(), w.abs()[:, :2]
    )


@pytest.mark.parametrize("size", [1.0, 1e-7, 1e-8, 1e-10, 1e-17])
def test_eps_acts_on_the_true_gradient(size):
    """A constant gradient g moves a weight by η|g|/(|g| + ε), whether it is g = h or g =
    e^{−Λ}h."""
    for pull in (Pull(row([size])), Pull(row([1.0]), -math.log(size))):
        w = trained(pull, fs.Adam(1.0, eps=1e-8), torch.zeros(1, 1).double(), 1)
        assert float(w) == pytest.approx(size / (size + 1e-8), rel=1e-10)


def test_eps_acts_on_gradients_that_no_float_holds():
    """g = e^{−720}·1e-10 is below the smallest number; with ε = 1e-300 the step is still g/ε =
    1e-22·e^{-…}."""
    pull = Pull(row([1e-10]), 720.0)
    w = trained(pull, fs.Adam(1.0, eps=1e-300), torch.zeros(1, 1).double(), 1)
    assert math.log(float(w)) == pytest.approx(
        -720 + math.log(1e-10) + 300 * math.log(10), rel=1e-10
    )


@pytest.mark.parametrize(
    "rule", [fs.Adam(0.1, eps=0.0), fs.Adam(0.1), fs.AdaGrad(0.1), fs.RMSProp(0.1)]
)
def test_nothing_is_infinite_at_a_gradient_of_1e_minus_170(rule):
    pull = Pull(row([1e-170, 0.0]), logarithmic=False)
    final = fs.simulate(pull, rule, torch.ones(1, 2).double(), until=fs.steps([20])).final
    for name, value in final.tensors().items():
        assert torch.isfinite(value).all() or name == "step_size", name


def test_a_loss_that_falls_faster_than_the_averages_forget_does_not_overflow():
    """Λ rises by 400 a step; the moments are e^{400} times the new gradient."""
    problem = fs.Problem(fs.Linear(1), [[1.0]], [1], fs.exponential)
    rule = fs.Adam(400.0, eps=0.0)
    run = fs.simulate(
        problem, rule, torch.zeros(1, 1).double(), until=fs.steps(range(1, 40)), strict=True
    )
    m, v, path = 0.0, 0.0, [0.0]  # in units of e^{−path[k]}, by logarithms
    assert np.isfinite(run.weights).all()
    # after the first step only the memory of it is left: m/a = β₁ᵏ⁻¹(1 − β₁)/(1 − β₁ᵏ), √v likewise
    for k in range(1, 40):
        m, v = 0.9 ** (k - 1) * 0.1 / (1 - 0.9**k), 0.999 ** (k - 1) * 0.001 / (1 - 0.999**k)
        path.append(path[-1] + 400 * m / math.sqrt(v))
    assert np.allclose(run.weights[:, 0, 0], path, rtol=1e-12)


def test_adam_goes_on_at_a_loss_of_e_to_the_minus_5000():
    problem, _ = linear()
    w0 = row([2000.0, 500.0, 2000.0])[None]
    run = fs.simulate(problem, fs.Adam(1.0, eps=0.0), w0, until=fs.steps([50]), strict=True)
    assert run["lam"][0, 0] > 4900
    assert run["lam"][-1, 0] > run["lam"][0, 0] + 10


# Where they tend to


def margins():
    return {norm.name: fs.diagnostics.margin(norm) for norm in (fs.L1(), fs.L2(), fs.Linf())}


@pytest.mark.parametrize(
    ("rule", "own", "share"),
    [
        (fs.Adam(fs.Decay(0.3, power=0.5), betas=(0.9, 0.9), eps=0.0), "linf", 0.985),
        (fs.GradientDescent(fs.LossBased(0.05)), "l2", 0.999),
        (fs.CoordinateDescent(fs.LossBased(0.02)), "l1", 0.99),
    ],
    ids=["Adam", "gradient", "coordinate"],
)
def test_each_rule_raises_the_margin_of_its_own_norm_towards_the_best_one(rule, own, share):
    problem, w0 = linear()
    run = fs.simulate(
        problem, rule, w0, until=fs.steps([100, 1000, 3000]), observe=margins(), strict=True
    )
    reached = {name: run[name][1:, 0] / BEST[name] for name in BEST}
    assert (np.diff(reached[own]) > 0).all()
    assert share < reached[own][-1] <= 1 + 1e-12
    assert own == "linf" or reached["linf"][-1] < 0.9


def test_adamw_at_rest_solves_the_problem_in_a_ball():
    problem, w0 = linear()
    gap = fs.frank_wolfe_gap(fs.Linf(), 2.0)
    rule = fs.AdamW(fs.Decay(1.0, power=0.7), decay=0.5, betas=(0.9, 0.9), eps=1e-8)
    run = fs.simulate(
        problem, rule, w0, until=fs.steps([10, 3000]), observe={"gap": gap}, strict=True
    )
    assert run.final.w.abs().max() <= 2 + 1e-3
    assert abs(run["gap"][-1, 0]) <= 1e-3 < run["gap"][0, 0]
    # the same problem by projected gradient descent
    w = w0
    for _ in range(4000):
        lam, h = problem.ascent(w)
        w = (w + 0.1 * torch.exp(-lam)[:, None] * h).clamp(-2, 2)
    assert float(problem.lam(run.final.w)) == pytest.approx(float(problem.lam(w)), abs=1e-2)
    assert float(gap(problem, begin(problem, fs.Linf(), w))) <= 1e-8


# Clocks, memory, batch


def test_time_is_the_sum_of_learning_rates_and_for_a_sum_of_squares_the_sum_of_their_squares():
    problem, w0 = setting()
    run = fs.simulate(problem, fs.Adam(1e-3), w0, until=fs.steps([40]))
    assert np.exp(run["log_time"][-1]) == pytest.approx(40e-3, rel=1e-12)
    run = fs.simulate(problem, fs.AdaGrad(1e-2), w0, until=fs.steps([40]))
    assert np.exp(run["log_time"][-1]) == pytest.approx(40e-4, rel=1e-12)


def test_arclength_is_the_path_in_linf():
    problem, w0 = setting()
    run = fs.simulate(problem, fs.AdamW(1e-2, decay=0.3), w0, until=fs.steps(range(1, 21)))
    lengths = np.abs(np.diff(run.weights, axis=0)).max(-1)
    assert run["arclength"][-1] == pytest.approx(lengths.sum(0), rel=1e-11)


def test_small_steps_of_adam_tend_to_the_flow_of_its_eps():
    """w' = −g/(|g| + ε) on one weight with 𝓛 = e^{−w}: with u = e^w, t = w + ε(u − 1)."""
    problem, eps, errors = fs.Problem(fs.Linear(1), [[1.0]], [1], fs.exponential), 0.5, []
    for lr in (0.02, 0.01, 0.005):
        rule = fs.Adam(lr, betas=(0.0, 0.0), eps=eps)
        run = fs.simulate(
            problem, rule, torch.zeros(1, 1).double(), until=fs.steps([round(2 / lr)])
        )
        w = float(run.final.w)
        errors.append(abs(w + eps * (math.exp(w) - 1) - 2.0))
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.1)
    assert errors[1] / errors[2] == pytest.approx(2, abs=0.1)


RULES = [fs.Adam(1e-2), fs.AdamW(1e-2, eps=0.0), fs.RMSProp(1e-3), fs.AdaGrad(1e-2)]


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_a_resumed_run_is_the_unbroken_one(rule, tmp_path):
    problem, w0 = setting()
    whole = fs.simulate(problem, rule, w0, until=fs.steps([20, 50])).final
    fs.simulate(problem, rule, w0, until=fs.steps([20]), directory=tmp_path)
    rest = fs.simulate(problem, rule, fs.load(tmp_path).final, until=fs.steps([50])).final
    for name, value in whole.tensors().items():
        if name not in (
            "tallies.gradients",
            "step_size",
        ):  # the start of a run is one more gradient
            assert torch.equal(value, rest.tensors()[name]), name


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_a_trajectory_alone_is_the_trajectory_in_a_batch(rule, agree):
    problem, w0 = setting()
    batch = fs.simulate(problem, rule, w0, until=fs.lam([-2.5, -2.0]), max_steps=60).final
    for b in range(2):
        part = fs.simulate(
            *_first(setting(rows=slice(b, b + 1)), rule), until=fs.lam([-2.5, -2.0]), max_steps=60
        )
        for name, value in part.final.tensors().items():
            agree(value[0], batch.tensors()[name][b])


def _first(pair, rule):
    return pair[0], rule, pair[1]


def test_a_rule_of_another_kind_begins_a_memory_of_its_own():
    problem, w0 = setting()
    adam = fs.simulate(problem, fs.Adam(1e-2), w0, until=fs.steps([20])).final
    after = fs.simulate(problem, fs.AdaGrad(1e-2), adam, until=fs.steps([30])).final
    anew = fs.simulate(problem, fs.AdaGrad(1e-2), adam.w, until=fs.steps([10])).final
    assert torch.equal(after.w, anew.w)
    assert after.readings["steps"].tolist() == [30.0, 30.0]


def test_a_diverging_run_is_a_status_with_the_path_kept():
    bowl = fs.Quadratic(torch.eye(2), row([1.0, 2.0]))
    run = fs.simulate(
        bowl, fs.AdamW(1.0, decay=3.0), torch.ones(1, 2).double(), until=fs.steps(range(1, 2000))
    )
    assert run.statuses == [fs.Status.NONFINITE]
    taken = int(run.final.readings["steps"])
    assert 0 < taken < 2000
    assert np.isfinite(run.weights[: taken + 1]).all()
    assert np.isnan(run.weights[taken + 1 :]).all()
    assert all(
        torch.isfinite(run.final.memory[name]).all() for name in ("first", "second", "frame")
    )


def test_single_precision_has_room_for_squares_too():
    pull = Pull(torch.tensor([1.0, -1e-15]), 3000.0)
    assert torch.allclose(
        trained(pull, fs.Adam(0.01, eps=0.0), torch.zeros(1, 2), 30).abs(), torch.tensor(0.3)
    )


# Errors and options


@pytest.mark.parametrize("make", [fs.Adam, fs.AdamW, fs.RMSProp, fs.AdaGrad])
@pytest.mark.parametrize("lr", [0, -1.0, math.nan, "fast"])
def test_a_learning_rate_is_positive(make, lr):
    with pytest.raises(
        ValueError, match=f"{make.__name__}: got lr=.*expected a finite number > 0 or a schedule"
    ):
        make(lr)


@pytest.mark.parametrize(
    "betas", [(1.0, 0.9), (0.9, 1.0), (-0.1, 0.9), (0.9, 2), ("a", 0.9), (True, 0.9)]
)
def test_betas_are_below_one(betas):
    with pytest.raises(ValueError, match=r"Adam: got beta[12]=.*expected a number in \[0, 1\)"):
        fs.Adam(betas=betas)


@pytest.mark.parametrize("betas", [0.9, (0.9,), None])
def test_betas_are_two(betas):
    with pytest.raises(ValueError, match="Adam: got betas=.*expected two numbers"):
        fs.Adam(betas=betas)


def test_eps_and_decay_are_not_negative():
    with pytest.raises(ValueError, match="Adam: got eps=-1e-08.*expected a finite number ≥ 0"):
        fs.Adam(eps=-1e-8)
    with pytest.raises(ValueError, match="AdamW: got decay=inf"):
        fs.AdamW(decay=math.inf)


@pytest.mark.parametrize(
    "other",
    [
        fs.Adam(2e-2),
        fs.Adam(1e-2, betas=(0.5, 0.999)),
        fs.Adam(1e-2, betas=(0.9, 0.9)),
        fs.Adam(1e-2, eps=0.1),
        fs.Adam(1e-2, corrected=False),
        fs.AdamW(1e-2, decay=0.1),
        fs.Adam(fs.Decay(1e-2)),
    ],
)
def test_every_option_changes_the_result(other):
    problem, w0 = setting()
    assert not torch.equal(trained(problem, fs.Adam(1e-2), w0, 9), trained(problem, other, w0, 9))
