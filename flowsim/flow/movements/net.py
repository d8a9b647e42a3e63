"""Minimising movements of two-layer nets with kinks, in norms whose steepest direction is not
linear.

The movement of arclength ε from w ends at w + εv, where v is steepest for an element of Clarke's
gradient of Λ there. It is found by a sequence of convex programmes (`interior`), each a model of
the net at the last guess: margins linearised but for the kinks that attract, whose hinges stay as
they are, so that any number of kinks and coordinates may come to slide, or stop, in one movement.
What is not convex is

    kinks that repel       replaced by the side that the guess is on, which lies below them,
    products of weights    linearised, less ½ Δᵀ C Δ with C the negative part of their curvature,

so that a model also lies below Λ to second order, and each sweep gains.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from flowsim.convex.hinge_newton import HingedIterate
from flowsim.convex.hinged import Optimum, solve_hinged
from flowsim.convex.programme import Programme
from flowsim.flow.movements.convex import Guess, Movement, linear_reading, touching
from flowsim.norms.norm import Norm
from flowsim.problems.kinks import NetAt, release_sides
from flowsim.problems.problem import Problem


@dataclass(frozen=True)
class _Model:
    """A programme, and the length, gain and hinges that it is made of."""

    programme: Programme
    unit: float
    live: Bool[Tensor, "N m"]


class NetMover:
    """Movements of one two-layer net. Dual variables are the slopes of all pairs (example, neuron).

    A kink that slides and begins to repel is released to a side: see `kinks.taken` for ``sides``.
    """

    trusted: ClassVar[float] = 1e-3

    def __init__(
        self, norm: Norm, problem: Problem, w: Float[Tensor, "1 P"], sides: tuple[int, ...] = ()
    ) -> None:
        self.norm, self.problem, self.sides = norm, problem, sides
        self.net = problem.two_layer(1)
        self._reach = _reach(norm, self.net.x[0], w.shape[1])
        self._signs = _signs(problem, w)
        rows, examples = len(self._signs), self.net.x.shape[1]
        of = torch.arange(rows, device=w.device) // (rows // examples)
        # each row's example, the first example parallel to it, and the multiple that it is of that
        self._own, self._of, self._share = (
            of,
            self.net.representative[0][of],
            self.net.coefficient[0][of],
        )

    @property
    def duals(self) -> int:
        return self.net.x.shape[1] * self.net.width

    def aim(self, rtol: float, atol: float, w: Float[Tensor, " P"], eps: float) -> float:
        """The gap is what Λ lacks of its gain, which tells at second order only."""
        return min(1e-5, 1e-3 * rtol)

    def move(
        self, w: Float[Tensor, " P"], eps: float, guess: Guess | None, tol: float = 1e-9
    ) -> Movement:
        z0 = self.net.at(w[None]).z[0]
        begun = Guess(torch.zeros_like(w), (z0 > 0).to(w).flatten()) if guess is None else guess
        v, given = begun.v, begun.duals.view_as(z0)
        best, top, iterate, newton = None, None, None, 0
        asked: list[Tensor] = []
        given_back: list[Tensor] = []
        for _ in range(20):
            model = self._model(w, z0, eps, v, replace(begun, duals=given))
            if model is None:
                break
            aim = 1e-3 if best is None else max(0.1 * tol, 1e-3 * best.gap)
            found = self._solve(model, aim, iterate)
            iterate, newton = found.iterate, newton + found.newton
            ended = self._ended(w, eps, model, found, begun)
            best = ended if best is None or ended.gap < best.gap else best
            if best.gap <= tol:
                break
            if top is not None and ended.lam < top.lam:
                # the last guess went too far
                asked, given_back, ended = [], [], top
                v = ended.v
            else:
                top, asked, given_back = ended, [*asked[-3:], v], [*given_back[-3:], ended.v]
                v = _extrapolated(asked, given_back)
            given = ended.duals.view_as(z0)
        return self._unmoved(w, given) if best is None else replace(best, newton=newton)

    def _unmoved(self, w: Tensor, given: Tensor) -> Movement:
        point = self.net.at(w[None])
        h = point.gradient(point.slopes(given[None]))[0]
        gap = 0.0 if float(self.norm.dual(h)) == 0 else math.inf
        return Movement(
            w, torch.zeros_like(w), given.flatten(), gap, 0.0, point.lam[0], h, given.flatten()
        )

    def _solve(self, model: _Model, tol: float, start: HingedIterate | None) -> Optimum:
        """The optimum of a model, begun anew where an old iterate leads nowhere."""
        found = solve_hinged(model.programme, self.norm, tol, start)
        if found.gap > tol and start is not None:
            return self._solve(model, tol, None)
        return found

    def _model(self, w: Tensor, z0: Tensor, eps: float, v: Tensor, guess: Guess) -> _Model | None:
        """The programme at the guess w + εv, in units of the gain that its gradient promises."""
        point = self.net.at((w + eps * v)[None])
        live = (
            (point.jump[0] < 0)
            & self.net.distinct[0]
            & (z0.abs() <= 1.001 * eps * self._reach[:, None])
        )
        given = guess.duals.view_as(z0)
        slopes = point.slopes(torch.where(live, given, self._off(point, given, guess))[None])
        unit = eps * float(self.norm.dual(point.gradient(slopes)[0]))
        if not 0 < unit < math.inf:
            return None
        scale, margins = touching(self.problem.loss, point.outputs, self.net.y)
        slope, kinks, ends = self._rows(point, slopes, live, scale[:, None] * self._signs)
        programme = Programme(
            x=self.net.x[0],
            example_of=self._of,
            slope=slope * (eps / unit),
            ends=ends * (eps / unit),
            kinks=kinks * (eps / unit),
            live=live.mT,
            z=z0.mT / eps,
            offset=margins / unit,
            temperature=1 / unit,
            curb=(eps * eps / unit) * _curb(self._products(point, slopes), self._blocked(v)),
            centre=self._blocked(v),
        )
        # at the guess the model's margins are those of the net
        hinges = torch.where(live, point.z[0], 0.0).clamp_min(0).mT / eps
        offset = programme.offset - programme.rows(programme.centre) + programme.hinge_loss(hinges)
        return _Model(replace(programme, offset=offset - offset.amin()), unit, live)

    def _rows(
        self, point: NetAt, slopes: Tensor, live: Tensor, signs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """How margins depend on inner weights off their hinges ``(m, R)``, on hinges ``(m, R)``,
        and on outer weights ``(m, C, R)``, with ``signs (R, C)`` how they depend on outputs.

        Activations are those of the first parallel input: for x_r = c·x the hinge of ⟨x_r, w⟩ is
        |c|(s − z) if c < 0."""
        leak, share = self.net.leak, self._share[:, None]
        pull, hinged = signs @ point.last[0], live[self._of]
        beside = leak * share + (1 - leak) * share.clamp_max(0)
        slope = torch.where(hinged, pull * beside, pull * share * slopes[0][self._own])
        kinks = torch.where(hinged, -(1 - leak) * pull * share.abs(), 0.0)
        return slope.mT, kinks.mT, torch.einsum("rc,rm->mcr", signs, point.hidden[0][self._own])

    def _blocked(self, v: Float[Tensor, " P"]) -> Float[Tensor, "m D"]:
        m, d = self.net.width, self.net.x.shape[2]
        return torch.cat([v[: m * d].view(m, d), v[m * d :].view(-1, m).mT], 1)

    def _released(self, point: NetAt, multipliers: Tensor) -> Bool[Tensor, "N m"]:
        """Which kinks slide with these multipliers, but repel at this point."""
        return (multipliers > 0) & (multipliers < 1) & (point.jump[0] >= 0)

    def _off(self, point: NetAt, multipliers: Tensor, begun: Guess) -> Float[Tensor, "N m"]:
        """The sides of pairs that nothing holds: the one that they are on, or the one to which they
        are released."""
        released = self._released(point, multipliers)
        before = multipliers.new_tensor([begun.releases])
        sides = release_sides(
            multipliers.view(1, -1), released.view(1, -1), before, self.sides
        ).view_as(multipliers)
        return torch.where(released, sides, (point.z[0] > 0).to(multipliers))

    def _products(self, point: NetAt, slopes: Tensor) -> Float[Tensor, "m C d"]:
        """∂²Λ/∂a_cj∂w_j of every neuron, at fixed softmax weights."""
        return torch.einsum("nc,nm,nd->mcd", point.cotangent[0], slopes[0], self.net.x[0])

    def _ended(
        self, w: Tensor, eps: float, model: _Model, found: Optimum, begun: Guess
    ) -> Movement:
        """The end of a movement, with its own gradient and what that still promises."""
        v = model.programme.flat(found.v)
        end = w + eps * v
        point = self.net.at(end[None])
        limit = model.programme.largest_force(found.p)
        share = torch.where(limit > 0, found.f / limit.clamp_min(1e-300), 0.0).clamp(0, 1).mT
        z, jump = point.z[0], point.jump[0]
        # of force and distance one is rounding
        near = z.abs() <= share * (1 - share) * eps * self._reach[:, None]
        holds = model.live & near & (jump < 0)
        given = torch.where(
            holds,
            share,
            self._off(point, torch.where(model.live & near, share, begun.duals.view_as(z)), begun),
        )
        h = point.gradient(point.slopes(given[None]))[0]
        releases = begun.releases + float(self._released(point, begun.duals.view_as(z)).sum())
        dual = self.norm.dual(h)
        gap = float((dual - h @ v) / dual) if float(dual) > 0 else 0.0
        return Movement(
            end, v, given.flatten(), gap, 0.0, point.lam[0], h, given.flatten(), releases
        )


def _reach(norm: Norm, x: Float[Tensor, "N d"], size: int) -> Float[Tensor, " N"]:
    """The most that a pre-activation can change along a unit direction: the dual norm of its
    normal."""
    padded = [torch.nn.functional.pad(part, (0, size - x.shape[1])) for part in x.split(16)]
    return torch.cat([norm.dual(part) for part in padded])


def _signs(problem: Problem, w: Float[Tensor, "1 P"]) -> Float[Tensor, "R C"]:
    """How each number that the loss sees depends on the outputs of its example."""
    reading = linear_reading(problem.loss)
    outputs = problem.outputs(w)
    units = torch.eye(outputs.shape[-1]).to(outputs)
    return torch.stack(
        [reading.read(unit.expand_as(outputs), problem.y)[0][0] for unit in units], -1
    )


def _extrapolated(asked: list[Tensor], given: list[Tensor]) -> Float[Tensor, " P"]:
    """The next guess after sweeps that made ``given`` from ``asked`` (Anderson 1965)."""
    if len(asked) < 2:
        return given[-1]
    ins, outs = torch.stack(asked, -1), torch.stack(given, -1)
    change = outs - ins
    steps = torch.linalg.lstsq(change.diff(dim=-1), change[:, -1:], driver="gelsd").solution
    return outs[:, -1] - outs.diff(dim=-1) @ steps[:, 0]


def _curb(b: Float[Tensor, "m C d"], v: Float[Tensor, "m D"]) -> Float[Tensor, "m D D"]:
    """A positive semidefinite C with −½ΔᵀCΔ below the products aᵀbw of the change Δ = (w, a) of
    every neuron.

    Each singular value σ of b has a product of two numbers, αβ = ((tα + β/t)² − (tα − β/t)²)/4 for
    every t. The second square makes C; t is such that it vanishes along v, where the step is going.
    """
    left, s, right = torch.linalg.svd(b, full_matrices=False)
    alpha, beta = (
        (right @ v[:, : b.shape[2], None])[..., 0],
        (left.mT @ v[:, b.shape[2] :, None])[..., 0],
    )
    known = (alpha != 0) & (beta != 0)
    t = (
        torch.where(known, beta.abs() / torch.where(known, alpha.abs(), 1.0), 1.0)
        .clamp(0.04, 25)
        .sqrt()
    )
    rows = torch.cat([t[..., None] * right, -left.mT / t[..., None]], 2) * (s / 2).sqrt()[..., None]
    return rows.mT @ rows
