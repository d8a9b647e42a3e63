"""Every public figure, listed once; `__init__.py` reads it and imports on first use."""

from flowsim.plots.axes import bands as bands
from flowsim.plots.axes import style as style
from flowsim.plots.beside import apart as apart
from flowsim.plots.beside import beside_flow as compare
from flowsim.plots.beside import comparison as comparison
from flowsim.plots.beside import order as order
from flowsim.plots.figures import alignment_curves as alignment
from flowsim.plots.figures import certificate as certificate
from flowsim.plots.figures import energy_curves as energy
from flowsim.plots.figures import gap as gap
from flowsim.plots.figures import loss as loss
from flowsim.plots.figures import margins as margins
from flowsim.plots.figures import norms as norms
from flowsim.plots.figures import overview as overview
from flowsim.plots.figures import save as save
from flowsim.plots.figures import trust as trust
from flowsim.plots.portraits import kkt_residuals as kkt
from flowsim.plots.portraits import multiplier_paths as multipliers
from flowsim.plots.portraits import neurons as neurons
from flowsim.plots.portraits import residuals as residuals
from flowsim.run.summary import crossing as crossing
from flowsim.run.summary import position as position
from flowsim.run.summary import separation as separation
