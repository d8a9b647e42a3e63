"""Norms with gradients that tie in every way, and what tests of norms and faces share."""

from dataclasses import dataclass

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
