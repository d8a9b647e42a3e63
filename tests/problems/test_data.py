"""Data sets: what they promise, and that a seed fixes them."""

import pytest
import torch
from sklearn.datasets import load_digits

import flowsim as fs
from flowsim import data

FAMILIES = {
    "digits": lambda seed: data.digits(n=30, seed=seed),
    "digits, test": lambda seed: data.digits(n=30, seed=seed, part="test"),
    "ten digits": lambda seed: data.digits(range(10), n=50, seed=seed),
    "gaussian": lambda seed: data.gaussian_separable(20, 5, seed=seed),
    "teacher": lambda seed: data.teacher_student(20, 9, seed=seed),
}


def rows(x):
    return sorted(map(tuple, x.tolist()))


@pytest.mark.parametrize("draw", FAMILIES.values(), ids=FAMILIES)
def test_a_seed_fixes_its_data_set_whatever_the_other_seeds_are(draw):
    x, y = draw([5, 0, 3])
    assert x.ndim == 3
    assert y.shape == x.shape[:2]
    for s, seed in enumerate([5, 0, 3]):
        alone = draw(seed)
        assert torch.equal(alone.x, x[s])
        assert torch.equal(alone.y, y[s])
    assert not torch.equal(x[0], x[1])
    assert x.dtype == torch.float64


@pytest.mark.parametrize("draw", FAMILIES.values(), ids=FAMILIES)
def test_the_global_generator_is_neither_read_nor_moved(draw):
    torch.manual_seed(1)
    first, state = draw(0), torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(draw(0).x, first.x)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("classes", [(3, 6), (6, 3), (1, 0, 8), tuple(range(10))])
def test_digits_are_the_images_of_their_classes(classes):
    x, y = data.digits(classes, n=60, seed=1)
    assert x.shape == (60, 64)
    assert float(x.min()) == 0
    assert float(x.max()) == 1
    raw = load_digits()
    name_of = {
        tuple(image): name for image, name in zip((raw.data / 16).tolist(), raw.target, strict=True)
    }
    labels = [-1, 1] if len(classes) == 2 else range(len(classes))
    digit = dict(zip(labels, classes, strict=True))
    assert [name_of[tuple(image)] for image in x.tolist()] == [digit[label] for label in y.tolist()]


@pytest.mark.parametrize(("classes", "n"), [((3, 6), 100), ((0, 1, 2), 1), ((3, 6), 363)])
def test_training_and_test_digits_share_no_image_and_leave_none_out(classes, n):
    train, test = (data.digits(classes, n, seed=4, part=part) for part in ("train", "test"))
    raw = load_digits()
    everything = (raw.data / 16)[[name in classes for name in raw.target]]
    assert len(train.x) == n
    assert rows(torch.cat([train.x, test.x])) == rows(torch.from_numpy(everything))
    assert len(train.y) + len(test.y) == len(everything)


@pytest.mark.parametrize("margin", [0.0, 0.1, 2.0])
def test_gaussian_data_are_separated_with_the_margin(margin):
    x, y = data.gaussian_separable(200, 5, margin=margin, seed=3)
    assert set(y.tolist()) == {-1.0, 1.0}
    u = torch.randn(5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    reached = y * (x @ u) / u.norm()
    assert float(reached.min()) >= margin - 1e-14
    if margin == 2:  # most examples were moved to the margin, none beyond it
        assert float(reached.median()) == pytest.approx(2, abs=1e-12)


def test_a_larger_margin_moves_inputs_along_one_direction_only():
    near, far = (data.gaussian_separable(50, 5, margin=m, seed=3) for m in (0.0, 1.0))
    assert torch.equal(near.y, far.y)
    assert torch.linalg.matrix_rank(far.x - near.x, atol=1e-10) == 1


def test_a_teacher_of_one_neuron_and_one_active_coordinate_is_a_sign():
    """sign(u·relu(w x_j)) is constant for u > 0, and for u < 0 the sign of one coordinate up to a
    factor."""
    x, y = data.teacher_student(40, 6, teacher_width=1, active=1, seed=range(12))
    agreement = (x.sign() * y[..., None]).mean(1).abs()  # (seeds, d)
    constant = (y == 1).all(1)
    assert 0 < int(constant.sum()) < 12
    assert ((agreement == 1).sum(1)[~constant] == 1).all()


@pytest.mark.parametrize("active", [1, 2, 5])
def test_a_teacher_reads_as_many_coordinates_as_are_active(active):
    """One neuron with u < 0 labels by a half-space, whose normal has that many entries that are not
    zero."""
    x, y = data.teacher_student(4000, 6, teacher_width=1, active=active, seed=range(8))
    mixed = (y == -1).any(1)
    assert mixed.any()
    normal = (x * y[..., None]).mean(1)[mixed]  # of Gaussian inputs: √(2/π) times the unit normal
    unit = normal / (2 / torch.pi) ** 0.5
    assert ((unit.abs() > 0.08).sum(1) <= active).all()
    torch.testing.assert_close(unit.norm(dim=1), torch.ones_like(unit[:, 0]), rtol=0.05, atol=0)


def test_teacher_labels_are_signs_in_both_classes():
    x, y = data.teacher_student(seed=0)
    assert x.shape == (250, 232)
    assert set(y.tolist()) == {-1.0, 1.0}


def test_peers_net_is_a_problem_with_its_start():
    problem, w = data.peers_net(d=20, width=64, n=50)
    assert isinstance(problem, fs.Problem)
    assert problem.x.shape == (50, 20)
    assert set(problem.y.tolist()) == {-1.0, 1.0}
    assert (problem.net.widths, problem.degree, problem.loss) == ((20, 64, 1), 2, fs.exponential)
    problem.check_weights(w)
    W, a = (block.of(w) for block in problem.layout)
    assert float(W.std()) == pytest.approx(0.5 / 20**0.5, rel=0.1)
    assert float(a.std()) == pytest.approx(0.5 / 64**0.5, rel=0.3)
    again, w_again = data.peers_net(d=20, width=64, n=50)
    assert torch.equal(w, w_again)
    assert torch.equal(problem.x, again.x)
    assert not torch.equal(problem.x, data.peers_net(seed=1)[0].x)


REFUSED = {
    "digits of one class": (
        lambda: fs.data.digits((3,)),
        r"digits: got classes \(3,\), expected at least two different digits 0 … 9",
    ),
    "digits twice": (
        lambda: fs.data.digits((3, 3)),
        r"digits: got classes \(3, 3\), expected at least two different",
    ),
    "digit eleven": (
        lambda: fs.data.digits((3, 11)),
        r"digits: got classes \(3, 11\), expected at least two",
    ),
    "digits none": (
        lambda: fs.data.digits(n=0),
        "digits: got n=0, expected 1 … 363: these classes have 364 images",
    ),
    "digits too many": (
        lambda: fs.data.digits(n=364),
        "digits: got n=364, expected 1 … 363: these classes have 364",
    ),
    "digits in part": (lambda: fs.data.digits(n=2.5), "digits: got n=2.5, expected 1 … 363"),
    "digits part": (
        lambda: fs.data.digits(part="all"),
        "digits: got part='all', expected 'train' or 'test'",
    ),
    "digits no seeds": (
        lambda: fs.data.digits(seed=[]),
        "seed: got no seeds, expected .*try seed=range",
    ),
    "gaussian n": (
        lambda: fs.data.gaussian_separable(0),
        "gaussian_separable: got n=0, expected an integer ≥ 1",
    ),
    "gaussian d": (
        lambda: fs.data.gaussian_separable(5, 0),
        "gaussian_separable: got d=0, expected an integer ≥ 1",
    ),
    "gaussian margin": (
        lambda: fs.data.gaussian_separable(margin=-1.0),
        "gaussian_separable: got margin=-1.0, expected a finite number ≥ 0",
    ),
    "teacher coordinates": (
        lambda: fs.data.teacher_student(5, 4, active=5),
        "teacher_student: got active=5, expected 1 … 4",
    ),
    "peers n": (lambda: fs.data.peers_net(n=0), r"x: got shape \(0, 20\), which holds no numbers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_sentence_that_says_why(name):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        call()
