"""How far a run can be trusted: one frozen object on every trajectory, saved with it, with its
verdict in a sentence.

All of it is measured in the norm that the rule descends in, at the save points and at the end. A
number that cannot be had is NaN, with the reason in ``reasons``."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeAlias, TypeGuard

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray as Array
from torch import Tensor

from flowsim.diagnostics.margins import Observer, soft_margin
from flowsim.diagnostics.stationarity import alignment
from flowsim.motion.state import State
from flowsim.norms.norm import Norm
from flowsim.problems.objective import Objective
from flowsim.problems.problem import Problem

Reasons: TypeAlias = tuple[dict[str, str], ...]


MONOTONE = 1e-12  # relative falls of the soft margin that are rounding


_SUPPORT = 1e-3  # softmax weights above this share of the largest have their digits counted


_PROBES = 4


_ATTEMPTS = ("accepted", "rejected")


NO_MARGINS = "not a classification problem"


@dataclass(frozen=True)
class Certificate:
    """What a run shows of itself, for each trajectory ``(B,)``.

    ``energy``       ∫‖h‖_* ds over the rise of Λ, less one: 0 along an exact flow, positive for coarse steps
    ``fall``         largest relative fall of the soft margin in the rule's own norm from one save to the next, once
                     the loss guarantees that it rises (TGKV, Thm 1 and 22); ``falls`` counts those
                     beyond rounding
    ``aligning``     slack of ∫(1/α − 1)dσ ≤ log(γ̃₂/γ̃₁)/L from there on (TGKV, Eq. 46): negative where it is violated
    ``alignment``    α at the last save
    ``sliding``      the most kinks that were held at a save; ``kinks`` is how many there are
    ``releases``     sliding pairs that had two ways to go on
    ``rejected``     share of attempted steps that were not accurate enough
    ``digits``       decimal digits of the softmax weights that rounding leaves at the end
    ``margin``       least margin at the end, not normalised; not positive where the data are not separated

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

    def __len__(self) -> int:
        return len(self.reasons)

    def select(self, rows: list[int]) -> "Certificate":
        """The certificate of some of the trajectories."""
        kept = {name: getattr(self, name)[rows] for name in self.names()}
        return Certificate(**kept, reasons=tuple(self.reasons[row] for row in rows))

    def record(self) -> dict[str, Any]:
        """As JSON can hold it; numbers that are not finite are None."""
        numbers = {
            name: [float(v) if math.isfinite(v) else None for v in getattr(self, name)]
            for name in self.names()
        }
        return numbers | {
            "reasons": [dict(reason) for reason in self.reasons],
            "verdict": self.verdict,
        }

    @staticmethod
    def read(record: Mapping[str, Any]) -> "Certificate":
        """The inverse of `record`."""
        numbers = {
            n: np.array([np.nan if v is None else v for v in record[n]])
            for n in Certificate.names()
        }
        return Certificate(**numbers, reasons=tuple(record["reasons"]))

    @staticmethod
    def unknown(trajectories: int, why: str) -> "Certificate":
        """No number at all, for one reason."""
        nothing = {name: np.full(trajectories, np.nan) for name in Certificate.names()}
        return Certificate(**nothing, reasons=(dict.fromkeys(nothing, why),) * trajectories)

    @property
    def verdict(self) -> str:
        """The worst of all trajectories in a sentence."""
        parts = [
            self._separated(),
            self._monotone(),
            self._energy(),
            self._aligned(),
            self._kinks(),
            self._steps(),
        ]
        return "; ".join(filter(None, [*parts, self._digits()]))

    def __str__(self) -> str:
        return self.verdict

    def _separated(self) -> str:
        known = self.margin[np.isfinite(self.margin)]
        if not known.size:
            return self._why("margin")
        if (known > 0).all():
            return "separated"
        return f"NOT separated in {(known <= 0).sum()} of {len(self)} trajectories, least margin {known.min():.2g}"

    def _monotone(self) -> str:
        fall = _most(self.fall)
        if np.isnan(self.margin).all():
            return ""
        if math.isnan(fall):
            return f"soft margin: {self._why('fall')}"
        if fall <= MONOTONE:
            return "soft margin monotone"
        times = f"{_most(self.falls):.0f} save{'s' if _most(self.falls) > 1 else ''}"
        return (
            f"soft margin monotone up to {fall:.0e}"
            if fall < 1e-6
            else f"soft margin FALLS by {fall:.0e} in {times}"
        )

    def _energy(self) -> str:
        off = _most(np.abs(self.energy))
        if math.isnan(off):
            return f"energy: {self._why('energy')}"
        return (
            f"energy balance closed to {off:.0e}"
            if off < 1e-2
            else f"energy balance OFF by {off:.0e}"
        )

    def _aligned(self) -> str:
        far, slack = _most(1 - self.alignment), -_most(-self.aligning)
        if math.isnan(far):
            return ""
        return f"1 − α = {far:.1e}" + (
            f", its integral beyond the bound by {-slack:.0e}" if slack < -1e-6 else ""
        )

    def _kinks(self) -> str:
        if not _most(self.kinks) > 0:
            return ""
        held = f"at most {_most(self.sliding):.0f} of {_most(self.kinks):.0f} kinks held"
        return held + (f", {_most(self.releases):.0f} released" if _most(self.releases) > 0 else "")

    def _steps(self) -> str:
        return (
            f"{_most(self.rejected):.0%} of attempts rejected" if _most(self.rejected) > 0 else ""
        )

    def _digits(self) -> str:
        least = -_most(-self.digits)
        return "" if math.isnan(least) else f"{least:.0f} digits of the softmax weights left"

    def _why(self, name: str) -> str:
        """Why a number is missing, in the words of the first trajectory that says so."""
        return next((reason[name] for reason in self.reasons if name in reason), "not known")


def _most(values: Array) -> float:
    known = values[np.isfinite(values)]
    return float(known.max()) if known.size else math.nan


# --------------------------------------------------------------------------------------------------
# How it is made
# --------------------------------------------------------------------------------------------------


def witness(problem: Objective, rule: Any) -> dict[str, Observer]:
    """What has to be observed at the save points for a certificate: the soft margin and α in the
    rule's own norm."""
    if not _classifies(problem) or not isinstance(getattr(rule, "norm", None), Norm):
        return {}
    found: dict[str, Observer] = {"alignment": alignment(rule.norm)}
    return found | (
        {"soft": soft_margin(rule.norm)} if problem.loss.tail.inverse is not None else {}
    )


def certify(
    problem: Objective, values: Mapping[str, Array], witnessed: Mapping[str, Array], final: State
) -> Certificate:
    """The certificate of a run from its saved ``values (K, B)``, what its `witness` saw, and its
    final state."""
    reasons: tuple[dict[str, str], ...] = tuple({} for _ in final.w)
    numbers = _at_the_end(problem, final, reasons)
    numbers |= _along(problem, values, witnessed, numbers["margin"], reasons)
    numbers |= _work(problem, values, final, reasons)
    return Certificate(**numbers, reasons=reasons)


def _at_the_end(problem: Objective, final: State, reasons: Reasons) -> dict[str, Array]:
    """The least margin, and how many digits of the softmax weights survive a rounding error in
    every weight."""
    if not _classifies(problem):
        nothing = np.full(len(final.w), np.nan)
        for name in ("margin", "digits"):
            _explain(reasons, name, nothing, NO_MARGINS)
        return {"margin": nothing, "digits": nothing}
    generator, eps = torch.Generator().manual_seed(0), torch.finfo(final.w.dtype).eps
    with torch.no_grad():
        p = problem.weights(final.w)
        kept, lost = p >= _SUPPORT * p.amax(-1, keepdim=True), torch.full_like(p[:, 0], eps)
        for _ in range(_PROBES):
            signs = torch.randint(2, final.w.shape[1:], generator=generator).to(final.w) * 2 - 1
            moved = problem.weights(final.w * (1 + eps * signs))
            lost = torch.maximum(lost, torch.where(kept, (moved / p - 1).abs(), 0.0).amax(-1))
        margin = problem.margins(final.w).amin(-1)
    return {"margin": _array(margin), "digits": _array(-torch.log10(lost).clamp_max(0))}


def _along(
    problem: Objective,
    values: Mapping[str, Array],
    witnessed: Mapping[str, Array],
    margin: Array,
    reasons: Reasons,
) -> dict[str, Array]:
    """Energy, soft margin and alignment over the saves."""
    unknown = np.full_like(values["lam"], np.nan)
    soft, alpha = (witnessed.get(name, unknown) for name in ("soft", "alignment"))
    soft = np.where(soft > 0, soft, np.nan)
    risen, spent = (_last(values[name]) - values[name][0] for name in ("lam", "dissipated"))
    fall = falls(soft)
    found = {
        "energy": spent / np.where(risen > 0, risen, np.nan) - 1,
        "fall": _peak(fall),
        "falls": np.where(np.isnan(_peak(fall)), np.nan, (fall > MONOTONE).sum(0)),
        "aligning": _slack(soft, alpha, values["relative"], problem.degree),
        "alignment": np.where(margin > 0, _last(alpha), np.nan),
    }
    _explain(reasons, "energy", found["energy"], "the level did not rise")
    missing = "the rule has no norm" if _classifies(problem) else NO_MARGINS
    seen = (
        "the loss never came below ℓ(0) at two saves"
        if "soft" in witnessed
        else "the loss has no inverse"
    )
    for name in ("fall", "falls", "aligning"):
        _explain(reasons, name, found[name], seen if witnessed else missing)
    _explain(reasons, "alignment", found["alignment"], "not separated" if witnessed else missing)
    return found


def _work(
    problem: Objective, values: Mapping[str, Array], final: State, reasons: Reasons
) -> dict[str, Array]:
    """Kinks and attempts."""
    unknown, none = np.full(len(final.w), np.nan), np.zeros(len(final.w))
    selects = final.multipliers is not None
    kinks = none + final.multipliers.shape[1] if final.multipliers is not None else unknown
    held = _peak(values["tally_sliding"]) if "tally_sliding" in values else unknown
    found = {
        "kinks": kinks,
        "sliding": held,
        "releases": _array(final.tallies.get("releases", torch.from_numpy(none))),
    }
    if not problem.kinks:
        found = {"kinks": none, "sliding": none, "releases": none}
    accepted, rejected = (
        _last(values[f"tally_{name}"]) - values[f"tally_{name}"][0] for name in _ATTEMPTS
    )
    tried = accepted + rejected
    found["rejected"] = rejected / np.where(tried > 0, tried, np.nan)
    if not selects:
        for name in ("kinks", "sliding"):
            _explain(reasons, name, found[name], "the rule does not select a gradient on kinks")
    _explain(reasons, "rejected", found["rejected"], "no step was tried")
    return found


def falls(soft: Array) -> Array:
    """Relative falls of positive numbers ``(K, B)`` from row to row: 0 where they rise, NaN where
    unknown."""
    return np.where(
        np.isnan(soft[1:] + soft[:-1]), np.nan, np.maximum(1 - soft[1:] / soft[:-1], 0.0)
    )


def _slack(soft: Array, alpha: Array, sigma: Array, degree: float) -> Array:
    """log(γ̃₂/γ̃₁)/L − ∫(1/α − 1)dσ over the saves where γ̃ > 0. Between two saves the integrand
    counts as the lesser of its ends, so that a negative slack is a violation and not the saves'
    spacing."""
    excess = 1 / np.where(alpha > 0, alpha, np.nan) - 1
    part = np.diff(np.log(soft), axis=0) / degree - np.diff(sigma, axis=0) * np.minimum(
        excess[1:], excess[:-1]
    )
    known = np.isfinite(part)
    return np.where(known.any(0), np.where(known, part, 0.0).sum(0), np.nan)


def _classifies(problem: Objective) -> TypeGuard[Problem]:
    return isinstance(problem, Problem) and problem.loss.reading.targets != "values"


def _explain(reasons: Reasons, name: str, values: Array, why: str) -> None:
    for reason, value in zip(reasons, values, strict=True):
        if np.isnan(value):
            reason.setdefault(name, why)


def _peak(values: Array) -> Array:
    """Each column's largest known value; NaN where none is."""
    return np.where(
        np.isnan(values).all(0),
        np.nan,
        np.where(np.isnan(values), -np.inf, values).max(0, initial=-np.inf),
    )


def _last(values: Array) -> Array:
    """Each column's last known value; NaN where none is."""
    known = ~np.isnan(values)
    row = len(values) - 1 - known[::-1].argmax(0)
    return np.take_along_axis(values, row[None], 0)[0]


def _array(tensor: Tensor) -> Array:
    return tensor.detach().cpu().double().numpy()
