"""Positively homogeneous nets with flat weights: f(x; cw) = c^degree f(x; w) for c > 0.

Every net reads weights ``w (B, P)``, one row a trajectory, and inputs ``x``: vectors ``(N, d)`` shared by all
trajectories, or ``(B, N, d)`` with data of their own. It gives outputs ``(B, N, C)``.
"""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp, vmap

from flowsim.kernels import reference as kernels
from flowsim.kernels.reference import Activation
from flowsim.layout import Block, Layout, layout


def _step(z: Tensor) -> Tensor:
    """1 where z > 0, else 0; in one pass, without truth values in between."""
    return torch.gt(z, 0, out=torch.empty_like(z))


relu = Activation("relu", 1, True, torch.relu, _step)
identity = Activation("identity", 1, False, lambda z: z, torch.ones_like)
squared_relu = Activation("squared_relu", 2, False, lambda z: torch.relu(z).square(), lambda z: 2 * torch.relu(z))
square = Activation("square", 2, False, torch.square, lambda z: 2 * z)


def leaky_relu(slope: float = 0.01) -> Activation:
    """max(z, 0) + slope·min(z, 0), with 0 ≤ slope ≤ 1."""
    if not 0 <= slope <= 1:
        raise ValueError(f"leaky_relu: got slope {slope}, expected a number in [0, 1]")
    return Activation(
        f"leaky_relu({slope:g})",
        1,
        0 <= slope < 1,
        lambda z: torch.where(z > 0, z, slope * z),
        lambda z: torch.where(z > 0, torch.ones_like(z), slope),
    )


Pullback = Callable[[Tensor], Tensor]


class Net(ABC):
    """A positively homogeneous map. ``degree`` is None while it waits to be measured on data (see `measured`)."""

    layout: Layout
    degree: float | None
    kinks: bool
    linear: bool = False
    """Whether the outputs are linear in the weights."""

    @property
    def size(self) -> int:
        """P, the number of weights."""
        return sum(block.size for block in self.layout)

    @abstractmethod
    def outputs(self, w: Float[Tensor, "B P"], x: Tensor) -> Float[Tensor, "B N C"]:
        """f(x; w)."""

    @abstractmethod
    def linearize(self, w: Float[Tensor, "B P"], x: Tensor) -> tuple[Float[Tensor, "B N C"], Pullback]:
        """Outputs and the map c ↦ Jᵀc, which share one forward pass. c is ``(B, N, C)``, Jᵀc ``(B, P)``."""

    @abstractmethod
    def pushforward(self, w: Float[Tensor, "B P"], x: Tensor, v: Float[Tensor, "B P"]) -> Float[Tensor, "B N C"]:
        """Jv, the derivative of the outputs along v."""

    def pullback(self, w: Tensor, x: Tensor, c: Float[Tensor, "B N C"]) -> Float[Tensor, "B P"]:
        """Jᵀc. At a kink one element of Clarke's set: the one that autograd returns."""
        return self.linearize(w, x)[1](c)

    def jacobian(self, w: Tensor, x: Tensor) -> Float[Tensor, "B N C P"]:
        """J, dense: for small nets and for tests."""
        outputs, pull = self.linearize(w, x)
        rows = torch.eye(outputs[0].numel(), dtype=w.dtype, device=w.device).reshape(-1, 1, *outputs.shape[1:])
        jac = torch.stack([pull(row.expand_as(outputs).contiguous()) for row in rows], 1)
        return jac.unflatten(1, outputs.shape[1:])

    def gram(self, w: Tensor, x: Tensor) -> Float[Tensor, "B NC NC"]:
        """JJᵀ, the neural tangent kernel."""
        J = self.jacobian(w, x).flatten(1, 2)
        return J @ J.mT

    def init(self, seeds: int | Iterable[int] = 0, scale: float = 1.0) -> Float[Tensor, "B P"]:
        """Gaussian weights, one row a seed: entries of a block are N(0, scale²/fan_in), vectors N(0, scale²).

        A seed gives the same row whatever the other seeds are. float64 on the CPU; move it where the run should be.
        """
        if not (scale >= 0 and scale < float("inf")):
            raise ValueError(f"init: got scale {scale}, expected a finite number ≥ 0")
        rows = []
        for seed in seeds if isinstance(seeds, Iterable) else [seeds]:
            generator = torch.Generator().manual_seed(int(seed))
            parts = []
            for block in self.layout:
                fan_in = block.size // block.shape[0] if len(block.shape) > 1 else 1
                draw = torch.randn(block.size, generator=generator, dtype=torch.float64)
                parts.append(draw * (scale / fan_in**0.5))
            rows.append(torch.cat(parts))
        if not rows:
            raise ValueError("init: got no seeds, expected an integer or a non-empty sequence, try seeds=range(3)")
        return torch.stack(rows)

    def measured(self, x: Tensor) -> Self:
        """This net with its degree of homogeneity known, measured on a few rows of ``x`` where need be."""
        return self

    def select(self, rows: Tensor) -> Self:
        """The net of these trajectories, for nets that hold something of each trajectory."""
        return self


@dataclass(frozen=True)
class MLP(Net):
    """Bias-free feed-forward net W_L φ(… φ(W_1 x)): ``widths`` = [inputs, hidden …, outputs], blocks W1 … WL.

    Degree: each layer adds 1 and each activation multiplies by its own degree, so L for (leaky) ReLU and identity.

    >>> net = MLP([64, 128, 1], activation=relu)
    >>> net.size, net.degree
    (8320, 2)
    """

    widths: Sequence[int]
    activation: Activation = relu

    def __post_init__(self) -> None:
        widths = tuple(self.widths)
        if len(widths) < 2 or not all(isinstance(n, int) and n > 0 for n in widths):
            raise ValueError(
                f"MLP: got widths {list(widths)}, expected at least two positive integers, try [64, 128, 1]"
            )
        if not isinstance(self.activation, Activation):
            raise TypeError(f"MLP: got activation {self.activation!r}, expected one of flowsim's, try flowsim.relu")
        object.__setattr__(self, "widths", widths)

    @cached_property
    def layout(self) -> Layout:  # type: ignore[override]
        pairs = zip(self.widths[1:], self.widths[:-1], strict=True)
        return layout({f"W{l}": shape for l, shape in enumerate(pairs, 1)})

    @property
    def degree(self) -> int:  # type: ignore[override]
        degree = 1
        for _ in self.widths[2:]:
            degree = self.activation.degree * degree + 1
        return degree

    @property
    def kinks(self) -> bool:  # type: ignore[override]
        return self.activation.kinked and len(self.widths) > 2

    @property
    def linear(self) -> bool:  # type: ignore[override]
        return len(self.widths) == 2

    def weights(self, w: Tensor) -> list[Tensor]:
        """The layers' matrices ``(B, n_l, n_{l-1})``, as views of the flat weights."""
        return [block.of(w) for block in self.layout]

    def _tape(self, w: Tensor, x: Tensor) -> tuple[Tensor, kernels.Tape]:
        return kernels.forward(self.weights(w), x, self.activation)

    def outputs(self, w: Tensor, x: Tensor) -> Tensor:
        return self._tape(w, x)[0]

    def linearize(self, w: Tensor, x: Tensor) -> tuple[Tensor, Pullback]:
        outputs, tape = self._tape(w, x)
        return outputs, lambda c: torch.cat([g.flatten(1) for g in kernels.pullback(tape, c)], 1)

    def pushforward(self, w: Tensor, x: Tensor, v: Tensor) -> Tensor:
        return kernels.pushforward(self._tape(w, x)[1], self.weights(v))

    def jacobian(self, w: Tensor, x: Tensor) -> Tensor:
        return torch.cat([J.flatten(3) for J in kernels.jacobian(self._tape(w, x)[1])], -1)

    def gram(self, w: Tensor, x: Tensor) -> Tensor:
        return kernels.gram(self._tape(w, x)[1])

    def neuron_grams(self, w: Tensor, x: Tensor, layer: int) -> Float[Tensor, "B n NC NC"]:
        """The part of `gram` that each neuron's incoming weights give; ``layer`` counts from 0."""
        return kernels.neuron_grams(self._tape(w, x)[1], layer)


def Linear(inputs: int, outputs: int = 1) -> MLP:
    """Linear model f(x) = Wx, degree 1, with one block W1 ``(outputs, inputs)``."""
    return MLP([inputs, outputs], activation=identity)


@dataclass(frozen=True)
class FunctionNet(Net):
    """A net from a function of named arrays, ``function({name: array}, x (N, …)) -> (N, C) or (N,)``.

    Trajectories are batched by ``torch.func.vmap``, or one by one where ``looped``. A ``degree`` that is given is
    checked against the measured one when a Problem is made; without one the measured degree is used.
    ``kinks=True`` says that the function may be non-smooth in the weights.
    """

    function: Callable[[dict[str, Tensor], Tensor], Tensor]
    layout: Layout
    degree: float | None = None
    kinks: bool = True
    looped: bool = False
    checked: bool = field(default=False, repr=False)

    def _single(self, w: Tensor, x: Tensor) -> Tensor:
        out = self.function({block.name: block.of(w) for block in self.layout}, x)
        if out.ndim not in (1, 2) or out.shape[0] != x.shape[0]:
            raise ValueError(
                f"the net's output has shape {tuple(out.shape)}, expected (N,) or (N, C) with N = {x.shape[0]}"
            )
        return out[:, None] if out.ndim == 1 else out

    def _batched(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """w (B, P) ↦ outputs (B, N, C) with x bound; x (B, N, d) gives each trajectory its own data."""
        own = x.ndim == 3
        if self.looped:
            return lambda w: torch.stack([self._single(row, x[b] if own else x) for b, row in enumerate(w)])
        return lambda w: vmap(self._single, in_dims=(0, 0 if own else None))(w, x)

    def outputs(self, w: Tensor, x: Tensor) -> Tensor:
        return self._batched(x)(w)

    def linearize(self, w: Tensor, x: Tensor) -> tuple[Tensor, Pullback]:
        outputs, pull = vjp(self._batched(x), w)  # type: ignore[misc]
        return outputs.detach(), lambda c: pull(c)[0].detach()

    def pushforward(self, w: Tensor, x: Tensor, v: Tensor) -> Tensor:
        return jvp(self._batched(x), (w,), (v,))[1]

    def measured(self, x: Tensor) -> Self:
        if self.checked:
            return self
        rows = (x[0] if x.ndim == 3 else x)[:8].to(torch.float64)
        net = self._with_working_batch(rows)
        return replace(net, degree=_confirmed(self.degree, measure_degree(net, rows)), checked=True)

    def _with_working_batch(self, x: Tensor) -> Self:
        """This net, looping over trajectories where vmap refuses the function; says so in a warning."""
        w = self.init([0, 1]).to(x)
        if not self.looped:
            try:
                self.outputs(w, x)
            except RuntimeError as error:
                looped = replace(self, looped=True)
                looped.outputs(w, x)  # an error of the function's own is raised here, without vmap's wrapping
                warnings.warn(
                    f"vmap cannot batch this net ({str(error).splitlines()[0]}); trajectories run one by one, "
                    "which is slower",
                    stacklevel=2,
                )
                return looped
        return self


def measure_degree(net: Net, x: Tensor) -> float:
    """The degree L with f(x; cw) = c^L f(x; w), from random weights and c = ½, 2, 3.

    Raises ValueError with the measured values where no single L fits to 1e-8, or where repeated calls differ.
    """
    w = net.init([11, 12]).to(x)
    f = net.outputs(w, x)
    if not torch.equal(f, net.outputs(w, x)):
        raise ValueError("two evaluations of the net at the same weights differ; expected a deterministic net")
    if not (f.abs() > 0).any():
        raise ValueError("the net's outputs are all zero at random weights, so its degree cannot be measured")
    degrees, misfits = [], []
    for c in (0.5, 2.0, 3.0):
        scaled = net.outputs(c * w, x)
        degree = float(torch.log(scaled.norm() / f.norm())) / math.log(c)
        degrees.append(degree)
        misfits.append(float((scaled - c**degree * f).abs().max() / scaled.abs().max()))
    spread = max(degrees) - min(degrees)
    if not (spread <= 1e-6 and max(misfits) <= 1e-8):
        raise ValueError(
            "the net is not positively homogeneous in its weights: scaling them by ½, 2, 3 gives degrees "
            f"{', '.join(f'{d:.4g}' for d in degrees)}; expected one degree, try a net without biases or "
            "normalisation"
        )
    mean = sum(degrees) / 3
    return round(mean) if abs(mean - round(mean)) < 1e-6 else mean


def _confirmed(declared: float | None, measured: float) -> float:
    """The measured degree, which a declared one has to equal."""
    if declared is not None and abs(measured - declared) > 1e-6:
        raise ValueError(
            f"the net was declared homogeneous of degree {declared:g}, but its measured degree is {measured:g}; "
            "leave `degree` out to use the measured one"
        )
    return measured


def Diagonal(inputs: int, depth: int = 2, *, signed: bool = False) -> FunctionNet:
    """Diagonal linear net f(x) = ⟨β, x⟩, degree ``depth``.

    ``β = w1 ∘ … ∘ w_depth`` (blocks w1, w2, …), or with ``signed`` ``β = u^depth − v^depth`` entrywise (Woodworth
    et al. 2020), blocks u and v.
    """
    if not all(isinstance(n, int) and n > 0 for n in (inputs, depth)):
        raise ValueError(f"Diagonal: got inputs={inputs}, depth={depth}, expected positive integers")
    if signed:
        return FunctionNet(
            lambda p, x: x @ (p["u"] ** depth - p["v"] ** depth),
            layout({"u": (inputs,), "v": (inputs,)}),
            degree=depth,
            kinks=False,
        )
    names = [f"w{l}" for l in range(1, depth + 1)]
    return FunctionNet(
        lambda p, x: x @ torch.stack([p[name] for name in names]).prod(0),
        layout(dict.fromkeys(names, (inputs,))),
        degree=depth,
        kinks=False,
    )


_KINKED = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Hardtanh, nn.MaxPool1d, nn.MaxPool2d, nn.AdaptiveMaxPool2d)


def ModuleNet(module: nn.Module, *, degree: float | None = None, smooth: bool = False) -> FunctionNet:
    """Any deterministic, homogeneous ``torch.nn.Module`` as a net; the module itself is never changed.

    Its degree of homogeneity is measured when a Problem is made, and a wrong declaration is refused with the
    measured value. A module is taken to have kinks unless ``smooth=True`` says that it is differentiable in its
    weights. Dropout, buffers and BatchNorm are refused: their forward pass is not a function of weights and data.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"ModuleNet: got {type(module).__name__}, expected a torch.nn.Module")
    for name, part in module.named_modules():
        where = name or type(module).__name__
        if isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0:
            raise ValueError(f"ModuleNet: {where} is {type(part).__name__}; expected a deterministic module")
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"ModuleNet: {where} is {type(part).__name__}, which mixes examples and keeps statistics; "
                "expected a function of one example, try a module without it"
            )
        if smooth and isinstance(part, _KINKED):
            raise ValueError(f"ModuleNet: got smooth=True, but {where} is {type(part).__name__}, which has kinks")
    for name, _ in module.named_buffers():
        raise ValueError(f"ModuleNet: the module has a buffer, {name!r}; expected parameters only")
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    if not shapes:
        raise ValueError("ModuleNet: the module has no parameters, so there is nothing to train")
    return FunctionNet(
        lambda params, x: functional_call(module, params, (x,)), layout(shapes), degree=degree, kinks=not smooth
    )


def weights_of(module: nn.Module) -> Float[Tensor, "1 P"]:
    """A module's present parameters as one row of flat weights, in the order of its ModuleNet's layout."""
    return torch.cat([p.detach().double().flatten() for p in module.parameters()])[None]


@dataclass(frozen=True)
class Frozen(Net):
    """A net with some blocks held fixed, ``Frozen(net, {"W2": values})``: only the others are weights.

    A value has the block's shape, or a leading axis with one array for each trajectory.
    """

    net: Net
    values: Mapping[str, Tensor]
    degree: float | None = None

    def __post_init__(self) -> None:
        shapes = {block.name: block.shape for block in self.net.layout}
        for name, value in self.values.items():
            if name not in shapes:
                raise ValueError(f"Frozen: got block {name!r}, expected one of {list(shapes)}")
            if not isinstance(value, Tensor) or not torch.isfinite(value).all():
                raise ValueError(f"Frozen: got {name} = {value!r}, expected a tensor of finite numbers")
            if tuple(value.shape)[-len(shapes[name]) :] != shapes[name] or value.ndim > len(shapes[name]) + 1:
                raise ValueError(
                    f"Frozen: {name} has shape {tuple(value.shape)}, expected {shapes[name]}, or one such array for "
                    "each trajectory"
                )
        if len(self.values) == len(shapes):
            raise ValueError("Frozen: every block is frozen, so there is nothing to train")

    @cached_property
    def layout(self) -> Layout:  # type: ignore[override]
        return layout({b.name: b.shape for b in self.net.layout if b.name not in self.values})

    @property
    def kinks(self) -> bool:  # type: ignore[override]
        return self.net.kinks

    def _frozen(self) -> list[tuple[Block, Tensor, bool]]:
        """The frozen blocks, their values, and whether each trajectory has its own."""
        blocks = [block for block in self.net.layout if block.name in self.values]
        return [(b, self.values[b.name], self.values[b.name].ndim > len(b.shape)) for b in blocks]

    def _full(self, w: Tensor, *, frozen: bool = True) -> Tensor:
        """All the net's weights; the frozen blocks are their values, or zeros for a tangent."""
        free = {block.name: w[:, block.slice] for block in self.layout}
        parts = []
        for block in self.net.layout:
            if block.name in free:
                parts.append(free[block.name])
            elif frozen:
                value = self.values[block.name].to(w)
                own = value.ndim > len(block.shape)
                if own and len(value) != len(w):
                    raise ValueError(
                        f"Frozen: got {len(value)} {block.name} and {len(w)} trajectories, expected one for each"
                    )
                parts.append(value.flatten(1) if own else value.flatten().expand(w.shape[0], -1))
            else:
                parts.append(w.new_zeros(w.shape[0], block.size))
        return torch.cat(parts, 1)

    def _free(self, g: Tensor) -> Tensor:
        return torch.cat([g[:, b.slice] for b in self.net.layout if b.name not in self.values], 1)

    def outputs(self, w: Tensor, x: Tensor) -> Tensor:
        return self.net.outputs(self._full(w), x)

    def linearize(self, w: Tensor, x: Tensor) -> tuple[Tensor, Pullback]:
        outputs, pull = self.net.linearize(self._full(w), x)
        return outputs, lambda c: self._free(pull(c))

    def pushforward(self, w: Tensor, x: Tensor, v: Tensor) -> Tensor:
        return self.net.pushforward(self._full(w), x, self._full(v, frozen=False))

    def measured(self, x: Tensor) -> Self:
        net = self.net.measured(x)
        values = {block.name: value[0] if own else value for block, value, own in self._frozen()}
        single = replace(self, net=net, values=values)
        degree = measure_degree(single, (x[0] if x.ndim == 3 else x)[:8].to(torch.float64))
        return replace(self, net=net, degree=_confirmed(self.degree, degree))

    def select(self, rows: Tensor) -> Self:
        values = {block.name: value[rows] if own else value for block, value, own in self._frozen()}
        return replace(self, net=self.net.select(rows), values=values)
