"""Minimising movements of two-layer nets with kinks, in norms whose steepest direction is not
linear.

The movement of arclength ε from w ends at w + εv, where v is steepest for an element of Clarke's
gradient of Λ there. It is found by a sequence of convex programmes (`convex.programme`), each a
model of the net at the last guess: margins linearised but for the kinks that attract, whose hinges
stay as they are, so that any number of kinks and coordinates may come to slide, or stop, in one
movement. What is not convex is

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
from torch.nn import functional

from flowsim.convex.hinge_newton import HingedIterate
from flowsim.convex.hinged import Optimum, solve_hinged
from flowsim.convex.programme import Programme
from flowsim.flow.movements.movement import Guess, Movement, linear_reading, touching
from flowsim.norms.norm import Norm
from flowsim.numerics.shapes import Row
from flowsim.problems.kinks import NetAt, release_sides
from flowsim.problems.problem import Problem

_Vector = Row  # in the place of the weights
_Pairs = Float[Tensor, "N m"]  # one number for each example and neuron

SWEEPS = 20  # the most programmes for a movement


@dataclass(frozen=True)
class _Task:
    """A movement to be found: from ``w`` with pre-activations ``z``, and what is known of the
    kinks."""

    w: _Vector
    eps: float
    z: _Pairs
    multipliers: _Pairs
    releases: float


@dataclass(frozen=True)
class _Sweeps:
    """The next guess, the best movement of the sweeps before it, and what the last of them made of
    their guesses."""

    v: _Vector
    multipliers: Float[Tensor, " N*m"]
    top: Movement | None = None
    asked: tuple[Tensor, ...] = ()
    given: tuple[Tensor, ...] = ()

    def followed(self, ended: Movement) -> "_Sweeps":
        """After one more sweep."""
        if self.top is not None and ended.lam < self.top.lam:  # the last guess went too far
            return _Sweeps(self.top.v, self.top.dual_variables, self.top)
        asked = (*self.asked[-3:], self.v)
        given = (*self.given[-3:], ended.v)
        return _Sweeps(_extrapolated(asked, given), ended.dual_variables, ended, asked, given)


class NetMover:
    """Movements of one two-layer net. Dual variables are the multipliers of all pairs (example,
    neuron).

    A kink that slides and begins to repel is released to a side: see `kinks.release_sides` for
    ``sides``."""

    trusted: ClassVar[float] = 1e-3

    def __init__(
        self, norm: Norm, problem: Problem, w: Float[Tensor, "1 P"], sides: tuple[int, ...] = ()
    ) -> None:
        self.norm, self.problem, self.sides = norm, problem, sides
        self.net = problem.two_layer(1)
        self._farthest = _farthest(norm, self.net.x[0], w.shape[1])[:, None]
        self._signs = _signs(problem, w)
        # each row's example, the first example parallel to it, and the multiple that it is of that
        rows = len(self._signs)
        examples = self.net.x.shape[1]
        self._example = torch.arange(rows, device=w.device) // (rows // examples)
        self._parallel = self.net.representative[0][self._example]
        self._multiple = self.net.coefficient[0][self._example, None]

    @property
    def unknowns(self) -> int:
        return self.net.x.shape[1] * self.net.width

    def aim(self, rtol: float, atol: float, w: _Vector, eps: float) -> float:
        """The gap is what Λ lacks of its gain, which tells at second order only."""
        return min(1e-5, 1e-3 * rtol)

    def move(self, w: _Vector, eps: float, guess: Guess | None, tol: float = 1e-9) -> Movement:
        start = self.net.at(w[None])
        z = start.z[0]
        begun = guess or Guess(torch.zeros_like(w), (z > 0).to(w).flatten())
        task = _Task(w, eps, z, begun.dual_variables.view_as(z), begun.releases)
        sweeps = _Sweeps(begun.v, begun.dual_variables)
        best = None
        iterate, newton = None, 0
        for _ in range(SWEEPS):
            programme = self._programme(task, sweeps.v, sweeps.multipliers.view_as(z))
            if programme is None:
                break
            aim = 1e-3 if best is None else max(0.1 * tol, 1e-3 * best.gap)
            found = self._solve(programme, aim, iterate)
            iterate = found.iterate
            newton = newton + found.newton
            ended = self._ended(task, programme, found)
            best = ended if best is None or ended.gap < best.gap else best
            if best.gap <= tol:
                break
            sweeps = sweeps.followed(ended)
        if best is None:
            return self._movement(task, start, torch.zeros_like(w), sweeps.multipliers.view_as(z))
        return replace(best, newton=newton)

    # --- the programme of a sweep -----------------------------------------------------------------

    def _programme(self, task: _Task, v: _Vector, multipliers: _Pairs) -> Programme | None:
        """The model at the guess w + εv, in units of the gain that its gradient promises."""
        point = self.net.at((task.w + task.eps * v)[None])
        attracts = (point.jump[0] < 0) & self.net.distinct[0]
        live = attracts & (task.z.abs() <= 1.001 * task.eps * self._farthest)
        sides = self._sides_off(task, point, multipliers)
        slopes = point.slopes(torch.where(live, multipliers, sides)[None])
        gain = task.eps * float(self.norm.dual(point.gradient(slopes)[0]))
        if not 0 < gain < math.inf:
            return None
        return self._model(task, gain, self._blocks(v), point, live, slopes)

    def _model(
        self,
        task: _Task,
        gain: float,
        centre: Float[Tensor, "m D"],
        point: NetAt,
        live: Bool[Tensor, "N m"],
        slopes: Float[Tensor, "1 N m"],
    ) -> Programme:
        """With these hinges ``live``, and these slopes of all other pairs."""
        eps = task.eps
        loss = self.problem.loss
        scale, margins = touching(loss, point.outputs, self.net.y)
        rows = self._rows(point, slopes, live, scale[:, None] * self._signs)
        slope, kinks, ends = (row * (eps / gain) for row in rows)
        programme = Programme(
            x=self.net.x[0],
            example_of=self._parallel,
            slope=slope,
            ends=ends,
            kinks=kinks,
            live=live.mT,
            z=task.z.mT / eps,
            offset=margins / gain,
            temperature=1 / gain,
            curb=(eps * eps / gain) * _curb(self._products(point, slopes), centre),
            centre=centre,
        )
        # at the guess the model's margins are those of the net
        hinges = torch.where(live, point.z[0], 0.0).clamp_min(0).mT / eps
        offset = programme.offset - programme.rows(centre) + programme.hinge_loss(hinges)
        return replace(programme, offset=offset - offset.amin())

    def _rows(
        self,
        point: NetAt,
        slopes: Float[Tensor, "1 N m"],
        live: Bool[Tensor, "N m"],
        signs: Float[Tensor, "R C"],
    ) -> tuple[Float[Tensor, "m R"], Float[Tensor, "m R"], Float[Tensor, "m C R"]]:
        """How margins depend on inner weights off their hinges, on hinges, and on outer weights,
        with ``signs`` how they depend on outputs.

        Activations are those of the first parallel input: for x_r = c·x the hinge of ⟨x_r, w⟩ is
        |c|(s − z) if c < 0."""
        leak = self.net.leak
        multiple = self._multiple
        pull = signs @ point.last[0]  # (R, m)
        hinged = live[self._parallel]
        beside = leak * multiple + (1 - leak) * multiple.clamp_max(0)
        beyond = pull * multiple * slopes[0][self._example]
        slope = torch.where(hinged, pull * beside, beyond)
        kinks = torch.where(hinged, -(1 - leak) * pull * multiple.abs(), 0.0)
        ends = torch.einsum("rc,rm->mcr", signs, point.hidden[0][self._example])
        return slope.mT, kinks.mT, ends

    def _blocks(self, v: _Vector) -> Float[Tensor, "m D"]:
        """The inner and the outer weights of each neuron."""
        m = self.net.width
        d = self.net.x.shape[2]
        inner, outer = v.split([m * d, len(v) - m * d])
        return torch.cat([inner.view(m, d), outer.view(-1, m).mT], 1)

    def _products(self, point: NetAt, slopes: Float[Tensor, "1 N m"]) -> Float[Tensor, "m C d"]:
        """∂²Λ/∂a_cj∂w_j of every neuron, at fixed softmax weights."""
        return torch.einsum("nc,nm,nd->mcd", point.cotangent[0], slopes[0], self.net.x[0])

    def _solve(self, programme: Programme, tol: float, start: HingedIterate | None) -> Optimum:
        """The optimum of a programme, begun anew where an old iterate leads nowhere."""
        found = solve_hinged(programme, self.norm, tol, start)
        if found.gap > tol and start is not None:
            return self._solve(programme, tol, None)
        return found

    # --- the end of a sweep -----------------------------------------------------------------------

    def _ended(self, task: _Task, programme: Programme, found: Optimum) -> Movement:
        """The movement that a programme has found, with the gradient of the net at its end."""
        v = programme.flat(found.v)
        point = self.net.at((task.w + task.eps * v)[None])
        largest = programme.largest_force(found.p)
        fraction = torch.where(largest > 0, found.f / largest.clamp_min(1e-300), 0.0)
        fraction = fraction.clamp(0, 1).mT  # (N, m)
        # of force and distance one is rounding
        near = point.z[0].abs() <= fraction * (1 - fraction) * task.eps * self._farthest
        held = near & programme.live.mT
        sides = self._sides_off(task, point, torch.where(held, fraction, task.multipliers))
        multipliers = torch.where(held & (point.jump[0] < 0), fraction, sides)
        return self._movement(task, point, v, multipliers)

    def _movement(self, task: _Task, point: NetAt, v: _Vector, multipliers: _Pairs) -> Movement:
        """The movement along v that ends at this point, and what its gradient still promises."""
        h = point.gradient(point.slopes(multipliers[None]))[0]
        dual_norm = self.norm.dual(h)
        gap = 0.0 if float(dual_norm) == 0 else float((dual_norm - h @ v) / dual_norm)
        gap = gap if math.isfinite(gap) else math.inf
        releases = task.releases + float(_released(point, task.multipliers).sum())
        end = task.w + task.eps * v
        return Movement(
            v, multipliers.flatten(), releases, w=end, gap=gap, lam=point.lam[0], ascent=h
        )

    def _sides_off(self, task: _Task, point: NetAt, multipliers: _Pairs) -> _Pairs:
        """The sides of pairs that nothing holds: the one that they are on, or the one to which they
        are released."""
        released = _released(point, multipliers)
        before = multipliers.new_tensor([task.releases])
        flat = multipliers.view(1, -1), released.view(1, -1)
        sides = release_sides(*flat, before, self.sides).view_as(multipliers)
        return torch.where(released, sides, (point.z[0] > 0).to(multipliers))


def _released(point: NetAt, multipliers: _Pairs) -> Bool[Tensor, "N m"]:
    """Which kinks slide with these multipliers, but repel at this point."""
    return (multipliers > 0) & (multipliers < 1) & (point.jump[0] >= 0)


def _farthest(norm: Norm, x: Float[Tensor, "N d"], size: int) -> Float[Tensor, " N"]:
    """The most that a pre-activation can change along a unit direction: the dual norm of its
    normal."""
    padded = [functional.pad(part, (0, size - x.shape[1])) for part in x.split(16)]
    return torch.cat([norm.dual(part) for part in padded])


def _signs(problem: Problem, w: Float[Tensor, "1 P"]) -> Float[Tensor, "R C"]:
    """How each number that the loss sees depends on the outputs of its example."""
    reading = linear_reading(problem.loss)
    outputs = problem.outputs(w)
    units = torch.eye(outputs.shape[-1]).to(outputs)
    columns = [reading.read(unit.expand_as(outputs), problem.y)[0][0] for unit in units]
    return torch.stack(columns, -1)


def _extrapolated(asked: tuple[Tensor, ...], given: tuple[Tensor, ...]) -> _Vector:
    """The next guess after sweeps that made ``given`` from ``asked`` (Anderson 1965)."""
    if len(asked) < 2:
        return given[-1]
    ins = torch.stack(asked, -1)
    outs = torch.stack(given, -1)
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
    d = b.shape[2]
    alpha = (right @ v[:, :d, None])[..., 0]  # (m, r)
    beta = (left.mT @ v[:, d:, None])[..., 0]
    known = (alpha != 0) & (beta != 0)
    ratio = beta.abs() / torch.where(known, alpha.abs(), 1.0)
    t = torch.where(known, ratio, 1.0).clamp(0.04, 25).sqrt()[..., None]
    rows = torch.cat([t * right, -left.mT / t], 2) * (s / 2).sqrt()[..., None]
    return rows.mT @ rows
