"""Points of a face of the ball, which steepest directions that tie fill: that of least curvature,
and the furthest one.

Faces are known by their projection, whatever the norm, so the programmes are solved by splitting
(`admm.split`)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from flowsim.convex.admm import Form, Split, split
from flowsim.norms.faces import Face

_Vector = Float[Tensor, " P"]


@dataclass(frozen=True)
class Slabs:
    """The u with low ≤ ⟨n_k, u⟩ ≤ high, for unit normals n_k."""

    n: Float[Tensor, "K P"]
    low: Float[Tensor, " K"]
    high: Float[Tensor, " K"]

    def minimum(self, form: Form, face: Face, start: _Vector) -> Split:
        """Of a form, over the points of the face that lie in the slabs."""

        def clamped(z: Tensor, _: float) -> Tensor:
            return z.clamp(self.low, self.high)

        return split(form, face.project, self.n, clamped, start=start)


def least_curved(face: Face, C: Float[Tensor, "R P"], slabs: Slabs, start: _Vector) -> _Vector:
    """The point of the face, in the slabs, with least ‖Cu‖; the shortest one if there are
    several."""
    _, s, seen = torch.linalg.svd(C, full_matrices=False)  # (r), (r, P)
    kept = s > 1e-7 * s.amax(-1, keepdim=True)  # curvature below rounding is none
    s = s[kept]
    seen = seen[kept]
    u = start
    zero = torch.zeros_like(start)
    if len(s):
        relative = s / s[0]
        curvature = Form(relative[:, None] * seen, 0.0, zero)
        u = slabs.minimum(curvature, face, u).at
    if len(s) == len(u):
        return u
    fixed = seen @ u
    fixing = Slabs(
        n=torch.cat([slabs.n, seen]),
        low=torch.cat([slabs.low, fixed]),
        high=torch.cat([slabs.high, fixed]),
    )
    length = Form(C[:0], 1.0, zero)
    return fixing.minimum(length, face, u).at


def support_within(face: Face, a: _Vector, slabs: Slabs) -> Float[Tensor, ""]:
    """The maximum of ⟨a, v⟩ over the points of the face that lie in the slabs: a bound from above,
    by the multipliers."""
    scale = a.abs().amax()
    if not scale > 0:
        return a.sum()
    form = Form(slabs.n[:0], 0.0, a / scale)
    force = slabs.minimum(form, face, face.element()).force
    force = torch.where(torch.isinf(slabs.low), force.clamp_min(0), force)
    force = torch.where(torch.isinf(slabs.high), force.clamp_max(0), force)
    left = a - scale * (force @ slabs.n)
    return face.support(left)
