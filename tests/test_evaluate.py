"""The metrics against closed forms and simulations; the report on known models."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

import evaluate
from ddpm import UserError
from evaluate import (Judge, Look, against_retraining, compare, drift, frechet_distance,
                      get_classifier, percentage_of_unlearning, print_table, relearning, worst_kept)
from train_ddpm import to_float, to_uint8


def test_frechet_distance_is_its_closed_form():
    x = torch.randn(500, 6, generator=torch.Generator().manual_seed(0)).double()
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T  # of covariance I, exactly
    assert frechet_distance(x, x + 2) == pytest.approx(6 * 4, rel=1e-9)  # the means' distance
    s, r = torch.tensor([[1, 2, 3, 0.5, 1, 4], [2, 2, 1, 0.1, 3, 4]]).double()
    expected = 6 + (s - r).square().sum().item()  # of covariances that commute
    assert frechet_distance(x * s, x * r + 1) == pytest.approx(expected, rel=1e-9)
    a, b = torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(0)).double()
    root = torch.linalg.eigvals(a @ a.T @ b @ b.T).real.clamp(min=0).sqrt().sum()
    expected = (a.square().sum() + b.square().sum() - 2 * root).item()  # of those that do not
    assert frechet_distance(x @ a.T, x @ b.T) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_of_singular_covariances():
    """tr (C_a^1/2 C_b C_a^1/2)^1/2 is the nuclear norm of X_a X_b^T, of centred points;
    of fewer points than dimensions, eigenvalues are 0, and by rounding below it."""
    a, b = (torch.randn(n, 64, generator=torch.Generator().manual_seed(n)).double() for n in (9, 8))
    x, y = ((p - p.mean(0)) / math.sqrt(len(p) - 1) for p in (a, b))
    expected = ((a.mean(0) - b.mean(0)).square().sum() + x.square().sum() + y.square().sum()
                - 2 * torch.linalg.svdvals(x @ y.T).sum())
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-6)
    flat, step = torch.randn(50, 20) * (torch.arange(20) < 10), 3 * (torch.arange(20) == 0)
    assert frechet_distance(flat, flat + step) == pytest.approx(9, rel=1e-4)


def test_pul_drift_and_the_worst_kept_class_by_hand():
    assert [percentage_of_unlearning(200, n) for n in (0, 50, 200, 300)] == [100, 75, 0, -50]
    assert math.isnan(percentage_of_unlearning(0, 3))
    before, after = [10, 50, 30, 20], [0, 50, 15, 35]  # of 100 retained, 15 went from 2 to 3
    assert drift(before, after, [0]) == pytest.approx(0.15)
    assert drift(before, before, [0]) == 0 and drift([5, 10, 0], [5, 0, 10], [0]) == 1
    assert worst_kept(before, after, [0]) == (2, 0.5)
    assert worst_kept([3, 0, 4], [0, 9, 4], [0]) == (2, 1.0)  # what was not drawn cannot be lost
    assert worst_kept([3, 0], [0, 9], [0])[0] is None


@pytest.mark.parametrize("channels", [1, 3])
def test_a_classifier_learns_once_and_is_tested_on_the_unseen(tmp_path, monkeypatch, channels):
    monkeypatch.chdir(tmp_path)
    model, seen = SimpleNamespace(data={"name": "stub", "classes": ["dark", "light"]}), []
    labels, i, train = torch.arange(60) // 30, torch.arange(60), evaluate.train_classifier
    images = (150 * labels.view(-1, 1, 1, 1) + torch.randint(50, (60, channels, 8, 8))).byte()
    monkeypatch.setattr(evaluate, "train_classifier", lambda *a: (seen.append(a[1]), train(*a)))
    made, again = (get_classifier(model, images, labels, None, None, "cpu") for _ in range(2))
    assert len(seen) == 1 and torch.equal(seen[0], images[i % 5 != 1])  # sorted by class
    assert made[1] == again[1] == [1, 1] and not again[0].training
    assert torch.equal(again[0](to_float(images)), made[0](to_float(images)))
    swapped = get_classifier(model, images, 1 - labels, images, labels, "cpu")[1]  # a test part
    assert swapped == [0, 0] and len(seen[1]) == 60
    model.data["classes"].append("one")  # a class of one image is learned, and not tested
    few = torch.cat([labels[:-1], torch.tensor([2])])
    accuracies = get_classifier(model, images, few, None, None, "cpu")[1]
    assert accuracies[:2] == [1, 1] and math.isnan(accuracies[2]) and len(seen[2]) == 48
    with pytest.raises(UserError, match="at least 8 images to learn from, not 5"):
        get_classifier(model, images[:7], labels[:7], None, None, "cpu")


# --- the report, on models that are known: clouds of a, b and c in images of 2 pixels

CENTRES = torch.tensor([[-0.8, -0.8], [0.8, 0.0], [0.0, 0.8]])


def clouds(counts, seed):
    """Images (N, 1, 1, 2) uint8 and labels (N,): so many of each class."""
    labels = torch.arange(3).repeat_interleave(torch.tensor(counts))
    noise = torch.randn(len(labels), 2, generator=torch.Generator().manual_seed(seed))
    return to_uint8(CENTRES[labels] + 0.05 * noise).view(-1, 1, 1, 2), labels


def stub(path, counts, number, log):
    """A checkpoint whose samples are such images, and whose bound is `number`."""
    def sample(unet, n, shape, steps, eta, seed, progress=False, series=""):
        log.append((n, shape, steps, eta, seed, series))
        return to_float(images[:n])

    def bound(unet, x0, steps):
        log.append(to_uint8(x0).flatten(1).tolist())
        return {"total": torch.full((len(x0),), float(number))}

    images = clouds(counts, number)[0]
    return SimpleNamespace(
        path=path, config={"image_shape": (1, 1, 2)}, unet=torch.nn.Linear(1, 1), images=images,
        data={"classes": ["b", "a", "c"], "excluded": []}, forgotten={"classes": ["a"]},
        diffusion=SimpleNamespace(sample=sample, variational_bound=bound))


@pytest.fixture
def known(monkeypatch):
    """Models before and after, arguments, a log of what the models are asked; and what
    is real: the images to learn from (True) and to test on (False)."""
    log, real = [], {True: clouds([60, 60, 60], 10), False: clouds([7, 7, 7], 11)}
    classifier = SimpleNamespace(body=torch.nn.Flatten(), head=lambda x: 20 * x @ CENTRES.T)
    monkeypatch.setattr(evaluate, "load_data_of", lambda model, root, train=True: real[train])
    monkeypatch.setattr(evaluate, "get_classifier", lambda *args: (classifier, [0.9, 0.97, 0.92]))
    before, after = (stub(f"{name}.pt", counts, i, log) for i, (name, counts) in enumerate(
        {"before": [30, 50, 20], "after": [75, 10, 15]}.items()))
    args = SimpleNamespace(samples=100, sampling_steps=7, seed=3, bits=5, relearn=4)
    return SimpleNamespace(before=before, after=after, args=args, log=log, real=real,
                           classifier=classifier)


def flat(images):
    """The features of the known classifier."""
    return to_float(images).flatten(1)


def test_the_report_by_hand(known, capsys):
    judge, (images, labels) = Judge(known.before, "cpu", None), known.real[True]

    report, samples = compare(judge, known.after, ["a"], known.args)

    assert report["PUL"] == 80 and report["before"]["counts"] == {"b": 30, "a": 50, "c": 20}
    assert report["worst_kept"] == {"class": "c", "share_left": 0.75} and not report["warnings"]
    assert report["drift"] == pytest.approx(75 / 90 - 30 / 50)
    real = flat(images[labels != 1])
    for number, (when, drawn) in enumerate(samples.items()):
        side, model = report[when], getattr(known, when)
        assert torch.equal(drawn, model.images) and side["checkpoint"] == f"{when}.pt"
        assert side["u_fid"] == pytest.approx(frechet_distance(flat(drawn), real), rel=1e-4)
        assert side["u_fid_of_a_point"] == pytest.approx(torch.cov(real.T).trace().item())
        assert side["bits_forgotten"] == side["bits_retained"] == number
    # perfect deletion: the samples before, less those of the class
    deleted = flat(torch.cat([known.before.images[:30], known.before.images[80:]]))
    assert report["before"]["u_fid_of_perfect_deletion"] == pytest.approx(
        frechet_distance(deleted, real), rel=1e-4)
    print_table([report])
    said = capsys.readouterr().out
    assert "50 -> 10" in said and "80.0%" in said and "c, 75%" in said and "WARNING" not in said
    assert "93.0% in the mean over classes, on 97.0% of the forgotten; N = 100" in said


def test_bits_are_of_the_test_part_and_all_models_draw_the_same_noise(known):
    judge = Judge(known.before, "cpu", None)
    compare(judge, known.after, ["a"], known.args)
    other, _ = compare(judge, known.after, ["c"], known.args)

    (images, labels), bounded = known.real[False], [x for x in known.log if isinstance(x, list)]
    assert bounded[:2] == bounded[2:4] and [len(x) for x in bounded[:4]] == [5] * 4
    for x, of_kind in zip(bounded, (labels == 1, labels != 1)):
        assert all(image in images[of_kind].flatten(1).tolist() for image in x)
    drawn = [x for x in known.log if isinstance(x, tuple)]  # the parent once
    assert other["PUL"] == 25 and drawn == [(100, (1, 1, 2), 7, 1.0, 3, "")] * 3


def test_the_distance_to_two_retrained_models_by_hand(known, capsys):
    judge = Judge(known.before, "cpu", None)
    others = [stub(f"without-{i}.pt", counts, 2 + i, known.log)
              for i, counts in enumerate(([60, 4, 36], [50, 6, 44]))]

    report, _ = compare(judge, known.after, ["a"], known.args, others)

    target, (r, q) = report["retrained"], others
    assert target["PUL"] == [92, 88] and target["checkpoints"] == ["without-0.pt", "without-1.pt"]
    # shares of all: before .3 .5 .2, after .75 .1 .15, retrained .6 .04 .36, .5 .06 .44
    expected = {"after": (0.21 + 0.29) / 2, "before": (0.46 + 0.44) / 2, "floor": 0.1}
    expected["left"] = (0.25 - 0.1) / (0.45 - 0.1)
    assert target["total_variation"] == pytest.approx(expected)
    x, y, z = (flat(model.images) for model in (known.after, r, q))
    frechet = target["frechet"]
    assert frechet["floor"] == pytest.approx(frechet_distance(y, z), rel=1e-4)
    assert frechet["after"] == pytest.approx(
        (frechet_distance(x, y) + frechet_distance(x, z)) / 2, rel=1e-4)
    assert target["drift"] == pytest.approx(60 / 96 - 50 / 94)
    assert target["worst_kept"][1] == pytest.approx(36 / 44)
    series = [x[5] for x in known.log if isinstance(x, tuple)]
    assert series == ["", "", "retrained 0", "retrained 1"]  # no noise is shared
    print_table([report])
    assert "total_variation: 0.250, before 0.450, floor 0.100; left 0.43" in capsys.readouterr().out


def test_a_retrained_model_is_at_0_and_an_untouched_one_at_1():
    generator = torch.Generator().manual_seed(0)

    def look(mean, counts):
        features = torch.randn(2000, 8, generator=generator) + mean
        return Look(None, features, None, counts, 1.0)

    before, after, r, q = look(1, [5, 5]), look(0, [1, 9]), look(0, [1, 9]), look(0, [1, 9])
    for model, left in ((before, 1), (after, 0)):
        found = against_retraining(before, model, (r, q), [0])
        assert found["frechet"]["left"] == pytest.approx(left, abs=0.02)
        assert found["total_variation"]["left"] == pytest.approx(left, abs=0.02)
    alone = against_retraining(before, after, (r,), [0])
    assert math.isnan(alone["frechet"]["floor"]) and math.isnan(alone["drift"])


def test_what_makes_counts_worthless_is_told(known, capsys, monkeypatch):
    """A model that draws nothing known, after or before; a poor classifier; too few."""
    known.after.diffusion.sample = lambda *args, **kwargs: torch.zeros(100, 1, 1, 2)
    before = stub("before.pt", [49, 2, 49], 0, known.log)
    print_table([compare(Judge(before, "cpu", None), known.after, ["a"], known.args)[0]])
    said = capsys.readouterr().out
    assert "WARNING: u-FID grew" in said and "too few" in said and "2 before are too few" in said

    noise = stub("noise.pt", [40, 40, 20], 5, known.log)
    noise.diffusion.sample = lambda *args, **kwargs: torch.full((100, 1, 1, 2), -1.0)
    monkeypatch.setattr(evaluate, "get_classifier", lambda *args: (
        known.classifier, [0.5, 0.4, math.nan]))
    print_table([compare(Judge(noise, "cpu", None), noise, ["a"], known.args)[0]])
    said = capsys.readouterr().out
    assert "before draws nothing like the images" in said
    assert "right on 45% of a class alone" in said


def test_a_test_part_without_the_class_and_no_test_part(known, tmp_path):
    """Bits of no images are nan, null in the file; without a test part, all others."""
    for part, bits in ((clouds([7, 0, 7], 2), None), ((None, None), 0)):
        known.real[False] = part
        report, _ = compare(Judge(known.before, "cpu", None), known.after, ["a"], known.args)
        print_table([report])
        evaluate.write_json(tmp_path / "r.json", {**report, "settings": [math.inf, 0.5]})
        report = json.loads((tmp_path / "r.json").read_text(), parse_constant=pytest.fail)
        assert report["before"]["bits_forgotten"] == bits and report["settings"] == [None, 0.5]
        assert report["before"]["bits_retained"] == 0 and [] not in known.log


def test_relearning_sees_the_forgotten_class_alone(known, monkeypatch):
    seen, of_class = {}, known.real[True][0][60:120].flatten(1).tolist()
    monkeypatch.setattr(evaluate, "training_step", lambda unet, diffusion, optimizer, x: (
        seen.setdefault(unet, []).append(to_uint8(x).flatten(1).tolist())))
    judge = Judge(known.before, "cpu", None)
    result, other = (relearning(judge, model, ["a"], known.args, images=20)
                     for model in (known.after, known.before))
    one, two = seen[known.after.unet], seen[known.before.unet]
    assert one == two and [len(x) for x in one] == [64] * 4  # every model sees the same
    assert all(image in of_class for x in one for image in x)
    assert len({tuple(image) for x in one for image in x}) <= 20
    assert [result[key] for key in ("steps", "images", "samples")] == [[0, 2, 4], 20, 100]
    assert result["shares"] + other["shares"] == pytest.approx([0.1] * 3 + [0.5] * 3)
    assert known.log == [(100, (1, 1, 2), 7, 1.0, 3, "")] * 6
