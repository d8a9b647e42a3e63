"""Branches: the flows that leave one start, where releases let them go different ways.

A kink that slides and begins to repel is released, and both of its sides are solutions.
`branch_fan` takes each side of the first few releases in turn, so that what hangs on these choices
is a number instead of a doubt."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from flowsim.diagnostics.margins import Observer, margin
from flowsim.diagnostics.series import as_array
from flowsim.flow.steepest import SteepestFlow, suited
from flowsim.flow.steps import Method
from flowsim.motion.clocks import SavePlan
from flowsim.motion.state import State
from flowsim.problems.problem import Problem
from flowsim.run.simulation import simulate
from flowsim.run.trajectory import Trajectory
from flowsim.study.comparison import stacked_weights

Sides = tuple[int, ...]


@dataclass(frozen=True)
class BranchFan:
    """Flows from one start, keyed by the sides that their first releases took: 0 for z < 0, 1 for z
    > 0.

    A key is as long as there were releases to choose a side for, at most k; the one branch of a
    start without releases has the key ``()``. In a batch of B starts it is as long as the start
    with most releases asks for."""

    branches: dict[Sides, Trajectory]

    def __len__(self) -> int:
        return len(self.branches)

    def __getitem__(self, name: str) -> Float[np.ndarray, "F K B *shape"]:
        """A value of all branches, first axis in the order of ``branches``."""
        return np.stack([run[name] for run in self.branches.values()])

    @property
    def releases(self) -> Float[np.ndarray, "F B"]:
        """Releases in the whole run; those beyond the first k took the nearer side."""
        finals = [run.final for run in self.branches.values()]
        counts = [as_array(final.tallies["releases"]) for final in finals]
        return np.stack(counts)

    def spread(self, name: str) -> Float[np.ndarray, "K B *shape"]:
        """Largest less smallest of a value over the branches, at each save; NaN where a branch has
        stopped."""
        return np.ptp(self[name], axis=0)

    @property
    def weights_spread(self) -> Float[np.ndarray, "K B"]:
        """The largest ‖w − w'‖₂/‖w‖₂ of two branches, at each save.

        Raises ValueError where the runs did not keep their weights.
        """
        weights = stacked_weights("weights_spread", self.branches.values())
        size = np.linalg.norm(weights[0], axis=-1)
        pairs = combinations(weights, 2)
        apart = [np.linalg.norm(a - b, axis=-1) for a, b in pairs]
        if not apart:
            return 0 * size
        return np.max(apart, axis=0) / size


def branch_fan(
    problem: Problem,
    flow: SteepestFlow,
    w0: Tensor | State,
    *,
    until: SavePlan,
    k: int = 3,
    observe: Mapping[str, Observer] | None = None,
    **options: Any,
) -> BranchFan:
    """Follow ``flow`` from ``w0`` to ``until`` with each choice of sides for its first ``k``
    releases, 2^k at most.

    Each branch is a run of its own from the start; choices that no release asks for are not
    repeated. ``observe`` is by default the margin in the flow's norm; it and ``options`` are those
    of `simulate`. The method has to release kinks and to take ``sides``, as `KinkImplicit` does.
    From a State, releases are counted anew.

    Whether a pair stays on the side that it was given is up to the flow: where others of its neuron
    push it back, two branches are one."""
    if type(k) is not int or not 0 <= k <= 10:
        raise ValueError(
            f"branch_fan: got k={k!r}, expected a whole number from 0 to 10: there are 2^k branches"
        )
    method = _releasing(flow, problem)
    observe = {"margin": margin(flow.norm)} if observe is None else observe
    if isinstance(w0, State):
        none = torch.zeros_like(w0.step_size)
        w0 = replace(w0, tallies=w0.tallies | {"releases": none})
    branches: dict[Sides, Trajectory] = {}
    for sides in product((0, 1), repeat=k):
        if any(sides[: len(known)] == known for known in branches):
            continue
        rule = replace(flow, method=replace(method, sides=sides))  # type: ignore[type-var]
        run = simulate(problem, rule, w0, until=until, observe=observe, **options)
        releases = int(run.final.tallies["releases"].max())
        branches[sides[:releases]] = run
    return BranchFan(branches)


def _releasing(flow: SteepestFlow, problem: Problem) -> Method:
    """The flow's method, if it takes sides."""
    norm = flow.norm.bind(problem.layout)
    method = flow.method or suited(norm, problem)
    if not hasattr(method, "sides"):
        raise ValueError(
            f"branch_fan: got the method {method!r}, which releases no kinks, "
            "expected one with sides such as flowsim.KinkImplicit()"
        )
    return method
