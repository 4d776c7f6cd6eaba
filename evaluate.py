"""Did it forget, and what did that cost? Sample before and after with the same noise, and count.

    python evaluate.py
    python evaluate.py --relearn 200
    python evaluate.py --sweep-gamma 0.5 0.6 0.7
    python evaluate.py --profile

Holds    the classifier that counts, PUL, u-FID, precision and recall, the report; relearning, the sweep over
         gamma, and the table of speeds.
Reads    an unlearned checkpoint and its parent (the newest unlearned one and the one it came from, unless told), and
         the dataset they were trained on. Retained images are needed here, to measure; vdu.py never sees them.
Writes   results/NAME/report.json, before.png, after.png (and sweep.json, sweep.png); and once a dataset, the classifier,
         in checkpoints/.
Paper    VDU (arXiv 2510.04058), experiments: PUL (percentage of unlearning) and u-FID.
"""

import json
import math
import os
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.models import Inception_V3_Weights, inception_v3
from torchvision.utils import draw_bounding_boxes, draw_keypoints, save_image
from tqdm import tqdm

import vdu
from ddpm import (ArgumentParser, UserError, autocast, check_output, count, first_line, load_checkpoint, pick_device, read_file, run_command_line,
                  save_checkpoint, seed_number, training_step)
from train_ddpm import MNIST_5K, class_indices, load_data_of, mirror_half, title_of, to_float, to_uint8

# ---------------------------------------------------------------------------------------------------------------
# The metrics


def percentage_of_unlearning(n_before, n_after):
    """PUL = 100 (n_before - n_after) / n_before, n counting samples of the forgotten class (VDU, experiments).

    100 when none is left, 0 when nothing changed, below 0 when there are more. nan if there was none to begin with.
    """
    return 100 * (n_before - n_after) / n_before if n_before else math.nan


def wilson_interval(count, n, z=1.96):
    """The 95% interval of a share, from count among n (Wilson 1927): (low, high) in 0 .. 1. Sound at 0 and at n too."""
    p, z2 = count / n, z * z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def frechet_distance(features_a, features_b):
    """|| m_a - m_b ||^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2), between Gaussians fitted to two sets of features.

    features: (N, D).  Returns a float (Dowson & Landau 1982; FID, Heusel et al. 2017). In float64, and through the
    symmetric form of the matrix root: its eigenvalues are real and not negative but for rounding, which is clamped,
    where the usual sqrtm(C_a C_b) can turn complex on a singular covariance.
    """
    a, b = features_a.double().cpu(), features_b.double().cpu()
    mean_a, mean_b = a.mean(0), b.mean(0)  # (D,)
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)  # (D, D)
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = vectors * values.clamp(min=0).sqrt() @ vectors.T  # C_a^1/2: (D, D)
    trace_root = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    return ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * trace_root).clamp(min=0).item()


def precision_and_recall(real, generated, k=3, chunk=1000):
    """Improved precision and recall (Kynkaanniemi et al. 2019, eqs. 1-3), each in 0 .. 1. real, generated: (N, D), (M, D) features.

    A set's manifold is the union of balls around its points, each reaching to the point's k-th nearest neighbour in the set.
    precision: share of generated samples in the real manifold, the quality. recall: share of real images in the generated one,
    the variety, which FID alone hides. Both grow with the set that spans the manifold: compare at equal N and M.
    """
    def radii(x):  # (N,): distance to the k-th neighbour; + 1: each point is its own nearest
        return torch.cat([torch.cdist(c, x).kthvalue(min(k + 1, len(x)), dim=1).values for c in x.split(chunk)])

    def share_inside(points, centres):
        reach = radii(centres)
        return torch.cat([(torch.cdist(c, centres) <= reach).any(1) for c in points.split(chunk)]).float().mean().item()

    real, generated = real.double().cpu(), generated.double().cpu()
    return share_inside(generated, real), share_inside(real, generated)


def load_inception(device):
    """torchvision's Inception v3, ending at its 2048 pooled features. Raises UserError where its weights cannot be had.

    These are torchvision's ImageNet weights. The original FID (Heusel et al. 2017) uses the TensorFlow Inception of 2015: other
    weights, pooling that leaves the border out, and another resizing. Figures from the two are alike, not the same: compare them
    within this code only.
    """
    try:
        network = inception_v3(weights=Inception_V3_Weights.IMAGENET1K_V1)  # 104 MB, downloaded once into torch's cache
    except (OSError, RuntimeError) as e:
        name = Inception_V3_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
        raise UserError(f"Inception v3's weights cannot be downloaded ({first_line(e)}); where there is a network, fetch "
                        f"{Inception_V3_Weights.IMAGENET1K_V1.url} and put it at {Path(torch.hub.get_dir()) / 'checkpoints' / name}") from e
    network.fc = nn.Identity()
    return network.eval().to(device)


@torch.inference_mode()
def inception_features(network, images, batch_size=50):
    """uint8 colour images (N, 3, H, W) -> (N, 2048), on the CPU, by load_inception's network."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))  # ImageNet's
    device, features = next(network.parameters()).device, []
    for chunk in tqdm(images.split(batch_size), desc="Inception features", unit="batch", disable=len(images) < 1000):
        x = F.interpolate(chunk.float() / 255, size=(299, 299), mode="bilinear", antialias=True)  # (B, 3, 299, 299)
        features.append(network(((x - mean) / std).to(device)).float().cpu())
    return torch.cat(features)


# ---------------------------------------------------------------------------------------------------------------
# The classifier: whose counts PUL is made of, and whose penultimate layer u-FID compares


class Classifier(nn.Module):
    """A small convolutional network. (B, C, H, W) in [-1, 1] -> logits (B, classes); `body` gives its 128 features."""

    def __init__(self, image_shape, classes):
        super().__init__()
        C, H, W = image_shape
        if C == 1:
            self.body = nn.Sequential(
                nn.Conv2d(C, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),  # (B, 32, H/2, W/2)
                nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
                nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),  # (B, 64, H/4, W/4)
                nn.Flatten(), nn.Dropout(0.25), nn.Linear(64 * (H // 4) * (W // 4), 128), nn.ReLU(),  # (B, 128)
            )
        else:  # photographs need more width, and batch norm to train it in a few minutes
            block = lambda a, b: (nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            self.body = nn.Sequential(
                *block(C, 64), nn.MaxPool2d(2), *block(64, 128), nn.MaxPool2d(2),  # (B, 128, H/4, W/4)
                *block(128, 128), *block(128, 256), nn.MaxPool2d(2), *block(256, 256),  # (B, 256, H/8, W/8)
                nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.25), nn.Linear(256, 128), nn.ReLU(),  # (B, 128)
            )
        self.head = nn.Linear(128, classes)

    def forward(self, x):
        return self.head(self.body(x))


def jitter(x, pad=4):
    """Mirror half of the images, and shift each by up to `pad` pixels: (B, C, H, W) -> the same. What little data is, made more."""
    B, C, H, W = x.shape
    x = F.pad(mirror_half(x), (pad,) * 4, mode="reflect")  # (B, C, H + 2 pad, W + 2 pad)
    dy, dx = torch.randint(2 * pad + 1, (2, B))
    rows, columns = dy[:, None] + torch.arange(H), dx[:, None] + torch.arange(W)  # (B, H), (B, W)
    return x[torch.arange(B)[:, None, None, None], torch.arange(C)[:, None, None], rows[:, None, :, None], columns[:, None, None, :]]


def get_classifier(checkpoint, images, labels, data_root, device, seed, folder):
    """The dataset's classifier, trained once and kept in `folder`. Returns (Classifier in eval mode, test accuracy).

    images, labels: the training images, of every class. Without a test part, every fifth of them is held out to test on.
    """
    data, image_shape = checkpoint.data, tuple(images.shape[1:])
    tag = MNIST_5K.stem if data["source"] == MNIST_5K.name else f"folder-{image_shape[-1]}" if data["name"] == "folder" else "torchvision"
    path = Path(folder) / f"classifier-{title_of(data)}-{tag}.pt"
    classifier = Classifier(image_shape, len(data["classes"])).to(device)
    if path.exists():
        saved = read_file(path)
        if saved.get("classes", data["classes"]) == data["classes"] and saved.get("image_shape", image_shape) == image_shape:
            classifier.load_state_dict(saved["classifier"])
            return classifier.eval(), saved["accuracy"]

    test_images, test_labels = load_data_of(checkpoint, data_root, train=False)
    if test_images is None:
        held_out = torch.arange(len(images)) % 5 == 0
        images, labels, test_images, test_labels = images[~held_out], labels[~held_out], images[held_out], labels[held_out]
    torch.manual_seed(seed)
    colour = image_shape[0] == 3
    epochs = min(60, max(10, 150_000 // len(images)) if colour else max(4, 40_000 // len(images)))
    batch_size = min(128, len(images))
    steps = epochs * (len(images) // batch_size)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    with tqdm(total=steps, desc="training the classifier", unit="step") as bar:
        for _ in range(epochs):
            order = torch.randperm(len(images))
            for i in range(len(images) // batch_size):
                batch = order[i * batch_size : (i + 1) * batch_size]
                x = to_float(images[batch])
                with autocast(device):
                    logits = classifier((jitter(x) if colour else x).to(device))
                loss = F.cross_entropy(logits.float(), labels[batch].to(device))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                bar.update()
    classifier.eval()
    predicted = features_and_probabilities(classifier, test_images, device)[1].argmax(1)
    accuracy = (predicted == test_labels).float().mean().item()
    save_checkpoint(path, {"classifier": classifier.state_dict(), "accuracy": accuracy, "classes": data["classes"], "image_shape": image_shape})
    return classifier, accuracy


@torch.inference_mode()
def features_and_probabilities(classifier, images, device, batch_size=1000):
    """uint8 images (N, C, H, W) -> (penultimate features (N, 128), class probabilities (N, classes)), on the CPU."""
    features, probabilities = [], []
    for chunk in images.split(batch_size):
        with autocast(device):
            f = classifier.body(to_float(chunk).to(device))
            logits = classifier.head(f)
        features.append(f.float().cpu())
        probabilities.append(logits.float().softmax(1).cpu())
    return torch.cat(features), torch.cat(probabilities)


# ---------------------------------------------------------------------------------------------------------------
# The report


def newest_unlearned(folder):
    """The newest checkpoint of vdu.py in `folder`. Raises UserError if there is none."""
    for path in sorted(Path(folder).glob("*.pt"), key=os.path.getmtime, reverse=True):
        raw = read_file(path)
        if isinstance(raw, dict) and raw.get("forgotten"):
            return str(path)
    raise UserError(f"no unlearned checkpoint in {folder}/; make one with: python vdu.py --forget-class 1")


def describe(samples, before, forgotten, retained):
    """What the report says of one set of samples (N, C, H, W) uint8: counts, intervals, confidence, u-FID, precision and recall.

    before: the Before that has the classifier and the features.  retained: mask over the real images.
    """
    classes = before.checkpoint.data["classes"]
    features, probabilities = before.look_at(samples)
    counts = probabilities.argmax(1).bincount(minlength=len(classes)).tolist()
    real = before.real_features[retained]
    some = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))[: len(samples)]  # as many real as generated
    precision, recall = precision_and_recall(real[some], features)
    return {
        "forgotten_count": sum(counts[i] for i in forgotten),
        "u_fid": frechet_distance(features, real),
        "precision": precision,
        "recall": recall,
        "mean_confidence": probabilities.max(1).values.mean().item(),
        "histogram": {
            name: {"count": c, "share": c / len(samples), "interval_95": wilson_interval(c, len(samples))}
            for name, c in zip(classes, counts)
        },
    }


def parent_of(after, after_path):
    """The checkpoint that `after` was unlearned from: where vdu.py read it, or beside `after` if it has moved since."""
    if not after.forgotten:
        raise UserError(f"{after_path} was not made by vdu.py; name the model to compare it with: --before FILE")
    written = after.forgotten["checkpoint"]
    beside = Path(after_path).parent / Path(written).name
    return written if os.path.exists(written) or not beside.exists() else str(beside)


def evaluate(args):
    """Run the command line's evaluation: one report for each of args.after. Raises UserError for what the user can put right."""
    device = pick_device(args.device)
    if args.profile:
        return profile(args.before or "checkpoints/mnist.pt", min(args.samples, 125), device)
    if args.samples < 2 or args.sampling_steps < 1:
        raise UserError("need --samples of at least 2 and --sampling-steps of at least 1")
    paths = args.after or [newest_unlearned("checkpoints")]
    several = len(paths) > 1 or args.sweep_gamma
    if several and (args.output or args.save_samples):
        raise UserError("--output and --save-samples are for one --after; several reports go to results/NAME each")
    if args.sweep_gamma and len(paths) > 1:
        raise UserError("--sweep-gamma takes the settings of one --after")
    if args.relearn < 0 or args.relearn_images < 1 or not args.relearn_lr > 0:
        raise UserError("need --relearn of at least 0 steps, --relearn-images of at least 1 and --relearn-lr above 0")
    outputs = [Path(args.output or f"results/{Path(path).stem}") for path in paths]
    for output in outputs:
        check_output(output / ("sweep.json" if args.sweep_gamma else "report.json"), args.overwrite)
    if args.sweep_gamma:
        return sweep(paths[0], outputs[0], args, device)

    known = {}  # what several reports share: by parent, its samples, the classifier and the real images' features
    for path, output in zip(paths, outputs):
        began = time.time()
        after = load_checkpoint(path, device)
        before_path = args.before or parent_of(after, path)
        if before_path not in known:
            before = load_checkpoint(before_path, device)
            names_to_count(before, after, args)
            known[before_path] = Before(before, args, device)
        report = compare(known[before_path], after, output, args, device)
        print(table(report))
        print(f"wrote {output / 'report.json'}, before.png, after.png ({time.time() - began:.0f} s)")


def names_to_count(before, after, args):
    """The names of the classes that `after` has forgotten. Raises UserError unless there are some, and both know one dataset."""
    if before.dataset != after.dataset or before.data["classes"] != after.data["classes"] or before.config["image_shape"] != after.config["image_shape"]:
        raise UserError(f"{before.path} was trained on {before.dataset}, {after.path} on {after.dataset}: compare models of one dataset")
    classes = after.data["classes"]
    if not classes:
        raise UserError(f"nothing is known of the classes that {before.path} was trained on, so that none can be counted: compare samples by eye")
    if args.forget_class:
        return [classes[i] for i in class_indices(args.forget_class, after.data)]
    names = after.forgotten["classes"] if after.forgotten else after.data["excluded"]
    if not names and after.forgotten:
        raise UserError(f"{after.path} has forgotten the images in {after.forgotten['images_from']}: say which class to count with --forget-class")
    if not names:
        raise UserError(f"{after.path} has forgotten nothing: it is a model of all classes; make one that has with vdu.py")
    return names


class Before:
    """The model before, the classifier of its dataset, the real images' features; and, once asked for, its samples.

    inception: the network whose features u-FID compares, or None for the classifier's. One choice for everything that is compared.
    """

    def __init__(self, checkpoint, args, device):
        self.checkpoint, self.device = checkpoint, device
        colour = checkpoint.config["image_shape"][0] == 3
        if args.features == "inception" and not colour:
            raise UserError("Inception's features are for colour images; leave --features away")
        self.images, self.labels = load_data_of(checkpoint, args.data_root)
        self.classifier, self.accuracy = get_classifier(checkpoint, self.images, self.labels, args.data_root, device, seed=0, folder="checkpoints")
        self.inception = None
        if args.features == "inception" or (args.features == "auto" and colour):
            try:
                self.inception = load_inception(device)
            except UserError as e:
                if args.features == "inception":
                    raise
                print(f"u-FID in the classifier's features: {e}")
        self.real_features, _ = self.look_at(self.images)  # (N, 128), or (N, 2048)
        self.samples = None

    def look_at(self, images):
        """uint8 images (N, C, H, W) -> (features (N, D), the classifier's probabilities (N, classes))."""
        features, probabilities = features_and_probabilities(self.classifier, images, self.device)
        return features if self.inception is None else inception_features(self.inception, images), probabilities


def draw(checkpoint, args):
    """args.samples samples of a checkpoint's model, (N, C, H, W) uint8, the same noise for every model."""
    print(f"sampling from {checkpoint.path}")
    x = checkpoint.diffusion.sample(checkpoint.unet, args.samples, checkpoint.config["image_shape"], steps=args.sampling_steps,
                                    eta=args.eta, seed=args.seed, progress=True)
    return to_uint8(x)


def compare(before, after, output, args, device):
    """Draw from both models, write report.json, before.png and after.png into `output`, and return the report, a dict."""
    parent = before.checkpoint
    names = names_to_count(parent, after, args)
    forgotten = [after.data["classes"].index(name) for name in names]
    if before.samples is None:
        before.samples = draw(parent, args)
    samples = {"before": before.samples, "after": draw(after, args)}
    retained = ~torch.isin(before.labels, torch.tensor(forgotten))  # u-FID: the retained classes only
    results = {name: describe(x, before, forgotten, retained) for name, x in samples.items()}

    known = lambda pul: None if math.isnan(pul) else pul
    report = {
        "forgotten": names,
        "PUL": known(percentage_of_unlearning(*(results[name]["forgotten_count"] for name in samples))),
        "PUL_by_class": {c: known(percentage_of_unlearning(*(results[name]["histogram"][c]["count"] for name in samples))) for c in names},
        "before": {"checkpoint": parent.path, **results["before"]},
        "after": {"checkpoint": after.path, **results["after"]},
        "u_fid_ratio": results["after"]["u_fid"] / results["before"]["u_fid"],
        "u_fid_features": "classifier: its penultimate layer (128 numbers), not Inception's: compare within this dataset only" if before.inception is None
                          else "Inception v3 (2048 numbers, torchvision's ImageNet weights): compare with figures of this code only",
        "u_fid_real_images": int(retained.sum()),
        "classifier_accuracy": before.accuracy,
        "samples": args.samples, "sampling_steps": args.sampling_steps, "eta": args.eta, "seed": args.seed,
        "data": parent.data, "unlearning": after.forgotten, "device": str(device),
    }
    if args.relearn:
        report["relearning"] = relearning(before, after, names, forgotten, args)
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name in samples:
            save_image(samples[name][:64].float() / 255, output / f"{name}.png", nrow=8)
        (output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    except OSError as e:
        raise UserError(f"cannot write into {output} ({e}); choose another --output") from e
    if args.save_samples:
        save_checkpoint(args.save_samples, samples)
    return report


def table(report):
    """The report as a small table for the terminal."""
    b, a = report["before"], report["after"]
    lines = [f"{'':24}{'before':>20}{'after':>20}"]
    shown = list(b["histogram"])
    if len(shown) > 20:  # tiny ImageNet's 200: the forgotten, and those that changed most
        change = lambda name: abs(a["histogram"][name]["count"] - b["histogram"][name]["count"])
        shown = report["forgotten"] + sorted((n for n in shown if n not in report["forgotten"]), key=change, reverse=True)[:10]
    for name in shown:
        cells = []
        for r in (b, a):
            h = r["histogram"][name]
            low, high = (100 * x for x in h["interval_95"])
            cells.append(f"{h['count']:5d} [{low:4.1f},{high:5.1f}]%")
        lines.append(f"{'class ' + name + (' (forgotten)' if name in report['forgotten'] else ''):24}{cells[0]:>20}{cells[1]:>20}")
    lines.append(f"{'mean confidence':24}{b['mean_confidence']:20.3f}{a['mean_confidence']:20.3f}")
    features = report["u_fid_features"].split(" ")[0].strip(":")
    lines.append(f"{f'u-FID ({features})':24}{b['u_fid']:20.2f}{a['u_fid']:20.2f}   x {report['u_fid_ratio']:.2f}")
    lines.append(f"{'precision, recall':24}{b['precision']:13.3f}, {b['recall']:.3f}{a['precision']:13.3f}, {a['recall']:.3f}")
    shown = lambda pul: "undefined, no sample before" if pul is None else f"{pul:.1f}%"
    each = "" if len(report["forgotten"]) == 1 else " (" + ", ".join(f"{c}: {shown(pul)}" for c, pul in report["PUL_by_class"].items()) + ")"
    lines.append(f"PUL of {', '.join(report['forgotten'])}: {shown(report['PUL'])}{each}")
    lines.append(f"{report['samples']} samples each, {report['sampling_steps']} DDIM steps, eta {report['eta']:g}, seed {report['seed']}; "
                 f"classifier accuracy {100 * report['classifier_accuracy']:.2f}%")
    if "relearning" in report:
        r = report["relearning"]
        lines.append(f"relearning from {r['images']} images, share of {', '.join(report['forgotten'])} among {r['samples']} samples after so many steps:")
        lines.append(f"{'':24}" + "".join(f"{step:8d}" for step in r["steps"]))
        for model in ("unlearned", "never saw it"):
            if model in r:
                lines.append(f"{model:24}" + "".join(f"{100 * share:7.1f}%" for share in r[model]))
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------
# How deep is it? Relearning


def relearning(before, after, names, forgotten, args):
    """How fast the class comes back: DDPM's training goes on, on a few images of it alone, and samples are counted on the way.

    Weights that no longer draw a class may still hold it. A model that never saw the class has to learn it from these few images;
    one that only hides it needs fewer steps. Returns {"steps", "images", "samples", "unlearned": [shares], "never saw it": [shares]},
    the last from --never-saw, a model trained with --exclude-class.
    """
    of_class = torch.isin(before.labels, torch.tensor(forgotten)).nonzero().flatten()
    chosen = of_class[torch.randperm(len(of_class), generator=torch.Generator().manual_seed(args.seed))[: args.relearn_images]]
    x = to_float(before.images[chosen]).to(before.device)  # (K, C, H, W)
    marks = sorted({round(args.relearn * share) for share in (0, 0.1, 0.25, 0.5, 1)})
    result = {"steps": marks, "images": len(x), "samples": min(args.samples, 500)}
    models = {"unlearned": after}
    parent = Path(before.checkpoint.path)
    oracle = args.never_saw or parent.with_name(f"{parent.stem}-without-{'-'.join(names)}{parent.suffix}")
    if args.never_saw or oracle.exists():
        models["never saw it"] = load_checkpoint(oracle, before.device)
        if models["never saw it"].data["excluded"] != names or models["never saw it"].config["image_shape"] != after.config["image_shape"]:
            raise UserError(f"{oracle} is no model that was trained without {', '.join(names)}; see train_ddpm.py --exclude-class")
        result["never_saw"] = str(oracle)
    else:
        print(f"no {oracle}: relearning without a model that never saw the class to compare with; train one with "
              f"python train_ddpm.py --exclude-class {' '.join(names)} --output {oracle}")
    for name, model in models.items():
        result[name] = [n / result["samples"] for n in counts_while_training(model, before, x, marks, forgotten, result["samples"], args)]
    return result


def counts_while_training(model, before, x, marks, forgotten, samples, args):
    """Train `model` on x (K, C, H, W), and count `forgotten` among its samples after each of `marks` steps. Its unet is spent afterwards."""
    unet, diffusion, counts = model.unet, model.diffusion, []
    optimizer = torch.optim.AdamW(unet.parameters(), lr=args.relearn_lr, betas=(0.9, 0.99), weight_decay=0.0)
    torch.manual_seed(args.seed)
    for step in tqdm(range(marks[-1] + 1), desc=f"relearning ({Path(model.path).stem})", unit="step"):
        if step in marks:
            drawn = diffusion.sample(unet, samples, tuple(x.shape[1:]), steps=args.sampling_steps, eta=args.eta, seed=args.seed)
            predicted = features_and_probabilities(before.classifier, to_uint8(drawn), before.device)[1].argmax(1)
            counts.append(int(torch.isin(predicted, torch.tensor(forgotten)).sum()))
        if step < marks[-1]:
            training_step(unet, diffusion, optimizer, x[torch.randint(len(x), (64,)).to(x.device)])
    return counts


# ---------------------------------------------------------------------------------------------------------------
# What does gamma buy? The sweep


def pareto(points):
    """Indices of the (PUL, u-FID) points than which no other has both more PUL and less u-FID (one of them strictly)."""
    return [i for i, (p, f) in enumerate(points)
            if not any((q >= p and g <= f) and (q > p or g < f) for q, g in points)]


def sweep(path, output, args, device):
    """Unlearn again from the parent of `path`, with its settings, once for each gamma, and set PUL against u-FID."""
    model = load_checkpoint(path, device)
    before_path = args.before or parent_of(model, path)
    parent = load_checkpoint(before_path, device)
    names_to_count(parent, model, args)  # refuses before the classifier is trained
    before = Before(parent, args, device)
    rows = []
    for gamma in args.sweep_gamma:
        target = output / "sweep" / f"gamma-{gamma:g}"
        try:
            vdu.main(vdu.parser().parse_args(vdu.arguments(model.forgotten, before_path, gamma, f"{target}.pt", args)))
        except UserError as e:
            print(f"gamma {gamma:g}: {e}")
            continue
        report = compare(before, load_checkpoint(f"{target}.pt", device), target, args, device)
        print(table(report))
        rows.append({"gamma": gamma, "PUL": report["PUL"], "u_fid": report["after"]["u_fid"], "u_fid_ratio": report["u_fid_ratio"],
                     "precision": report["after"]["precision"], "recall": report["after"]["recall"]})
    rows = [row for row in rows if row["PUL"] is not None]
    if not rows:
        raise UserError("no gamma of the sweep gave a model to compare")
    best = pareto([(row["PUL"], row["u_fid"]) for row in rows])
    for i, row in enumerate(rows):
        row["pareto"] = i in best
    (output / "sweep.json").write_text(json.dumps({"rows": rows, "u_fid_features": report["u_fid_features"], "u_fid_before": report["before"]["u_fid"],
                                                   "unlearning": model.forgotten["settings"]}, indent=2) + "\n")
    save_image(plot(rows).float() / 255, output / "sweep.png")
    print(f"{'gamma':>8}{'PUL':>9}{'u-FID':>10}{'ratio':>8}")
    for row in rows:
        print(f"{row['gamma']:8g}{row['PUL']:8.1f}%{row['u_fid']:10.2f}{row['u_fid_ratio']:8.2f}{'  Pareto' if row['pareto'] else ''}")
    print(f"wrote {output / 'sweep.json'} and sweep.png; Pareto points (no other gamma forgets more at a smaller u-FID): gamma "
          + ", ".join(f"{row['gamma']:g}" for row in rows if row["pareto"]))


def plot(rows, size=(480, 640), margin=64):
    """PUL, to the right, against u-FID relative to the model before, upwards: (3, H, W) uint8. Pareto points are blue and joined."""
    H, W = size
    image = torch.full((3, H, W), 255, dtype=torch.uint8)
    low = min(0.0, *(row["PUL"] for row in rows))
    top = max(1.0, *(row["u_fid_ratio"] for row in rows)) * 1.1
    x_of = lambda pul: margin + (W - 1.5 * margin) * (pul - low) / (100 - low)
    y_of = lambda ratio: H - margin - (H - 1.5 * margin) * ratio / top
    text, at = [], []
    for i in range(5):  # the grid, and what its lines stand for
        pul, ratio = low + i * (100 - low) / 4, i * top / 4
        image[:, margin // 2 : H - margin, round(x_of(pul))] = 215
        image[:, round(y_of(ratio)), margin : W - margin // 2] = 215
        text += [f"{pul:.0f}%", f"{ratio:.2f}"]
        at += [(x_of(pul) - 10, H - margin + 6), (margin - 34, y_of(ratio) - 6)]
    text += ["PUL", "u-FID, relative to before", *(f"gamma {row['gamma']:g}" for row in rows)]
    beside = lambda x: x + 6 if x < W - 2 * margin else x - 72  # left of the point where the edge is near
    at += [(W / 2, H - margin + 24), (margin, margin / 2 - 18), *((beside(x_of(row["PUL"])), y_of(row["u_fid_ratio"]) - 14) for row in rows)]
    points = torch.tensor([[x_of(row["PUL"]), y_of(row["u_fid_ratio"])] for row in rows])
    best = torch.tensor([row["pareto"] for row in rows])
    front = points[best][points[best][:, 0].argsort()]
    image = draw_keypoints(image, points[None], colors="gray", radius=4)
    for a, b in zip(front, front[1:]):
        x, y = torch.lerp(a[:, None], b[:, None], torch.linspace(0, 1, W)).round().long()  # (W,), (W,)
        image[:, y, x] = torch.tensor([[0], [0], [255]], dtype=torch.uint8)
    image = draw_keypoints(image, front[None], colors="blue", radius=4)
    # torchvision writes text beside boxes only: white boxes of one pixel
    boxes = torch.tensor([[x, y, x + 1, y + 1] for x, y in at]).round().clamp(min=0)
    return draw_bounding_boxes(image, boxes, labels=text, colors="white", label_colors="black")


# ---------------------------------------------------------------------------------------------------------------
# How fast is it, and where does the time go?


def plain_sampling(unet, diffusion, n, shape, steps):
    """DDIM with eta 1 as one would first write it: float32, and noise wherever a step asks for it. What Diffusion.sample is timed against."""
    x = torch.randn(n, *shape, device=diffusion.alpha_bar.device)
    grid = torch.linspace(diffusion.T - 1, 0, steps).round().long().tolist()
    for t, t_prev in zip(grid, [*grid[1:], -1]):
        with torch.no_grad():
            eps = unet(x, torch.full((n,), t, device=x.device))
        abar = diffusion.alpha_bar[t]
        abar_prev = diffusion.alpha_bar[t_prev] if t_prev >= 0 else torch.ones_like(abar)
        x0 = ((x - (1 - abar).sqrt() * eps) / abar.sqrt()).clamp(-1, 1)
        eps = (x - abar.sqrt() * x0) / (1 - abar).sqrt()
        sigma = ((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)).sqrt()
        x = abar_prev.sqrt() * x0 + (1 - abar_prev - sigma**2).clamp(min=0).sqrt() * eps + sigma * torch.randn_like(x)
    return x


def profile(path, n, device, rounds=3):
    """Print what `path`'s network does a second, in training, unlearning and sampling n images, and the share of the time that convolutions take."""
    checkpoint = load_checkpoint(path, device)
    unet, diffusion, shape = checkpoint.unet, checkpoint.diffusion, tuple(checkpoint.config["image_shape"])
    posterior = checkpoint.posterior or vdu.GaussianPosterior.from_one_checkpoint(unet.named_parameters())
    x0 = torch.rand(64, *shape, device=device) * 2 - 1
    optimizer = torch.optim.AdamW(unet.parameters(), 0.0, fused=device.type != "mps")
    jobs = {  # name: (images in a call, steps in a call, the call)
        "training, batches of 64": (64, 1, lambda: training_step(unet, diffusion, optimizer, x0)),
        "unlearning, batches of 64": (128, 2, lambda: vdu.unlearn(unet, diffusion, posterior, x0, 0.63, 1e-9, 2, 64)),
        f"sampling, batches of {n}": (n, 25, lambda: diffusion.sample(unet, n, shape, steps=25, eta=1.0)),
        "the same, plain float32": (n, 25, lambda: plain_sampling(unet, diffusion, n, shape, 25)),
    }
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * (device.type == "cuda")
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    print(f"{path}: {count(sum(p.numel() for p in unet.parameters()))} parameters, images of {'x'.join(map(str, shape))}, {device}, "
          f"{torch.get_num_threads()} threads")
    print(f"{'':28}{'steps/s':>10}{'images/s':>10}{'convolutions':>14}")
    for name, (images, steps, call) in jobs.items():
        call()  # the first is slower
        wait()
        times = []
        for _ in range(rounds):
            began = time.perf_counter()
            call()
            wait()
            times.append(time.perf_counter() - began)
        seconds = sorted(times)[rounds // 2]
        with torch.profiler.profile(activities=activities) as recorded:
            call()
        spent = {e.key: e.self_device_time_total if device.type == "cuda" else e.self_cpu_time_total for e in recorded.key_averages()}
        share = sum(v for k, v in spent.items() if "conv" in k) / sum(spent.values())
        print(f"{name:28}{steps / seconds:10.2f}{images / seconds:10.1f}{100 * share:13.0f}%")


def parser():
    p = ArgumentParser(prog="evaluate.py", description=__doc__)
    p.add_argument("--after", nargs="+", metavar="FILE", help="the unlearned checkpoint, or several (default: the newest in checkpoints/)")
    p.add_argument("--before", metavar="FILE", help="the model to compare it with (default: the one it was unlearned from)")
    p.add_argument("--output", metavar="DIR", help="where the report goes (default: results/NAME-OF-AFTER)")
    p.add_argument("--overwrite", action="store_true", help="replace the report if it exists")
    p.add_argument("--samples", type=int, default=2000, metavar="N", help="samples from each model")
    p.add_argument("--sampling-steps", type=int, default=25, metavar="N", help="DDIM steps a sample")
    p.add_argument("--eta", type=float, default=1.0, help="DDIM's noise: 0 is deterministic, 1 as noisy as ancestral sampling")
    p.add_argument("--forget-class", nargs="+", metavar="CLASS", help="count these (default: the classes that the model was told to forget); needed "
                                                                      "after vdu.py --forget-images")
    p.add_argument("--features", choices=("auto", "inception", "classifier"), default="auto",
                   help="what u-FID, precision and recall compare: Inception v3's features for colour images where its weights can be had, else those "
                        "of the classifier; figures from the two cannot be compared")
    p.add_argument("--relearn", type=int, default=0, metavar="N",
                   help="then train the unlearned model for N steps on images of the forgotten class, and count how fast it comes back (0: do not)")
    p.add_argument("--relearn-images", type=int, default=100, metavar="K", help="with --relearn: on so many images")
    p.add_argument("--relearn-lr", type=float, default=2e-4, help="with --relearn: AdamW's learning rate")
    p.add_argument("--never-saw", metavar="FILE",
                   help="with --relearn: a model trained with --exclude-class, to compare with (default: PARENT-without-CLASS.pt)")
    p.add_argument("--sweep-gamma", type=float, nargs="+", metavar="GAMMA",
                   help="unlearn again with each of these, the other settings as in --after, and draw PUL against u-FID in results/NAME/sweep.png")
    p.add_argument("--profile", action="store_true", help="print what --before's network does a second, and stop (default: checkpoints/mnist.pt)")
    p.add_argument("--save-samples", metavar="FILE.pt", help="keep the samples: {'before', 'after'}, each (N, C, H, W) uint8")
    p.add_argument("--data-root", metavar="DIR", help="folder of the dataset (default: where the model was trained)")
    p.add_argument("--seed", type=seed_number, default=0, help="the noise of the samples, the same for both models")
    p.add_argument("--device", default="auto", help="auto (CUDA, else MPS, else CPU), cpu, cuda, cuda:1, mps")
    return p


if __name__ == "__main__":
    run_command_line(lambda: evaluate(parser().parse_args()))
