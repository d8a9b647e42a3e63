"""Rules by their words: the sections of a configuration that say how weights move, and until
when."""

import re
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from flowsim.descent.adam import AdaGrad, Adam, AdamW, RMSProp
from flowsim.descent.learning_rates import Decay, LossBased, PerStep
from flowsim.descent.minibatch import MiniBatches
from flowsim.descent.momentum import Average, HeavyBall, Momentum, Nesterov
from flowsim.descent.muon import Muon, NewtonSchulz
from flowsim.descent.rule import Discrete
from flowsim.descent.shampoo import Shampoo
from flowsim.descent.small_step import SmallStep
from flowsim.descent.steepest import SteepestDescent
from flowsim.diagnostics.margins import accuracy
from flowsim.flow.dissipation import Clipping, DissipationFlow, Huber, Potential, SmoothSign
from flowsim.flow.explicit import BOSH3, DOPRI5
from flowsim.flow.steepest import SteepestFlow
from flowsim.flow.steps import Method
from flowsim.flow.torchdiffeq import TorchDiffEq
from flowsim.layout import Layout
from flowsim.motion import clocks
from flowsim.motion.clocks import SavePlan
from flowsim.motion.rule import Rule
from flowsim.norms.blocks import modular
from flowsim.norms.matrix import Nuclear, Schatten, Spectral
from flowsim.norms.norm import Norm
from flowsim.norms.vector import L1, L2, Frobenius, Linf, Lp
from flowsim.run.events import Event
from flowsim.run.switching import Switch

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]
Whole = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]


class Part(BaseModel):
    """A section of a configuration: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Until(Part):
    """When a run ends, and how many points are saved on the way."""

    clock: Literal["lam", "steps", "time", "arclength"] = "lam"
    value: Positive
    saves: Annotated[int, Field(ge=2)] = 100

    def plan(self) -> SavePlan:
        value = round(self.value) if self.clock == "steps" else self.value
        return getattr(clocks, self.clock)(value, saves=self.saves)


# --------------------------------------------------------------------------------------------------
# Learning rates, momentum, batches
# --------------------------------------------------------------------------------------------------


class Made(Part):
    """A section whose own keys are the arguments of what it ``makes``."""

    makes: ClassVar[Callable[..., Any]]

    def made(self) -> Any:
        return self.makes(**{key: made(value) for key, value in self if key not in _FRAME})


_FRAME = {"kind", "label", "until", "max_steps", "batch"}  # keys that are not a section's own


def made(value: Any) -> Any:
    """What a section describes, and any other value as it is."""
    return value.made() if isinstance(value, Made) else value


class DecaySection(Made):
    kind: Literal["decay"]
    lr: Positive
    power: Positive = 0.5
    delay: Positive = 1.0
    makes = Decay


class LossBasedSection(Made):
    kind: Literal["loss_based"]
    lr: "Positive | DecaySection"
    makes = LossBased


class PerStepSection(Made):
    kind: Literal["per_step"]
    lr: Annotated[list[Positive], Field(min_length=1)]
    makes = PerStep


Rate = (
    Positive
    | Annotated[DecaySection | LossBasedSection | PerStepSection, Field(discriminator="kind")]
)


_MOMENTA: dict[str, Callable[[float], Momentum]] = {
    "heavy_ball": HeavyBall,
    "nesterov": Nesterov,
    "average": Average,
}


class MomentumSection(Made):
    kind: Literal["heavy_ball", "nesterov", "average"]
    beta: Share = 0.9

    def made(self) -> Momentum:
        return _MOMENTA[self.kind](self.beta)


class Batch(Part):
    """Mini-batches of a discrete rule."""

    size: Whole
    seed: Count = 0
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


class DiscretePart(Moving, Made):
    lr: Rate
    batch: Batch | None = None

    def rule(self, layout: Layout) -> Rule:
        rule = self.discrete(layout)
        return rule if self.batch is None else MiniBatches(rule, **dict(self.batch))

    def discrete(self, layout: Layout) -> Discrete:
        return self.made()


class Descent(DiscretePart):
    kind: Literal["descent"]
    norm: str = "l2"
    normalized: bool = False
    momentum: MomentumSection | None = None
    decay: NotNegative = 0.0

    def discrete(self, layout: Layout) -> Discrete:
        names = {"l1": "coordinate descent", "l2": "gradient descent", "linf": "sign descent"}
        norm = norm_from_word(self.norm, layout)
        name = names.get(norm.name, "")
        lr = made(self.lr)
        momentum = made(self.momentum)
        return SteepestDescent(norm, lr, self.normalized, name, momentum, self.decay)


class AdamSection(DiscretePart):
    kind: Literal["adam"]
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: NotNegative = 1e-8
    corrected: bool = True
    makes = staticmethod(Adam)


class AdamWSection(DiscretePart):
    kind: Literal["adamw"]
    decay: NotNegative = 1e-2
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: NotNegative = 1e-8
    makes = staticmethod(AdamW)


class RMSPropSection(DiscretePart):
    kind: Literal["rmsprop"]
    beta: Share = 0.99
    eps: NotNegative = 1e-8
    makes = staticmethod(RMSProp)


class AdaGradSection(DiscretePart):
    kind: Literal["adagrad"]
    eps: NotNegative = 1e-10
    makes = staticmethod(AdaGrad)


class MuonSection(DiscretePart):
    """``newton_schulz`` is the number of its steps, 0 for the exact polar factor."""

    kind: Literal["muon"]
    beta: Share = 0.95
    nesterov: bool = True
    newton_schulz: Count = 0
    decay: NotNegative = 0.0

    def discrete(self, layout: Layout) -> Discrete:
        polar = NewtonSchulz(self.newton_schulz) if self.newton_schulz else None
        return Muon(made(self.lr), self.beta, self.nesterov, polar, decay=self.decay)


class ShampooSection(DiscretePart):
    """Sums without ``beta``; ``beta = 0`` accumulates nothing."""

    kind: Literal["shampoo"]
    beta: Share | None = None
    exponent: Annotated[float, Field(gt=0, lt=0.5)] = 0.25
    eps: NotNegative = 0.0
    decay: NotNegative = 0.0
    makes = Shampoo


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


_POTENTIALS: dict[str, Callable[[float], Potential]] = {
    "smooth_sign": SmoothSign,
    "huber": Huber,
    "clipping": Clipping,
}


class Dissipation(Moving):
    """``level`` is ε of the smooth sign, δ of Huber's potential, or the threshold of clipping."""

    kind: Literal["dissipation"]
    potential: Literal["smooth_sign", "huber", "clipping"]
    level: Positive
    rtol: Annotated[float, Field(gt=0, lt=1)] = 1e-6

    def rule(self, layout: Layout) -> Rule:
        return DissipationFlow(_POTENTIALS[self.potential](self.level), self.rtol)


class At(Part):
    """An event by words: training accuracy or a reading reaches a level."""

    measure: Literal["accuracy", "lam", "log_time", "steps", "arclength", "relative"]
    level: Finite

    def event(self) -> Event:
        name = self.measure
        if name == "accuracy":
            return Event(accuracy, self.level)
        return Event(lambda problem, state: state.readings[name], self.level, name=name)


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


_NORMS: dict[str, Callable[[], Norm]] = {
    "l1": L1,
    "l2": L2,
    "linf": Linf,
    "spectral": Spectral,
    "nuclear": Nuclear,
    "frobenius": Frobenius,
}


def norm_from_word(word: str, layout: Layout) -> Norm:
    """A norm by its word: l1, l2, linf, l3 or l1.5, spectral, nuclear, frobenius, schatten3,
    modular."""
    if word in _NORMS:
        return _NORMS[word]()
    if word == "modular":
        return modular(layout)
    if match := re.fullmatch(r"(l|schatten)(\d+(?:\.\d+)?)", word):
        family, power = match.groups()
        return (Lp if family == "l" else Schatten)(float(power))
    raise ValueError(
        f"norm: got {word!r}, expected one of {', '.join(_NORMS)}, modular, l<p> or schatten<p> "
        "such as l3"
    )


_METHODS: dict[str, Method | None] = {"auto": None, "dopri5": DOPRI5, "bosh3": BOSH3}


def method_from_word(word: str) -> Method | None:
    """A method by its word: auto (None), dopri5, bosh3, or torchdiffeq:<one of its adaptive
    solvers>."""
    if word in _METHODS:
        return _METHODS[word]
    package, _, solver = word.partition(":")
    if package == "torchdiffeq":
        return TorchDiffEq(solver)
    raise ValueError(f"method: got {word!r}, expected auto, dopri5, bosh3, or torchdiffeq:<solver>")
