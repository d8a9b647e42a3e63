"""What is read inside a step: against the path itself, which Newton's method finds."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.integrate import quad

import flowsim as fs
from flowsim.flow.field import Field
from flowsim.flow.pieces.dense_output import PieceStep
from flowsim.flow.pieces.points import Evaluation, OnPiece, View, newton
from flowsim.flow.pieces.polytope import Corners
from flowsim.motion.clocks import ARCLENGTH

X, Y = fs.data.gaussian_separable(30, 6, seed=1)
PROBLEM = fs.Problem(fs.Linear(6), X, Y, fs.exponential)


def step(ds):
    """Along the second piece of a path in ℓ∞, whose face has a free weight."""
    field = Field(fs.Linf(), ARCLENGTH)
    state = fs.simulate(
        PROBLEM, fs.SteepestFlow(fs.Linf()), torch.zeros(1, 6).double(), until=fs.steps([6])
    ).final
    at = Evaluation(View(field, PROBLEM, torch.device("cpu")), state.w[0].numpy())
    here = OnPiece(at, Corners(at.view.ball, state.memory["face"][0].numpy()))
    return PieceStep(here, newton(here, at.w + ds * here.u), ds)


def on_path(taken, v):
    return newton(taken.start, taken.at(v))


def test_weights_are_those_of_the_path_to_the_error_that_is_known():
    taken = step(1e-2)
    there = on_path(taken, 0.5)
    lack = there.at.w - taken.at(0.5)
    np.testing.assert_allclose(taken.bend, lack, atol=0.1 * np.abs(lack).max() + 1e-14)
    np.testing.assert_allclose(taken.at(1.0), taken.end.at.w)
    assert step(2e-2).excess(1e-6, 1e-12) > 4 * taken.excess(1e-6, 1e-12) > 0


def test_energy_and_time_are_integrals():
    taken = step(1e-2)
    rise = taken.end.at.lam - taken.start.at.lam
    assert taken.dissipated == pytest.approx(rise, rel=1e-8)

    def rate(v):
        at = on_path(taken, v).at
        return np.exp(at.lam - taken.start.at.lam) / at.dual_norm * taken.ds

    spent = np.log(quad(rate, 0, 1)[0]) + taken.start.at.lam
    assert taken.time.log_elapsed == pytest.approx(spent, abs=1e-7)
    assert abs(taken.time.defect) < 1e-6


def test_a_segment_is_the_path_inside_the_step():
    state = fs.SteepestFlow(fs.Linf()).start(PROBLEM, torch.zeros(1, 6).double())
    taken = step(1e-2)
    view = taken.start.at.view
    w0, w1 = (view.tensor(point.at.w) for point in (taken.start, taken.end))
    lam0, lam1 = (view.tensor(point.at.lam) for point in (taken.start, taken.end))
    begun = replace(state, w=w0, readings=state.readings | {"lam": lam0})
    segment = taken.segment(begun, w1, state.readings | {"lam": lam1})
    w, readings = segment.at(torch.tensor([0.5]).double())
    there = on_path(taken, 0.5).at
    np.testing.assert_allclose(w[0], there.w, atol=1e-9)
    assert float(readings["lam"]) == pytest.approx(float(there.lam), abs=1e-7)
