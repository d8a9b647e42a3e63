"""One step of `MinimisingMovement`, with the quadrature of what was met on the way."""

import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from flowsim.flow.field import Sample
from flowsim.flow.movements.movement import Movement

STAGE = 1 - 1 / math.sqrt(2)  # γ, the part of a step at which its stage ends

# the quadrature of third order at 0, γ and 1
_MIDDLE = 1 / (6 * STAGE * (1 - STAGE))
_LAST = (2 - 3 * STAGE) / (6 * (1 - STAGE))
_FIRST = 1 - _MIDDLE - _LAST

_Number = Float[Tensor, " 1"]


@dataclass(frozen=True)
class MovementTrial:
    """A step of arclength ``eps`` from where the field is ``first``: the movements of its stage and
    of its end, with the field there."""

    eps: float
    first: Sample
    stage: Movement
    end: Movement
    middle: Sample
    last: Sample
    length: float
    interior: bool

    @property
    def w(self) -> Float[Tensor, "1 P"]:
        return self.end.w[None]

    @property
    def gap(self) -> float:
        return max(self.stage.gap, self.end.gap)

    @property
    def newton(self) -> float:
        return self.stage.newton + self.end.newton

    @property
    def error(self) -> Float[Tensor, "1 P"]:
        """What the step lacks to third order."""
        u = self.first.velocity
        v = self.stage.v
        z = self.end.v
        middle = 1 - STAGE - _MIDDLE
        last = STAGE - _LAST
        mean = -_FIRST * u + middle * v + last * z
        return self.eps * mean

    def mean(self, name: str) -> _Number:
        """The mean of a rate over the step."""
        a = self.first.rates[name]
        m = self.middle.rates[name]
        b = self.last.rates[name]
        return _FIRST * a + _MIDDLE * m + _LAST * b
