"""Cone programmes: the values of norms, agreement with HiGHS, and a point near two others."""

import cvxpy
import numpy as np
import pytest
import torch

import flowsim as fs
from flowsim.convex.cones import conic_optimum, ekeland_point, inverse_metric, norm_expression
from flowsim.convex.linear import BallProgramme, linear_optimum
from flowsim.layout import lay_out

TWO = lay_out({"A": (3, 2), "b": (4,)})
ONE = lay_out({"A": (5, 2)})
NORMS = {
    "l1": fs.L1(),
    "l2": fs.L2(),
    "linf": fs.Linf(),
    "l3": fs.Lp(3.0),
    "mahalanobis": fs.Mahalanobis(torch.linspace(1, 2, 10).double()),
    "spectral": fs.Spectral().bind(ONE),
    "nuclear": fs.Nuclear().bind(ONE),
    "max": fs.Max({"A": fs.Spectral(), "b": fs.L2()}, {"b": 2.0}).bind(TWO),
    "sum": fs.Sum({"A": fs.Nuclear(), "b": fs.L1()}).bind(TWO),
    "euclidean": fs.Euclidean({"A": fs.Linf(), "b": fs.L1()}).bind(TWO),
}
W = np.random.default_rng(0).normal(size=10)


@pytest.mark.parametrize("name", NORMS)
def test_expressions_have_the_value_of_the_norm(name):
    expected = float(NORMS[name].value(torch.from_numpy(W)))
    found = norm_expression(NORMS[name], cvxpy.Constant(W)).value
    assert float(found) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("norm", [fs.L1(), fs.Linf()], ids=lambda n: n.name)
def test_both_solvers_find_one_optimum(norm, equal):
    g = np.random.default_rng(1)
    goal = np.append(g.normal(size=6), [-5.0, 0.1])
    rows = np.c_[g.normal(size=(3, 6)), -np.abs(g.normal(size=3)), [1.0, 0, 0]]
    task = BallProgramme(goal, rows, np.array([0.0, -np.inf]), equal)
    one, other = linear_optimum(task, norm), conic_optimum(task, norm)
    np.testing.assert_allclose(other.u, one.u, atol=1e-6)
    np.testing.assert_allclose(other.multipliers, one.multipliers, atol=1e-6)


def test_a_programme_without_points_is_an_arithmetic_error():
    task = BallProgramme(np.array([1.0, 0]), np.array([[0.0, 1]]), np.ones(1))
    with pytest.raises(ArithmeticError, match="Clarabel failed on 1 rows of 1 numbers"):
        conic_optimum(task, fs.L2())


def test_a_point_near_two_others_is_half_way_in_l2_and_proven_by_its_force():
    """Of ½‖v‖² − ⟨Γ, v⟩ + c‖v − w‖ in ℓ2: v = w as long as ‖Γ − w‖ ≤ c, else c nearer to Γ."""
    w, force = np.array([1.0, 0.0]), np.array([1.0, 0.8])
    for weight, v in ((1.0, [1.0, 0.0]), (0.3, [1.0, 0.5])):
        point, k = ekeland_point(fs.L2(), w, force, weight)
        np.testing.assert_allclose(point, v, atol=1e-5)
        np.testing.assert_allclose(k, point, atol=1e-5)  # ∂½‖v‖² = {v}


def test_the_inverse_metric_is_that_of_the_norm():
    np.testing.assert_allclose(
        inverse_metric(NORMS["mahalanobis"], 10), np.diag(1 / np.linspace(1, 2, 10)), atol=1e-6
    )
