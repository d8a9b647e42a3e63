"""Quadratic objectives, smooth and with kinks: small models of ties and kinks with exact
solutions."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor

from flowsim.checks import as_floats, as_tensor, require_weights
from flowsim.layout import Layout, lay_out
from flowsim.numerics.shapes import PerTrajectory, Rows
from flowsim.problems.kinks import Hinges, parallels


class _Form(ABC):
    """What objectives with a quadratic part ½ (w − w*)ᵀ H (w − w*) share; their level is −F."""

    matrix: Any
    minimiser: Any
    shape: tuple[int, ...] | None

    degree: float = 1.0
    logarithmic: bool = False
    convex: bool

    @property
    def size(self) -> int:
        return len(self.minimiser)

    @property
    def layout(self) -> Layout:
        return lay_out({"w": self.shape or (self.size,)})

    @abstractmethod
    def ascent(self, w: Rows) -> tuple[PerTrajectory, Rows]:
        """The level and its gradient."""

    def lam(self, w: Rows) -> PerTrajectory:
        level, _ = self.ascent(w)
        return level

    def curvature(self, w: Rows) -> Float[Tensor, "B P P"]:
        root = self._square_root.to(w)
        return root.expand(len(w), -1, -1)

    @cached_property
    def _square_root(self) -> Float[Tensor, "P P"]:
        values, basis = torch.linalg.eigh(self.matrix)
        roots = values.clamp_min(0).sqrt()
        return (basis * roots) @ basis.mT

    def check_weights(self, w: Tensor) -> None:
        require_weights(w, self.size)

    def select(self, rows: Tensor) -> Self:
        return self

    def like(self, w: Tensor) -> Self:
        moved = {}
        for field in fields(self):  # type: ignore[arg-type]
            part = getattr(self, field.name)
            if isinstance(part, Tensor):
                moved[field.name] = part.to(w)
        return replace(self, **moved)  # type: ignore[type-var]

    def _hold(self, expected: str, **shapes: tuple[int, ...]) -> None:
        """Hold the parts as tensors like the first one. Raises where they have other shapes than
        these, in words ``expected``, are not finite, or make no quadratic form."""
        owner = type(self).__name__
        parts = {}
        for name in shapes:
            given = as_tensor(getattr(self, name), name)
            parts[name] = as_floats(given)
        found = {name: tuple(part.shape) for name, part in parts.items()}
        if found != shapes:
            got = " and ".join(f"{name} {shape}" for name, shape in found.items())
            raise ValueError(f"{owner}: got {got}, expected {expected}")
        (P,) = shapes["minimiser"]
        if math.prod(self.shape or (P,)) != P:
            expected = f"one that holds {P} weights"
            raise ValueError(f"{owner}: got shape {self.shape}, expected {expected}")
        finite = [bool(torch.isfinite(part).all()) for part in parts.values()]
        if not all(finite):
            raise ValueError(f"{owner}: got NaN or infinite entries, expected finite numbers")
        H = parts["matrix"]
        if not _is_form(H, self.convex):
            form = "positive semidefinite, try HᵀH" if self.convex else "as (H + Hᵀ)/2 is"
            raise ValueError(f"{owner}: got a matrix that is not symmetric {form}")
        parts["matrix"] = 0.5 * (H + H.T)
        first = next(iter(parts.values()))
        held = {name: part.to(first) for name, part in parts.items()}
        vars(self).update(held)


def _is_form(H: Tensor, convex: bool) -> bool:
    """Whether H is symmetric, and positive semidefinite where ``convex`` asks for it."""
    rounding = 1e4 * torch.finfo(H.dtype).eps * float(H.abs().max())
    skew = float((H - H.T).abs().max())
    if skew > rounding:
        return False
    return not convex or float(torch.linalg.eigvalsh(H)[0]) >= -rounding


@dataclass(frozen=True)
class Quadratic(_Form):
    """F(w) = ½ (w − w*)ᵀ H (w − w*): ``matrix`` H (P, P), symmetric positive semidefinite,
    ``minimiser`` w* (P,).

    ``shape`` reads the weights as a matrix, for matrix norms. The level is −F and flow time the
    ordinary one."""

    matrix: Any
    minimiser: Any
    shape: tuple[int, ...] | None = None

    kinks: bool = False
    convex: bool = True

    def __post_init__(self) -> None:
        P = as_tensor(self.minimiser, "minimiser").numel()
        self._hold("(P, P) and (P,)", matrix=(P, P), minimiser=(P,))

    def ascent(self, w: Tensor) -> tuple[Tensor, Tensor]:
        r = w - self.minimiser
        h = -(r @ self.matrix)
        level = 0.5 * (h * r).sum(-1)
        return level, h

    def hinges(self, w: Tensor) -> Hinges:
        raise ValueError("a quadratic has no kinks")


@dataclass(frozen=True)
class PiecewiseQuadratic(_Form):
    """F(w) = ½ (w − w*)ᵀ H (w − w*) + ⟨b, w⟩ + Σ_k c_k max(⟨n_k, w⟩, 0), a small model of kinks and
    ties.

    ``slope`` b (P,), ``normals`` n (K, P), ``weights`` c (K,) of either sign, ``matrix`` H (P, P)
    symmetric and ``minimiser`` w* (P,), both zero where not given. The level is −F: kinks with c >
    0 attract. ``curvature`` is that of the positive part of H, all of H where it is positive
    semidefinite. ``shape`` is for matrix norms.

    >>> toy = PiecewiseQuadratic(slope=[-0.5], normals=[[1.0], [1.0]], weights=[1.0, -0.8])
    >>> toy.hinges(torch.zeros(1, 1, dtype=torch.float64)).jump  # parallel normals share one kink
    tensor([[-0.2000,  0.0000]], dtype=torch.float64)
    """

    slope: Any
    normals: Any
    weights: Any
    matrix: Any = None
    minimiser: Any = None
    shape: tuple[int, ...] | None = None

    kinks: bool = True
    convex: bool = False

    def __post_init__(self) -> None:
        K = as_tensor(self.weights, "weights").numel()
        P = as_tensor(self.slope, "slope").numel()
        zero = torch.zeros(P, P, dtype=torch.float64)
        if self.matrix is None:
            vars(self).update(matrix=zero)
        if self.minimiser is None:
            vars(self).update(minimiser=zero[0])
        self._hold(
            "(P,), (K, P), (K,), (P, P) and (P,)",
            slope=(P,),
            normals=(K, P),
            weights=(K,),
            matrix=(P, P),
            minimiser=(P,),
        )
        vanishing = (self.normals == 0).all(-1)
        if bool(vanishing.any()):
            raise ValueError(
                "PiecewiseQuadratic: got a normal that is zero, expected none: it makes no kink"
            )

    def ascent(self, w: Tensor) -> tuple[Tensor, Tensor]:
        r = w - self.minimiser
        z = w @ self.normals.mT
        Hr = r @ self.matrix
        smooth = 0.5 * (Hr * r).sum(-1)
        kinked = z.clamp_min(0) @ self.weights
        level = -smooth - w @ self.slope - kinked
        above = (z > 0).to(w) * self.weights
        h = -Hr - self.slope - above @ self.normals
        return level, h

    def hinges(self, w: Tensor) -> Hinges:
        first, multiple = parallels(self.normals @ self.normals.mT)
        jumps = -self.weights * multiple.abs()
        jump = torch.zeros_like(self.weights).index_add(0, first, jumps)
        # of −c max(⟨n, w⟩, 0) with n opposite to its representative, D = 0 is the side where it
        # slopes
        opposite = self.weights * (multiple < 0)
        Hr = (w - self.minimiser) @ self.matrix
        base = -Hr - self.slope - opposite @ self.normals
        return Hinges(
            z=w @ self.normals.mT,
            jump=jump.expand(len(w), -1),
            base=base,
            combine=lambda c: c @ self.normals,
            along=lambda v: v @ self.normals.mT,
        )
