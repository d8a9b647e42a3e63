"""Data: seeded synthetic families, and the digits that scikit-learn carries. Nothing is ever
downloaded."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flowsim.checks import require_not_negative, require_whole
from flowsim.nets.activations import relu
from flowsim.nets.mlp import MLP
from flowsim.problems.losses import exponential
from flowsim.problems.problem import Problem


class Data(NamedTuple):
    """Inputs ``x (N, d)`` and targets ``y (N,)``; with several seeds ``(S, N, d)`` and ``(S,
    N)``."""

    x: Tensor
    y: Tensor


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _signs(positive: Tensor) -> Tensor:
    """±1 as floats."""
    return torch.where(positive, 1.0, -1.0).double()


def _for_seeds(
    draw: Callable[[torch.Generator], tuple[Tensor, Tensor]], seed: int | Iterable[int]
) -> Data:
    """One data set for a seed, or a stack of them, one for each trajectory."""

    def drawn(seed: int) -> Data:
        generator = torch.Generator().manual_seed(int(seed))
        x, y = draw(generator)
        return Data(x, y)

    if not isinstance(seed, Iterable):
        return drawn(seed)
    sets = [drawn(one) for one in seed]
    if not sets:
        raise ValueError(
            "seed: got no seeds, expected an integer or a non-empty sequence, try seed=range(3)"
        )
    x, y = zip(*sets, strict=True)
    return Data(torch.stack(x), torch.stack(y))


def digits(
    classes: Sequence[int] = (3, 6),
    n: int = 100,
    *,
    seed: int | Iterable[int] = 0,
    part: str = "train",
) -> Data:
    """Handwritten digits, 8 × 8 pixels in [0, 1], from scikit-learn's embedded set (about 180 of
    each).

    ``n`` training images are drawn by ``seed``; ``part="test"`` gives all the others. Two classes
    are labelled −1 (the first) and +1; more are labelled 0, 1, 2, … in the order given."""
    from sklearn.datasets import load_digits

    if part not in ("train", "test"):
        raise ValueError(f"digits: got part={part!r}, expected 'train' or 'test'")
    different = set(classes)
    known = different <= set(range(10))
    if not known or not len(classes) == len(different) >= 2:
        expected = "at least two different digits 0 … 9"
        raise ValueError(f"digits: got classes {tuple(classes)}, expected {expected}")
    raw = load_digits()
    names = torch.from_numpy(raw.target)
    chosen = torch.isin(names, torch.tensor(list(classes)))
    images = torch.from_numpy(raw.data)[chosen] / 16
    names = names[chosen]
    most = len(names) - 1
    if not isinstance(n, int) or not 1 <= n <= most:
        raise ValueError(
            f"digits: got n={n}, expected 1 … {most}: these classes have {most + 1} images"
        )
    members = torch.stack([names == c for c in classes])
    labels = members.long().argmax(0)
    if len(classes) == 2:
        labels = 2 * labels - 1

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        order = torch.randperm(len(names), generator=generator)
        train, test = order.split([n, len(names) - n])
        rows = train if part == "train" else test
        return images[rows], labels[rows]

    return _for_seeds(draw, seed)


def gaussian_separable(
    n: int = 100, d: int = 20, *, margin: float = 0.1, seed: int | Iterable[int] = 0
) -> Data:
    """Gaussian inputs that a random unit vector u separates: labels sign⟨u, x⟩, and x moved along u
    until ``y⟨u, x⟩ ≥ margin``."""
    require_whole("gaussian_separable", n=n, d=d)
    require_not_negative("gaussian_separable", margin=margin)

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        u = _normal(generator, d)
        u = u / u.norm()
        x = _normal(generator, n, d)
        score = x @ u
        y = _signs(score >= 0)
        short = (margin - y * score).clamp_min(0)
        moves = (short * y)[:, None] * u
        return x + moves, y

    return _for_seeds(draw, seed)


def teacher_student(
    n: int = 250,
    d: int = 232,
    *,
    teacher_width: int = 64,
    active: int = 3,
    seed: int | Iterable[int] = 0,
) -> Data:
    """Gaussian inputs labelled by a sparse random ReLU teacher, sign Σ_j u_j relu⟨w_j, x⟩ (Tsilivis
    et al. 2026, §4.1): each of ``teacher_width`` neurons reads ``active`` coordinates."""
    require_whole("teacher_student", n=n, d=d, teacher_width=teacher_width, active=active)
    if active > d:
        raise ValueError(f"teacher_student: got active={active}, expected 1 … {d}")

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        inner = _normal(generator, teacher_width, d)
        places = torch.rand(teacher_width, d, generator=generator)
        order = places.argsort(1)
        kept = order.argsort(1) < active
        outer = _normal(generator, teacher_width)
        x = _normal(generator, n, d)
        sparse = inner * kept
        score = torch.relu(x @ sparse.T) @ outer
        return x, _signs(score >= 0)

    return _for_seeds(draw, seed)


def peers_net(
    d: int = 20, width: int = 64, n: int = 50, *, seed: int = 0
) -> tuple[Problem, Tensor]:
    """A benchmark problem and its start: Gaussian inputs with random labels, exponential loss, and
    a two-layer ReLU net from W ~ N(0, ¼/d), a ~ N(0, ¼/width)."""
    generator = torch.Generator().manual_seed(seed)
    x = _normal(generator, n, d)
    coins = torch.rand(n, generator=generator, dtype=torch.float64)
    y = _signs(coins >= 0.5)
    net = MLP([d, width, 1], activation=relu)
    w = net.init(seeds=seed, scale=0.5)
    return Problem(net, x, y, exponential), w
