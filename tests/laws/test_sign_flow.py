"""The sign and coordinate flows of the wide net: refinement within a branch, energy, and laws to Λ
= 10⁴. Minutes."""

import numpy as np
import pytest

import flowsim as fs
from flowsim.diagnostics.margins import soft_margin
from flowsim.diagnostics.stationarity import alignment

pytestmark = pytest.mark.slow

BEGUN = 2.0  # early on, refinements may take other branches of the releases
PLACES = (20.0, 227.0)  # mean losses of about 1e-10 and 1e-100


def followed(norm, problem, start, rtol, saves):
    observe = {"soft": soft_margin(norm), "alignment": alignment(norm)}
    return fs.simulate(
        problem,
        fs.SteepestFlow(norm, rtol=rtol),
        start.w,
        until=fs.lam(saves),
        observe=observe,
        strict=True,
    )


def spent(run):
    rise, dissipated = (
        float(run.final.readings[name]) - run[name][0, 0] for name in ("lam", "dissipated")
    )
    return dissipated / rise - 1


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_refinements_of_the_sign_flow_agree_within_a_branch(seed):
    norm, (problem, w0) = fs.Linf(), fs.data.peers_net(seed=seed)
    start = fs.simulate(
        problem, fs.SteepestFlow(norm, rtol=1e-2), w0, until=fs.lam([BEGUN]), strict=True
    ).final
    rough, fine = (followed(norm, problem, start, rtol, PLACES) for rtol in (1e-2, 3e-3))
    one_branch = (
        float(rough.final.tallies["releases"]) == float(fine.final.tallies["releases"]) == 0
    )
    early, late = np.abs(rough["soft"] / fine["soft"] - 1)[1:, 0]
    assert early < 1e-3
    assert late < (3e-3 if one_branch else 1e-2)


def test_the_sign_flow_keeps_its_laws_to_the_end():
    norm, (problem, w0) = fs.Linf(), fs.data.peers_net()
    run = followed(
        norm,
        problem,
        fs.simulate(problem, fs.SteepestFlow(norm), w0, until=fs.lam([-3.9])).final,
        1e-3,
        [*np.geomspace(3, 1e4, 12)],
    )
    assert abs(spent(run)) < 1e-4
    assert (np.diff(run["soft"][1:, 0]) > 0).all()
    assert (np.diff(1 - run["alignment"][1:, 0]) < 0).all()
    assert 1 - run["alignment"][-1, 0] < 0.04


def test_the_coordinate_flow_balances_energy_to_the_end():
    norm, (problem, w0) = fs.L1(), fs.data.peers_net()
    start = fs.simulate(
        problem, fs.SteepestFlow(norm, rtol=1e-2), w0, until=fs.lam([BEGUN]), strict=True
    ).final
    runs = [followed(norm, problem, start, rtol, [*PLACES, 1e4]) for rtol in (1e-2, 3e-3)]
    for run in runs:
        assert abs(spent(run)) < 1e-3
        assert (np.diff(run["soft"][1:, 0]) > 0).all()
    apart = np.abs(runs[0]["soft"] / runs[1]["soft"] - 1)[1:, 0]
    assert apart[0] < 2e-3
    assert apart[1] < 2e-2
