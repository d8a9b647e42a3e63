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
from flowsim.numerics.scaling import nonzero
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

    A zero vector stands for itself."""
    norm = _lengths(gram)
    divisor = nonzero(norm)
    cosine = gram / divisor[..., :, None] / divisor[..., None, :]
    rounding = 256 * torch.finfo(gram.dtype).eps
    parallel = cosine.abs() > 1 - rounding
    first = parallel.to(gram).argmax(-1)  # of equal maxima the first
    first = torch.where(norm > 0, first, _own_index(norm))
    cosine = cosine.gather(-1, first[..., None])
    sign = cosine[..., 0].sign()
    multiple = sign * norm / divisor.gather(-1, first)
    return first, multiple


def _lengths(gram: Tensor) -> Float[Tensor, "*batch N"]:
    squares = torch.diagonal(gram, dim1=-2, dim2=-1)
    return squares.sqrt()


def _own_index(norm: Tensor) -> Int[Tensor, " N"]:
    return torch.arange(norm.shape[-1], device=norm.device)


# --------------------------------------------------------------------------------------------------
# Releases
# --------------------------------------------------------------------------------------------------


def require_sides(method: str, sides: tuple[int, ...]) -> None:
    """Raises unless ``sides`` is a tuple of zeros and ones."""
    known = isinstance(sides, tuple) and all(type(n) is int for n in sides)
    if not known or not set(sides) <= {0, 1}:
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
    earlier = before[:, None].long()
    turn = earlier + released.cumsum(-1) - 1
    told = released & (turn < len(sides))
    last = len(sides) - 1
    asked = torch.tensor(sides).to(multipliers)
    return torch.where(told, asked[turn.clamp(0, last)], nearer)


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
        negative = x.new_tensor([-1.0])
        leak = float(activation.slope(negative))
        xx = x @ x.mT
        first, multiple = parallels(xx)
        return TwoLayer(x, xx, first, multiple, leak, y, loss, activation, width)

    def expanded(self, trajectories: int) -> "TwoLayer":
        """One data set for each of these trajectories, where all share one."""

        def whole(t: Tensor) -> Tensor:
            return t.expand(trajectories, *t.shape[1:])

        return replace(
            self,
            x=whole(self.x),
            xx=whole(self.xx),
            representative=whole(self.representative),
            coefficient=whole(self.coefficient),
        )

    @property
    def distinct(self) -> Bool[Tensor, "B N 1"]:
        """The inputs that carry kinks: not zero, and not parallel to an earlier one."""
        carries = self._first & (_lengths(self.xx) > 0)
        return carries[..., None]

    @property
    def merged(self) -> bool:
        """Whether some inputs are parallel."""
        return not bool(self._first.all())

    @property
    def _first(self) -> Bool[Tensor, "B N"]:
        return self.representative == _own_index(self.representative)

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
        along = self.coefficient[..., None] > 0
        return torch.where(along, own, 1 - own)

    def at(self, w: Rows) -> "NetAt":
        """The net and its kinks at these weights. One forward pass."""
        m = self.width
        d = self.x.shape[-1]
        inner = w[:, : m * d]
        outer = w[:, m * d :]
        first = inner.unflatten(1, (m, d))
        last = outer.unflatten(1, (-1, m))
        z = bmm(self.x, first.mT)
        hidden = self.activation.value(z)
        outputs = bmm(hidden, last.mT)
        lam, cotangent = self.loss.ascent(outputs, self.y)
        force = bmm(cotangent, last)
        lam = lam.double()
        return NetAt(self, first, last, z, hidden, outputs, lam, cotangent, force)


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
        force = self.net.gathered(self.force)
        return (1 - self.net.leak) * force

    def slopes(self, multipliers: PerPair) -> PerPair:
        """φ' of every pair, from the representatives' multipliers."""
        leak = self.net.leak
        every = self.net.spread(multipliers)
        return leak + (1 - leak) * every

    def tape(self, slopes: PerPair) -> Tape:
        """The net linearised with these slopes, as the kernels want it."""
        weights = self.first, self.last
        inputs = self.net.x, self.hidden
        return Tape(weights, inputs, (slopes,))

    def gradient(self, slopes: PerPair) -> Rows:
        """∇Λ with these slopes."""
        pull = self.force * slopes
        first = self._on_first(pull)
        last = bmm(self.cotangent.mT, self.hidden)
        return torch.cat([first, last.flatten(1)], 1)

    def _on_first(self, c: PerPair) -> Float[Tensor, "B md"]:
        """Σ c_ij x_i in the place of w_j."""
        first = bmm(c.mT, self.net.x)
        return first.flatten(1)

    def along(self, v: Rows) -> PerPair:
        """How z changes along v: ⟨n, v⟩ for every pair."""
        size = self.first[0].numel()
        first = v[:, :size].view_as(self.first)
        return bmm(self.net.x, first.mT)

    def hinges(self) -> Hinges:
        """All kinks in a row, k = i·m + j."""

        nothing = torch.zeros_like(self.last).flatten(1)

        def combine(c: PerKink) -> Rows:
            first = self._on_first(c.view_as(self.z))
            return torch.cat([first, nothing], 1)

        def along(v: Rows) -> PerKink:
            return self.along(v).flatten(1)

        off = torch.zeros_like(self.z)
        base = self.gradient(self.slopes(off))
        z = self.z.flatten(1)
        jump = self.jump.flatten(1)
        return Hinges(z, jump, base, combine, along)
