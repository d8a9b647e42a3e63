"""Laws of norms and of their sets of steepest directions, over every norm, composition, scale and
batch."""

from dataclasses import dataclass

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor

from flowsim.layout import lay_out
from flowsim.norms.blocks import Euclidean, Max, Sum, modular
from flowsim.norms.matrix import Nuclear, Schatten, Spectral
from flowsim.norms.norm import Norm
from flowsim.norms.vector import L1, L2, Frobenius, Linf, Lp, Mahalanobis

BLOCKS = lay_out({"W": (3, 4), "b": (3,), "K": (2, 2, 2)})
PARTS = {
    "spectral": {"W": Spectral(), "b": L1(), "K": Nuclear()},
    "nuclear": {"W": Nuclear(), "b": Linf(), "K": Spectral()},
    "smooth": {
        "W": Schatten(3.0),
        "b": Mahalanobis(torch.tensor([1.0, 4.0, 0.5])),
        "K": Frobenius(),
    },
    "l2": L2(),
    "linf": Linf(),
}
SCALES = {"W": 2.0, "b": 0.5}


def uniform(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def spd(size: int) -> Tensor:
    root = uniform(size, size, seed=5)
    return root @ root.T / size + 0.1 * torch.eye(size, dtype=torch.float64)


@dataclass
class Case:
    """A bound norm with gradients ``g (B, P)`` that are generic in the first three rows, then tied,
    the last zero."""

    norm: Norm
    g: Tensor

    @property
    def size(self) -> int:
        return self.g.shape[-1]

    def to(self, dtype: torch.dtype) -> "Case":
        return Case(self.norm, self.g.to(dtype))


def vector(size: int) -> list[Tensor]:
    """Equal magnitudes, zero coordinates, one coordinate."""
    g = uniform(3, size, seed=1)
    g[0] = g[0].sign()
    g[1, ::2] = 0
    g[2, 1:] = 0
    return list(g)


def matrix(m: int, n: int) -> list[Tensor]:
    """Repeated singular values, rank one, rank two with a repeated value, rank deficient and
    generic."""
    g = uniform(4, m, n, seed=2)
    u, _, v = torch.linalg.svd(g[0], full_matrices=False)
    pair = torch.zeros_like(u[0])
    pair[:2] = 2.0
    rows = [u @ v, g[1, :, :1] @ g[1, :1], u @ torch.diag(pair) @ v, g[2, :, :2] @ g[2, :2]]
    return [row.flatten() for row in rows]


def blocks(norm: Norm) -> list[Tensor]:
    """Blocks that tie within themselves, a zero block, and blocks whose scaled dual norms are all
    equal."""
    tied = torch.cat([matrix(3, 4)[0], vector(3)[0], matrix(2, 4)[2]])
    ranked = torch.cat([matrix(3, 4)[1], vector(3)[1], matrix(2, 4)[1]])
    hole = uniform(23, seed=3)
    hole[BLOCKS[0].slice] = 0
    rows = [tied, ranked, hole]
    for row in (tied, uniform(23, seed=4)):
        duals = torch.zeros_like(row)
        for block in BLOCKS:
            alone = torch.zeros_like(row)
            alone[block.slice] = row[block.slice]
            duals[block.slice] = norm.dual(alone)
        rows.append(row / duals)
    return rows


def make(norm: Norm, ties: list[Tensor]) -> Case:
    size = len(ties[0])
    return Case(
        norm, torch.stack([*uniform(3, size), *ties, torch.zeros(size, dtype=torch.float64)])
    )


def cases() -> dict[str, Case]:
    found = {}
    vectors = [
        L1(),
        L2(),
        Linf(),
        Lp(3),
        Lp(1.5),
        Lp(40),
        Mahalanobis(spd(6)),
        Mahalanobis(spd(6).diagonal()),
    ]
    for norm in vectors:
        found[f"{norm.name}{getattr(norm, 'matrix', spd(1)).ndim}"] = make(norm, vector(6))
    for norm in (Spectral(), Nuclear(), Schatten(3), Schatten(1.5), Frobenius()):
        for m, n in ((3, 4), (4, 2), (3, 3), (1, 4)):
            shape = lay_out({"W": (m, n)})
            ties = matrix(m, n) if min(m, n) > 1 else vector(m * n)
            found[f"{norm.name}-{m}x{n}"] = make(norm.bind(shape), ties)
    for combine in (Max, Sum, Euclidean):
        for key, parts in PARTS.items():
            norm = combine(parts, None if key in ("nuclear", "linf") else SCALES).bind(BLOCKS)
            found[f"{norm.word}-{key}"] = make(norm, blocks(norm))
    found["modular"] = make(modular(BLOCKS), blocks(modular(BLOCKS)))
    return found


CASES = cases()


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]


@pytest.fixture(params=[torch.float64, torch.float32], ids=["f64", "f32"])
def typed(request, case) -> Case:
    return case.to(request.param)


def dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)


def slack(dtype: torch.dtype) -> float:
    return 256 * torch.finfo(dtype).eps


def assert_close(got: Tensor, expected: Tensor, factor: float = 1.0) -> None:
    tol = factor * slack(got.dtype)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=tol, atol=tol)


def outside(case: Case, samples: int = 40) -> Tensor:
    return 3 * uniform(samples, 1, case.size, seed=7).to(case.g)


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


class TestClosedForms:
    @pytest.mark.parametrize("p", [1.0, 1.1, 1.5, 2.0, 3.0, 40.0, np.inf])
    def test_lp(self, p):
        norm = {1.0: L1(), 2.0: L2(), np.inf: Linf()}.get(p) or Lp(p)
        g = uniform(5, 7)
        q = {1.0: np.inf, np.inf: 1.0}.get(p) or p / (p - 1)
        assert_close(norm.value(g), torch.from_numpy(np.linalg.norm(g.numpy(), p, axis=-1)))
        assert_close(norm.dual(g), torch.from_numpy(np.linalg.norm(g.numpy(), q, axis=-1)))

    @pytest.mark.parametrize("shape", [(3, 4), (5, 2), (2, 3, 2)])
    def test_schatten(self, shape):
        g = uniform(5, *shape)
        s = np.linalg.svd(g.flatten(2).numpy(), compute_uv=False)
        expected = {
            Spectral(): (s.max(-1), s.sum(-1)),
            Nuclear(): (s.sum(-1), s.max(-1)),
            Schatten(3): ((s**3).sum(-1) ** (1 / 3), (s**1.5).sum(-1) ** (2 / 3)),
            Frobenius(): (np.sqrt((s**2).sum(-1)),) * 2,
        }
        for norm, (value, dual) in expected.items():
            bound = norm.bind(lay_out({"W": shape}))
            assert_close(bound.value(g.flatten(1)), torch.from_numpy(value))
            assert_close(bound.dual(g.flatten(1)), torch.from_numpy(dual))

    def test_schatten_two_is_frobenius(self):
        g = uniform(5, 12)
        schatten = Schatten(2).bind(lay_out({"W": (3, 4)}))
        assert_close(schatten.steepest(g), L2().steepest(g))

    def test_mahalanobis(self):
        a, g = spd(6), uniform(5, 6)
        for norm, dense in ((Mahalanobis(a), a), (Mahalanobis(a.diagonal()), a.diagonal().diag())):
            solved = torch.linalg.solve(dense, g.T).T
            assert_close(norm.value(g), torch.einsum("bi,ij,bj->b", g, dense, g).sqrt())
            assert_close(norm.dual(g), dot(g, solved).sqrt())
            assert_close(norm.steepest(g), solved / dot(g, solved).sqrt()[:, None])

    def test_block_norms_divide_by_their_scales(self):
        shapes = lay_out({"a": (2,), "b": (2,)})
        v, scales = torch.tensor([3.0, 4.0, 0.0, 2.0]), {"a": 5.0, "b": 0.5}
        for combine, value, dual in (
            (Max, 4.0, 26.0),
            (Sum, 5.0, 25.0),
            (Euclidean, 17.0**0.5, 626.0**0.5),
        ):
            norm = combine(L2(), scales).bind(shapes)
            assert_close(norm.value(v), torch.tensor(value))
            assert_close(norm.dual(v), torch.tensor(dual))
        assert_close(Max(L2(), scales).bind(shapes).steepest(v), torch.tensor([3.0, 4.0, 0.0, 0.5]))
        assert_close(Sum(L2(), scales).bind(shapes).steepest(v), torch.tensor([3.0, 4.0, 0.0, 0.0]))
        euclidean = Euclidean(L2(), scales).bind(shapes).steepest(v)
        assert_close(euclidean, torch.tensor([75.0, 100.0, 0.0, 0.5]) / 626**0.5)

    def test_euclidean_of_l2_is_l2(self):
        g = uniform(5, 23)
        assert_close(Euclidean(L2()).bind(BLOCKS).steepest(g), L2().steepest(g))

    def test_ties_are_broken_as_documented(self):
        g = torch.tensor([[-2.0, 2.0, 0.0], [0.0, -1.0, -1.0]])
        assert L1().steepest(g).tolist() == [[-1, 0, 0], [0, -1, 0]]
        assert Linf().steepest(g).tolist() == [[-1, 1, 0], [0, -1, -1]]
        first = (
            Sum(L2()).bind(lay_out({"a": (1,), "b": (2,)})).steepest(torch.tensor([2.0, 0.0, -2.0]))
        )
        assert first.tolist() == [1, 0, 0]

    def test_polar_factor_is_zero_on_the_null_space(self):
        """A product of rank two, which rounding makes full rank."""
        g = uniform(50, 30, 2) @ uniform(50, 2, 20, seed=1)
        polar = (
            Spectral().bind(lay_out({"W": (30, 20)})).steepest(g.flatten(1)).unflatten(1, (30, 20))
        )
        s = torch.linalg.svdvals(polar)
        assert_close(s[:, :2], torch.ones_like(s[:, :2]))
        assert (s[:, 2:] < 1e-13).all()


class TestIsometries:
    @pytest.mark.parametrize("norm", [L1(), L2(), Linf(), Lp(3), Lp(1.5)], ids=lambda n: n.name)
    def test_signed_permutations(self, norm):
        g = uniform(4, 8)
        order, sign = (
            torch.randperm(8, generator=torch.Generator().manual_seed(0)),
            uniform(8).sign(),
        )
        assert_close(norm.value((sign * g)[:, order]), norm.value(g))
        assert_close(norm.steepest((sign * g)[:, order]), (sign * norm.steepest(g))[:, order])

    @pytest.mark.parametrize(
        "norm", [Spectral(), Nuclear(), Schatten(3), Frobenius()], ids=lambda n: n.name
    )
    def test_left_and_right_rotations(self, norm):
        norm, g = norm.bind(lay_out({"W": (3, 4)})), uniform(4, 12)
        left, right = torch.linalg.qr(uniform(3, 3)).Q, torch.linalg.qr(uniform(4, 4)).Q

        def turn(v: Tensor) -> Tensor:
            return (left @ v.unflatten(1, (3, 4)) @ right).flatten(1)

        assert_close(norm.value(turn(g)), norm.value(g))
        assert_close(norm.steepest(turn(g)), turn(norm.steepest(g)))


class TestBinding:
    def test_kernels_are_flattened_to_matrices(self):
        g = uniform(3, 8)
        kernel = Spectral().bind(lay_out({"K": (2, 2, 2)}))
        assert torch.equal(kernel.steepest(g), Spectral().bind(lay_out({"K": (2, 4)})).steepest(g))

    def test_vector_norms_need_no_layout(self):
        for norm in (L1(), L2(), Linf(), Lp(3), Frobenius()):
            assert norm.bind(BLOCKS) is norm

    def test_modular_is_max_of_spectral_and_l2(self):
        g = uniform(3, 23)
        explicit = Max({"W": Spectral(), "b": L2(), "K": Spectral()}, SCALES).bind(BLOCKS)
        assert torch.equal(modular(BLOCKS, SCALES).steepest(g), explicit.steepest(g))

    def test_names(self):
        names = [
            "l1",
            "l2",
            "linf",
            "l3",
            "l1.5",
            "mahalanobis",
            "spectral",
            "nuclear",
            "schatten3",
            "frobenius",
        ]
        norms = [L1(), L2(), Linf(), Lp(3), Lp(1.5), Mahalanobis(spd(2))]
        norms += [Spectral(), Nuclear(), Schatten(3), Frobenius()]
        assert [norm.name for norm in norms] == names
        assert modular(BLOCKS).name == "max(W:spectral,b:l2,K:spectral)"
        assert Sum(L2()).name == "sum(l2)"
        assert Linf().symbol == r"$\ell_\infty$"
        assert modular(BLOCKS).symbol == r"$\mathrm{max}(S_\infty, \ell_2)$"

    def test_symbols_are_mathtext(self, case):
        mathtext = pytest.importorskip("matplotlib.mathtext")
        assert mathtext.MathTextParser("path").parse(case.norm.symbol).width > 0
        assert case.norm.name.isascii()

    def test_ties_says_whether_a_face_has_several_points(self, case):
        """Only where g is not zero; block norms also tie where a block's gradient vanishes."""
        face = case.norm.face(case.g)
        c = uniform(case.size, seed=9).expand_as(case.g)
        width = (face.support(c) + face.support(-c))[:-1]
        if min(getattr(case.norm, "shape", None) or (2,)) > 1:
            assert case.norm.ties == bool((width > 1e-6).any())
        elif not case.norm.ties:
            assert (width < 1e-12).all()


class TestErrors:
    def test_unbound(self):
        for norm in (
            Spectral(),
            Nuclear(),
            Schatten(3),
            Max(L2()),
            Sum({"W": L1()}),
            Euclidean(L2()),
        ):
            for use in (norm.value, norm.dual, norm.steepest, norm.face):
                with pytest.raises(
                    ValueError, match=r"got .*, expected a bound norm, try norm.bind"
                ):
                    use(torch.ones(4))

    @pytest.mark.parametrize(
        "shapes", [{"a": (2, 2), "b": (2,)}, {"a": (3,)}, {"a": (2, 2), "b": (2, 2)}]
    )
    def test_matrix_norm_on_other_layouts(self, shapes):
        with pytest.raises(
            ValueError, match=r"expected exactly one block .* try modular\(layout\) or Max"
        ):
            Spectral().bind(lay_out(shapes))

    def test_matrix_norm_for_every_block_meets_a_vector(self):
        with pytest.raises(ValueError, match=r"got blocks b \(3,\)"):
            Max(Spectral()).bind(BLOCKS)

    def test_wrong_number_of_weights(self):
        for norm in (Spectral().bind(lay_out({"W": (3, 4)})), modular(BLOCKS)):
            with pytest.raises(ValueError, match=r"got 7 weights .*, expected (12|23)"):
                norm.steepest(torch.ones(7))

    @pytest.mark.parametrize("p", [1, 0.5, np.inf, np.nan])
    def test_exponents(self, p):
        with pytest.raises(ValueError, match=r"expected 1 < p < infinity, try L1\(\) or Linf\(\)"):
            Lp(p)
        with pytest.raises(ValueError, match=r"try Nuclear\(\) or Spectral\(\)"):
            Schatten(p)

    @pytest.mark.parametrize(
        ("matrix", "match"),
        [
            (torch.ones(2, 3), r"got a matrix of shape \(2, 3\)"),
            (torch.ones(2, 2, 2), "got a matrix of shape"),
            (torch.tensor([1.0, torch.nan]), "not finite"),
            (torch.tensor([[1.0, 0.5], [0.4, 1.0]]), "asymmetry 0.1"),
            (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), "eigenvalues from -1 to 3"),
            (torch.ones(3, 3), "expected a positive definite one"),
            (torch.tensor([1.0, 0.0]), "eigenvalues from 0 to 1"),
        ],
    )
    def test_mahalanobis_matrices(self, matrix, match):
        with pytest.raises(ValueError, match=match):
            Mahalanobis(matrix)

    def test_mahalanobis_of_another_size(self):
        with pytest.raises(ValueError, match="for 6 weights and a layout with 23"):
            Mahalanobis(spd(6)).bind(BLOCKS)

    def test_block_names_and_scales(self):
        with pytest.raises(
            ValueError, match=r"got norms for \['W'\] .* expected the layout's blocks"
        ):
            Max({"W": Spectral()}).bind(BLOCKS)
        with pytest.raises(ValueError, match=r"scales for \['V'\]"):
            Max(L2(), {"V": 1.0}).bind(BLOCKS)
        with pytest.raises(
            ValueError, match=r"got scale 0.0 for block 'W', expected a positive number"
        ):
            Max(L2(), {"W": 0.0})

    def test_nesting(self):
        with pytest.raises(ValueError, match="expected a norm of one block"):
            Max(Sum(L2()))
        with pytest.raises(ValueError, match="expected a norm of one block"):
            Max({"W": L2})
