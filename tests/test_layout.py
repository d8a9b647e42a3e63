"""Blocks laid one after the other in flat weights."""

import torch

from flowsim.layout import Block, lay_out


def test_blocks_follow_each_other():
    first, second = lay_out({"W": (2, 3), "b": (4,)})
    assert (first, second) == (Block("W", 0, (2, 3)), Block("b", 6, (4,)))
    assert (first.size, second.slice) == (6, slice(6, 10))


def test_a_block_is_a_view_of_the_flat_weights():
    _, b = lay_out({"W": (2, 3), "V": (2, 2)})
    w = torch.arange(20.0).view(2, 10)
    assert b.of(w).tolist() == [[[6, 7], [8, 9]], [[16, 17], [18, 19]]]
    b.of(w).zero_()
    assert not w[:, 6:].any()
