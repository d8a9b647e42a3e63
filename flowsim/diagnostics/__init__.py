"""Measurements of trajectories: margins, stationarity, certificates, theorems as numbers.

Functions of (problem, state), most of them for ``simulate(…, observe=…)``;
`flowsim.diagnostics.margin` and the others are the user's names for them."""

from flowsim.diagnostics.lagrange import BestMultipliers, best_multipliers
from flowsim.diagnostics.margins import (
    Diagnostic,
    accuracy,
    entropy,
    layer_norms,
    margin,
    margin_quantiles,
    paper,
    product_margin,
    size,
    soft_margin,
    support_count,
    support_vectors,
    test_accuracy,
)
from flowsim.diagnostics.observers import kkt, standard
from flowsim.diagnostics.selected import ascent
from flowsim.diagnostics.stationarity import (
    Nearby,
    Stationarity,
    alignment,
    divergence,
    dual,
    multipliers,
    residual,
    slackness,
)

__all__ = [
    "BestMultipliers",
    "Diagnostic",
    "Nearby",
    "Stationarity",
    "accuracy",
    "alignment",
    "ascent",
    "best_multipliers",
    "divergence",
    "dual",
    "entropy",
    "kkt",
    "layer_norms",
    "margin",
    "margin_quantiles",
    "multipliers",
    "paper",
    "product_margin",
    "residual",
    "size",
    "slackness",
    "soft_margin",
    "standard",
    "support_count",
    "support_vectors",
    "test_accuracy",
]
