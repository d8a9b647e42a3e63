"""What a theorem says of a flow: a residual, and what it may be at most."""

from dataclasses import dataclass
from typing import Any

EXACT = 1e-8  # bound on identities that hold up to rounding

SHARP = 1e-10  # the same where nothing is differentiated


@dataclass(frozen=True)
class Check:
    """A residual and what it may be at most; NaN where the theory says nothing, as before the data
    are separated. Both are tensors or both arrays, or the bound is a number."""

    residual: Any
    bound: Any

    @staticmethod
    def of_ratio(found: Any, said: Any, bound: Any) -> "Check":
        """That both are equal: |found/said − 1|."""
        return Check(abs(found / said - 1), bound)

    @property
    def holds(self) -> bool:
        """Whether no residual exceeds its bound; those that are NaN do not count."""
        return not bool((self.residual > self.bound).any())
