"""Every measurement against a computation by hand."""

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
NORMS = {"l1": (fs.L1(), 6.0), "l2": (fs.L2(), math.sqrt(14)), "linf": (fs.Linf(), 3.0)}
KINDS = ("norm", "dual", "alignment", "margin", "soft_margin")
DUALS = {
    "l1": lambda h: max(map(abs, h)),
    "l2": lambda h: math.hypot(*h),
    "linf": lambda h: sum(map(abs, h)),
}


def measure(problem, w=W, **options):
    state = initial_state(problem, w)
    return {name: f(problem, state) for name, f in diagnostics.standard(problem, **options).items()}


def tiny(loss=fs.exponential):
    return fs.Problem(fs.MLP([2, 1, 1]), X, Y, loss)


@pytest.mark.parametrize("norm", NORMS)
def test_norms_margins_and_alignment_by_hand(norm):
    size = NORMS[norm][1]
    found = {name: float(value) for name, value in measure(tiny()).items()}
    terms = [math.exp(-3), math.exp(6), 1.0]
    total = sum(terms)
    assert found[f"norm_{norm}"] == pytest.approx(size)
    assert found[f"margin_{norm}"] == pytest.approx(-6 / size**2)
    assert found[f"soft_margin_{norm}"] == pytest.approx(-math.log(total) / size**2)
    # ∇f = (a x, relu⟨v, x⟩) where ⟨v, x⟩ > 0, and h = Σ p_i y_i ∇f_i
    p, q = terms[0] / total, terms[1] / total
    h = [3 * p, -3 * q, p - 2 * q]
    inner = h[0] + 2 * h[1] + 3 * h[2]
    assert found[f"alignment_{norm}"] == pytest.approx(inner / (size * DUALS[norm](h)))


@pytest.mark.parametrize("norm", [fs.L1(), fs.L2(), fs.Linf()])
def test_alignment_is_at_most_one_and_one_along_the_gradient_of_a_linear_model(norm):
    net = fs.MLP([2, 4, 1])
    problem = fs.Problem(net, X, Y, fs.exponential)
    w = net.init(range(20))
    assert (
        diagnostics.alignment(norm)(problem, initial_state(problem, w)).abs() <= 1 + 1e-12
    ).all()
    single = fs.Problem(fs.Linear(2), [[3.0, 1.0]], [1], fs.exponential)
    along = norm.bind(single.layout).steepest(torch.tensor([[3.0, 1.0]], dtype=torch.float64))
    assert float(
        diagnostics.alignment(norm)(single, initial_state(single, 7 * along))
    ) == pytest.approx(1, rel=1e-12)


def test_normalised_measurements_do_not_depend_on_scale_where_they_should_not():
    problem = fs.Problem(fs.MLP([2, 4, 1]), X, Y, fs.exponential)
    w = problem.net.init(range(3))
    small, large = measure(problem, w), measure(problem, 5 * w)
    for norm in NORMS:
        torch.testing.assert_close(
            large[f"margin_{norm}"], small[f"margin_{norm}"], rtol=1e-12, atol=0
        )
        torch.testing.assert_close(
            large[f"norm_{norm}"], 5 * small[f"norm_{norm}"], rtol=1e-12, atol=0
        )


def test_names_of_the_standard_measurements():
    by_norm = {f"{what}_{norm}" for norm in NORMS for what in KINDS}
    others = {"entropy", "support", "accuracy"}
    assert set(diagnostics.standard(tiny())) == by_norm | others
    assert set(diagnostics.standard(tiny(), test=(X, Y))) == by_norm | others | {"test_accuracy"}
    only = diagnostics.standard(tiny(), norms=[fs.Lp(3)])
    name = fs.Lp(3).name
    assert set(only) == {f"{what}_{name}" for what in KINDS} | others


def test_squared_loss_has_no_margins_to_measure():
    problem = fs.Problem(fs.MLP([2, 1, 1]), X, Y, fs.squared)
    found = measure(problem)
    assert set(found) == {
        f"{what}_{norm}" for norm in NORMS for what in ("norm", "dual", "alignment")
    }
    assert all(torch.isfinite(value).all() for value in found.values())


def test_loss_without_an_inverse_leaves_the_soft_margin_out():
    cubic = fs.exponential_tail(lambda u: u + u**3, lambda u: 1 + 3 * u**2)
    names = set(diagnostics.standard(tiny(cubic)))
    assert "margin_l2" in names
    assert not any(name.startswith("soft_margin") for name in names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_number_for_each_trajectory_on_the_dtype_of_the_weights(dtype):
    problem = fs.Problem(fs.MLP([2, 4, 1]), X, Y, fs.logistic)
    w = problem.net.init(range(5)).to(dtype)
    for value in measure(problem.like(w), w, test=(X, Y)).values():
        assert value.shape == (5,)
        assert value.dtype == dtype or not value.is_floating_point()  # a count
        assert torch.isfinite(value).all()


@pytest.mark.parametrize("loss", [fs.exponential, fs.logistic])
@pytest.mark.parametrize("net", [fs.Linear(2), fs.MLP([2, 4, 1])], ids=["linear", "relu"])
def test_at_zero_weights_margins_are_nan_and_nothing_is_raised(net, loss):
    problem = fs.Problem(net, X, Y, loss)
    found = measure(problem, torch.zeros(1, net.size, dtype=torch.float64))
    for norm in NORMS:
        assert torch.isnan(found[f"margin_{norm}"]).all()
        assert torch.isnan(found[f"alignment_{norm}"]).all()
        assert not torch.isfinite(found[f"soft_margin_{norm}"]).any()
        assert float(found[f"norm_{norm}"]) == 0
    assert float(found["entropy"]) == pytest.approx(math.log(3))
    assert float(found["accuracy"]) == 0


def test_measurements_survive_losses_beyond_the_number_format():
    problem = fs.Problem(fs.Linear(2), [[1.0, 0.0], [0.0, 1.0]], [1, 1], fs.logistic)
    w = torch.tensor([[1e6, 1e6]], dtype=torch.float64)
    found = measure(problem, w)
    assert float(found["margin_linf"]) == 1
    assert float(found["soft_margin_linf"]) == pytest.approx(1 - math.log(2) / 1e6, rel=1e-14)
    assert float(found["alignment_linf"]) == pytest.approx(1, rel=1e-12)
    assert float(found["entropy"]) == pytest.approx(math.log(2))


def test_the_standard_measurements_take_one_gradient_at_each_save(monkeypatch):
    problem, calls = tiny(), []
    own = fs.Problem.ascent
    monkeypatch.setattr(fs.Problem, "ascent", lambda self, w: (calls.append(1), own(self, w))[1])
    found = diagnostics.standard(problem)
    for state in (initial_state(problem, W), initial_state(problem, 2 * W)):
        for f in found.values():
            f(problem, state)
    assert len(calls) == 2
