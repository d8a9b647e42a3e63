"""Segment: what is read inside a step, and where a reading is reached."""

import math
from dataclasses import replace

import pytest
import torch

from flowsim.motion.clocks import ARCLENGTH, LAM, RELATIVE, STEPS, TIME, Target
from flowsim.motion.segment import Segment
from flowsim.motion.state import READINGS

EVERY_CLOCK = (LAM, TIME, ARCLENGTH, RELATIVE, STEPS)


def row(*values):
    return torch.tensor(values, dtype=torch.float64)


def segment(log_time0=0.5, rates=(1.0, 4.0), B=3):
    """A curved step of several trajectories with clocks that all move on."""
    generator = torch.Generator().manual_seed(1)
    w0, w1, d0, d1 = torch.randn(4, B, 5, generator=generator, dtype=torch.float64)
    lam0 = row(*range(B)) * 10
    start = {
        "steps": row(*[7] * B),
        "lam": lam0,
        "log_time": row(*[log_time0] * B),
        "arclength": row(*[2] * B),
    }
    start["relative"] = row(*[0.25] * B)
    start["dissipated"] = row(*[2.0] * B)
    end = {"steps": start["steps"] + 1, "lam": lam0 + 2, "log_time": row(*[6.0] * B)}
    end |= {"arclength": start["arclength"] + 0.7, "relative": start["relative"] + 0.01}
    end["dissipated"] = start["dissipated"] + 0.4
    slopes = {"lam_slope0": row(*[1.0] * B), "lam_slope1": row(*[3.5] * B)}
    times = {"time_rate0": row(*[rates[0]] * B), "time_rate1": row(*[rates[1]] * B)}
    return Segment(w0, w1, d0, d1, start, end, **slopes, **times)


@pytest.mark.parametrize("log_time0", [0.5, -math.inf])
@pytest.mark.parametrize(("u", "end"), [(0.0, 0), (1.0, 1)])
def test_dense_output_is_exact_at_both_ends(u, end, log_time0):
    s = segment(log_time0)
    w, readings = s.at(row(u, u, u))
    assert torch.equal(w, (s.w0, s.w1)[end])
    expected = (s.readings0, s.readings1)[end]
    assert all(torch.equal(readings[name], expected[name]) for name in READINGS)


def test_dense_output_has_the_slopes_of_both_ends():
    s, tiny = segment(), 1e-6
    at = lambda u: s.at(row(u, u, u))[0]
    assert torch.allclose((at(tiny) - s.w0) / tiny, s.slope0, atol=1e-4)
    assert torch.allclose((s.w1 - at(1 - tiny)) / tiny, s.slope1, atol=1e-4)


def test_dense_output_of_a_cubic_path_is_the_path():
    c = torch.randn(4, 2, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    path = lambda u: c[0] + c[1] * u + c[2] * u**2 + c[3] * u**3
    slope = lambda u: c[1] + 2 * c[2] * u + 3 * c[3] * u**2
    s = replace(segment(B=2), w0=path(0), w1=path(1), slope0=slope(0), slope1=slope(1))
    for u in (0.1, 0.5, 0.77):
        assert torch.allclose(s.at(row(u, u))[0], path(u), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("log_time0", [0.5, -math.inf])
@pytest.mark.parametrize("clock", EVERY_CLOCK, ids=lambda c: c.name)
def test_readings_increase_along_the_step(clock, log_time0):
    s = segment(log_time0)
    shown = torch.stack(
        [s.reading(clock.reading, row(u, u, u)) for u in torch.linspace(0, 1, 51).tolist()]
    )
    assert (shown[1:] > shown[:-1]).all()


@pytest.mark.parametrize("log_time0", [0.5, -math.inf])
@pytest.mark.parametrize("clock", EVERY_CLOCK, ids=lambda c: c.name)
def test_locate_inverts_reading(clock, log_time0):
    s = segment(log_time0)
    for u in (row(1e-3, 0.2, 0.5), row(0.7, 0.9, 0.999)):
        found = s.locate(Target(clock, s.reading(clock.reading, u)))
        assert torch.allclose(found, u, rtol=0, atol=1e-11)


@pytest.mark.parametrize("clock", EVERY_CLOCK, ids=lambda c: c.name)
def test_locate_finds_both_ends(clock):
    s, name = segment(), clock.reading
    assert (s.locate(Target(clock, s.readings0[name])) == 0).all()
    assert (s.locate(Target(clock, s.readings0[name] - 1)) == 0).all()
    assert torch.allclose(
        s.locate(Target(clock, s.readings1[name])), row(1, 1, 1), rtol=0, atol=1e-12
    )


def test_locate_treats_trajectories_apart():
    s = segment()
    u = row(0.0, 0.25, 1.0)
    assert torch.allclose(s.locate(Target(LAM, s.reading("lam", u))), u, rtol=0, atol=1e-11)


@pytest.mark.parametrize("start", [0.0, 2.5])
@pytest.mark.parametrize("rates", [(1.0, 4.0), (3.0, -2.0), (0.5, 0.5), (800.0, 812.0)])
def test_time_inside_a_step_is_exact_where_its_log_rate_is_linear(rates, start):
    """t(u) = t0 + ∫ e^{a + (b − a)v} dv."""
    a, b = rates
    shift = max(rates)  # times are compared relative to e^shift

    def scaled(u):  # ∫₀ᵘ e^{rate − shift}
        return math.exp(a - shift) * (math.expm1((b - a) * u) / (b - a) if a != b else u)

    log_time = lambda u: shift + math.log(start + scaled(u)) if start + scaled(u) > 0 else -math.inf
    s = segment(rates=rates, B=1)
    s.readings0["log_time"], s.readings1["log_time"] = row(log_time(0.0)), row(log_time(1.0))
    for u in (1e-3, 0.3, 0.5, 0.99):
        assert float(s.reading("log_time", row(u))) == pytest.approx(log_time(u), abs=1e-8)


# Multipliers of kinks inside a step


MULTIPLIERS = {
    "slides": (0.2, 0.6),
    "keeps its multiplier": (0.3, 0.3),
    "stays on the negative side": (0.0, 0.0),
    "stays on the positive side": (1.0, 1.0),
    "begins to slide": (0.0, 0.5),
    "ceases to slide": (0.7, 1.0),
    "crosses": (0.0, 1.0),
}


def kinked(B=3):
    start, end = torch.tensor(list(MULTIPLIERS.values()), dtype=torch.float64).T
    return replace(segment(B=B), multipliers0=start.repeat(B, 1), multipliers1=end.repeat(B, 1))


def test_multipliers_are_exact_at_both_ends():
    s = kinked()
    assert torch.equal(s.multipliers(row(0, 0, 0)), s.multipliers0)
    assert torch.equal(s.multipliers(row(1, 1, 1)), s.multipliers1)


def test_multipliers_inside_are_linear_and_nan_where_a_pair_crosses():
    nan = torch.nan
    expected = [
        row(0.3, 0.3, 0.0, 1.0, 0.125, 0.775, nan),
        row(0.5, 0.3, 0.0, 1.0, 0.375, 0.925, nan),
        kinked().multipliers1[0],
    ]
    found = kinked().multipliers(row(0.25, 0.75, 1.0))
    assert torch.allclose(found, torch.stack(expected), rtol=0, atol=1e-15, equal_nan=True)
    assert torch.equal(
        found[:2, 1:4], torch.stack(expected)[:2, 1:4]
    )  # what is constant, to the last bit


def test_a_step_without_multipliers_has_none_inside():
    assert segment().multipliers(row(0.5, 0.5, 0.5)) is None
