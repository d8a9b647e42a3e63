"""How far a run can be trusted: one frozen object on every trajectory, saved with it, with its
verdict in a sentence.

All of it is measured in the norm that the rule descends in, at the save points and at the end. A
number that cannot be had is NaN, with the reason in ``reasons``."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from html import escape
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray as Array
from torch import Tensor

from flowsim.diagnostics.margins import Observer, classifies, soft_margin
from flowsim.diagnostics.series import falls, last, peak, positive, risen
from flowsim.diagnostics.stationarity import alignment
from flowsim.motion.state import State
from flowsim.norms.norm import Norm
from flowsim.problems.objective import Objective
from flowsim.problems.problem import Problem

Explained: TypeAlias = tuple[Array, str]
"""A number of each trajectory, and why it is NaN where it is."""

MONOTONE = 1e-12  # relative falls of the soft margin that are rounding

_COUNTED = 1e-3  # softmax weights above this fraction of the largest have their digits counted

_PROBES = 4


@dataclass(frozen=True, repr=False)
class Certificate:
    """What a run shows of itself, for each trajectory ``(B,)``.

    ``energy``       ∫‖h‖_* ds over the rise of Λ, less one: 0 along an exact flow, positive for
                     coarse steps
    ``fall``         largest relative fall of the soft margin in the rule's own norm from one save
                     to the next, once the loss guarantees that it rises (TGKV, Thm 1 and 22)
    ``falls``        how many falls are beyond rounding
    ``aligning``     slack of ∫(1/α − 1)dσ ≤ log(γ̃₂/γ̃₁)/L from there on (TGKV, Eq. 46): negative
                     where it is violated
    ``alignment``    α at the last save
    ``sliding``      the most kinks that were held at a save; ``kinks`` is how many there are
    ``releases``     sliding pairs that had two ways to go on
    ``rejected``     fraction of attempted steps that were not accurate enough
    ``digits``       decimal digits of the softmax weights that rounding leaves at the end
    ``margin``       least margin at the end, not normalised; not positive where the data are not
                     separated

    "TGKV" is Tsilivis et al. 2026. ``reasons[b]`` says by the name of the number why it is NaN.
    """

    energy: Float[Array, " B"]
    fall: Float[Array, " B"]
    falls: Float[Array, " B"]
    aligning: Float[Array, " B"]
    alignment: Float[Array, " B"]
    sliding: Float[Array, " B"]
    kinks: Float[Array, " B"]
    releases: Float[Array, " B"]
    rejected: Float[Array, " B"]
    digits: Float[Array, " B"]
    margin: Float[Array, " B"]
    reasons: tuple[Mapping[str, str], ...]

    @staticmethod
    def names() -> list[str]:
        """The numbers."""
        return [field.name for field in fields(Certificate) if field.name != "reasons"]

    @property
    def numbers(self) -> dict[str, Float[Array, " B"]]:
        """The numbers by name."""
        return {name: getattr(self, name) for name in self.names()}

    def __len__(self) -> int:
        return len(self.reasons)

    def select(self, rows: list[int]) -> "Certificate":
        """The certificate of some of the trajectories."""
        kept = {name: values[rows] for name, values in self.numbers.items()}
        return Certificate(**kept, reasons=tuple(self.reasons[row] for row in rows))

    def record(self) -> dict[str, Any]:
        """As JSON can hold it; numbers that are not finite are None."""
        numbers = {
            name: [float(value) if math.isfinite(value) else None for value in values]
            for name, values in self.numbers.items()
        }
        reasons = [dict(reason) for reason in self.reasons]
        return numbers | {"reasons": reasons, "verdict": self.verdict}

    @staticmethod
    def read(record: Mapping[str, Any]) -> "Certificate":
        """The inverse of `record`."""
        numbers = {name: np.array(record[name], dtype=float) for name in Certificate.names()}
        return Certificate(**numbers, reasons=tuple(record["reasons"]))

    @staticmethod
    def unknown(trajectories: int, why: str) -> "Certificate":
        """No number at all, for one reason."""
        nothing = np.full(trajectories, np.nan)
        return Certificate.explained(dict.fromkeys(Certificate.names(), (nothing, why)))

    @staticmethod
    def explained(numbers: Mapping[str, Explained]) -> "Certificate":
        """From numbers with their reasons; an empty reason says nothing."""
        values = {name: value for name, (value, _) in numbers.items()}
        reasons = tuple(
            {name: why for name, (value, why) in numbers.items() if why and np.isnan(value[b])}
            for b in range(len(values["energy"]))
        )
        return Certificate(**values, reasons=reasons)

    @property
    def verdict(self) -> str:
        """The worst of all trajectories in a sentence."""
        return "; ".join(self._findings())

    def __str__(self) -> str:
        return self.verdict

    def __repr__(self) -> str:
        return f"Certificate, B = {len(self)}: {self.verdict}"

    def _repr_html_(self) -> str:
        items = "".join(f"<li>{escape(finding)}</li>" for finding in self._findings())
        return f"<b>Certificate, B = {len(self)}</b><ul>{items}</ul>"

    def _findings(self) -> list[str]:
        found = [
            self._separated(),
            self._monotone(),
            self._energy(),
            self._aligned(),
            self._kinks(),
            self._steps(),
            self._digits(),
        ]
        return [finding for finding in found if finding]

    def _separated(self) -> str:
        known = self.margin[np.isfinite(self.margin)]
        if not known.size:
            return self._why("margin")
        wrong = (known <= 0).sum()
        if wrong == 0:
            return "separated"
        return (
            f"NOT separated in {wrong} of {len(self)} trajectories, least margin {known.min():.2g}"
        )

    def _monotone(self) -> str:
        fall, times = _most(self.fall), _most(self.falls)
        if np.isnan(self.margin).all():
            return ""
        if math.isnan(fall):
            return f"soft margin: {self._why('fall')}"
        if fall <= MONOTONE:
            return "soft margin monotone"
        if fall < 1e-6:
            return f"soft margin monotone up to {fall:.0e}"
        saves = "saves" if times > 1 else "save"
        return f"soft margin FALLS by {fall:.0e} in {times:.0f} {saves}"

    def _energy(self) -> str:
        error = _most(np.abs(self.energy))
        if math.isnan(error):
            return f"energy: {self._why('energy')}"
        balance = "closed to" if error < 1e-2 else "OFF by"
        return f"energy balance {balance} {error:.0e}"

    def _aligned(self) -> str:
        missing, slack = _most(1 - self.alignment), _least(self.aligning)
        if math.isnan(missing):
            return ""
        beyond = f", its integral beyond the bound by {-slack:.0e}" if slack < -1e-6 else ""
        return f"1 − α = {missing:.1e}{beyond}"

    def _kinks(self) -> str:
        kinks, sliding, releases = (_most(x) for x in (self.kinks, self.sliding, self.releases))
        if not kinks > 0:
            return ""
        released = f", {releases:.0f} released" if releases > 0 else ""
        return f"at most {sliding:.0f} of {kinks:.0f} kinks held{released}"

    def _steps(self) -> str:
        rejected = _most(self.rejected)
        return f"{rejected:.0%} of attempts rejected" if rejected > 0 else ""

    def _digits(self) -> str:
        digits = _least(self.digits)
        return "" if math.isnan(digits) else f"{digits:.0f} digits of the softmax weights left"

    def _why(self, name: str) -> str:
        """Why a number is missing, in the words of the first trajectory that says so."""
        return next((reason[name] for reason in self.reasons if name in reason), "not known")


def _most(values: Array) -> float:
    known = values[np.isfinite(values)]
    return float(known.max()) if known.size else math.nan


def _least(values: Array) -> float:
    return -_most(-values)


# --------------------------------------------------------------------------------------------------
# How it is made
# --------------------------------------------------------------------------------------------------


def witness(problem: Objective, rule: object) -> dict[str, Observer]:
    """What has to be observed at the save points for a certificate: the soft margin and α in the
    rule's own norm."""
    norm = getattr(rule, "norm", None)
    if not classifies(problem) or not isinstance(norm, Norm):
        return {}
    observers: dict[str, Observer] = {"alignment": alignment(norm)}
    if problem.loss.tail.inverse is not None:
        observers["soft"] = soft_margin(norm)
    return observers


def certify(
    problem: Objective, values: Mapping[str, Array], witnessed: Mapping[str, Array], final: State
) -> Certificate:
    """The certificate of a run from its saved ``values (K, B)``, what its `witness` saw, and its
    final state."""
    gained, spent = risen(values["lam"]), risen(values["dissipated"])
    numbers = {"energy": (spent / positive(gained) - 1, "the level did not rise")}
    numbers |= _classified(problem, values, witnessed, final)
    numbers |= _on_kinks(problem, values, final)
    rejected, accepted = (risen(values[f"tally_{name}"]) for name in ("rejected", "accepted"))
    numbers["rejected"] = rejected / positive(accepted + rejected), "no step was tried"
    return Certificate.explained(numbers)


def _classified(
    problem: Objective, values: Mapping[str, Array], witnessed: Mapping[str, Array], final: State
) -> dict[str, Explained]:
    """Margins and alignment, of classification only."""
    unknown = np.full_like(values["lam"], np.nan)
    if not classifies(problem):
        names = ("margin", "digits", "fall", "falls", "aligning", "alignment")
        return dict.fromkeys(names, (unknown[0], "not a classification problem"))
    with torch.no_grad():
        margin = _array(problem.margins(final.w).amin(-1))
        digits = _array(_digits_left(problem, final.w))
    soft, alpha = (witnessed.get(name, unknown) for name in ("soft", "alignment"))
    fall = falls(positive(soft))
    largest = peak(fall)
    beyond = np.where(np.isnan(largest), np.nan, (fall > MONOTONE).sum(0))
    slack = _slack(positive(soft), alpha, values["relative"], problem.degree)
    why, why_alignment = _reasons(witnessed)
    return {
        "margin": (margin, ""),
        "digits": (digits, ""),
        "fall": (largest, why),
        "falls": (beyond, why),
        "aligning": (slack, why),
        "alignment": (np.where(margin > 0, last(alpha), np.nan), why_alignment),
    }


def _reasons(witnessed: Mapping[str, Array]) -> tuple[str, str]:
    """Why the soft margin, and why the alignment is not known."""
    if not witnessed:
        return "the rule has no norm", "the rule has no norm"
    if "soft" not in witnessed:
        return "the loss has no inverse", "not separated"
    return "the loss never came below ℓ(0) at two saves", "not separated"


def _digits_left(problem: Problem, w: Float[Tensor, "B P"]) -> Float[Tensor, " B"]:
    """How many digits of the softmax weights survive a rounding error in every weight."""
    generator, eps = torch.Generator().manual_seed(0), torch.finfo(w.dtype).eps
    p = problem.weights(w)  # (B, M)
    counted = p >= _COUNTED * p.amax(-1, keepdim=True)
    lost = torch.full_like(p[:, 0], eps)  # (B,)
    for _ in range(_PROBES):
        signs = torch.randint(2, w.shape[1:], generator=generator).to(w) * 2 - 1
        moved = problem.weights(w * (1 + eps * signs))
        change = torch.where(counted, (moved / p - 1).abs(), 0.0)
        lost = torch.maximum(lost, change.amax(-1))
    return -torch.log10(lost).clamp_max(0)


def _on_kinks(
    problem: Objective, values: Mapping[str, Array], final: State
) -> dict[str, Explained]:
    none = np.zeros(len(final.w))
    if not problem.kinks:
        return dict.fromkeys(("kinks", "sliding", "releases"), (none, ""))
    unknown, why = none * np.nan, ""
    kinks = sliding = unknown
    if final.multipliers is None:
        why = "the rule does not select a gradient on kinks"
    else:
        kinks = none + final.multipliers.shape[1]
    if "tally_sliding" in values:
        sliding = peak(values["tally_sliding"])
    releases = final.tallies.get("releases", torch.from_numpy(none))
    return {"kinks": (kinks, why), "sliding": (sliding, why), "releases": (_array(releases), "")}


def _slack(soft: Array, alpha: Array, sigma: Array, degree: float) -> Float[Array, " B"]:
    """log(γ̃₂/γ̃₁)/L − ∫(1/α − 1)dσ over the saves where γ̃ > 0. Between two saves the integrand
    counts as the lesser of its ends, so that a negative slack is a violation and not the saves'
    spacing."""
    excess = 1 / positive(alpha) - 1
    least = np.minimum(excess[1:], excess[:-1])
    part = np.diff(np.log(soft), axis=0) / degree - np.diff(sigma, axis=0) * least
    known = np.isfinite(part)
    return np.where(known.any(0), part.sum(0, where=known), np.nan)


def _array(tensor: Tensor) -> Array:
    return tensor.detach().cpu().double().numpy()
