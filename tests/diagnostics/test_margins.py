"""Margins, entropies and accuracies against a computation by hand."""

import math

import pytest
import torch

import flowsim as fs
from flowsim import diagnostics
from flowsim.motion.state import initial_state

# f(x; w) = a·relu(⟨v, x⟩) with v = (1, 2), a = 3: outputs 3, 6, 0 and margins 3, −6, 0
X = [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]
Y = [1, -1, 1]
W = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)


def measure(problem, w=W, **options):
    state = initial_state(problem, w)
    return {name: f(problem, state) for name, f in diagnostics.standard(problem, **options).items()}


def tiny(loss=fs.exponential):
    return fs.Problem(fs.MLP([2, 1, 1]), X, Y, loss)


def test_soft_margin_of_the_logistic_loss_by_hand():
    total = sum(math.log1p(math.exp(-q)) for q in (3, -6, 0))
    found = float(measure(tiny(fs.logistic))["soft_margin_linf"])
    assert found == pytest.approx(-math.log(math.expm1(total)) / 9)


def test_entropy_and_accuracy_by_hand():
    found = measure(tiny())
    p = torch.softmax(torch.tensor([-3.0, 6.0, 0.0], dtype=torch.float64), 0)
    assert float(found["entropy"]) == pytest.approx(float(-(p * p.log()).sum()))
    assert float(found["accuracy"]) == pytest.approx(1 / 3)  # a margin of zero is not correct


def test_entropy_is_log_n_for_equal_margins_and_zero_for_one_support_vector():
    problem = fs.Problem(fs.Linear(2), [[1.0, 0.0], [0.0, 1.0]], [1, 1], fs.exponential)
    w = torch.tensor([[5.0, 5.0], [1e6, 1.0]], dtype=torch.float64)
    assert diagnostics.entropy(problem, initial_state(problem, w)).tolist() == pytest.approx(
        [math.log(2), 0.0], abs=1e-15
    )


def test_multi_class_margins_by_hand():
    net = fs.Linear(1, 3)
    w = torch.tensor([[3.0, 1.0, 2.0]], dtype=torch.float64)
    for loss in (fs.cross_entropy, fs.pairwise_exponential):
        found = measure(fs.Problem(net, [[1.0], [2.0]], [0, 2], loss), w)
        assert float(found["margin_linf"]) == pytest.approx(-2 / 3)
        assert float(found["accuracy"]) == 0.5


def test_accuracy_on_a_test_set():
    found = measure(tiny(), test=([[1.0, 1.0], [0.0, 2.0], [1.0, -1.0], [2.0, 0.0]], [1, 1, 1, -1]))
    assert float(found["test_accuracy"]) == 0.5
    assert float(found["accuracy"]) == pytest.approx(1 / 3)


def test_each_trajectory_is_tested_on_its_own_test_set():
    train, test = (fs.data.digits(n=40, seed=range(3), part=part) for part in ("train", "test"))
    net = fs.MLP([64, 5, 1])
    problem = fs.Problem(net, *train, fs.logistic)
    w = net.init(range(3))
    found = measure(problem, w, test=test)
    for b in range(3):
        alone = fs.Problem(net, train.x[b], train.y[b], fs.logistic)
        expected = measure(alone, w[b : b + 1], test=(test.x[b], test.y[b]))
        for name in ("accuracy", "test_accuracy", "margin_l2", "entropy"):
            torch.testing.assert_close(
                found[name][b : b + 1], expected[name], rtol=1e-11, atol=1e-13
            )
        right = net.outputs(w[b : b + 1], test.x[b])[0, :, 0] * test.y[b] > 0
        assert float(found["test_accuracy"][b]) == pytest.approx(float(right.double().mean()))


def test_the_papers_names_are_dual():
    problem = tiny()
    found = {
        name: float(f(problem, initial_state(problem, W)))
        for name, f in diagnostics.paper(problem).items()
    }
    assert found["gamma_1"] == pytest.approx(-6 / 3**2)  # over ‖w‖_∞
    assert found["gamma_2"] == pytest.approx(-6 / 14)
    assert found["gamma_inf"] == pytest.approx(-6 / 6**2)
    assert found["gamma_sigma"] == pytest.approx(-6 / 3**2)  # spectral norms √5 and 3


def test_margins_by_layers_do_not_see_how_the_layers_are_scaled():
    problem = tiny()
    by_layer = diagnostics.layer_norms(fs.L2())(problem, initial_state(problem, W))
    assert by_layer[0].tolist() == pytest.approx([math.sqrt(5), 3])
    lyu_li = diagnostics.product_margin(fs.L2())
    assert float(lyu_li(problem, initial_state(problem, W))) == pytest.approx(
        -6 / (math.sqrt(5) * 3)
    )
    scaled = W * torch.tensor([10.0, 10.0, 0.3])
    torch.testing.assert_close(
        lyu_li(problem, initial_state(problem, scaled)), lyu_li(problem, initial_state(problem, W))
    )
    squared = fs.Problem(fs.MLP([2, 1, 1], activation=fs.squared_relu), X, Y, fs.exponential)
    value = lyu_li(
        squared, initial_state(squared, W)
    )  # f = 3 (2)² = 12 on the worst example, of degree 2 in the first layer
    assert float(value) == pytest.approx(-12 / (5 * 3))
    skip = fs.FunctionNet(
        lambda p, x: x @ (p["a"] * p["b"] + p["b"] ** 2), fs.layout.lay_out({"a": (2,), "b": (2,)})
    )
    mixed = fs.Problem(skip, X, Y, fs.exponential)
    assert torch.isnan(lyu_li(mixed, initial_state(mixed, mixed.net.init(0)))).all()


def test_support_vectors_and_the_distribution_of_margins():
    problem = fs.Problem(fs.Linear(1), [[1.0], [2.0], [4.0]], [1, 1, 1], fs.exponential)
    state = initial_state(problem, torch.tensor([[2.0], [0.5], [-1.0]], dtype=torch.float64))
    near = diagnostics.support_vectors(1.0)(
        problem, state
    )  # margins within log 10 = 2.3 of the least
    assert near.tolist() == [[True, True, False], [True, True, True], [False, False, False]]
    assert diagnostics.support_count(1.0)(problem, state).tolist() == [2, 3, 0]
    quantiles = diagnostics.margin_quantiles(fs.L2(), (0.0, 0.5, 1.0))(problem, state)
    assert quantiles.tolist() == [[1, 2, 4], [1, 2, 4], [-4, -2, -1]]
