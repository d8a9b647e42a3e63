"""Numbers of a run, where some are not known."""

import numpy as np

from flowsim.diagnostics.series import falls, last, peak, positive, risen

SOFT = np.array([[np.nan], [1.0], [2.0], [1.5]])


def test_falls_are_relative_and_unknown_next_to_what_is_unknown():
    assert falls(SOFT)[1:, 0].tolist() == [0.0, 0.25]
    assert np.isnan(falls(SOFT)[0, 0])


def test_what_is_not_known_is_passed_over():
    values = np.array([[1.0, np.nan], [4.0, np.nan], [3.0, np.nan], [np.nan, np.nan]])
    for found, known in ((peak(values), 4.0), (last(values), 3.0), (risen(values), 2.0)):
        assert found[0] == known
        assert np.isnan(found[1])
    assert np.isnan(peak(values[:0])).all()


def test_what_is_not_positive_is_unknown():
    assert positive(np.array([2.0, 0.5]))[1] == 0.5
    assert np.isnan(positive(np.array([0.0, -1.0, np.nan]))).all()
