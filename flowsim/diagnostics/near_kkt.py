"""A pair of a point and a force that meets the KKT conditions exactly, near one that nearly does.

For Γ and w with the Fenchel–Young gap D = ½‖w‖² + ½‖Γ‖_*² − ⟨w, Γ⟩ there are w' and k' ∈ ∂½‖w'‖²
with ‖w' − w‖ ≤ √D and ‖k' − Γ‖_* ≤ √D (Brøndsted and Rockafellar 1965)."""

from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from flowsim.convex.cones import ekeland_point
from flowsim.diagnostics.series import as_array
from flowsim.norms.norm import Norm
from flowsim.norms.polars import polar
from flowsim.norms.vector import L1, Linf
from flowsim.numerics.shapes import PerTrajectory, Row, Rows

KktPair: TypeAlias = tuple[Rows, Rows]
"""A point w' and a force k' ∈ ∂½‖w'‖²."""


@dataclass(frozen=True)
class Nearby:
    """A pair ``force`` k' ∈ ∂½‖w'‖² near (Γ, w̃), the certificate of Brøndsted and Rockafellar
    (1965).

    ``moved`` = ‖w' − w̃‖/‖w̃‖ and ``missed`` = ‖k' − Γ‖_*/‖w̃‖ are at most √(1 − α), however many
    corners the norm has."""

    w: Rows
    force: Rows
    moved: PerTrajectory
    missed: PerTrajectory


def nearby_pair(norm: Norm, w: Rows, force: Rows, radius: PerTrajectory) -> KktPair:
    """w' and k' within ``radius`` = √D of w and of the force Γ. In norms other than quadratic ones,
    ℓ1 and ℓ∞ by a cone programme for each trajectory."""
    if norm.quadratic:
        return _half_way(norm, w, force)
    if isinstance(norm, Linf):
        return _saturated(w, force, radius)
    if isinstance(norm, L1):  # the same with the roles of w and force exchanged
        force, w = _saturated(force, w, radius)
        return w, force
    pairs = map(partial(_cone_nearby, norm), w, force, radius)
    points, forces = zip(*pairs, strict=True)
    return torch.stack(points), torch.stack(forces)


def _half_way(norm: Norm, w: Rows, force: Rows) -> KktPair:
    """In quadratic norms: the middle of w and of the point ∇½‖Γ‖_*² that Γ is the force of."""
    middle = 0.5 * (w + norm.by_inverse_metric(force))
    size = norm.value(middle)[:, None]
    return middle, size * polar(norm).steepest(middle)


def _saturated(w: Rows, force: Rows, radius: PerTrajectory) -> KktPair:
    """In ℓ∞: keep the force where w is within √D of its maximum, with the right sign. What is
    dropped has a mass m of at most √D, as D = Σ |Γ_i|(‖w‖ − |w_i|). Then lower the maximum to ‖w‖ −
    m, which fits the remaining force."""
    size = w.abs().amax(-1, keepdim=True)
    sign = force.sign()
    below = size - sign * w
    near = below <= radius[:, None]
    kept = near & (force != 0)
    remaining = torch.where(kept, force, 0.0)
    level = remaining.abs().sum(-1, keepdim=True)
    lowered = w.clamp(-level, level)
    moved = torch.where(kept, sign * level, lowered)
    return moved, remaining


def _cone_nearby(norm: Norm, w: Row, force: Row, radius: Tensor) -> tuple[Row, Row]:
    """Ekeland's point, min ½‖v‖² − ⟨Γ, v⟩ + √D‖v − w‖, by a cone programme; k' are the multipliers
    of x = v."""
    size = float(norm.value(w))
    at = as_array(w / size)
    pull = as_array(force / size)
    spread = float(radius) / size
    x, k = ekeland_point(norm, at, pull, spread)
    point = torch.from_numpy(x).to(w)
    multipliers = torch.from_numpy(k).to(w)
    return size * point, size * multipliers
