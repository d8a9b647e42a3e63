"""Mini-batches: discrete rules that see some of the examples in each step."""

import math
import zlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from flowsim.checks import require_flag, require_instance, require_whole
from flowsim.descent.rule import Discrete, Memory
from flowsim.motion.clocks import Target
from flowsim.motion.rule import Labelled, advance_by_steps
from flowsim.motion.state import State, initial_state
from flowsim.numerics.shapes import PerTrajectory, Row, Rows
from flowsim.problems.problem import Problem


@dataclass(frozen=True)
class Sampled:
    """A problem whose loss is estimated from a batch of n of the N examples, of each trajectory its
    own: N/n times the sum over the batch, which is unbiased, and so is its gradient."""

    whole: Problem
    batch: Problem

    def ascent(self, w: Rows) -> tuple[PerTrajectory, Rows]:
        """The level of the estimated loss, and its gradient."""
        lam, h = self.batch.ascent(w)
        repeated = self.whole.examples / self.batch.examples
        return lam - math.log(repeated), h

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole, name)


@dataclass(frozen=True, repr=False)
class MiniBatches(Labelled):
    """``rule`` with the gradient of ``size`` examples in each step, drawn without replacement from
    a shuffling of all of them, or with ``replacement``.

    An epoch has ⌊N/size⌋ steps; what is left over of a shuffling is not used. Each trajectory draws
    from a stream of its own, made from ``seed`` and its first weights, so that it is the same alone
    and in a batch. The rule sees the estimated loss, also in a schedule that follows it. The
    reading Λ is that of all examples, which costs a forward pass over them in each step. A step
    that moves nothing does not end the run."""

    rule: Discrete
    size: int
    seed: int = 0
    replacement: bool = False

    def __post_init__(self) -> None:
        expected = "a discrete rule of flowsim, try flowsim.GradientDescent(0.1)"
        require_instance("MiniBatches", Discrete, expected, rule=self.rule)
        require_whole("MiniBatches", 1, size=self.size)
        require_whole("MiniBatches", 0, seed=self.seed)
        require_flag("MiniBatches", replacement=self.replacement)

    @property
    def label(self) -> str:
        how = " with replacement" if self.replacement else ""
        return f"{self.rule.label}, batches of {self.size}{how}"

    def start(self, problem: Problem, w_or_state: Tensor | State) -> State:
        if not isinstance(problem, Problem):
            raise TypeError(
                f"MiniBatches: got {type(problem).__name__}, expected a Problem, which has examples"
            )
        if self.size > problem.examples:
            raise ValueError(
                f"MiniBatches: got size={self.size}, expected at most {problem.examples}, all "
                "examples"
            )
        given = initial_state(problem, w_or_state)
        drawn = given.memory
        if "stream" not in drawn:
            drawn = self._first_epoch(problem, given.w)
        stream = drawn["stream"]
        order = drawn["order"]
        sampled = self._sampled(problem, order, drawn["age"])
        state = self.rule.start(sampled, w_or_state)
        # a batch without a gradient is no reason to stop
        state = replace(state, status=given.status)
        return self._seen(problem, state, stream=stream, order=order)

    def _first_epoch(self, problem: Problem, w: Rows) -> Memory:
        streams = [_stream(row, self.seed) for row in w]
        stream = torch.tensor(streams, device=w.device)
        age = torch.zeros(len(w), dtype=torch.float64, device=w.device)
        none = torch.zeros(len(w), problem.examples).long()
        order = self._shuffled(problem, stream, age, none)
        return {"stream": stream, "age": age, "order": order}

    def advance(self, problem: Problem, state: State, until: Target, budget: int) -> State:
        norm = self.rule.bound(problem)

        def step(part: Problem, local: State) -> State:
            memory = local.memory
            age = memory["age"] + 1  # of the gradient that the step ends with
            stream = memory["stream"]
            order = self._shuffled(part, stream, age, memory["order"])
            sampled = self._sampled(part, order, age)
            readings = local.readings | {"lam": memory["level"]}
            estimated = replace(local, readings=readings)
            moved = self.rule.step(sampled, norm, estimated)
            return self._seen(part, moved, order=order)

        return advance_by_steps(step, problem, state, until, budget)

    @staticmethod
    def _seen(problem: Problem, state: State, **kept: Tensor) -> State:
        """A state of the rule as it is seen from outside: with the level of all examples."""
        level = state.readings["lam"]
        memory = state.memory | {"level": level} | kept
        lam = problem.lam(state.w).double()
        readings = state.readings | {"lam": lam}
        return replace(state, memory=memory, readings=readings)

    def _epoch(self, problem: Problem) -> int:
        return problem.examples // self.size

    def _shuffled(
        self, problem: Problem, stream: Tensor, age: Tensor, order: Int[Tensor, "B N"]
    ) -> Tensor:
        """The order of examples, drawn anew for the trajectories that begin an epoch."""
        epoch = self._epoch(problem)
        begins = age % epoch == 0
        if not bool(begins.any()):
            return order
        index = begins.nonzero().squeeze(1)
        rows = []
        for b in index:
            number = int(age[b]) // epoch
            row = self._drawn(problem.examples, int(stream[b]), number)
            rows.append(row)
        drawn = torch.stack(rows).to(age.device)
        order = order.to(age.device)
        return order.index_copy(0, index, drawn)

    def _drawn(self, examples: int, stream: int, epoch: int) -> Int[Tensor, " N"]:
        seed = zlib.crc32(f"{stream} {epoch}".encode())
        generator = torch.Generator().manual_seed(seed)
        if self.replacement:
            return torch.randint(examples, (examples,), generator=generator)
        return torch.randperm(examples, generator=generator)

    def _sampled(self, problem: Problem, order: Tensor, age: Tensor) -> Any:
        number = (age % self._epoch(problem)).long()
        first = number * self.size
        places = torch.arange(self.size, device=order.device)
        index = order.gather(1, first[:, None] + places)
        return Sampled(problem, problem.examples_of(index))


def _stream(w: Row, seed: int) -> int:
    """A number for a trajectory, from its weights."""
    numbers = w.detach().cpu().contiguous().numpy()
    return zlib.crc32(numbers.tobytes(), seed % 2**32)
