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
from collections import namedtuple
from operator import itemgetter
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.transforms import v2
from torchvision.utils import save_image
from tqdm import tqdm

from ddpm import (UserError, add_shared_flags, autocast, check_outputs, digest,
                  load_checkpoint, number, pick_device, read_file, run_command_line,
                  save_checkpoint, training_step, write_atomically)
from train_ddpm import class_indices, load_data_of, title_of, to_float, to_uint8

# --------------------------------------------------------------------------------------
# The metrics: of class counts (one number per class), and of features (N, d)

def percentage_of_unlearning(n_before, n_after):
    """PUL = 100 (n_before - n_after) / n_before, of the forgotten class (VDU).
    100 when none is left, 0 when nothing changed, below 0 when there are more. nan if
    there was none to begin with."""
    return 100 * (n_before - n_after) / n_before if n_before else math.nan


def frechet_distance(features_a, features_b):
    """|| m_a - m_b ||^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2), of Gaussians.
    features: (N, d).  Returns a float (Dowson & Landau 1982; FID, Heusel et al. 2017).
    Of few samples it is too large: two halves of one distribution are not at 0.
    In float64, and by the symmetric form of the root: its eigenvalues are real and not
    negative but for rounding, where the usual sqrtm(C_a C_b) can turn complex."""
    a, b = features_a.double().cpu(), features_b.double().cpu()
    mean_a, mean_b = a.mean(0), b.mean(0)  # (d,)
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)  # (d, d)
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = vectors * values.clamp(min=0).sqrt() @ vectors.T  # C_a^1/2: (d, d)
    trace_root = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * trace_root
    return distance.clamp(min=0).item()


def class_shares(counts, forgotten):
    """{class index: share} of the retained classes among themselves."""
    retained = {i: n for i, n in enumerate(counts) if i not in forgotten}
    return {i: n / max(1, sum(retained.values())) for i, n in retained.items()}


def drift(counts_before, counts_after, forgotten):
    """Total variation distance, 0 .. 1, between the shares of the retained classes (of
    all, if none is forgotten). What a u-FID can hide: a neighbour that went along."""
    before, after = (class_shares(c, forgotten) for c in (counts_before, counts_after))
    return sum(abs(before[i] - after[i]) for i in before) / 2


def worst_kept(counts_before, counts_after, forgotten):
    """(index, share left) of the retained class, drawn before, that lost most."""
    left = {i: counts_after[i] / n for i, n in enumerate(counts_before)
            if n and i not in forgotten}
    return min(left.items(), key=lambda item: item[1]) if left else (None, math.nan)


# --------------------------------------------------------------------------------------
# The classifier of a dataset: it counts, and its features are what u-FID compares

class Classifier(nn.Module):
    """(B, C, H, W) in [-1, 1] -> logits (B, classes). `body` gives the features: the
    last convolution's, averaged over all pixels."""

    def __init__(self, image_shape, classes):
        super().__init__()
        C, width = image_shape[0], 32 if image_shape[0] == 1 else 64  # photographs need more
        layers = []
        for out in (width, 2 * width, 4 * width):
            layers += [nn.Conv2d(C, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(),
                       nn.MaxPool2d(2, ceil_mode=True)]  # halves H and W
            C = out
        self.body = nn.Sequential(*layers[:-1], nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(C, classes)

    def forward(self, x):
        return self.head(self.body(x))


def train_classifier(classifier, images, labels, device, epochs=None):
    """AdamW, one cycle. images: (N, C, H, W) uint8.  epochs: of few images more are
    needed (None: so many that 40,000 images pass, in colour 150,000; 60 at most)."""
    colour = images.shape[1] == 3
    B = min(128, len(images))
    if epochs is None:
        epochs = max(10, 150_000 // len(images)) if colour else max(4, 40_000 // len(images))
        epochs = min(60, epochs)
    steps = epochs * (len(images) // B)
    H, W = images.shape[2:]
    jitter = v2.Compose([v2.RandomHorizontalFlip(),  # another one for each photograph
                         v2.RandomCrop((H, W), padding=4, padding_mode="reflect")])
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    with tqdm(total=steps, desc="training the classifier", unit="step") as bar:
        for _ in range(epochs):
            order = torch.randperm(len(images))
            for batch in order.split(B)[: len(images) // B]:
                x = to_float(images[batch])
                if colour:
                    x = torch.stack([jitter(image) for image in x])
                with autocast(device):
                    logits = classifier(x.to(device))
                loss = F.cross_entropy(logits.float(), labels[batch].to(device))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                bar.update()


@torch.inference_mode()
def features_and_probabilities(classifier, images, device):
    """uint8 images (N, C, H, W) -> features (N, d), probabilities (N, classes)."""
    features, probabilities = [], []
    for chunk in images.split(max(1, 2**20 // images[0, 0].numel())):  # a million pixels at once
        with autocast(device):
            f = classifier.body(to_float(chunk).to(device))
            logits = classifier.head(f)
        features.append(f.float().cpu())
        probabilities.append(logits.float().softmax(1).cpu())
    return torch.cat(features), torch.cat(probabilities)


def get_classifier(checkpoint, images, labels, test_images, test_labels, device):
    """(the dataset's classifier, its test accuracy per class: nan if none is tested).
    Trained once, and kept in a file. images, labels: the training images, of every
    class; their digest is in the file's name. Without a test part (None), a fifth of
    each class is held out to test on."""
    data = checkpoint.data
    path = Path("checkpoints") / f"pooled-classifier-{title_of(data)}-{digest([images, labels])}.pt"
    torch.manual_seed(0)
    classifier = Classifier(tuple(images.shape[1:]), len(data["classes"])).to(
        device, memory_format=torch.channels_last)  # twice as fast on a CPU
    if path.exists():
        saved = read_file(path)
        classifier.load_state_dict(saved["classifier"])
        return classifier.eval(), saved["accuracies"]

    if test_images is None:
        held_out = torch.zeros(len(images), dtype=torch.bool)
        for i in range(len(data["classes"])):
            of_class = (labels == i).nonzero().flatten()
            held_out[of_class[1::5]] = True  # the first of all is learned, the second tested
        test_images, test_labels = images[held_out], labels[held_out]
        images, labels = images[~held_out], labels[~held_out]
    if len(images) < 8:
        raise UserError(f"a classifier needs at least 8 images to learn from, not {len(images)}")
    train_classifier(classifier, images, labels, device)

    predicted = features_and_probabilities(classifier.eval(), test_images, device)[1].argmax(1)
    right = (predicted == test_labels).float()
    accuracies = [right[test_labels == i].mean().item() for i in range(len(data["classes"]))]
    save_checkpoint(path, {"classifier": classifier.state_dict(), "accuracies": accuracies})
    return classifier, accuracies


# --------------------------------------------------------------------------------------
# The report

class Look(namedtuple("_", "samples features classes counts confidence")):
    """A model's samples as the classifier sees them: (N, C, H, W) uint8, (N, d), (N,)
    class indices, how many of each class, and how sure it is of them in the mean."""


class Judge:
    """What models of one parent are measured with: classifier, real images, samples."""

    def __init__(self, checkpoint, device, data_root):
        self.checkpoint = checkpoint
        self.device = device
        self.images, self.labels = load_data_of(checkpoint, data_root)
        test = load_data_of(checkpoint, data_root, train=False)
        self.classifier, self.accuracies = get_classifier(checkpoint, self.images, self.labels,
                                                          *test, device)
        self.test = (self.images, self.labels) if test[0] is None else test
        self.real_features, _ = features_and_probabilities(self.classifier, self.images, device)
        self.looks = {}   # of models that are met again, by path and noise
        self.before = {}  # what was measured of the parent, by forgotten classes

    def look(self, model, args, series="", keep=False):
        """A Look at a model. series: models of another one share no noise with it."""
        if (model.path, series) in self.looks:
            return self.looks[model.path, series]
        print(f"sampling from {model.path}")
        samples = draw(model, args.samples, args, series, progress=True)
        features, probabilities = features_and_probabilities(self.classifier, samples, self.device)
        classes = probabilities.argmax(1)
        counts = classes.bincount(minlength=probabilities.shape[1]).tolist()
        confidence = probabilities.max(1).values.mean().item()
        look = Look(samples, features, classes, counts, confidence)
        if keep:
            self.looks[model.path, series] = look
        return look

    def measure(self, look, forgotten, model, bits):
        """All that is reported of one model: a dict.
        forgotten: indices of classes.  bits: how many forgotten and retained test
        images (training images, where there is no test part) to bound -log p of, in
        bits per dimension: what the method claims to change, and to keep. The same
        images, t and eps for every model."""
        gone = torch.tensor(forgotten)
        real = self.real_features[~torch.isin(self.labels, gone)]
        deleted = look.features[~torch.isin(look.classes, gone)]
        result = {"counts": dict(zip(self.checkpoint.data["classes"], look.counts)),
                  "forgotten_count": sum(look.counts[i] for i in forgotten),
                  "mean_confidence": look.confidence,
                  "u_fid": frechet_distance(look.features, real),
                  "u_fid_of_perfect_deletion": math.nan,
                  # of samples that are all alike, in the middle of the real images
                  "u_fid_of_a_point": torch.cov(real.T).trace().item()}
        if len(deleted) > 1:
            result["u_fid_of_perfect_deletion"] = frechet_distance(deleted, real)

        generator = torch.Generator().manual_seed(0)
        is_gone = torch.isin(self.test[1], gone)
        for name, of_kind in (("bits_forgotten", is_gone), ("bits_retained", ~is_gone)):
            of_kind = of_kind.nonzero().flatten()
            chosen = of_kind[torch.randperm(len(of_kind), generator=generator)[:bits]]
            result[name] = math.nan
            if len(chosen):
                x0 = to_float(self.test[0][chosen]).to(self.device)
                bound = model.diffusion.variational_bound(model.unet, x0, 40)
                result[name] = bound["total"].mean().item()
        return result


def draw(model, n, args, series="", progress=False):
    """n samples of a Checkpoint's model, uint8: of one series, the same noise."""
    return to_uint8(model.diffusion.sample(
        model.unet, n, model.config["image_shape"], args.sampling_steps, 1.0, args.seed,
        progress=progress, series=series))


def against_retraining(before, after, retrained, forgotten):
    """How much of the distance to the retrained model is left: a dict.

    before, after: Looks.  retrained: those of one or two models, of other seeds, that
    never saw the forgotten classes, which stand for p(theta | D_r). Of distances to
    both the mean is taken; how far the two lie apart is the floor, nan for one.
    "left" = (after - floor) / (before - floor): 0 is a retrained model, 1 is untouched.
    The floor holds what n samples add to every Frechet distance, and how far two seeds
    lie apart: both are taken off, so that "left" may fall below 0."""
    result = {"PUL": [], "drift": math.nan, "worst_kept": (None, math.nan)}
    n_before = sum(before.counts[i] for i in forgotten)
    for look in retrained:
        n = sum(look.counts[i] for i in forgotten)
        result["PUL"].append(percentage_of_unlearning(n_before, n))
    if len(retrained) == 2:
        counts = [look.counts for look in retrained]
        result["drift"] = drift(*counts, forgotten)
        result["worst_kept"] = min(worst_kept(*counts, forgotten),
                                   worst_kept(*counts[::-1], forgotten), key=itemgetter(1))

    def frechet(a, b):
        return frechet_distance(a.features, b.features)

    def total_variation(a, b):
        return drift(a.counts, b.counts, ())

    for distance in (frechet, total_variation):
        to_after = sum(distance(after, look) for look in retrained) / len(retrained)
        to_before = sum(distance(before, look) for look in retrained) / len(retrained)
        floor = distance(*retrained) if len(retrained) == 2 else math.nan
        left = math.nan
        if to_before > floor:
            left = (to_after - floor) / (to_before - floor)
        result[distance.__name__] = {"after": to_after, "before": to_before, "floor": floor,
                                     "left": left}
    return result


TOO_FEW = 20        # of the class, before: a share of fewer says little
ACCURATE = 0.8      # below it, the classifier's counts say little


def compare(judge, after, names, args, retrained=()):
    """(report, samples) of the models before and after; names: forgotten classes.
    retrained: as in against_retraining, but Checkpoints."""
    parent, classes = judge.checkpoint, after.data["classes"]
    key = tuple(classes.index(name) for name in names)
    looks = {"before": judge.look(parent, args, keep=True), "after": judge.look(after, args)}
    if key not in judge.before:
        judge.before[key] = judge.measure(looks["before"], key, parent, args.bits)
    a, b = judge.before[key], judge.measure(looks["after"], key, after, args.bits)
    worst, left = worst_kept(looks["before"].counts, looks["after"].counts, key)

    target = {}
    if retrained:
        others = [judge.look(model, args, f"retrained {i}", keep=True)
                  for i, model in enumerate(retrained)]
        target = {"checkpoints": [model.path for model in retrained],
                  **against_retraining(looks["before"], looks["after"], others, key)}

    # The classifier counts whatever it is shown, noise too.
    tested = [x for x in judge.accuracies if not math.isnan(x)]
    accuracy = sum(tested) / max(1, len(tested))
    warnings = []
    if b["u_fid"] >= 10 * a["u_fid"]:
        warnings.append("u-FID grew more than tenfold")
    if a["u_fid"] >= a["u_fid_of_a_point"]:
        warnings.append("the model before draws nothing like the images")
    if accuracy < ACCURATE:
        warnings.append(f"the classifier is right on {100 * accuracy:.0f}% of a class alone")
    if a["forgotten_count"] < TOO_FEW:
        warnings.append(f"{a['forgotten_count']} before are too few for a PUL: more --samples")

    return {
        "forgotten": names,
        "PUL": percentage_of_unlearning(a["forgotten_count"], b["forgotten_count"]),
        "drift": drift(looks["before"].counts, looks["after"].counts, key),
        "worst_kept": {"class": None if worst is None else classes[worst], "share_left": left},
        "warnings": warnings,
        "retrained": target,
        "before": {"checkpoint": parent.path, **a},
        "after": {"checkpoint": after.path, **b},
        "classifier_accuracy": accuracy,
        "classifier_accuracy_on_forgotten": [judge.accuracies[i] for i in key],
        "settings": vars(args), "data": parent.data, "unlearning": after.forgotten,
    }, {when: look.samples for when, look in looks.items()}


def print_table(reports):
    """A row per model; under it what to beware of, and the distance to retraining."""
    width = 2 + max(len(r["after"]["checkpoint"]) for r in reports)
    titles = ("forgotten", "count", "PUL", "u-FID", "if deleted", "drift", "worst kept",
              "bits of D_f", "bits of D_r")
    print(" " * width + "".join(f"{title:>16}" for title in titles))
    for r in reports:
        a, b, worst = r["before"], r["after"], r["worst_kept"]
        pul = f"{r['PUL']:.1f}%"
        if a["forgotten_count"] < TOO_FEW:
            pul = "too few"
        cells = [", ".join(r["forgotten"])[:14],
                 f"{a['forgotten_count']} -> {b['forgotten_count']}",
                 pul,
                 f"{a['u_fid']:.2f} -> {b['u_fid']:.2f}",
                 f"{a['u_fid_of_perfect_deletion']:.2f}",
                 f"{r['drift']:.3f}",
                 f"{str(worst['class'])[:9]}, {100 * worst['share_left']:.0f}%"]
        for key in ("bits_forgotten", "bits_retained"):
            cells.append(f"{a[key]:.2f} -> {b[key]:.2f}")
        print(f"{b['checkpoint']:{width}}" + "".join(f"{cell:>16}" for cell in cells))
        for warning in r["warnings"]:
            print(f"  WARNING: {warning}; the counts mean little: see the pictures")
        if r["retrained"]:
            print_distance(r["retrained"])
        on_forgotten = ", ".join(f"{100 * x:.1f}%" for x in r["classifier_accuracy_on_forgotten"])
        n = sum(a["counts"].values())
        print(f"  the classifier is right on {100 * r['classifier_accuracy']:.1f}% in the mean "
              f"over classes, on {on_forgotten} of the forgotten; N = {n:,} samples")


def print_distance(target):
    """The lines of a report about the retrained models."""
    pul = ", ".join(f"{x:.1f}%" for x in target["PUL"])
    print(f"  retrained ({', '.join(target['checkpoints'])}): PUL {pul}")
    if len(target["checkpoints"]) == 2:
        print(f"  between the two: drift {target['drift']:.3f}, worst kept "
              f"{100 * target['worst_kept'][1]:.0f}%")
    for name in ("frechet", "total_variation"):
        said = ("  distance to it, {name}: {after:.3f}, before {before:.3f}, floor {floor:.3f}; "
                "left {left:.2f}")
        print(said.format(name=name, **target[name]))
    if len(target["checkpoints"]) < 2:
        print("  the floor is missing: it takes two models, retrained from two seeds")


def relearning(judge, model, names, args, images=100, lr=2e-4):
    """How fast the class comes back as DDPM's training goes on, on images of it alone.

    model: a Checkpoint, spent afterwards.  images: how many.  Returns {"steps",
    "images", "samples", "shares": of the samples that are counted as the class}."""
    # Weights that no longer draw a class may still hold it. A model that never saw it
    # has to learn it from these few images; one that only hides it is quicker.
    forgotten = torch.tensor([judge.checkpoint.data["classes"].index(name) for name in names])
    of_class = torch.isin(judge.labels, forgotten).nonzero().flatten()
    generator = torch.Generator().manual_seed(args.seed)
    chosen = of_class[torch.randperm(len(of_class), generator=generator)[:images]]
    x = to_float(judge.images[chosen]).to(judge.device)  # (K, C, H, W)
    marks = [n for n in (0, 2, 5, 10, 20, 50, 100, 200, 500) if n < args.relearn]
    marks.append(args.relearn)
    n, shares = min(args.samples, 500), []
    optimizer = torch.optim.AdamW(model.unet.parameters(), lr, betas=(0.9, 0.99), weight_decay=0.0)
    torch.manual_seed(args.seed)
    for step in tqdm(range(marks[-1] + 1), desc="relearning", unit="step"):
        if step in marks:
            samples = draw(model, n, args)
            _, p = features_and_probabilities(judge.classifier, samples, judge.device)
            shares.append(torch.isin(p.argmax(1), forgotten).float().mean().item())
        if step < marks[-1]:
            batch = x[torch.randint(len(x), (64,)).to(x.device)]
            training_step(model.unet, model.diffusion, optimizer, batch)
    print(f"relearning from {len(x)} images: after {marks} steps "
          + ", ".join(f"{100 * share:.1f}%" for share in shares))
    return {"steps": marks, "images": len(x), "samples": n, "shares": shares}


def write_json(path, value):
    """Plain values as JSON, whole or not at all; nan, which JSON lacks, as null."""
    value = json.loads(json.dumps(value), parse_constant=lambda name: None)
    write_atomically(path, lambda f: f.write(json.dumps(value, indent=2).encode()))


def write_images(path, images, **layout):
    """uint8 images (N, C, H, W) as one PNG, a grid; whole or not at all."""
    write_atomically(path, lambda f: save_image(images.float() / 255, f, format="png", **layout))


# --------------------------------------------------------------------------------------
# The command line

def newest_unlearned(folder):
    """The newest checkpoint of vdu.py in `folder`. Raises UserError for none."""
    for path in sorted(Path(folder).glob("*.pt"), key=os.path.getmtime, reverse=True):
        with contextlib.suppress(UserError):  # a broken file is not the one that is looked for
            raw = read_file(path, lazy=True)
            if isinstance(raw, dict) and raw.get("forgotten"):
                return str(path)
    raise UserError(f"no unlearned model in {folder}/: make one with python vdu.py")


def parent_of(after, device):
    """The model that `after` was unlearned from: where vdu.py read it, or beside
    `after` if both were moved. Raises UserError if it is gone or another."""
    past = after.forgotten or {"checkpoint": "no model"}
    beside = Path(after.path).with_name(Path(past["checkpoint"]).name)
    places = [place for place in (past["checkpoint"], beside) if os.path.exists(place)]
    before = load_checkpoint(places[0], device) if places else None
    if not before or past.get("parent") not in (None, digest(before.unet.state_dict().values())):
        raise UserError(f"{after.path} was unlearned from {past['checkpoint']}, which is gone or "
                        "another: say with --before FILE what to compare it with")
    return before


def main(args):
    """One report for each of args.after, and a table of all."""
    device, reports, judges = pick_device(args.device), [], {}
    paths = args.after or [newest_unlearned("checkpoints")]
    folders = [Path(args.output) / Path(path).stem for path in paths]
    if len(set(folders)) < len(folders):
        raise UserError("--after: two files have the same name, and their reports would be one")
    names = ("report.json", "before.png", "after.png")
    check_outputs([folder / name for folder in folders for name in names], args.overwrite)
    for path, folder in zip(paths, folders):
        after = load_checkpoint(path, device)
        before = load_checkpoint(args.before, device) if args.before else parent_of(after, device)
        # Count the classes that are named, else those it was told to forget.
        classes = after.data["classes"]
        named = [classes[i] for i in class_indices(args.forget_class or [], classes)]
        forgotten = named or (after.forgotten or {"classes": after.data["excluded"]})["classes"]
        if not forgotten or len(forgotten) >= len(classes) - len(before.data["excluded"]):
            raise UserError("say with --forget-class what to count, and leave at least one class")
        # The target is the model that was retrained without them, where there is one.
        without = f"{Path(before.path).with_suffix('')}-without-{'-'.join(forgotten)}"
        beside = [file for file in (f"{without}.pt", f"{without}-again.pt") if os.path.exists(file)]
        retrained = [load_checkpoint(file, device) for file in args.retrained or beside]
        for model in (after, *retrained):
            known = [(c.data["classes"], [*c.config["image_shape"]]) for c in (before, model)]
            if known[0] != known[1]:
                raise UserError(f"{before.path} and {model.path} were not trained on one dataset")
        for model in retrained:
            if sorted(model.data["excluded"]) != sorted(forgotten):
                raise UserError(f"{model.path} was not trained without {', '.join(forgotten)}")
        if len(retrained) > 2:
            raise UserError("--retrained takes one model or two")
        if before.path not in judges:
            judges[before.path] = Judge(before, device, args.data_root)
        report, samples = compare(judges[before.path], after, forgotten, args, retrained)
        reports.append(report)
        write_json(folder / "report.json", report)  # once it exists; again with relearning
        for when, images in samples.items():
            write_images(folder / f"{when}.png", images[:64])
        if args.relearn:
            report["relearning"] = relearning(judges[before.path], after, forgotten, args)
            write_json(folder / "report.json", report)
        print(f"wrote {folder}: {', '.join(names)}")
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
    run_command_line(lambda: main(parser().parse_args()))
