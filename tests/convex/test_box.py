"""Box-constrained quadratic programmes with block structure, against scipy and the conditions of
optimality."""

import numpy as np
import pytest
import torch
from scipy.optimize import lsq_linear

from flowsim.convex import box
from flowsim.convex.box import LowRank


def instance(seed, groups, size, rank=0, *, batch=1, surplus=3):
    """Blocks XXᵀ as kinks have them, of full rank, and a correction that leaves Q positive
    definite."""
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(batch, groups, size, size + surplus, generator=g, dtype=torch.float64)
    z = 2 * torch.randn(batch, groups, size, generator=g, dtype=torch.float64)
    upper = torch.rand(batch, groups, size, generator=g, dtype=torch.float64)
    if rank == 0:
        return X @ X.mT, z, upper, None
    # E = X̄J and V⁻¹ = I/g + JᵀJ with the normals X̄ = blockdiag(X), as a damped metric gives them
    J = torch.randn(batch, groups, size + surplus, rank, generator=g, dtype=torch.float64)
    gain = 0.1 + torch.rand(batch, 1, 1, generator=g, dtype=torch.float64)
    inverse = torch.eye(rank).double() / gain + J.flatten(1, 2).mT @ J.flatten(1, 2)
    return X @ X.mT, z, upper, LowRank(X @ J, torch.linalg.inv(inverse), inverse)


def matrix(blocks, low_rank):
    """The matrices Q (B, n, n), formed."""
    full = []
    for b in range(len(blocks)):
        Q = torch.block_diag(*blocks[b])
        if low_rank is not None:
            E = low_rank.factor[b].flatten(0, 1)
            Q = Q - E @ torch.linalg.solve(low_rank.inverse[b], E.T)
        full.append(Q)
    return torch.stack(full).numpy()


def by_scipy(Q, z, upper):
    """The same programme as bounded least squares, ‖Rλ − R⁻ᵀz‖² with Q = RᵀR, over the unknowns
    that take part."""
    part = upper > 0
    force = np.zeros_like(z)
    if part.any():
        root = np.linalg.cholesky(Q[np.ix_(part, part)]).T
        target = np.linalg.solve(root.T, z[part])
        force[part] = lsq_linear(root, target, bounds=(0, upper[part]), method="bvls", tol=1e-15).x
    return force


def check_conditions(Q, z, upper, force, close=1e-9):
    """The residual pushes only against bounds that hold."""
    residual = z - Q @ force
    assert (force >= 0).all()
    assert (force <= upper).all()
    assert (residual[force < upper] <= close).all()
    assert (residual[(force > 0) & (upper > 0)] >= -close).all()


@pytest.mark.parametrize("rank", [0, 3, 12])
@pytest.mark.parametrize(("groups", "size"), [(1, 1), (1, 15), (12, 1), (6, 5)])
def test_random_programmes_are_solved_as_by_scipy(groups, size, rank):
    for seed in range(8):
        blocks, z, upper, low_rank = instance(seed, groups, size, rank)
        solution = box.solve_box(blocks, z, upper, low_rank)
        Q = matrix(blocks, low_rank)[0]
        assert bool(solution.solved.all())
        expected = by_scipy(Q, z.flatten().numpy(), upper.flatten().numpy())
        force = solution.force.flatten().numpy()
        assert force == pytest.approx(expected, abs=1e-8)
        check_conditions(Q, z.flatten().numpy(), upper.flatten().numpy(), force)
        inside = (force > 1e-7) & (force < upper.flatten().numpy() - 1e-7)
        assert (solution.free.flatten().numpy() == inside).all()


@pytest.mark.parametrize("rank", [0, 4])
def test_a_batch_is_its_programmes(rank):
    blocks, z, upper, low_rank = instance(0, 4, 6, rank, batch=5)
    together = box.solve_box(blocks, z, upper, low_rank)
    for b in range(5):
        alone = slice(b, b + 1)
        part = (
            None
            if low_rank is None
            else LowRank(low_rank.factor[alone], low_rank.core[alone], low_rank.inverse[alone])
        )
        single = box.solve_box(blocks[alone], z[alone], upper[alone], part)
        assert torch.allclose(single.force[0], together.force[b], rtol=0, atol=1e-12)
        assert bool(together.solved[b])


@pytest.mark.parametrize("rank", [0, 4])
def test_the_solution_does_not_depend_on_the_start(rank):
    blocks, z, upper, low_rank = instance(3, 5, 8, rank)
    cold = box.solve_box(blocks, z, upper, low_rank)
    for start in (
        torch.zeros_like(upper),
        upper,
        0.3 * upper,
        cold.force,
        upper + 5.0,
        upper - 9.0,
    ):
        warm = box.solve_box(blocks, z, upper, low_rank, start)
        assert bool(warm.solved.all())
        assert torch.allclose(warm.force, cold.force, rtol=0, atol=1e-10)


@pytest.mark.parametrize("sign", [-1, 1])
def test_forces_that_all_end_at_one_bound(sign):
    blocks, _, upper, low_rank = instance(1, 3, 4, 2)
    solution = box.solve_box(blocks, sign * torch.full_like(upper, 1e3), upper, low_rank)
    assert torch.equal(solution.force, upper if sign > 0 else torch.zeros_like(upper))
    assert bool(solution.solved.all())
    assert not bool(solution.free.any())


def test_unknowns_without_strength_take_no_part():
    blocks, z, upper, low_rank = instance(2, 4, 6, 3)
    upper[:, :, ::2] = 0.0
    solution = box.solve_box(blocks, z, upper, low_rank)
    assert bool((solution.force[upper == 0] == 0).all())
    expected = by_scipy(matrix(blocks, low_rank)[0], z.flatten().numpy(), upper.flatten().numpy())
    assert solution.force.flatten().numpy() == pytest.approx(expected, abs=1e-8)


def test_nothing_to_solve():
    """Padding only: blocks of zeros and no strength."""
    zero = torch.zeros(2, 3, 1, dtype=torch.float64)
    solution = box.solve_box(zero[..., None], zero, zero)
    assert torch.equal(solution.force, zero)
    assert bool(solution.solved.all())


@pytest.mark.parametrize("copies", [2, 3])
def test_duplicate_rows_share_their_force(copies):
    """Equal normals: only the sum of forces is determined, and with it Qλ."""
    g = torch.Generator().manual_seed(7)
    for _ in range(10):
        x = torch.randn(3, 6, generator=g, dtype=torch.float64)
        X = x.repeat(copies, 1)[None, None]
        z = torch.randn(3, generator=g, dtype=torch.float64).repeat(copies)[None, None]
        upper = torch.rand(1, 1, 3 * copies, generator=g, dtype=torch.float64)
        solution = box.solve_box(X @ X.mT, z, upper)
        Q, total = (x @ x.T).numpy(), upper.view(copies, 3).sum(0).numpy()
        expected = by_scipy(Q, z[0, 0, :3].numpy(), total)
        assert bool(solution.solved.all())
        assert solution.force.view(copies, 3).sum(0).numpy() == pytest.approx(expected, abs=1e-6)
        full = (X @ X.mT)[0, 0].numpy()
        check_conditions(
            full,
            z.flatten().numpy(),
            upper.flatten().numpy(),
            solution.force.flatten().numpy(),
            1e-6,
        )


def test_more_normals_than_dimensions():
    """Blocks of deficient rank, as with more examples on one neuron's kinks than inputs: any
    minimiser has one Qλ."""
    cvxpy = pytest.importorskip("cvxpy")
    for seed in range(6):
        g = torch.Generator().manual_seed(seed)
        X = torch.randn(1, 1, 9, 4, generator=g, dtype=torch.float64)
        velocity = torch.randn(4, generator=g, dtype=torch.float64)
        z, upper = (X @ velocity), torch.rand(1, 1, 9, generator=g, dtype=torch.float64)
        solution = box.solve_box(X @ X.mT, z, upper)
        assert bool(solution.solved.all())
        unknown = cvxpy.Variable(9)
        rest = velocity.numpy() - X[0, 0].numpy().T @ unknown
        bounds = [unknown >= 0, unknown <= upper.flatten().numpy()]
        cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(rest)), bounds).solve(solver="CLARABEL")
        left = velocity.numpy() - X[0, 0].numpy().T @ solution.force.flatten().numpy()
        assert left == pytest.approx(rest.value, abs=1e-5)
        check_conditions(
            (X @ X.mT)[0, 0].numpy(),
            z.flatten().numpy(),
            upper.flatten().numpy(),
            solution.force.flatten().numpy(),
            1e-6,
        )


def test_a_programme_given_up_is_marked():
    blocks, z, upper, _ = instance(0, 1, 30)
    assert not bool(box.solve_box(blocks, z, upper, max_sweeps=1).solved.any())
