"""Losses in the log domain: a loss of e^(−10⁶) is an ordinary number here, because only its
logarithm is formed.

A loss is a *reading* of the net's outputs as numbers q, and a scalar *tail* ℓ(q); the total is the
**sum** over examples, 𝓛 = Σ ℓ(q). Rules never see 𝓛 but Λ = log(1/𝓛) and ∇Λ = −∇𝓛/𝓛."""

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from flowsim.numerics.batched import bmm_one_by_one
from flowsim.numerics.scaling import nonzero
from flowsim.numerics.shapes import Outputs, PerTrajectory
from flowsim.problems.readings import Pairwise, Reading, Residual, Signed, SoftPairwise
from flowsim.problems.tails import EXPONENTIAL, HALF_SQUARE, LOGISTIC, Elementwise, Tail

_Blocks: TypeAlias = Float[Tensor, "B N C C"]


class _Slopes(NamedTuple):
    """The numbers q, Λ, |ℓ'(q)|/𝓛, and the cotangent ∂Λ/∂f."""

    q: Float[Tensor, "B M"]
    lam: PerTrajectory
    slope: Float[Tensor, "B M"]
    cotangent: Outputs


@dataclass(frozen=True)
class Loss:
    """Sum loss 𝓛 = Σ ℓ(q), with q read from the outputs. Predefined: `exponential`, `logistic`,
    …"""

    name: str
    reading: Reading
    tail: Tail

    def lam(self, f: Outputs, y: Tensor) -> PerTrajectory:
        """Λ = log(1/𝓛)."""
        q, _ = self.reading.read(f, y)
        return self._lam_of(q)

    def _lam_of(self, q: Tensor) -> PerTrajectory:
        log_values = self.tail.log_value(q)
        return -torch.logsumexp(log_values, -1)

    def ascent(self, f: Outputs, y: Tensor) -> tuple[PerTrajectory, Outputs]:
        """Λ and its cotangent ∂Λ/∂f = −(∂𝓛/∂f)/𝓛, which never underflows as a whole."""
        slopes = self._slopes(f, y)
        return slopes.lam, slopes.cotangent

    def curvature(self, f: Outputs, y: Tensor) -> Float[Tensor, "B NC NC"]:
        """F with ``F Fᵀ = (∂²𝓛/∂f²)/𝓛 − a (∂Λ/∂f)(∂Λ/∂f)ᵀ``, the largest a that leaves it positive
        semidefinite.

        For exponential and pairwise exponential loss a = 1 and this is −∂²Λ/∂f², the covariance of
        the softmax weights. Steepest directions v of one gradient h share ⟨h, v⟩, so that a
        multiple of hhᵀ never changes which of them is best; taking out all of it removes the
        stiffness of the common rise."""
        root, v = self._factors(f, y)
        NC = v.shape[1]
        identity = torch.eye(NC, dtype=f.dtype, device=f.device)
        outer = v[:, :, None] * v[:, None, :]
        kept = identity - outer
        factor = root @ kept.view(*f.shape, NC)  # (B, N, C, NC)
        return factor.flatten(1, 2)

    def curved(
        self, f: Outputs, y: Tensor, jacobian: Float[Tensor, "B N C P"]
    ) -> Float[Tensor, "B NC P"]:
        """FᵀJ with the F of `curvature`, without forming it."""
        root, v = self._factors(f, y)
        rows = (root @ jacobian).flatten(1, 2)
        along = bmm_one_by_one(v[:, None], rows)
        return rows - v[:, :, None] * along

    def weights(self, f: Outputs, y: Tensor) -> Float[Tensor, "B M"]:
        """p = |ℓ'(q)| / Σ|ℓ'(q)|: how much each q steers the descent; the softmax weights for
        exponential loss."""
        q, _ = self.reading.read(f, y)
        log_slopes = self.tail.log_slope(q)
        return torch.softmax(log_slopes, -1)

    def soft_minimum(self, lam: PerTrajectory) -> PerTrajectory:
        """ℓ⁻¹(𝓛), a lower bound on the smallest q; Λ itself for exponential loss."""
        if self.tail.inverse is None:
            raise ValueError(
                f"the {self.name} loss has no inverse, so its soft margin is not defined; try the "
                "hard margin, or a loss with one, such as flowsim.exponential or flowsim.logistic"
            )
        return self.tail.inverse(lam)

    def _slopes(self, f: Tensor, y: Tensor) -> _Slopes:
        q, back = self.reading.read(f, y)
        lam = self._lam_of(q)
        log_slope = self.tail.log_slope(q) + lam[:, None]
        slope = torch.exp(log_slope)
        signed = slope
        if not self.tail.decreasing:
            signed = -torch.sign(q) * slope
        return _Slopes(q, lam, slope, back(signed))

    def _factors(self, f: Tensor, y: Tensor) -> tuple[_Blocks, Float[Tensor, "B NC"]]:
        """R, the square root of the examples' blocks of (∂²𝓛/∂f²)/𝓛, and the unit vector v of
        F = R (I − vvᵀ), which takes out the multiple of the gradient's outer product."""
        q, lam, slope, cotangent = self._slopes(f, y)
        if self.tail.decreasing:
            fall = self.tail.fall(q)
            second = slope * fall.clamp_min(0)  # ℓ''(q)/𝓛, not below 0
        else:
            second = torch.exp(lam)[:, None].expand_as(q)  # half squares
        hessian = self.reading.hessian(f, y, slope, second)
        root, inverse = _square_roots(hessian)
        v = inverse @ cotangent[..., None]
        v = v.flatten(1)
        norm = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
        return root, v / nonzero(norm)


def _square_roots(blocks: _Blocks) -> tuple[_Blocks, _Blocks]:
    """Symmetric square roots of positive semidefinite blocks, and their pseudo-inverses."""
    C = blocks.shape[-1]
    if C == 1:
        roots = blocks.clamp_min(0).sqrt()
        return roots, _inverted(roots)
    values, basis = torch.linalg.eigh(blocks)
    units = C * torch.finfo(blocks.dtype).eps
    positive = values > units * values[..., -1:]
    roots = torch.where(positive, values, 0.0).sqrt()
    inverses = _inverted(roots)
    whole = (basis * roots[..., None, :]) @ basis.mT
    pseudo_inverse = (basis * inverses[..., None, :]) @ basis.mT
    return whole, pseudo_inverse


def _inverted(roots: Tensor) -> Tensor:
    return torch.where(roots > 0, 1 / roots, 0.0)


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


def exponential_tail(
    phi: Elementwise,
    slope: Elementwise,
    inverse: Elementwise | None = None,
    *,
    name: str = "tail",
) -> Loss:
    """Binary loss with a general tail ℓ(u) = e^{−Φ(u)} (Tsilivis et al. 2026, Def. 21).

    ``phi`` is Φ, ``slope`` its derivative, ``inverse`` Φ⁻¹. The class asks for Φ' > 0 everywhere
    and for Φ'(u)·u non-decreasing on u ≥ 0; both are checked on a grid, as are the derivative and
    the inverse."""
    u = torch.linspace(-5, 30, 3501, dtype=torch.float64)
    value = phi(u)
    rate = slope(u)
    least = float(rate.min())
    if not least > 0:
        at = float(u[rate.argmin()])
        raise ValueError(f"{name}: Φ' is {least:g} at u = {at:g}, expected Φ' > 0")
    growth = (rate * u)[u >= 0]
    rounding = 1e-9 * growth.abs().max()
    if (growth.diff() < -rounding).any():
        raise ValueError(
            f"{name}: Φ'(u)·u decreases somewhere on u ≥ 0, expected it to be non-decreasing"
        )
    rise = value[2:] - value[:-2]
    differences = rise / (u[2:] - u[:-2])
    if not torch.allclose(differences, rate[1:-1], rtol=1e-2, atol=1e-3):
        raise ValueError(f"{name}: `slope` is not the derivative of `phi`")
    if inverse:
        back = inverse(value[u > 0])
        if not torch.allclose(back, u[u > 0], rtol=1e-6, atol=1e-8):
            raise ValueError(f"{name}: `inverse` is not the inverse of `phi`")

    def log_value(q: Tensor) -> Tensor:
        return -phi(q)

    def log_slope(q: Tensor) -> Tensor:
        return torch.log(slope(q)) - phi(q)

    return Loss(name, Signed(), Tail(name, log_value, log_slope, inverse))
