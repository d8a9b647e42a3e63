"""Rules by their words: the sections of a configuration that say how weights move, and until
when."""

import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from flowsim.descent import adam as adaptive
from flowsim.descent import momentum
from flowsim.descent.learning_rates import Decay, LearningRateLike, LossBased, PerStep
from flowsim.descent.minibatch import MiniBatches
from flowsim.descent.muon import Muon, NewtonSchulz
from flowsim.descent.rule import Discrete
from flowsim.descent.shampoo import Shampoo
from flowsim.descent.small_step import SmallStep
from flowsim.descent.steepest import SteepestDescent
from flowsim.diagnostics import observers as diagnostics
from flowsim.flow.dissipation import Clipping, DissipationFlow, Huber, Potential, SmoothSign
from flowsim.flow.explicit import BOSH3, DOPRI5
from flowsim.flow.steepest import SteepestFlow
from flowsim.flow.steps import Method
from flowsim.flow.torchdiffeq import TorchDiffEq
from flowsim.layout import Layout
from flowsim.motion import clocks
from flowsim.motion.clocks import SavePlan
from flowsim.motion.rule import Rule
from flowsim.motion.state import READINGS
from flowsim.norms.blocks import modular
from flowsim.norms.matrix import Nuclear, Schatten, Spectral
from flowsim.norms.norm import Norm
from flowsim.norms.vector import L1, L2, Frobenius, Linf, Lp
from flowsim.run.events import Event
from flowsim.run.switching import Switch

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


Share = Annotated[float, Field(ge=0, lt=1)]


Whole = Annotated[int, Field(ge=1)]


class Part(BaseModel):
    """A section of a configuration: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Until(Part):
    """When a run ends, and how many points are saved on the way."""

    clock: Literal["lam", "steps", "time", "arclength"] = "lam"
    value: Positive
    saves: Annotated[int, Field(ge=2)] = 100

    def schedule(self) -> SavePlan:
        if self.clock == "steps":
            return clocks.steps(round(self.value), saves=self.saves)
        make: Callable[..., SavePlan] = getattr(clocks, self.clock)
        return make(self.value, saves=self.saves)


# --------------------------------------------------------------------------------------------------
# Learning rates, momentum, batches
# --------------------------------------------------------------------------------------------------


class DecaySection(Part):
    kind: Literal["decay"]
    lr: Positive
    power: Positive = 0.5
    delay: Positive = 1.0

    def rate(self) -> LearningRateLike:
        return Decay(self.lr, self.power, self.delay)


class LossBasedSection(Part):
    kind: Literal["loss_based"]
    lr: "Positive | DecaySection"

    def rate(self) -> LearningRateLike:
        return LossBased(_rate(self.lr))


class PerStepSection(Part):
    kind: Literal["per_step"]
    lr: Annotated[list[Positive], Field(min_length=1)]

    def rate(self) -> LearningRateLike:
        return PerStep(self.lr)


Rate = (
    Positive
    | Annotated[DecaySection | LossBasedSection | PerStepSection, Field(discriminator="kind")]
)


def _rate(lr: Any) -> LearningRateLike:
    return lr if isinstance(lr, float) else lr.rate()


class MomentumSection(Part):
    kind: Literal["heavy_ball", "nesterov", "average"]
    beta: Share = 0.9

    def momentum(self) -> momentum.Momentum:
        kinds: dict[str, Callable[[float], momentum.Momentum]]
        kinds = {
            "heavy_ball": momentum.HeavyBall,
            "nesterov": momentum.Nesterov,
            "average": momentum.Average,
        }
        return kinds[self.kind](self.beta)


class Batch(Part):
    """Mini-batches of a discrete rule."""

    size: Whole
    seed: Annotated[int, Field(ge=0)] = 0
    replacement: bool = False


# --------------------------------------------------------------------------------------------------
# Rules
# --------------------------------------------------------------------------------------------------


class Moving(Part):
    """What every rule's section has."""

    label: str | None = None
    until: Until | None = None
    max_steps: Whole = 100_000

    def rule(self, layout: Layout) -> Rule:
        raise NotImplementedError


class RulePart(Moving):
    norm: str = "l2"


class SmallSteps(RulePart):
    kind: Literal["small_steps"]
    dlam: Positive = 0.05
    relative: Positive = 0.05

    def rule(self, layout: Layout) -> Rule:
        return SmallStep(norm_from_word(self.norm, layout), self.dlam, self.relative)


class DiscretePart(Moving):
    lr: Rate
    batch: Batch | None = None

    def rule(self, layout: Layout) -> Rule:
        rule = self.discrete(layout)
        return rule if self.batch is None else MiniBatches(rule, **self.batch.model_dump())

    def discrete(self, layout: Layout) -> Discrete:
        raise NotImplementedError


class Descent(DiscretePart):
    kind: Literal["descent"]
    norm: str = "l2"
    normalized: bool = False
    momentum: MomentumSection | None = None
    decay: NotNegative = 0.0

    def discrete(self, layout: Layout) -> Discrete:
        names = {"l1": "coordinate descent", "l2": "gradient descent", "linf": "sign descent"}
        norm = norm_from_word(self.norm, layout)
        average = None if self.momentum is None else self.momentum.momentum()
        lr, name = _rate(self.lr), names.get(norm.name, "")
        return SteepestDescent(norm, lr, self.normalized, name, average, self.decay)


class AdamSection(DiscretePart):
    kind: Literal["adam"]
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: NotNegative = 1e-8
    corrected: bool = True

    def discrete(self, layout: Layout) -> Discrete:
        return adaptive.Adam(
            _rate(self.lr), betas=self.betas, eps=self.eps, corrected=self.corrected
        )


class AdamWSection(DiscretePart):
    kind: Literal["adamw"]
    decay: NotNegative = 1e-2
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: NotNegative = 1e-8

    def discrete(self, layout: Layout) -> Discrete:
        return adaptive.AdamW(_rate(self.lr), decay=self.decay, betas=self.betas, eps=self.eps)


class RMSPropSection(DiscretePart):
    kind: Literal["rmsprop"]
    beta: Share = 0.99
    eps: NotNegative = 1e-8

    def discrete(self, layout: Layout) -> Discrete:
        return adaptive.RMSProp(_rate(self.lr), beta=self.beta, eps=self.eps)


class AdaGradSection(DiscretePart):
    kind: Literal["adagrad"]
    eps: NotNegative = 1e-10

    def discrete(self, layout: Layout) -> Discrete:
        return adaptive.AdaGrad(_rate(self.lr), eps=self.eps)


class MuonSection(DiscretePart):
    """``newton_schulz`` is the number of its steps, 0 for the exact polar factor."""

    kind: Literal["muon"]
    beta: Share = 0.95
    nesterov: bool = True
    newton_schulz: Annotated[int, Field(ge=0)] = 0
    decay: NotNegative = 0.0

    def discrete(self, layout: Layout) -> Discrete:
        polar = NewtonSchulz(self.newton_schulz) if self.newton_schulz else None
        return Muon(_rate(self.lr), self.beta, self.nesterov, polar, None, self.decay)


class ShampooSection(DiscretePart):
    """Sums without ``beta``; ``beta = 0`` accumulates nothing."""

    kind: Literal["shampoo"]
    beta: Share | None = None
    exponent: Annotated[float, Field(gt=0, lt=0.5)] = 0.25
    eps: NotNegative = 0.0
    decay: NotNegative = 0.0

    def discrete(self, layout: Layout) -> Discrete:
        return Shampoo(_rate(self.lr), self.beta, self.exponent, self.eps, self.decay)


class Flow(RulePart):
    kind: Literal["flow"]
    rtol: Positive = 1e-4
    atol: Positive = 1e-12
    clock: Literal["arclength", "relative", "lam", "time"] | None = None
    method: str = "auto"

    def rule(self, layout: Layout) -> Rule:
        method = method_from_word(self.method)
        clock = getattr(clocks, self.clock.upper()) if self.clock else None
        return SteepestFlow(norm_from_word(self.norm, layout), self.rtol, self.atol, clock, method)


class Dissipation(Moving):
    """``level`` is ε of the smooth sign, δ of Huber's potential, or the threshold of clipping."""

    kind: Literal["dissipation"]
    potential: Literal["smooth_sign", "huber", "clipping"]
    level: Positive
    rtol: Annotated[float, Field(gt=0, lt=1)] = 1e-6

    def rule(self, layout: Layout) -> Rule:
        kinds: dict[str, Callable[[float], Potential]]
        kinds = {"smooth_sign": SmoothSign, "huber": Huber, "clipping": Clipping}
        return DissipationFlow(kinds[self.potential](self.level), self.rtol)


class At(Part):
    """An event by words: training accuracy or a reading reaches a level."""

    measure: Literal["accuracy", "lam", "log_time", "steps", "arclength", "relative"]
    level: Annotated[float, Field(allow_inf_nan=False)]

    def event(self) -> Event:
        if self.measure in READINGS:
            return Event(
                lambda problem, state: state.readings[self.measure], self.level, name=self.measure
            )
        return Event(diagnostics.accuracy, self.level)


class SwitchSection(Moving):
    """The sections of both rules, of which ``until``, ``label`` and ``max_steps`` are not read."""

    kind: Literal["switch"]
    first: "AnyRule"
    then: "AnyRule"
    at: At

    def rule(self, layout: Layout) -> Rule:
        return Switch(self.first.rule(layout), self.then.rule(layout), self.at.event())


AnyRule = Annotated[
    SmallSteps
    | Descent
    | AdamSection
    | AdamWSection
    | RMSPropSection
    | AdaGradSection
    | MuonSection
    | ShampooSection
    | Flow
    | Dissipation
    | SwitchSection,
    Field(discriminator="kind"),
]


SwitchSection.model_rebuild()


def norm_from_word(word: str, layout: Layout) -> Norm:
    """A norm by its word: l1, l2, linf, l3 or l1.5, spectral, nuclear, frobenius, schatten3,
    modular."""
    plain: dict[str, Callable[[], Norm]] = {
        "l1": L1,
        "l2": L2,
        "linf": Linf,
        "spectral": Spectral,
        "nuclear": Nuclear,
        "frobenius": Frobenius,
    }
    if word in plain:
        return plain[word]()
    if word == "modular":
        return modular(layout)
    if match := re.fullmatch(r"(l|schatten)(\d+(?:\.\d+)?)", word):
        return (Lp if match[1] == "l" else Schatten)(float(match[2]))
    raise ValueError(
        f"norm: got {word!r}, expected one of {', '.join(plain)}, modular, l<p> or schatten<p> such as l3"
    )


def method_from_word(word: str) -> Method | None:
    """A method by its word: auto (None), dopri5, bosh3, or torchdiffeq:<one of its adaptive
    solvers>."""
    own: dict[str, Method | None] = {"auto": None, "dopri5": DOPRI5, "bosh3": BOSH3}
    if word in own:
        return own[word]
    if word.startswith("torchdiffeq:"):
        return TorchDiffEq(word.removeprefix("torchdiffeq:"))
    raise ValueError(f"method: got {word!r}, expected auto, dopri5, bosh3, or torchdiffeq:<solver>")
