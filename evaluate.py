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
from collections import OrderedDict, namedtuple
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.transforms import v2
from tqdm import tqdm

from ddpm import (UserError, add_shared_flags, autocast, check_output, digest, draw,
                  load_checkpoint, number, pick_device, positive, read_file, run_command_line,
                  save_checkpoint, to_float, training_step, write_atomically, write_images)
from train_ddpm import class_indices, load_data_of

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


def drift(counts_before, counts_after, forgotten):
    """Total variation distance, 0 .. 1, between the shares of the retained classes (of
    all, if none is forgotten). What a u-FID can hide: a neighbour that went along."""
    before = np.delete(counts_before, forgotten)
    after = np.delete(counts_after, forgotten)
    # Shares add up to 1; where no sample is of a retained class they are 0.
    difference = before / max(1, sum(before)) - after / max(1, sum(after))
    return sum(abs(difference)) / 2


def worst_kept(counts_before, counts_after, forgotten):
    """(index, share left) of the retained class, drawn before, that lost most. (None,
    nan) if none was drawn."""
    # What is left of each class, as a share of what was there.
    left = {i: counts_after[i] / n for i, n in enumerate(counts_before)
            if n > 0 and i not in forgotten}
    worst = min(left, key=left.get, default=None)
    return worst, left.get(worst, math.nan)


# --------------------------------------------------------------------------------------
# The classifier of a dataset: it counts, and its features are what u-FID compares

def new_classifier(C, classes):
    """A network: images (B, C, H, W) in [-1, 1] -> logits (B, classes). Its part `body`
    gives the features: the last convolution's, averaged over all pixels."""
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
    body = nn.Sequential(*layers, nn.Flatten())
    return nn.Sequential(OrderedDict(body=body, head=nn.Linear(C, classes)))


def train_classifier(classifier, images, labels, device):
    """AdamW, one cycle. images: (N, C, H, W) uint8.  labels: (N,)."""
    # Four epochs, or ten of photographs, are enough of a large dataset. A small one is
    # seen more often, at most 60 times.
    colour = images.shape[1] == 3
    enough = 150_000 if colour else 40_000
    epochs = max(10 if colour else 4, enough // len(images))
    epochs = min(60, epochs)
    B = min(128, len(images))
    batches = len(images) // B  # per epoch: the rest comes in another one
    jitter = v2.Compose([
        v2.RandomHorizontalFlip(),
        v2.RandomCrop(images.shape[2:], padding=4, padding_mode="reflect")])
    # The rate rises, then falls to nothing; it goes by steps, not epochs.
    optimizer = torch.optim.AdamW(classifier.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=2e-3, total_steps=epochs * batches)

    for _ in tqdm(range(epochs), "training the classifier"):
        order = torch.randperm(len(images))  # anew in each epoch
        for batch in order.split(B)[:batches]:
            x = to_float(images[batch])
            if colour:  # each photograph is mirrored and shifted by itself
                x = torch.stack([jitter(image) for image in x])
            with autocast(device):
                logits = classifier(x.to(device))
            loss = F.cross_entropy(logits.float(), labels[batch].to(device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


@torch.inference_mode()
def features_and_classes(classifier, images, device):
    """uint8 images (N, C, H, W) -> features (N, d) and the likeliest classes (N,)."""
    features = []
    classes = []
    pixels = math.prod(images.shape[2:])
    for chunk in images.split(2**20 // pixels):  # a million pixels at once
        with autocast(device):
            f = classifier.body(to_float(chunk).to(device))  # (n, d)
            logits = classifier.head(f)  # (n, classes)
        features.append(f.float().cpu())
        classes.append(logits.argmax(1).cpu())
    return torch.cat(features), torch.cat(classes)


def get_classifier(checkpoint, train, test, device):
    """(the dataset's classifier, its test accuracy per class: nan if none is tested).
    Trained once, and kept in a file. train, test: (images, labels), of every class. The
    digest of the training images is in the file's name. Where there is no test part,
    (None, None), a fifth of each class is held out to test on."""
    images, labels = train
    classes = range(len(checkpoint.data["classes"]))
    torch.manual_seed(0)  # the same classifier every time
    classifier = new_classifier(images.shape[1], len(classes))
    classifier.to(device, memory_format=torch.channels_last)  # twice as fast on a CPU
    path = f"checkpoints/pooled-classifier-{checkpoint.data['name']}-{digest(train)}.pt"
    if os.path.exists(path):
        # Trained before, on the same images.
        saved = read_file(path)
        classifier.load_state_dict(saved["classifier"])
        return classifier.eval(), saved["accuracies"]
    check_output(path, False)  # that it can be kept

    if test[0] is None:
        held_out = torch.zeros(len(images), dtype=torch.bool)
        for i in classes:
            of_class = (labels == i).nonzero()
            held_out[of_class[1::5]] = True  # not the only image of a class
        test = images[held_out], labels[held_out]
        images = images[~held_out]
        labels = labels[~held_out]
    train_classifier(classifier, images, labels, device)

    _, found = features_and_classes(classifier.eval(), test[0], device)
    right = (found == test[1]).float()  # (N,)
    accuracies = [right[test[1] == i].mean().item() for i in classes]
    save_checkpoint(path, {"classifier": classifier.state_dict(), "accuracies": accuracies})
    return classifier, accuracies


# --------------------------------------------------------------------------------------
# What is measured of models

# What the classifier sees in a model's samples: samples (N, C, H, W) uint8, features
# (N, d), classes (N,), and counts, a numpy array of one number per class.
Seen = namedtuple("Seen", "samples features classes counts")


class Judge:
    """What all models of one parent are measured with: the classifier, real images, and
    what is seen of the parent, `before`."""

    def __init__(self, before, args, device):
        self.args = args
        self.device = device
        self.classes = before.data["classes"]  # by name
        self.train = load_data_of(before, args.data_root)  # (images, labels)
        self.test = load_data_of(before, args.data_root, train=False)
        self.classifier, self.accuracies = get_classifier(before, self.train, self.test, device)
        self.real_features, _ = features_and_classes(self.classifier, self.train[0], device)
        if self.test[0] is None:
            # there is no other part to bound -log p of
            self.test = self.train
        self.before = before
        self.seen_before = self.draw_and_classify(before, args.samples)

    def draw_and_classify(self, model, n, series=""):
        """Seen, of n samples of a Checkpoint's model. series: models of one series
        share their noise."""
        print(f"sampling from {model.path}")
        samples = draw(model, n, self.args.sampling_steps, self.args.seed, series)
        features, classes = features_and_classes(self.classifier, samples, self.device)
        counts = classes.bincount(minlength=len(self.classes))
        return Seen(samples, features, classes, counts.numpy())

    def some(self, images, n, seed):
        """n of the images, or all, as floats: the same ones for every model."""
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(images), generator=generator)[:n]
        return to_float(images[chosen]).to(self.device)

    def bits(self, model, images):
        """The upper bound on -log p, in bits per dimension, in the mean over some of
        the images: the same ones, t and eps for every model; nan of none. (The method
        claims to raise it for D_f, and to keep it for D_r.)"""
        x0 = self.some(images, self.args.bits, seed=0)
        if len(x0) == 0:
            return math.nan
        # at 40 of the steps
        bound = model.diffusion.variational_bound(model.unet, x0, 40)
        return bound["total"].mean().item()

    def measure(self, model, seen, forgotten):
        """All that is reported of one model by itself: a dict of plain values.
        seen: its Seen.  forgotten: indices of classes."""
        gone = torch.tensor(forgotten)
        # u-FID is against the images that should stay.
        retained = ~torch.isin(self.train[1], gone)
        real = self.real_features[retained]
        rest = seen.features[~torch.isin(seen.classes, gone)]
        images, labels = self.test
        is_gone = torch.isin(labels, gone)
        return {
            "checkpoint": model.path,
            "counts": dict(zip(self.classes, seen.counts.tolist())),
            "forgotten_count": seen.counts[forgotten].sum().item(),
            "u_fid": frechet_distance(seen.features, real),
            # less the samples of the class: what deleting those alone would reach
            "u_fid_of_perfect_deletion": frechet_distance(rest, real),
            "bits_forgotten": self.bits(model, images[is_gone]),
            "bits_retained": self.bits(model, images[~is_gone])}


def frechet(a, b):
    """The Frechet distance between two models, by their Seen."""
    return frechet_distance(a.features, b.features)


def total_variation(a, b):
    """The total variation distance between the shares of all classes."""
    return drift(a.counts, b.counts, [])


def against_retraining(before, after, retrained, forgotten):
    """How much of the distance to the retrained model is left: a dict.

    before, after: their Seen.  retrained: that of one or two models, of other seeds,
    that never saw the forgotten classes, which stand for p(theta | D_r); {} for none.
    Of distances to both the mean is taken; how far the two lie apart is the floor, nan
    for one. "left" = (after - floor) / (before - floor): 0 is a retrained model, 1 is
    untouched. The floor holds what n samples add to every Frechet distance, and how far
    two seeds lie apart: both are taken off, so that "left" may fall below 0."""
    if not retrained:
        return {}
    # What a retrained model has of the class: the classifier's mistakes, mostly.
    n_before = before.counts[forgotten].sum()
    result = {
        "PUL": [percentage_of_unlearning(n_before, seen.counts[forgotten].sum())
                for seen in retrained],
        "drift": math.nan,
        "worst_kept": math.nan}

    # What two retrained models differ by in the retained classes.
    two = len(retrained) == 2
    if two:
        first, second = [seen.counts for seen in retrained]
        result["drift"] = drift(first, second, forgotten)
        result["worst_kept"] = min(worst_kept(first, second, forgotten)[1],
                                   worst_kept(second, first, forgotten)[1])

    # The two distances, and what is left of the way.
    for distance in (frechet, total_variation):
        to_after = fmean(distance(after, seen) for seen in retrained)
        to_before = fmean(distance(before, seen) for seen in retrained)
        floor = distance(*retrained) if two else math.nan
        left = math.nan  # of one model, or where the model before is as near as the floor
        if to_before > floor:
            left = (to_after - floor) / (to_before - floor)
        result[distance.__name__] = {"after": to_after, "before": to_before, "floor": floor,
                                     "left": left}
    return result


# --------------------------------------------------------------------------------------
# The report

def report_on(judge, after, seen, retrained, forgotten):
    """The report of one unlearned model: a dict of plain values.

    after: a Checkpoint.  seen: its Seen.  retrained: a list of such.
    forgotten: indices of classes."""
    # Each model by itself, then one against the other.
    a = judge.measure(judge.before, judge.seen_before, forgotten)
    b = judge.measure(after, seen, forgotten)
    counts = judge.seen_before.counts, seen.counts
    worst, left = worst_kept(*counts, forgotten)
    report = {
        "forgotten": [judge.classes[i] for i in forgotten],
        "PUL": percentage_of_unlearning(a["forgotten_count"], b["forgotten_count"]),
        "drift": drift(*counts, forgotten),
        "worst_kept": {"class": None if worst is None else judge.classes[worst],
                       "share_left": left},
        "before": a,
        "after": b,
        "retrained": against_retraining(judge.seen_before, seen, retrained, forgotten),
        "classifier_accuracy": torch.tensor(judge.accuracies).nanmean().item(),
        "classifier_accuracy_on_forgotten": [judge.accuracies[i] for i in forgotten],
        "settings": vars(judge.args),
        "data": judge.before.data,
        "unlearning": after.forgotten}
    report["warnings"] = warnings_of(report)
    return report


def warnings_of(report):
    """Reasons to distrust the numbers: the classifier counts what it is shown, noise,
    too."""
    n = report["before"]["forgotten_count"]
    accuracy = report["classifier_accuracy"]
    warnings = []
    if report["after"]["u_fid"] >= 10 * report["before"]["u_fid"]:
        warnings.append("u-FID grew more than tenfold")
    if accuracy < 0.8:
        warnings.append(f"the classifier is right on no more than {accuracy:.0%}")
    if n < 20:
        warnings.append(f"{n} samples before are of the class: of fewer than 20 a PUL says little, "
                        "of 0 nothing; more --samples")
    return warnings


# The table: what stands over each column, and a template for str.format, filled from
# the report ("!s:.9" is the first nine letters).
COLUMNS = {
    "count": "{before[forgotten_count]} -> {after[forgotten_count]}",
    "PUL": "{PUL:.1f}%",
    "u-FID": "{before[u_fid]:.2f} -> {after[u_fid]:.2f}",
    "if deleted": "{before[u_fid_of_perfect_deletion]:.2f}",
    "drift": "{drift:.3f}",
    "worst kept": "{worst_kept[class]!s:.9}, {worst_kept[share_left]:.0%}",
    "bits of D_f": "{before[bits_forgotten]:.2f} -> {after[bits_forgotten]:.2f}",
    "bits of D_r": "{before[bits_retained]:.2f} -> {after[bits_retained]:.2f}"}

# Under a row: what is said of the retrained models ("them"). One has no floor: nan.
DISTANCE = "  {} to them: {after:.3f}, before {before:.3f}, floor {floor:.3f}; left {left:.2f}"
BETWEEN = "  between the two: drift {drift:.3f}, worst kept {worst_kept:.0%}"


def print_table(reports):
    """For each model a row; under it what to beware of, the distance to retraining, and
    how good the classifier is."""
    print(" ".join(f"{title:>15}" for title in COLUMNS))
    for r in reports:
        print(r["after"]["checkpoint"], "without", ", ".join(r["forgotten"]))
        cells = [template.format(**r) for template in COLUMNS.values()]
        print(" ".join(f"{cell:>15}" for cell in cells))
        for warning in r["warnings"]:
            print(f"  WARNING: {warning}; look at the pictures")
        # The retrained models, where there are any; the floor takes two.
        target = r["retrained"]
        if target:
            print("  retrained: PUL", ", ".join(f"{x:.1f}%" for x in target["PUL"]))
            for name in ("frechet", "total_variation"):
                print(DISTANCE.format(name, **target[name]))
            if len(target["PUL"]) == 2:
                print(BETWEEN.format(**target))
        on_forgotten = ", ".join(f"{x:.1%}" for x in r["classifier_accuracy_on_forgotten"])
        print(f"  the classifier is right on {r['classifier_accuracy']:.1%} in the mean over "
              f"classes, on {on_forgotten} of the forgotten; N = {r['settings']['samples']:,}")


COUNT_AT = (0, 2, 5, 10, 20, 50, 100, 200, 500)  # steps of relearning after which is counted


def relearning(judge, model, forgotten):
    """How fast the class comes back as DDPM's training goes on, on images of it alone.

    model: a Checkpoint, spent afterwards.  Returns {"steps", "images": how many,
    "samples", "shares": of the samples that are counted as the class}."""
    # Weights that no longer draw a class may still hold it. A model that never saw it
    # has to learn it from these few images; one that only hides it is quicker.
    args = judge.args
    gone = torch.tensor(forgotten)
    images, labels = judge.train
    x = judge.some(images[torch.isin(labels, gone)], 100, args.seed)  # (K, C, H, W)

    n = min(args.samples, 500)
    shares = {}  # by step
    optimizer = torch.optim.Adam(model.unet.parameters(), 2e-4, (0.9, 0.99))
    torch.manual_seed(args.seed)
    for step in range(args.relearn + 1):
        if step in COUNT_AT or step == args.relearn:  # and at the end
            seen = judge.draw_and_classify(model, n)
            shares[step] = torch.isin(seen.classes, gone).float().mean().item()
            print(f"relearning from {len(x)} images, after {step} steps: {shares[step]:.1%}")
        if step < args.relearn:
            batch = x[torch.randint(len(x), (64,)).to(x.device)]  # (64, C, H, W)
            training_step(model.unet, model.diffusion, optimizer, batch)
    return {"steps": list(shares), "images": len(x), "samples": n,
            "shares": list(shares.values())}


def write_json(path, value, overwrite):
    """Plain values as JSON, whole or not at all; nan and infinity become null."""
    value = json.loads(json.dumps(value), parse_constant=lambda name: None)  # NaN -> None
    text = json.dumps(value, indent=2)
    write_atomically(path, lambda f: f.write(text.encode()), overwrite)


# --------------------------------------------------------------------------------------
# The command line

def newest_unlearned(folder):
    """The newest checkpoint of vdu.py in `folder`. Raises UserError for none."""
    for path in sorted(Path(folder).glob("*"), key=os.path.getmtime, reverse=True):
        with contextlib.suppress(UserError, AttributeError):  # it is none, or broken
            if read_file(path, lazy=True).get("forgotten"):  # the numbers stay on disk
                return path
    raise UserError(f"no unlearned model in {folder}/: make one with python vdu.py")


def parent_of(after, device):
    """The model that `after` was unlearned from. Raises UserError if it is gone or
    another."""
    if not after.forgotten:
        raise UserError(f"{after.path} forgot nothing: say with --before FILE what to compare it "
                        "with")
    path = after.forgotten["checkpoint"]
    if os.path.exists(path):
        before = load_checkpoint(path, device)
        if digest(before.unet.state_dict().values()) == after.forgotten["parent"]:
            return before
    raise UserError(f"{after.path} was unlearned from {path}, which is gone or another: say with "
                    "--before FILE what to compare it with")


def load_retrained(args, before, after, names, device):
    """The one or two Checkpoints that were trained without what is forgotten; none
    where none is named and none lies beside `after`. Raises UserError for others."""
    # Those that are named, or that have the name that README gives them.
    files = args.retrained
    if files is None:
        without = f"{Path(before.path).stem}-without-{'-'.join(names)}"
        beside = [Path(after.path).with_name(without + end) for end in (".pt", "-again.pt")]
        files = [file for file in beside if file.exists()]
    if len(files) > 2:
        raise UserError("--retrained takes one model or two")
    models = [load_checkpoint(file, device) for file in files]
    for model in models:
        if sorted(model.data["excluded"]) != sorted(names):
            raise UserError(f"{model.path} was not trained without {', '.join(names)}")
    return models


def load_case(path, args, device):
    """What is compared: the Checkpoints before, after and retrained (a list), and the
    indices of the forgotten classes."""
    after = load_checkpoint(path, device)
    if args.before:
        before = load_checkpoint(args.before, device)
    else:
        before = parent_of(after, device)
    # The classes that are named, else those that it forgot, or was trained without.
    names = args.forget_class
    if names is None:
        names = after.forgotten["classes"] if after.forgotten else after.data["excluded"]
    classes = before.data["classes"]
    forgotten = class_indices(names, classes)
    if not forgotten:
        raise UserError(f"{path}: say with --forget-class what to count")

    names = [classes[i] for i in forgotten]
    retrained = load_retrained(args, before, after, names, device)
    shapes = {tuple(model.config["image_shape"]) for model in (before, after, *retrained)}
    if len(shapes) > 1:
        raise UserError(f"{path}: its models draw images of different shapes: {sorted(shapes)}")
    return before, after, retrained, forgotten


def main(args):
    """One report for each of args.after, and a table of all."""
    device = pick_device(args.device)
    paths = args.after or [newest_unlearned("checkpoints")]
    # All files are there, and the reports have a place, before any work.
    cases = [load_case(path, args, device) for path in paths]
    folders = [Path(args.output) / Path(path).stem for path in paths]
    if len(set(folders)) < len(folders):
        raise UserError("--after: two files have the same name, and their reports would be one")
    for folder in folders:
        for name in ("report.json", "before.png", "after.png"):
            check_output(folder / name, args.overwrite)

    judges = {}  # by parent
    reports = []
    for (before, after, retrained, forgotten), folder in zip(cases, folders):
        if before.path not in judges:
            judges[before.path] = Judge(before, args, device)
        judge = judges[before.path]
        # Before and after have the same noise, the others their own.
        seen = judge.draw_and_classify(after, args.samples)
        others = [judge.draw_and_classify(model, args.samples, f"retrained {i}")
                  for i, model in enumerate(retrained)]

        report = report_on(judge, after, seen, others, forgotten)
        reports.append(report)
        if args.relearn:
            report["relearning"] = relearning(judge, after, forgotten)
        write_images(folder / "before.png", [judge.seen_before.samples[:64]], args.overwrite)
        write_images(folder / "after.png", [seen.samples[:64]], args.overwrite)
        write_json(folder / "report.json", report, args.overwrite)
        print(f"wrote {folder}: report.json, before.png, after.png")
    print_table(reports)


def parser():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--after", nargs="+", help="unlearned models (default: the newest)")
    add("--before", help="compare with it (default: what it was unlearned from)")
    add("--output", default="results", help="folder of reports (default: results)")
    add("--samples", type=positive, default=2000, help="per model: 2000")
    add("--sampling-steps", type=positive, default=25, help="per sample: 25")
    add("--forget-class", nargs="+", metavar="CLASS", help="count these (default: own)")
    add("--bits", type=number(int, 0), default=100, help="images for -log p: 100")
    add("--relearn", type=number(int, 0), default=0, help="train N steps on the class")
    add("--retrained", nargs="+", metavar="FILE", help="one or two, without the class (default: "
        "PARENT-without-CLASS.pt and PARENT-without-CLASS-again.pt beside --after)")
    add("--data-root", help="folder of the dataset (default: as in training)")
    add_shared_flags(p)
    return p


if __name__ == "__main__":
    run_command_line(main, parser())
