"""The linear algebra of a step against dense matrices among the weights."""

import pytest
import torch

import flowsim as fs
from flowsim.flow.sliding import forces
from flowsim.flow.sliding.forces import ActivePairs, GaussNewton, KinkCoupling, Metric

N, D, WIDTH, GAIN = 7, 3, 4, 0.3
G = torch.Generator().manual_seed(3)
PROBLEM = fs.Problem(
    fs.MLP([D, WIDTH, 2], activation=fs.relu),
    torch.randn(N, D, generator=G, dtype=torch.float64),
    torch.randint(2, (N,), generator=G),
    fs.pairwise_exponential,
)
W = PROBLEM.net.init(seeds=range(2), scale=0.8)
POINT = PROBLEM.two_layer(2).at(W)
ROOT = torch.randn(W.shape[1], W.shape[1], generator=G, dtype=torch.float64)
DENSE = ROOT @ ROOT.T + torch.eye(W.shape[1], dtype=torch.float64)
SCALES = {"W1": 0.5, "W2": 2.0}
LAYERS = torch.cat([torch.full((D * WIDTH,), 4.0), torch.full((2 * WIDTH,), 0.25)]).double()
NORMS = {
    "l2": (fs.L2(), torch.eye(W.shape[1]).double()),
    "layers": (fs.Euclidean(fs.L2(), SCALES), torch.diag(LAYERS)),
    "dense": (fs.Mahalanobis(DENSE), DENSE),
}


@pytest.fixture(params=NORMS)
def setting(request):
    """The metric, its dense A, the multipliers, the damping and some pairs."""
    norm, A = NORMS[request.param]
    metric = Metric.of(norm.bind(PROBLEM.layout))
    g = torch.Generator().manual_seed(5)
    multipliers = torch.rand(POINT.z.shape, generator=g, dtype=torch.float64)
    mask = torch.rand(POINT.z.shape, generator=g) < 0.4
    gain = torch.full((2,), GAIN, dtype=torch.float64)
    damping = GaussNewton.at(metric, POINT, multipliers, gain)
    return metric, A, multipliers, damping, mask


def normals(pairs, row):
    """N of one trajectory, padding left out, built entry by entry."""
    rows = []
    for i, j in zip(pairs.example[row].flatten(), pairs.neuron[row].flatten(), strict=True):
        normal = torch.zeros(W.shape[1], dtype=torch.float64)
        normal[int(j) * D : (int(j) + 1) * D] = PROBLEM.x[int(i)]
        rows.append(normal)
    return torch.stack(rows)[pairs.valid[row].flatten()]


def damped(A, multipliers, row):
    """M = (A + γτJᵀSJ)⁻¹, with J by autograd's jacobian of the linearised net."""
    slopes = POINT.slopes(multipliers)[row]
    first, last = POINT.first[row], POINT.last[row]
    x, hidden = PROBLEM.x, POINT.hidden[row]
    J = torch.cat(
        [
            torch.einsum("nj,cj,nd->ncjd", slopes, last, x).flatten(2),
            torch.einsum("ce,nj->ncej", torch.eye(2).double(), hidden).flatten(2),
        ],
        -1,
    ).flatten(0, 1)
    assert first.shape == (WIDTH, D)
    root = PROBLEM.loss.curvature(POINT.outputs, PROBLEM.y)[row]
    return torch.linalg.inv(A + GAIN * J.T @ root @ root.T @ J)


def test_the_damping_is_that_of_the_dense_matrix(setting):
    metric, A, multipliers, damping, _ = setting
    v = torch.randn(W.shape, generator=G, dtype=torch.float64)
    torch.testing.assert_close(metric.inverse(v), v @ torch.linalg.inv(A))
    for row in range(2):
        expected = damped(A, multipliers, row) @ A @ v[row]
        torch.testing.assert_close(damping(v)[row], expected)


@pytest.mark.parametrize("most", [600, 0], ids=["together", "by neuron"])
def test_forces_move_coordinates_by_the_coupling(setting, most, monkeypatch):
    """N M Nᵀλ, in one block and in one for each neuron."""
    metric, A, multipliers, damping, mask = setting
    monkeypatch.setattr(forces, "DENSE", most)
    pairs = ActivePairs.of(POINT, mask, metric)
    assert (len(pairs.valid[0]) == 1) == (most > 0 or metric.scales is None)
    coupling = KinkCoupling.of(pairs, damping)
    force = torch.rand(pairs.valid.shape, generator=G, dtype=torch.float64) * pairs.valid
    moved, carried = coupling.system.times(force), pairs.combine(force)
    for row in range(2):
        dense, at = normals(pairs, row), pairs.valid[row].flatten()
        torch.testing.assert_close(carried[row], dense.T @ force[row].flatten()[at])
        torch.testing.assert_close(pairs.along(W)[row].flatten()[at], dense @ W[row])
        M = damped(A, multipliers, row)
        expected = dense @ M @ carried[row]
        torch.testing.assert_close(moved[row].flatten()[at], expected, rtol=1e-9, atol=1e-9)


def test_pairs_are_taken_and_put_back(setting):
    metric, *_, mask = setting
    pairs = ActivePairs.of(POINT, mask, metric)
    taken = pairs.take(POINT.z)
    assert (taken[~pairs.valid] == 0).all()
    torch.testing.assert_close(pairs.put(torch.zeros_like(POINT.z), taken), POINT.z * mask)


def test_the_stiffness_of_a_pair_is_the_length_of_its_normal(setting):
    metric, A, *_ = setting
    every = ActivePairs.of(POINT, torch.ones_like(POINT.z, dtype=torch.bool), metric)
    dense = normals(every, 0)
    expected = ((dense @ torch.linalg.inv(A)) * dense).sum(-1).view(N, WIDTH)
    torch.testing.assert_close(metric.stiffness(POINT)[0], expected)
