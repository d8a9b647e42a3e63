"""The products of a programme, against the matrices A, K and E formed by loops."""

import pytest
import torch

from tests.oracles.hinged_programmes import bound, programme

N, D, M = 5, 3, 4


@pytest.fixture(scope="module")
def task():
    return programme(bound("l2", D, M), N, D, M, 0.3, 0, curb=0.1)


def numbers(*shape, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_rows_and_columns_are_one_matrix(task):
    v = numbers(M, D + 1)
    by_hand = torch.stack(
        [
            sum(
                task.slope[j, r] * (task.x[r] @ v[j, :D]) + task.ends[j, 0, r] * v[j, D]
                for j in range(M)
            )
            for r in range(N)
        ]
    )
    torch.testing.assert_close(task.rows(v), by_hand)
    p = numbers(N)
    torch.testing.assert_close(p @ task.rows(v), (task.columns(p) * v).sum())


def test_hinges_and_their_forces_are_one_matrix(task):
    s, p, v = numbers(M, N), numbers(N), numbers(M, D + 1)
    by_hand = torch.stack([sum(task.kinks[j, r] * s[j, r] for j in range(M)) for r in range(N)])
    torch.testing.assert_close(task.hinge_loss(s), by_hand)
    torch.testing.assert_close(p @ task.hinge_loss(s), (task.largest_force(p) * s).sum())
    f = torch.where(task.live, numbers(M, N, seed=4), 0.0)
    assert bool(task.live.any())
    torch.testing.assert_close((f * task.along(v)).sum(), (task.forces_on_weights(f) * v).sum())


def test_the_gradient_is_that_of_the_lagrangian(task):
    p, f, v = numbers(N), torch.where(task.live, numbers(M, N), 0.0), numbers(M, D + 1)

    def lagrangian(v):
        step = v - task.centre
        bent = 0.5 * torch.einsum("ja,jab,jb->", step, task.curb, step)
        return p @ task.rows(v) - (f * task.along(v)).sum() - bent

    expected = task.flat(torch.func.grad(lagrangian)(v))
    torch.testing.assert_close(task.gradient(p, f, v), expected)
    torch.testing.assert_close(task.margins(v, 0 * f), task.offset + task.rows(v))


def test_weights_in_the_order_of_a_net(task):
    v = numbers(M, D + 1)
    flat = task.flat(v)
    assert flat.tolist() == [*v[:, :D].flatten().tolist(), *v[:, D].tolist()]
    assert torch.equal(task.blocked(flat), v)
