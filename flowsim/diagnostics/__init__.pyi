"""Every public measurement, listed once; `__init__.py` reads it and imports on first use."""

from flowsim.diagnostics.lagrange import BestMultipliers as BestMultipliers
from flowsim.diagnostics.lagrange import best_multipliers as best_multipliers
from flowsim.diagnostics.margins import Observer as Diagnostic
from flowsim.diagnostics.margins import accuracy as accuracy
from flowsim.diagnostics.margins import entropy as entropy
from flowsim.diagnostics.margins import layer_norms as layer_norms
from flowsim.diagnostics.margins import margin as margin
from flowsim.diagnostics.margins import margin_quantiles as margin_quantiles
from flowsim.diagnostics.margins import paper as paper
from flowsim.diagnostics.margins import product_margin as product_margin
from flowsim.diagnostics.margins import size as size
from flowsim.diagnostics.margins import soft_margin as soft_margin
from flowsim.diagnostics.margins import support_count as support_count
from flowsim.diagnostics.margins import support_vectors as support_vectors
from flowsim.diagnostics.margins import test_accuracy as test_accuracy
from flowsim.diagnostics.near_kkt import Nearby as Nearby
from flowsim.diagnostics.observers import kkt as kkt
from flowsim.diagnostics.observers import standard as standard
from flowsim.diagnostics.selected import ascent as ascent
from flowsim.diagnostics.stationarity import Stationarity as Stationarity
from flowsim.diagnostics.stationarity import alignment as alignment
from flowsim.diagnostics.stationarity import divergence as divergence
from flowsim.diagnostics.stationarity import dual as dual
from flowsim.diagnostics.stationarity import multipliers as multipliers
from flowsim.diagnostics.stationarity import residual as residual
from flowsim.diagnostics.stationarity import slackness as slackness
