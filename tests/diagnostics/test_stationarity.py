"""KKT conditions by hand, at exact KKT points, and certificates near points that are none."""

import math
from dataclasses import replace

import pytest
import torch

import flowsim as fs
from flowsim import diagnostics
from flowsim.diagnostics.stationarity import Stationarity
from flowsim.motion.state import initial_state

FIXTURE = fs.Problem(fs.Linear(3), [[3, 1, 0], [1, -2, 2], [1, 2, 1]], [1, 1, 1], fs.exponential)
NET, W0 = fs.data.peers_net(5, 10, 10, seed=0)
NORMS = [
    fs.L1(),
    fs.L2(),
    fs.Linf(),
    fs.Lp(3.0),
    fs.Mahalanobis(torch.linspace(0.5, 2, 60, dtype=torch.float64)),
]
MATRIX = [
    fs.modular(NET.layout),
    fs.Sum(fs.Nuclear()),
    fs.Euclidean({"W1": fs.Linf(), "W2": fs.L2()}),
]


@pytest.fixture(scope="module")
def slid():
    final = fs.simulate(NET, fs.SteepestFlow(fs.L2(), rtol=1e-2), W0, until=fs.lam([15.0])).final
    assert int(final.tallies["sliding"]) > 5
    return final


def state(problem, w):
    return initial_state(problem, torch.as_tensor(w, dtype=torch.float64).reshape(1, -1))


def ray(net, direction, lam):
    """A point far out on a ray."""
    return state(net, lam * torch.tensor(direction, dtype=torch.float64))


def test_two_examples_by_hand():
    problem = fs.Problem(fs.Linear(2), [[1.0, 0.0], [0.0, 1.0]], [1, 1], fs.exponential)
    at = Stationarity.of(problem, state(problem, [2.0, 4.0]), fs.L2())
    p = 1 / (1 + math.exp(-2))
    h = math.hypot(p, 1 - p)
    scale = math.hypot(2, 4) / h * 2 ** (1 - 2)  # ‖w‖/‖h‖ q^(1 − 2/L), L = 1
    assert at.multipliers[0].tolist() == pytest.approx([scale * p, scale * (1 - p)])
    assert at.w[0].tolist() == pytest.approx([1.0, 2.0])
    assert float(at.slack) == pytest.approx(scale * (1 - p))
    assert float(at.alignment) == pytest.approx((2 * p + 4 * (1 - p)) / (math.sqrt(20) * h))
    force = torch.tensor([p, 1 - p], dtype=torch.float64) * math.sqrt(5) / h
    assert float(at.divergence) == pytest.approx(0.5 * float((force - at.w[0]).square().sum()))
    assert at.residual()[0].tolist() == pytest.approx(
        [float((force - at.w[0]).norm()) / math.sqrt(5)]
    )


@pytest.mark.parametrize(
    ("norm", "w", "p"),
    [
        (fs.L1(), [5, 2, 8], [1, 3, 11]),
        (fs.L2(), [17, 6, 24], [0, 7, 10]),
        (fs.Linf(), [4, 1, 4], [0, 1, 1]),
    ],
    ids=lambda v: getattr(v, "name", ""),
)
def test_at_the_largest_margin_of_a_linear_model_the_flow_shows_its_multipliers(norm, w, p):
    """On the ray of the solution, softmax weights can be set right by a finite displacement."""
    run = fs.simulate(
        FIXTURE, fs.SteepestFlow(norm), torch.zeros(1, 3).double(), until=fs.lam([1e4])
    )
    at = Stationarity.of(FIXTURE, run.final, norm)
    share = at.multipliers[0] / at.multipliers[0].sum()
    assert share.tolist() == pytest.approx([v / sum(p) for v in p], abs=2e-3)
    direction = at.w[0] / norm.value(at.w)
    assert direction.tolist() == pytest.approx(
        [v / float(norm.value(torch.tensor(w).double())) for v in w], abs=2e-3
    )
    assert float(1 - at.alignment) < 1e-3
    assert float(at.slack) < 1e-2
    assert float(at.residual(0.05)[1]) < 0.05


@pytest.mark.parametrize("norm", [fs.L1(), fs.Linf(), fs.modular(NET.layout)], ids=lambda n: n.name)
def test_the_curve_over_tolerances_falls_from_order_one_to_nothing(norm, slid):
    at = Stationarity.of(NET, slid, norm)
    _, curve = at.residuals([0.0, 1e-3, 1e-2, 0.1, 0.5, 1.0])
    assert curve.shape == (6, 1)
    assert curve[0] > 0.5
    assert (curve.diff(dim=0) <= 1e-9).all()
    assert curve[-1] < 0.5 * curve[0]


def test_in_l2_the_residual_is_the_alignment(slid):
    at = Stationarity.of(NET, slid, fs.L2())
    for part in at.residual():
        assert float(part) == pytest.approx(math.sqrt(2 * float(1 - at.alignment)), rel=1e-9)


def test_the_distance_in_linf_is_the_least_over_the_simplex():
    from scipy.optimize import linprog

    problem = fs.Problem(
        fs.Linear(4), [[1.0, 2.0, -1.0, 0.5], [2.0, -1.0, 0.3, 1.0]], [1, 1], fs.exponential
    )
    at = Stationarity.of(problem, state(problem, [1.0, 0.98, -0.5, 0.97]), fs.Linf())
    unit, tied = (at.force / at.size)[0].numpy(), [0, 1, 3]
    goal = [0.0] * 3 + [1.0] * 4  # min Σ t, −t ≤ unit − e·μ ≤ t, μ on the simplex
    spread = torch.zeros(4, 3).double()
    for column, row in enumerate(tied):
        spread[row, column] = 1.0
    eye = torch.eye(4).double()
    rows = torch.cat([torch.cat([-spread, -eye], 1), torch.cat([spread, -eye], 1)]).numpy()
    found = linprog(goal, rows, [*-unit, *unit], [[1.0] * 3 + [0.0] * 4], [1.0])
    assert float(at.residual(0.05)[1]) == pytest.approx(found.fun, rel=1e-9)


def test_the_divergence_does_not_depend_on_the_subgradient():
    """At a corner of the ℓ∞ ball, any k ∈ ∂½‖w‖² gives the same."""
    problem = fs.Problem(fs.Linear(2), [[1.0, 0.2], [0.3, 1.0]], [1, 1], fs.exponential)
    at = Stationarity.of(problem, state(problem, [3.0, 3.0]), fs.Linf())
    for share in (0.0, 0.3, 1.0):
        k = at.size * torch.tensor([share, 1 - share], dtype=torch.float64)
        value = (
            0.5 * at.norm.dual(at.force) ** 2
            - 0.5 * at.norm.dual(k) ** 2
            - (at.w * (at.force - k)).sum(-1)
        )
        assert float(value) == pytest.approx(float(at.divergence), abs=1e-12)


def test_what_is_not_separated_has_no_multipliers():
    problem = fs.Problem(fs.Linear(2), [[1.0, 0.0], [0.0, 1.0]], [1, 1], fs.exponential)
    w = torch.tensor([[1.0, -1.0], [1.0, 1.0]], dtype=torch.float64)
    both = initial_state(problem, w)
    for measure in (diagnostics.divergence, diagnostics.slackness, diagnostics.residual):
        assert torch.isnan(measure(fs.L2())(problem, both)).tolist() == [True, False]
    assert torch.isnan(diagnostics.multipliers(fs.L2())(problem, both)).all(-1).tolist() == [
        True,
        False,
    ]
    with pytest.raises(ValueError, match="misclassified, expected none; try"):
        Stationarity.of(problem, both, fs.L2()).nearby()


@pytest.mark.parametrize("norm", [*NORMS, *MATRIX], ids=lambda n: n.name)
def test_in_every_norm_only_what_is_separated_has_a_residual(norm, slid):
    """A net that has separated the data, its start, which has not, and zero weights, in one
    batch."""
    three = initial_state(NET, torch.cat([slid.w, W0, torch.zeros_like(W0)]))
    at = Stationarity.of(NET, three, norm)
    for value in (*at.residual(0.01), at.divergence, at.slack, at.size):
        assert torch.isnan(value).tolist() == [False, True, True]


def test_a_regression_has_no_margins():
    problem = fs.Problem(fs.Linear(2), [[1.0, 0.0]], [0.5], fs.squared)
    with pytest.raises(ValueError, match="squared loss, which has no margins; try"):
        Stationarity.of(problem, initial_state(problem, torch.ones(1, 2).double()), fs.L2())


def test_multipliers_serve_as_observers():
    observe = {"lambda": diagnostics.multipliers(fs.L2()), "D": diagnostics.divergence(fs.L2())}
    run = fs.simulate(
        FIXTURE,
        fs.SteepestFlow(fs.L2()),
        torch.ones(1, 3).double(),
        until=fs.lam(20),
        observe=observe,
    )
    assert run["lambda"].shape == (100, 1, 3)
    assert run["D"][-1, 0] < run["D"][1, 0]


def test_autograds_element_is_farther_from_stationary_than_the_selected_one(slid):
    own, other = (Stationarity.of(NET, s, fs.L2()) for s in (slid, replace(slid, multipliers=None)))
    assert float(other.divergence) > 2 * float(own.divergence)
