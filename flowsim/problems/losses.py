"""Losses in the log domain: a loss of e^(−10⁶) is an ordinary number here, because only its
logarithm is formed.

A loss is a *reading* of the net's outputs as numbers q, and a scalar *tail* ℓ(q); the total is the
**sum** over examples, 𝓛 = Σ ℓ(q). Rules never see 𝓛 but Λ = log(1/𝓛) and ∇Λ = −∇𝓛/𝓛."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from flowsim.numerics.batched import bmm_one_by_one
from flowsim.numerics.shapes import Outputs, PerTrajectory
from flowsim.problems.readings import Pairwise, Reading, Residual, Signed, SoftPairwise
from flowsim.problems.tails import EXPONENTIAL, HALF_SQUARE, LOGISTIC, Elementwise, Tail


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
        return -torch.logsumexp(self.tail.log_value(q), -1)

    def ascent(self, f: Outputs, y: Tensor) -> tuple[PerTrajectory, Outputs]:
        """Λ and its cotangent ∂Λ/∂f = −(∂𝓛/∂f)/𝓛, which never underflows as a whole."""
        _, lam, _, cotangent = self._slopes(f, y)
        return lam, cotangent

    def curvature(self, f: Outputs, y: Tensor) -> Float[Tensor, "B NC NC"]:
        """F with ``F Fᵀ = (∂²𝓛/∂f²)/𝓛 − a (∂Λ/∂f)(∂Λ/∂f)ᵀ``, the largest a that leaves it positive
        semidefinite.

        For exponential and pairwise exponential loss a = 1 and this is −∂²Λ/∂f², the covariance of
        the softmax weights. Steepest directions v of one gradient h share ⟨h, v⟩, so that a
        multiple of hhᵀ never changes which of them is best; taking out all of it removes the
        stiffness of the common rise."""
        factor, v = self._factors(f, y)
        identity = torch.eye(v.shape[1], dtype=f.dtype, device=f.device)
        keep = identity - v[:, :, None] * v[:, None, :]
        return (factor @ keep.view(*f.shape, -1)).flatten(1, 2)

    def curved(
        self, f: Outputs, y: Tensor, jacobian: Float[Tensor, "B N C P"]
    ) -> Float[Tensor, "B NC P"]:
        """FᵀJ with the F of `curvature`, without forming it."""
        factor, v = self._factors(f, y)
        rows = (factor @ jacobian).flatten(1, 2)
        return rows - v[:, :, None] * bmm_one_by_one(v[:, None], rows)

    def weights(self, f: Outputs, y: Tensor) -> Float[Tensor, "B M"]:
        """p = |ℓ'(q)| / Σ|ℓ'(q)|: how much each q steers the descent; the softmax weights for
        exponential loss."""
        q, _ = self.reading.read(f, y)
        return torch.softmax(self.tail.log_slope(q), -1)

    def soft_minimum(self, lam: PerTrajectory) -> PerTrajectory:
        """ℓ⁻¹(𝓛), a lower bound on the smallest q; Λ itself for exponential loss."""
        if self.tail.inverse is None:
            raise ValueError(
                f"the {self.name} loss has no inverse, so its soft margin is not defined; try the "
                "hard margin, or a loss with one, such as flowsim.exponential or flowsim.logistic"
            )
        return self.tail.inverse(lam)

    def _slopes(self, f: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, Λ, |ℓ'(q)|/𝓛, and the cotangent ∂Λ/∂f."""
        q, back = self.reading.read(f, y)
        lam = -torch.logsumexp(self.tail.log_value(q), -1)
        slope = torch.exp(self.tail.log_slope(q) + lam[:, None])
        signed = slope if self.tail.decreasing else -torch.sign(q) * slope
        return q, lam, slope, back(signed)

    def _factors(
        self, f: Tensor, y: Tensor
    ) -> tuple[Float[Tensor, "B N C C"], Float[Tensor, "B NC"]]:
        """R, the square root of the examples' blocks of (∂²𝓛/∂f²)/𝓛, and the unit vector v of
        F = R (I − vvᵀ), which takes out the multiple of the gradient's outer product."""
        q, lam, slope, cotangent = self._slopes(f, y)
        if self.tail.decreasing:
            second = slope * self.tail.fall(q).clamp_min(0)  # ℓ''(q)/𝓛, not below 0
        else:
            second = torch.exp(lam)[:, None].expand_as(q)  # half squares
        factor, inverse = _square_roots(self.reading.hessian(f, y, slope, second))
        v = (inverse @ cotangent[..., None]).flatten(1)
        norm = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
        return factor, v / torch.where(norm == 0, 1.0, norm)


def _square_roots(
    blocks: Float[Tensor, "B N C C"],
) -> tuple[Float[Tensor, "B N C C"], Float[Tensor, "B N C C"]]:
    """Symmetric square roots of positive semidefinite blocks, and their pseudo-inverses."""
    if blocks.shape[-1] == 1:
        roots = blocks.clamp_min(0).sqrt()
        return roots, torch.where(roots > 0, 1 / roots, 0.0)
    values, basis = torch.linalg.eigh(blocks)
    rounding = blocks.shape[-1] * torch.finfo(blocks.dtype).eps * values[..., -1:]
    roots = torch.where(values > rounding, values, 0.0).sqrt()
    inverse = torch.where(roots > 0, 1 / roots, 0.0)
    whole = (basis * roots[..., None, :]) @ basis.mT
    pseudo_inverse = (basis * inverse[..., None, :]) @ basis.mT
    return whole, pseudo_inverse


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
    if not (rate > 0).all():
        at = float(u[rate.argmin()])
        raise ValueError(f"{name}: Φ' is {float(rate.min()):g} at u = {at:g}, expected Φ' > 0")
    growth = (rate * u)[u >= 0]
    if (growth.diff() < -1e-9 * growth.abs().max()).any():
        raise ValueError(
            f"{name}: Φ'(u)·u decreases somewhere on u ≥ 0, expected it to be non-decreasing"
        )
    differences = (value[2:] - value[:-2]) / (u[2:] - u[:-2])
    if not torch.allclose(differences, rate[1:-1], rtol=1e-2, atol=1e-3):
        raise ValueError(f"{name}: `slope` is not the derivative of `phi`")
    right = u > 0
    if inverse and not torch.allclose(inverse(value[right]), u[right], rtol=1e-6, atol=1e-8):
        raise ValueError(f"{name}: `inverse` is not the inverse of `phi`")
    tail = Tail(name, lambda q: -phi(q), lambda q: torch.log(slope(q)) - phi(q), inverse)
    return Loss(name, Signed(), tail)
