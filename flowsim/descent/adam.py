"""Adam and its relatives: each weight moves by an average of its gradients over the root of their
mean square."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flowsim.checks import require_not_negative, require_share
from flowsim.descent.learning_rates import LearningRateLike
from flowsim.descent.momentum import Frame, no_frame
from flowsim.descent.rule import Memory, Step, WithLearningRate
from flowsim.motion.state import State
from flowsim.norms.norm import Norm
from flowsim.norms.vector import Linf
from flowsim.numerics.shapes import PerTrajectory
from flowsim.problems.objective import Objective


@dataclass(frozen=True, repr=False)
class Adaptive(WithLearningRate):
    """Each weight by its own gradients, g = ∇𝓛 (the gradient of the **sum** loss), k = 1, 2, …:

        m ← β₁m + (1 − β₁)g,   v ← β₂v + (1 − β₂)g²,   w ← (1 − ηλ)w − η·(m/a)/(√v/b + ε),

    with a = 1 − β₁ᵏ and b² = 1 − β₂ᵏ where ``corrected``, else 1. ``betas`` are β₁ and β₂; β₂ =
    None stands for a sum, v ← v + g². ``decay`` is λ. `Adam`, `AdamW`, `RMSProp` and `AdaGrad` make
    the usual ones.

    ε is in units of g, also where g underflows: with ε = 0 a step does not depend on the scale of
    the loss. A coordinate without a gradient stays, and one below 1e-300 of ‖g‖₁ has none.

    Lengths are in ℓ∞. t is Σ η, the time of the flow w' = −g/(|g| + ε), which is the limit η → 0
    for fixed β's; for a sum it is Σ η², that of w' = −g/√∫g²."""

    lr: LearningRateLike
    betas: tuple[float, float | None] = (0.9, 0.999)
    eps: float = 1e-8
    decay: float = 0.0
    corrected: bool = True
    name: str = "adaptive descent"

    memoryless = False
    norm = Linf()

    def __post_init__(self) -> None:
        super().__post_init__()
        pair = isinstance(self.betas, tuple | list) and len(self.betas) == 2
        if not pair:
            raise ValueError(
                f"{self.name}: got betas={self.betas!r}, expected two numbers, try (0.9, 0.999)"
            )
        first, second = self.betas
        forgets = second is not None
        require_share(self.name, beta1=first, beta2=second if forgets else 0.0)
        require_not_negative(self.name, eps=self.eps)

    @property
    def title(self) -> str:
        return self.name

    @property
    def details(self) -> list[str]:
        return [f"ε = {self.eps:g}"]

    @property
    def kind(self) -> str:
        return "Adaptive sum" if self.betas[1] is None else "Adaptive"

    def blank(self, problem: Objective, state: State) -> Memory:
        memory = {"frame": no_frame(state), "second": torch.zeros_like(state.w)}
        # without β₁ the first moment is the gradient, and nothing to remember
        if self.betas[0] > 0:
            memory["first"] = torch.zeros_like(state.w)
        return memory

    def plan(
        self, problem: Objective, norm: Norm, state: State, log_lr: PerTrajectory
    ) -> tuple[Step, Memory]:
        head = _head(state.w.dtype)
        frame = Frame.follow(problem, state, self._forget, head)
        first, second = self._moments(state, frame)
        age = state.memory["age"] + 1
        lr = torch.exp(log_lr)
        move = self._move(first, second, frame, age, lr)
        sums = self.betas[1] is None
        log_time = 2 * log_lr if sums else log_lr
        own = {"frame": frame.log_unit, "second": second}
        if "first" in state.memory:
            own["first"] = first
        return Step(move, log_time=log_time), own

    @property
    def _forget(self) -> float:
        beta1, beta2 = self.betas
        if beta2 is None:
            return 1.0
        return max(beta1, math.sqrt(beta2))

    def _moments(self, state: State, frame: Frame) -> tuple[Tensor, Tensor]:
        """Averages of −g and of g², in units of the frame and of its square."""
        beta1, beta2 = self.betas
        memory = state.memory
        g = frame.gradient(state)
        kept = 1.0 if beta2 is None else beta2
        added = 1.0 if beta2 is None else 1 - beta2
        second = kept * frame.keep**2 * memory["second"]
        second = torch.addcmul(second, g, g, value=added)
        if "first" not in memory:
            return g, second
        first = beta1 * frame.keep * memory["first"]
        first = torch.add(first, g, alpha=1 - beta1)
        return first, second

    def _move(self, first: Tensor, second: Tensor, frame: Frame, age: Tensor, lr: Tensor) -> Tensor:
        """η(m/a)/(√v/b + ε), with 0/0 = 0, as m over √v·a/(bη) + aε/η."""
        beta1, beta2 = self.betas
        a = b = torch.ones_like(age)
        if self.corrected and beta2 is not None:
            a = 1 - beta1**age
            b = torch.sqrt(1 - beta2**age)
        # not below the root of the smallest square, so that no gradient stays at rest
        numbers = torch.finfo(second.dtype)
        smallest = (numbers.tiny * numbers.eps) ** 0.5
        eps = frame.inside(self.eps, 1).clamp_min(smallest)
        factor = (a / (b * lr)).to(second)
        term = (a * eps / lr).to(second)
        divisor = second.sqrt()
        divisor.mul_(factor[:, None])
        divisor.add_(term[:, None])
        return first / divisor


def _head(dtype: torch.dtype) -> float:
    """Where in the range of numbers the gradient is put: squares of all its entries are inside."""
    return 0.46 * math.log(torch.finfo(dtype).max)


def Adam(
    lr: LearningRateLike = 1e-3,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    corrected: bool = True,
) -> Adaptive:
    """Adam (Kingma & Ba 2015). ``eps=0`` is sign descent with averages, at any scale of the loss;
    ``corrected=False`` leaves out the bias correction."""
    return Adaptive(lr, betas, eps, 0.0, corrected, "Adam")


def AdamW(
    lr: LearningRateLike = 1e-3,
    *,
    decay: float = 1e-2,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> Adaptive:
    """Adam with decoupled weight decay λ (Loshchilov & Hutter 2019). Where it comes to rest it has
    solved min 𝓛(w) over ‖w‖_∞ ≤ 1/λ (Xie & Li 2024); `diagnostics.frank_wolfe_gap` tells how
    nearly."""
    return Adaptive(lr, betas, eps, decay, True, "AdamW")


def RMSProp(lr: LearningRateLike = 1e-2, *, beta: float = 0.99, eps: float = 1e-8) -> Adaptive:
    """w ← w − η g/(√v + ε), v the average of g² (Tieleman & Hinton 2012)."""
    betas = (0.0, beta)
    return Adaptive(lr, betas, eps, 0.0, False, "RMSProp")


def AdaGrad(lr: LearningRateLike = 1e-2, *, eps: float = 1e-10) -> Adaptive:
    """w ← w − η g/(√Σg² + ε) (Duchi, Hazan & Singer 2011)."""
    sums = (0.0, None)
    return Adaptive(lr, sums, eps, 0.0, False, "AdaGrad")
