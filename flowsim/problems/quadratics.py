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
        return self.ascent(w)[0]

    def curvature(self, w: Rows) -> Float[Tensor, "B P P"]:
        return self._square_root.to(w).expand(len(w), -1, -1)

    @cached_property
    def _square_root(self) -> Float[Tensor, "P P"]:
        values, basis = torch.linalg.eigh(self.matrix)
        return (basis * values.clamp_min(0).sqrt()) @ basis.mT

    def check_weights(self, w: Tensor) -> None:
        require_weights(w, self.size)

    def select(self, rows: Tensor) -> Self:
        return self

    def like(self, w: Tensor) -> Self:
        names = (field.name for field in fields(self))  # type: ignore[arg-type]
        parts = {name: getattr(self, name) for name in names}
        moved = {name: part.to(w) for name, part in parts.items() if isinstance(part, Tensor)}
        return replace(self, **moved)  # type: ignore[type-var]

    def _hold(self, expected: str, **shapes: tuple[int, ...]) -> None:
        """Hold the parts as tensors like the first one. Raises where they have other shapes than
        these, in words ``expected``, are not finite, or make no quadratic form."""
        owner = type(self).__name__
        parts = {name: as_floats(as_tensor(getattr(self, name), name)) for name in shapes}
        if any(parts[name].shape != shape for name, shape in shapes.items()):
            got = " and ".join(f"{name} {tuple(part.shape)}" for name, part in parts.items())
            raise ValueError(f"{owner}: got {got}, expected {expected}")
        (P,), H = shapes["minimiser"], parts["matrix"]
        if math.prod(self.shape or (P,)) != P:
            expected = f"one that holds {P} weights"
            raise ValueError(f"{owner}: got shape {self.shape}, expected {expected}")
        if not all(bool(torch.isfinite(part).all()) for part in parts.values()):
            raise ValueError(f"{owner}: got NaN or infinite entries, expected finite numbers")
        rounding = 1e4 * torch.finfo(H.dtype).eps * float(H.abs().max())
        if float((H - H.T).abs().max()) > rounding or (
            self.convex and float(torch.linalg.eigvalsh(H)[0]) < -rounding
        ):
            form = "positive semidefinite, try HᵀH" if self.convex else "as (H + Hᵀ)/2 is"
            raise ValueError(f"{owner}: got a matrix that is not symmetric {form}")
        parts["matrix"] = 0.5 * (H + H.T)
        first = next(iter(parts.values()))
        vars(self).update({name: part.to(first) for name, part in parts.items()})


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
        return 0.5 * (h * r).sum(-1), h

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
        K, P = (as_tensor(getattr(self, name), name).numel() for name in ("weights", "slope"))
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
        if bool((self.normals == 0).all(-1).any()):
            raise ValueError(
                "PiecewiseQuadratic: got a normal that is zero, expected none: it makes no kink"
            )

    def ascent(self, w: Tensor) -> tuple[Tensor, Tensor]:
        r = w - self.minimiser
        z = w @ self.normals.mT
        smooth = 0.5 * (r @ self.matrix * r).sum(-1)
        level = -smooth - w @ self.slope - z.clamp_min(0) @ self.weights
        above = (z > 0).to(w) * self.weights
        return level, -(r @ self.matrix) - self.slope - above @ self.normals

    def hinges(self, w: Tensor) -> Hinges:
        first, multiple = parallels(self.normals @ self.normals.mT)
        jump = torch.zeros_like(self.weights).index_add(0, first, -self.weights * multiple.abs())
        # of −c max(⟨n, w⟩, 0) with n opposite to its representative, D = 0 is the side where it
        # slopes
        sloping = (self.weights * (multiple < 0)) @ self.normals
        return Hinges(
            z=w @ self.normals.mT,
            jump=jump.expand(len(w), -1),
            base=-((w - self.minimiser) @ self.matrix) - self.slope - sloping,
            combine=lambda c: c @ self.normals,
            along=lambda v: v @ self.normals.mT,
        )
