"""The dual of a norm as a norm: its verbs are those of the norm with the roles exchanged."""

import math

import pytest
import torch

import flowsim as fs
from flowsim.layout import lay_out
from flowsim.norms.polars import polar, smoothness

BLOCKS = lay_out({"W": (3, 4), "a": (2, 3)})
A = torch.diag(torch.linspace(0.5, 3.0, 18, dtype=torch.float64))
A[0, 1] = A[1, 0] = 0.2
NORMS = [
    fs.L1(),
    fs.L2(),
    fs.Linf(),
    fs.Lp(1.5),
    fs.Lp(4.0),
    fs.Mahalanobis(A),
    fs.Mahalanobis(torch.linspace(0.5, 3.0, 18, dtype=torch.float64)),
    fs.Max({"W": fs.Spectral(), "a": fs.Linf()}, {"W": 2.0}),
    fs.Sum({"W": fs.Nuclear(), "a": fs.L1()}, {"a": 0.5}),
    fs.Euclidean({"W": fs.Schatten(3.0), "a": fs.Lp(2.5)}, {"W": 2.0}),
]


@pytest.mark.parametrize("norm", NORMS, ids=lambda n: n.name)
def test_value_and_dual_change_places(norm):
    unbound, norm = polar(norm).bind(BLOCKS), norm.bind(BLOCKS)
    v = torch.randn(7, 18, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(polar(norm).value(v), norm.dual(v), rtol=1e-12, atol=0)
    torch.testing.assert_close(polar(norm).dual(v), norm.value(v), rtol=1e-12, atol=0)
    torch.testing.assert_close(polar(polar(norm)).value(v), norm.value(v), rtol=1e-12, atol=0)
    torch.testing.assert_close(unbound.value(v), norm.dual(v), rtol=1e-12, atol=0)


@pytest.mark.parametrize("norm", NORMS, ids=lambda n: n.name)
def test_its_steepest_direction_is_a_subgradient_of_the_norm(norm):
    norm = norm.bind(BLOCKS)
    draw = torch.Generator().manual_seed(1)
    w, v = (torch.randn(50, 18, generator=draw, dtype=torch.float64) for _ in range(2))
    n = polar(norm).steepest(w)
    torch.testing.assert_close(norm.dual(n), torch.ones(50).double())
    assert (
        norm.value(v) - norm.value(w) - (n * (v - w)).sum(-1)
    ).min() > -1e-12  # ‖v‖ ≥ ‖w‖ + ⟨n, v − w⟩


@pytest.mark.parametrize(
    "norm", [n for n in NORMS if math.isfinite(smoothness(n))], ids=lambda n: n.name
)
def test_the_gradient_of_half_the_square_is_as_smooth_as_said(norm):
    norm = norm.bind(BLOCKS)
    c = smoothness(norm)
    draw = torch.Generator().manual_seed(2)
    w, v = (torch.randn(200, 18, generator=draw, dtype=torch.float64) for _ in range(2))
    for scale in (1.0, 1e-3):
        a, b = (norm.value(u)[:, None] * polar(norm).steepest(u) for u in (w, w + scale * v))
        assert (norm.dual(a - b) <= c * scale * norm.value(v) * (1 + 1e-9)).all()


def test_a_norm_of_the_users_is_refused():
    class Own(fs.norms.norm.Norm):
        name, symbol, ties = "own", "own", False
        value = dual = steepest = _nearest = lambda self, v: v

    with pytest.raises(ValueError, match="got the norm 'own', expected one whose dual"):
        polar(Own())
