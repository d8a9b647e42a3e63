"""Quadratics over products of simplices: against all sets of positive unknowns in turn."""

from itertools import chain, combinations, product

import numpy as np
import pytest

from flowsim.convex.simplices import positive_at_minimum

GROUP = np.array([0, 0, 0, 1, 1, 2])


def subsets(members):
    return chain.from_iterable(combinations(members, k) for k in range(1, len(members) + 1))


def minimum_on(chosen, H, c):
    """The stationary point with Σ x = 1 in each group, over these unknowns."""
    A = np.eye(3)[GROUP[chosen]].T
    K = np.block([[H[np.ix_(chosen, chosen)], A.T], [A, np.zeros((3, 3))]])
    x = np.zeros(len(c))
    x[chosen] = np.linalg.solve(K, np.concatenate([-c[chosen], np.ones(3)]))[: len(chosen)]
    return x


def by_enumeration(H, c):
    best = np.inf, None
    groups = [np.flatnonzero(g == GROUP) for g in range(3)]
    for parts in product(*(list(subsets(group)) for group in groups)):
        x = minimum_on(np.concatenate(parts).astype(int), H, c)
        if (x >= 0).all():
            best = min(best, (0.5 * x @ H @ x + c @ x, tuple(x)))
    return np.array(best[1]) > 0


@pytest.mark.parametrize("seed", range(12))
def test_the_positive_unknowns_are_those_of_the_best_set(seed):
    rng = np.random.default_rng(seed)
    root, c = rng.normal(size=(7, 6)), 2 * rng.normal(size=6)
    H = root.T @ root
    for first in ([0, 3, 5], [2, 4, 5]):
        used = np.zeros(6, dtype=bool)
        used[first] = True
        found = positive_at_minimum(H, c, GROUP, used.astype(float), used)
        np.testing.assert_array_equal(found, by_enumeration(H, c))


def test_nothing_to_choose():
    none = np.zeros(0)
    used = positive_at_minimum(np.zeros((0, 0)), none, none.astype(int), none, none.astype(bool))
    assert len(used) == 0
