"""The forces of kinks in one implicit step of a two-layer net: linear algebra in sample space and
per neuron.

With J the Jacobian of the outputs, FFᵀ = S the curvature of the loss, A the norm's matrix and N the
normals of the kinks at hand, a step needs A⁻¹, the damping M A = (1 + γτ A⁻¹JᵀSJ)⁻¹ and N M Nᵀ.
Woodbury's identity gives all of them from matrices among examples and among kinks; nothing P × P is
formed."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from flowsim.convex import box
from flowsim.convex.box import LowRank, Solution
from flowsim.kernels import reference as kernels
from flowsim.kernels.reference import Tape
from flowsim.norms.blocks import Euclidean
from flowsim.norms.norm import Norm
from flowsim.norms.vector import L2
from flowsim.numerics.batched import bmm
from flowsim.numerics.shapes import PerPair, PerTrajectory, Rows
from flowsim.problems.kinks import NetAt

DENSE = 600
"""Up to so many pairs one dense factorisation is faster than one for each neuron."""


@dataclass(frozen=True)
class Metric:
    """A quadratic norm as the step needs it: A⁻¹, and its two numbers where it is a multiple on
    each layer, so that different neurons are orthogonal."""

    norm: Norm
    scales: tuple[float, float] | None

    @staticmethod
    def of(norm: Norm) -> "Metric":
        """The metric of a bound quadratic norm."""
        if isinstance(norm, L2):
            return Metric(norm, (1.0, 1.0))
        if isinstance(norm, Euclidean) and all(isinstance(part.norm, L2) for part in norm.blocks):
            first, last = (part.scale**2 for part in norm.blocks)
            return Metric(norm, (first, last))
        return Metric(norm, None)

    def inverse(self, g: Float[Tensor, "... P"]) -> Float[Tensor, "... P"]:
        """A⁻¹g."""
        if self.scales == (1.0, 1.0):
            return g
        return self.norm.by_inverse_metric(g)

    def stiffness(self, point: NetAt) -> PerPair:
        """⟨n, A⁻¹n⟩ for every pair."""
        if self.scales is not None:
            lengths = torch.diagonal(point.net.xx, dim1=-2, dim2=-1)
            return self.scales[0] * lengths[..., None].expand_as(point.z)
        every = torch.ones_like(point.z, dtype=torch.bool)
        normals = ActivePairs.of(point, every, grouped=False).normals()
        return (normals * self.inverse(normals)).sum(-1).view_as(point.z)


@dataclass(frozen=True)
class ActivePairs:
    """The pairs of ``mask`` at a place, which may slide in this step, in groups whose normals are
    A-orthogonal between groups. N holds their normals, x_i in the place of w_j.

    ``example`` and ``neuron (B, G, c)`` name them, ``valid`` tells pairs from padding. Few pairs
    are in one group; many are in one group a neuron, where the norm allows it."""

    point: NetAt
    mask: Bool[Tensor, "B N m"]
    example: Int[Tensor, "B G c"]
    neuron: Int[Tensor, "B G c"]
    valid: Bool[Tensor, "B G c"]

    @staticmethod
    def of(point: NetAt, mask: Bool[Tensor, "B N m"], grouped: bool) -> "ActivePairs":
        """The pairs of ``mask``; in one group a neuron where ``grouped`` and they are many."""
        m = mask.shape[-1]
        grouped = grouped and int(mask.sum((1, 2)).max()) > DENSE
        rows = mask.mT if grouped else mask.flatten(1)[:, None]  # (B, G, ·)
        most = max(1, int(rows.sum(-1).max()))
        ordered = rows.to(torch.int8).sort(dim=-1, descending=True, stable=True)
        order = ordered.indices[..., :most]  # of each row the pairs first, (B, G, c)
        valid = rows.gather(-1, order)
        if not grouped:
            return ActivePairs(point, mask, order // m, order % m, valid)
        neuron = torch.arange(m, device=mask.device)[None, :, None].expand_as(order)
        return ActivePairs(point, mask, order, neuron, valid)

    @property
    def flat(self) -> Int[Tensor, "B Gc"]:
        """The place of every pair among all, row by row."""
        return (self.example * self.mask.shape[2] + self.neuron).flatten(1)

    def take(self, values: PerPair) -> Float[Tensor, "B G c"]:
        """These values at the pairs, 0 at padding."""
        taken = values.flatten(1).gather(1, self.flat).view(self.example.shape)
        return torch.where(self.valid, taken, 0.0)

    def put(self, into: Tensor, values: Float[Tensor, "B G c"]) -> PerPair:
        """``into (B, N, m)`` with these values at the pairs."""
        # padding writes to a place of its own behind the end
        spare = torch.cat([into.flatten(1), into[:, 0, :1]], 1)
        end = spare.shape[1] - 1
        index = torch.where(self.valid.flatten(1), self.flat, end)
        written = spare.scatter(1, index, values.flatten(1).to(into))
        return written[:, :end].view(into.shape)

    def along(self, v: Rows) -> Float[Tensor, "B G c"]:
        """Nv."""
        return self.take(self.point.along(v))

    def combine(self, force: Float[Tensor, "B G c"]) -> Rows:
        """Nᵀλ."""
        spread = self.put(torch.zeros_like(self.point.z), force)
        first = bmm(spread.mT, self.point.net.x).flatten(1)
        return torch.cat([first, torch.zeros_like(self.point.last).flatten(1)], 1)

    def normals(self) -> Float[Tensor, "B Gc P"]:
        """N, dense: for norms that couple neurons only."""
        x, (_, m, d) = self.point.net.x, self.point.first.shape
        size = m * d + self.point.last[0].numel()
        example = self.example.flatten(1)[..., None]  # (B, Gc, 1)
        neuron = self.neuron.flatten(1)[..., None]
        valid = self.valid.flatten(1)[..., None]
        inputs = x.gather(1, example.expand(-1, -1, d))
        place = neuron * d + torch.arange(d, device=x.device)
        zeros = x.new_zeros(*place.shape[:2], size)
        return zeros.scatter(2, place, inputs) * valid

    def gram(self, metric: Metric) -> Float[Tensor, "B G c c"]:
        """N A⁻¹Nᵀ in each group."""
        if metric.scales is None:
            normals = self.normals()
            blocks = (metric.inverse(normals) @ normals.mT)[:, None]
        else:
            batch = torch.arange(len(self.mask), device=self.mask.device)
            row = self.example[..., :, None]
            column = self.example[..., None, :]
            inner = self.point.net.xx[batch[:, None, None, None], row, column]
            same = self.neuron[..., :, None] == self.neuron[..., None, :]
            blocks = torch.where(same, metric.scales[0] * inner, 0.0)
        both = self.valid[..., :, None] & self.valid[..., None, :]
        return torch.where(both, blocks, 0.0)


@dataclass(frozen=True)
class GaussNewton:
    """The damping of one step: v ↦ M A v = v − A⁻¹JᵀF V FᵀJv with V⁻¹ = I/(γτ) + FᵀJA⁻¹JᵀF and
    FFᵀ = S.

    J, in ``tape``, has the slopes of the step's start; ``root`` is F, ``core`` V and ``inverse``
    V⁻¹."""

    metric: Metric
    tape: Tape
    root: Float[Tensor, "B NC R"]
    core: Float[Tensor, "B R R"]
    inverse: Float[Tensor, "B R R"]

    @staticmethod
    def at(
        metric: Metric,
        point: NetAt,
        multipliers: PerPair,
        gain: PerTrajectory,
    ) -> "GaussNewton":
        """The damping with γτ = ``gain``, where the kinks have these multipliers."""
        tape = point.tape(point.slopes(multipliers))
        root = point.net.loss.curvature(point.outputs, point.net.y)
        if metric.scales is not None:
            gram = kernels.gram(tape, metric.scales)
        else:
            J = kernels.jacobian(tape).flatten(1, 2)
            gram = J @ metric.inverse(J).mT
        unit = torch.eye(root.shape[-1], dtype=root.dtype, device=root.device)
        inverse = unit / gain.to(root)[:, None, None] + root.mT @ gram @ root
        return GaussNewton(metric, tape, root, torch.linalg.inv(inverse), inverse)

    def __call__(self, v: Rows) -> Rows:
        seen = kernels.pushforward(self.tape, v)  # Jv
        inner = self.root.mT @ seen.flatten(1)[..., None]
        inner = self.root @ (self.core @ inner)
        pulled = kernels.pullback(self.tape, inner.view_as(seen))
        return v - self.metric.inverse(pulled)


@dataclass(frozen=True)
class KinkCoupling:
    """How the forces of the pairs at hand move their own coordinates: N M Nᵀ = N A⁻¹Nᵀ − E V Eᵀ
    with E = N A⁻¹JᵀF, as ``blocks (B, G, c, c)`` and, where there are several groups, a correction
    of low rank."""

    pairs: ActivePairs
    blocks: Float[Tensor, "B G c c"]
    low_rank: LowRank | None

    @staticmethod
    def of(pairs: ActivePairs, damping: GaussNewton) -> "KinkCoupling":
        """The coupling of these pairs in a step with this damping."""
        E = _coupled(pairs, damping)
        E = torch.where(pairs.valid[..., None], E, 0.0)
        blocks = pairs.gram(damping.metric)
        if E.shape[1] == 1:
            return KinkCoupling(pairs, blocks - E @ damping.core[:, None] @ E.mT, None)
        return KinkCoupling(pairs, blocks, LowRank(E, damping.core, damping.inverse))

    @property
    def system(self) -> box.System:
        """Products with N M Nᵀ and solves."""
        return box.ridged(self.blocks, self.low_rank)[0]

    def held(
        self,
        ahead: Float[Tensor, "B G c"],
        upper: Float[Tensor, "B G c"],
        guess: Float[Tensor, "B G c"],
    ) -> Solution:
        """The forces in [0, upper] that hold on their kinks coordinates which come to ``ahead``
        without."""
        return box.solve_box(self.blocks, ahead, upper, self.low_rank, guess)


def _coupled(pairs: ActivePairs, damping: GaussNewton) -> Float[Tensor, "B G c R"]:
    """N A⁻¹JᵀF; for separate neurons from ⟨n_p, ∇f_kc⟩ = a_cj φ'_kj ⟨x_p, x_k⟩ for a pair p of
    neuron j."""
    metric = damping.metric
    root = damping.root
    if metric.scales is None:
        J = kernels.jacobian(damping.tape).flatten(1, 2)
        return (metric.inverse(pairs.normals()) @ J.mT @ root)[:, None]
    batch = torch.arange(len(root), device=root.device)[:, None, None]
    slopes = damping.tape.slopes[0].mT[batch, pairs.neuron]  # (B, G, c, N)
    inner = pairs.point.net.xx[batch, pairs.example] * slopes
    root = root.unflatten(1, (inner.shape[-1], -1))  # (B, N, C, R)
    total = torch.zeros_like(inner[..., :1])
    for c in range(root.shape[2]):
        outer = pairs.point.last[batch, c, pairs.neuron]
        through = inner.flatten(1, 2) @ root[:, :, c]
        total = total + outer[..., None] * through.view(*inner.shape[:3], -1)
    return metric.scales[0] * total
