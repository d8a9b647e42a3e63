"""Clarke's gradients of every margin at a point: one for each margin on a smooth net, a set on
kinks."""

from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flowsim.diagnostics.selected import margin_reading, selected_sides, strictly_between
from flowsim.kernels.reference import jacobian
from flowsim.motion.state import State
from flowsim.norms.norm import Norm
from flowsim.numerics.batched import dot
from flowsim.numerics.shapes import Row
from flowsim.problems.kinks import NetAt
from flowsim.problems.problem import Problem

PerExample: TypeAlias = Float[Tensor, "N m"]
"""One number for each example and hidden unit of one trajectory."""

PerFreeKink: TypeAlias = Float[Tensor, " K"]
"""One number for each free kink."""

Indices: TypeAlias = Int[Tensor, " A"]
"""One index for each margin."""

Gradients: TypeAlias = Float[Tensor, "A P"]
"""One gradient for each margin."""


@dataclass(frozen=True)
class FreeKinks:
    """K pairs of a margin and a neuron, in which the margin's gradient may take either side.

    The k-th moves the gradient of margin ``owner[k]`` by up to ``normal[k]``, which lies at the
    places ``columns[k]`` of the weights; ``D`` is the part of it that the flow has selected."""

    owner: Int[Tensor, " K"]
    columns: Int[Tensor, "K d"]
    normal: Float[Tensor, "K d"]
    D: PerFreeKink

    def __len__(self) -> int:
        return len(self.owner)

    def along(self, u: Row) -> PerFreeKink:
        """⟨n_k, u⟩."""
        return dot(self.normal, u[self.columns])

    def normals(self, size: int) -> Float[Tensor, "K P"]:
        """n_k with all its zeros."""
        zeros = self.normal.new_zeros(len(self), size)
        return zeros.scatter_(1, self.columns, self.normal)


@dataclass(frozen=True)
class GradientSets:
    """The sets ∂q_i(w) of A margins: base_i + Σ D_k n_k over the free kinks k of i, D in [0, 1]."""

    base: Gradients
    kinks: FreeKinks

    @staticmethod
    def of(problem: Problem, state: State, active: Indices) -> "GradientSets":
        """Those of the ``active`` margins, for a state of one trajectory. A kink is free where its
        multiplier is strictly between 0 and 1."""
        example, cotangent = _cotangents(problem, state.w, active)
        sides = selected_sides(problem, state)
        if sides is None:
            J = problem.net.jacobian(state.w, problem.x)[0]  # (N, C, P)
            kinks = _no_kinks(J)
        else:
            net = problem.two_layer(1)
            point = net.at(state.w)
            multipliers = net.spread(sides.view_as(point.z))
            D = multipliers[0]  # (N, m)
            J = _with_free_kinks_off(point, D)
            kinks = _free_kinks(point, D, example, cotangent)
        base = torch.einsum("ac,acp->ap", cotangent, J[example])
        return GradientSets(base, kinks)

    def at(self, D: PerFreeKink) -> Gradients:
        """The gradients with these multipliers."""
        kinks = self.kinks
        place = (kinks.owner[:, None], kinks.columns)
        moves = D[:, None] * kinks.normal
        return self.base.index_put(place, moves, accumulate=True)

    def lowest(self, u: Row) -> Gradients:
        """Of each set the gradient with the least ⟨·, u⟩."""
        falling = self.kinks.along(u) < 0
        return self.at(falling.to(u))

    def value(self, u: Row, norm: Norm) -> float:
        """min ⟨h, u⟩/‖u‖ over all sets, which ‖Σ p_i h_i‖_* cannot be below."""
        length = norm.value(u)
        if not length > 0:
            return 0.0
        slopes = self.lowest(u) @ u
        return float(slopes.amin() / length)


def _cotangents(
    problem: Problem, w: Float[Tensor, "1 P"], active: Indices
) -> tuple[Indices, Float[Tensor, "A C"]]:
    """The example that each margin belongs to, and the margin's derivative by its outputs."""
    reading = margin_reading(problem)
    f = problem.outputs(w)
    q, back = reading.read(f, problem.y)  # (1, M)
    M = q.shape[1]
    units = torch.eye(M).to(q)[active]
    cotangents = torch.cat([back(unit[None]) for unit in units])  # (A, N, C)
    largest = cotangents.abs().amax(-1)
    example = largest.argmax(-1)
    rows = torch.arange(len(example), device=q.device)
    own = cotangents[rows, example]
    return example, own


def _with_free_kinks_off(point: NetAt, D: PerExample) -> Float[Tensor, "N C P"]:
    """The outputs' Jacobian with the slopes of ``D``, but those of free kinks at D = 0."""
    lowered = torch.where(strictly_between(D), 0.0, D)
    leak = point.net.leak
    slopes = leak + (1 - leak) * lowered
    tape = point.tape(slopes[None])
    return jacobian(tape)[0]


def _free_kinks(
    point: NetAt,
    D: PerExample,
    example: Indices,
    cotangent: Float[Tensor, "A C"],
) -> FreeKinks:
    """Those of a two-layer net, where n is the jump times x_i in the place of neuron j's incoming
    weights, which are the first block."""
    free = strictly_between(D)[example]
    owner, neuron = free.nonzero(as_tuple=True)
    i = example[owner]
    x = point.net.x[0, i]  # (K, d)
    d = x.shape[1]
    first = neuron[:, None] * d
    columns = first + torch.arange(d, device=x.device)
    force = cotangent @ point.last[0]  # (A, m)
    leak = point.net.leak
    jump = (1 - leak) * force[owner, neuron]
    normal = jump[:, None] * x
    return FreeKinks(owner, columns, normal, D[i, neuron])


def _no_kinks(like: Tensor) -> FreeKinks:
    nowhere = torch.zeros(0, 1, dtype=torch.long, device=like.device)
    normal = like.new_zeros(0, 1)
    D = normal[:, 0]
    return FreeKinks(nowhere[:, 0], nowhere, normal, D)
