"""Did it forget, and what did that cost? Sample before and after with the same noise.

    python evaluate.py
    python evaluate.py --after checkpoints/a.pt checkpoints/b.pt checkpoints/c.pt
    python evaluate.py --relearn 200

Holds    the metrics, the classifier that counts, the report, relearning.
Reads    unlearned checkpoints and their parent (unless told, the newest and the one
         that it came from), and the dataset they were trained on. Retained images are
         needed here, to measure; vdu.py never sees them.
Writes   results/NAME/report.json, before.png, after.png; for several models
         results/summary.json; once per dataset the classifier, in checkpoints/.
Paper    VDU (arXiv 2510.04058), experiments: PUL (percentage of unlearning) and u-FID.
"""

import contextlib
import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.models import Inception_V3_Weights, inception_v3
from torchvision.utils import save_image
from tqdm import tqdm

from ddpm import (ArgumentParser, UserError, add_shared_flags, autocast, check_outputs, digest,
                  first_line, load_checkpoint, number, pick_device, read_file, run_command_line,
                  save_checkpoint, training_step, write_atomically)
from train_ddpm import (class_indices, load_data_of, mirror_half, title_of, to_float,
                        to_uint8)

# --------------------------------------------------------------------------------------
# The metrics, as functions of features (N, d) and class probabilities (N, classes)


def percentage_of_unlearning(n_before, n_after):
    """PUL = 100 (n_before - n_after) / n_before, of the forgotten class (VDU).

    100 when none is left, 0 when nothing changed, below 0 when there are more. nan if
    there was none to begin with.
    """
    return 100 * (n_before - n_after) / n_before if n_before else math.nan


def wilson_interval(count, n, z=1.96):
    """The 95% interval of a share, from count among n (Wilson 1927): (low, high)."""
    p, z2 = count / n, z * z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def frechet_distance(features_a, features_b):
    """|| m_a - m_b ||^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2), of Gaussians.

    features: (N, d).  Returns a float (Dowson & Landau 1982; FID, Heusel et al. 2017).
    In float64, and by the symmetric form of the root: its eigenvalues are real and not
    negative but for rounding, where the usual sqrtm(C_a C_b) can turn complex.
    """
    a, b = features_a.double().cpu(), features_b.double().cpu()
    mean_a, mean_b = a.mean(0), b.mean(0)  # (d,)
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)  # (d, d)
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = vectors * values.clamp(min=0).sqrt() @ vectors.T  # C_a^1/2: (d, d)
    trace_root = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * trace_root
    return distance.clamp(min=0).item()


def share_inside(points, manifold, k=3, chunk=1000):
    """The share of points (N, d) that lie in the manifold of a set (M, d), 0 .. 1.

    That manifold is the union of balls around the set's points, each reaching to the
    point's k-th nearest neighbour in the set (Kynkaanniemi et al. 2019, eqs. 1-3). Of
    generated points in the real manifold it is the precision, the quality; of real ones
    in the generated manifold the recall, the variety, which FID alone hides. Both grow
    with the set that spans the manifold: compare at equal M.
    """
    points, manifold = points.double().cpu(), manifold.double().cpu()
    k = min(k + 1, len(manifold))  # each point is its own nearest
    reach = torch.cat([torch.cdist(c, manifold).kthvalue(k, dim=1).values
                       for c in manifold.split(chunk)])  # (M,)
    inside = [(torch.cdist(c, manifold) <= reach).any(1) for c in points.split(chunk)]
    return torch.cat(inside).float().mean().item()


def class_shares(counts, forgotten):
    """{class index: share} of the retained classes among themselves."""
    retained = {i: n for i, n in enumerate(counts) if i not in forgotten}
    return {i: n / max(1, sum(retained.values())) for i, n in retained.items()}


def drift(counts_before, counts_after, forgotten):
    """Total variation distance, 0 .. 1, between the shares of the retained classes.

    What a u-FID can hide: a neighbour of the forgotten class that went along with it.
    """
    before, after = (class_shares(c, forgotten) for c in (counts_before, counts_after))
    return sum(abs(before[i] - after[i]) for i in before) / 2


def drift_of_noise(counts, forgotten):
    """The drift to expect between two independent sets of samples of one model.

    Shares of n samples differ by a Gaussian of variance 2 p (1 - p) / n, whose mean
    absolute value is sqrt(2 / pi) times its deviation.
    """
    shares = class_shares(counts, forgotten).values()
    n = max(1, sum(n for i, n in enumerate(counts) if i not in forgotten))
    return sum(math.sqrt(2 * p * (1 - p) / n * 2 / math.pi) for p in shares) / 2


def worst_kept(counts_before, counts_after, forgotten):
    """(index, share left) of the retained class, drawn before, that lost most."""
    left = {i: counts_after[i] / n for i, n in enumerate(counts_before)
            if n and i not in forgotten}
    return min(left.items(), key=lambda item: item[1]) if left else (None, math.nan)


@dataclass
class Evidence:
    """What a metric looks at: features and probabilities of samples, real features.

    features: (N, d).  probabilities: (N, classes).  real: (M, d), of the retained
    classes. real_n: (N, d) of them, drawn at random.  forgotten: indices of classes.
    bits: the bound on -log p of forgotten and of retained images, per dimension.
    """

    features: torch.Tensor
    probabilities: torch.Tensor
    real: torch.Tensor
    real_n: torch.Tensor
    forgotten: list
    bits: tuple = (math.nan, math.nan)

    def counts(self):
        """How many samples the classifier assigns to each class: a list of integers."""
        classes = self.probabilities.shape[1]
        return self.probabilities.argmax(1).bincount(minlength=classes).tolist()


# All that is reported. name: (title, format, function of Evidence).
METRICS = {
    "forgotten_count": ("samples of it", "{:.0f}",
                        lambda e: sum(e.counts()[i] for i in e.forgotten)),
    "mean_confidence": ("mean confidence", "{:.3f}",
                        lambda e: e.probabilities.max(1).values.mean().item()),
    "u_fid": ("u-FID", "{:.2f}", lambda e: frechet_distance(e.features, e.real)),
    "precision": ("precision", "{:.3f}", lambda e: share_inside(e.features, e.real_n)),
    "recall": ("recall", "{:.3f}", lambda e: share_inside(e.real_n, e.features)),
    "bits_forgotten": ("bits/dim, forgotten", "{:.3f}", lambda e: e.bits[0]),
    "bits_retained": ("bits/dim, retained", "{:.3f}", lambda e: e.bits[1]),
}

# --------------------------------------------------------------------------------------
# The features: of a small classifier, which also counts; or of Inception


def load_inception(device):
    """torchvision's Inception v3, ending at its 2048 pooled features.

    The original FID (Heusel et al. 2017) uses the TensorFlow Inception of 2015: other
    weights, pooling that leaves the border out, another resizing. Compare figures
    within this code only. Raises UserError where the weights cannot be had.
    """
    weights = Inception_V3_Weights.IMAGENET1K_V1
    try:
        network = inception_v3(weights=weights)  # 104 MB, downloaded once into torch's cache
    except (OSError, RuntimeError) as e:
        cached = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rpartition("/")[2]
        raise UserError(f"Inception v3's weights cannot be downloaded ({first_line(e)}); where "
                        f"there is a network, fetch {weights.url} and put it at {cached}") from e
    network.fc = nn.Identity()
    return network.eval().to(device)


@torch.inference_mode()
def inception_features(network, images, batch_size=50):
    """uint8 images (N, 3, H, W) -> (N, 2048), by load_inception's network."""
    mean = torch.tensor((0.485, 0.456, 0.406)).view(1, 3, 1, 1)  # ImageNet's
    std = torch.tensor((0.229, 0.224, 0.225)).view(1, 3, 1, 1)
    device, features = next(network.parameters()).device, []
    for chunk in tqdm(images.split(batch_size), desc="Inception features", unit="batch",
                      disable=len(images) < 1000):
        x = F.interpolate(chunk.float() / 255, size=(299, 299), mode="bilinear", antialias=True)
        features.append(network(((x - mean) / std).to(device)).float().cpu())
    return torch.cat(features)


class Classifier(nn.Module):
    """(B, C, H, W) in [-1, 1] -> logits (B, classes); `body` gives its 128 features."""

    def __init__(self, image_shape, classes):
        super().__init__()
        C, H, W = image_shape
        if C == 1:
            self.body = nn.Sequential(
                nn.Conv2d(C, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),  # (B, 32, H/2, W/2)
                nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
                nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),  # (B, 64, H/4, W/4)
                nn.Flatten(), nn.Dropout(0.25),
                nn.Linear(64 * (H // 4) * (W // 4), 128), nn.ReLU(),  # (B, 128)
            )
        else:  # photographs need more width, and batch norm to train it in a few minutes
            self.body = nn.Sequential(
                *self.block(C, 64), nn.MaxPool2d(2),
                *self.block(64, 128), nn.MaxPool2d(2),  # (B, 128, H/4, W/4)
                *self.block(128, 128), *self.block(128, 256), nn.MaxPool2d(2),
                *self.block(256, 256),  # (B, 256, H/8, W/8)
                nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.25),
                nn.Linear(256, 128), nn.ReLU(),  # (B, 128)
            )
        self.head = nn.Linear(128, classes)

    @staticmethod
    def block(a, b):
        return nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()

    def forward(self, x):
        return self.head(self.body(x))


def jitter(x, pad=4):
    """Mirror half of the images, and shift each by up to `pad` pixels: (B, C, H, W)."""
    B, C, H, W = x.shape
    x = F.pad(mirror_half(x), (pad,) * 4, mode="reflect")  # (B, C, H + 2 pad, W + 2 pad)
    dy, dx = torch.randint(2 * pad + 1, (2, B))
    rows, columns = dy[:, None] + torch.arange(H), dx[:, None] + torch.arange(W)  # (B, H), (B, W)
    return x[torch.arange(B)[:, None, None, None], torch.arange(C)[:, None, None],
             rows[:, None, :, None], columns[:, None, None, :]]


def train_classifier(classifier, images, labels, device):
    """AdamW, one cycle: two minutes on two cores. images: (N, C, H, W) uint8."""
    colour = images.shape[1] == 3
    epochs = max(10, 150_000 // len(images)) if colour else max(4, 40_000 // len(images))
    epochs, B = min(60, epochs), min(128, len(images))
    steps = epochs * (len(images) // B)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    with tqdm(total=steps, desc="training the classifier", unit="step") as bar:
        for _ in range(epochs):
            order = torch.randperm(len(images))
            for batch in order.split(B)[: len(images) // B]:
                x = to_float(images[batch])
                with autocast(device):
                    logits = classifier((jitter(x) if colour else x).to(device))
                loss = F.cross_entropy(logits.float(), labels[batch].to(device))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                bar.update()


@torch.inference_mode()
def features_and_probabilities(classifier, images, device, batch_size=1000):
    """uint8 images (N, C, H, W) -> features (N, 128), probabilities (N, classes)."""
    features, probabilities = [], []
    for chunk in images.split(batch_size):
        with autocast(device):
            f = classifier.body(to_float(chunk).to(device))
            logits = classifier.head(f)
        features.append(f.float().cpu())
        probabilities.append(logits.float().softmax(1).cpu())
    return torch.cat(features), torch.cat(probabilities)


def get_classifier(checkpoint, images, labels, data_root, device, seed=0, folder="checkpoints"):
    """The dataset's classifier, trained once and kept, and its test accuracy.

    images, labels: the training images, of every class; their digest is in the file's
    name. Without a test part, every fifth of them is held out to test on.
    """
    data, image_shape = checkpoint.data, tuple(images.shape[1:])
    path = Path(folder) / f"classifier-{title_of(data)}-{digest([images, labels])}.pt"
    torch.manual_seed(seed)
    classifier = Classifier(image_shape, len(data["classes"])).to(device)
    if path.exists():
        saved = read_file(path)
        try:
            classifier.load_state_dict(saved["classifier"])
            return classifier.eval(), float(saved["accuracy"])
        except (KeyError, TypeError, ValueError, RuntimeError) as e:
            raise UserError(f"{path} is not the classifier that its name says: remove it, and it "
                            "is trained anew") from e

    test_images, test_labels = load_data_of(checkpoint, data_root, train=False)
    if test_images is None:
        held_out = torch.arange(len(images)) % 5 == 0
        test_images, test_labels = images[held_out], labels[held_out]
        images, labels = images[~held_out], labels[~held_out]
    train_classifier(classifier, images, labels, device)
    classifier.eval()
    predicted = features_and_probabilities(classifier, test_images, device)[1].argmax(1)
    accuracy = (predicted == test_labels).float().mean().item()
    save_checkpoint(path, {"classifier": classifier.state_dict(), "accuracy": accuracy})
    return classifier, accuracy


# --------------------------------------------------------------------------------------
# The report


@dataclass
class Sampling:
    """How samples are drawn, the same for every model."""

    samples: int
    sampling_steps: int
    eta: float
    seed: int

    def draw(self, checkpoint):
        """Samples of a checkpoint's model, (N, C, H, W) uint8."""
        print(f"sampling from {checkpoint.path}")
        x = checkpoint.diffusion.sample(
            checkpoint.unet, self.samples, checkpoint.config["image_shape"], self.sampling_steps,
            self.eta, self.seed, progress=True)
        return to_uint8(x)


class Judge:
    """A model before, the classifier of its dataset, the features of its real images.

    features: "auto", "inception" or "classifier", what u-FID, precision and recall
    compare.
    """

    def __init__(self, checkpoint, device, data_root=None, features="auto"):
        self.checkpoint, self.device, self.data_root = checkpoint, device, data_root
        self.inception = self.test = None
        colour = checkpoint.config["image_shape"][0] == 3
        if features == "inception" and not colour:
            raise UserError("Inception's features are for colour images; leave --features away")
        self.images, self.labels = load_data_of(checkpoint, data_root)
        if len(checkpoint.data["classes"]) < 2:
            raise UserError(f"{checkpoint.path} knows one class: nothing would stay to compare")
        self.classifier, self.accuracy = get_classifier(checkpoint, self.images, self.labels,
                                                        data_root, device)
        if features == "inception" or (features == "auto" and colour):
            try:
                self.inception = load_inception(device)
            except UserError as e:
                if features == "inception":
                    raise
                print(f"u-FID in the classifier's features: {e}")
        self.real_features, _ = self.look_at(self.images)
        self.samples = None  # of the model before, once they are drawn
        self.before = {}  # what `describe` said of them, by the classes that are forgotten

    def look_at(self, images):
        """uint8 images (N, C, H, W) -> features (N, d), probabilities (N, classes)."""
        features, probabilities = features_and_probabilities(self.classifier, images, self.device)
        if self.inception is not None:
            features = inception_features(self.inception, images)
        return features, probabilities

    def bits(self, model, forgotten, images, steps=40):
        """The bound on -log p, bits per dimension, of forgotten and retained images.

        What the method claims to change, and to keep. The same images, t and eps for
        every model; training images where there is no test part.
        """
        if images == 0:
            return math.nan, math.nan
        if self.test is None:
            x, y = load_data_of(self.checkpoint, self.data_root, train=False)
            self.test = (self.images, self.labels) if x is None else (x, y)
        x, y = self.test
        generator, means = torch.Generator().manual_seed(0), []
        gone = torch.isin(y, torch.tensor(forgotten))
        for mask in (gone, ~gone):
            of_kind = mask.nonzero().flatten()
            chosen = of_kind[torch.randperm(len(of_kind), generator=generator)[:images]]
            x0 = to_float(x[chosen]).to(self.device)
            bound = model.diffusion.variational_bound(model.unet, x0, steps)
            means.append(bound["total"].mean().item() if len(chosen) else math.nan)
        return means

    def describe(self, samples, forgotten, model, bits_images):
        """Every metric of one model, and the histogram of its samples."""
        real = self.real_features[~torch.isin(self.labels, torch.tensor(forgotten))]
        if len(real) < 2:
            raise UserError(f"u-FID needs at least two real images of the classes that stay, and "
                            f"there are {len(real)}")
        order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
        real_n = real[order[: len(samples)]]  # as many real as generated
        evidence = Evidence(*self.look_at(samples), real, real_n, forgotten,
                            self.bits(model, forgotten, bits_images))
        histogram = {}
        for name, count in zip(self.checkpoint.data["classes"], evidence.counts()):
            interval = wilson_interval(count, len(samples))
            histogram[name] = {"count": count, "share": count / len(samples),
                               "interval_95": interval}
        metrics = {key: function(evidence) for key, (_, _, function) in METRICS.items()}
        return {**metrics, "histogram": histogram}


def none_for_nan(x):
    return None if math.isnan(x) else x


def compare(judge, after, names, sampling, bits_images):
    """(report, samples) of the models before and after; names: forgotten classes."""
    parent, classes = judge.checkpoint, after.data["classes"]
    forgotten = [classes.index(name) for name in names]
    if judge.samples is None:
        judge.samples = sampling.draw(parent)
    samples = {"before": judge.samples, "after": sampling.draw(after)}
    key = tuple(forgotten)
    if key not in judge.before:
        judge.before[key] = judge.describe(judge.samples, forgotten, parent, bits_images)
    results = {"before": judge.before[key],
               "after": judge.describe(samples["after"], forgotten, after, bits_images)}
    counts = [[h["count"] for h in r["histogram"].values()] for r in results.values()]
    worst, left = worst_kept(*counts, forgotten)

    def pul(counts):
        return none_for_nan(percentage_of_unlearning(*(counts(r) for r in results.values())))

    features = ("Inception v3: 2048 numbers, torchvision's ImageNet weights; compare within this "
                "code only" if judge.inception is not None else
                "classifier: its penultimate layer, 128 numbers; compare within this dataset only")
    report = {
        "forgotten": names,
        "PUL": pul(lambda r: r["forgotten_count"]),
        "recognisable": results["after"]["mean_confidence"] >= 0.8 * (
            results["before"]["mean_confidence"]),
        "PUL_by_class": {c: pul(lambda r: r["histogram"][c]["count"]) for c in names},
        "u_fid_ratio": results["after"]["u_fid"] / results["before"]["u_fid"],
        "drift": drift(*counts, forgotten),
        "drift_of_noise": drift_of_noise(counts[0], forgotten),
        "worst_kept": {"class": None if worst is None else classes[worst],
                       "share_left": none_for_nan(left)},
        "before": {"checkpoint": parent.path, **results["before"]},
        "after": {"checkpoint": after.path, **results["after"]},
        "u_fid_features": features,
        "u_fid_real_images": int((~torch.isin(judge.labels, torch.tensor(forgotten))).sum()),
        "classifier_accuracy": judge.accuracy, **asdict(sampling),
        "data": parent.data, "unlearning": after.forgotten, "device": str(judge.device),
    }
    return report, samples


def write_json(path, value):
    """Plain values as JSON, all or nothing; nan, which JSON lacks, as null."""
    value = json.loads(json.dumps(value), parse_constant=lambda name: None)
    write_atomically(path, lambda f: f.write(json.dumps(value, indent=2).encode() + b"\n"))


def write_images(path, images, **layout):
    """uint8 images (N, C, H, W) as one PNG, a grid; all or nothing."""
    write_atomically(path, lambda f: save_image(images.float() / 255, f, format="png", **layout))


def percent(pul):
    return "undefined, no sample before" if pul is None else f"{pul:.1f}%"


def report_table(report):
    """The report as a small table for the terminal."""
    sides = (report["before"], report["after"])
    lines = [f"{'':24}{'before':>20}{'after':>20}"]
    for name in classes_to_show(report):
        title = f"class {name}{' (forgotten)' if name in report['forgotten'] else ''}"
        cells = []
        for side in sides:
            h = side["histogram"][name]
            low, high = (100 * x for x in h["interval_95"])
            cells.append(f"{h['count']:5d} [{low:4.1f},{high:5.1f}]%")
        lines.append(f"{title:24}{cells[0]:>20}{cells[1]:>20}")
    for key, (title, form, _) in METRICS.items():
        cells = [form.format(side[key]) for side in sides]
        ratio = f"   x {report['u_fid_ratio']:.2f}" if key == "u_fid" else ""
        lines.append(f"{title:24}{cells[0]:>20}{cells[1]:>20}{ratio}")
    each = ", ".join(f"{c}: {percent(pul)}" for c, pul in report["PUL_by_class"].items())
    each = f" ({each})" if len(report["forgotten"]) > 1 else ""
    confidence = [side["mean_confidence"] for side in sides]
    lines.append(f"PUL of {', '.join(report['forgotten'])}: {percent(report['PUL'])}{each}, at a "
                 f"mean confidence of {confidence[0]:.2f} before and {confidence[1]:.2f} after")
    if not report["recognisable"]:
        lines.append("WARNING: the classifier recognises much less than before: the model draws "
                     "something else, and PUL counts that as forgotten; look at after.png")
    worst = report["worst_kept"]
    if worst["class"] is not None:
        lines.append(f"drift among the retained {report['drift']:.3f} (two sets of samples of one "
                     f"model: {report['drift_of_noise']:.3f}); worst kept: {worst['class']}, of "
                     f"which {100 * worst['share_left']:.0f}% are left")
    lines.append(f"{report['samples']} samples each, {report['sampling_steps']} DDIM steps, eta "
                 f"{report['eta']:g}, seed {report['seed']}; classifier accuracy "
                 f"{100 * report['classifier_accuracy']:.2f}%; u-FID in the features of "
                 f"{report['u_fid_features'].split(':')[0]}")
    return "\n".join(lines + relearning_lines(report))


def classes_to_show(report):
    """All of them; of more than 20, the forgotten and the ten that changed most."""
    before, after = report["before"]["histogram"], report["after"]["histogram"]
    if len(before) <= 20:
        return list(before)
    others = [name for name in before if name not in report["forgotten"]]
    others.sort(key=lambda name: abs(after[name]["count"] - before[name]["count"]), reverse=True)
    return report["forgotten"] + others[:10]


def summary_rows(reports):
    """One row per model: what it has forgotten, PUL, u-FID's ratio, every metric."""
    keys = ("forgotten", "PUL", "u_fid_ratio", "drift", "worst_kept")
    return [{"checkpoint": r["after"]["checkpoint"], **{key: r[key] for key in keys},
             **{key: r["after"][key] for key in METRICS}} for r in reports]


def summary_table(rows):
    width = max(len(row["checkpoint"]) for row in rows) + 2
    titles = ["PUL", "ratio", "drift", "worst kept", *(m[0] for m in METRICS.values())]
    widths = [max(8, len(title) + 2) for title in titles]
    lines = [" " * width + "".join(f"{title:>{w}}" for title, w in zip(titles, widths))]
    for row in rows:
        worst = row["worst_kept"]
        cells = ["-" if row["PUL"] is None else f"{row['PUL']:.1f}%", f"{row['u_fid_ratio']:.2f}",
                 f"{row['drift']:.3f}", "-"]
        if worst["class"] is not None:
            cells[3] = f"{worst['class'][:6]} {worst['share_left']:.2f}"
        cells += [form.format(row[key]) for key, (_, form, _) in METRICS.items()]
        line = "".join(f"{cell:>{w}}" for cell, w in zip(cells, widths))
        lines.append(f"{row['checkpoint']:{width}}{line}")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------
# How deep is it? Relearning


def relearning(judge, models, names, marks, images, lr, sampling):
    """How fast the class comes back as DDPM's training goes on, on images of it alone.

    Weights that no longer draw a class may still hold it. A model that never saw the
    class has to learn it from these few images; one that only hides it needs fewer
    steps. models: {name: Checkpoint}, spent afterwards.  marks: steps at which to
    count.  images: how many.  Returns {"steps", "images", "samples", and per model the
    shares}.
    """
    forgotten = [judge.checkpoint.data["classes"].index(name) for name in names]
    of_class = torch.isin(judge.labels, torch.tensor(forgotten)).nonzero().flatten()
    generator = torch.Generator().manual_seed(sampling.seed)
    chosen = of_class[torch.randperm(len(of_class), generator=generator)[:images]]
    x = to_float(judge.images[chosen]).to(judge.device)  # (K, C, H, W)
    n = min(sampling.samples, 500)
    result = {"steps": marks, "images": len(x), "samples": n}
    for name, model in models.items():
        result[name] = []
        optimizer = torch.optim.AdamW(model.unet.parameters(), lr, betas=(0.9, 0.99),
                                      weight_decay=0.0)
        torch.manual_seed(sampling.seed)
        for step in tqdm(range(marks[-1] + 1), desc=f"relearning ({name})", unit="step"):
            if step in marks:
                drawn = model.diffusion.sample(model.unet, n, tuple(x.shape[1:]),
                                               sampling.sampling_steps, sampling.eta, sampling.seed)
                _, p = features_and_probabilities(judge.classifier, to_uint8(drawn), judge.device)
                hits = torch.isin(p.argmax(1), torch.tensor(forgotten))
                result[name].append(hits.sum().item() / n)
            if step < marks[-1]:
                batch = x[torch.randint(len(x), (64,)).to(x.device)]
                training_step(model.unet, model.diffusion, optimizer, batch)
    return result


def relearning_lines(report):
    if "relearning" not in report:
        return []
    r = report["relearning"]
    lines = [f"relearning from {r['images']} images, share of {', '.join(report['forgotten'])} "
             f"among {r['samples']} samples after so many steps:",
             f"{'':24}" + "".join(f"{step:8d}" for step in r["steps"])]
    for model in ("unlearned", "never saw it"):
        if model in r:
            lines.append(f"{model:24}" + "".join(f"{100 * share:7.1f}%" for share in r[model]))
    return lines


def relearning_models(before, after, names, never_saw, device):
    """The unlearned model, and one that was trained without the class."""
    models, parent = {"unlearned": after}, Path(before.path)
    oracle = never_saw or parent.with_name(f"{parent.stem}-without-{'-'.join(names)}.pt")
    if not never_saw and not oracle.exists():
        print(f"no {oracle}: relearning without a model that never saw the class to compare with; "
              f"train one with python train_ddpm.py --exclude-class {' '.join(names)} "
              f"--output {oracle}")
        return models
    model = load_checkpoint(oracle, device)
    shapes = [c.config["image_shape"] for c in (model, after)]
    if model.data["excluded"] != names or shapes[0] != shapes[1]:
        raise UserError(f"{oracle} is not a model that was trained without {', '.join(names)}; "
                        "see train_ddpm.py --exclude-class")
    return {**models, "never saw it": model}


# --------------------------------------------------------------------------------------
# The command line


def newest_unlearned(folder):
    """The newest checkpoint of vdu.py in `folder`. Raises UserError for none."""
    for path in sorted(Path(folder).glob("*.pt"), key=os.path.getmtime, reverse=True):
        with contextlib.suppress(UserError):  # a broken file is not the one that is looked for
            raw = read_file(path)
            if isinstance(raw, dict) and raw.get("forgotten"):
                return str(path)
    raise UserError(f"no unlearned checkpoint in {folder}/; make one with: python vdu.py "
                    "--forget-class 1")


def assumed(after):
    """What vdu.py was told to assume of the published weights that it took."""
    settings = after.forgotten["settings"] if after.forgotten else {}
    return dict(settings.get("assume", []))


def parent_of(after):
    """What it was unlearned from: where vdu.py read it, or beside it if moved."""
    if not after.forgotten:
        raise UserError(f"{after.path} was not made by vdu.py; name the model to compare it with: "
                        "--before FILE")
    written = after.forgotten["checkpoint"]
    beside = Path(after.path).parent / Path(written).name
    return written if os.path.exists(written) or not beside.exists() else str(beside)


def check_parent(before, after):
    """Raise UserError if `before` is another model of the name of the one it was."""
    if after.forgotten.get("parent") not in (None, digest(before.unet.state_dict().values())):
        raise UserError(f"{before.path} is not the model that {after.path} was unlearned from, but "
                        "another of its name: say where that one is with --before FILE")


def names_to_count(before, after, classes):
    """The classes to count: those named, otherwise what `after` has forgotten.

    Raises UserError unless there are some, and both models know one dataset.
    """
    datasets = [(c.data["name"], c.data["classes"], list(c.config["image_shape"]))
                for c in (before, after)]
    if datasets[0] != datasets[1]:
        raise UserError(f"{before.path} was trained on {before.data['name']}, {after.path} on "
                        f"{after.data['name']}: compare models of one dataset")
    if not after.data["classes"]:
        raise UserError(f"nothing is known of the classes that {before.path} was trained on, so "
                        "that none can be counted: compare samples by eye")
    if classes:
        return [after.data["classes"][i] for i in class_indices(classes, after.data)]
    names = after.forgotten["classes"] if after.forgotten else after.data["excluded"]
    if not names and after.forgotten:
        raise UserError(f"{after.path} has forgotten the images in "
                        f"{after.forgotten['images_from']}: say which class to count with "
                        "--forget-class")
    if not names:
        raise UserError(f"{after.path} has forgotten nothing: it is a model of all classes; make "
                        "one that has with vdu.py")
    return names


def report_folders(paths, root):
    """A folder in `root` for each checkpoint, by its name; by its folder's, too, if
    names repeat. Raises UserError if that does not tell them apart."""
    stems = [Path(path).stem for path in paths]
    names = [f"{Path(path).absolute().parent.name}-{stem}" if stems.count(stem) > 1 else stem
             for path, stem in zip(paths, stems)]
    if len(set(names)) < len(names):
        raise UserError("--after: two files have the same name, and so have their folders: their "
                        "reports would be one; rename one")
    return [root / name for name in names]


def main(args):
    """One report for each of args.after, and a summary of several."""
    device = pick_device(args.device)
    paths = args.after or [newest_unlearned("checkpoints")]
    if len(paths) > 1 and args.save_samples:
        raise UserError("--save-samples is for one --after")
    root = Path(args.output)
    folders = report_folders(paths, root)
    outputs = [folder / name for folder in folders for name in ("report.json", "before.png",
                                                                "after.png")]
    outputs += [root / "summary.json"] * (len(paths) > 1)
    outputs += [args.save_samples] if args.save_samples else []
    check_outputs(outputs, args.overwrite)

    sampling = Sampling(args.samples, args.sampling_steps, args.eta, args.seed)
    judges, reports = {}, []  # a judge per parent: its samples, classifier and features
    for path, folder in zip(paths, folders):
        began = time.time()
        report = evaluate(path, folder, args, judges, sampling, device)
        reports.append(report)
        print(report_table(report))
        print(f"wrote {folder / 'report.json'}, before.png, after.png "
              f"({time.time() - began:.0f} s)")
    if len(reports) > 1:
        rows = summary_rows(reports)
        write_json(root / "summary.json", rows)
        print(f"{summary_table(rows)}\nwrote {root / 'summary.json'}")


def evaluate(path, folder, args, judges, sampling, device):
    """The report on one checkpoint: written once it exists, again with relearning."""
    after = load_checkpoint(path, device)
    before_path = args.before or parent_of(after)
    before = judges[before_path].checkpoint if before_path in judges else (
        load_checkpoint(before_path, device, assumed(after)))
    if not args.before:
        check_parent(before, after)
    names = names_to_count(before, after, args.forget_class)
    models = args.relearn and relearning_models(before, after, names, args.never_saw, device)
    if before_path not in judges:
        judges[before_path] = Judge(before, device, args.data_root, args.features)
    judge = judges[before_path]
    report, samples = compare(judge, after, names, sampling, args.bits)
    write_json(folder / "report.json", report)
    for when, images in samples.items():
        write_images(folder / f"{when}.png", images[:64])
    if args.save_samples:
        save_checkpoint(args.save_samples, samples)
    if models:
        marks = sorted({round(args.relearn * share) for share in (0, 0.1, 0.25, 0.5, 1)})
        report["relearning"] = relearning(judge, models, names, marks, args.relearn_images,
                                          args.relearn_lr, sampling)
        write_json(folder / "report.json", report)
    return report


def parser():
    p = ArgumentParser(prog="evaluate.py", description=__doc__)
    p.add_argument("--after", nargs="+", metavar="FILE",
                   help="the unlearned checkpoint, or several (default: the newest in "
                        "checkpoints/)")
    p.add_argument("--before", metavar="FILE",
                   help="the model to compare with (default: the one it was unlearned from)")
    p.add_argument("--output", default="results", metavar="DIR",
                   help="where the reports go, a folder per model, and the summary of several")
    p.add_argument("--samples", type=number(int, 2), default=2000, metavar="N",
                   help="samples from each model")
    p.add_argument("--sampling-steps", type=number(int, 1), default=25, metavar="N",
                   help="DDIM steps per sample")
    p.add_argument("--eta", type=number(float, 0), default=1.0,
                   help="DDIM's noise: 0 is deterministic, 1 as noisy as ancestral sampling")
    p.add_argument("--forget-class", nargs="+", metavar="CLASS",
                   help="count these (default: the classes that the model was told to forget); "
                        "needed after vdu.py --forget-images")
    p.add_argument("--features", choices=("auto", "inception", "classifier"), default="auto",
                   help="what u-FID, precision and recall compare: Inception v3's features for "
                        "colour images where its weights can be had, otherwise those of the "
                        "classifier; figures from the two cannot be compared")
    p.add_argument("--bits", type=number(int, 0), default=100, metavar="N",
                   help="images of the forgotten and of the retained classes for the bound on "
                        "-log p, in bits per dimension (0: leave it out)")
    p.add_argument("--relearn", type=number(int, 0), default=0, metavar="N",
                   help="then train the unlearned model for N steps on images of the forgotten "
                        "class, and count how fast it comes back (0: do not)")
    p.add_argument("--relearn-images", type=number(int, 1), default=100, metavar="K",
                   help="with --relearn: on so many images")
    p.add_argument("--relearn-lr", type=number(float, 0, above=True), default=2e-4,
                   help="with --relearn: AdamW's learning rate")
    p.add_argument("--never-saw", metavar="FILE",
                   help="with --relearn: a model trained with --exclude-class, to compare with "
                        "(default: PARENT-without-CLASS.pt)")
    p.add_argument("--save-samples", metavar="FILE.pt",
                   help="keep the samples: {'before', 'after'}, each (N, C, H, W) uint8")
    p.add_argument("--data-root", metavar="DIR",
                   help="folder of the dataset (default: where the model was trained)")
    add_shared_flags(p)
    return p


if __name__ == "__main__":
    run_command_line(lambda: main(parser().parse_args()))
