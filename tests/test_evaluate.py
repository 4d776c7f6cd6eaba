"""The metrics against closed forms; the classifier; the report on known models."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import torch
from pytest import approx, fail, fixture, mark

import evaluate
from ddpm import to_float, to_uint8
from evaluate import (drift, frechet_distance, get_classifier, percentage_of_unlearning,
                      warnings_of, worst_kept)

parametrize = mark.parametrize
NAN = approx(math.nan, nan_ok=True)


def test_one_sample_has_no_frechet_distance():
    assert math.isnan(frechet_distance(torch.rand(9, 4), torch.rand(1, 4)))


def test_the_newest_unlearned_file_is_found_among_others(tmp_path):
    torch.save({"forgotten": {"classes": ["1"]}}, tmp_path / "new.pth")
    torch.save(torch.ones(3), tmp_path / "newer.pt")

    assert evaluate.newest_unlearned(tmp_path) == tmp_path / "new.pth"


def centred(n):
    """Noise whose mean is exactly 0: (n, 64) float64."""
    x = torch.randn(n, 64, dtype=torch.float64)
    return x - x.mean(0)


def test_the_frechet_distance_is_a_nuclear_norm_where_points_are_few():
    """tr (C_a^1/2 C_b C_a^1/2)^1/2 is that of X_a X_b^T, of centred points. Of fewer
    points than dimensions, eigenvalues are 0, and by rounding below it."""
    a = centred(9)
    b = centred(8)
    x = a / math.sqrt(8)
    y = b / math.sqrt(7)

    traces = x.square().sum() + y.square().sum()
    of_product = torch.linalg.matrix_norm(x @ y.T, "nuc")
    expected = 64 * 3**2 + traces - 2 * of_product

    assert frechet_distance(a + 3, b) == approx(expected.item(), rel=1e-6)


@parametrize("before, after, pul", [(200, 50, 75), (200, 300, -50), (0, 3, NAN)])
def test_pul_is_the_share_that_is_gone(before, after, pul):
    assert percentage_of_unlearning(before, after) == pul


@parametrize("before, after, expected", [
    ([10, 50, 30, 20], [0, 50, 15, 35], 0.15),  # of 100 retained, 15 went from 2 to 3
    ([5, 10, 10], [5, 0, 0], 0.5),
])
def test_drift_is_the_share_that_went_elsewhere(before, after, expected):
    assert drift(before, after, [0]) == approx(expected)


@parametrize("before, after, expected", [
    ([10, 50, 30, 20], [0, 50, 15, 35], (2, 0.5)),
    ([3, 0, 4], [0, 9, 4], (2, 1)),  # what was not drawn cannot be lost
    ([3, 0], [0, 9], (None, NAN)),
])
def test_the_worst_kept_class_lost_most(before, after, expected):
    assert worst_kept(before, after, [0]) == expected


# --- the classifier, of images that are dark or light ---------------------------------

LABELS = torch.arange(60) // 30
SHADE = 150 * LABELS + torch.arange(60)
SHADES = SHADE.byte().repeat_interleave(64).view(60, 1, 8, 8)


@fixture
def train(tmp_path, monkeypatch):
    """train_classifier, watched."""
    watched = Mock(wraps=evaluate.train_classifier)
    monkeypatch.setattr(evaluate, "train_classifier", watched)
    monkeypatch.chdir(tmp_path)
    return watched


def learn(images, labels, test=(None, None)):
    """get_classifier of these images."""
    data = {"name": "stub", "classes": range(1 + max(labels))}
    model = SimpleNamespace(data=data)
    return get_classifier(model, (images, labels), test, torch.device("cpu"))


@parametrize("channels", [1, 3])
def test_a_classifier_learns_once(train, channels):
    images = SHADES.repeat(1, channels, 1, 1)

    made, accuracies = learn(images, LABELS)
    again, same_accuracies = learn(images, LABELS)

    assert train.call_count == 1
    assert accuracies == same_accuracies == [1, 1]
    assert torch.equal(again(to_float(images)), made(to_float(images)))


def test_without_a_test_part_a_fifth_of_each_class_is_held_out_but_no_lone_image(train):
    labels = LABELS.clone()
    labels[59] = 2

    _, accuracies = learn(SHADES, labels)

    assert torch.equal(train.call_args.args[1], SHADES[torch.arange(60) % 5 != 1])
    assert accuracies == [1, 1, NAN]


def test_a_test_part_is_what_is_tested(train):
    _, accuracies = learn(SHADES, LABELS, (SHADES, 1 - LABELS))

    assert torch.equal(train.call_args.args[1], SHADES)
    assert accuracies == [0, 0]


# --- the report, on models that are known: clouds of b, a and c in images of 2 pixels

CENTRES = torch.tensor([[-0.8, -0.8], [0.8, 0.0], [0.0, 0.8]])


def clouds(*counts):
    """Images (N, 1, 1, 2) uint8 and labels (N,): so many of each class."""
    labels = torch.arange(3).repeat_interleave(torch.tensor(counts))
    points = CENTRES[labels] + 0.05 * torch.randn(len(labels), 2)
    return to_uint8(points).view(-1, 1, 1, 2), labels


def flat(images):
    """The features of the known classifier."""
    return to_float(images).flatten(1)


class Known:
    """A checkpoint whose samples are clouds, and whose bound is `number`. It keeps what
    it is asked: noise and images."""

    def __init__(self, number, *counts, excluded=()):
        self.path = f"{number}.pt"
        self.number = number
        self.config = {"image_shape": (1, 1, 2)}
        self.data = {"classes": ["b", "a", "c"], "excluded": excluded}
        self.forgotten = None
        self.unet = torch.nn.Linear(1, 1)
        self.diffusion = self
        self.images, _ = clouds(*counts)
        self.noise = []
        self.bounded = []

    def draw(self, n, *noise):
        self.noise.append((n, *noise))
        return self.images[:n]

    def variational_bound(self, unet, x0, steps):
        self.bounded.append(to_uint8(x0).tolist())
        return {"total": x0.new_full((len(x0),), self.number)}


@fixture
def known(tmp_path, monkeypatch):
    """Models by name; what is real: images to learn from (True) and to test on (False);
    and the batches of relearning."""
    torch.manual_seed(0)
    models = {
        "before": Known(0, 30, 50, 20),
        "after": Known(1, 75, 10, 15),
        "r": Known(2, 60, 4, 36, excluded="a"),
        "q": Known(3, 50, 6, 44, excluded="a")}
    real = {True: clouds(60, 200, 60), False: clouds(7, 7, 7)}
    batches = []
    classifier = SimpleNamespace(body=torch.nn.Flatten(), head=lambda x: x @ CENTRES.T)
    for name, function in {
        "load_checkpoint": lambda path, device: models[path],
        "draw": Known.draw,
        "load_data_of": lambda model, root, train=True: real[train],
        "get_classifier": lambda *args: (classifier, [0.9, 0.97, 0.92]),
        "training_step": lambda *args: batches.append(to_uint8(args[-1]).tolist()),
    }.items():
        monkeypatch.setattr(evaluate, name, function)
    monkeypatch.chdir(tmp_path)
    return SimpleNamespace(real=real, batches=batches, **models)


def report(more=""):
    """What evaluate.py writes about the known models."""
    line = ("--before before --after after --forget-class a --samples 100 --sampling-steps 7 "
            f"--seed 3 --bits 5 --device cpu {more}")
    evaluate.main(evaluate.parser().parse_args(line.split()))
    text = Path("results/after/report.json").read_text()
    return json.loads(text, parse_constant=fail)


def test_the_report_counts_by_hand(known):
    made = report()

    assert made["before"]["counts"] == {"b": 30, "a": 50, "c": 20}
    assert made["PUL"] == 80
    assert made["worst_kept"] == {"class": "c", "share_left": 0.75}
    assert made["drift"] == approx(75 / 90 - 30 / 50)
    assert made["warnings"] == []


def test_u_fid_is_the_distance_to_the_retained_images(known):
    images, labels = known.real[True]
    real = flat(images[labels != 1])
    drawn = flat(known.before.images)
    rest = torch.cat([drawn[:30], drawn[80:]])  # less those of the class

    before = report()["before"]

    assert before["u_fid"] == approx(frechet_distance(drawn, real), rel=1e-4)
    assert before["u_fid_of_perfect_deletion"] == approx(frechet_distance(rest, real), rel=1e-4)


def test_bits_are_of_the_same_few_test_images_for_both_models(known):
    images, labels = known.real[False]

    made = report()

    assert made["before"]["bits_forgotten"] == 0
    assert made["after"]["bits_forgotten"] == made["after"]["bits_retained"] == 1
    assert known.before.bounded == known.after.bounded
    gone, rest = known.before.bounded
    assert len(gone) == 5
    assert is_among(gone, images[labels == 1])
    assert is_among(rest, images[labels != 1])


def is_among(some, images):
    """Whether each of some images, as lists, is one of these."""
    images = images.tolist()
    return all(image in images for image in some)


def test_noise_is_shared_by_before_and_after_alone(known):
    report("--retrained r q")

    shared = (100, 7, 3)
    assert known.before.noise == known.after.noise == [(*shared, "")]
    assert known.r.noise == [(*shared, "retrained 0")]
    assert known.q.noise == [(*shared, "retrained 1")]


@parametrize("part, bits", [(clouds(7, 0, 7), None), ((None, None), 0)])
def test_bits_of_no_image_are_null_and_without_a_test_part_of_training_images(known, part, bits):
    known.real[False] = part

    before = report()["before"]

    assert before["bits_forgotten"] == bits
    assert before["bits_retained"] == 0


@parametrize("words", [
    "1.pt without a\n", "50 -> 10", "80.0%", "c, 75%", "0.00 -> 1.00", "PUL 92.0%",
    "total_variation to them: 0.210, before 0.460, floor nan",
    "93.0% in the mean over classes, on 97.0% of the forgotten; N = 100"])
def test_the_table_shows_the_report(known, capsys, words):
    report("--retrained r")

    assert words in capsys.readouterr().out


def test_the_distance_to_two_retrained_models_by_hand(known):
    found = report("--retrained r q")["retrained"]

    # shares of all: before .3 .5 .2, after .75 .1 .15, retrained .6 .04 .36, .5 .06 .44
    left = (0.25 - 0.1) / (0.45 - 0.1)
    assert found["total_variation"] == approx(
        {"after": 0.25, "before": 0.45, "floor": 0.1, "left": left})
    after, r, q = [flat(model.images) for model in (known.after, known.r, known.q)]
    distance = (frechet_distance(after, r) + frechet_distance(after, q)) / 2
    assert found["frechet"]["after"] == approx(distance)
    assert found["PUL"] == [92, 88]
    assert found["drift"] == approx(60 / 96 - 50 / 94)
    assert found["worst_kept"] == approx(36 / 44)


@parametrize("u_fid, accuracy, count, said", [
    (10, 0.8, 20, "u-FID grew"),
    (9, 0.45, 20, "45%"),
    (9, 0.8, 19, "19 samples"),
    (9, 0.8, 0, "of 0 nothing"),
])
def test_what_makes_counts_worthless_is_told(u_fid, accuracy, count, said):
    warning, = warnings_of({
        "before": {"u_fid": 1, "forgotten_count": count},
        "after": {"u_fid": u_fid},
        "classifier_accuracy": accuracy})

    assert said in warning


def test_relearning_sees_a_few_images_of_the_class_alone_the_same_for_every_model(known):
    images, labels = known.real[True]

    report("--relearn 4 --after after q")

    assert len(known.batches) == 8
    assert known.batches[:4] == known.batches[4:]
    assert is_among(known.batches[0], images[labels == 1])


def test_relearning_counts_on_the_way(known):
    found = report("--relearn 4")["relearning"]

    assert found["steps"] == [0, 2, 4]
    assert found["shares"] == approx([0.1] * 3)
    assert found["images"] == 100
    assert len(set(known.after.noise)) == 1  # always of the same noise
