"""Losses against naive formulas, and at margins where the naive formulas break down."""

import math

import pytest
import torch
from torch.nn import functional as F

import flowsim as fs


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaps(f, y):
    """f_y − f_j for every wrong class j, one trajectory."""
    return torch.stack(
        [f[i, y[i]] - f[i, j] for i in range(len(y)) for j in range(f.shape[1]) if j != y[i]]
    )


LOGISTIC_TAIL = fs.exponential_tail(
    lambda u: -torch.log(torch.log1p(torch.exp(-u))),
    lambda u: torch.sigmoid(-u) / torch.log1p(torch.exp(-u)),
    lambda lam: -torch.log(torch.expm1(torch.exp(-lam))),
    name="logistic again",
)
CUBIC_TAIL = fs.exponential_tail(lambda u: u + u**3, lambda u: 1 + 3 * u**2, name="cubic")

# name: (loss, outputs, total loss of one trajectory as a user would write it)
NAIVE = {
    "exponential": (fs.exponential, 1, lambda f, y: torch.exp(-y * f[:, 0]).sum()),
    "logistic": (fs.logistic, 1, lambda f, y: torch.log(1 + torch.exp(-y * f[:, 0])).sum()),
    "logistic tail": (LOGISTIC_TAIL, 1, lambda f, y: torch.log(1 + torch.exp(-y * f[:, 0])).sum()),
    "cubic tail": (
        CUBIC_TAIL,
        1,
        lambda f, y: torch.exp(-(y * f[:, 0]) - (y * f[:, 0]) ** 3).sum(),
    ),
    "cross-entropy": (fs.cross_entropy, 4, lambda f, y: F.cross_entropy(f, y, reduction="sum")),
    "cross-entropy of two": (
        fs.cross_entropy,
        2,
        lambda f, y: F.cross_entropy(f, y, reduction="sum"),
    ),
    "pairwise": (fs.pairwise_exponential, 4, lambda f, y: torch.exp(-gaps(f, y)).sum()),
    "squared": (fs.squared, 1, lambda f, y: 0.5 * (f - y).square().sum()),
    "squared of three": (fs.squared, 3, lambda f, y: 0.5 * (f - y).square().sum()),
}


def targets(loss, N, C):
    if loss.reading.targets == "values":
        return draw(9, N, C)
    labels = torch.randint(0, max(C, 2), (N,), generator=torch.Generator().manual_seed(9))
    return labels if loss.reading.targets == "classes" else 2.0 * labels - 1


@pytest.mark.parametrize("name", NAIVE)
@pytest.mark.parametrize("N", range(1, 10))
@pytest.mark.parametrize("own", [False, True])
def test_level_and_its_gradient_are_those_of_the_naive_sum(name, N, own):
    loss, C, naive = NAIVE[name]
    f = draw(N, 3, N, C)
    y = targets(loss, N, C)
    y = torch.stack([y, y.roll(1, 0), y.flip(0)]) if own else y
    lam, cotangent = loss.ascent(f, y)
    assert torch.equal(lam, loss.lam(f, y))
    for b in range(3):
        row = f[b].clone().requires_grad_()
        total = naive(row, y[b] if own else y)
        gradient = torch.autograd.grad(total, row)[0]
        torch.testing.assert_close(lam[b], -torch.log(total.detach()), rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(cotangent[b], -gradient / total.detach(), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", NAIVE)
def test_weights_are_shares_of_the_slopes(name):
    loss, C, _ = NAIVE[name]
    f, y = draw(1, 3, 5, C), targets(loss, 5, C)
    p = loss.weights(f, y)
    assert (p >= 0).all()
    torch.testing.assert_close(p.sum(-1), torch.ones(3, dtype=torch.float64))
    q, back = loss.reading.read(f, y)
    cotangent = back(p if loss.tail.decreasing else -torch.sign(q) * p)
    direction = loss.ascent(f, y)[1]
    torch.testing.assert_close(F.normalize(direction.flatten(1)), F.normalize(cotangent.flatten(1)))


def test_two_class_cross_entropy_is_logistic_loss_of_the_gap():
    f, y = draw(1, 3, 5, 2), torch.tensor([0, 1, 1, 0, 1])
    gap = (f[..., 1:] - f[..., :1]).clone()
    torch.testing.assert_close(
        fs.cross_entropy.lam(f, y), fs.logistic.lam(gap, 2.0 * y - 1), rtol=1e-12, atol=1e-13
    )


# --- scale: margins at which e^{−q} is zero or infinite ------------------------------------------

LARGE = [40.0, -40.0, 25.0, -25.0, 1e3, -1e3, 1e6, -1e6]


def log_logistic(q):
    """log log(1 + e^{−q}) with math's functions; for large q the series to second order."""
    if q > 30:
        return -q + math.log1p(-math.exp(-q) / 2)
    return math.log(math.log1p(math.exp(-q))) if q > 0 else math.log(-q + math.log1p(math.exp(q)))


@pytest.mark.parametrize("q", [*LARGE, 0.0, 29.9, 30.1, -1.0])
def test_level_of_one_example_is_exact_at_any_margin(q):
    f, y = torch.tensor([[[q]]], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    assert float(fs.exponential.lam(f, y)) == pytest.approx(q, rel=1e-15)
    assert float(fs.logistic.lam(f, y)) == pytest.approx(-log_logistic(q), rel=1e-12, abs=1e-14)
    two = torch.tensor([[[0.0, q]]], dtype=torch.float64)
    assert float(fs.cross_entropy.lam(two, y.long())) == pytest.approx(
        -log_logistic(q), rel=1e-12, abs=1e-14
    )
    assert float(fs.pairwise_exponential.lam(two, y.long())) == pytest.approx(q, rel=1e-15)


@pytest.mark.parametrize("q", [q for q in LARGE if q > 0])
def test_level_of_many_equal_margins_is_lower_by_log_n(q):
    f, y = torch.full((1, 50, 1), q, dtype=torch.float64), torch.ones(50, dtype=torch.float64)
    assert float(fs.exponential.lam(f, y)) == pytest.approx(q - math.log(50), rel=1e-12)
    assert float(fs.logistic.lam(f, y)) == pytest.approx(-log_logistic(q) - math.log(50), rel=1e-12)
    many = torch.zeros(1, 50, 3, dtype=torch.float64)
    many[..., 0] = q
    classes = torch.zeros(50, dtype=torch.long)
    assert float(fs.pairwise_exponential.lam(many, classes)) == pytest.approx(
        q - math.log(100), rel=1e-12
    )
    soft = -log_logistic(q - math.log(2)) - math.log(50)
    assert float(fs.cross_entropy.lam(many, classes)) == pytest.approx(soft, rel=1e-12)


@pytest.mark.parametrize("q", LARGE)
@pytest.mark.parametrize(
    "name", ["exponential", "logistic", "cross-entropy", "pairwise", "squared"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_never_underflows(name, q, dtype):
    loss, C, _ = NAIVE[name]
    f = (q * (1 + 0.01 * torch.rand(2, 4, C, generator=torch.Generator().manual_seed(0)))).to(dtype)
    y = targets(loss, 4, C).to(dtype) if loss.reading.targets != "classes" else targets(loss, 4, C)
    lam, cotangent = loss.ascent(f, y)
    assert lam.dtype == cotangent.dtype == dtype
    assert torch.isfinite(lam).all()
    assert torch.isfinite(cotangent).all()
    assert (cotangent.abs().amax((1, 2)) > 0).all()


def test_a_hopeless_example_takes_all_the_weight_and_no_nan():
    f = torch.tensor([[[1e6], [-1e6], [3.0]]], dtype=torch.float64)
    y = torch.ones(3, dtype=torch.float64)
    for loss in (fs.exponential, fs.logistic):
        lam, c = loss.ascent(f, y)
        assert float(lam) == pytest.approx(
            -1e6 if loss is fs.exponential else -math.log(1e6), rel=1e-8
        )
        assert float(c[0, 1]) == pytest.approx(1 if loss is fs.exponential else 1e-6, rel=1e-7)
        assert float(c[0, 0]) == 0


# --- the soft minimum ----------------------------------------------------------------------------

ROUND_TRIP = [
    -50.0,
    -30.0,
    -21.0,
    -5.0,
    -0.6,
    -0.5,
    0.0,
    1e-3,
    1.0,
    5.0,
    11.0,
    12.0,
    18.4,
    18.5,
    30.0,
    31.0,
    700.0,
    1e3,
    1e6,
]


@pytest.mark.parametrize("q", ROUND_TRIP)
def test_soft_minimum_of_one_example_is_its_margin(q):
    f, y = torch.tensor([[[q]]], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    for loss in (fs.exponential, fs.logistic):
        assert float(loss.soft_minimum(loss.lam(f, y))) == pytest.approx(q, rel=1e-14, abs=2e-15)
    two = torch.tensor([[[0.0, q]]], dtype=torch.float64)
    for loss in (fs.cross_entropy, fs.pairwise_exponential):
        assert float(loss.soft_minimum(loss.lam(two, y.long()))) == pytest.approx(
            q, rel=1e-14, abs=2e-15
        )


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("name", ["exponential", "logistic", "cross-entropy", "pairwise"])
def test_soft_minimum_is_a_lower_bound_on_the_margins(name, scale):
    loss, C, _ = NAIVE[name]
    f, y = scale * draw(1, 20, 7, C), targets(loss, 7, C)
    soft = loss.soft_minimum(loss.lam(f, y))
    hard = loss.reading.margins(f, y).amin(-1)
    assert (soft <= hard + 1e-12 * hard.abs()).all()
    if name == "exponential":
        assert (soft >= hard - math.log(7) - 1e-12 * hard.abs()).all()


def test_squared_loss_has_no_soft_minimum():
    with pytest.raises(
        ValueError, match="squared loss has no inverse, so its soft margin is not defined; try"
    ):
        fs.squared.soft_minimum(torch.zeros(1))


# --- general tails -------------------------------------------------------------------------------


def test_general_tail_with_the_logistic_phi_is_the_logistic_loss():
    f, y = 3 * draw(1, 4, 6, 1), targets(fs.logistic, 6, 1)
    for ours, theirs in zip(LOGISTIC_TAIL.ascent(f, y), fs.logistic.ascent(f, y), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)
    lam = fs.logistic.lam(f, y)
    torch.testing.assert_close(
        LOGISTIC_TAIL.soft_minimum(lam), fs.logistic.soft_minimum(lam), rtol=1e-11, atol=1e-13
    )


def test_general_tail_without_an_inverse_refuses_the_soft_margin():
    with pytest.raises(ValueError, match="cubic loss has no inverse"):
        CUBIC_TAIL.soft_minimum(torch.zeros(1))


ONE = torch.ones_like


@pytest.mark.parametrize(
    ("phi", "slope", "inverse", "message"),
    [
        (lambda u: -u, lambda u: -ONE(u), None, "Φ' is -1 .* expected Φ' > 0"),
        (lambda u: 0 * u, lambda u: 0 * u, None, "Φ' is 0 .* expected Φ' > 0"),
        (torch.tanh, lambda u: 1 - torch.tanh(u) ** 2, None, "decreases somewhere|expected Φ' > 0"),
        (torch.atan, lambda u: 1 / (1 + u**2), None, "decreases somewhere on u ≥ 0"),
        (lambda u: u, lambda u: 2 * ONE(u), None, "`slope` is not the derivative"),
        (lambda u: u, lambda u: 1.02 * ONE(u), None, "`slope` is not the derivative"),
        (lambda u: u, lambda u: ONE(u), lambda lam: 2 * lam, "`inverse` is not the inverse"),
        (lambda u: u * torch.nan, lambda u: ONE(u), None, "`slope` is not the derivative"),
    ],
    ids=["decreasing", "constant", "tanh", "arctan", "slope", "slope by 2 %", "inverse", "nan"],
)
def test_tails_outside_the_class_are_refused(phi, slope, inverse, message):
    with pytest.raises(ValueError, match=message):
        fs.exponential_tail(phi, slope, inverse)


@pytest.mark.parametrize(
    ("loss", "C"),
    [(fs.exponential, 1), (fs.logistic, 1), (fs.cross_entropy, 3), (fs.pairwise_exponential, 3)],
)
def test_shifting_all_outputs_of_an_example_leaves_multi_class_losses_alone(loss, C):
    f, y = draw(1, 2, 5, C), targets(loss, 5, C)
    shifted = loss.lam(f + 0.3, y)
    unchanged = torch.allclose(shifted, loss.lam(f, y), rtol=1e-12, atol=1e-12)
    assert unchanged == (C > 1)


@pytest.mark.parametrize(
    "loss", [fs.exponential, fs.logistic, fs.cross_entropy, fs.pairwise_exponential, fs.squared]
)
def test_curvature_is_that_of_the_loss_up_to_the_gradients_outer_product(loss):
    """Against automatic differentiation, and as large a multiple as leaves it positive
    semidefinite."""
    generator = torch.Generator().manual_seed(0)
    C = {"signs": 1, "classes": 3, "values": 2}[loss.reading.targets]
    f = torch.randn(2, 4, C, generator=generator, dtype=torch.float64)
    y = {"signs": torch.tensor([1.0, -1, 1, 1]), "classes": torch.tensor([0, 2, 1, 1])}.get(
        loss.reading.targets
    )
    y = torch.randn(4, C, generator=generator, dtype=torch.float64) if y is None else y
    F = loss.curvature(f, y)
    S, c = F @ F.mT, loss.ascent(f, y)[1].flatten(1)
    for b in range(2):
        level = lambda g, b=b: loss.lam(g.view(1, 4, C), y)[0]
        rest = S[b] + torch.func.hessian(level)(f[b].flatten())
        multiple = (c[b] @ rest @ c[b]) / (c[b] @ c[b]) ** 2
        torch.testing.assert_close(rest, multiple * c[b][:, None] * c[b], rtol=0, atol=1e-12)
        # no larger multiple: there is a direction with ⟨c, v⟩ ≠ 0 in which nothing is left
        values, basis = torch.linalg.eigh(S[b])
        still = basis[:, values < 1e-12]
        assert (still.mT @ c[b]).abs().max() > 1e-6
    J = torch.randn(2, 4, C, 5, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(loss.curved(f, y, J), F.mT @ J.flatten(1, 2))
