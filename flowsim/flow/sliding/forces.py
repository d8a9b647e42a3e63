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

from flowsim.convex.box import LowRank
from flowsim.kernels import reference as kernels
from flowsim.kernels.reference import Tape
from flowsim.norms.blocks import Euclidean
from flowsim.norms.norm import Norm
from flowsim.norms.vector import L2
from flowsim.numerics.batched import bmm
from flowsim.problems.kinks import NetAt, TwoLayer

DENSE = 600


"""Up to so many pairs one dense factorisation is faster than one for each neuron."""


@dataclass(frozen=True)
class Metric:
    """A quadratic norm as the step needs it: A⁻¹, and its two numbers where it is a multiple on
    each layer."""

    norm: Norm
    scales: tuple[float, float] | None

    @staticmethod
    def of(norm: Norm) -> "Metric":
        if isinstance(norm, L2):
            return Metric(norm, (1.0, 1.0))
        if isinstance(norm, Euclidean) and all(isinstance(part.norm, L2) for part in norm._bound):
            first, last = (part.scale**2 for part in norm._bound)
            return Metric(norm, (first, last))
        return Metric(norm, None)

    def raised(self, g: Float[Tensor, "... P"]) -> Float[Tensor, "... P"]:
        """A⁻¹g."""
        return (
            g if self.scales == (1.0, 1.0) else self.norm.dual(g)[..., None] * self.norm.steepest(g)
        )

    def blocks(self, pack: "ActivePairs", net: TwoLayer, point: NetAt) -> Float[Tensor, "B G c c"]:
        """N A⁻¹Nᵀ in the groups of ``pack``."""
        if self.scales is not None:
            batch = torch.arange(len(net.x), device=net.x.device)[:, None, None, None]
            same = pack.neuron[..., :, None] == pack.neuron[..., None, :]
            inner = net.xx[batch, pack.example[..., :, None], pack.example[..., None, :]]
            blocks = torch.where(same, self.scales[0] * inner, 0.0)
        else:
            normals = pack.normals(net, point.first[0].numel() + point.last[0].numel())
            blocks = (self.raised(normals) @ normals.mT)[:, None]
        return torch.where(pack.valid[..., :, None] & pack.valid[..., None, :], blocks, 0.0)

    def stiffness(self, net: TwoLayer, point: NetAt) -> Float[Tensor, "B N m"]:
        """⟨n, A⁻¹n⟩ for every pair."""
        if self.scales is not None:
            return self.scales[0] * torch.diagonal(net.xx, dim1=-2, dim2=-1)[..., None].expand_as(
                point.z
            )
        every = ActivePairs.of(torch.ones_like(point.z, dtype=torch.bool), separable=False)
        normals = every.normals(net, point.first[0].numel() + point.last[0].numel())
        return (normals * self.raised(normals)).sum(-1).view_as(point.z)


@dataclass(frozen=True)
class ActivePairs:
    """The pairs that may slide in this step, in groups whose normals are A-orthogonal between
    groups.

    ``example`` and ``neuron (B, G, c)`` name them, ``valid`` tells pairs from padding. Few pairs
    are in one group; many are in one group a neuron, where the norm allows it."""

    example: Int[Tensor, "B G c"]
    neuron: Int[Tensor, "B G c"]
    valid: Bool[Tensor, "B G c"]
    shape: tuple[int, int]  # (N, m)

    @staticmethod
    def of(mask: Bool[Tensor, "B N m"], separable: bool) -> "ActivePairs":
        _, N, m = mask.shape
        grouped = separable and int(mask.sum((1, 2)).max()) > DENSE
        rows = mask.mT if grouped else mask.flatten(1)[:, None]
        c = max(1, int(rows.sum(-1).max()))
        order = rows.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices[..., :c]
        if grouped:
            example, neuron = (
                order,
                torch.arange(m, device=mask.device)[None, :, None].expand_as(order),
            )
        else:
            example, neuron = order // m, order % m
        return ActivePairs(example, neuron, rows.gather(-1, order), (N, m))

    @property
    def flat(self) -> Int[Tensor, "B Gc"]:
        return (self.example * self.shape[1] + self.neuron).flatten(1)

    def take(self, values: Float[Tensor, "B N m"], empty: float = 0.0) -> Float[Tensor, "B G c"]:
        taken = values.flatten(1).gather(1, self.flat).view(self.example.shape)
        return torch.where(self.valid, taken, empty)

    def put(self, into: Tensor, values: Float[Tensor, "B G c"]) -> Tensor:
        """``into (B, N, m)`` with these values at the pairs."""
        # padding writes to a place of its own behind the end
        spare = torch.cat([into.flatten(1), into[:, 0, :1]], 1)
        index = torch.where(self.valid.flatten(1), self.flat, spare.shape[1] - 1)
        return spare.scatter(1, index, values.flatten(1).to(into))[:, :-1].view(into.shape)

    def along(self, net: TwoLayer, v: Float[Tensor, "B P"]) -> Float[Tensor, "B G c"]:
        """Nv."""
        (B, _, d), m = net.x.shape, self.shape[1]
        return self.take(bmm(net.x, v[:, : m * d].view(B, m, d).mT))

    def combine(
        self, net: TwoLayer, force: Float[Tensor, "B G c"], size: int
    ) -> Float[Tensor, "B P"]:
        """Nᵀλ."""
        spread = self.put(force.new_zeros(len(force), *self.shape), force)
        first = bmm(spread.mT, net.x).flatten(1)
        return torch.cat([first, first.new_zeros(len(first), size - first.shape[1])], 1)

    def normals(self, net: TwoLayer, size: int) -> Float[Tensor, "B Gc P"]:
        """The pairs' normals as flat weights: for norms that couple neurons only."""
        B, d = self.example.shape[0], net.x.shape[-1]
        inputs = net.x.gather(1, self.example.flatten(1)[..., None].expand(-1, -1, d))
        place = self.neuron.flatten(1)[..., None] * d + torch.arange(d, device=net.x.device)
        out = net.x.new_zeros(B, place.shape[1], size).scatter(2, place, inputs)
        return out * self.valid.flatten(1)[..., None]


@dataclass(frozen=True)
class GaussNewton:
    """The linear algebra of one step: v ↦ v − A⁻¹JᵀF V FᵀJv with V⁻¹ = I/``gain`` + FᵀJA⁻¹JᵀF and
    FFᵀ = S.

    This is M A of the module's text with γτ = ``gain (B,)``. J has the slopes of the step's start.
    """

    metric: Metric
    tape: Tape
    root: Float[Tensor, "B NC R"]
    core: Float[Tensor, "B R R"]
    inverse: Float[Tensor, "B R R"]

    @staticmethod
    def at(metric: Metric, point: NetAt, slopes: Tensor, gain: Tensor) -> "GaussNewton":
        tape, root = point.tape(slopes), point.net.loss.curvature(point.outputs, point.net.y)
        if metric.scales is not None:
            gram = kernels.gram(tape, metric.scales)
        else:
            J = kernels.jacobian(tape).flatten(1, 2)
            gram = J @ metric.raised(J).mT
        unit = torch.eye(root.shape[-1], dtype=root.dtype, device=root.device)
        inverse = unit / gain.to(root)[:, None, None] + root.mT @ gram @ root
        return GaussNewton(metric, tape, root, torch.linalg.inv(inverse), inverse)

    def __call__(self, v: Float[Tensor, "B P"]) -> Float[Tensor, "B P"]:
        seen = kernels.pushforward(self.tape, v)
        inner = self.root @ (self.core @ (self.root.mT @ seen.flatten(1)[..., None]))
        pulled = kernels.pullback(self.tape, inner.view_as(seen))
        return v - self.metric.raised(pulled)


@dataclass(frozen=True)
class KinkCoupling:
    """How the forces of the packed kinks move their own coordinates: N M Nᵀ = N A⁻¹Nᵀ − E V Eᵀ with
    E = N A⁻¹JᵀF, as ``blocks (B, G, c, c)`` and, where there are several groups, a correction of
    low rank."""

    pack: ActivePairs
    net: TwoLayer
    blocks: Float[Tensor, "B G c c"]
    low_rank: LowRank | None

    @staticmethod
    def of(pack: ActivePairs, damping: GaussNewton, net: TwoLayer, point: NetAt) -> "KinkCoupling":
        metric = damping.metric
        coupling = (
            _coupled(pack, damping, net)
            if metric.scales is None
            else _coupled_by_neuron(pack, damping, net)
        )
        coupling = torch.where(pack.valid[..., None], coupling, 0.0)
        blocks = metric.blocks(pack, net, point)
        if coupling.shape[1] == 1:
            return KinkCoupling(
                pack, net, blocks - coupling @ damping.core[:, None] @ coupling.mT, None
            )
        return KinkCoupling(pack, net, blocks, LowRank(coupling, damping.core, damping.inverse))

    def along(self, v: Tensor) -> Tensor:
        return self.pack.along(self.net, v)

    def combine(self, force: Tensor, size: int) -> Tensor:
        return self.pack.combine(self.net, force, size)


def _coupled_by_neuron(
    pack: ActivePairs, damping: GaussNewton, net: TwoLayer
) -> Float[Tensor, "B G c R"]:
    """⟨n_p, ∇f_kc⟩ = a_cj φ'_kj ⟨x_p, x_k⟩ for a pair p of neuron j, times F."""
    assert damping.metric.scales is not None
    batch = torch.arange(len(net.x), device=net.x.device)[:, None, None]
    last, slopes = damping.tape.weights[1], damping.tape.slopes[0]
    inner = net.xx[batch, pack.example] * slopes.mT[batch, pack.neuron]
    root = damping.root.unflatten(1, (inner.shape[-1], -1))
    seen = [
        last[batch, k, pack.neuron][..., None]
        * (inner.flatten(1, 2) @ root[:, :, k]).view(*inner.shape[:3], -1)
        for k in range(last.shape[1])
    ]
    return damping.metric.scales[0] * sum(seen[1:], start=seen[0])


def _coupled(pack: ActivePairs, damping: GaussNewton, net: TwoLayer) -> Float[Tensor, "B 1 c R"]:
    J = kernels.jacobian(damping.tape).flatten(1, 2)
    raised = damping.metric.raised(pack.normals(net, J.shape[-1]))
    return (raised @ J.mT @ damping.root)[:, None]
