"""The metrics against closed forms; the classifier; the report on known models."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import torch
from pytest import approx, fail, fixture, mark, raises

import evaluate
from ddpm import UserError, to_float, to_uint8
from evaluate import (against_retraining, drift, frechet_distance, percentage_of_unlearning,
                      warnings_of, worst_kept)

parametrize = mark.parametrize
NAN = approx(math.nan, nan_ok=True)


def normal(n, d, seed):
    """Unit noise, (n, d)."""
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_one_sample_has_no_frechet_distance():
    assert math.isnan(frechet_distance(normal(9, 4, seed=1), normal(1, 4, seed=2)))


def test_an_unlearned_file_may_end_in_pth(tmp_path):
    torch.save({"forgotten": {"classes": ["1"]}}, tmp_path / "new.pth")

    assert evaluate.newest_unlearned(tmp_path) == str(tmp_path / "new.pth")


def test_the_frechet_distance_is_a_nuclear_norm_where_points_are_few():
    """tr (C_a^1/2 C_b C_a^1/2)^1/2 is that of X_a X_b^T, of centred points. Of fewer
    points than dimensions, eigenvalues are 0, and by rounding below it."""
    a = normal(9, 64, seed=1).double()
    b = normal(8, 64, seed=2).double()
    x = (a - a.mean(0)) / math.sqrt(8)
    y = (b - b.mean(0)) / math.sqrt(7)

    of_means = (a.mean(0) - b.mean(0)).square().sum()
    of_product = torch.linalg.svdvals(x @ y.T).sum()
    expected = of_means + x.square().sum() + y.square().sum() - 2 * of_product

    assert frechet_distance(a, b) == approx(expected.item(), rel=1e-6)


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
SHADES = (150 * LABELS + torch.arange(60)).byte().view(60, 1, 1, 1).expand(60, 1, 8, 8)


@fixture
def learn(tmp_path, monkeypatch):
    """get_classifier, which notes in learn.seen the images of each training."""
    train_classifier = evaluate.train_classifier
    seen = []

    def train(classifier, images, *args):
        seen.append(images)
        train_classifier(classifier, images, *args, epochs=20)

    def learn(images, labels, *test):
        data = {"name": "stub", "classes": range(1 + max(labels))}
        model = SimpleNamespace(data=data)
        return evaluate.get_classifier(
            model, (images, labels), test or (None, None), torch.device("cpu"))

    learn.seen = seen
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "train_classifier", train)
    return learn


@parametrize("channels", [1, 3])
def test_a_classifier_learns_once(learn, channels):
    images = SHADES.repeat(1, channels, 1, 1)

    made, accuracies = learn(images, LABELS)
    again, same_accuracies = learn(images, LABELS)

    assert len(learn.seen) == 1
    assert accuracies == same_accuracies == [1, 1]
    assert torch.equal(again(to_float(images)), made(to_float(images)))


def test_without_a_test_part_a_fifth_of_each_class_is_held_out(learn):
    learn(SHADES, LABELS)

    assert torch.equal(learn.seen[0], SHADES[torch.arange(60) % 5 != 1])


def test_a_test_part_is_what_is_tested(learn):
    _, accuracies = learn(SHADES, LABELS, SHADES, 1 - LABELS)

    assert torch.equal(learn.seen[0], SHADES)
    assert accuracies == [0, 0]


def test_the_only_image_of_a_class_is_learned_and_not_tested(learn):
    labels = LABELS.clone()
    labels[59] = 2

    _, accuracies = learn(SHADES, labels)

    assert len(learn.seen[0]) == 48
    assert accuracies == approx([1, 1, math.nan], nan_ok=True)


def test_too_few_images_are_refused(learn):
    with raises(UserError, match="at least 8 images to learn from, not 5"):
        learn(SHADES[:7], LABELS[:7])


# --- the report, on models that are known: clouds of b, a and c in images of 2 pixels

CENTRES = torch.tensor([[-0.8, -0.8], [0.8, 0.0], [0.0, 0.8]])


def clouds(counts, seed):
    """Images (N, 1, 1, 2) uint8 and labels (N,): so many of each class."""
    labels = torch.arange(3).repeat_interleave(torch.tensor(counts))
    points = CENTRES[labels] + 0.05 * normal(len(labels), 2, seed)
    return to_uint8(points).view(-1, 1, 1, 2), labels


def flat(images):
    """The features of the known classifier."""
    return to_float(images).flatten(1)


class Known:
    """A checkpoint whose samples are clouds, and whose bound is `number`. It keeps what
    it is asked: noise and images."""

    def __init__(self, number, counts, excluded=()):
        self.path = f"{number}.pt"
        self.number = number
        self.config = {"image_shape": (1, 1, 2)}
        self.data = {"classes": ["b", "a", "c"], "excluded": list(excluded)}
        self.forgotten = None
        self.unet = torch.nn.Linear(1, 1)
        self.diffusion = self
        self.images, _ = clouds(counts, number)
        self.noise = []
        self.bounded = []

    def sample(self, unet, n, shape, steps, eta, seed, progress=False, series=""):
        self.noise.append((n, shape, steps, eta, seed, series))
        return to_float(self.images[:n])

    def variational_bound(self, unet, x0, steps, progress):
        self.bounded.append(to_uint8(x0).tolist())
        return {"total": torch.full((len(x0),), float(self.number))}


@fixture
def known(tmp_path, monkeypatch):
    """Models by name; what is real: images to learn from (True) and to test on (False);
    and the batches of relearning."""
    models = {
        "before": Known(0, [30, 50, 20]),
        "after": Known(1, [75, 10, 15]),
        "r": Known(2, [60, 4, 36], excluded="a"),
        "q": Known(3, [50, 6, 44], excluded="a")}
    real = {True: clouds([60, 200, 60], 10), False: clouds([7, 7, 7], 11)}
    batches = []
    classifier = SimpleNamespace(body=torch.nn.Flatten(), head=lambda x: 20 * x @ CENTRES.T)
    for name, function in {
        "load_checkpoint": lambda path, device: models[path],
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
    assert before["u_fid_of_a_point"] == approx(torch.cov(real.T).trace().item())


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

    shared = (100, (1, 1, 2), 7, 1.0, 3)
    assert known.before.noise == known.after.noise == [(*shared, "")]
    assert known.r.noise == [(*shared, "retrained 0")]
    assert known.q.noise == [(*shared, "retrained 1")]


@parametrize("part, bits", [(clouds([7, 0, 7], 2), None), ((None, None), 0)])
def test_bits_of_no_image_are_null_and_without_a_test_part_of_training_images(known, part, bits):
    known.real[False] = part

    before = report()["before"]

    assert before["bits_forgotten"] == bits
    assert before["bits_retained"] == 0


@parametrize("words", [
    "50 -> 10", "80.0%", "c, 75%", "0.00 -> 1.00", "PUL 92.0%", "the floor is missing",
    "total_variation: 0.210, before 0.460, floor nan",
    "93.0% in the mean over classes, on 97.0% of the forgotten; N = 100"])
def test_the_table_shows_the_report(known, capsys, words):
    report("--retrained r")

    assert words in capsys.readouterr().out


def test_a_pul_of_few_samples_is_not_shown(known, capsys):
    report("--forget-class c --samples 90")

    assert "10 -> 5         too few" in capsys.readouterr().out


def test_the_distance_to_two_retrained_models_by_hand(known):
    found = report("--retrained r q")["retrained"]

    # shares of all: before .3 .5 .2, after .75 .1 .15, retrained .6 .04 .36, .5 .06 .44
    left = (0.25 - 0.1) / (0.45 - 0.1)
    assert found["total_variation"] == approx(
        {"after": 0.25, "before": 0.45, "floor": 0.1, "left": left})
    assert found["PUL"] == [92, 88]
    assert found["drift"] == approx(60 / 96 - 50 / 94)
    assert found["worst_kept"] == approx(36 / 44)


def test_an_untouched_model_is_at_1_and_a_retrained_one_at_0():
    before = {"features": 1 + normal(2000, 8, seed=0), "counts": [5, 5]}
    noise = normal(3, 2000 * 8, seed=1).view(3, 2000, 8)
    after, *retrained = [{"features": features, "counts": [1, 9]} for features in noise]

    untouched = against_retraining(before, before, retrained, [0])
    found = against_retraining(before, after, retrained, [0])

    for name in ("frechet", "total_variation"):
        assert untouched[name]["left"] == 1
        assert found[name]["left"] == approx(0, abs=0.01)


@parametrize("u_fid, after, accuracy, count, said", [
    (1, 10, 0.9, 20, "u-FID grew"),
    (2, 2, 0.9, 20, "before draws nothing like the images"),
    (1, 2, 0.45, 20, "45%"),
    (1, 2, 0.9, 2, "2 before are too few"),
    (1, 2, 0.9, 0, "PUL is undefined"),
])
def test_what_makes_counts_worthless_is_told(u_fid, after, accuracy, count, said):
    before = {"u_fid": u_fid, "u_fid_of_a_point": 2, "forgotten_count": count}

    warnings = warnings_of(
        {"before": before, "after": {"u_fid": after}, "classifier_accuracy": accuracy})

    assert len(warnings) == 1
    assert said in warnings[0]


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
