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
from numpy import ndarray as Array

from flowsim.diagnostics.margins import Observer, classifies, soft_margin
from flowsim.diagnostics.series import (
    Column,
    Series,
    as_array,
    changes,
    falls,
    last,
    peak,
    positive,
    risen,
)
from flowsim.diagnostics.stationarity import alignment
from flowsim.motion.state import State
from flowsim.norms.norm import Norm
from flowsim.numerics.shapes import PerTrajectory, Rows
from flowsim.problems.objective import Objective
from flowsim.problems.problem import Problem

Explained: TypeAlias = tuple[Column, str]
"""A number of each trajectory, and why it is NaN where it is."""

Saved: TypeAlias = Mapping[str, Array]
"""Numbers of a run by name, ``(K, B, …)``."""

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

    energy: Column
    fall: Column
    falls: Column
    aligning: Column
    alignment: Column
    sliding: Column
    kinks: Column
    releases: Column
    rejected: Column
    digits: Column
    margin: Column
    reasons: tuple[Mapping[str, str], ...]

    @staticmethod
    def names() -> list[str]:
        """The numbers."""
        names = [field.name for field in fields(Certificate)]
        return names[:-1]  # all but the reasons

    @property
    def numbers(self) -> dict[str, Column]:
        """The numbers by name."""
        return {name: getattr(self, name) for name in self.names()}

    def __len__(self) -> int:
        return len(self.reasons)

    def select(self, rows: list[int]) -> "Certificate":
        """The certificate of some of the trajectories."""
        kept = {name: values[rows] for name, values in self.numbers.items()}
        reasons = tuple(self.reasons[row] for row in rows)
        return Certificate(**kept, reasons=reasons)

    def record(self) -> dict[str, Any]:
        """As JSON can hold it; numbers that are not finite are None."""
        found: dict[str, Any] = {}
        for name, values in self.numbers.items():
            numbers = values.tolist()
            found[name] = [x if math.isfinite(x) else None for x in numbers]
        found["reasons"] = [dict(reason) for reason in self.reasons]
        found["verdict"] = self.verdict
        return found

    @staticmethod
    def read(record: Mapping[str, Any]) -> "Certificate":
        """The inverse of `record`."""
        names = Certificate.names()
        numbers = {name: np.array(record[name], dtype=float) for name in names}
        return Certificate(**numbers, reasons=tuple(record["reasons"]))

    @staticmethod
    def unknown(trajectories: int, why: str) -> "Certificate":
        """No number at all, for one reason."""
        nothing = np.full(trajectories, np.nan)
        numbers = dict.fromkeys(Certificate.names(), (nothing, why))
        return Certificate.explained(numbers)

    @staticmethod
    def explained(numbers: Mapping[str, Explained]) -> "Certificate":
        """From numbers with their reasons; an empty reason says nothing."""
        values = {name: value for name, (value, _) in numbers.items()}
        trajectories = range(len(values["energy"]))
        reasons = tuple(_missing(numbers, b) for b in trajectories)
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
        wrong = (self.margin <= 0).sum()
        least = _least(self.margin)
        if math.isnan(least):
            return self._why("margin")
        if wrong == 0:
            return "separated"
        return f"NOT separated in {wrong} of {len(self)} trajectories, least margin {least:.2g}"

    def _monotone(self) -> str:
        fall = _most(self.fall)
        times = _most(self.falls)
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
        missing = _most(1 - self.alignment)
        slack = _least(self.aligning)
        if math.isnan(missing):
            return ""
        beyond = f", its integral beyond the bound by {-slack:.0e}" if slack < -1e-6 else ""
        return f"1 − α = {missing:.1e}{beyond}"

    def _kinks(self) -> str:
        kinks = _most(self.kinks)
        sliding = _most(self.sliding)
        releases = _most(self.releases)
        if not kinks > 0:
            return ""
        released = f", {releases:.0f} released" if releases > 0 else ""
        return f"at most {sliding:.0f} of {kinks:.0f} kinks held{released}"

    def _steps(self) -> str:
        rejected = _most(self.rejected)
        if not rejected > 0:
            return ""
        return f"{rejected:.0%} of attempts rejected"

    def _digits(self) -> str:
        digits = _least(self.digits)
        if math.isnan(digits):
            return ""
        return f"{digits:.0f} digits of the softmax weights left"

    def _why(self, name: str) -> str:
        """Why a number is missing, in the words of the first trajectory that says so."""
        said = [reason[name] for reason in self.reasons if name in reason]
        return said[0] if said else "not known"


def _missing(numbers: Mapping[str, Explained], b: int) -> dict[str, str]:
    """Why numbers of a trajectory are NaN, by their names."""
    found = {}
    for name, (value, why) in numbers.items():
        if why and np.isnan(value[b]):
            found[name] = why
    return found


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


def certify(problem: Objective, values: Saved, witnessed: Saved, final: State) -> Certificate:
    """The certificate of a run from its saved ``values (K, B)``, what its `witness` saw, and its
    final state."""
    gained = risen(values["lam"])
    spent = risen(values["dissipated"])
    numbers = {"energy": (spent / positive(gained) - 1, "the level did not rise")}
    numbers |= _classified(problem, values, witnessed, final)
    numbers |= _on_kinks(problem, values, final)
    rejected = risen(values["tally_rejected"])
    accepted = risen(values["tally_accepted"])
    share = rejected / positive(accepted + rejected)
    numbers["rejected"] = (share, "no step was tried")
    return Certificate.explained(numbers)


def _classified(
    problem: Objective, values: Saved, witnessed: Saved, final: State
) -> dict[str, Explained]:
    """Margins and alignment, of classification only."""
    unknown = np.full_like(values["lam"], np.nan)
    if not classifies(problem):
        names = ("margin", "digits", "fall", "falls", "aligning", "alignment")
        return dict.fromkeys(names, (unknown[0], "not a classification problem"))
    with torch.no_grad():
        margins = problem.margins(final.w)
        digits = _digits_left(problem, final.w)
    margin = as_array(margins.amin(-1))
    soft = positive(witnessed.get("soft", unknown))
    alpha = witnessed.get("alignment", unknown)
    fall = falls(soft)
    largest = peak(fall)
    times = (fall > MONOTONE).sum(0)
    why, why_alignment = _reasons(witnessed)
    return {
        "margin": (margin, ""),
        "digits": (as_array(digits), ""),
        "fall": (largest, why),
        "falls": (np.where(np.isnan(largest), np.nan, times), why),
        "aligning": (_slack(soft, alpha, values["relative"], problem.degree), why),
        "alignment": (np.where(margin > 0, last(alpha), np.nan), why_alignment),
    }


def _reasons(witnessed: Saved) -> tuple[str, str]:
    """Why the soft margin, and why the alignment is not known."""
    if not witnessed:
        return "the rule has no norm", "the rule has no norm"
    if "soft" not in witnessed:
        return "the loss has no inverse", "not separated"
    return "the loss never came below ℓ(0) at two saves", "not separated"


def _digits_left(problem: Problem, w: Rows) -> PerTrajectory:
    """How many digits of the softmax weights survive a rounding error in every weight."""
    generator = torch.Generator().manual_seed(0)
    eps = torch.finfo(w.dtype).eps
    p = problem.weights(w)  # (B, M)
    largest = p.amax(-1, keepdim=True)
    counted = p >= _COUNTED * largest
    lost = torch.full_like(p[:, 0], eps)  # (B,)
    for _ in range(_PROBES):
        coins = torch.randint(2, w.shape[1:], generator=generator)
        signs = coins.to(w) * 2 - 1
        moved = problem.weights(w * (1 + eps * signs))
        change = (moved / p - 1).abs()
        change = torch.where(counted, change, 0.0)
        lost = torch.maximum(lost, change.amax(-1))
    return -torch.log10(lost).clamp_max(0)


def _on_kinks(problem: Objective, values: Saved, final: State) -> dict[str, Explained]:
    none = np.zeros(len(final.w))
    if not problem.kinks:
        return dict.fromkeys(("kinks", "sliding", "releases"), (none, ""))
    unknown = none * np.nan
    why = ""
    kinks = sliding = unknown
    if final.multipliers is None:
        why = "the rule does not select a gradient on kinks"
    else:
        kinks = none + final.multipliers.shape[1]
    if "tally_sliding" in values:
        sliding = peak(values["tally_sliding"])
    releases = final.tallies.get("releases", torch.from_numpy(none))
    return {
        "kinks": (kinks, why),
        "sliding": (sliding, why),
        "releases": (as_array(releases), ""),
    }


def _slack(soft: Series, alpha: Series, sigma: Series, degree: float) -> Column:
    """log(γ̃₂/γ̃₁)/L − ∫(1/α − 1)dσ over the saves where γ̃ > 0. Between two saves the integrand
    counts as the lesser of its ends, so that a negative slack is a violation and not the saves'
    spacing."""
    excess = 1 / positive(alpha) - 1
    least = np.minimum(excess[1:], excess[:-1])
    allowed = changes(np.log(soft)) / degree
    part = allowed - changes(sigma) * least
    known = np.isfinite(part)
    total = part.sum(0, where=known)
    return np.where(known.any(0), total, np.nan)
