"""flowsim: steepest flow of neural networks in any norm.

Public names are imported on first use, so that ``import flowsim`` and the command line start at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from flowsim import clocks, data, diagnostics, plots
    from flowsim.clocks import arclength, lam, steps, time
    from flowsim.descent import CoordinateDescent, GradientDescent, SignDescent, SmallStep, SteepestDescent
    from flowsim.experiment import Experiment
    from flowsim.flow import SteepestFlow
    from flowsim.integrate import BOSH3, DOPRI5
    from flowsim.losses import cross_entropy, exponential, exponential_tail, logistic, pairwise_exponential, squared
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
    )
    from flowsim.norms import (
        L1,
        L2,
        Euclidean,
        Frobenius,
        Linf,
        Lp,
        Mahalanobis,
        Max,
        Nuclear,
        Schatten,
        Spectral,
        Sum,
        modular,
    )
    from flowsim.problem import Problem, Quadratic
    from flowsim.simulation import SimulationError, simulate
    from flowsim.state import State, Status
    from flowsim.trajectory import Trajectory, load

_HOME = {
    "clocks": ["arclength", "lam", "steps", "time"],
    "descent": ["CoordinateDescent", "GradientDescent", "SignDescent", "SmallStep", "SteepestDescent"],
    "experiment": ["Experiment"],
    "flow": ["SteepestFlow"],
    "integrate": ["BOSH3", "DOPRI5"],
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
    ],
    "norms": [
        "Euclidean",
        "Frobenius",
        "L1",
        "L2",
        "Linf",
        "Lp",
        "Mahalanobis",
        "Max",
        "Nuclear",
        "Schatten",
        "Spectral",
        "Sum",
        "modular",
    ],
    "problem": ["Problem", "Quadratic"],
    "simulation": ["SimulationError", "simulate"],
    "state": ["State", "Status"],
    "trajectory": ["Trajectory", "load"],
}
_MODULES = ["clocks", "data", "diagnostics", "plots"]
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
