r"""Multipliers of attracting kinks: the gradient of least dual norm.

    min_D ‖b − Σ c_k D_k n_k‖_*  =  max_{‖u‖ ≤ 1} ⟨b, u⟩ − Σ c_k max(⟨n_k, u⟩, 0),    0 ≤ D ≤ 1,

which is a box-constrained quadratic programme in quadratic norms, a linear programme in ℓ1 and ℓ∞,
and a splitting between the ball and the kinks in every other norm."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from flowsim.convex import box
from flowsim.convex.admm import Form, split
from flowsim.convex.linear import BallProgramme, is_linear, linear_optimum
from flowsim.norms.norm import Norm
from flowsim.velocity.ties import Slabs

_Vector = Float[Tensor, " P"]
_PerKink = Float[Tensor, " K"]

END = 1e-9  # multipliers so near to 0 or 1 are taken to be there


@dataclass(frozen=True)
class AttractingKinks:
    """The attracting kinks at one place: normals ``n``, ``c`` = −jump, the gradient ``b`` for
    D = 0, and their ``index`` among all kinks."""

    b: _Vector
    n: Float[Tensor, "K P"]
    c: _PerKink
    index: Int[Tensor, " K"]

    def gradient(self, D: _PerKink) -> _Vector:
        return self.b - (self.c * D) @ self.n

    def slope(self, u: _Vector) -> Float[Tensor, ""]:
        """The directional derivative of the level."""
        across = self.n @ u
        return self.b @ u - self.c @ across.clamp_min(0)

    def respected(self, D: _PerKink) -> Slabs:
        """Where u may lie: ⟨n, u⟩ is at most 0 for D = 0, at least 0 for D = 1, 0 in between."""
        zero = torch.zeros_like(D)
        low = torch.where(D <= 0, -torch.inf, zero)
        high = torch.where(D >= 1, torch.inf, zero)
        length = torch.linalg.vector_norm(self.n, dim=-1)
        return Slabs(self.n / length[:, None], low, high)


def least_dual_norm(norm: Norm, kinks: AttractingKinks) -> tuple[_PerKink, _Vector]:
    """D in [0, 1] for which ‖b − Σ c_k D_k n_k‖_* is least, and one of the steepest u."""
    scale = norm.dual(kinks.b)
    if not (len(kinks.c) and scale > 0):  # no gradient is shorter than zero
        return torch.zeros_like(kinks.c), norm.steepest(kinks.b)
    b = kinks.b / scale
    scaled = replace(kinks, b=b, c=kinks.c / scale)
    if norm.quadratic:
        D, u = _by_least_squares(norm, scaled)
    elif is_linear(norm):
        D, u = _by_linear_programme(norm, scaled)
    else:
        D, u = _by_splitting(norm, scaled)
    D = torch.where(D < END, 0.0, D)
    return torch.where(D > 1 - END, 1.0, D), u


def _by_least_squares(norm: Norm, kinks: AttractingKinks) -> tuple[Tensor, Tensor]:
    """‖h‖_*² = ⟨h, A⁻¹h⟩ is a quadratic form in the forces c·D, which are in a box."""
    n = kinks.n
    inverse = norm.by_inverse_metric(n)  # A⁻¹n (K, P)
    gram = n @ inverse.mT
    pull = inverse @ kinks.b
    solved = box.solve_box(
        gram[None, None],
        pull[None, None],
        kinks.c[None, None],
        max_sweeps=40 + 4 * len(n),
    )
    D = solved.force[0, 0] / kinks.c
    h = kinks.gradient(D)
    return D, norm.steepest(h)


def _by_linear_programme(norm: Norm, kinks: AttractingKinks) -> tuple[Tensor, Tensor]:
    """D are the multipliers of s_k ≥ c_k ⟨n_k, u⟩."""
    b = kinks.b.cpu().numpy()
    cn = (kinks.c[:, None] * kinks.n).cpu().numpy()
    K = len(cn)
    programme = BallProgramme(
        goal=np.append(b, -np.ones(K)),
        rows=np.hstack([cn, -np.eye(K)]),
        lowest=np.zeros(K),
    )
    best = linear_optimum(programme, norm)
    D = torch.from_numpy(best.multipliers).to(kinks.b)
    u = torch.from_numpy(best.u).to(kinks.b)
    return D.clamp(0, 1), u


def _by_splitting(norm: Norm, kinks: AttractingKinks) -> tuple[Tensor, Tensor]:
    """The unit ball and the kinks c max(⟨n, u⟩, 0) are the parts."""
    length = torch.linalg.vector_norm(kinks.n, dim=-1)
    unit = kinks.n / length[:, None]
    c = kinks.c * length

    def prox(z: Tensor, rho: float) -> Tensor:
        lowered = z - c / rho
        return torch.where(z > 0, lowered.clamp_min(0), z)

    b = kinks.b
    form = Form(unit[:0], 0.0, b)
    done = split(form, norm.project, unit, prox, start=norm.steepest(b))
    D = done.force / c
    return D.clamp(0, 1), done.at
