"""Figures for papers: functions of trajectories that draw on an Axes and return it.

``runs`` is a Trajectory or a mapping from labels to trajectories. A curve is the median over seeds,
its band the 10th to 90th percentile. Colours and dashes follow the order of the mapping, so that
they agree between figures. Pictures of a single run are in `portraits`, those of discrete runs
beside a flow in `beside`. Nothing here sets global state or shows a window; `save` writes vector
and pixel files and the data of the figure."""

from flowsim.plots.axes import bands, style
from flowsim.plots.beside import apart, comparison, order
from flowsim.plots.beside import beside_flow as compare
from flowsim.plots.figures import alignment_curves as alignment
from flowsim.plots.figures import (
    certificate,
    gap,
    loss,
    margins,
    norms,
    overview,
    save,
    trust,
)
from flowsim.plots.figures import energy_curves as energy
from flowsim.plots.portraits import kkt_residuals as kkt
from flowsim.plots.portraits import multiplier_paths as multipliers
from flowsim.plots.portraits import neurons, residuals
from flowsim.run.summary import crossing, position, separation

__all__ = [
    "alignment",
    "apart",
    "bands",
    "certificate",
    "compare",
    "comparison",
    "crossing",
    "energy",
    "gap",
    "kkt",
    "loss",
    "margins",
    "multipliers",
    "neurons",
    "norms",
    "order",
    "overview",
    "position",
    "residuals",
    "save",
    "separation",
    "style",
    "trust",
]
