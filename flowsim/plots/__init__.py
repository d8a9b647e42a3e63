"""Figures for papers: functions of trajectories that draw on an Axes and return it.

``runs`` is a Trajectory or a mapping from labels to trajectories. A curve is the median over seeds,
its band the 10th to 90th percentile. Colours and dashes follow the order of the mapping, so that
they agree between figures. Pictures of a single run are in `portraits`, those of discrete runs
beside a flow in `beside`. Nothing here sets global state or shows a window; `save` writes vector
and pixel files and the data of the figure."""

from flowsim.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__)
