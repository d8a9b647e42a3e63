"""Largest margins and least norms: known answers, certificates by plain numpy, several solvers, and
flows."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq

import flowsim as fs
from flowsim import reference
from flowsim.exact.optima import game, margin_rows, max_margin, min_norm
from flowsim.motion.clocks import ARCLENGTH

FIXTURE = np.array([[3.0, 1, 0], [1, -2, 2], [1, 2, 1]])
KNOWN = [
    (fs.L1(), 17 / 15, np.array([5, 2, 8]) / 15, np.array([1, 3, 11]) / 15),
    (
        fs.L2(),
        math.sqrt(53 / 17),
        np.array([17, 6, 24]) / math.sqrt(901),
        np.array([0, 7, 10]) / 17,
    ),
    (fs.Linf(), 5 / 2, np.array([1, 0.25, 1]), np.array([0, 0.5, 0.5])),
]
A = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
SHAPE = (4, 6)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def binary(x, y, loss=fs.exponential):
    return fs.Problem(fs.Linear(np.shape(x)[-1]), x, y, loss)


def classes(loss=fs.pairwise_exponential, n=12, seed=0):
    """Four separable classes in six dimensions."""
    x = randn(n, SHAPE[1], seed=seed)
    return fs.Problem(fs.Linear(6, 4), x, (x @ randn(*SHAPE, seed=seed + 1).mT).argmax(1), loss)


def separable(m, d, seed):
    z = randn(m, d, seed=seed).numpy()
    return z * np.sign(z @ randn(d, seed=seed + 1).numpy())[:, None]


# --- known answers -------------------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "best", "w", "p"), KNOWN, ids=["l1", "l2", "linf"])
def test_three_examples(norm, best, w, p):
    found = max_margin(binary(FIXTURE, [1, 1, 1]), norm)
    assert found.margin == pytest.approx(best, abs=1e-10)
    np.testing.assert_allclose(found.w, w, atol=1e-10)
    np.testing.assert_allclose(found.p, p, atol=1e-10)
    assert abs(found.gap) <= 1e-12
    assert found.separated
    cone = game(FIXTURE, norm, reference.cone_program)
    assert cone.margin == pytest.approx(best, abs=1e-8)
    assert 0 <= cone.gap <= 1e-7


def test_labels_and_losses_only_turn_examples():
    signs = np.array([1, -1, 1])
    best = max_margin(binary(FIXTURE, [1, 1, 1]), fs.L2()).margin
    for loss, y in ((fs.logistic, signs), (fs.exponential, (signs + 1) // 2)):
        assert max_margin(binary(signs[:, None] * FIXTURE, y, loss), fs.L2()).margin == best


def test_two_classes_are_one_binary_problem():
    """f_1 − f_0 = ⟨w_1 − w_0, x⟩: half the margin each in ℓ1 and ℓ∞ sums, √2 in ℓ2, and rank one in
    matrix norms."""
    x, y = np.abs(FIXTURE), [0, 1, 1]
    problem = fs.Problem(fs.Linear(3, 2), x, y, fs.cross_entropy)
    for norm, factor in ((fs.L1(), 1), (fs.L2(), math.sqrt(2)), (fs.Linf(), 2)):
        one = max_margin(binary(x, y), norm).margin
        assert max_margin(problem, norm).margin == pytest.approx(factor * one, rel=1e-9)
    for norm in (fs.Spectral(), fs.Nuclear()):
        one = max_margin(binary(x, y), fs.L2()).margin
        assert max_margin(problem, norm).margin == pytest.approx(math.sqrt(2) * one, rel=1e-7)


def test_a_spectral_margin_by_hand():
    """Inputs e_i with classes i: W = (C/2 − …) commutes with permutations, so W = aI − b(11ᵀ/3),
    least gap a."""
    problem = fs.Problem(fs.Linear(3, 3), np.eye(3), [0, 1, 2], fs.pairwise_exponential)
    # W = aI − b 11ᵀ/3 has singular values a, a, |a − b|: gaps are a, so γ = 1 in the spectral norm
    assert max_margin(problem, fs.Spectral()).margin == pytest.approx(1, abs=1e-8)
    # nuclear: least 2a + |a − b| at b = a, so γ = ½; Frobenius: 1/√2
    assert max_margin(problem, fs.Nuclear()).margin == pytest.approx(1 / 2, abs=1e-8)
    assert max_margin(problem, fs.Frobenius()).margin == pytest.approx(math.sqrt(1 / 2), abs=1e-12)


# --- certificates, by plain numpy ----------------------------------------------------------------


def singular(v, shape=SHAPE):
    return np.linalg.svd(np.reshape(v, shape), compute_uv=False)


def mahalanobis(metric):
    return lambda v: math.sqrt(v @ metric @ v)


WEIGHTS = np.linspace(0.5, 3, 24)
CERTIFIED = {  # norm, its value and its dual
    "l1": (fs.L1(), lambda v: np.abs(v).sum(), lambda g: np.abs(g).max()),
    "l2": (fs.L2(), np.linalg.norm, np.linalg.norm),
    "linf": (fs.Linf(), lambda v: np.abs(v).max(), lambda g: np.abs(g).sum()),
    "l3": (fs.Lp(3.0), lambda v: np.linalg.norm(v, 3), lambda g: np.linalg.norm(g, 1.5)),
    "mahalanobis": (
        fs.Mahalanobis(torch.from_numpy(WEIGHTS)),
        mahalanobis(np.diag(WEIGHTS)),
        mahalanobis(np.diag(1 / WEIGHTS)),
    ),
    "spectral": (fs.Spectral(), lambda v: singular(v).max(), lambda g: singular(g).sum()),
    "nuclear": (fs.Nuclear(), lambda v: singular(v).sum(), lambda g: singular(g).max()),
    "frobenius": (fs.Schatten(2.0), np.linalg.norm, np.linalg.norm),
}


@pytest.mark.parametrize("name", CERTIFIED)
@pytest.mark.parametrize(
    "loss", [fs.pairwise_exponential, fs.cross_entropy], ids=lambda loss: loss.name
)
def test_certificates_of_several_classes(name, loss):
    norm, value, dual = CERTIFIED[name]
    problem = classes(loss)
    found = max_margin(problem, norm)
    Z = pairs(problem)
    assert value(found.w) == pytest.approx(1, abs=1e-12)
    assert (Z @ found.w).min() == pytest.approx(found.margin, abs=1e-13)
    assert found.p.min() >= 0
    assert found.p.sum() == pytest.approx(1, abs=1e-14)
    assert dual(found.p @ Z) == pytest.approx(found.bound, rel=1e-12)
    assert -1e-13 <= found.gap <= (1e-7 if name in ("l3", "spectral", "nuclear") else 1e-12)
    w = torch.from_numpy(found.w)[None]
    assert float(problem.margins(w).min()) == pytest.approx(found.margin, abs=1e-13)
    rivals = randn(200, 24, seed=9).numpy()
    assert all(
        (Z @ v).min() / value(v) < found.margin for v in np.vstack([rivals, found.w + 0.1 * rivals])
    )


def pairs(problem):
    """f_y − f_j as rows on W (C, d), by loops."""
    rows = []
    for x, y in zip(problem.x.numpy(), problem.y.tolist(), strict=True):
        for j in set(range(4)) - {y}:
            row = np.zeros(SHAPE)
            row[y], row[j] = x, -x
            rows.append(row.ravel())
    return np.array(rows)


def test_rows_of_problems():
    problem = classes()
    assert sorted(map(tuple, margin_rows(problem))) == sorted(map(tuple, pairs(problem)))
    np.testing.assert_array_equal(
        margin_rows(binary(FIXTURE, [1, -1, 1])), FIXTURE * [[1], [-1], [1]]
    )


def test_margins_of_deep_lp_nets_are_those_of_their_predictors():
    """The largest margin of a diagonal net of depth 2 in ℓ2 is half that of the predictor in ℓ1, at
    |u| = |v|."""
    best = game(FIXTURE, fs.L1())
    u = np.sqrt(np.abs(best.w))
    w = torch.from_numpy(np.concatenate([u, np.sign(best.w) * u]))[None]
    problem = fs.Problem(fs.Diagonal(3), FIXTURE, [1, 1, 1], fs.exponential)
    assert float(problem.margins(w).min() / (w @ w.mT)) == pytest.approx(best.margin / 2, rel=1e-12)
    # and it is a KKT point: with the gradients of the least margins as rows, the game's value is
    # L·q_min/‖w‖
    rows = problem.net.jacobian(w, problem.x)[0, :, 0].numpy()
    value = 2 * float(problem.margins(w).min() / torch.linalg.vector_norm(w))
    assert game(rows, fs.L2()).bound == pytest.approx(value, rel=1e-9)
    # at another point with equal margins in no such balance it is larger
    off = w * torch.tensor([2.0] * 3 + [0.5] * 3)
    rows = problem.net.jacobian(off, problem.x)[0, :, 0].numpy()
    assert game(rows, fs.L2()).bound > 1.01 * 2 * float(
        problem.margins(off).min() / torch.linalg.vector_norm(off)
    )


# --- data that nothing separates -----------------------------------------------------------------


@pytest.mark.parametrize(
    "norm",
    [fs.L1(), fs.L2(), fs.Linf(), fs.Lp(3.0), fs.Mahalanobis(A), fs.Spectral()],
    ids=lambda n: n.name,
)
def test_data_that_no_direction_separates(norm):
    found = max_margin(binary(randn(8, 2, seed=5), [1, 1, -1, 1, -1, -1, 1, -1]), norm)
    assert not found.separated
    assert found.margin == 0
    assert not found.w.any()
    assert found.bound <= 1e-9  # Σ p_i y_i x_i = 0 proves it
    assert str(found).startswith("not separated: no direction has a margin above")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: max_margin(
                fs.Problem(fs.MLP([3, 4, 1]), FIXTURE, [1, 1, 1], fs.exponential), fs.L2()
            ),
            "linear in its weights",
        ),
        (lambda: max_margin(binary(FIXTURE, [1.0, 2.0, 3.0], fs.squared), fs.L2()), "no margins"),
        (lambda: max_margin(binary(np.stack([FIXTURE] * 2), [1, 1, 1]), fs.L2()), "2 data sets"),
        (lambda: max_margin(classes(), fs.Schatten(3.0)), "cone program"),
        (lambda: game([1.0, 2.0], fs.L2()), "shape"),
        (lambda: game([[math.nan]], fs.L2()), "finite"),
        (lambda: game(FIXTURE, fs.L1(), reference.nearest_point), "quadratic"),
        (lambda: min_norm(binary(FIXTURE, [1, 1, 1]), fs.L2()), "expected a regression"),
        (lambda: min_norm(binary(FIXTURE, [0.0, 0.0, 0.0], fs.squared), fs.L2()), "all 0"),
        (
            lambda: min_norm(binary([[1.0], [1.0]], [1.0, 2.0], fs.squared), fs.L2()),
            "no weights fit",
        ),
    ],
)
def test_what_has_no_answer_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_data_sets_are_solved_one_by_one():
    both = binary(np.stack([FIXTURE, 2 * FIXTURE]), [1, 1, 1])
    margins = [max_margin(both.select(torch.tensor([b])), fs.Linf()).margin for b in range(2)]
    assert margins == pytest.approx([2.5, 5.0], abs=1e-12)


# --- flows ---------------------------------------------------------------------------------------


def follow(problem, norm, until, **options):
    """A flow from 0: its run, with the value of the norm and ‖∇Λ‖_* at the saves."""
    bound = norm.bind(problem.layout)
    observe = {
        "size": lambda p, s: bound.value(s.w),
        "dual": lambda p, s: bound.dual(p.ascent(s.w)[1]),
    }
    observe["margin"] = fs.diagnostics.margin(norm)
    w0, rule = torch.zeros(1, problem.size, dtype=torch.float64), fs.SteepestFlow(norm, **options)
    return fs.simulate(problem, rule, w0, until=until, observe=observe, strict=True)


def within(problem, norm, until, slack, **options):
    """At every save Λ ≥ γ*s − log m; γ* − (log m)/s ≤ γ̃ if Λ ≥ 0; γ̃ ≤ γ ≤ γ* ≤ ‖∇Λ‖_*. Returns
    the last of these."""
    best, run, m = (
        max_margin(problem, norm),
        follow(problem, norm, until, **options),
        len(margin_rows(problem)),
    )
    s, lam, size, dual, margin = (
        run[k][1:, 0] for k in ("arclength", "lam", "size", "dual", "margin")
    )
    soft = lam / size
    assert (lam >= best.margin * s - math.log(m) - slack * s).all()
    assert (soft >= best.margin - math.log(m) / s - slack)[lam >= 0].all()
    assert (margin >= soft).all()
    assert (margin <= best.bound + slack).all()
    assert (dual >= best.margin - slack).all()
    return soft[-1], dual[-1]


@pytest.mark.parametrize(("norm", "best"), [known[:2] for known in KNOWN], ids=["l1", "l2", "linf"])
def test_flows_of_three_examples_are_inside_the_bound_at_every_save(norm, best):
    soft, dual = within(binary(FIXTURE, [1, 1, 1]), norm, fs.lam(1e4, saves=40), 1e-9, rtol=1e-6)
    assert best - math.log(3) * best / 1e4 <= soft <= best
    assert dual == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize(
    "norm",
    [
        *(fs.L1(), fs.L2(), fs.Linf(), fs.Spectral(), fs.Max(fs.Spectral()), fs.Lp(3.0)),
        pytest.param(fs.Nuclear(), marks=pytest.mark.slow),
    ],
    ids=lambda n: n.name,
)
def test_flows_of_several_classes_are_inside_the_bound_at_every_save(norm):
    within(classes(), norm, fs.lam(300.0, saves=12), 1e-7)


def test_the_gap_in_linf_by_hand():
    """w = (s, w₂, s) with ∂Λ/∂w₂ = 0: of the three terms of that equation two make γ*, the third
    the gap."""
    slope = lambda v: math.exp(-v - 4.5) - 2 * math.exp(2 * v - 4.5) + 2 * math.exp(4.5 - 2 * v)
    second = brentq(slope, 2.0, 2.5, xtol=1e-15)
    gap = 2.5 - min(27 + second, 27 - 2 * second, 18 + 2 * second) / 9
    assert gap == pytest.approx(3.25e-5, rel=1e-2)
    run = follow(binary(FIXTURE, [1, 1, 1]), fs.Linf(), fs.arclength([9.0]), rtol=1e-9)
    assert 2.5 - run["margin"][-1, 0] == pytest.approx(gap, abs=1e-8)


def test_the_bound_on_the_soft_margin_needs_a_level_above_zero():
    """Before the data are separated a path that bends has ‖w‖ < s, and Λ < 0 is smaller over ‖w‖
    than over s."""
    Z = [[0.05, 0.02], [2, -3.6], [0.01, -0.03], [0.1, 2.7], [0.02, -13]]
    options = {"rtol": 1e-8, "method": fs.DOPRI5, "clock": ARCLENGTH}
    run = follow(problem := binary(Z, [1] * 5), fs.L2(), fs.arclength([0.29]), **options)
    best, (s, lam, size) = (
        max_margin(problem, fs.L2()).margin,
        (run[k][1, 0] for k in ("arclength", "lam", "size")),
    )
    assert lam >= best * s - math.log(5)
    assert lam / size < best - math.log(5) / s - 0.1


# --- least norms ---------------------------------------------------------------------------------


def regression():
    return fs.Problem(fs.Linear(3), [[1.0, 1, 1], [1, 2, 0]], [1.0, 10.0], fs.squared)


@pytest.mark.parametrize(
    ("norm", "w", "atol"),
    [
        (fs.Lp(4 / 3), (0.00023, 4.99988, -4.00012), 6e-6),
        (fs.L2(), (1 / 3, 29 / 6, -25 / 6), 1e-12),
        (fs.L1(), (0, 5, -4), 1e-12),
        (fs.Linf(), (1, 4.5, -4.5), 1e-12),
    ],
    ids=["l1.33", "l2", "l1", "linf"],
)
def test_least_norms_of_two_equations(norm, w, atol):
    """Gunasekar et al. 2018; ℓ1 and ℓ∞ by hand along the line of solutions (0, 5, −4) + c(−2, 1,
    1)."""
    found = min_norm(regression(), norm)
    np.testing.assert_allclose(found.w, w, atol=atol)
    assert abs(found.gap) <= 1e-8
    assert found.residual <= 1e-13


@pytest.mark.parametrize("name", CERTIFIED)
def test_certificates_of_least_norms(name):
    norm, value, dual = CERTIFIED[name]
    x, y = randn(3, 6, seed=1), randn(3, 4, seed=2)
    found = min_norm(fs.Problem(fs.Linear(6, 4), x, y, fs.squared), norm)
    np.testing.assert_allclose(x.numpy() @ found.w.reshape(SHAPE).T, y, atol=1e-12)
    lifted = (found.multipliers.reshape(3, 4).T @ x.numpy()).ravel()
    assert dual(lifted) == pytest.approx(1, abs=1e-12)
    assert value(found.w) == pytest.approx(found.size, rel=1e-12)
    assert (
        -1e-12
        <= found.gap
        <= (1e-7 if name in ("l3", "spectral", "nuclear") else 1e-12) * found.size
    )


def test_flows_end_at_the_least_norm_in_l2_and_not_in_other_norms():
    start = torch.zeros(1, 3, dtype=torch.float64)
    ends = {}
    for norm, rtol in ((fs.L2(), 1e-6), (fs.Lp(4 / 3), 1e-6)):
        rule = fs.SteepestFlow(norm, rtol=rtol, method=fs.DOPRI5)
        ends[norm.name] = fs.simulate(
            regression(), rule, start, until=fs.lam(20.0), strict=True
        ).weights[-1, 0]
    np.testing.assert_allclose(ends["l2"], min_norm(regression(), fs.L2()).w, atol=1e-4)
    np.testing.assert_allclose(ends["l1.33333"], (0.28260, 4.85870, -4.14130), atol=1e-4)
