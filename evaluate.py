"""Did it forget, and what did that cost? Sample before and after with the same noise, and count.

    python evaluate.py

Holds    the classifier that counts, PUL, u-FID, and the report.
Reads    an unlearned checkpoint and its parent (the newest unlearned one and the one it came from, unless told), and
         the dataset they were trained on. Retained images are needed here, to measure; vdu.py never sees them.
Writes   results/NAME/report.json, before.png, after.png; and once a dataset, the classifier, in checkpoints/.
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
from torchvision.utils import save_image
from tqdm import tqdm

from ddpm import (ArgumentParser, UserError, autocast, check_output, first_line, load_checkpoint, pick_device, read_file, run_command_line,
                  save_checkpoint, seed_number)
from train_ddpm import load_data_of, to_float, to_uint8

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


def load_inception(device):
    """torchvision's Inception v3, ending at its 2048 pooled features. Raises UserError where its weights cannot be had.

    These are torchvision's ImageNet weights, not the TensorFlow Inception's of the original FID: figures from the two differ.
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
    for chunk in images.split(batch_size):
        x = F.interpolate(chunk.float() / 255, size=(299, 299), mode="bilinear", antialias=True)  # (B, 3, 299, 299)
        features.append(network(((x - mean) / std).to(device)).float().cpu())
    return torch.cat(features)


# ---------------------------------------------------------------------------------------------------------------
# The classifier: whose counts PUL is made of, and whose penultimate layer u-FID compares


class Classifier(nn.Module):
    """A small convolutional network. (B, C, H, W) in [-1, 1] -> logits (B, classes)."""

    def __init__(self, image_shape, classes):
        super().__init__()
        C, H, W = image_shape
        self.body = nn.Sequential(
            nn.Conv2d(C, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),  # (B, 32, H/2, W/2)
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),  # (B, 64, H/4, W/4)
            nn.Flatten(), nn.Dropout(0.25), nn.Linear(64 * (H // 4) * (W // 4), 128), nn.ReLU(),  # (B, 128)
        )
        self.head = nn.Linear(128, classes)

    def forward(self, x):
        return self.head(self.body(x))


def split_for_classifier(checkpoint, data_root):
    """(train images, labels, test images, labels), of every class. Without a test set, every fifth image is held out."""
    images, labels = load_data_of(checkpoint, data_root)
    test = load_data_of(checkpoint, data_root, train=False)
    if test is not None:
        return images, labels, *test
    held_out = torch.arange(len(images)) % 5 == 0
    return images[~held_out], labels[~held_out], images[held_out], labels[held_out]


def get_classifier(checkpoint, data_root, device, seed, folder):
    """The dataset's classifier, trained once and kept in `folder`. Returns (Classifier in eval mode, test accuracy)."""
    data = checkpoint.data
    path = Path(folder) / f"classifier-{data['name']}-{Path(data['source']).stem}.pt"
    classifier = Classifier(checkpoint.config["image_shape"], len(data["classes"])).to(device)
    if path.exists():
        saved = read_file(path)
        classifier.load_state_dict(saved["classifier"])
        return classifier.eval(), saved["accuracy"]

    images, labels, test_images, test_labels = split_for_classifier(checkpoint, data_root)
    torch.manual_seed(seed)
    epochs, batch_size = max(4, 40_000 // len(images)), 128
    steps = epochs * (len(images) // batch_size)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    with tqdm(total=steps, desc="training the classifier", unit="step") as bar:
        for _ in range(epochs):
            order = torch.randperm(len(images))
            for i in range(len(images) // batch_size):
                batch = order[i * batch_size : (i + 1) * batch_size]
                with autocast(device):
                    logits = classifier(to_float(images[batch]).to(device))
                loss = F.cross_entropy(logits.float(), labels[batch].to(device))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                bar.update()
    classifier.eval()
    predicted = features_and_probabilities(classifier, test_images, device)[1].argmax(1)
    accuracy = (predicted == test_labels).float().mean().item()
    save_checkpoint(path, {"classifier": classifier.state_dict(), "accuracy": accuracy})
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


def describe(samples, classifier, classes, forgotten, real_features, device):
    """What the report says of one set of samples (N, C, H, W) uint8: counts, intervals, confidence, u-FID."""
    features, probabilities = features_and_probabilities(classifier, samples, device)
    counts = probabilities.argmax(1).bincount(minlength=len(classes)).tolist()
    return {
        "forgotten_count": sum(counts[i] for i in forgotten),
        "u_fid": frechet_distance(features, real_features),
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
    if args.samples < 2 or args.sampling_steps < 1:
        raise UserError("need --samples of at least 2 and --sampling-steps of at least 1")
    paths = args.after or [newest_unlearned("checkpoints")]
    if len(paths) > 1 and (args.output or args.save_samples):
        raise UserError("--output and --save-samples are for one --after; several reports go to results/NAME each")
    outputs = [Path(args.output or f"results/{Path(path).stem}") for path in paths]
    for output in outputs:
        check_output(output / "report.json", args.overwrite)
    device = pick_device(args.device)

    known = {}  # what several reports share: by parent, its samples, the classifier and the real images' features
    for path, output in zip(paths, outputs):
        began = time.time()
        after = load_checkpoint(path, device)
        before_path = args.before or parent_of(after, path)
        if before_path not in known:
            before = load_checkpoint(before_path, device)
            check_comparable(before, after)
            known[before_path] = Before(before, args, device)
        report = compare(known[before_path], after, output, args, device)
        print(table(report))
        print(f"wrote {output / 'report.json'}, before.png, after.png ({time.time() - began:.0f} s)")


def check_comparable(before, after):
    """The names of the classes that `after` has forgotten. Raises UserError unless there are some, and both know one dataset."""
    if before.dataset != after.dataset or before.config["image_shape"] != after.config["image_shape"]:
        raise UserError(f"{before.path} was trained on {before.dataset}, {after.path} on {after.dataset}: compare models of one dataset")
    names = after.forgotten["classes"] if after.forgotten else after.data["excluded"]
    if not names:
        raise UserError(f"{after.path} has forgotten nothing: it is a model of all classes; make one that has with vdu.py")
    return names


class Before:
    """The model before, the classifier of its dataset, the real images' features; and, once asked for, its samples."""

    def __init__(self, checkpoint, args, device):
        self.checkpoint = checkpoint
        self.classifier, self.accuracy = get_classifier(checkpoint, args.data_root, device, seed=0, folder="checkpoints")
        images, self.labels = load_data_of(checkpoint, args.data_root)
        self.real_features = features_and_probabilities(self.classifier, images, device)[0]  # (N, 128)
        self.samples = None


def draw(checkpoint, args):
    """args.samples samples of a checkpoint's model, (N, C, H, W) uint8, the same noise for every model."""
    print(f"sampling from {checkpoint.path}")
    x = checkpoint.diffusion.sample(checkpoint.unet, args.samples, checkpoint.config["image_shape"], steps=args.sampling_steps,
                                    eta=args.eta, seed=args.seed, progress=True)
    return to_uint8(x)


def compare(before, after, output, args, device):
    """Draw from both models, write report.json, before.png and after.png into `output`, and return the report, a dict."""
    parent = before.checkpoint
    classes, names = after.data["classes"], check_comparable(parent, after)
    forgotten = [classes.index(name) for name in names]
    if before.samples is None:
        before.samples = draw(parent, args)
    samples = {"before": before.samples, "after": draw(after, args)}
    retained = before.real_features[~torch.isin(before.labels, torch.tensor(forgotten))]  # u-FID: the retained classes only
    results = {name: describe(x, before.classifier, classes, forgotten, retained, device) for name, x in samples.items()}

    pul = percentage_of_unlearning(results["before"]["forgotten_count"], results["after"]["forgotten_count"])
    report = {
        "forgotten": names,
        "PUL": None if math.isnan(pul) else pul,
        "before": {"checkpoint": parent.path, **results["before"]},
        "after": {"checkpoint": after.path, **results["after"]},
        "u_fid_ratio": results["after"]["u_fid"] / results["before"]["u_fid"],
        "u_fid_features": "the penultimate layer of the classifier (128 numbers), not Inception's: compare within this dataset only",
        "u_fid_real_images": len(retained),
        "classifier_accuracy": before.accuracy,
        "samples": args.samples, "sampling_steps": args.sampling_steps, "eta": args.eta, "seed": args.seed,
        "data": parent.data, "unlearning": after.forgotten, "device": str(device),
    }
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
    for name in b["histogram"]:
        cells = []
        for r in (b, a):
            h = r["histogram"][name]
            low, high = (100 * x for x in h["interval_95"])
            cells.append(f"{h['count']:5d} [{low:4.1f},{high:5.1f}]%")
        lines.append(f"{'class ' + name + (' (forgotten)' if name in report['forgotten'] else ''):24}{cells[0]:>20}{cells[1]:>20}")
    lines.append(f"{'mean confidence':24}{b['mean_confidence']:20.3f}{a['mean_confidence']:20.3f}")
    lines.append(f"{'u-FID (classifier)':24}{b['u_fid']:20.2f}{a['u_fid']:20.2f}   x {report['u_fid_ratio']:.2f}")
    pul = "undefined: no sample of the class before" if report["PUL"] is None else f"{report['PUL']:.1f}%"
    lines.append(f"PUL of {', '.join(report['forgotten'])}: {pul}")
    lines.append(f"{report['samples']} samples each, {report['sampling_steps']} DDIM steps, eta {report['eta']:g}, seed {report['seed']}; "
                 f"classifier accuracy {100 * report['classifier_accuracy']:.2f}%")
    return "\n".join(lines)


def parser():
    p = ArgumentParser(prog="evaluate.py", description=__doc__)
    p.add_argument("--after", nargs="+", metavar="FILE", help="the unlearned checkpoint, or several (default: the newest in checkpoints/)")
    p.add_argument("--before", metavar="FILE", help="the model to compare it with (default: the one it was unlearned from)")
    p.add_argument("--output", metavar="DIR", help="where the report goes (default: results/NAME-OF-AFTER)")
    p.add_argument("--overwrite", action="store_true", help="replace the report if it exists")
    p.add_argument("--samples", type=int, default=2000, metavar="N", help="samples from each model")
    p.add_argument("--sampling-steps", type=int, default=25, metavar="N", help="DDIM steps a sample")
    p.add_argument("--eta", type=float, default=1.0, help="DDIM's noise: 0 is deterministic, 1 as noisy as ancestral sampling")
    p.add_argument("--save-samples", metavar="FILE.pt", help="keep the samples: {'before', 'after'}, each (N, C, H, W) uint8")
    p.add_argument("--data-root", metavar="DIR", help="folder of the dataset (default: where the model was trained)")
    p.add_argument("--seed", type=seed_number, default=0, help="the noise of the samples, the same for both models")
    p.add_argument("--device", default="auto", help="auto (CUDA, else MPS, else CPU), cpu, cuda, cuda:1, mps")
    return p


if __name__ == "__main__":
    run_command_line(lambda: evaluate(parser().parse_args()))
