"""The names of ``fs.closed_forms``."""

import numpy as np

import flowsim as fs
from flowsim.exact import flows, in_time, polylines, rays


def test_every_closed_form_has_its_name():
    assert fs.closed_forms is flows
    homes = (rays, polylines, in_time)
    for name in set(flows.__all__) - {"radial"}:
        assert any(getattr(home, name, None) is getattr(flows, name) for home in homes)
    assert flows.radial is rays.radial_ray


def test_a_ray_and_a_polyline_hold_the_same_verbs():
    ray = flows.one_example([1.0, -2.0], [0.0, 0.0], fs.L2())
    line = flows.round_quadratic([3.0, 4.0], [0.0, 0.0], fs.L2())
    np.testing.assert_allclose(ray.weights(5.0), [5**0.5, -2 * 5**0.5])
    np.testing.assert_allclose(line.weights(5.0), [3.0, 4.0])
    for path in (ray, line):
        assert float(path.length(path.log_time(2.0))) - 2 < 1e-12
