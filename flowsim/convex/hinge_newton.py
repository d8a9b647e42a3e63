r"""Newton's equations of a `Programme`, reduced to one matrix for each neuron and one for the rows.

    1  hinges   With a, b the ratios of force and slack of the two sides of a hinge, its slope
                between both is a/(a + b) and its stiffness ab/(a + b): s and the forces go.
    2  ball     What is left of v is, with A' = A − K diag(a/(a+b)) E,

                (ball + C + Eᵀ diag(ab/(a+b)) E) dv − A'ᵀ dp = …

                a matrix for each neuron and the low rank of the ball: v goes.
    3  rows     A' dv + (T/p + K diag(1/(a+b)) Kᵀ) dp − d(level) = … with Σ dp = 1 − Σ p.

What cannot be factored is an ArithmeticError."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from flowsim.convex.balls import BallDirection, BallIterate, BallNewton
from flowsim.convex.pairs import Pairs
from flowsim.convex.programme import Flat, PerHinge, PerNeuron, PerRow, Programme


@dataclass(frozen=True)
class HingedDirection:
    """A Newton direction, as `HingedIterate` names its parts."""

    ball: BallDirection
    hinges: Pairs
    p: PerRow
    level: float


@dataclass(frozen=True)
class HingedIterate:
    """Where the method is. The slacks of the ``hinges`` are s − z − Ev, where it has been met, and
    s, and the forces those of s ≥ z + Ev and of s ≥ 0. ``level`` is the multiplier of Σp = 1."""

    ball: BallIterate
    live: Bool[Tensor, "m N"]
    hinges: Pairs
    p: PerRow
    level: float

    def products(self) -> tuple[float, int]:
        """The sum of all slacks times forces, and how many there are."""
        (above, s), (up, down) = self.hinges.slacks, self.hinges.forces
        total, count = self.ball.pairs.products()
        kinks = torch.where(self.live, up * above + down * s, 0.0).sum()
        return total + float(kinks), count + 2 * int(self.live.sum())

    def targets(
        self, mu: float, before: HingedDirection | None
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """What products of the ball and of the hinges are to become: see `Pairs.targets`."""
        if before is None:
            return self.ball.pairs.targets(mu), self.hinges.targets(mu)
        ball = self.ball.pairs.targets(mu, before.ball.pairs)
        return ball, self.hinges.targets(mu, before.hinges)

    def to_boundary(self, d: HingedDirection) -> tuple[float, float]:
        """How far primal and dual variables may go; hinges that are not live do not move."""
        primal, dual = self.ball.pairs.to_boundary(d.ball.pairs)
        slacks, forces = self.hinges.to_boundary(d.hinges)
        return min(primal, slacks), min(dual, forces)

    def after(self, d: HingedDirection, primal: float, dual: float) -> "HingedIterate":
        """The iterate after these fractions of a direction; no weight to less than a thousandth or
        more than six times its size."""
        return HingedIterate(
            ball=self.ball.after(d.ball, primal, dual),
            live=self.live,
            hinges=self.hinges.after(d.hinges, primal, dual),
            p=self.p * (1 + dual * d.p / self.p).clamp(1e-3, 6),
            level=self.level + dual * d.level,
        )


# --------------------------------------------------------------------------------------------------
# 1  Hinges
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Springs:
    """The hinges between their two sides, of ratios ``a`` and ``b``. ``excess`` is s − z − Ev less
    its slack, and ``largest`` is Kᵀp, the sum of both forces at the solution."""

    live: Bool[Tensor, "m N"]
    hinges: Pairs
    a: PerHinge
    b: PerHinge
    excess: PerHinge
    largest: PerHinge

    @staticmethod
    def of(programme: Programme, at: HingedIterate, v: PerNeuron) -> "_Springs":
        live, (above, s), (up, down) = programme.live, at.hinges.slacks, at.hinges.forces
        excess = torch.where(live, s - programme.z - programme.along(v) - above, 0.0)
        a = torch.where(live, up / above, 0.0)
        b = torch.where(live, down / s, 1.0)
        return _Springs(live, at.hinges, a, b, excess, programme.largest_force(at.p))

    @property
    def slope(self) -> PerHinge:
        return self.a / (self.a + self.b)

    @property
    def stiffness(self) -> PerHinge:
        return self.a * self.b / (self.a + self.b)

    def released(self, targets: tuple[Tensor, ...]) -> "_Release":
        aims = zip(targets, self.hinges.slacks, strict=True)
        up, down = (torch.where(self.live, product / slack, 0.0) for product, slack in aims)
        over = up + down - self.largest
        force = up - self.hinges.forces[0] - self.stiffness * self.excess - self.slope * over
        lift = over / (self.a + self.b) - self.slope * self.excess
        force, lift = (torch.where(self.live, x, 0.0) for x in (force, lift))
        return _Release(self, down - self.hinges.forces[1], force, lift)


@dataclass(frozen=True)
class _Release:
    """How hinges move towards their products where v and p stay: force and s by ``force`` and
    ``lift``, and the force of s ≥ 0 by ``down`` where s stays too."""

    springs: _Springs
    down: PerHinge
    force: PerHinge
    lift: PerHinge

    def direction(self, rise: PerHinge, largest: PerHinge) -> Pairs:
        """The direction with the changes ``rise`` of Ev and ``largest`` of Kᵀp."""
        springs = self.springs
        force = self.force + springs.stiffness * rise + springs.slope * largest
        s = self.lift + springs.slope * rise - largest / (springs.a + springs.b)
        up, s = (torch.where(springs.live, x, 0.0) for x in (force, s))
        return Pairs((s - rise + springs.excess, s), (up, self.down - springs.b * s))


# --------------------------------------------------------------------------------------------------
# 2  Ball
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Metric:
    """The matrix W⁻¹(1 + LLᵀ)W⁻ᵀ of v, where W whitens the blocks of the neurons and L is the low
    rank of the ball. The root of (1 + LLᵀ)⁻¹ is 1 − low diag(shrink) lowᵀ."""

    root: Float[Tensor, "m D D"]
    scale: PerNeuron
    low: Float[Tensor, "mD k"]
    shrink: Float[Tensor, " k"]

    @staticmethod
    def of(programme: Programme, springs: _Springs, ball: BallNewton) -> "_Metric":
        d = programme.inputs
        blocks = programme.curb.clone()
        blocks[:, :d, :d] += (programme.x.mT * springs.stiffness[:, None, :]) @ programme.x
        blocks.diagonal(dim1=1, dim2=2).add_(programme.blocked(ball.stiff))
        scale = blocks.diagonal(dim1=1, dim2=2).rsqrt()
        root = _cholesky(scale[:, :, None] * blocks * scale[:, None, :])
        none = ball.weight[:0]
        plain = _Metric(root, scale, none.new_zeros(scale.numel(), 0), none)
        if not len(ball.low):
            return plain
        low = torch.stack([programme.blocked(row) for row in ball.low], -1)
        L = plain.whiten(low * ball.weight.sqrt())
        low, values, _ = torch.linalg.svd(L, full_matrices=False)
        return replace(plain, low=low, shrink=1 - (1 + values**2).rsqrt())

    def whiten(self, v: Float[Tensor, "m D k"]) -> Float[Tensor, "mD k"]:
        scaled = self.scale[..., None] * v
        return self._thinned(
            torch.linalg.solve_triangular(self.root, scaled, upper=False).flatten(0, 1)
        )

    def unwhiten(self, y: Float[Tensor, "mD 1"]) -> PerNeuron:
        """The transpose of `whiten`."""
        blocks = self._thinned(y).view(*self.scale.shape, 1)
        return self.scale * torch.linalg.solve_triangular(self.root.mT, blocks, upper=True)[..., 0]

    def _thinned(self, y: Float[Tensor, "mD k"]) -> Float[Tensor, "mD k"]:
        """The low rank of the ball taken out of whitened numbers."""
        if not len(self.shrink):
            return y
        return y - self.low @ (self.shrink[:, None] * (self.low.mT @ y))


# --------------------------------------------------------------------------------------------------
# 3  Rows, and all of it
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HingedNewton:
    """The factored equations at an iterate. ``white`` is the whitened A'ᵀ; the Schur complement of
    the rows has the ``root`` after scaling; ``entropy`` is what their equation misses."""

    programme: Programme
    at: HingedIterate
    g: Flat
    springs: _Springs
    metric: _Metric
    white: Float[Tensor, "mD R"]
    root: Float[Tensor, "R R"]
    scale: PerRow
    entropy: PerRow

    @staticmethod
    def of(programme: Programme, at: HingedIterate, gap: float, mu: float) -> "HingedNewton":
        """The equations, with a temperature that is never far below the ``gap``."""
        v = programme.blocked(at.ball.v)
        temperature = max(programme.temperature, 0.1 * gap)
        springs = _Springs.of(programme, at, v)
        g = programme.flat(programme.gradient(at.p, at.hinges.forces[0], v))
        metric = _Metric.of(programme, springs, at.ball.newton(g, at.targets(mu, None)[0]))
        white = metric.whiten(_rows_with_hinges(programme, springs))
        schur = white.mT @ white + _row_stiffness(programme, springs)
        schur = schur + torch.diag(temperature / at.p)
        scale = schur.diagonal().rsqrt()
        root = _cholesky(scale[:, None] * schur * scale)
        s = torch.where(programme.live, at.hinges.slacks[1], 0.0)
        entropy = temperature * torch.log(at.p) + programme.margins(v, s) - at.level
        return HingedNewton(programme, at, g, springs, metric, white, root, scale, entropy)

    def direction(self, mu: float, before: HingedDirection | None = None) -> HingedDirection:
        """The direction towards products of μ, corrected to second order after ``before``."""
        programme = self.programme
        ball_targets, hinge_targets = self.at.targets(mu, before)
        release = self.springs.released(hinge_targets)
        ball = self.at.ball.newton(self.g, ball_targets)
        pull = programme.blocked(ball.pull) - programme.forces_on_weights(release.force)
        pull = self.metric.whiten(pull[..., None])  # (mD, 1)
        lifted = programme.hinge_loss(release.lift)
        dp, level = self._on_simplex(lifted - self.entropy - (self.white.mT @ pull)[:, 0])
        dv = self.metric.unwhiten(pull + (self.white @ dp)[:, None])
        hinges = release.direction(programme.along(dv), programme.largest_force(dp))
        dg = programme.columns(dp) - programme.forces_on_weights(hinges.forces[0])
        dg = programme.flat(dg - programme.curbed(dv))
        return HingedDirection(ball.direction(programme.flat(dv), dg), hinges, dp, level)

    def _on_simplex(self, missed: PerRow) -> tuple[PerRow, float]:
        """dp with schur·dp − level = missed and Σ dp = 1 − Σp; and the level."""
        free = self._solve(missed)
        shift = self._solve(torch.ones_like(missed))
        level = (1 - self.at.p.sum() - free.sum()) / shift.sum()
        return free + level * shift, float(level)

    def _solve(self, b: PerRow) -> PerRow:
        return self.scale * torch.cholesky_solve((self.scale * b)[:, None], self.root)[:, 0]


def _rows_with_hinges(programme: Programme, springs: _Springs) -> Float[Tensor, "m D R"]:
    """A'ᵀ = (A − K diag(a/(a + b)) E)ᵀ."""
    slope = programme.slope - programme.kinks * springs.slope[:, programme.example_of]
    return torch.cat([slope[:, None, :] * programme.row_inputs, programme.ends], 1)


def _row_stiffness(programme: Programme, springs: _Springs) -> Float[Tensor, "R R"]:
    """K diag(1/(a + b)) Kᵀ."""
    kinked = programme.kinks / (springs.a + springs.b)[:, programme.example_of]
    return programme.same_example * (kinked.mT @ programme.kinks)


def _cholesky(matrix: Float[Tensor, "*m D D"]) -> Float[Tensor, "*m D D"]:
    """The root of a matrix with unit diagonal, or of many, with the least ridge that rounding asks
    for."""
    ridge = 0.0
    eye = torch.eye(matrix.shape[-1]).to(matrix)
    while ridge < 1e-4:
        root, info = torch.linalg.cholesky_ex(matrix + ridge * eye)
        if not bool(info.any()) and bool(torch.isfinite(root).all()):
            return root
        ridge = max(10 * ridge, 1e-15)
    raise ArithmeticError("got a matrix that is not positive definite, even with a ridge of 1e-4")
