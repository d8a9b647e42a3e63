"""Bias-free feed-forward nets in plain batched torch: the definition of every kernel.

Shapes: ``B`` trajectories, ``N`` examples, ``C`` outputs, ``L`` layers. Layer ``l`` maps width
``n_{l-1}`` to ``n_l`` with a weight ``W_l`` of shape ``(B, n_l, n_{l-1})``:

    a_0 = x,   z_l = a_{l-1} W_lᵀ,   a_l = φ(z_l),   f = z_L.

The input ``x`` is ``(N, d)``, shared by all trajectories, or ``(B, N, d)``. Derivatives are by the
``P`` flat weights, layer after layer. Every product is a batched one over trajectories, and
batch-mates change a trajectory's numbers by rounding only."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from flowsim.numerics.batched import bmm
from flowsim.numerics.shapes import Outputs, Rows

Weights = Sequence[Tensor]

Cotangents: TypeAlias = Float[Tensor, "B N K n"]
"""K derivatives by the n units of a layer, on each example."""


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
    B = len(last)
    a = x.expand(B, *x.shape[-2:])
    inputs = [a]
    slopes = []
    for W in hidden:
        z = bmm(a, W.mT)
        a = activation.value(z)
        slope = activation.slope(z)
        inputs.append(a)
        slopes.append(slope)
    outputs = bmm(a, last.mT)
    return outputs, Tape(weights, tuple(inputs), tuple(slopes))


def sensitivities(tape: Tape, c: Cotangents) -> list[Cotangents]:
    """∂⟨c, f⟩/∂z_l for K cotangents c of each example, first layer first."""
    shape = c.shape[1:3]
    delta = c
    deltas = [c]
    layers = zip(tape.weights[1:], tape.slopes, strict=True)
    for W, slope in reversed(list(layers)):
        rows = delta.flatten(1, 2)  # (B, NK, n)
        delta = bmm(rows, W).unflatten(1, shape)
        delta.mul_(slope[:, :, None])  # in place: half of the memory traffic
        deltas.append(delta)
    return deltas[::-1]


def pullback(tape: Tape, c: Outputs) -> Rows:
    """Jᵀc: the gradient of ⟨c, f⟩."""
    parts = []
    for delta, a in _layers(tape, c[:, :, None]):
        gradient = bmm(delta[:, :, 0].mT, a)  # (B, n_l, n_{l-1})
        parts.append(gradient.flatten(1))
    return torch.cat(parts, 1)


def pushforward(tape: Tape, v: Rows) -> Outputs:
    """Jv: the derivative of the outputs along one direction in weight space."""
    sizes = [W[0].numel() for W in tape.weights]
    parts = v.split(sizes, 1)
    pairs = zip(parts, tape.weights, strict=True)
    first, *later = (part.view_as(W) for part, W in pairs)
    dz = bmm(tape.inputs[0], first.mT)
    for l, V in enumerate(later, 1):
        da = dz * tape.slopes[l - 1]
        own = bmm(tape.inputs[l], V.mT)
        carried = bmm(da, tape.weights[l].mT)
        dz = own + carried
    return dz


def jacobian(tape: Tape) -> Float[Tensor, "B N C P"]:
    """J, dense: for small nets and for tests."""
    parts = []
    for delta, a in _layers(tape, _each_output(tape)):
        outer = delta[..., None] * a[:, :, None, None]  # (B, N, C, n_l, n_{l-1})
        parts.append(outer.flatten(3))
    return torch.cat(parts, -1)


def gram(tape: Tape, scales: Sequence[float] | None = None) -> Float[Tensor, "B NC NC"]:
    """JJᵀ, the neural tangent kernel, without forming J: Σ_l s_l (δ_l δ_lᵀ) ∘ (a_{l-1}
    a_{l-1}ᵀ)."""
    scales = scales or [1.0] * len(tape.inputs)
    total = tape.inputs[0].new_zeros(())
    deltas = sensitivities(tape, _each_output(tape))
    for delta, a, scale in zip(deltas, tape.inputs, scales, strict=True):
        C = delta.shape[2]
        rows = delta.flatten(1, 2)
        outer = bmm(rows, rows.mT)
        inner = bmm(a, a.mT)
        for axis in (1, 2):
            inner = inner.repeat_interleave(C, axis)
        total = total + scale * outer * inner
    return total


def _layers(tape: Tape, c: Cotangents) -> Iterator[tuple[Cotangents, Tensor]]:
    """Of each layer the sensitivities and the inputs, which together give the gradient."""
    deltas = sensitivities(tape, c)
    return zip(deltas, tape.inputs, strict=True)


def _each_output(tape: Tape) -> Cotangents:
    """The cotangents that pick one output each."""
    last = tape.weights[-1]
    C = last.shape[1]
    unit = torch.eye(C, dtype=last.dtype, device=last.device)
    B, N, _ = tape.inputs[0].shape
    return unit.expand(B, N, C, C)
