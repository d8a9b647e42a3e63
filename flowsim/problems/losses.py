"""Losses in the log domain: a loss of e^(−10⁶) is an ordinary number here, because only its
logarithm is formed.

A loss is a *reading* of the net's outputs as numbers q, and a scalar *tail* ℓ(q); the total is the
**sum** over examples, 𝓛 = Σ ℓ(q). Rules never see 𝓛 but Λ = log(1/𝓛) and ∇Λ = −∇𝓛/𝓛."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from flowsim.numerics.batched import bmm_one_by_one

# --------------------------------------------------------------------------------------------------
# Tails: the scalar loss ℓ of one number
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tail:
    """A positive scalar loss ℓ(q), by logarithms.

    ``log_value`` is log ℓ(q); ``log_slope`` is log |ℓ'(q)|; ``inverse`` maps Λ to ℓ⁻¹(e^{−Λ}), the
    soft minimum of the q, and is None where ℓ has no inverse (then soft margins are refused). A
    ``decreasing`` tail rewards large q, the others pull q to 0."""

    name: str
    log_value: Callable[[Tensor], Tensor]
    log_slope: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor] | None = None
    decreasing: bool = True
    fall: Callable[[Tensor], Tensor] | None = None


def _log_log1p_exp_neg(q: Tensor) -> Tensor:
    """log log(1 + e^{−q}), exact to rounding for every q: log ℓ of the logistic loss.

    For large q, log(1 + z) = z(1 − z/2 + …) with z = e^{−q} gives −q + log1p(−z/2) without
    underflow."""
    far = q > 30
    near = torch.log(-F.logsigmoid(torch.where(far, torch.zeros_like(q), q)))
    return torch.where(far, -q + torch.log1p(-0.5 * torch.exp(-q)), near)


def _logistic_inverse(lam: Tensor) -> Tensor:
    """−log(expm1(𝓛)) at 𝓛 = e^{−Λ}; for small 𝓛 it is Λ − 𝓛/2 + O(𝓛²), for large 𝓛 −𝓛 −
    log1p(−e^{−𝓛})."""
    loss = torch.exp(-lam)
    tiny, large = loss < 1e-8, loss > 1
    middle = torch.where(tiny | large, torch.ones_like(loss), loss)
    result = torch.where(tiny, lam - loss / 2, -torch.log(torch.expm1(middle)))
    return torch.where(large, -loss - torch.log1p(-torch.exp(-loss)), result)


EXPONENTIAL = Tail("exponential", lambda q: -q, lambda q: -q, lambda lam: lam, fall=torch.ones_like)


LOGISTIC = Tail(
    "logistic",
    _log_log1p_exp_neg,
    lambda q: F.logsigmoid(-q),
    _logistic_inverse,
    fall=lambda q: torch.exp(
        F.logsigmoid(q)
    ),  # torch.sigmoid rounds by an element's place in the batch
)


HALF_SQUARE = Tail(
    "half square",
    lambda r: 2 * torch.log(r.abs()) - math.log(2),
    lambda r: torch.log(r.abs()),
    decreasing=False,
)


def exponential_tail(
    phi: Callable[[Tensor], Tensor],
    slope: Callable[[Tensor], Tensor],
    inverse: Callable[[Tensor], Tensor] | None = None,
    *,
    name: str = "tail",
) -> "Loss":
    """Binary loss with a general tail ℓ(u) = e^{−Φ(u)} (Tsilivis et al. 2026, Def. 21).

    ``phi`` is Φ, ``slope`` its derivative, ``inverse`` Φ⁻¹. The class asks for Φ' > 0 everywhere
    and for Φ'(u)·u non-decreasing on u ≥ 0; both are checked on a grid, as are the derivative and
    the inverse."""
    u = torch.linspace(-5, 30, 3501, dtype=torch.float64)
    value, rate = phi(u), slope(u)
    if not (rate > 0).all():
        raise ValueError(
            f"{name}: Φ' is {float(rate.min()):g} at u = {float(u[rate.argmin()]):g}, expected Φ' > 0"
        )
    growth = (rate * u)[u >= 0]
    if (growth.diff() < -1e-9 * growth.abs().max()).any():
        raise ValueError(
            f"{name}: Φ'(u)·u decreases somewhere on u ≥ 0, expected it to be non-decreasing"
        )
    finite_difference = (value[2:] - value[:-2]) / (u[2:] - u[:-2])
    if not torch.allclose(finite_difference, rate[1:-1], rtol=1e-2, atol=1e-3):
        raise ValueError(f"{name}: `slope` is not the derivative of `phi`")
    if inverse is not None and not torch.allclose(
        inverse(value[u > 0]), u[u > 0], rtol=1e-6, atol=1e-8
    ):
        raise ValueError(f"{name}: `inverse` is not the inverse of `phi`")
    return Loss(
        name,
        Signed(),
        Tail(name, lambda q: -phi(q), lambda q: torch.log(slope(q)) - phi(q), inverse),
    )


# --------------------------------------------------------------------------------------------------
# Readings: from outputs (B, N, C) and targets to the numbers q (B, M) that the tail sees
# --------------------------------------------------------------------------------------------------


class Reading(ABC):
    """How outputs and targets become numbers q, and back."""

    targets: str
    """The kind of target it wants: "signs" (±1), "classes" (0 … C−1) or "values" (real numbers)."""

    @abstractmethod
    def read(
        self, f: Float[Tensor, "B N C"], y: Tensor
    ) -> tuple[Float[Tensor, "B M"], Callable[[Tensor], Tensor]]:
        """The numbers q and the map from a cotangent of q to the cotangent of f."""

    @abstractmethod
    def hessian(
        self,
        f: Float[Tensor, "B N C"],
        y: Tensor,
        slope: Float[Tensor, "B M"],
        bend: Float[Tensor, "B M"],
    ) -> Float[Tensor, "B N C C"]:
        """∂²/∂f² of Σ ℓ(q) for each example, with ``slope`` = |ℓ'(q)| and ``bend`` = ℓ''(q)."""

    def margins(self, f: Float[Tensor, "B N C"], y: Tensor) -> Float[Tensor, "B N"]:
        """The classification margin of each example: positive where it is classified correctly."""
        wrong = f.masked_fill(_one_hot(f, y), -torch.inf).amax(-1)
        return _at_label(f, y) - wrong


def _roots(blocks: Float[Tensor, "B N C C"]) -> tuple[Tensor, Tensor]:
    """Symmetric roots of positive semidefinite blocks, and the pseudo-inverses of the roots."""
    if blocks.shape[-1] == 1:
        root = blocks.clamp_min(0).sqrt()
        return root, torch.where(root > 0, 1 / _nonzero(root), 0.0)
    values, basis = torch.linalg.eigh(blocks)
    rounding = blocks.shape[-1] * torch.finfo(blocks.dtype).eps * values[..., -1:]
    roots = torch.where(values > rounding, values, 0.0).sqrt()
    inverse = torch.where(roots > 0, 1 / _nonzero(roots), 0.0)
    return (basis * roots[..., None, :]) @ basis.mT, (basis * inverse[..., None, :]) @ basis.mT


def _nonzero(a: Tensor) -> Tensor:
    return torch.where(a == 0, torch.ones_like(a), a)


def _one_hot(f: Tensor, y: Tensor) -> Tensor:
    return F.one_hot(y, f.shape[-1]).bool().expand_as(f)


def _at_label(f: Tensor, y: Tensor) -> Tensor:
    return f.gather(-1, y.expand(f.shape[:2])[..., None])[..., 0]


class Signed(Reading):
    """q = y f for labels ±1 and one output."""

    targets = "signs"

    def read(self, f: Tensor, y: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        return self.margins(f, y), lambda c: (c * y)[..., None]

    def hessian(self, f: Tensor, y: Tensor, slope: Tensor, bend: Tensor) -> Tensor:
        return bend[..., None, None]

    def margins(self, f: Tensor, y: Tensor) -> Tensor:
        return y * f[..., 0]


class Pairwise(Reading):
    """q = f_y − f_j for every example and every wrong class j: M = N(C − 1) (theory of the binary
    case applies)."""

    targets = "classes"

    def read(self, f: Tensor, y: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        B, N, C = f.shape
        wrong = ~_one_hot(f, y)
        gaps = (_at_label(f, y)[..., None] - f)[wrong].view(B, N * (C - 1))

        def back(c: Tensor) -> Tensor:
            to_outputs = torch.zeros_like(f).masked_scatter(wrong, -c)
            return to_outputs.scatter(
                -1, y.expand(B, N)[..., None], -to_outputs.sum(-1, keepdim=True)
            )

        return gaps, back

    def hessian(self, f: Tensor, y: Tensor, slope: Tensor, bend: Tensor) -> Tensor:
        at_label = _one_hot(f, y)
        rivals = torch.zeros_like(f).masked_scatter(~at_label, bend)
        gap = at_label.to(f)[..., None, :] - torch.eye(f.shape[-1], dtype=f.dtype, device=f.device)
        return (gap * rivals[..., None]).mT @ gap


class SoftPairwise(Reading):
    """q = −log Σ_{j≠y} e^{f_j − f_y}, the soft minimum of an example's pairwise gaps."""

    targets = "classes"

    def read(self, f: Tensor, y: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        others = f.masked_fill(_one_hot(f, y), -torch.inf)
        q = _at_label(f, y) - torch.logsumexp(others, -1)

        def back(c: Tensor) -> Tensor:
            to_outputs = -c[..., None] * torch.softmax(others, -1)
            return to_outputs.scatter(-1, y.expand(f.shape[:2])[..., None], c[..., None])

        return q, back

    def hessian(self, f: Tensor, y: Tensor, slope: Tensor, bend: Tensor) -> Tensor:
        at_label = _one_hot(f, y)
        share = torch.softmax(f.masked_fill(at_label, -torch.inf), -1)
        to_q = at_label.to(f) - share
        rivalry = torch.diag_embed(share) - share[..., :, None] * share[..., None, :]
        along = bend[..., None, None] * to_q[..., :, None] * to_q[..., None, :]
        return along + slope[..., None, None] * rivalry


class Residual(Reading):
    """q = f − y for real targets, all outputs of an example in a row."""

    targets = "values"

    def read(self, f: Tensor, y: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        target = y if y.shape[-2:] == f.shape[-2:] else y[..., None]
        return (f - target).flatten(1), lambda c: c.view_as(f)

    def hessian(self, f: Tensor, y: Tensor, slope: Tensor, bend: Tensor) -> Tensor:
        return torch.diag_embed(bend.view_as(f))

    def margins(self, f: Tensor, y: Tensor) -> Tensor:
        raise ValueError(
            "a regression loss has no classification margins; try exponential or logistic loss"
        )


# --------------------------------------------------------------------------------------------------
# Losses
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loss:
    """Sum loss 𝓛 = Σ ℓ(q), with q read from the outputs. Predefined: `exponential`, `logistic`,
    …"""

    name: str
    reading: Reading
    tail: Tail

    def lam(self, f: Float[Tensor, "B N C"], y: Tensor) -> Float[Tensor, " B"]:
        """Λ = log(1/𝓛)."""
        return -torch.logsumexp(self.tail.log_value(self.reading.read(f, y)[0]), -1)

    def ascent(
        self, f: Float[Tensor, "B N C"], y: Tensor
    ) -> tuple[Float[Tensor, " B"], Float[Tensor, "B N C"]]:
        """Λ and its cotangent ∂Λ/∂f = −(∂𝓛/∂f)/𝓛, which never underflows as a whole."""
        q, back = self.reading.read(f, y)
        lam = -torch.logsumexp(self.tail.log_value(q), -1)
        c = torch.exp(self.tail.log_slope(q) + lam[:, None])
        return lam, back(c if self.tail.decreasing else -torch.sign(q) * c)

    def curvature(self, f: Float[Tensor, "B N C"], y: Tensor) -> Float[Tensor, "B NC NC"]:
        """F with ``F Fᵀ = (∂²𝓛/∂f²)/𝓛 − a (∂Λ/∂f)(∂Λ/∂f)ᵀ``, the largest a that leaves it positive
        semidefinite.

        For exponential and pairwise exponential loss a = 1 and this is −∂²Λ/∂f², the covariance of
        the softmax weights. Steepest directions v of one gradient h share ⟨h, v⟩, so that a
        multiple of hhᵀ never changes which of them is best; taking out all of it removes the
        stiffness of the common rise."""
        root, v = self._root(f, y)
        B, N, C = f.shape
        keep = torch.eye(N * C, dtype=f.dtype, device=f.device) - v[:, :, None] * v[:, None, :]
        return (root @ keep.view(B, N, C, N * C)).flatten(1, 2)

    def curved(
        self, f: Float[Tensor, "B N C"], y: Tensor, jacobian: Float[Tensor, "B N C P"]
    ) -> Float[Tensor, "B NC P"]:
        """FᵀJ with the F of `curvature`, without forming it."""
        root, v = self._root(f, y)
        rows = (root @ jacobian).flatten(1, 2)
        return rows - v[:, :, None] * bmm_one_by_one(v[:, None], rows)

    def _root(self, f: Tensor, y: Tensor) -> tuple[Float[Tensor, "B N C C"], Float[Tensor, "B NC"]]:
        """Roots of the examples' blocks of (∂²𝓛/∂f²)/𝓛, and the unit vector v of F = root (I −
        vvᵀ), which takes out the multiple of the gradient's outer product."""
        q, back = self.reading.read(f, y)
        lam = -torch.logsumexp(self.tail.log_value(q), -1)
        slope = torch.exp(self.tail.log_slope(q) + lam[:, None])
        cotangent = back(slope if self.tail.decreasing else -torch.sign(q) * slope)
        root, inverse = _roots(self.reading.hessian(f, y, slope, self._bend(q, slope, lam)))
        v = (inverse @ cotangent[..., None]).flatten(1)
        return root, v / _nonzero(torch.linalg.vector_norm(v, dim=-1, keepdim=True))

    def _bend(self, q: Tensor, slope: Tensor, lam: Tensor) -> Tensor:
        """ℓ''(q)/𝓛, not below 0."""
        if not self.tail.decreasing:
            return torch.exp(lam)[:, None].expand_as(q)  # half squares
        fall = self.tail.fall or torch.func.grad(lambda q: -self.tail.log_slope(q).sum())
        return slope * fall(q).clamp_min(0)

    def weights(self, f: Float[Tensor, "B N C"], y: Tensor) -> Float[Tensor, "B M"]:
        """p = |ℓ'(q)| / Σ|ℓ'(q)|: how much each q steers the descent; the softmax weights for
        exponential loss."""
        return torch.softmax(self.tail.log_slope(self.reading.read(f, y)[0]), -1)

    def soft_minimum(self, lam: Tensor) -> Tensor:
        """ℓ⁻¹(𝓛), a lower bound on the smallest q; Λ itself for exponential loss."""
        if self.tail.inverse is None:
            raise ValueError(
                f"the {self.name} loss has no inverse, so its soft margin is not defined; "
                "try the hard margin, or a loss with one, such as flowsim.exponential or flowsim.logistic"
            )
        return self.tail.inverse(lam)


exponential = Loss("exponential", Signed(), EXPONENTIAL)


"""Σ e^{−y f}, binary."""


logistic = Loss("logistic", Signed(), LOGISTIC)


"""Σ log(1 + e^{−y f}), binary."""


cross_entropy = Loss("cross-entropy", SoftPairwise(), LOGISTIC)


"""Multi-class cross-entropy: the logistic loss of the soft minimum of an example's pairwise
gaps."""


pairwise_exponential = Loss("pairwise exponential", Pairwise(), EXPONENTIAL)


"""Σ_i Σ_{j≠y_i} e^{−(f_y − f_j)}: exactly a binary exponential loss over the N(C − 1) pairwise
gaps."""


squared = Loss("squared", Residual(), HALF_SQUARE)


"""½ Σ (f − y)², regression."""
