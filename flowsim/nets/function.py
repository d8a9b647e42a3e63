"""Nets from functions of named arrays and from torch modules, differentiated by torch."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp, vmap

from flowsim.checks import require_instance, require_whole
from flowsim.layout import Layout, lay_out
from flowsim.nets.net import Net, Pullback, few_examples, measured_degree


@dataclass(frozen=True)
class FunctionNet(Net):
    """A net from a function of named arrays, ``function({name: array}, x (N, …)) -> (N, C) or
    (N,)``.

    Trajectories are batched by ``torch.func.vmap``, or one by one where ``looped``. A ``degree``
    that is given is checked against the measured one when a Problem is made; without one the
    measured degree is used. ``kinks=True`` says that the function may be non-smooth in the weights.
    """

    function: Callable[[dict[str, Tensor], Tensor], Tensor]
    layout: Layout
    degree: float | None = None
    kinks: bool = True
    looped: bool = False
    checked: bool = field(default=False, repr=False)

    def _single(self, w: Tensor, x: Tensor) -> Tensor:
        parameters = {block.name: block.of(w) for block in self.layout}
        outputs = self.function(parameters, x)
        shape = tuple(outputs.shape)
        N = len(x)
        if len(shape) not in (1, 2) or shape[0] != N:
            raise ValueError(
                f"the net's output has shape {shape}, expected (N,) or (N, C) with N = {N}"
            )
        return outputs[:, None] if outputs.ndim == 1 else outputs

    def _batched(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """w (B, P) ↦ outputs (B, N, C) with x bound; x (B, N, d) gives each trajectory its own
        data."""
        own = x.ndim == 3

        def batched(w: Tensor) -> Tensor:
            axis = 0 if own else None
            return vmap(self._single, in_dims=(0, axis))(w, x)

        def looped(w: Tensor) -> Tensor:
            data = x if own else repeat(x)
            outputs = [self._single(*pair) for pair in zip(w, data, strict=False)]
            return torch.stack(outputs)

        return looped if self.looped else batched

    def outputs(self, w: Tensor, x: Tensor) -> Tensor:
        return self._batched(x)(w)

    def linearize(self, w: Tensor, x: Tensor) -> tuple[Tensor, Pullback]:
        outputs, pull = vjp(self._batched(x), w)  # type: ignore[misc]

        def detached(c: Tensor) -> Tensor:
            (gradient,) = pull(c)
            return gradient.detach()

        return outputs.detach(), detached

    def pushforward(self, w: Tensor, x: Tensor, v: Tensor) -> Tensor:
        function = self._batched(x)
        return jvp(function, (w,), (v,))[1]

    def measured(self, x: Tensor) -> Self:
        if self.checked:
            return self
        net = self._with_working_batch(few_examples(x))
        degree = measured_degree(net, x, declared=self.degree)
        return replace(net, degree=degree, checked=True)

    def _with_working_batch(self, x: Tensor) -> Self:
        """This net, looping over trajectories where vmap refuses the function; says so in a
        warning."""
        if self.looped:
            return self
        w = self.init([0, 1]).to(x)
        try:
            self.outputs(w, x)
        except RuntimeError as error:
            looped = replace(self, looped=True)
            looped.outputs(w, x)  # raises the function's own errors, without vmap's wrapping
            reason = str(error).splitlines()[0]
            warnings.warn(
                f"vmap cannot batch this net ({reason}); trajectories run one by one, which is "
                "slower",
                stacklevel=2,
            )
            return looped
        return self


def Diagonal(inputs: int, depth: int = 2, *, signed: bool = False) -> FunctionNet:
    """Diagonal linear net f(x) = ⟨β, x⟩, degree ``depth``.

    ``β = w1 ∘ … ∘ w_depth`` (blocks w1, w2, …), or with ``signed`` ``β = u^depth − v^depth``
    entrywise (Woodworth et al. 2020), blocks u and v."""
    require_whole("Diagonal", inputs=inputs, depth=depth)

    def difference(p: dict[str, Tensor], x: Tensor) -> Tensor:
        beta = p["u"] ** depth - p["v"] ** depth
        return x @ beta

    def product(p: dict[str, Tensor], x: Tensor) -> Tensor:
        factors = torch.stack(list(p.values()))
        return x @ factors.prod(0)

    names = ["u", "v"] if signed else [f"w{l}" for l in range(1, depth + 1)]
    layout = lay_out(dict.fromkeys(names, (inputs,)))
    function = difference if signed else product
    return FunctionNet(function, layout, degree=depth, kinks=False)


_KINKED = (
    nn.ReLU,
    nn.LeakyReLU,
    nn.PReLU,
    nn.Hardtanh,
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.AdaptiveMaxPool2d,
)


def ModuleNet(
    module: nn.Module, *, degree: float | None = None, smooth: bool = False
) -> FunctionNet:
    """Any deterministic, homogeneous ``torch.nn.Module`` as a net; the module itself is never
    changed.

    Its degree of homogeneity is measured when a Problem is made, and a wrong declaration is refused
    with the measured value. A module is taken to have kinks unless ``smooth=True`` says that it is
    differentiable in its weights. Dropout, buffers and BatchNorm are refused: their forward pass is
    not a function of weights and data."""
    require_instance("ModuleNet", nn.Module, "a torch.nn.Module", module=module)
    for name, part in module.named_modules():
        where = f"{name or type(module).__name__} is {type(part).__name__}"
        random = isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0
        if random:
            raise ValueError(f"ModuleNet: {where}; expected a deterministic module")
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"ModuleNet: {where}, which mixes examples and keeps statistics; expected a "
                "function of one example, try a module without it"
            )
        if smooth and isinstance(part, _KINKED):
            raise ValueError(f"ModuleNet: got smooth=True, but {where}, which has kinks")
    for name, _ in module.named_buffers():
        raise ValueError(f"ModuleNet: the module has a buffer, {name!r}; expected parameters only")
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    if not shapes:
        raise ValueError("ModuleNet: the module has no parameters, so there is nothing to train")

    def function(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(module, parameters, (x,))

    layout = lay_out(shapes)
    return FunctionNet(function, layout, degree=degree, kinks=not smooth)


def weights_of(module: nn.Module) -> Float[Tensor, "1 P"]:
    """A module's present parameters as one row of flat weights, in the order of its ModuleNet's
    layout."""
    parts = []
    for parameter in module.parameters():
        values = parameter.detach().double()
        parts.append(values.flatten())
    return torch.cat(parts)[None]
