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
from flowsim.numerics.batched import bmm, dot
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
        parts = norm.blocks if isinstance(norm, Euclidean) else ()
        if parts and all(isinstance(part.norm, L2) for part in parts):
            first, last = (part.scale**2 for part in parts)
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
            return self.scales[0] * squares(point).expand_as(point.z)
        every = torch.ones_like(point.z, dtype=torch.bool)
        normals = ActivePairs.of(point, every, self).normals()
        stiffness = dot(normals, self.inverse(normals))
        return stiffness.view_as(point.z)


def squares(point: NetAt) -> Float[Tensor, "B N 1"]:
    """‖x_i‖² of every example."""
    lengths = point.net.xx.diagonal(dim1=-2, dim2=-1)
    return lengths[..., None]


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
    def of(point: NetAt, mask: Bool[Tensor, "B N m"], metric: Metric) -> "ActivePairs":
        """The pairs of ``mask``; in one group a neuron where the metric allows it and they are
        many."""
        m = mask.shape[-1]
        most = mask.sum((1, 2)).max()
        grouped = metric.scales is not None and int(most) > DENSE
        rows = mask.mT if grouped else mask.flatten(1)[:, None]  # (B, G, ·)
        counts = rows.sum(-1)
        c = max(1, int(counts.max()))
        ordered = rows.byte().sort(dim=-1, descending=True, stable=True)
        order = ordered.indices[..., :c]  # of each row the pairs first, (B, G, c)
        valid = rows.gather(-1, order)
        if not grouped:
            return ActivePairs(point, mask, order // m, order % m, valid)
        neurons = torch.arange(m, device=mask.device)
        neuron = neurons[:, None].expand_as(order)
        return ActivePairs(point, mask, order, neuron, valid)

    @property
    def batch(self) -> Int[Tensor, "B 1 1"]:
        """The trajectory of every pair."""
        rows = torch.arange(len(self.mask), device=self.mask.device)
        return rows[:, None, None]

    @property
    def flat(self) -> Int[Tensor, "B Gc"]:
        """The place of every pair among all, row by row."""
        m = self.mask.shape[2]
        place = self.example * m + self.neuron
        return place.flatten(1)

    def take(self, values: PerPair) -> Float[Tensor, "B G c"]:
        """These values at the pairs, 0 at padding."""
        flat = values.flatten(1).gather(1, self.flat)
        taken = flat.view(self.example.shape)
        return torch.where(self.valid, taken, 0.0)

    def put(self, into: Tensor, values: Float[Tensor, "B G c"]) -> PerPair:
        """``into (B, N, m)`` with these values at the pairs."""
        flat = into.flatten(1)
        end = flat.shape[1]
        # padding writes to a place of its own behind the end
        spare = torch.cat([flat, flat[:, :1]], 1)
        valid = self.valid.flatten(1)
        index = torch.where(valid, self.flat, end)
        source = values.flatten(1).to(into)
        written = spare.scatter(1, index, source)
        return written[:, :end].view(into.shape)

    def along(self, v: Rows) -> Float[Tensor, "B G c"]:
        """Nv."""
        return self.take(self.point.along(v))

    def combine(self, force: Float[Tensor, "B G c"]) -> Rows:
        """Nᵀλ."""
        nothing = torch.zeros_like(self.point.z)
        spread = self.put(nothing, force)
        first = bmm(spread.mT, self.point.net.x)
        last = torch.zeros_like(self.point.last)
        return torch.cat([first.flatten(1), last.flatten(1)], 1)

    def normals(self) -> Float[Tensor, "B Gc P"]:
        """N, dense: for norms that couple neurons only."""
        x = self.point.net.x
        d = x.shape[-1]
        first = self.point.first[0].numel()
        last = self.point.last[0].numel()
        example = self.example.flatten(1)[..., None]  # (B, Gc, 1)
        neuron = self.neuron.flatten(1)[..., None]
        valid = self.valid.flatten(1)[..., None]
        inputs = x.gather(1, example.expand(-1, -1, d))
        place = neuron * d + torch.arange(d, device=x.device)
        zeros = x.new_zeros(*place.shape[:2], first + last)
        normals = zeros.scatter(2, place, inputs)
        return normals * valid

    def gram(self, metric: Metric) -> Float[Tensor, "B G c c"]:
        """N A⁻¹Nᵀ in each group."""
        if metric.scales is None:
            normals = self.normals()
            gram = metric.inverse(normals) @ normals.mT
            blocks = gram[:, None]
        else:
            batch = self.batch[..., None]
            row, column = _rows_and_columns(self.example)
            neuron, other = _rows_and_columns(self.neuron)
            inner = self.point.net.xx[batch, row, column]
            scaled = metric.scales[0] * inner
            blocks = torch.where(neuron == other, scaled, 0.0)
        valid, valid_too = _rows_and_columns(self.valid)
        return torch.where(valid & valid_too, blocks, 0.0)


def _rows_and_columns(values: Tensor) -> tuple[Tensor, Tensor]:
    """One value a pair as one a row and as one a column of a matrix among pairs."""
    return values[..., :, None], values[..., None, :]


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
        R = root.shape[-1]
        unit = torch.eye(R, dtype=root.dtype, device=root.device)
        unit = unit / gain.to(root)[:, None, None]
        inverse = unit + root.mT @ gram @ root
        core = torch.linalg.inv(inverse)
        return GaussNewton(metric, tape, root, core, inverse)

    def __call__(self, v: Rows) -> Rows:
        outputs = kernels.pushforward(self.tape, v)  # Jv
        column = outputs.flatten(1)[..., None]
        seen = self.root.mT @ column
        inner = self.root @ (self.core @ seen)
        pulled = kernels.pullback(self.tape, inner.view_as(outputs))
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
            damped = E @ damping.core[:, None] @ E.mT
            return KinkCoupling(pairs, blocks - damped, None)
        low_rank = LowRank(E, damping.core, damping.inverse)
        return KinkCoupling(pairs, blocks, low_rank)

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
        normals = metric.inverse(pairs.normals())
        return (normals @ J.mT @ root)[:, None]
    point = pairs.point
    batch = pairs.batch
    slopes = damping.tape.slopes[0].mT[batch, pairs.neuron]  # (B, G, c, N)
    inner = point.net.xx[batch, pairs.example] * slopes
    root = root.unflatten(1, (inner.shape[-1], -1))  # (B, N, C, R)
    total = torch.zeros_like(inner[..., :1])
    for c in range(root.shape[2]):
        outer = point.last[batch, c, pairs.neuron]
        through = inner.flatten(1, 2) @ root[:, :, c]
        through = through.view(*inner.shape[:3], -1)
        total = total + outer[..., None] * through
    return metric.scales[0] * total
