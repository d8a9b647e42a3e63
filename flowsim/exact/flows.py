r"""Steepest flows that are known exactly, to hold integrated ones against: ``fs.closed_forms``.

Rays and polylines are whole trajectories: ``weights(s)`` at an arclength, ``log_time(s)`` when they
are there, and ``length(log_t)`` the inverse of that. Time is held as its natural logarithm, as
everywhere in flowsim.

    one_example            one example, linear model, any norm                      a ray
    radial                 any net, from a KKT direction where all margins agree    a ray
    round_quadratic        ½‖w − w*‖₂² in ℓ1, ℓ2, ℓ∞ and Schatten 1, 2 and ∞        a polyline
    polyhedral_quadratic   ½(w − w*)ᵀH(w − w*) in ℓ1 and ℓ∞                         a polyline
    forward_stagewise      ½‖Xw − y‖₂² in ℓ1                                        a polyline
    smooth_quadratic       ½(w − w*)ᵀH(w − w*) in quadratic norms                   w at times t
    difference_of_squares  ½‖X(u² − v²) − y‖₂² in ℓ2                                u, v at times t
    conserved              diagonal nets in ℓp                                      constants
"""

from flowsim.exact.in_time import (
    conserved,
    difference_of_squares,
    difference_of_squares_limit,
    smooth_quadratic,
)
from flowsim.exact.polylines import (
    Polyline,
    forward_stagewise,
    polyhedral_quadratic,
    round_quadratic,
)
from flowsim.exact.rays import Ray, log_growth, one_example
from flowsim.exact.rays import radial_ray as radial

__all__ = [
    "Polyline",
    "Ray",
    "conserved",
    "difference_of_squares",
    "difference_of_squares_limit",
    "forward_stagewise",
    "log_growth",
    "one_example",
    "polyhedral_quadratic",
    "radial",
    "round_quadratic",
    "smooth_quadratic",
]
