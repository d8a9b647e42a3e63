"""Shapes with a name. B trajectories, P weights, N examples, C outputs, K kinks, m hidden units."""

from typing import TypeAlias

from jaxtyping import Float
from torch import Tensor

PerVector: TypeAlias = Float[Tensor, "*batch"]
"""One number for each row of a batch of any form."""

Vectors: TypeAlias = Float[Tensor, "*batch P"]
"""Flat vectors of a batch of any form."""

Matrices: TypeAlias = Float[Tensor, "*batch m n"]
"""Matrices of a batch of any form."""

Row: TypeAlias = Float[Tensor, " P"]
"""Flat weights of one trajectory, or what lies in their place, such as a gradient."""

Rows: TypeAlias = Float[Tensor, "B P"]
"""One `Row` for each trajectory."""

PerTrajectory: TypeAlias = Float[Tensor, " B"]
"""One number for each trajectory."""

PerKink: TypeAlias = Float[Tensor, "B K"]
"""One number for each kink."""

PerPair: TypeAlias = Float[Tensor, "B N m"]
"""One number for each example and hidden unit."""

Outputs: TypeAlias = Float[Tensor, "B N C"]
"""Outputs of a net on each example, or what pulls at them."""
