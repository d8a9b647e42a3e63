"""Names of shapes stand for the shapes that they say."""

import pytest
import torch

from flowsim.numerics import shapes

SHAPES = {
    shapes.Row: (5,),
    shapes.Rows: (2, 5),
    shapes.PerTrajectory: (2,),
    shapes.PerKink: (2, 7),
    shapes.PerPair: (2, 3, 4),
    shapes.Outputs: (2, 3, 1),
}


@pytest.mark.parametrize("kind", SHAPES, ids=str)
def test_a_name_accepts_its_shape_and_no_other(kind):
    shape = SHAPES[kind]
    assert isinstance(torch.zeros(shape), kind)
    assert not isinstance(torch.zeros(*shape, 1), kind)
    assert not isinstance(torch.zeros(shape, dtype=torch.long), kind)
