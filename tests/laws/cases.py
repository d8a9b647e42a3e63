"""One list of all methods of the flow and one of all discrete rules, each on a problem for it.

A new method or rule is entered here, and obeys the laws in this folder.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch

import flowsim as fs
from flowsim.motion.clocks import SavePlan
from flowsim.motion.rule import Rule
from flowsim.problems.objective import Objective


@dataclass(frozen=True, eq=False)
class Case:
    """A rule on a problem from two starts, how far it runs, and where it is cut for a resume."""

    name: str
    rule: Rule
    problem: Objective
    w0: torch.Tensor
    cut: SavePlan
    end: SavePlan
    resumes: bool = True  # bit for bit
    selects: bool = True  # multipliers of kinks to rounding, not to the tolerance

    @cached_property
    def whole(self) -> fs.Trajectory:
        """The run from start to end, unbroken."""
        return self.run()

    def alone(self, row: int) -> "Case":
        """The same with one of its trajectories."""
        index = torch.tensor([row])
        return replace(self, problem=self.problem.select(index), w0=self.w0[index])

    def run(self, until: SavePlan | None = None, w0: torch.Tensor | fs.State | None = None):
        start = self.w0 if w0 is None else w0
        return fs.simulate(self.problem, self.rule, start, until=until or self.end, strict=True)


def classified(net, loss=fs.exponential, scale=0.5, n=12, d=5):
    x, y = fs.data.gaussian_separable(n, d, margin=0.3, seed=0)
    problem = fs.Problem(net, x, y, loss=loss)
    return problem, net.init(seeds=[0, 1], scale=scale)


RELU = classified(fs.MLP([5, 6, 1], activation=fs.relu))
SMALL = classified(fs.MLP([3, 4, 1], activation=fs.relu), n=6, d=3)
LEAKY = classified(fs.MLP([5, 4, 1], activation=fs.leaky_relu(0.1)))
SMOOTH = classified(fs.MLP([5, 12, 1], activation=fs.squared_relu), scale=1.0)
LINEAR = classified(fs.Linear(5))


def flow(name, norm, model, end=8.0, **options):
    begin = float(model[0].lam(model[1]).max())
    cut, until = fs.lam([0.6 * begin + 0.4 * end]), fs.lam([end])
    facts = {name: options.pop(name, True) for name in ("resumes", "selects")}
    if "arclength" in options:
        length = options.pop("arclength")
        cut, until = fs.arclength([length / 3]), fs.arclength([length])
    return Case(name, fs.SteepestFlow(norm, **options), *model, cut, until, **facts)


METHODS = [
    flow("sliding, relu", fs.L2(), RELU, rtol=1e-3),
    flow("sliding, leaky relu", fs.L2(), LEAKY, rtol=1e-3),
    flow("movements, relu, linf", fs.Linf(), SMALL, end=0.0, rtol=1e-2, selects=False),
    flow("movements, relu, l1", fs.L1(), SMALL, end=-1.2, rtol=1e-2, selects=False),
    flow("movements, linear, l3", fs.Lp(3.0), LINEAR),
    flow("pieces, l1", fs.L1(), LINEAR),
    flow("pieces, linf", fs.Linf(), LINEAR),
    flow("rosenbrock, smooth", fs.L2(), SMOOTH),
    flow("rosenbrock, linear", fs.L2(), LINEAR),
    flow("dopri5", fs.L2(), SMOOTH, end=3.0, method=fs.DOPRI5),
    flow("bosh3", fs.L2(), SMOOTH, end=3.0, method=fs.BOSH3),
    flow(
        "torchdiffeq",
        fs.L2(),
        SMOOTH,
        method=fs.TorchDiffEq("dopri5"),
        arclength=1.0,
        resumes=False,
    ),
]


def rule(name, rule, model=RELU, steps=30):
    return Case(name, rule, *model, fs.steps(steps // 3), fs.steps(steps))


def separated():
    return fs.Event(fs.diagnostics.accuracy, 1.0)


RULES = [
    rule("small steps", fs.SmallStep(fs.Linf())),
    rule("gradient descent", fs.GradientDescent(0.01)),
    rule("sign descent", fs.SignDescent(1e-3)),
    rule("coordinate descent", fs.CoordinateDescent(0.01)),
    rule(
        "spectral descent", fs.SteepestDescent(fs.Max({"W1": fs.Spectral(), "W2": fs.L2()}), 0.01)
    ),
    rule("heavy ball", fs.GradientDescent(0.01, momentum=fs.HeavyBall(0.9))),
    rule("nesterov", fs.GradientDescent(0.01, momentum=fs.Nesterov(0.9))),
    rule("signum", fs.Signum(1e-3, decay=0.01)),
    rule("decaying rate", fs.GradientDescent(fs.Decay(0.1), normalized=True)),
    rule("adam", fs.Adam(1e-2)),
    rule("adamw", fs.AdamW(1e-2)),
    rule("rmsprop", fs.RMSProp(1e-3)),
    rule("adagrad", fs.AdaGrad(1e-2)),
    rule("muon", fs.Muon(1e-2)),
    rule("shampoo", fs.Shampoo(1e-2)),
    rule("mini-batches", fs.MiniBatches(fs.GradientDescent(0.01), 4)),
    rule("switch", fs.Switch(fs.GradientDescent(0.05), fs.SignDescent(1e-3), separated())),
    rule("torch's sgd", fs.TorchOptimiser(lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9))),
    Case(
        "smooth sign",
        fs.DissipationFlow(fs.SmoothSign(1e-2)),
        *SMOOTH,
        fs.lam([0.0]),
        fs.lam([2.0]),
    ),
]
