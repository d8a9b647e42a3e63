"""Linear functions over a ball: a kink by hand, and random programmes proven by their
multipliers."""

import numpy as np
import pytest

import flowsim as fs
from flowsim.convex.linear import BallProgramme, is_linear, linear_optimum

BALLS = {  # the norm and its dual
    "l1": (fs.L1(), lambda g: np.abs(g).max()),
    "linf": (fs.Linf(), lambda g: np.abs(g).sum()),
}


def programme(seed, *, equal=False):
    """Rows of 6 numbers beside two that may not be negative and one that is free."""
    g = np.random.default_rng(seed)
    rows = g.normal(size=(4, 9))
    rows[:, 6:8] = -np.abs(rows[:, 6:8])  # a large y satisfies every row
    goal = np.append(g.normal(size=6), [-5.0, -6.0, 0.0])
    rows[:, 8] = 0.0
    goal[8], rows[0, 8] = 1.0, 1.0
    return BallProgramme(goal, rows, np.array([0.0, 0.0, -np.inf]), equal)


@pytest.mark.parametrize("name", BALLS)
@pytest.mark.parametrize("equal", [False, True], ids=["rows", "equations"])
def test_the_multipliers_prove_the_optimum(name, equal):
    """⟨goal, x⟩ ≤ ‖(goal − rowsᵀλ)_u‖_*, with equality for the rows that hold."""
    norm, dual = BALLS[name]
    for seed in range(20):
        task = programme(seed, equal=equal)
        found = linear_optimum(task, norm)
        lam = found.multipliers
        assert np.abs(found.u).max() > 0.1
        rest = task.goal - task.rows.T @ lam
        assert rest[8] == pytest.approx(0, abs=1e-9)
        assert (rest[6:8] <= 1e-9).all()
        assert equal or (lam >= -1e-12).all()
        # on the face: u is where rest is largest over the ball
        assert rest[:6] @ found.u == pytest.approx(dual(rest[:6]), abs=1e-8)


@pytest.mark.parametrize(
    ("norm", "best"), [(fs.Linf(), [1.0, 0.5]), (fs.L1(), [2 / 3, 1 / 3])], ids=["linf", "l1"]
)
def test_the_largest_least_margin_by_hand(norm, best):
    """max τ with 2u₂ ≥ τ and u₁ ≥ τ, −u₁ + 2u₂ ≤ 0: on the line u₁ = 2u₂."""
    rows = np.array([[0.0, -2.0, 1.0], [-1.0, 0.0, 1.0], [-1.0, 2.0, 0.0]])
    found = linear_optimum(BallProgramme(np.array([0.0, 0, 1]), rows, np.array([-np.inf])), norm)
    np.testing.assert_allclose(found.u, best, atol=1e-12)


def test_a_kink_holds_its_coordinate_at_zero():
    """max u₁ + u₂ − max(3u₁, 0): the force on the kink is 1/3 of what it could be."""
    task = BallProgramme(np.array([1.0, 1, -1]), np.array([[3.0, 0, -1]]), np.zeros(1))
    found = linear_optimum(task, fs.Linf())
    np.testing.assert_allclose(found.u, [0, 1], atol=1e-12)
    np.testing.assert_allclose(found.multipliers, [1 / 3], atol=1e-12)


def test_a_programme_without_points_is_an_arithmetic_error():
    """y ≥ 1 and y ≤ 0."""
    task = BallProgramme(np.array([1.0, 0]), np.array([[0.0, 1]]), np.ones(1))
    with pytest.raises(ArithmeticError, match="HiGHS failed on 1 rows of 1 numbers"):
        linear_optimum(task, fs.L1())


def test_the_norms_that_are_linear():
    assert is_linear(fs.L1())
    assert is_linear(fs.Linf())
    assert not is_linear(fs.L2())
