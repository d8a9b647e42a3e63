"""Bias-free feed-forward nets in plain batched torch: the definition of every kernel.

Shapes: ``B`` trajectories, ``N`` examples, ``C`` outputs, ``L`` layers. Layer ``l`` maps width
``n_{l-1}`` to ``n_l`` with a weight ``W_l`` of shape ``(B, n_l, n_{l-1})``:

    a_0 = x,   z_l = a_{l-1} W_lᵀ,   a_l = φ(z_l),   f = z_L.

The input ``x`` is ``(N, d)``, shared by all trajectories, or ``(B, N, d)``. Every product is a
batched one over trajectories, so that a trajectory's numbers never depend on its batch-mates."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from flowsim.numerics.batched import bmm

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
    """What a forward pass leaves for the derivatives: inputs ``a_{l-1}`` and slopes ``φ'(z_l)`` of
    each layer."""

    weights: Weights
    inputs: tuple[Tensor, ...]
    slopes: tuple[Tensor, ...]


def forward(
    weights: Weights, x: Tensor, activation: Activation
) -> tuple[Float[Tensor, "B N C"], Tape]:
    """Outputs f(x) and the tape."""
    a = x.expand(weights[0].shape[0], *x.shape[-2:])
    inputs, slopes = [a], []
    for W in weights[:-1]:
        z = bmm(a, W.mT)
        a = activation.value(z)
        inputs.append(a)
        slopes.append(activation.slope(z))
    return bmm(a, weights[-1].mT), Tape(weights, tuple(inputs), tuple(slopes))


def _backward(tape: Tape, c: Tensor) -> list[Tensor]:
    """Sensitivities δ_l = ∂⟨c, f⟩/∂z_l, each ``(B, N, n_l)``, first layer first."""
    deltas = [c]
    for W, slope in zip(reversed(tape.weights[1:]), reversed(tape.slopes), strict=True):
        deltas.append(bmm(deltas[-1], W).mul_(slope))  # in place: half of the memory traffic
    return deltas[::-1]


def pullback(tape: Tape, c: Float[Tensor, "B N C"]) -> list[Tensor]:
    """Jᵀc: the gradient of ⟨c, f⟩ in each layer's weight."""
    return [bmm(delta.mT, a) for delta, a in zip(_backward(tape, c), tape.inputs, strict=True)]


def pushforward(tape: Tape, tangents: Weights) -> Float[Tensor, "B N C"]:
    """Jv: the derivative of the outputs along one direction in weight space."""
    da: Tensor | None = None
    for l, (W, V, a) in enumerate(zip(tape.weights, tangents, tape.inputs, strict=True)):
        dz = bmm(a, V.mT)
        if da is not None:
            dz = dz + bmm(da, W.mT)
        da = dz * tape.slopes[l] if l < len(tape.slopes) else dz
    assert da is not None  # a net has at least one layer
    return da


def sensitivities(tape: Tape) -> list[Float[Tensor, "B N C n"]]:
    """∂f_c/∂z_l for every output c, first layer first."""
    B, N = tape.inputs[0].shape[:2]
    W = tape.weights[-1]
    C = W.shape[1]
    delta = torch.eye(C, dtype=W.dtype, device=W.device).expand(B, N, C, C)
    deltas = [delta]
    for W, slope in zip(reversed(tape.weights[1:]), reversed(tape.slopes), strict=True):
        delta = bmm(delta.flatten(1, 2), W).unflatten(1, (N, C)) * slope[:, :, None, :]
        deltas.append(delta)
    return deltas[::-1]


def jacobian(tape: Tape) -> list[Float[Tensor, "B N C n m"]]:
    """∂f_c(x_i)/∂W_l, dense: for small nets and for tests."""
    return [
        d[..., :, None] * a[:, :, None, None, :]
        for d, a in zip(sensitivities(tape), tape.inputs, strict=True)
    ]


def gram(tape: Tape, scales: Sequence[float] | None = None) -> Float[Tensor, "B NC NC"]:
    """JJᵀ, the neural tangent kernel, without forming J: Σ_l s_l (δ_l δ_lᵀ) ∘ (a_{l-1}
    a_{l-1}ᵀ)."""
    total: Tensor | None = None
    scales = scales or [1.0] * len(tape.inputs)
    for delta, a, scale in zip(sensitivities(tape), tape.inputs, scales, strict=True):
        C = delta.shape[2]
        left = delta.flatten(1, 2)
        right = bmm(a, a.mT).repeat_interleave(C, 1).repeat_interleave(C, 2)
        part = scale * bmm(left, left.mT) * right
        total = part if total is None else total + part
    assert total is not None
    return total


def neuron_grams(tape: Tape, layer: int) -> Float[Tensor, "B n NC NC"]:
    """The part of JJᵀ that the incoming weights of each neuron of ``layer`` (counted from 0) give.

    Summed over neurons and layers it is `gram`.
    """
    delta, a = sensitivities(tape)[layer], tape.inputs[layer]
    C = delta.shape[2]
    right = bmm(a, a.mT).repeat_interleave(C, 1).repeat_interleave(C, 2)
    rows = delta.flatten(1, 2).mT
    return rows[:, :, :, None] * rows[:, :, None, :] * right[:, None]
