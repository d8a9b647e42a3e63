"""Clarke's gradients of every margin at a point: one for each margin on a smooth net, a set on
kinks."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from flowsim.diagnostics.selected import margin_reading, selected_sides
from flowsim.kernels.reference import jacobian
from flowsim.motion.state import State
from flowsim.norms.norm import Norm
from flowsim.problems.kinks import NetAt
from flowsim.problems.problem import Problem


@dataclass(frozen=True)
class FreeKinks:
    """K pairs of a margin and a neuron, in which the margin's gradient may take either side.

    The k-th moves the gradient of margin ``owner[k]`` by up to ``normal[k]``, which lies at the
    places ``columns[k]`` of the weights; ``D`` is the part of it that the flow has selected."""

    owner: Int[Tensor, " K"]
    columns: Int[Tensor, "K d"]
    normal: Float[Tensor, "K d"]
    D: Float[Tensor, " K"]

    def __len__(self) -> int:
        return len(self.owner)

    def along(self, u: Float[Tensor, " P"]) -> Float[Tensor, " K"]:
        """⟨n_k, u⟩."""
        return (self.normal * u[self.columns]).sum(-1)

    def normals(self, size: int) -> Float[Tensor, "K P"]:
        """n_k with all its zeros."""
        return self.normal.new_zeros(len(self), size).scatter_(1, self.columns, self.normal)


@dataclass(frozen=True)
class GradientSets:
    """The sets ∂q_i(w) of A margins: base_i + Σ D_k n_k over the free kinks k of i, D in [0, 1]."""

    base: Float[Tensor, "A P"]
    kinks: FreeKinks

    @staticmethod
    def of(problem: Problem, state: State, active: Int[Tensor, " A"]) -> "GradientSets":
        """Those of the ``active`` margins, for a state of one trajectory. A kink is free where its
        multiplier is strictly between 0 and 1."""
        example, cotangent = _cotangents(problem, state.w, active)
        sides = selected_sides(problem, state)
        if sides is None:
            J = problem.net.jacobian(state.w, problem.x)[0]  # (N, C, P)
            kinks = _no_kinks(J[0])
        else:
            point = problem.two_layer(1).at(state.w)
            D = point.net.spread(sides.view_as(point.z))[0]  # (N, m)
            lowered = torch.where(_is_free(D), 0.0, D)
            leak = point.net.leak
            J = jacobian(point.tape(leak + (1 - leak) * lowered[None]))[0]
            kinks = _free_kinks(point, D, example, cotangent)
        return GradientSets(torch.einsum("ac,acp->ap", cotangent, J[example]), kinks)

    def at(self, D: Float[Tensor, " K"]) -> Float[Tensor, "A P"]:
        """The gradients with these multipliers."""
        place = (self.kinks.owner[:, None], self.kinks.columns)
        return self.base.index_put(place, D[:, None] * self.kinks.normal, accumulate=True)

    def lowest(self, u: Float[Tensor, " P"]) -> Float[Tensor, "A P"]:
        """Of each set the gradient with the least ⟨·, u⟩."""
        return self.at((self.kinks.along(u) < 0).to(u))

    def value(self, u: Float[Tensor, " P"], norm: Norm) -> float:
        """min ⟨h, u⟩/‖u‖ over all sets, which ‖Σ p_i h_i‖_* cannot be below."""
        length = norm.value(u)
        return float((self.lowest(u) @ u).amin() / length) if length > 0 else 0.0


def _cotangents(
    problem: Problem, w: Float[Tensor, "1 P"], active: Int[Tensor, " A"]
) -> tuple[Int[Tensor, " A"], Float[Tensor, "A C"]]:
    """The example that each margin belongs to, and the margin's derivative by its outputs."""
    q, back = margin_reading(problem).read(problem.outputs(w), problem.y)  # (1, M)
    units = torch.eye(q.shape[1], dtype=q.dtype, device=q.device)[active]
    cotangents = torch.cat([back(unit[None]) for unit in units])  # (A, N, C)
    example = cotangents.abs().amax(-1).argmax(-1)
    return example, cotangents[torch.arange(len(example), device=q.device), example]


def _free_kinks(
    point: NetAt,
    D: Float[Tensor, "N m"],
    example: Int[Tensor, " A"],
    cotangent: Float[Tensor, "A C"],
) -> FreeKinks:
    """Those of a two-layer net, where n is the jump times x_i in the place of neuron j's incoming
    weights, which are the first block."""
    owner, neuron = _is_free(D)[example].nonzero(as_tuple=True)
    i = example[owner]
    x = point.net.x[0, i]  # (K, d)
    d = torch.arange(x.shape[1], device=x.device)
    jump = (1 - point.net.leak) * (cotangent @ point.last[0])[owner, neuron]
    return FreeKinks(owner, neuron[:, None] * len(d) + d, jump[:, None] * x, D[i, neuron])


def _no_kinks(like: Float[Tensor, "C P"]) -> FreeKinks:
    none = torch.zeros(0, 1, dtype=torch.long, device=like.device)
    return FreeKinks(none[:, 0], none, like.new_zeros(0, 1), like.new_zeros(0))


def _is_free(D: Float[Tensor, "N m"]) -> Bool[Tensor, "N m"]:
    return (D > 0) & (D < 1)
