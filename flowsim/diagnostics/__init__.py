"""Measurements of trajectories: margins, stationarity, certificates, theorems as numbers.

Functions of (problem, state), most of them for ``simulate(…, observe=…)``;
`flowsim.diagnostics.margin` and the others are the user's names for them."""

from flowsim.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__)
