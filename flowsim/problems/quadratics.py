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
from flowsim.problems.kinks import Hinges, parallels


class _Form(ABC):
    """What objectives with a quadratic part ½ (w − w*)ᵀ H (w − w*) share; their level is −F."""

    matrix: Tensor
    minimiser: Tensor
    shape: tuple[int, ...] | None

    degree: float = 1.0
    logarithmic: bool = False

    @property
    def size(self) -> int:
        return self.minimiser.shape[0]

    @property
    def layout(self) -> Layout:
        return lay_out({"w": self.shape or (self.size,)})

    @abstractmethod
    def ascent(self, w: Float[Tensor, "B P"]) -> tuple[Float[Tensor, " B"], Float[Tensor, "B P"]]:
        """The level and its gradient."""

    def lam(self, w: Float[Tensor, "B P"]) -> Float[Tensor, " B"]:
        return self.ascent(w)[0]

    def curvature(self, w: Float[Tensor, "B P"]) -> Float[Tensor, "B P P"]:
        return self._root.to(w).expand(w.shape[0], -1, -1)

    @cached_property
    def _root(self) -> Tensor:
        values, basis = torch.linalg.eigh(self.matrix)
        return (basis * values.clamp_min(0).sqrt()) @ basis.mT

    def check_weights(self, w: Tensor) -> None:
        require_weights(w, self.size)

    def select(self, rows: Tensor) -> Self:
        return self

    def like(self, w: Tensor) -> Self:
        parts = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        moved = {name: part.to(w) for name, part in parts.items() if isinstance(part, Tensor)}
        return replace(self, **moved)  # type: ignore[type-var]


@dataclass(frozen=True)
class Quadratic(_Form):
    """F(w) = ½ (w − w*)ᵀ H (w − w*): ``matrix`` H (P, P), symmetric positive semidefinite,
    ``minimiser`` w* (P,).

    ``shape`` reads the weights as a matrix, for matrix norms. The level is −F and flow time the
    ordinary one."""

    matrix: Tensor
    minimiser: Tensor
    shape: tuple[int, ...] | None = None

    kinks: bool = False
    convex: bool = True

    def __post_init__(self) -> None:
        H, target = (
            as_floats(as_tensor(getattr(self, name), name)) for name in ("matrix", "minimiser")
        )
        if H.ndim != 2 or H.shape[0] != H.shape[1] or target.shape != H.shape[:1]:
            raise ValueError(
                f"Quadratic: got matrix {tuple(H.shape)} and minimiser {tuple(target.shape)}, "
                "expected (P, P) and (P,)"
            )
        if math.prod(self.shape or target.shape) != len(target):
            raise ValueError(
                f"Quadratic: got shape {self.shape}, expected one that holds {len(target)} weights"
            )
        if not (torch.isfinite(H).all() and torch.isfinite(target).all()):
            raise ValueError("Quadratic: got NaN or infinite entries, expected finite numbers")
        rounding = 1e4 * torch.finfo(H.dtype).eps * float(H.abs().max())
        if (
            float((H - H.T).abs().max()) > rounding
            or float(torch.linalg.eigvalsh(H)[0]) < -rounding
        ):
            raise ValueError(
                "Quadratic: got a matrix that is not symmetric positive semidefinite, try HᵀH"
            )
        object.__setattr__(self, "matrix", 0.5 * (H + H.T))
        object.__setattr__(self, "minimiser", target.to(H))

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
        b, n, c = (
            as_floats(as_tensor(getattr(self, name), name))
            for name in ("slope", "normals", "weights")
        )
        if b.ndim != 1 or n.ndim != 2 or n.shape[1:] != b.shape or c.shape != n.shape[:1]:
            raise ValueError(
                f"PiecewiseQuadratic: got slope {tuple(b.shape)}, normals {tuple(n.shape)} and weights "
                f"{tuple(c.shape)}, expected (P,), (K, P) and (K,)"
            )
        H = (
            b.new_zeros(len(b), len(b))
            if self.matrix is None
            else as_floats(as_tensor(self.matrix, "matrix"))
        )
        target = (
            torch.zeros_like(b)
            if self.minimiser is None
            else as_floats(as_tensor(self.minimiser, "minimiser"))
        )
        if H.shape != (len(b), len(b)) or target.shape != b.shape:
            raise ValueError(
                f"PiecewiseQuadratic: got matrix {tuple(H.shape)} and minimiser {tuple(target.shape)}, "
                f"expected ({len(b)}, {len(b)}) and ({len(b)},)"
            )
        if math.prod(self.shape or b.shape) != len(b):
            raise ValueError(
                f"PiecewiseQuadratic: got shape {self.shape}, expected one that holds {len(b)} weights"
            )
        if not all(bool(torch.isfinite(t).all()) for t in (b, n, c, H, target)):
            raise ValueError(
                "PiecewiseQuadratic: got NaN or infinite entries, expected finite numbers"
            )
        if bool((n == 0).all(-1).any()):
            raise ValueError(
                "PiecewiseQuadratic: got a normal that is zero, expected none: it makes no kink"
            )
        if float((H - H.T).abs().max()) > 1e4 * torch.finfo(H.dtype).eps * float(H.abs().max()):
            raise ValueError(
                "PiecewiseQuadratic: got a matrix that is not symmetric, try (H + Hᵀ)/2"
            )
        parts = {
            "slope": b,
            "normals": n,
            "weights": c,
            "matrix": 0.5 * (H + H.T),
            "minimiser": target,
        }
        for name, value in parts.items():
            object.__setattr__(self, name, value.to(b))

    def ascent(self, w: Tensor) -> tuple[Tensor, Tensor]:
        r, z = w - self.minimiser, w @ self.normals.mT
        level = (
            -0.5 * (r @ self.matrix * r).sum(-1) - w @ self.slope - z.clamp_min(0) @ self.weights
        )
        return level, -(r @ self.matrix) - self.slope - (
            (z > 0).to(w) * self.weights
        ) @ self.normals

    def hinges(self, w: Tensor) -> Hinges:
        first, multiple = parallels(self.normals @ self.normals.mT)
        opposite = multiple < 0
        jump = torch.zeros_like(self.weights).index_add(0, first, -self.weights * multiple.abs())
        # of −c max(⟨n, w⟩, 0) with n opposite to its representative, D = 0 is the side where it
        # slopes
        sloping = (self.weights * opposite) @ self.normals
        base = -((w - self.minimiser) @ self.matrix) - self.slope - sloping
        return Hinges(
            z=w @ self.normals.mT,
            jump=jump.expand(w.shape[0], -1),
            base=base,
            combine=lambda c: c @ self.normals,
            along=lambda v: v @ self.normals.mT,
        )
