"""flowsim: steepest flow of neural networks in any norm.

Public names are imported on first use, so that ``import flowsim`` and the command line start at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from flowsim import clocks, closed_forms, data, diagnostics, identities, plots, reference
    from flowsim.adaptive import AdaGrad, Adam, AdamW, Adaptive, RMSProp
    from flowsim.approach import Order, OrderStudy, order_study
    from flowsim.block_norms import Euclidean, Max, Sum, modular
    from flowsim.branches import BranchFan, branch_fan
    from flowsim.certificate import Certificate
    from flowsim.clocks import arclength, lam, steps, time
    from flowsim.comparison import Comparison, compare
    from flowsim.constraints import frank_wolfe_gap
    from flowsim.descent import CoordinateDescent, GradientDescent, SignDescent, Signum, SmallStep, SteepestDescent
    from flowsim.dissipation import Clipping, DissipationFlow, Huber, SmoothSign
    from flowsim.events import Event
    from flowsim.experiment import Experiment
    from flowsim.flow import SteepestFlow
    from flowsim.implicit import MinimisingMovement
    from flowsim.integrate import BOSH3, DOPRI5
    from flowsim.limits import SmallStepLimit, gain_ratio, small_step_limit
    from flowsim.losses import cross_entropy, exponential, exponential_tail, logistic, pairwise_exponential, squared
    from flowsim.matrix_norms import Nuclear, Schatten, Spectral
    from flowsim.minibatch import MiniBatches
    from flowsim.momentum import Average, HeavyBall, Nesterov
    from flowsim.muon import Muon, NewtonSchulz
    from flowsim.nets import (
        MLP,
        Diagonal,
        Frozen,
        FunctionNet,
        Linear,
        ModuleNet,
        identity,
        leaky_relu,
        relu,
        square,
        squared_relu,
        weights_of,
    )
    from flowsim.norms import L1, L2, Frobenius, Linf, Lp, Mahalanobis
    from flowsim.odeint import TorchDiffEq
    from flowsim.pieces import ExactPieces
    from flowsim.problem import Problem
    from flowsim.quadratics import PiecewiseQuadratic, Quadratic
    from flowsim.rosenbrock import ROS34PW2
    from flowsim.schedules import Decay, LossBased, PerStep
    from flowsim.shampoo import Shampoo
    from flowsim.simulation import SimulationError, simulate
    from flowsim.sliding import KinkImplicit
    from flowsim.state import State, Status
    from flowsim.switching import Switch
    from flowsim.torch_optim import TorchOptimiser
    from flowsim.trajectory import Trajectory, load
    from flowsim.velocity import select

_HOME = {
    "certificate": ["Certificate"],
    "approach": ["Order", "OrderStudy", "order_study"],
    "comparison": ["Comparison", "compare"],
    "adaptive": ["AdaGrad", "Adam", "AdamW", "Adaptive", "RMSProp"],
    "branches": ["BranchFan", "branch_fan"],
    "clocks": ["arclength", "lam", "steps", "time"],
    "constraints": ["frank_wolfe_gap"],
    "descent": ["CoordinateDescent", "GradientDescent", "SignDescent", "Signum", "SmallStep", "SteepestDescent"],
    "dissipation": ["Clipping", "DissipationFlow", "Huber", "SmoothSign"],
    "events": ["Event"],
    "experiment": ["Experiment"],
    "flow": ["SteepestFlow"],
    "integrate": ["BOSH3", "DOPRI5"],
    "limits": ["SmallStepLimit", "gain_ratio", "small_step_limit"],
    "losses": [
        "cross_entropy",
        "exponential",
        "exponential_tail",
        "logistic",
        "pairwise_exponential",
        "squared",
    ],
    "nets": [
        "Diagonal",
        "Frozen",
        "FunctionNet",
        "Linear",
        "MLP",
        "ModuleNet",
        "identity",
        "leaky_relu",
        "relu",
        "square",
        "squared_relu",
        "weights_of",
    ],
    "norms": ["Frobenius", "L1", "L2", "Linf", "Lp", "Mahalanobis"],
    "matrix_norms": ["Nuclear", "Schatten", "Spectral"],
    "minibatch": ["MiniBatches"],
    "momentum": ["Average", "HeavyBall", "Nesterov"],
    "muon": ["Muon", "NewtonSchulz"],
    "block_norms": ["Euclidean", "Max", "Sum", "modular"],
    "implicit": ["MinimisingMovement"],
    "odeint": ["TorchDiffEq"],
    "pieces": ["ExactPieces"],
    "problem": ["Problem"],
    "quadratics": ["PiecewiseQuadratic", "Quadratic"],
    "rosenbrock": ["ROS34PW2"],
    "schedules": ["Decay", "LossBased", "PerStep"],
    "shampoo": ["Shampoo"],
    "simulation": ["SimulationError", "simulate"],
    "sliding": ["KinkImplicit"],
    "state": ["State", "Status"],
    "switching": ["Switch"],
    "torch_optim": ["TorchOptimiser"],
    "trajectory": ["Trajectory", "load"],
    "velocity": ["select"],
}
_MODULES = ["clocks", "closed_forms", "data", "diagnostics", "identities", "plots", "reference"]
_WHERE = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted([*_WHERE, *_MODULES])


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(f"flowsim.{_WHERE[name]}"), name)
    if name in _MODULES:
        return import_module(f"flowsim.{name}")
    raise AttributeError(f"module 'flowsim' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
