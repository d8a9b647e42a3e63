"""What the theory promises of every steepest flow, whatever method follows it (theorems.py)."""

import functools

import numpy as np
import pytest

import flowsim as fs
from flowsim import identities
from tests.laws.cases import METHODS

every = pytest.mark.parametrize("case", METHODS, ids=lambda case: case.name)


@functools.cache
def observed(case):
    observe = fs.diagnostics.standard(case.problem, norms=[case.rule.norm])
    return fs.simulate(
        case.problem, case.rule, case.w0, until=case.end, observe=observe, strict=True
    )


@pytest.mark.parametrize(
    "law",
    [
        identities.chain_rule,
        identities.least_dual,
        identities.soft_hard,
        identities.euler,
        identities.weight,
        identities.turning,
    ],
    ids=lambda law: law.__name__,
)
@every
def test_identities_hold_where_it_ends(case, law):
    check = law(case.problem, observed(case).final, case.rule.norm)
    loose = 0.0 if case.selects else case.rule.rtol
    assert not (np.asarray(check.residual) > np.asarray(check.bound) + loose).any()


@every
def test_the_level_rises_by_what_is_dissipated(case):
    assert identities.dissipation(observed(case), tol=10 * case.rule.rtol).holds


@every
def test_the_soft_margin_never_falls(case):
    assert identities.monotone(observed(case), case.rule.norm).holds
