r"""Newton's equations of a `Programme`, reduced to one matrix for each neuron and one for the rows.

    1  hinges   With a, b the ratios of force and slack of the two sides of a hinge, its slope
                between both is a/(a + b) and its stiffness ab/(a + b): s and the forces go.
    2  ball     What is left of v is, with A' = A − K diag(a/(a+b)) E,

                (ball + C + Eᵀ diag(ab/(a+b)) E) dv − A'ᵀ dp = …

                a matrix for each neuron and the low rank of the ball: v goes.
    3  rows     A' dv + (T/p + K diag(1/(a+b)) Kᵀ) dp − d(level) = … with Σ dp = 1 − Σ p.

What cannot be factored is an ArithmeticError."""

from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.linalg import solve_triangular

from flowsim.convex.balls import BallDirection, BallIterate, BallNewton
from flowsim.convex.pairs import Pairs, Products
from flowsim.convex.programme import PerHinge, PerNeuron, PerRow, Programme
from flowsim.numerics.shapes import Matrices, Row

White: TypeAlias = Float[Tensor, "mD k"]


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
        total, count = self.ball.pairs.products()
        above, s = self.hinges.slacks
        up, down = self.hinges.forces
        both = up * above + down * s
        of_hinges = both.where(self.live, 0.0)
        total += float(of_hinges.sum())
        count += 2 * int(self.live.sum())
        return total, count

    def targets(self, mu: float, before: HingedDirection | None) -> tuple[Products, Products]:
        """What products of the ball and of the hinges are to become: see `Pairs.targets`."""
        pairs = self.ball.pairs
        if before is None:
            return pairs.targets(mu), self.hinges.targets(mu)
        ball = pairs.targets(mu, before.ball.pairs)
        hinges = self.hinges.targets(mu, before.hinges)
        return ball, hinges

    def to_boundary(self, d: HingedDirection) -> tuple[float, float]:
        """How far primal and dual variables may go; hinges that are not live do not move."""
        primal, dual = self.ball.pairs.to_boundary(d.ball.pairs)
        slacks, forces = self.hinges.to_boundary(d.hinges)
        return min(primal, slacks), min(dual, forces)

    def after(self, d: HingedDirection, primal: float, dual: float) -> "HingedIterate":
        """The iterate after these fractions of a direction; no weight to less than a thousandth or
        more than six times its size."""
        ball = self.ball.after(d.ball, primal, dual)
        hinges = self.hinges.after(d.hinges, primal, dual)
        growth = 1 + dual * d.p / self.p
        p = self.p * growth.clamp(1e-3, 6)
        level = self.level + dual * d.level
        return HingedIterate(ball, self.live, hinges, p, level)


# --------------------------------------------------------------------------------------------------
# 1  Hinges
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Springs:
    """The hinges between their two sides, of ratios ``a`` and ``b``. ``excess`` is s − z − Ev less
    its slack, and ``largest`` is Kᵀp, the sum of both forces at the solution."""

    programme: Programme
    hinges: Pairs
    a: PerHinge
    b: PerHinge
    excess: PerHinge
    largest: PerHinge

    @staticmethod
    def of(programme: Programme, at: HingedIterate, v: PerNeuron) -> "_Springs":
        above, s = at.hinges.slacks
        up, down = at.hinges.forces
        a = programme.where_live(up / above)
        b = programme.where_live(down / s, 1.0)
        excess = s - programme.z - programme.along(v) - above
        excess = programme.where_live(excess)
        largest = programme.largest_force(at.p)
        return _Springs(programme, at.hinges, a, b, excess, largest)

    @property
    def both(self) -> PerHinge:
        return self.a + self.b

    @property
    def slope(self) -> PerHinge:
        return self.a / self.both

    @property
    def stiffness(self) -> PerHinge:
        return self.a * self.b / self.both

    def released(self, targets: Products) -> "_Release":
        where_live = self.programme.where_live
        above, s = self.hinges.slacks
        held_up, held_down = self.hinges.forces
        up = where_live(targets[0] / above)
        down = where_live(targets[1] / s)
        over = up + down - self.largest
        sunk = self.stiffness * self.excess
        force = up - held_up - sunk - self.slope * over
        force = where_live(force)
        lift = over / self.both - self.slope * self.excess
        return _Release(self, down - held_down, force, where_live(lift))


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
        slope = springs.slope
        up = self.force + springs.stiffness * rise + slope * largest
        s = self.lift + slope * rise - largest / springs.both
        up = springs.programme.where_live(up)
        s = springs.programme.where_live(s)
        above = s - rise + springs.excess
        down = self.down - springs.b * s
        return Pairs((above, s), (up, down))


# --------------------------------------------------------------------------------------------------
# 2  Ball
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Metric:
    """The matrix W⁻¹(1 + LLᵀ)W⁻ᵀ of v, where W whitens the blocks of the neurons and L is the low
    rank of the ball. The root of (1 + LLᵀ)⁻¹ is 1 − low diag(shrink) lowᵀ."""

    factor: "_Factor"
    low: White
    shrink: Float[Tensor, " k"]

    @staticmethod
    def of(programme: Programme, springs: _Springs, ball: BallNewton) -> "_Metric":
        d = programme.inputs
        x = programme.x
        blocks = programme.curb.clone()
        stretched = x.mT * springs.stiffness[:, None, :]
        blocks[:, :d, :d] += stretched @ x
        diagonal = blocks.diagonal(dim1=1, dim2=2)
        diagonal += programme.blocked(ball.stiff)
        factor = _Factor.of(blocks)
        none = factor.scale.new_zeros(factor.scale.numel(), 0)
        plain = _Metric(factor, none, none[0])
        if not len(ball.low):
            return plain
        low = torch.stack([programme.blocked(row) for row in ball.low], -1)
        L = plain.whiten(low * ball.weight.sqrt())
        low, values, _ = torch.linalg.svd(L, full_matrices=False)
        shrink = 1 - (1 + values**2).rsqrt()
        return replace(plain, low=low, shrink=shrink)

    def whiten(self, v: Float[Tensor, "m D k"]) -> White:
        scaled = self.factor.scale[..., None] * v
        blocks = solve_triangular(self.factor.root, scaled, upper=False)
        return self._thinned(blocks.flatten(0, 1))

    def unwhiten(self, y: Float[Tensor, "mD 1"]) -> PerNeuron:
        """The transpose of `whiten`."""
        scale = self.factor.scale
        blocks = self._thinned(y).view(*scale.shape, 1)
        solved = solve_triangular(self.factor.root.mT, blocks, upper=True)
        return scale * solved[..., 0]

    def _thinned(self, y: White) -> White:
        """The low rank of the ball taken out of whitened numbers."""
        if not len(self.shrink):
            return y
        along = self.low.mT @ y
        return y - self.low @ (self.shrink[:, None] * along)


# --------------------------------------------------------------------------------------------------
# 3  Rows, and all of it
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HingedNewton:
    """The factored equations at an iterate. ``white`` is the whitened A'ᵀ; the Schur complement of
    the rows is ``schur``; ``entropy`` is what their equation misses."""

    programme: Programme
    at: HingedIterate
    g: Row
    springs: _Springs
    metric: _Metric
    white: Float[Tensor, "mD R"]
    schur: "_Factor"
    entropy: PerRow

    @staticmethod
    def of(programme: Programme, at: HingedIterate, gap: float, mu: float) -> "HingedNewton":
        """The equations, with a temperature that is never far below the ``gap``."""
        v = programme.blocked(at.ball.v)
        temperature = max(programme.temperature, 0.1 * gap)
        springs = _Springs.of(programme, at, v)
        up, _ = at.hinges.forces
        g = programme.gradient(at.p, up, v)
        ball = at.ball.newton(g, at.ball.pairs.targets(mu))
        metric = _Metric.of(programme, springs, ball)
        white = metric.whiten(_rows_with_hinges(programme, springs))
        stiffness = white.mT @ white + _row_stiffness(programme, springs)
        schur = _Factor.of(stiffness + torch.diag(temperature / at.p))
        margins = _margins(programme, at, v)
        entropy = temperature * torch.log(at.p) + margins - at.level
        return HingedNewton(programme, at, g, springs, metric, white, schur, entropy)

    def direction(self, mu: float, before: HingedDirection | None = None) -> HingedDirection:
        """The direction towards products of μ, corrected to second order after ``before``."""
        programme = self.programme
        ball_targets, hinge_targets = self.at.targets(mu, before)
        ball = self.at.ball.newton(self.g, ball_targets)
        release = self.springs.released(hinge_targets)
        dv, dp, level = self._points(ball, release)
        rise = programme.along(dv)
        hinges = release.direction(rise, programme.largest_force(dp))
        dg = programme.gradient_change(dp, hinges.forces[0], dv)
        of_ball = ball.direction(programme.flat(dv), dg)
        return HingedDirection(of_ball, hinges, dp, level)

    def _points(self, ball: BallNewton, release: _Release) -> tuple[PerNeuron, PerRow, float]:
        """dv, dp and the change of the level: what is left without slacks and forces."""
        programme = self.programme
        force = programme.forces_on_weights(release.force)
        pull = programme.blocked(ball.pull) - force
        pull = self.metric.whiten(pull[..., None])  # (mD, 1)
        lifted = programme.hinge_loss(release.lift)
        carried = (self.white.mT @ pull)[:, 0]
        dp, level = self._on_simplex(lifted - self.entropy - carried)
        pull = pull + (self.white @ dp)[:, None]
        return self.metric.unwhiten(pull), dp, level

    def _on_simplex(self, missed: PerRow) -> tuple[PerRow, float]:
        """dp with schur·dp − level = missed and Σ dp = 1 − Σp; and the level."""
        free = self.schur.solve(missed)
        shift = self.schur.solve(torch.ones_like(missed))
        missing = 1 - self.at.p.sum()
        level = (missing - free.sum()) / shift.sum()
        return free + level * shift, float(level)


def _margins(programme: Programme, at: HingedIterate, v: PerNeuron) -> PerRow:
    _, s = at.hinges.slacks
    return programme.margins(v, programme.where_live(s))


def _rows_with_hinges(programme: Programme, springs: _Springs) -> Float[Tensor, "m D R"]:
    """A'ᵀ = (A − K diag(a/(a + b)) E)ᵀ."""
    of_rows = springs.slope[:, programme.example_of]
    slope = programme.slope - programme.kinks * of_rows
    inner = slope[:, None, :] * programme.row_inputs
    return torch.cat([inner, programme.ends], 1)


def _row_stiffness(programme: Programme, springs: _Springs) -> Float[Tensor, "R R"]:
    """K diag(1/(a + b)) Kᵀ."""
    of_rows = springs.both[:, programme.example_of]
    kinked = programme.kinks / of_rows
    return programme.same_example * (kinked.mT @ programme.kinks)


@dataclass(frozen=True)
class _Factor:
    """A matrix, or many: with its diagonal scaled to 1 it is ``root`` rootᵀ."""

    scale: Float[Tensor, "*m D"]
    root: Matrices

    @staticmethod
    def of(matrix: Matrices) -> "_Factor":
        """With the least ridge that rounding asks for."""
        scale = matrix.diagonal(dim1=-2, dim2=-1).rsqrt()
        scaled = scale[..., :, None] * matrix * scale[..., None, :]
        eye = torch.eye(scale.shape[-1]).to(scale)
        ridge = 0.0
        while ridge < 1e-4:
            root, info = torch.linalg.cholesky_ex(scaled + ridge * eye)
            failed = bool(info.any())
            if not failed and bool(torch.isfinite(root).all()):
                return _Factor(scale, root)
            ridge = max(10 * ridge, 1e-15)
        raise ArithmeticError(
            "got a matrix that is not positive definite, even with a ridge of 1e-4"
        )

    def solve(self, b: PerRow) -> PerRow:
        """x with matrix·x = b, for one matrix."""
        scaled = (self.scale * b)[:, None]
        solved = torch.cholesky_solve(scaled, self.root)
        return self.scale * solved[:, 0]
