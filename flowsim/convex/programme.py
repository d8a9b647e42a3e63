"""One step of a flow of a net with kinks as a convex programme.

    minimise  T log Σ_r exp(−q_r/T) + ½(v − c)ᵀC(v − c),     q = b + Av − Ks,
    over      ‖v‖ ≤ 1,  s ≥ 0,  s ≥ z + Ev.

A row r is a margin, T log Σ exp its soft minimum. The hinges s are the activations of the pairs
(neuron j, example i) whose kinks attract: Ks is what they take from the margins. C curbs v where
the margins are better known than their curvature. The dual unknowns are the softmax weights p of
the rows and the forces 0 ≤ f ≤ Kᵀp of the hinges; f/Kᵀp is the multiplier of a kink in Clarke's
gradient, and v is steepest for g = Aᵀp − Eᵀf − C(v − c).

Weights are laid out per neuron, ``v (m, D)`` with D = d + C: its d inner weights, then its C outer
ones. Each row belongs to an example. All matrices are of the size of a neuron or of the number of
rows: nothing P × P is formed."""

from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from flowsim.numerics.shapes import Row

PerNeuron: TypeAlias = Float[Tensor, "m D"]
PerHinge: TypeAlias = Float[Tensor, "m N"]
PerRow: TypeAlias = Float[Tensor, " R"]


@dataclass(frozen=True)
class Programme:
    """The data: see the module. With examples ``x (N, d)``, and that of each row in ``example_of``,

        (Av)_r = Σ_j slope_jr ⟨x_example(r), w_j⟩ + Σ_jc ends_jcr a_cj,
        (Ks)_r = Σ_j kinks_jr s_j,example(r),   (Ev)_ji = ⟨x_i, w_j⟩,

    and K vanishes where no hinge is ``live``.
    """

    x: Float[Tensor, "N d"]
    example_of: Int[Tensor, " R"]
    slope: Float[Tensor, "m R"]
    ends: Float[Tensor, "m C R"]
    kinks: Float[Tensor, "m R"]
    live: Bool[Tensor, "m N"]
    z: PerHinge
    offset: PerRow
    temperature: float
    curb: Float[Tensor, "m D D"]
    centre: PerNeuron

    @property
    def inputs(self) -> int:
        return self.x.shape[1]

    @cached_property
    def row_inputs(self) -> Float[Tensor, "d R"]:
        """The inputs of the rows."""
        return self.x[self.example_of].mT.contiguous()

    @cached_property
    def same_example(self) -> Float[Tensor, "R R"]:
        """1 for rows of the same example."""
        same = self.example_of[:, None] == self.example_of
        return same.to(self.x)

    def rows(self, v: PerNeuron) -> PerRow:
        """Av."""
        along = self._inner(v)[:, self.example_of]
        outer = torch.einsum("jcr,jc->r", self.ends, self._outer(v))
        return (self.slope * along).sum(0) + outer

    def columns(self, p: PerRow) -> PerNeuron:
        """Aᵀp."""
        inner = (self.slope * p) @ self.row_inputs.mT
        outer = self.ends @ p
        return torch.cat([inner, outer], 1)

    def along(self, v: PerNeuron) -> PerHinge:
        """Ev where hinges are live, 0 elsewhere."""
        return self.where_live(self._inner(v))

    def where_live(self, f: PerHinge, other: float = 0.0) -> PerHinge:
        """f where hinges are live, and another number elsewhere."""
        return f.where(self.live, other)

    def _inner(self, v: PerNeuron) -> PerHinge:
        """⟨x_i, w_j⟩."""
        return v[:, : self.inputs] @ self.x.mT

    def _outer(self, v: PerNeuron) -> Float[Tensor, "m C"]:
        return v[:, self.inputs :]

    def forces_on_weights(self, f: PerHinge) -> PerNeuron:
        """Eᵀf."""
        outer = self.ends.shape[1]
        return torch.nn.functional.pad(f @ self.x, (0, outer))

    def hinge_loss(self, s: PerHinge) -> PerRow:
        """Ks, what the hinges take from the margins."""
        of_rows = s[:, self.example_of]
        return (self.kinks * of_rows).sum(0)

    def largest_force(self, p: PerRow) -> PerHinge:
        """Kᵀp."""
        force = torch.zeros_like(self.z)
        return force.index_add_(1, self.example_of, self.kinks * p)

    def margins(self, v: PerNeuron, s: PerHinge) -> PerRow:
        """q = b + Av − Ks."""
        return self.offset + self.rows(v) - self.hinge_loss(s)

    def curbed(self, v: PerNeuron) -> PerNeuron:
        """Cv."""
        return (self.curb @ v[..., None])[..., 0]

    def gradient(self, p: PerRow, f: PerHinge, v: PerNeuron) -> Row:
        """g = Aᵀp − Eᵀf − C(v − c), in the order of a net."""
        return self.gradient_change(p, f, v - self.centre)

    def gradient_change(self, dp: PerRow, df: PerHinge, dv: PerNeuron) -> Row:
        """dg = Aᵀdp − Eᵀdf − C dv."""
        pull = self.columns(dp) - self.forces_on_weights(df)
        return self.flat(pull - self.curbed(dv))

    def flat(self, v: PerNeuron) -> Row:
        """The weights in the order of a net: all inner ones, then the outer ones."""
        inner = v[:, : self.inputs].flatten()
        outer = self._outer(v).mT.flatten()
        return torch.cat([inner, outer])

    def blocked(self, v: Row) -> PerNeuron:
        """`flat`, undone."""
        m = len(self.z)
        end = m * self.inputs
        inner = v[:end].view(m, self.inputs)
        outer = v[end:].view(-1, m).mT
        return torch.cat([inner, outer], 1)
