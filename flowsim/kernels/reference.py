"""Bias-free feed-forward nets in plain batched torch: the definition of every kernel.

Shapes: ``B`` trajectories, ``N`` examples, ``C`` outputs, ``L`` layers. Layer ``l`` maps width
``n_{l-1}`` to ``n_l`` with a weight ``W_l`` of shape ``(B, n_l, n_{l-1})``:

    a_0 = x,   z_l = a_{l-1} W_lᵀ,   a_l = φ(z_l),   f = z_L.

The input ``x`` is ``(N, d)``, shared by all trajectories, or ``(B, N, d)``. Derivatives are by the
``P`` flat weights, layer after layer. Every product is a batched one over trajectories, and
batch-mates change a trajectory's numbers by rounding only."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from flowsim.numerics.batched import bmm
from flowsim.numerics.shapes import Outputs, Rows

Weights = Sequence[Tensor]


@dataclass(frozen=True)
class Activation:
    """A positively homogeneous scalar function φ(cz) = c^degree φ(z), c > 0, and its derivative.

    ``kinked`` says that φ' jumps at 0; there ``slope`` returns one element of Clarke's
    subdifferential, the one that autograd returns."""

    name: str
    degree: int
    kinked: bool
    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Tape:
    """What a forward pass leaves for the derivatives: inputs ``a_{l-1}`` of each layer and slopes
    ``φ'(z_l)`` of each but the last."""

    weights: Weights
    inputs: tuple[Tensor, ...]
    slopes: tuple[Tensor, ...]


def forward(weights: Weights, x: Tensor, activation: Activation) -> tuple[Outputs, Tape]:
    """Outputs f(x) and the tape."""
    *hidden, last = weights
    a = x.expand(len(last), *x.shape[-2:])
    inputs = [a]
    slopes = []
    for W in hidden:
        z = bmm(a, W.mT)
        a = activation.value(z)
        inputs.append(a)
        slopes.append(activation.slope(z))
    return bmm(a, last.mT), Tape(weights, tuple(inputs), tuple(slopes))


def sensitivities(tape: Tape, c: Float[Tensor, "B N K C"]) -> list[Float[Tensor, "B N K n"]]:
    """∂⟨c, f⟩/∂z_l for K cotangents c of each example, first layer first."""
    deltas = [c]
    for W, slope in zip(reversed(tape.weights[1:]), reversed(tape.slopes), strict=True):
        delta = bmm(deltas[-1].flatten(1, 2), W).unflatten(1, c.shape[1:3])
        deltas.append(delta.mul_(slope[:, :, None]))  # in place: half of the memory traffic
    return deltas[::-1]


def pullback(tape: Tape, c: Outputs) -> Rows:
    """Jᵀc: the gradient of ⟨c, f⟩."""
    deltas = sensitivities(tape, c[:, :, None])
    layers = zip(deltas, tape.inputs, strict=True)
    return torch.cat([bmm(delta[:, :, 0].mT, a).flatten(1) for delta, a in layers], 1)


def pushforward(tape: Tape, v: Rows) -> Outputs:
    """Jv: the derivative of the outputs along one direction in weight space."""
    parts = v.split([W[0].numel() for W in tape.weights], 1)
    first, *later = (part.view_as(W) for part, W in zip(parts, tape.weights, strict=True))
    dz = bmm(tape.inputs[0], first.mT)
    for l, V in enumerate(later, 1):
        da = dz * tape.slopes[l - 1]
        dz = bmm(tape.inputs[l], V.mT) + bmm(da, tape.weights[l].mT)
    return dz


def jacobian(tape: Tape) -> Float[Tensor, "B N C P"]:
    """J, dense: for small nets and for tests."""
    layers = zip(sensitivities(tape, _each_output(tape)), tape.inputs, strict=True)
    parts = [delta[..., None] * a[:, :, None, None] for delta, a in layers]
    return torch.cat([part.flatten(3) for part in parts], -1)


def gram(tape: Tape, scales: Sequence[float] | None = None) -> Float[Tensor, "B NC NC"]:
    """JJᵀ, the neural tangent kernel, without forming J: Σ_l s_l (δ_l δ_lᵀ) ∘ (a_{l-1}
    a_{l-1}ᵀ)."""
    scales = scales or [1.0] * len(tape.inputs)
    total = tape.inputs[0].new_zeros(())
    outputs = _each_output(tape)
    for delta, a, scale in zip(sensitivities(tape, outputs), tape.inputs, scales, strict=True):
        C = delta.shape[2]
        rows = delta.flatten(1, 2)
        inner = bmm(a, a.mT).repeat_interleave(C, 1).repeat_interleave(C, 2)
        total = total + scale * bmm(rows, rows.mT) * inner
    return total


def _each_output(tape: Tape) -> Float[Tensor, "B N C C"]:
    """The cotangents that pick one output each."""
    last = tape.weights[-1]
    C = last.shape[1]
    unit = torch.eye(C, dtype=last.dtype, device=last.device)
    return unit.expand(*tape.inputs[0].shape[:2], C, C)
