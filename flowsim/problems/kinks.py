"""Kinks of two-layer nets with (leaky) ReLU: where the gradient jumps, and by how much.

Example i puts a kink into neuron j where ``z_ij = ⟨x_i, w_j⟩`` vanishes. Across it the slope of the
activation runs from α to 1, and ∇Λ changes by ``jump_ij·n_ij``, with the normal ``n_ij`` equal to
x_i in the place of w_j and

    jump_ij = (1 − α) Σ_c (∂Λ/∂f_ic) a_cj.

A kink with a negative jump *attracts*: the flow arrives from both sides and slides along z = 0. One
with a positive jump repels. On a kink Clarke's set of gradients is ∇Λ = base + Σ D·jump·n with
multipliers D in [0, 1].

Parallel inputs share their kinks, so their multipliers are not free of each other: D for the same
direction, 1 − D for the opposite one. Each class of parallel inputs is therefore represented by its
first member, which carries the jumps of all.

A kink that slides and begins to repel is *released*. It may leave to either side; `release_sides`
is the rule that decides."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from flowsim.kernels import reference as kernels
from flowsim.kernels.reference import Tape
from flowsim.numerics.batched import bmm
from flowsim.numerics.shapes import Outputs, PerKink, PerPair, PerTrajectory, Rows
from flowsim.problems.losses import Loss


@dataclass(frozen=True)
class Hinges:
    """The kinks of a level at some weights: its gradients there are ``base + combine(jump·D)``, D
    in [0, 1].

    ``z (B, K)`` vanishes on the kink, D is 1 where it is positive and 0 where it is negative. With
    normals n_k, ``combine(c)`` is Σ_k c_k n_k ``(B, P)`` and ``along(v)`` is ⟨n_k, v⟩ ``(B, K)``.
    """

    z: PerKink
    jump: PerKink
    base: Rows
    combine: Callable[[Tensor], Tensor]
    along: Callable[[Tensor], Tensor]

    def gradient(self, multipliers: PerKink) -> Rows:
        return self.base + self.combine(self.jump * multipliers)


def parallels(
    gram: Float[Tensor, "*batch N N"],
) -> tuple[Int[Tensor, "*batch N"], Float[Tensor, "*batch N"]]:
    """The first vector parallel to each one, and each one's multiple of it, from all inner
    products.

    A zero vector stands for itself.
    """
    norm = torch.diagonal(gram, dim1=-2, dim2=-1).sqrt()
    unit = torch.where(norm > 0, norm, 1.0)
    cosine = gram / unit[..., :, None] / unit[..., None, :]
    parallel = cosine.abs() > 1 - 256 * torch.finfo(gram.dtype).eps
    first = parallel.to(gram).argmax(-1)  # of equal maxima the first
    first = torch.where(norm > 0, first, torch.arange(gram.shape[-1], device=gram.device))
    sign = cosine.gather(-1, first[..., None])[..., 0].sign()
    return first, sign * norm / unit.gather(-1, first)


# --------------------------------------------------------------------------------------------------
# Releases
# --------------------------------------------------------------------------------------------------


def require_sides(method: str, sides: tuple[int, ...]) -> None:
    """Raises unless ``sides`` is a tuple of zeros and ones."""
    known = isinstance(sides, tuple) and all(type(n) is int and n in (0, 1) for n in sides)
    if not known:
        raise ValueError(
            f"{method}: got sides={sides!r}, expected 0 (z < 0) or 1 (z > 0) for each release in "
            f"turn, try {method}(sides=(0, 1))"
        )


def release_sides(
    multipliers: PerKink,
    released: Bool[Tensor, "B K"],
    before: PerTrajectory,
    sides: tuple[int, ...],
) -> PerKink:
    """The side that each kink takes, 0 for z < 0 and 1 for z > 0, where no force holds it any more.

    The releases of a trajectory are counted step by step, and in one step by the index of the kink;
    ``before`` is the number of earlier ones. The n-th release, from n = 0 on, takes ``sides[n]``.
    Releases beyond the end of ``sides``, and kinks that are not ``released``, take the side whose
    multiplier is nearer: 1 from ½ on, else 0."""
    nearer = (multipliers >= 0.5).to(multipliers)
    if not sides:
        return nearer
    turn = before[:, None].long() + released.cumsum(-1) - 1
    asked = torch.tensor(sides).to(multipliers)[turn.clamp(0, len(sides) - 1)]
    return torch.where(released & (turn < len(sides)), asked, nearer)


# --------------------------------------------------------------------------------------------------
# Two-layer nets
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TwoLayer:
    """The kinks of a two-layer net on given data, for B trajectories.

    ``x (B, N, d)``; ``representative (B, N)`` is the first input parallel to each input and
    ``coefficient (B, N)`` its multiple; ``leak`` is the slope α of the activation on the negative
    side."""

    x: Float[Tensor, "B N d"]
    xx: Float[Tensor, "B N N"]
    representative: Int[Tensor, "B N"]
    coefficient: Float[Tensor, "B N"]
    leak: float
    y: Tensor
    loss: Loss
    activation: kernels.Activation
    width: int

    @staticmethod
    def on(
        x: Float[Tensor, "B N d"],
        y: Tensor,
        loss: Loss,
        activation: kernels.Activation,
        width: int,
    ) -> "TwoLayer":
        """One data set a trajectory, or one for all, which is then to be `expanded`."""
        leak = float(activation.slope(x.new_tensor([-1.0]))[0])
        xx = x @ x.mT
        return TwoLayer(x, xx, *parallels(xx), leak, y, loss, activation, width)

    def expanded(self, trajectories: int) -> "TwoLayer":
        """One data set for each of these trajectories, where all share one."""
        names = ("x", "xx", "representative", "coefficient")
        data = {name: getattr(self, name) for name in names}
        whole = {name: t.expand(trajectories, *t.shape[1:]) for name, t in data.items()}
        return replace(self, **whole)

    @property
    def distinct(self) -> Bool[Tensor, "B N 1"]:
        """The inputs that carry kinks: not zero, and not parallel to an earlier one."""
        nonzero = torch.diagonal(self.xx, dim1=-2, dim2=-1) > 0
        return (self._first & nonzero)[..., None]

    @property
    def merged(self) -> bool:
        """Whether some inputs are parallel."""
        return not bool(self._first.all())

    @property
    def _first(self) -> Bool[Tensor, "B N"]:
        return self.representative == torch.arange(self.x.shape[-2], device=self.x.device)

    def gathered(self, jump: PerPair) -> PerPair:
        """Each representative with the jumps of its class; zero elsewhere."""
        if not self.merged:
            return jump
        index = self.representative[..., None].expand_as(jump)
        carried = jump * self.coefficient.abs()[..., None]
        return torch.zeros_like(jump).scatter_add(1, index, carried)

    def spread(self, multipliers: PerPair) -> PerPair:
        """Multipliers of all inputs from those of the representatives."""
        if not self.merged:
            return multipliers
        index = self.representative[..., None].expand_as(multipliers)
        own = multipliers.gather(1, index)
        return torch.where(self.coefficient[..., None] > 0, own, 1 - own)

    def at(self, w: Rows) -> "NetAt":
        """The net and its kinks at these weights. One forward pass."""
        B = len(w)
        m = self.width
        d = self.x.shape[-1]
        first = w[:, : m * d].view(B, m, d)
        last = w[:, m * d :].view(B, -1, m)
        z = bmm(self.x, first.mT)
        hidden = self.activation.value(z)
        outputs = bmm(hidden, last.mT)
        lam, cotangent = self.loss.ascent(outputs, self.y)
        force = bmm(cotangent, last)
        return NetAt(self, first, last, z, hidden, outputs, lam.double(), cotangent, force)


@dataclass(frozen=True)
class NetAt:
    """A two-layer net at one place: pre-activations ``z (B, N, m)``, outputs, Λ, its cotangent, and
    the force ``Σ_c (∂Λ/∂f_ic) a_cj`` on each hidden activation."""

    net: TwoLayer
    first: Float[Tensor, "B m d"]
    last: Float[Tensor, "B C m"]
    z: PerPair
    hidden: PerPair
    outputs: Outputs
    lam: PerTrajectory
    cotangent: Outputs
    force: PerPair

    @property
    def jump(self) -> PerPair:
        """Jumps of the representatives' kinks."""
        return (1 - self.net.leak) * self.net.gathered(self.force)

    def slopes(self, multipliers: PerPair) -> PerPair:
        """φ' of every pair, from the representatives' multipliers."""
        leak = self.net.leak
        return leak + (1 - leak) * self.net.spread(multipliers)

    def tape(self, slopes: PerPair) -> Tape:
        """The net linearised with these slopes, as the kernels want it."""
        return Tape((self.first, self.last), (self.net.x, self.hidden), (slopes,))

    def gradient(self, slopes: PerPair) -> Rows:
        """∇Λ with these slopes."""
        first = bmm((self.force * slopes).mT, self.net.x)
        last = bmm(self.cotangent.mT, self.hidden)
        return torch.cat([first.flatten(1), last.flatten(1)], 1)

    def along(self, v: Rows) -> PerPair:
        """How z changes along v: ⟨n, v⟩ for every pair."""
        first = v[:, : self.first[0].numel()].view_as(self.first)
        return bmm(self.net.x, first.mT)

    def hinges(self) -> Hinges:
        """All kinks in a row, k = i·m + j."""

        def combine(c: PerKink) -> Rows:
            first = bmm(c.view_as(self.z).mT, self.net.x)
            return torch.cat([first.flatten(1), torch.zeros_like(self.last).flatten(1)], 1)

        def along(v: Rows) -> PerKink:
            return self.along(v).flatten(1)

        base = self.gradient(self.slopes(torch.zeros_like(self.z)))
        return Hinges(self.z.flatten(1), self.jump.flatten(1), base, combine, along)
