"""Problems: identities of homogeneous margins, labels, batches, and what is refused."""

import math
import pickle

import numpy as np
import pytest
import torch

import flowsim as fs
from flowsim import diagnostics
from flowsim.motion.state import initial_state


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def margin(problem, norm, w):
    """min_i q_i / ‖w‖^L of each row."""
    return diagnostics.margin(norm)(problem, initial_state(problem, w))


NETS = {
    "relu": fs.MLP([4, 6, 5, 1]),
    "leaky relu": fs.MLP([4, 6, 1], fs.leaky_relu(0.1)),
    "squared relu": fs.MLP([4, 6, 1], fs.squared_relu),
    "deep linear": fs.MLP([4, 3, 3, 1], fs.identity),
    "linear": fs.Linear(4),
    "diagonal": fs.Diagonal(4, 3),
    "frozen": fs.Frozen(fs.MLP([4, 6, 1]), {"W2": draw(7, 1, 6)}),
}
X, Y = draw(1, 8, 4), [1, -1, -1, 1, 1, 1, -1, 1]


# --- identities of the exponential loss ----------------------------------------------------------


@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("name", NETS)
def test_gradient_along_the_weights_is_degree_times_level_plus_entropy(name, scale):
    problem = fs.Problem(NETS[name], X, Y, fs.exponential)
    w = problem.net.init(range(4), scale)
    lam, h = problem.ascent(w)
    entropy = diagnostics.entropy(problem, initial_state(problem, w))
    expected = problem.degree * (lam + entropy)
    torch.testing.assert_close((w * h).sum(1), expected, rtol=1e-10, atol=1e-10)


def test_gradient_along_the_weights_for_pairwise_exponential_loss():
    problem = fs.Problem(fs.MLP([4, 6, 3]), X, [0, 1, 2, 0, 1, 2, 0, 1], fs.pairwise_exponential)
    w = problem.net.init(range(4))
    lam, h = problem.ascent(w)
    entropy = diagnostics.entropy(problem, initial_state(problem, w))
    torch.testing.assert_close((w * h).sum(1), 2 * (lam + entropy), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("loss", [fs.exponential, fs.logistic])
@pytest.mark.parametrize("norm", [fs.L1(), fs.L2(), fs.Linf()])
@pytest.mark.parametrize("name", NETS)
def test_soft_margin_is_below_the_hard_one_by_at_most_log_n(name, norm, loss):
    problem = fs.Problem(NETS[name], X, Y, loss)
    w = problem.net.init(range(6), 2.0)
    state = initial_state(problem, w)
    hard, soft = (
        diagnostics.margin(norm)(problem, state),
        diagnostics.soft_margin(norm)(problem, state),
    )
    slack = 1e-12 * hard.abs()
    assert (soft <= hard + slack).all()
    if loss is fs.exponential:
        room = math.log(len(Y)) / norm.bind(problem.layout).value(w) ** problem.degree
        assert (soft >= hard - room - slack).all()


@pytest.mark.parametrize("norm", [fs.L1(), fs.L2(), fs.Linf()])
def test_weighted_multipliers_sum_to_the_alignment(norm):
    """Σ λ_i q_i/q_min = ‖w̃‖²α/L for λ_i = (‖w‖/‖∇𝓛‖_*) q_min^{1−2/L} e^{−q_i} and w̃ =
    w/q_min^{1/L}."""
    net = fs.MLP([4, 6, 5, 1], fs.leaky_relu(0.1))
    w = net.init(range(4))
    y = torch.sign(net.outputs(w, X)[..., 0])  # every example on the right side
    problem = fs.Problem(net, X.repeat(4, 1, 1), y, fs.exponential)
    state, bound = initial_state(problem, w), norm.bind(problem.layout)
    q, L = problem.margins(w), problem.degree
    least = q.amin(1)
    lam, h = problem.ascent(w)
    multipliers = (bound.value(w) / bound.dual(h) * least ** (1 - 2 / L))[:, None] * torch.exp(
        lam[:, None] - q
    )
    rescaled = bound.value(w) / least ** (1 / L)
    alpha = diagnostics.alignment(norm)(problem, state)
    torch.testing.assert_close(
        (multipliers * q).sum(1) / least, rescaled**2 * alpha / L, rtol=1e-10, atol=0
    )


# --- labels and inputs that mean the same --------------------------------------------------------

SIGNS = torch.tensor([1, -1, -1, 1, 1, 1, -1, 1])


@pytest.mark.parametrize(
    "y",
    [
        SIGNS,
        SIGNS.tolist(),
        SIGNS.numpy(),
        SIGNS.float(),
        SIGNS > 0,
        (SIGNS > 0).long(),
        (SIGNS > 0).to(torch.uint8),
        (SIGNS > 0).double().numpy(),
    ],
    ids=["±1", "list", "array", "float", "bool", "0/1", "bytes", "0.0/1.0"],
)
@pytest.mark.parametrize("loss", [fs.exponential, fs.logistic])
def test_all_conventions_of_binary_labels_give_the_same_numbers(y, loss):
    net = fs.MLP([4, 6, 1])
    w = net.init(range(2))
    for ours, theirs in zip(
        fs.Problem(net, X, y, loss).ascent(w),
        fs.Problem(net, X, SIGNS, loss).ascent(w),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("sign", [1, -1])
def test_labels_of_one_sign_are_allowed(sign):
    net = fs.Linear(4)
    w = net.init(range(2))
    folded = fs.Problem(net, sign * SIGNS[:, None] * X, [sign] * 8, fs.exponential)
    torch.testing.assert_close(
        folded.ascent(w), fs.Problem(net, X, SIGNS, fs.exponential).ascent(w)
    )


@pytest.mark.parametrize("y", [0, 1, -1])
def test_a_single_example_is_allowed(y):
    problem = fs.Problem(fs.Linear(2), [[1.0, 2.0]], [y], fs.exponential)
    w = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    assert problem.examples == 1
    assert float(problem.lam(w)) == (11.0 if y > 0 else -11.0)


@pytest.mark.parametrize(
    "x",
    [
        [[1, 0], [0, -2]],
        np.array([[1, 0], [0, -2]], dtype=np.int32),
        np.array([[0, -2], [1, 0]])[::-1],
        np.asfortranarray([[1.0, 0.0], [0.0, -2.0]]),
        torch.tensor([[1, 0], [0, -2]], dtype=torch.float32),
    ],
    ids=["lists", "integers", "reversed view", "column order", "float32"],
)
def test_inputs_in_any_form_give_the_same_numbers(x):
    w = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    assert fs.Problem(fs.Linear(2), x, [1, -1], fs.exponential).like(w).margins(w).tolist() == [
        [1.0, 4.0]
    ]


def test_changing_an_array_afterwards_does_not_change_the_problem():
    x, w = np.array([[1.0, 0.0]]), torch.ones(1, 2, dtype=torch.float64)
    problem = fs.Problem(fs.Linear(2), x, [1], fs.exponential)
    x[:] = 7
    assert float(problem.lam(w)) == 1


def test_class_labels_may_be_floats_or_booleans():
    net = fs.MLP([4, 5, 2])
    w = net.init(0)
    expected = fs.Problem(net, X, (SIGNS > 0).long(), fs.cross_entropy).lam(w)
    for y in (SIGNS > 0, (SIGNS > 0).double()):
        assert torch.equal(fs.Problem(net, X, y, fs.cross_entropy).lam(w), expected)


def test_regression_targets_of_one_output_need_no_last_axis():
    net, y = fs.MLP([4, 5, 1]), draw(5, 8)
    w = net.init(range(2))
    assert torch.equal(
        fs.Problem(net, X, y, fs.squared).lam(w), fs.Problem(net, X, y[:, None], fs.squared).lam(w)
    )
    residuals = net.outputs(w, X)[..., 0] - y
    torch.testing.assert_close(
        fs.Problem(net, X, y, fs.squared).lam(w), -torch.log(0.5 * residuals.square().sum(1))
    )


# --- batches -------------------------------------------------------------------------------------

BATCHED = {
    "binary": (
        fs.MLP([4, 6, 1]),
        fs.logistic,
        torch.randint(0, 2, (3, 8), generator=torch.Generator().manual_seed(0)),
    ),
    "classes": (
        fs.MLP([4, 6, 3]),
        fs.cross_entropy,
        torch.randint(0, 3, (3, 8), generator=torch.Generator().manual_seed(0)),
    ),
    "pairs": (
        fs.MLP([4, 6, 3]),
        fs.pairwise_exponential,
        torch.randint(0, 3, (3, 8), generator=torch.Generator().manual_seed(0)),
    ),
    "values": (fs.MLP([4, 6, 2]), fs.squared, draw(2, 3, 8, 2)),
    "value": (fs.MLP([4, 6, 1]), fs.squared, draw(2, 3, 8)),
}


@pytest.mark.parametrize("own_y", [True, False])
@pytest.mark.parametrize("name", BATCHED)
def test_data_sets_of_each_trajectory_are_separate_problems(name, own_y):
    net, loss, y = BATCHED[name]
    y = y if own_y else y[0]
    x, w = draw(1, 3, 8, 4), net.init(range(3))
    together = fs.Problem(net, x, y, loss)
    lam, h = together.ascent(w)
    for b in range(3):
        alone = fs.Problem(net, x[b], y[b] if own_y else y, loss)
        torch.testing.assert_close(
            alone.ascent(w[b : b + 1]), (lam[b : b + 1], h[b : b + 1]), rtol=1e-12, atol=1e-13
        )
    rows = torch.tensor([2, 0])
    part = together.select(rows)
    torch.testing.assert_close(part.ascent(w[rows]), (lam[rows], h[rows]), rtol=1e-12, atol=1e-13)
    part.check_weights(w[rows])


@pytest.mark.parametrize("name", BATCHED)
def test_data_follow_the_dtype_of_the_weights(name):
    net, loss, y = BATCHED[name]
    w = net.init(range(3)).float()
    lam, h = fs.Problem(net, draw(1, 3, 8, 4), y, loss).like(w).ascent(w)
    assert lam.dtype == h.dtype == torch.float32


def test_problem_on_other_data_keeps_net_and_loss():
    problem = fs.Problem(fs.MLP([4, 6, 1]), X, Y, fs.exponential)
    other = problem.with_data(X[:3], Y[:3])
    assert (other.examples, other.loss, other.net) == (3, problem.loss, problem.net)
    w = problem.net.init(range(2))
    torch.testing.assert_close(other.margins(w), problem.margins(w)[:, :3])
    with pytest.raises(ValueError, match="the net does not accept examples of 2 numbers"):
        problem.with_data(X[:, :2], Y)


# --- shown and saved -----------------------------------------------------------------------------


def test_a_problem_shows_its_numbers_and_no_arrays():
    problem = fs.Problem(fs.MLP([4, 6, 3]), draw(1, 2, 8, 4), [0, 1, 2, 0] * 2, fs.cross_entropy)
    shown = repr(problem)
    for part in ("cross-entropy", "MLP", "8 examples of 4", "2 data sets", "3 outputs", "42 w"):
        assert part in shown
    assert len(shown.splitlines()) <= 4
    assert shown in problem._repr_html_()


@pytest.mark.parametrize("loss", [fs.exponential, fs.logistic, fs.squared], ids=lambda x: x.name)
def test_a_problem_can_be_pickled(loss):
    problem, w = fs.Problem(fs.MLP([4, 6, 1]), X, Y, loss), fs.MLP([4, 6, 1]).init(range(2))
    again = pickle.loads(pickle.dumps(problem))
    assert torch.equal(again.ascent(w)[1], problem.ascent(w)[1])


# --- refusals: got …, expected …, try … ----------------------------------------------------------

NET, NET3 = fs.MLP([4, 6, 1]), fs.MLP([4, 6, 3])


def make(net=NET, x=X, y=SIGNS, loss=fs.exponential):
    return fs.Problem(net, x, y, loss)


def classes(*y):
    return lambda: make(NET3, y=y, loss=fs.cross_entropy)


def weights(w):
    return lambda: make().check_weights(w)


REFUSED = {
    "no examples": (
        lambda: make(x=torch.zeros(0, 4)),
        r"x: got shape \(0, 4\), which holds no numbers; expected",
    ),
    "no features": (
        lambda: make(x=torch.zeros(8, 0)),
        r"x: got shape \(8, 0\), which holds no numbers; expected",
    ),
    "x is a number": (lambda: make(x=3.0), r"x: got shape \(\), expected \(N, d\)"),
    "x is a vector": (
        lambda: make(x=X[:, 0]),
        r"x: got shape \(8,\), expected \(N, d\).*try x.reshape",
    ),
    "x has four axes": (
        lambda: make(x=torch.zeros(1, 2, 8, 4)),
        r"x: got shape \(1, 2, 8, 4\), expected \(N, d\)",
    ),
    "x has nan": (
        lambda: make(x=X * torch.nan),
        "x: got 32 NaN or infinite entries, expected finite",
    ),
    "x has inf": (
        lambda: make(x=[[1.0, 2.0, math.inf, 0.0]] * 8),
        "x: got 8 NaN or infinite entries, expected",
    ),
    "x has strings": (
        lambda: make(x=[["a"] * 4] * 8),
        "x: got list .*expected an array of numbers",
    ),
    "x has objects": (
        lambda: make(x=np.full((8, 4), None)),
        "x: got ndarray .*object.*expected an array of numbers",
    ),
    "x is ragged": (lambda: make(x=[[1, 2], [3]]), "x: got list .*expected an array of numbers"),
    "x is none": (lambda: make(x=None), "x: got NoneType .*expected an array of numbers"),
    "x is complex": (lambda: make(x=X + 1j), "x: got complex numbers, expected real"),
    "features of an MLP": (
        lambda: make(x=draw(1, 8, 5)),
        "x: the net does not accept examples of 5 numbers",
    ),
    "features of a diagonal net": (
        lambda: make(fs.Diagonal(3)),
        "x: the net does not accept examples of 4 numbers",
    ),
    "features of a module": (
        lambda: make(fs.ModuleNet(torch.nn.Linear(3, 1))),
        "x: the net does not accept examples of 4 numbers",
    ),
    "y too short": (
        lambda: make(y=SIGNS[:5]),
        r"y: got shape \(5,\), expected \(8,\): one label for each",
    ),
    "y is empty": (lambda: make(y=[]), r"y: got shape \(0,\), expected \(8,\)"),
    "y is a column": (lambda: make(y=SIGNS[:, None]), r"y: got shape \(8, 1\), expected \(8,\)"),
    "y of another batch": (
        lambda: make(x=draw(1, 3, 8, 4), y=SIGNS.repeat(2, 1)),
        r"y: got shape \(2, 8\), expected \(3, 8\)",
    ),
    "y has nan": (
        lambda: make(y=SIGNS * torch.nan),
        "y: got NaN or infinite entries, expected finite",
    ),
    "y has strings": (
        lambda: make(y=["yes", "no"] * 4),
        "y: got list .*expected an array of numbers",
    ),
    "y is complex": (lambda: make(y=SIGNS + 0j), "y: got complex numbers, expected real"),
    "labels 1, 2": (
        lambda: make(y=[1, 2] * 4),
        r"y: got labels \{1, 2\}, expected −1 and \+1, or 0 and 1",
    ),
    "labels -1, 0, 1": (
        lambda: make(y=[-1, 0, 1, 1] * 2),
        r"y: got labels \{-1, 0, 1\}, which mix two conventions",
    ),
    "labels 0, 1, 2": (
        lambda: make(y=[0, 1, 2, 1] * 2),
        r"y: got labels \{0, 1, 2\}, expected −1 and \+1",
    ),
    "labels are scores": (
        lambda: make(y=draw(1, 8)),
        r"y: got labels \{.*, …\}, expected −1 and \+1",
    ),
    "class too large": (
        classes(0, 1, 2, 3, 0, 1, 2, 0),
        r"y: got classes \{0, 1, 2, 3\}, expected integers 0 … 2",
    ),
    "class negative": (
        classes(0, 1, 2, -1, 0, 1, 2, 0),
        r"y: got classes \{-1, 0, 1, 2\}, expected integers 0 … 2",
    ),
    "class fractional": (
        classes(0, 1, 2, 0.5, 0, 1, 2, 0),
        "y: got class labels that are not integers, expected 0 … 2",
    ),
    "classes too few": (classes(0, 1, 2), r"y: got shape \(3,\), expected \(8,\)"),
    "one-hot classes": (
        lambda: make(NET3, y=torch.eye(3)[[0, 1, 2, 0, 1, 2, 0, 1]], loss=fs.cross_entropy),
        r"y: got shape \(8, 3\), expected \(8,\)",
    ),
    "binary loss, three outputs": (
        lambda: make(NET3),
        "exponential loss is binary, but the net has 3 outputs; try",
    ),
    "multi-class loss, one output": (
        lambda: make(loss=fs.cross_entropy),
        "cross-entropy loss needs one output for each class, but the net has 1; try",
    ),
    "pairwise loss, one output": (
        lambda: make(loss=fs.pairwise_exponential),
        "pairwise exponential loss needs one output for each class, but the net has 1; try",
    ),
    "values of another shape": (
        lambda: make(NET3, loss=fs.squared),
        r"y: got shape \(8,\), expected \(8, 3\): one target for each output",
    ),
    "net is a module": (
        lambda: make(torch.nn.Linear(4, 1)),
        "got net Linear, expected a flowsim Net, try flowsim.MLP",
    ),
    "loss is a name": (
        lambda: make(loss="exponential"),
        "got loss 'exponential', expected a flowsim Loss, try",
    ),
    "loss is torch's": (
        lambda: make(loss=torch.nn.MSELoss()),
        r"got loss MSELoss\(\), expected a flowsim Loss, try",
    ),
    "weights are an array": (
        weights(np.zeros((1, NET.size))),
        "weights: got ndarray, expected a floating-point tensor",
    ),
    "weights are integers": (
        weights(torch.zeros(1, NET.size).long()),
        "weights: got torch.int64, expected a floating",
    ),
    "weights of one axis": (
        weights(torch.zeros(NET.size)),
        r"weights: got shape \(30,\), expected \(B, 30\).*try",
    ),
    "weights of another net": (
        weights(torch.zeros(1, 7)),
        r"weights: got shape \(1, 7\), expected \(B, 30\)",
    ),
    "no trajectories": (
        weights(torch.zeros(0, NET.size)),
        r"weights: got shape \(0, 30\), expected \(B, 30\)",
    ),
    "weights have nan": (
        weights(torch.full((1, NET.size), torch.nan)),
        "weights: got NaN or infinite entries, expected",
    ),
    "data sets and trajectories": (
        lambda: make(x=draw(1, 2, 8, 4)).check_weights(torch.zeros(3, NET.size)),
        "weights: got 3 trajectories, but the data holds 2 data sets; expected as many",
    ),
    "one width": (
        lambda: fs.MLP([4]),
        r"MLP: got widths \[4\], expected at least two positive integers, try",
    ),
    "width zero": (
        lambda: fs.MLP([4, 0, 1]),
        r"MLP: got widths \[4, 0, 1\], expected at least two positive",
    ),
    "fractional width": (
        lambda: fs.MLP([4, 2.5, 1]),
        r"MLP: got widths \[4, 2.5, 1\], expected at least two",
    ),
    "no width": (
        lambda: fs.Linear(0),
        r"MLP: got widths \[0, 1\], expected at least two positive integers",
    ),
    "activation by name": (
        lambda: fs.MLP([4, 1], "relu"),
        "MLP: got activation='relu', expected .*try flowsim.relu",
    ),
    "activation of torch": (
        lambda: fs.MLP([4, 1], torch.tanh),
        "MLP: got activation=.*tanh.*, expected one of",
    ),
    "slope negative": (
        lambda: fs.leaky_relu(-0.1),
        r"leaky_relu: got slope -0.1, expected a number in \[0, 1\]",
    ),
    "slope above one": (
        lambda: fs.leaky_relu(1.1),
        r"leaky_relu: got slope 1.1, expected a number in \[0, 1\]",
    ),
    "slope nan": (
        lambda: fs.leaky_relu(math.nan),
        r"leaky_relu: got slope nan, expected a number in \[0, 1\]",
    ),
    "scale negative": (
        lambda: NET.init(0, -1.0),
        "init: got scale=-1.0, expected a finite number ≥ 0",
    ),
    "scale nan": (
        lambda: NET.init(0, math.nan),
        "init: got scale=nan, expected a finite number ≥ 0",
    ),
    "scale infinite": (
        lambda: NET.init(0, math.inf),
        "init: got scale=inf, expected a finite number ≥ 0",
    ),
    "no seeds": (lambda: NET.init([]), "init: got no seeds, expected .*try seeds=range"),
    "diagonal depth zero": (
        lambda: fs.Diagonal(3, 0),
        "Diagonal: got depth=0, expected an integer ≥ 1",
    ),
    "diagonal depth half": (
        lambda: fs.Diagonal(3, 0.5),
        "Diagonal: got depth=0.5, expected an integer",
    ),
    "diagonal without inputs": (
        lambda: fs.Diagonal(0),
        "Diagonal: got inputs=0, expected an integer ≥ 1",
    ),
    "frozen unknown": (
        lambda: fs.Frozen(NET, {"W3": torch.zeros(1)}),
        r"Frozen: got block 'W3', expected one of \['W1', 'W2'\]",
    ),
    "frozen shape": (
        lambda: fs.Frozen(NET, {"W2": torch.zeros(1, 5)}),
        r"Frozen: W2 has shape \(1, 5\), expected \(1, 6\), or one such array for each trajectory",
    ),
    "frozen axes": (
        lambda: fs.Frozen(NET, {"W2": torch.zeros(2, 2, 1, 6)}),
        r"Frozen: W2 has shape \(2, 2, 1, 6\), expected \(1, 6\)",
    ),
    "frozen nan": (
        lambda: fs.Frozen(NET, {"W2": torch.full((1, 6), torch.nan)}),
        "Frozen: got W2 = .*nan.*expected a tensor of finite",
    ),
    "frozen list": (
        lambda: fs.Frozen(NET, {"W2": [[1.0] * 6]}),
        r"Frozen: got W2 = \[\[1.0, .*expected a tensor of finite numbers",
    ),
    "everything frozen": (
        lambda: fs.Frozen(NET, {"W1": torch.zeros(6, 4), "W2": torch.zeros(1, 6)}),
        "Frozen: every block is frozen",
    ),
    "frozen values and trajectories": (
        lambda: make(fs.Frozen(NET, {"W2": draw(1, 2, 1, 6)})).lam(torch.zeros(3, 24).double()),
        "Frozen: got 2 W2 and 3 trajectories, expected one for each",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_sentence_that_says_why(name):
    call, message = REFUSED[name]
    with pytest.raises((ValueError, TypeError), match=f"(?s){message}"):
        call()


def test_each_trajectory_may_have_some_examples_of_its_own():
    x, y = fs.data.gaussian_separable(9, 4, seed=0)
    problem = fs.Problem(fs.MLP([4, 3, 1]), x, y, loss=fs.exponential)
    w = problem.net.init([0, 1])
    index = torch.tensor([[0, 4, 7], [8, 1, 1]])
    some = problem.examples_of(index)
    expected = problem.margins(w).gather(1, index)
    torch.testing.assert_close(some.margins(w), expected)
