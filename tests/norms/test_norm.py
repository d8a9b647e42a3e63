"""Laws of norms, over every norm, composition, scale and batch."""

import numpy as np
import pytest
import scipy.optimize
import torch

from flowsim.norms.norm import require_norm
from flowsim.norms.vector import Linf
from tests.oracles.norm_cases import CASES, Case, assert_close, dot, outside, slack, uniform


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]


@pytest.fixture(params=[torch.float64, torch.float32], ids=["f64", "f32"])
def typed(request, case) -> Case:
    return case.to(request.param)


class TestDual:
    def test_steepest_attains_the_dual_norm(self, typed):
        assert_close(dot(typed.g, typed.norm.steepest(typed.g)), typed.norm.dual(typed.g))

    def test_steepest_is_a_unit_vector_or_zero(self, typed):
        value = typed.norm.value(typed.norm.steepest(typed.g))
        assert_close(value, (typed.norm.dual(typed.g) > 0).to(value))

    def test_no_vector_does_better(self, typed):
        """|<g, v>| <= dual(g) value(v): the dual norm is the supremum, as `steepest` attains it."""
        v = torch.cat([outside(typed), typed.norm.steepest(outside(typed)), typed.g[:, None]])
        bound = typed.norm.dual(typed.g) * typed.norm.value(v)
        assert (dot(typed.g, v).abs() <= bound * (1 + slack(v.dtype))).all()

    def test_no_local_search_does_better(self, case):
        """Nelder-Mead over directions, started beside the steepest one."""
        g = case.g[0]
        start = case.norm.steepest(g) + 0.1 * uniform(case.size, seed=8)

        def loss(v: np.ndarray) -> float:
            return -float(dot(g, torch.from_numpy(v)) / case.norm.value(torch.from_numpy(v)))

        found = scipy.optimize.minimize(
            loss, start.numpy(), method="Nelder-Mead", options={"maxfev": 150}
        )
        dual = float(case.norm.dual(g))
        assert 0.5 * dual < -found.fun <= dual * (1 + 1e-13)


class TestNorm:
    def test_triangle_inequality(self, typed):
        a, b = outside(typed), typed.g
        for norm in (typed.norm.value, typed.norm.dual):
            assert (norm(a + b) <= (norm(a) + norm(b)) * (1 + slack(a.dtype))).all()

    @pytest.mark.parametrize("factor", [-3.0, 0.3, 2.0**-60])
    def test_homogeneity(self, typed, factor):
        for norm in (typed.norm.value, typed.norm.dual):
            assert_close(norm(factor * typed.g) / abs(factor), norm(typed.g))

    def test_zero_only_at_zero(self, case):
        axes = torch.cat([torch.eye(case.size, dtype=torch.float64), case.g[:-1]])
        for norm in (case.norm.value, case.norm.dual):
            assert (norm(axes) > 0).all()
            assert norm(torch.zeros_like(axes)).eq(0).all()

    @pytest.mark.parametrize("power", [-664, 500])
    def test_no_scale_is_special(self, case, power):
        """Powers of two, so that ties stay ties: 2^-664 is 1e-200, 2^500 is 3e150."""
        far = case.g * 2.0**power
        assert_close(case.norm.steepest(far), case.norm.steepest(case.g), 1e-2)
        for norm in (case.norm.value, case.norm.dual):
            assert_close(norm(far) / 2.0**power, norm(case.g), 0.1)
        assert_close(case.norm.face(far).element(), case.norm.face(case.g).element(), 1e-2)

    def test_decimal_scale(self, case):
        g = case.g[:3]
        assert_close(case.norm.steepest(1e-200 * g), case.norm.steepest(g))

    def test_batch_equals_loop(self, typed):
        norm, g = typed.norm, typed.g
        for f in (norm.value, norm.dual, norm.steepest):
            torch.testing.assert_close(
                f(g), torch.stack([f(row) for row in g]), rtol=0, atol=16 * torch.finfo(g.dtype).eps
            )
            assert_close(f(g.expand(2, 1, *g.shape)), f(g).expand(2, 1, *f(g).shape), 0.1)

    def test_one_bad_row_spoils_only_itself(self, case):
        g = case.g.clone()
        g[1, 0] = torch.nan
        keep = torch.arange(len(g)) != 1
        for f in (case.norm.value, case.norm.dual, case.norm.steepest):
            got = f(g)
            assert got[1].isnan().any()
            assert_close(got[keep], f(case.g)[keep], 0.1)
        element = case.norm.face(g).element()
        assert element[1].isnan().any()
        assert_close(element[keep], case.norm.face(case.g).element()[keep])


class TestUnitBall:
    def test_projection_is_the_nearest_point(self, case):
        v = (
            outside(case, 6)[:, 0]
            * torch.tensor([1e-2, 0.3, 1.0, 1.0, 1e2, 1e6], dtype=torch.float64)[:, None]
        )
        nearest = case.norm.project(v)
        assert (case.norm.value(nearest) <= 1 + 1e-13).all()
        assert_close(case.norm.project(v[4]), nearest[4])
        inside = case.norm.value(v) <= 1
        assert torch.equal(nearest[inside], v[inside])
        # <v - x, u - x> <= 0 for every u of the ball: the support function of the ball is the dual
        # norm
        residual = v - nearest
        gap = case.norm.dual(residual) - dot(residual, nearest)
        assert (gap <= 1e-12 * (1 + v.norm(dim=-1))).all()


def test_symbols_are_mathtext(case):
    mathtext = pytest.importorskip("matplotlib.mathtext")
    assert mathtext.MathTextParser("path").parse(case.norm.symbol).width > 0
    assert case.norm.name.isascii()


def test_ties_says_whether_a_face_has_several_points(case):
    """Only where g is not zero; block norms also tie where a block's gradient vanishes."""
    face = case.norm.face(case.g)
    c = uniform(case.size, seed=9).expand_as(case.g)
    width = (face.support(c) + face.support(-c))[:-1]
    if min(getattr(case.norm, "shape", None) or (2,)) > 1:
        assert case.norm.ties == bool((width > 1e-6).any())
    elif not case.norm.ties:
        assert (width < 1e-12).all()


def test_a_norm_is_an_instance_of_one():
    require_norm("Flow", Linf())
    for other in (Linf, "linf", None):
        with pytest.raises(TypeError, match=r"Flow: got norm=.*expected a flowsim norm, try"):
            require_norm("Flow", other)
