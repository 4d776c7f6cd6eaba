"""Did it forget, and what did that cost? Sample before and after with the same noise.

    python evaluate.py
    python evaluate.py --after checkpoints/a.pt checkpoints/b.pt checkpoints/c.pt
    python evaluate.py --relearn 200

Holds    the metrics, the classifier that counts, the report, relearning.
Reads    unlearned checkpoints and their parent (unless told, the newest and the one
         that it came from), and the dataset they were trained on. Retained images are
         needed here, to measure; vdu.py never sees them.
Writes   results/NAME/report.json, before.png, after.png; once per dataset the
         classifier, in checkpoints/.
Paper    VDU (arXiv 2510.04058), experiments: PUL (percentage of unlearning) and u-FID.
"""

import argparse
import contextlib
import json
import math
import os
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.transforms import v2
from tqdm import tqdm

from ddpm import (WEIGHTS, UserError, add_shared_flags, autocast, check_output, digest, draw,
                  load_checkpoint, number, pick_device, read_file, run_command_line,
                  save_checkpoint, to_float, training_step, write_atomically, write_images)
from train_ddpm import SHIPPED, class_indices, load_data_of, title_of

# --------------------------------------------------------------------------------------
# The metrics: of class counts (one number per class), and of features (N, d)

def percentage_of_unlearning(n_before, n_after):
    """PUL = 100 (n_before - n_after) / n_before, of the forgotten class (VDU).
    100 when none is left, 0 when nothing changed, below 0 when there are more. nan if
    there was none to begin with."""
    if n_before == 0:
        return math.nan
    return 100 * (n_before - n_after) / n_before


def frechet_distance(features_a, features_b):
    """|| m_a - m_b ||^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2), of Gaussians.
    features: (N, d).  Returns a float (Dowson & Landau 1982; FID, Heusel et al. 2017).
    Of few samples it is too large: two halves of one distribution are not at 0. Of one
    it is nan.
    In float64, and by the symmetric form of the root: its eigenvalues are real and not
    negative but for rounding, where the usual sqrtm(C_a C_b) can turn complex."""
    a = features_a.double().cpu()
    b = features_b.double().cpu()
    if min(len(a), len(b)) < 2:  # one has no covariance
        return math.nan
    cov_a = torch.cov(a.T)  # (d, d)
    cov_b = torch.cov(b.T)

    # tr (C_a^1/2 C_b C_a^1/2)^1/2: the sum of the roots of its eigenvalues.
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = vectors * values.clamp(min=0).sqrt() @ vectors.T  # C_a^1/2: (d, d)
    values = torch.linalg.eigvalsh(root_a @ cov_b @ root_a)
    trace_root = values.clamp(min=0).sqrt().sum()

    difference = a.mean(0) - b.mean(0)  # (d,)
    of_means = difference.square().sum()
    distance = of_means + cov_a.trace() + cov_b.trace() - 2 * trace_root
    return distance.clamp(min=0).item()


def class_shares(counts, forgotten):
    """{class index: share} of the retained classes among themselves."""
    retained = {i: n for i, n in enumerate(counts) if i not in forgotten}
    total = max(1, sum(retained.values()))  # 1: where none is left, all shares are 0
    return {i: n / total for i, n in retained.items()}


def drift(counts_before, counts_after, forgotten):
    """Total variation distance, 0 .. 1, between the shares of the retained classes (of
    all, if none is forgotten). What a u-FID can hide: a neighbour that went along."""
    before = class_shares(counts_before, forgotten)  # they add up to 1
    after = class_shares(counts_after, forgotten)
    return sum(abs(share - after[i]) for i, share in before.items()) / 2


def worst_kept(counts_before, counts_after, forgotten):
    """(index, share left) of the retained class, drawn before, that lost most."""
    # What is left of each class, as a share of what was there.
    left = {i: counts_after[i] / n for i, n in enumerate(counts_before)
            if n > 0 and i not in forgotten}
    if not left:
        return None, math.nan
    worst = min(left, key=left.get)
    return worst, left[worst]


# --------------------------------------------------------------------------------------
# The classifier of a dataset: it counts, and its features are what u-FID compares

class Classifier(nn.Module):
    """(B, C, H, W) in [-1, 1] -> logits (B, classes). `body` gives the features: the
    last convolution's, averaged over all pixels."""

    def __init__(self, image_shape, classes):
        super().__init__()
        C = image_shape[0]
        width = 32 if C == 1 else 64  # photographs need more
        layers = []
        for out in (width, 2 * width, 4 * width):
            layers += [
                nn.Conv2d(C, out, 3, padding=1, bias=False),
                nn.BatchNorm2d(out),
                nn.ReLU(),
                nn.MaxPool2d(2, ceil_mode=True)]  # halves H and W
            C = out
        layers[-1] = nn.AdaptiveAvgPool2d(1)  # the last one averages over all pixels
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.Linear(C, classes)

    def forward(self, x):
        return self.head(self.body(x))


def train_classifier(classifier, images, labels, device, epochs=None):
    """AdamW, one cycle. images: (N, C, H, W) uint8.  epochs: None: as many as it needs.
    """
    # Four epochs, or ten of photographs, are enough of a large dataset. A small one is
    # seen more often, at most 60 times.
    colour = images.shape[1] == 3
    if epochs is None:
        enough = 150_000 if colour else 40_000
        epochs = max(10 if colour else 4, enough // len(images))
        epochs = min(60, epochs)
    # Batches and steps.
    B = min(128, len(images))
    steps = epochs * (len(images) // B)
    H, W = images.shape[2:]
    jitter = v2.Compose([
        v2.RandomHorizontalFlip(),
        v2.RandomCrop((H, W), padding=4, padding_mode="reflect")])
    # The rate rises, then falls to nothing.
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)

    with tqdm(total=steps, desc="training the classifier", unit="step") as bar:
        for _ in range(epochs):
            order = torch.randperm(len(images))  # anew in each epoch
            for batch in order.split(B):
                if len(batch) < B:  # the rest comes in another epoch
                    break
                x = to_float(images[batch])
                if colour:  # each photograph is mirrored and shifted by itself
                    x = torch.stack([jitter(image) for image in x])
                with autocast(device):
                    logits = classifier(x.to(device))
                y = labels[batch].to(device)
                loss = F.cross_entropy(logits.float(), y)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()  # the rate goes by steps, not epochs
                bar.update()


@torch.inference_mode()
def features_and_probabilities(classifier, images, device):
    """uint8 images (N, C, H, W) -> features (N, d), probabilities (N, classes)."""
    features = []
    probabilities = []
    H, W = images.shape[2:]
    at_once = max(1, 2**20 // (H * W))  # a million pixels
    for chunk in images.split(at_once):
        with autocast(device):
            f = classifier.body(to_float(chunk).to(device))  # (n, d)
            logits = classifier.head(f)  # (n, classes)
        features.append(f.float().cpu())
        probabilities.append(logits.float().softmax(1).cpu())
    return torch.cat(features), torch.cat(probabilities)


def get_classifier(checkpoint, train, test, device):
    """(the dataset's classifier, its test accuracy per class: nan if none is tested).
    Trained once, and kept in a file. train, test: (images, labels), of every class. The
    digest of the training images is in the file's name. Where there is no test part,
    (None, None), a fifth of each class is held out to test on."""
    data = checkpoint.data
    images, labels = train
    classes = range(len(data["classes"]))
    torch.manual_seed(0)  # the same classifier every time
    classifier = Classifier(images.shape[1:], len(classes))
    classifier.to(device, memory_format=torch.channels_last)  # twice as fast on a CPU
    path = Path("checkpoints") / f"pooled-classifier-{title_of(data)}-{digest(train)}.pt"
    if path.exists():
        # Trained before, on the same images.
        saved = read_file(path)
        classifier.load_state_dict(saved["classifier"])
        return classifier.eval(), saved["accuracies"]
    check_output(path, False)  # that it can be kept

    if test[0] is None:
        held_out = torch.zeros(len(images), dtype=torch.bool)
        for i in classes:
            of_class = (labels == i).nonzero().flatten()
            held_out[of_class[1::5]] = True  # a lone image is learned
        test = images[held_out], labels[held_out]  # both parts of every class
        images = images[~held_out]
        labels = labels[~held_out]
    if len(images) < 8:
        raise UserError(f"a classifier needs at least 8 images to learn from, not {len(images)}")
    train_classifier(classifier, images, labels, device)

    _, probabilities = features_and_probabilities(classifier.eval(), test[0], device)
    right = (probabilities.argmax(1) == test[1]).float()  # (N,)
    of_classes = [right[test[1] == i] for i in classes]
    accuracies = [of_class.mean().item() for of_class in of_classes]
    save_checkpoint(path, {"classifier": classifier.state_dict(), "accuracies": accuracies})
    return classifier, accuracies


# --------------------------------------------------------------------------------------
# What is measured of models

class Judge:
    """What all models of one parent are measured with: classifier and real images."""

    def __init__(self, checkpoint, device, data_root):
        self.classes = checkpoint.data["classes"]  # by name
        self.device = device
        self.train = load_data_of(checkpoint, data_root)  # (images, labels)
        self.test = load_data_of(checkpoint, data_root, train=False)
        self.classifier, self.accuracies = get_classifier(
            checkpoint, self.train, self.test, device)
        self.real_features, _ = self.classify(self.train[0])
        if self.test[0] is None:
            # there is no other part to bound -log p of
            self.test = self.train

    def classify(self, images):
        """uint8 images (N, C, H, W) -> features (N, d), probabilities (N, classes)."""
        return features_and_probabilities(self.classifier, images, self.device)

    def draw_and_classify(self, model, args, series=""):
        """Samples of a Checkpoint's model, and what the classifier sees in them: a dict
        of "samples" (N, C, H, W) uint8, "features" (N, d), "classes" (N,), and "counts"
        (one number per class). series: models of one series share their noise."""
        print(f"sampling from {model.path}")
        samples = draw(model, args.samples, args.sampling_steps, args.seed, series)
        features, probabilities = self.classify(samples)
        classes = probabilities.argmax(1)  # (N,)
        counts = classes.bincount(minlength=len(self.classes)).tolist()
        return {"samples": samples, "features": features, "classes": classes, "counts": counts}

    def bits(self, model, of_kind, n):
        """The upper bound on -log p, in bits per dimension, in the mean over n of the
        test images where of_kind (N,) is true. The same images, t and eps for every
        model. (The method claims to raise it for D_f, and to keep it for D_r.)"""
        images = self.test[0][of_kind]  # (K, C, H, W)
        generator = torch.Generator().manual_seed(0)
        chosen = torch.randperm(len(images), generator=generator)[:n]
        if len(chosen) == 0:
            return math.nan
        x0 = to_float(images[chosen]).to(self.device)
        # at 40 of the steps
        bound = model.diffusion.variational_bound(model.unet, x0, 40)
        return bound["total"].mean().item()

    def measure(self, model, seen, forgotten, n_bits):
        """All that is reported of one model: a dict of plain values.
        seen: what draw_and_classify returned.  forgotten: indices of classes."""
        gone = torch.tensor(forgotten)
        # u-FID is against the images that should stay.
        retained = ~torch.isin(self.train[1], gone)
        real = self.real_features[retained]
        rest = seen["features"][~torch.isin(seen["classes"], gone)]
        is_gone = torch.isin(self.test[1], gone)
        return {
            "checkpoint": model.path,
            "counts": dict(zip(self.classes, seen["counts"])),
            "forgotten_count": sum(seen["counts"][i] for i in forgotten),
            "u_fid": frechet_distance(seen["features"], real),
            # less the samples of the class: what deleting those alone would reach
            "u_fid_of_perfect_deletion": frechet_distance(rest, real),
            # of samples that are all alike, in the middle of the real images
            "u_fid_of_a_point": torch.cov(real.T).trace().item(),
            "bits_forgotten": self.bits(model, is_gone, n_bits),
            "bits_retained": self.bits(model, ~is_gone, n_bits)}


def frechet(a, b):
    """The Frechet distance between what was seen of two models."""
    return frechet_distance(a["features"], b["features"])


def total_variation(a, b):
    """The total variation distance between the shares of all classes."""
    return drift(a["counts"], b["counts"], ())


def against_retraining(before, after, retrained, forgotten):
    """How much of the distance to the retrained model is left: a dict.

    before, after: what was seen of them (draw_and_classify).  retrained: that of one or
    two models, of other seeds, that never saw the forgotten classes, which stand for
    p(theta | D_r). Of distances to both the mean is taken; how far the two lie apart is
    the floor, nan for one. "left" = (after - floor) / (before - floor): 0 is a
    retrained model, 1 is untouched. The floor holds what n samples add to every Frechet
    distance, and how far two seeds lie apart: both are taken off, so that "left" may
    fall below 0."""
    result = {"PUL": [], "drift": math.nan, "worst_kept": math.nan}
    # What a retrained model has of the class: the classifier's mistakes, mostly.
    n_before = sum(before["counts"][i] for i in forgotten)
    for seen in retrained:
        n = sum(seen["counts"][i] for i in forgotten)
        result["PUL"].append(percentage_of_unlearning(n_before, n))

    # What two retrained models differ by in the retained classes.
    if len(retrained) == 2:
        first = retrained[0]["counts"]
        second = retrained[1]["counts"]
        result["drift"] = drift(first, second, forgotten)
        result["worst_kept"] = min(worst_kept(first, second, forgotten)[1],
                                   worst_kept(second, first, forgotten)[1])

    # The two distances, and what is left of the way.
    for distance in (frechet, total_variation):
        to_after = sum(distance(after, seen) for seen in retrained) / len(retrained)
        to_before = sum(distance(before, seen) for seen in retrained) / len(retrained)
        floor = distance(*retrained) if len(retrained) == 2 else math.nan
        left = math.nan  # where the model before is as near as the floor
        if to_before > floor:
            left = (to_after - floor) / (to_before - floor)
        result[distance.__name__] = {"after": to_after, "before": to_before, "floor": floor,
                                     "left": left}
    return result


# --------------------------------------------------------------------------------------
# The report

TOO_FEW = 20        # samples of the class, before: of fewer PUL is noise
ACCURATE = 0.8      # below it, the classifier's counts say little


def report_on(judge, before, after, seen, forgotten, args):
    """The report of one unlearned model: a dict of plain values.

    before, after: Checkpoints.  seen: {"before", "after"}: what draw_and_classify
    returned; "retrained": a list of such.  forgotten: indices of classes."""
    # Each model by itself, then one against the other.
    a = judge.measure(before, seen["before"], forgotten, args.bits)
    b = judge.measure(after, seen["after"], forgotten, args.bits)
    counts = seen["before"]["counts"], seen["after"]["counts"]
    worst, left = worst_kept(*counts, forgotten)
    report = {
        "forgotten": [judge.classes[i] for i in forgotten],
        "PUL": percentage_of_unlearning(a["forgotten_count"], b["forgotten_count"]),
        "drift": drift(*counts, forgotten),
        "worst_kept": {"class": None if worst is None else judge.classes[worst],
                       "share_left": left},
        "before": a,
        "after": b,
        "retrained": {},
        "classifier_accuracy": torch.tensor(judge.accuracies).nanmean().item(),
        "classifier_accuracy_on_forgotten": [judge.accuracies[i] for i in forgotten],
        "settings": vars(args),
        "data": before.data,
        "unlearning": after.forgotten}
    if seen["retrained"]:
        report["retrained"] = against_retraining(seen["before"], seen["after"],
                                                 seen["retrained"], forgotten)
    report["warnings"] = warnings_of(report)
    return report


def warnings_of(report):
    """Reasons to distrust the numbers: the classifier counts what it is shown, noise,
    too."""
    a = report["before"]
    warnings = []
    if report["after"]["u_fid"] >= 10 * a["u_fid"]:
        warnings.append("u-FID grew more than tenfold")
    if a["u_fid"] >= a["u_fid_of_a_point"]:
        warnings.append("the model before draws nothing like the images")
    if report["classifier_accuracy"] < ACCURATE:
        percent = 100 * report["classifier_accuracy"]
        warnings.append(f"the classifier is right on no more than {percent:.0f}%")
    if a["forgotten_count"] == 0:
        warnings.append("no sample before is of the class: PUL is undefined")
    elif a["forgotten_count"] < TOO_FEW:
        warnings.append(f"{a['forgotten_count']} before are too few for a PUL: more --samples")
    return warnings


def print_table(reports):
    """A row per model; under it what to beware of, and the distance to retraining."""
    rows = [("", "forgotten", "count", "PUL", "u-FID", "if deleted", "drift", "worst kept",
             "bits of D_f", "bits of D_r")]
    # One row for each report.
    for r in reports:
        a = r["before"]
        b = r["after"]
        pul = f"{r['PUL']:.1f}%"
        if a["forgotten_count"] < TOO_FEW:
            pul = "too few"
        rows.append((
            b["checkpoint"],
            ", ".join(r["forgotten"])[:14],
            f"{a['forgotten_count']} -> {b['forgotten_count']}",
            pul,
            f"{a['u_fid']:.2f} -> {b['u_fid']:.2f}",
            f"{a['u_fid_of_perfect_deletion']:.2f}",
            f"{r['drift']:.3f}",
            f"{str(r['worst_kept']['class'])[:9]}, {100 * r['worst_kept']['share_left']:.0f}%",
            f"{a['bits_forgotten']:.2f} -> {b['bits_forgotten']:.2f}",
            f"{a['bits_retained']:.2f} -> {b['bits_retained']:.2f}"))
    width = 2 + max(len(row[0]) for row in rows)  # of the first column, file names
    for row, r in zip(rows, [None, *reports]):
        print(f"{row[0]:{width}}" + "".join(f"{cell:>16}" for cell in row[1:]))
        if r is not None:
            print_notes(r)


def print_notes(r):
    """The lines under a row of the table."""
    for warning in r["warnings"]:
        print(f"  WARNING: {warning}; look at the pictures")
    # The retrained models, where there are any.
    target = r["retrained"]
    if target:
        print("  retrained: PUL " + ", ".join(f"{x:.1f}%" for x in target["PUL"]))
        for name in ("frechet", "total_variation"):
            said = ("  distance to it, {name}: {after:.3f}, before {before:.3f}, floor {floor:.3f};"
                    " left {left:.2f}")
            print(said.format(name=name, **target[name]))
        if len(target["PUL"]) == 1:
            print("  the floor is missing: it takes two models, retrained from two seeds")
        else:
            print(f"  between the two: drift {target['drift']:.3f}, worst kept "
                  f"{100 * target['worst_kept']:.0f}%")
    on_forgotten = ", ".join(f"{100 * x:.1f}%" for x in r["classifier_accuracy_on_forgotten"])
    n = sum(r["before"]["counts"].values())
    print(f"  the classifier is right on {100 * r['classifier_accuracy']:.1f}% in the mean over "
          f"classes, on {on_forgotten} of the forgotten; N = {n:,} samples")


COUNT_AT = (0, 2, 5, 10, 20, 50, 100, 200, 500)  # steps of relearning after which is counted


def relearning(judge, model, forgotten, args, images=100, lr=2e-4):
    """How fast the class comes back as DDPM's training goes on, on images of it alone.

    model: a Checkpoint, spent afterwards.  images: how many.  Returns {"steps",
    "images", "samples", "shares": of the samples that are counted as the class}."""
    # Weights that no longer draw a class may still hold it. A model that never saw it
    # has to learn it from these few images; one that only hides it is quicker.
    gone = torch.tensor(forgotten)
    # A few images of the class: the same for every model.
    of_class = judge.train[0][torch.isin(judge.train[1], gone)]
    generator = torch.Generator().manual_seed(args.seed)
    chosen = torch.randperm(len(of_class), generator=generator)[:images]
    x = to_float(of_class[chosen]).to(judge.device)  # (K, C, H, W)

    n = min(args.samples, 500)
    marks = [mark for mark in COUNT_AT if mark < args.relearn]
    marks.append(args.relearn)  # and at the end
    shares = []
    optimizer = torch.optim.AdamW(model.unet.parameters(), lr, betas=(0.9, 0.99),
                                  weight_decay=0.0)
    torch.manual_seed(args.seed)
    for step in tqdm(range(args.relearn + 1), desc="relearning", unit="step"):
        if step in marks:
            _, probabilities = judge.classify(draw(model, n, args.sampling_steps, args.seed))
            is_gone = torch.isin(probabilities.argmax(1), gone)
            shares.append(is_gone.float().mean().item())
        if step < args.relearn:
            batch = x[torch.randint(len(x), (64,)).to(x.device)]  # (64, C, H, W)
            training_step(model.unet, model.diffusion, optimizer, batch)
    said = ", ".join(f"{100 * share:.1f}%" for share in shares)
    print(f"relearning from {len(x)} images: after {marks} steps {said}")
    return {"steps": marks, "images": len(x), "samples": n, "shares": shares}


def write_json(path, value, overwrite):
    """Plain values as JSON, whole or not at all; nan and infinity become null."""
    value = json.loads(json.dumps(value), parse_constant=lambda name: None)  # NaN -> None
    text = json.dumps(value, indent=2)
    write_atomically(path, lambda f: f.write(text.encode()), overwrite)


# --------------------------------------------------------------------------------------
# The command line

def newest_unlearned(folder):
    """The newest checkpoint of vdu.py in `folder`. Raises UserError for none."""
    paths = [path for path in Path(folder).glob("*") if path.suffix.lower() in WEIGHTS]
    for path in sorted(paths, key=os.path.getmtime, reverse=True):
        with contextlib.suppress(UserError):  # a broken file is not the one that is looked for
            raw = read_file(path, lazy=True)  # the numbers stay on disk
            if isinstance(raw, dict) and raw.get("forgotten"):
                return str(path)
    raise UserError(f"no unlearned model in {folder}/: make one with python vdu.py")


def parent_of(after, device):
    """The model that `after` was unlearned from: where vdu.py read it, or beside
    `after` if both were moved. Raises UserError if it is gone or another."""
    if not after.forgotten:
        raise UserError(f"{after.path} forgot nothing: say with --before FILE what to compare it "
                        "with")
    # There, or beside `after`, with the same numbers.
    there = Path(after.forgotten["checkpoint"])
    for place in (there, Path(after.path).with_name(there.name)):
        if place.exists():
            before = load_checkpoint(place, device)
            if digest(before.unet.state_dict().values()) == after.forgotten["parent"]:
                return before
    raise UserError(f"{after.path} was unlearned from {there}, which is gone or another: say with "
                    "--before FILE what to compare it with")


def choose_forgotten(args, before, after):
    """Indices of the classes to count: those that are named, else those that it was
    told to forget, or trained without. Raises UserError for none, and for all."""
    classes = before.data["classes"]
    names = args.forget_class
    if names is None:
        names = after.forgotten["classes"] if after.forgotten else after.data["excluded"]
    forgotten = class_indices(names, classes)
    known = len(classes) - len(before.data["excluded"])  # that it can draw
    if not 0 < len(forgotten) < known:
        raise UserError(f"{after.path}: say with --forget-class what to count, and leave at least "
                        "one class")
    return forgotten


def load_retrained(args, before, names, device):
    """The one or two Checkpoints that were trained without what is forgotten; none
    where none is named and none lies beside the parent. Raises UserError for others."""
    # Those that are named, or that have the name that README gives them.
    files = args.retrained
    if files is None:
        parent = Path(before.path)
        if parent == SHIPPED:  # whose folder is the code's
            parent = Path("checkpoints") / parent.name
        without = f"{parent.with_suffix('')}-without-{'-'.join(names)}"
        beside = (f"{without}.pt", f"{without}-again.pt")
        files = [file for file in beside if os.path.exists(file)]
    models = [load_checkpoint(file, device) for file in files]
    if len(models) > 2:
        raise UserError("--retrained takes one model or two")
    for model in models:
        check_dataset(before, model)
        if model.forgotten or sorted(model.data["excluded"]) != sorted(names):
            raise UserError(f"{model.path} was not trained without {', '.join(names)}")
    digests = {digest(model.unet.state_dict().values()) for model in models}
    if len(digests) < len(models):
        raise UserError("--retrained names one model twice: it takes two, of two seeds")
    return models


def check_dataset(before, model):
    """Raise UserError unless both were trained on images of one size and the same
    classes."""
    same_classes = sorted(before.data["classes"]) == sorted(model.data["classes"])
    same_shape = list(before.config["image_shape"]) == list(model.config["image_shape"])
    if not (same_classes and same_shape):
        raise UserError(f"{before.path} and {model.path} were not trained on one dataset")


def load_case(path, args, device):
    """What is compared: the Checkpoints before, after and retrained (a list), and the
    indices of the forgotten classes."""
    after = load_checkpoint(path, device)
    if args.before:
        before = load_checkpoint(args.before, device)
    else:
        before = parent_of(after, device)
    check_dataset(before, after)
    forgotten = choose_forgotten(args, before, after)
    names = [before.data["classes"][i] for i in forgotten]
    return before, after, load_retrained(args, before, names, device), forgotten


def main(args):
    """One report for each of args.after, and a table of all."""
    device = pick_device(args.device)
    paths = args.after or [newest_unlearned("checkpoints")]
    # All files are there, and the reports have a place, before any work.
    folders = [Path(args.output) / Path(path).stem for path in paths]
    if len(set(folders)) < len(folders):
        raise UserError("--after: two files have the same name, and their reports would be one")
    cases = [load_case(path, args, device) for path in paths]
    for folder in folders:
        for name in ("report.json", "before.png", "after.png"):
            check_output(folder / name, args.overwrite)

    judges = {}  # by parent: (Judge, what was seen of the parent)
    reports = []
    for (before, after, retrained, forgotten), folder in zip(cases, folders):
        # Samples of each. Before and after have the same noise, the others their own.
        if before.path not in judges:
            judge = Judge(before, device, args.data_root)
            judges[before.path] = judge, judge.draw_and_classify(before, args)
        judge, seen_before = judges[before.path]
        seen = {
            "before": seen_before,
            "after": judge.draw_and_classify(after, args),
            "retrained": [judge.draw_and_classify(model, args, f"retrained {i}")
                          for i, model in enumerate(retrained)]}

        report = report_on(judge, before, after, seen, forgotten, args)
        reports.append(report)
        if args.relearn:
            report["relearning"] = relearning(judge, after, forgotten, args)
        for when in ("before", "after"):
            samples = seen[when]["samples"][:64]
            write_images(folder / f"{when}.png", [samples], args.overwrite)
        write_json(folder / "report.json", report, args.overwrite)
        print(f"wrote {folder}: report.json, before.png, after.png")
    print_table(reports)


def parser():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--after", nargs="+", help="unlearned models (default: the newest)")
    p.add_argument("--before", help="compare with it (default: what it was unlearned from)")
    p.add_argument("--output", default="results", help="folder of reports (default: results)")
    p.add_argument("--samples", type=number(int, 4), default=2000, help="per model: 2000")
    p.add_argument("--sampling-steps", type=number(int, 1), default=25, help="per sample: 25")
    p.add_argument("--forget-class", nargs="+", metavar="CLASS", help="count these (default: own)")
    p.add_argument("--bits", type=number(int, 0), default=100, help="images for -log p: 100")
    p.add_argument("--relearn", type=number(int, 0), default=0, help="train N steps on the class")
    p.add_argument("--retrained", nargs="+", metavar="FILE", help="one or two, without the class "
                   "(default: PARENT-without-CLASS.pt and PARENT-without-CLASS-again.pt)")
    p.add_argument("--data-root", help="folder of the dataset (default: as in training)")
    add_shared_flags(p)
    return p


if __name__ == "__main__":
    run_command_line(main, parser())
