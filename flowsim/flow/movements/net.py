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
_Slopes = Float[Tensor, "1 N m"]
_PerRow = Float[Tensor, "m R"]

SWEEPS = 20  # the most programmes for a movement


@dataclass(frozen=True)
class _Task:
    """A movement to be found: from ``w``, where the net is ``start``, with a guess of it."""

    w: _Vector
    eps: float
    start: NetAt
    guess: Guess

    @property
    def z(self) -> _Pairs:
        return self.start.z[0]

    @property
    def multipliers(self) -> _Pairs:
        """Of the kinks before the movement."""
        return self.guess.dual_variables.view_as(self.z)


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
        top = self.top
        if top is not None and ended.lam < top.lam:  # the last guess went too far
            return _Sweeps(top.v, top.dual_variables, top)
        asked = (*self.asked[-3:], self.v)
        given = (*self.given[-3:], ended.v)
        v = _extrapolated(asked, given)
        return _Sweeps(v, ended.dual_variables, ended, asked, given)


class NetMover:
    """Movements of one two-layer net. Dual variables are the multipliers of all pairs (example,
    neuron).

    A kink that slides and begins to repel is released to a side: see `kinks.release_sides` for
    ``sides``."""

    trusted: ClassVar[float] = 1e-3

    def __init__(
        self,
        norm: Norm,
        problem: Problem,
        w: Float[Tensor, "1 P"],
        sides: tuple[int, ...] = (),
    ) -> None:
        self.norm = norm
        self.problem = problem
        self.sides = sides
        self.net = problem.two_layer(1)
        x = self.net.x[0]
        self._farthest = _farthest(norm, x, w.shape[1])
        self._signs = _signs(problem, w)
        # each row's example, the first example parallel to it, and the multiple that it is of that
        rows = torch.arange(len(self._signs), device=w.device)
        self._example = rows // (len(rows) // len(x))
        self._parallel = self.net.representative[0][self._example]
        self._multiple = self.net.coefficient[0][self._example, None]

    @property
    def unknowns(self) -> int:
        return self.net.x.shape[1] * self.net.width

    def aim(self, rtol: float, atol: float, w: _Vector, eps: float) -> float:
        """The gap is what Λ lacks of its gain, which tells at second order only."""
        return min(1e-5, 1e-3 * rtol)

    def move(self, w: _Vector, eps: float, guess: Guess | None, tol: float = 1e-9) -> Movement:
        task = self._task(w, eps, guess)
        sweeps = _Sweeps(task.guess.v, task.guess.dual_variables)
        best = None
        iterate = None
        newton = 0
        for _ in range(SWEEPS):
            multipliers = sweeps.multipliers.view_as(task.z)
            programme = self._programme(task, sweeps.v, multipliers)
            if programme is None:
                break
            aim = 1e-3 if best is None else max(0.1 * tol, 1e-3 * best.gap)
            found = self._solve(programme, aim, iterate)
            iterate = found.iterate
            newton = newton + found.newton
            ended = self._ended(task, programme, found)
            if best is None or ended.gap < best.gap:
                best = ended
            if best.gap <= tol:
                break
            sweeps = sweeps.followed(ended)
        if best is None:
            still = torch.zeros_like(w)
            return self._movement(task, task.start, still, task.multipliers)
        return replace(best, newton=newton)

    def _task(self, w: _Vector, eps: float, guess: Guess | None) -> _Task:
        """Without a guess, all kinks stay on their sides."""
        start = self.net.at(w[None])
        if guess is None:
            sides = (start.z[0] > 0).to(w)
            guess = Guess(torch.zeros_like(w), sides.flatten())
        return _Task(w, eps, start, guess)

    def _at(self, task: _Task, v: _Vector) -> NetAt:
        """The net at w + εv."""
        w = task.w + task.eps * v
        return self.net.at(w[None])

    # --- the programme of a sweep -----------------------------------------------------------------

    def _programme(self, task: _Task, v: _Vector, multipliers: _Pairs) -> Programme | None:
        """The model at the guess w + εv, in units of the gain that its gradient promises."""
        point = self._at(task, v)
        attracts = (point.jump[0] < 0) & self.net.distinct[0]
        near = task.z.abs() <= 1.001 * task.eps * self._farthest
        live = attracts & near
        sides = self._sides_off(task, point, multipliers)
        taken = torch.where(live, multipliers, sides)
        slopes = point.slopes(taken[None])
        h = point.gradient(slopes)[0]
        gain = task.eps * float(self.norm.dual(h))
        if not 0 < gain < math.inf:
            return None
        centre = self._blocks(v)
        return self._model(task, gain, centre, point, live, slopes)

    def _model(
        self,
        task: _Task,
        gain: float,
        centre: Float[Tensor, "m D"],
        point: NetAt,
        live: Bool[Tensor, "N m"],
        slopes: _Slopes,
    ) -> Programme:
        """With these hinges ``live``, and these slopes of all other pairs."""
        eps = task.eps
        scale, margins = touching(self.problem.loss, point.outputs, self.net.y)
        signs = scale[:, None] * self._signs
        slope, kinks, ends = self._rows(point, slopes, live, signs)
        products = self._products(point, slopes)
        programme = Programme(
            x=self.net.x[0],
            example_of=self._parallel,
            slope=slope * (eps / gain),
            ends=ends * (eps / gain),
            kinks=kinks * (eps / gain),
            live=live.mT,
            z=task.z.mT / eps,
            offset=margins / gain,
            temperature=1 / gain,
            curb=(eps * eps / gain) * _curb(products, centre),
            centre=centre,
        )
        # at the guess the model's margins are those of the net
        z = torch.where(live, point.z[0], 0.0)
        hinges = z.clamp_min(0).mT / eps
        offset = programme.offset - programme.rows(centre)
        offset = offset + programme.hinge_loss(hinges)
        return replace(programme, offset=offset - offset.amin())

    def _rows(
        self,
        point: NetAt,
        slopes: _Slopes,
        live: Bool[Tensor, "N m"],
        signs: Float[Tensor, "R C"],
    ) -> tuple[_PerRow, _PerRow, Float[Tensor, "m C R"]]:
        """How margins depend on inner weights off their hinges, on hinges, and on outer weights,
        with ``signs`` how they depend on outputs.

        Activations are those of the first parallel input: for x_r = c·x the hinge of ⟨x_r, w⟩ is
        |c|(s − z) if c < 0."""
        leak = self.net.leak
        multiple = self._multiple
        example = self._example
        pull = signs @ point.last[0]  # (R, m)
        hinged = live[self._parallel]
        beside = leak * multiple + (1 - leak) * multiple.clamp_max(0)
        beyond = pull * multiple * slopes[0][example]
        slope = torch.where(hinged, pull * beside, beyond)
        taken = -(1 - leak) * pull * multiple.abs()
        kinks = torch.where(hinged, taken, 0.0)
        hidden = point.hidden[0][example]
        ends = torch.einsum("rc,rm->mcr", signs, hidden)
        return slope.mT, kinks.mT, ends

    def _blocks(self, v: _Vector) -> Float[Tensor, "m D"]:
        """The inner and the outer weights of each neuron."""
        m = self.net.width
        d = self.net.x.shape[2]
        inner = v[: m * d].view(m, d)
        outer = v[m * d :].view(-1, m)
        return torch.cat([inner, outer.mT], 1)

    def _products(self, point: NetAt, slopes: _Slopes) -> Float[Tensor, "m C d"]:
        """∂²Λ/∂a_cj∂w_j of every neuron, at fixed softmax weights."""
        x = self.net.x[0]
        cotangent = point.cotangent[0]
        return torch.einsum("nc,nm,nd->mcd", cotangent, slopes[0], x)

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
        point = self._at(task, v)
        largest = programme.largest_force(found.p)
        fraction = found.f / largest.clamp_min(1e-300)
        fraction = torch.where(largest > 0, fraction, 0.0)
        fraction = fraction.clamp(0, 1).mT  # (N, m)
        # of force and distance one is rounding
        rounding = fraction * (1 - fraction) * task.eps * self._farthest
        near = point.z[0].abs() <= rounding
        held = near & programme.live.mT
        known = torch.where(held, fraction, task.multipliers)
        sides = self._sides_off(task, point, known)
        attracts = point.jump[0] < 0
        multipliers = torch.where(held & attracts, fraction, sides)
        return self._movement(task, point, v, multipliers)

    def _movement(self, task: _Task, point: NetAt, v: _Vector, multipliers: _Pairs) -> Movement:
        """The movement along v that ends at this point, and what its gradient still promises."""
        slopes = point.slopes(multipliers[None])
        h = point.gradient(slopes)[0]
        dual_norm = self.norm.dual(h)
        gap = 0.0
        if float(dual_norm) != 0:
            gap = float((dual_norm - h @ v) / dual_norm)
        released = _released(point, task.multipliers)
        return Movement(
            v=v,
            dual_variables=multipliers.flatten(),
            releases=task.guess.releases + float(released.sum()),
            w=task.w + task.eps * v,
            gap=gap if math.isfinite(gap) else math.inf,
            lam=point.lam[0],
            ascent=h,
        )

    def _sides_off(self, task: _Task, point: NetAt, multipliers: _Pairs) -> _Pairs:
        """The sides of pairs that nothing holds: the one that they are on, or the one to which they
        are released."""
        released = _released(point, multipliers)
        sides = release_sides(
            multipliers=multipliers.view(1, -1),
            released=released.view(1, -1),
            before=multipliers.new_tensor([task.guess.releases]),
            sides=self.sides,
        )
        present = (point.z[0] > 0).to(multipliers)
        return torch.where(released, sides.view_as(present), present)


def _released(point: NetAt, multipliers: _Pairs) -> Bool[Tensor, "N m"]:
    """Which kinks slide with these multipliers, but repel at this point."""
    slides = (multipliers > 0) & (multipliers < 1)
    repels = point.jump[0] >= 0
    return slides & repels


def _farthest(norm: Norm, x: Float[Tensor, "N d"], size: int) -> Float[Tensor, "N 1"]:
    """The most that a pre-activation can change along a unit direction: the dual norm of its
    normal."""
    zeros = size - x.shape[1]
    farthest = []
    for part in x.split(16):
        normals = functional.pad(part, (0, zeros))
        farthest.append(norm.dual(normals))
    return torch.cat(farthest)[:, None]


def _signs(problem: Problem, w: Float[Tensor, "1 P"]) -> Float[Tensor, "R C"]:
    """How each number that the loss sees depends on the outputs of its example."""
    reading = linear_reading(problem.loss)
    outputs = problem.outputs(w)
    columns = []
    for unit in torch.eye(outputs.shape[-1]):
        units = unit.to(outputs).expand_as(outputs)
        numbers = reading.read(units, problem.y)[0]
        columns.append(numbers[0])
    return torch.stack(columns, -1)


def _extrapolated(asked: tuple[Tensor, ...], given: tuple[Tensor, ...]) -> _Vector:
    """The next guess after sweeps that made ``given`` from ``asked`` (Anderson 1965)."""
    if len(asked) < 2:
        return given[-1]
    ins = torch.stack(asked, -1)
    outs = torch.stack(given, -1)
    change = outs - ins
    turn = change.diff(dim=-1)
    last = change[:, -1:]
    weights = torch.linalg.lstsq(turn, last, driver="gelsd").solution
    correction = outs.diff(dim=-1) @ weights[:, 0]
    return outs[:, -1] - correction


def _curb(b: Float[Tensor, "m C d"], v: Float[Tensor, "m D"]) -> Float[Tensor, "m D D"]:
    """A positive semidefinite C with −½ΔᵀCΔ below the products aᵀbw of the change Δ = (w, a) of
    every neuron.

    Each singular value σ of b has a product of two numbers, αβ = ((tα + β/t)² − (tα − β/t)²)/4 for
    every t. The second square makes C; t is such that it vanishes along v, where the step is going.
    """
    left, s, right = torch.linalg.svd(b, full_matrices=False)
    d = b.shape[2]
    alpha = right @ v[:, :d, None]  # (m, r, 1)
    beta = left.mT @ v[:, d:, None]
    known = (alpha != 0) & (beta != 0)
    ratio = beta.abs() / torch.where(known, alpha.abs(), 1.0)
    square = torch.where(known, ratio, 1.0)
    t = square.clamp(0.04, 25).sqrt()
    second = torch.cat([t * right, -left.mT / t], 2)
    rows = second * (s / 2).sqrt()[..., None]
    return rows.mT @ rows
