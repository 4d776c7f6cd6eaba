"""The metrics: Frechet distance against its closed form, PUL, intervals."""

import json
import math
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import torch
from torchvision.models import Inception_V3_Weights, inception_v3

import evaluate
from ddpm import UserError
from evaluate import (METRICS, Evidence, drift, drift_of_noise, frechet_distance,
                      inception_features, jitter, percentage_of_unlearning, share_inside,
                      wilson_interval, worst_kept)


def whitened(n, d, seed):
    """n points whose sample mean is exactly 0 and sample covariance exactly the
    identity."""
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T


def test_frechet_distance_is_its_closed_form():
    x = whitened(500, 6, 0)
    # equal covariances: the means' distance
    assert frechet_distance(x, x + 2) == pytest.approx(6 * 4, rel=1e-9)
    # commuting covariances: || m ||^2 + sum (s_a - s_b)^2
    s_a, s_b = torch.tensor([1.0, 2, 3, 0.5, 1,
                             4]).double(), torch.tensor([2.0, 2, 1, 0.1, 3, 4]).double()
    assert frechet_distance(x * s_a,
                            x * s_b + 1) == pytest.approx(6 + (s_a - s_b).square().sum().item(),
                                                          rel=1e-9)


def test_frechet_distance_of_covariances_that_do_not_commute():
    torch.manual_seed(0)
    a, b = torch.randn(5, 5).double(), torch.randn(5, 5).double()
    x = whitened(400, 5, 1)
    cov_a, cov_b = a @ a.T, b @ b.T
    # tr (C_a C_b)^1/2
    product_roots = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    expected = (cov_a.trace() + cov_b.trace() - 2 * product_roots).item()
    assert frechet_distance(x @ a.T, x @ b.T) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_of_equal_sets_is_zero_and_it_is_symmetric():
    torch.manual_seed(0)
    x, y = torch.randn(300, 8) * 3 + 1, torch.randn(200, 8)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=1e-9)
    q = torch.linalg.qr(torch.randn(8, 8))[0]
    assert frechet_distance(x @ q, y @ q) == pytest.approx(frechet_distance(x, y), rel=1e-4)


def test_frechet_distance_survives_a_singular_covariance():
    x = torch.randn(50, 20)
    x[:, 10:] = 0
    y = x.clone()
    y[:, 0] += 3
    assert frechet_distance(x, y) == pytest.approx(9, rel=1e-4)


def test_frechet_distance_of_fewer_points_than_dimensions():
    """Against tr (C_a^1/2 C_b C_a^1/2)^1/2 = the nuclear norm of X_a X_b^T, of centred
    points: most eigenvalues are 0, and by rounding below it."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 64, generator=generator, dtype=torch.float64) for n in (10, 12))
    x, y = ((p - p.mean(0)) / math.sqrt(len(p) - 1) for p in (a, b))
    expected = ((a.mean(0) - b.mean(0)).square().sum() + x.square().sum() + y.square().sum()
                - 2 * torch.linalg.svdvals(x @ y.T).sum())
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-6)


def test_precision_and_recall_are_not_one_another():
    """Samples in the middle of the real ones: all are good, and few of those had."""
    generator = torch.Generator().manual_seed(0)
    real, samples = torch.randn(200, 2, generator=generator), torch.zeros(200, 2)
    samples += 0.05 * torch.randn(200, 2, generator=generator)
    evidence = Evidence(samples, torch.ones(200, 2), real, real, [0])
    precision, recall = (METRICS[name][2](evidence) for name in ("precision", "recall"))
    assert precision > 0.9 and recall < 0.3


def test_pul():
    assert percentage_of_unlearning(200, 0) == 100
    assert percentage_of_unlearning(200, 50) == 75
    assert percentage_of_unlearning(200, 200) == 0
    assert percentage_of_unlearning(100, 150) == -50
    assert math.isnan(percentage_of_unlearning(0, 3))


def test_drift_and_the_worst_kept_class_by_hand():
    # class 0 is forgotten; of 100 retained, 15 went from 2 to 3
    before, after = [10, 50, 30, 20], [0, 50, 15, 35]
    assert drift(before, after, [0]) == pytest.approx(0.15)
    assert drift(before, before, [0]) == 0 and drift([5, 10, 0], [5, 0, 10], [0]) == 1
    assert worst_kept(before, after, [0]) == (2, 0.5)
    # what was not drawn before cannot be lost
    assert worst_kept([3, 0, 4], [0, 9, 4], [0]) == (2, 1.0)


def test_drift_of_noise_is_that_of_two_sets_of_one_model():
    torch.manual_seed(0)
    shares = torch.tensor([0.1, 0.4, 0.3, 0.2])
    sets = torch.distributions.Multinomial(2000, shares).sample((400, 2)).int().tolist()
    mean = sum(drift(a, b, [0]) for a, b in sets) / 400
    assert mean == pytest.approx(drift_of_noise(sets[0][0], [0]), rel=0.1)


def test_wilson_interval_covers_95_percent():
    torch.manual_seed(0)
    for p in (0.02, 0.1, 0.5):
        counts = torch.distributions.Binomial(300, torch.tensor(p)).sample((2000,)).int().tolist()
        covered = sum(low <= p <= high for low, high in (wilson_interval(c, 300)
                                                         for c in counts)) / 2000
        assert 0.92 < covered < 0.98
    assert wilson_interval(0, 100)[0] == 0 and 0 < wilson_interval(0, 100)[1] < 0.05
    assert wilson_interval(100, 100)[1] == pytest.approx(1, abs=1e-12)


def test_inception_features_are_the_2048_pooled_ones():
    """Against the network's own layers, called one by one as far as the pooling."""
    torch.manual_seed(0)
    network = inception_v3(weights=None, init_weights=False, transform_input=True)
    network.fc = torch.nn.Identity()
    pooled = []
    network.avgpool.register_forward_hook(lambda module, args, out: pooled.append(out.flatten(1)))
    images = torch.randint(0, 256, (3, 3, 20, 20), dtype=torch.uint8)
    features = inception_features(network.eval(), images, batch_size=2)
    assert features.shape == (3, 2048) and torch.equal(features, torch.cat(pooled))
    assert torch.allclose(features, inception_features(network, images), atol=1e-4)


def test_inception_sees_images_normalised_as_it_was_trained():
    """White is (1 - mean) / std of ImageNet, at 299 x 299, as torchvision says it."""
    class Seen(torch.nn.Conv2d):
        def forward(self, x):
            self.x = x
            return x.flatten(1)

    network = Seen(3, 1, 1)
    inception_features(network, torch.full((2, 3, 20, 20), 255, dtype=torch.uint8))
    preset = Inception_V3_Weights.IMAGENET1K_V1.transforms()
    for c in range(3):
        white = (1 - preset.mean[c]) / preset.std[c]
        assert torch.allclose(network.x[:, c], torch.full((2, 299, 299), white), atol=1e-4)


def test_inception_without_a_network_says_where_to_get_it(monkeypatch):
    def fails(**kwargs):
        raise URLError("no network")

    monkeypatch.setattr(evaluate, "inception_v3", fails)
    with pytest.raises(UserError, match="inception_v3_google.*pth"):
        evaluate.load_inception("cpu")


def precision_and_recall(real, generated, k=3):
    return share_inside(generated, real, k), share_inside(real, generated, k)


def test_precision_and_recall_by_hand():
    """On a line, k = 1: each point's ball reaches to its nearest neighbour."""
    real = torch.tensor([[0.0], [1.0], [10.0], [12.0]])  # balls: [-1, 1], [0, 2], [8, 12], [10, 14]
    # balls: [0.25, 0.75], [0.5, 1], [0.75, 17.25], [9, 51]
    generated = torch.tensor([[0.5], [0.75], [9.0], [30.0]])
    # 30 is off the real manifold; 0 off the generated one
    assert precision_and_recall(real, generated, k=1) == (3 / 4, 3 / 4)


def test_precision_is_quality_and_recall_variety():
    torch.manual_seed(0)
    real = torch.cat([torch.randn(300, 4), torch.randn(300, 4) + 20])  # two modes
    same = torch.cat([torch.randn(300, 4), torch.randn(300, 4) + 20])
    one_mode, noise = torch.randn(600, 4), 50 * torch.randn(600, 4)
    p, r = precision_and_recall(real, same)
    assert p > 0.8 and r > 0.8
    p, r = precision_and_recall(real, one_mode)
    assert p > 0.8 and 0.4 < r <= 0.5  # all good, and half of it missing
    assert precision_and_recall(real, noise)[0] < 0.05
    assert precision_and_recall(real, real) == (1, 1)
    p, r = precision_and_recall(real, same)
    # the one is the other with the sets exchanged
    assert precision_and_recall(same, real) == (r, p)


def test_the_table_of_metrics_is_that_of_the_functions():
    torch.manual_seed(0)
    features, real = torch.randn(20, 4), torch.randn(60, 4)
    probabilities = torch.eye(3)[torch.arange(20) % 3] * 0.7 + 0.1  # 7, 7 and 6 of each class
    evidence = Evidence(features, probabilities, real, real[:20], [0, 2])
    found = {key: function(evidence) for key, (_, _, function) in METRICS.items()}
    assert found["forgotten_count"] == 13 and found["mean_confidence"] == pytest.approx(0.8)
    assert found["u_fid"] == frechet_distance(features, real)
    assert found["precision"] == share_inside(features, real[:20])
    assert found["recall"] == share_inside(real[:20], features)


def test_jitter_keeps_size_and_content():
    torch.manual_seed(0)
    x = torch.arange(2 * 3 * 16 * 16).view(2, 3, 16, 16).float()
    y = jitter(x, pad=0)
    assert all(torch.equal(b, a) or torch.equal(b, a.flip(2)) for a, b in zip(x, y))
    y = jitter(x)
    assert y.shape == x.shape and not torch.equal(y, x)
    for a, b in zip(x, y):  # a shift by at most 4, mirrored or not, of what was there
        padded = torch.nn.functional.pad(torch.stack([a, a.flip(2)]), (4,) * 4, mode="reflect")
        assert any(torch.equal(p[:, dy : dy + 16, dx : dx + 16], b) for p in padded
                   for dy in range(9) for dx in range(9))


# --- the report, on models that are known ---------------------------------------------


def stub(path, features, log):
    """A checkpoint whose samples are these features (N, 2), as images of 1x2 pixels."""
    def sample(unet, n, shape, steps, eta, seed, progress=False):
        log.append((n, steps, eta, seed))
        return features[:n].view(n, *shape)

    return SimpleNamespace(path=path, config={"image_shape": (1, 1, 2)}, unet=None, forgotten=None,
                           data={"classes": ["a", "b"], "name": "stub"},
                           diffusion=SimpleNamespace(sample=sample))


class StubJudge(evaluate.Judge):
    """Features are the pixels; what lies above 0.5 is of class a."""

    def __init__(self, checkpoint, real, labels):
        self.checkpoint, self.labels, self.accuracy, self.device = checkpoint, labels, 1.0, "cpu"
        self.real_features, self.samples, self.before, self.inception = real, None, {}, None

    def look_at(self, images):
        x = images.flatten(1).float() / 127.5 - 1
        is_a = (x[:, 0] > 0.5).float()
        return x, torch.stack([is_a, 1 - is_a], dim=1)


def stub_report():
    generator = torch.Generator().manual_seed(0)
    cloud = 0.1 * torch.randn(400, 2, generator=generator)
    a = cloud[:100] + torch.tensor([0.8, 0.0])
    log = []
    before = stub("before.pt", torch.cat([a[:50], cloud[100:150]]), log)
    after = stub("after.pt", torch.cat([a[:10], cloud[200:290]]), log)
    judge = StubJudge(before, torch.cat([a, cloud[300:]]), (torch.arange(200) >= 100).long())
    sampling = evaluate.Sampling(100, 7, 0.5, 3)
    report, _ = evaluate.compare(judge, after, ["a"], sampling, 0)
    return report, log, torch.cat([a, cloud[300:]]), after, judge


def test_the_report_by_hand():
    report, log, real, after, judge = stub_report()
    assert report["PUL"] == 80 and report["recognisable"]
    assert log == [(100, 7, 0.5, 3)] * 2  # the same noise before and after
    sides = [judge.look_at(evaluate.to_uint8(s))[0] for s in (
        judge.checkpoint.diffusion.sample(None, 100, (1, 1, 2), 1, 1, 1),
        after.diffusion.sample(None, 100, (1, 1, 2), 1, 1, 1))]
    fids = [frechet_distance(x, real[100:]) for x in sides]  # against what stays alone
    assert [report[w]["u_fid"] for w in ("before", "after")] == pytest.approx(fids, rel=1e-6)
    assert report["u_fid_ratio"] == pytest.approx(fids[1] / fids[0]) and fids[1] < fids[0]
    text = evaluate.report_table(report)
    assert "80.0%" in text and "WARNING" not in text


def test_a_model_that_draws_nothing_known_is_told():
    report, *_ = stub_report()
    report["after"]["mean_confidence"] = 0.79
    report["recognisable"] = False
    assert "WARNING: the classifier recognises much less" in evaluate.report_table(report)


def test_too_few_images_are_refused():
    _, _, _, after, judge = stub_report()
    judge.labels = torch.zeros(200).long()
    judge.labels[0] = 1
    with pytest.raises(UserError, match="at least two real images .* there are 1"):
        judge.describe(torch.zeros(9, 1, 1, 2, dtype=torch.uint8), [0], after, 0)


def test_relearning_sees_the_forgotten_class_alone(monkeypatch):
    _, log, _, after, judge = stub_report()
    judge.images = torch.zeros(200, 1, 1, 2, dtype=torch.uint8)
    judge.images[:100] = 255
    judge.classifier = None
    monkeypatch.setattr(evaluate, "features_and_probabilities",
                        lambda classifier, images, device: judge.look_at(images))
    seen = []
    monkeypatch.setattr(evaluate, "training_step",
                        lambda unet, diffusion, optimizer, x: seen.append(x))
    after.unet = torch.nn.Linear(1, 1)
    result = evaluate.relearning(judge, {"unlearned": after}, ["a"], [0, 2, 4], 30, 1e-3,
                                 evaluate.Sampling(100, 7, 0.5, 3))
    assert len(seen) == 4 and all((x == 1).all() for x in seen)  # 255 is 1: class a
    assert result["unlearned"] == [0.1] * 3 and result["images"] == 30


def test_a_dataset_of_one_class_is_refused(monkeypatch):
    checkpoint = stub("one.pt", torch.zeros(2, 2), [])
    checkpoint.data["classes"] = ["a"]
    monkeypatch.setattr(evaluate, "load_data_of", lambda *args: (torch.zeros(9, 1, 1, 2), None))
    with pytest.raises(UserError, match="one.pt knows one class"):
        evaluate.Judge(checkpoint, "cpu")


def test_an_interrupted_relearning_loses_no_report(monkeypatch, tmp_path):
    report, *_ = stub_report()
    images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)

    def interrupted(*args):
        raise KeyboardInterrupt

    model = SimpleNamespace(path="m.pt")
    for name, result in (("load_checkpoint", model), ("parent_of", "m.pt"), ("check_parent", None),
                         ("names_to_count", ["a"]), ("relearning_models", {"unlearned": model}),
                         ("compare", (report, {"before": images, "after": images}))):
        monkeypatch.setattr(evaluate, name, lambda *args, result=result: result)
    monkeypatch.setattr(evaluate, "relearning", interrupted)
    args = SimpleNamespace(before=None, forget_class=None, relearn=10, never_saw=None, bits=0,
                           save_samples=None, relearn_images=1, relearn_lr=1.0)
    with pytest.raises(KeyboardInterrupt):
        judges = {"m.pt": SimpleNamespace(checkpoint=model)}
        evaluate.evaluate("m.pt", tmp_path / "m", args, judges, None, "cpu")
    assert json.loads((tmp_path / "m/report.json").read_text())["PUL"] == 80
    assert (tmp_path / "m/after.png").stat().st_size > 0


def test_json_has_no_nan(tmp_path):
    evaluate.write_json(tmp_path / "x.json", {"a": math.nan, "b": [1.5, math.inf]})
    assert json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail) == {
        "a": None, "b": [1.5, None]}
