"""Train the DDPM that will forget something later, with the posterior that VDU needs.

    python train_ddpm.py --dataset mnist
    python train_ddpm.py --dataset folder --data-root my_images --image-size 32
    python train_ddpm.py --exclude-class 1 --output checkpoints/mnist-without-1.pt

Holds    the settings, the posterior, the training loop, and the datasets.
Reads    MNIST, CIFAR-10, tiny ImageNet (downloaded into data/, or in --data-root), or a
         folder of images, one sub-folder per class (or train/ and test/ of such), which
         are cropped to squares and resized; for MNIST without a network, the 5,000
         images in tests/data/mnist_5k.npz.
Writes   checkpoints/mnist.pt: theta* = mu*, posterior (mu*, sigma*), settings, data,
         loss curve; and a grid of samples beside it, checkpoints/mnist.png.
Paper    VDU (arXiv 2510.04058): theta* was trained on D = D_r and D_f, and mu* and
         sigma* are the mean and standard deviation of each parameter over training
         checkpoints. Here those are the weights along the last part of one run, at a
         constant learning rate, folded into running sums as they pass: a departure,
         since the mean of independent runs is no working network. So sigma* says how
         far training lets each weight wander. The posterior's spread it is not (Mandt
         et al. 2017 tune SGD's rate to come close to that); gamma absorbs its scale.
"""

import argparse
import math
import os
import time
import unicodedata
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.datasets import CIFAR10, MNIST
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.mnist import read_sn3_pascalvincent_tensor
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.transforms.v2 import functional as transforms
from torchvision.utils import save_image
from tqdm import tqdm

from ddpm import (StopRequest, UserError, add_shared_flags, build, check_outputs, digest,
                  first_line, number, pick_device, read_file, run_command_line, save_checkpoint,
                  state_dict_of, training_step, write_atomically)

# --------------------------------------------------------------------------------------
# Settings

def small(image_shape):
    """UNet's arguments and the training for two CPU cores: MNIST in half an hour where
    they have AVX2, faster with AVX512-BF16; colour takes about three times as long."""
    C, H, W = image_shape
    grey = C == 1
    return dict(
        in_channels=C,
        model_channels=32 if grey else 48,       # colour has more to say
        channel_mult=(1, 2, 4),                  # the width doubles as the size halves
        num_res_blocks=1,
        attention_resolutions=() if grey else (2,),  # costs MNIST a third more time per step
        num_heads=4,
        groups=2,                                # of 16 channels or more: better digits than
                                                 # of 8 or 4, and of 1 black turns grey
        patch_size=min(4, -(-H // 16)),          # the network works on about 16x16 patches
    ), dict(
        steps=3500,                              # from 2,000 the Frechet distance still halves
        batch_size=64,                           # small batches and many steps win on a CPU
        lr=2e-3,                                 # ten times DDPM's: a small network bears it
        schedule="cosine",                       # on small images linear wastes a third of T
        velocity=True,                           # bfloat16 needs it, see UNet's alpha_bar
        flip=not grey)                           # a mirrored digit is no digit


def base(image_shape):
    """DDPM's network for CIFAR-10 (Ho et al. 2020), for a GPU: 35.7M parameters,
    attention at 16x16, eps predicted directly. (Their training took 800,000 steps at a
    constant rate and kept a moving average of the weights.)"""
    C, H, W = image_shape
    return (dict(in_channels=C, model_channels=128, channel_mult=(1, 2, 2, 2), num_res_blocks=2,
                 attention_resolutions=(max(1, round(H / 16)),), num_heads=1, dropout=0.1),
            dict(steps=200_000, batch_size=128, lr=2e-4, schedule="linear", velocity=False,
                 flip=C == 3))


NETWORKS = {"small": small, "base": base}
TIMESTEPS = 1000           # T, as in DDPM
POSTERIOR_FRACTION = 0.25  # share of training, at its end, whose weights form the posterior:
                           # those of every fifth step, since neighbours hardly differ
SIGMA_FLOOR = 1e-8         # sigma* of what never moved: it stays, and nothing divides by 0


def learning_rate(step, steps, lr):
    """Warm up over 200 steps, fall to a tenth, hold it while the posterior gathers.
    The fall settles the weights; the constant rate keeps them wandering about one
    optimum, whose spread is sigma*."""
    warmup = min(1.0, (step + 1) / 200)
    return lr * warmup * max(0.1, 1 - 0.9 * step / max(1, posterior_start(steps)))


def posterior_start(steps):
    """The step from which the weights enter the posterior."""
    return int(steps * (1 - POSTERIOR_FRACTION))


# --------------------------------------------------------------------------------------
# The posterior

class GaussianPosterior:
    """p(theta | D) ~ prod_i N(mu*_i, sigma*_i^2) (VDU's approximation).
    mean, std: {name: tensor} like the parameters, mu* and sigma*.  n: of how many
    checkpoints. Made from these three, or without arguments and filled by `update`."""

    def __init__(self, mean=None, std=None, n=0):
        self.mean, self.n, self.m2 = mean, n, None
        self._std = std and {k: s.clamp(min=SIGMA_FLOOR) for k, s in std.items()}

    @property
    def std(self):
        """sigma*, derived from the sums when it is wanted; None of fewer than two."""
        if self._std is None and self.n > 1:
            self._std = {k: (m2 / (self.n - 1)).sqrt().clamp(min=SIGMA_FLOOR)
                         for k, m2 in self.m2.items()}
        return self._std

    @torch.no_grad()
    def update(self, parameters):
        """Take in one more checkpoint: {name: tensor}, or named_parameters() (Welford
        1962). sigma* is there from the second on."""
        parameters = dict(parameters)
        if not self.m2:  # sums of squared deviations, from the start or from sigma*
            zeros = {k: torch.zeros_like(p, dtype=torch.float32) for k, p in parameters.items()}
            self.mean = {k: v + (self.mean[k] if self.n else 0) for k, v in zeros.items()}
            self.m2 = {k: v + (self.std[k] ** 2 * (self.n - 1) if self.std else 0)
                       for k, v in zeros.items()}
        self.n, self._std = self.n + 1, None
        for k, p in parameters.items():
            deviation = p - self.mean[k]  # from the old mean
            self.mean[k] += deviation / self.n
            self.m2[k] += deviation * (p - self.mean[k])  # times that from the new one

    @classmethod
    def from_checkpoints(cls, paths, parameters, read=lambda path: state_dict_of(read_file(path))):
        """mu* and sigma* over files of one training, read one at a time.
        parameters: {name: tensor} or named_parameters() of the network; what else a
        file holds (buffers) is left out.  read: path -> {name: tensor}.  Raises
        UserError for fewer than two files, for equal ones, or for another network."""
        parameters, posterior, digests = dict(parameters), cls(), set()
        for path in paths:
            tensors = read(path)
            theta = {k: tensors[k] for k in parameters if k in tensors}
            check_parameters(path, theta, parameters)
            posterior.update((k, v.to(parameters[k].device)) for k, v in theta.items())
            digests.add(digest(theta.values()))
        if len(digests) < max(2, len(paths)):
            raise UserError("a posterior needs two checkpoints that differ: one has no spread")
        return posterior

    @torch.no_grad()
    def unwhiten(self, z, theta):
        """theta = mu* + sigma* z, into theta's memory: p(theta | D) is N(0, I) in z."""
        for k, p in theta.items():
            torch.mul(self.std[k], z[k], out=p).add_(self.mean[k])

    def contents(self):
        """What a checkpoint file keeps of it."""
        return {"mean": self.mean, "std": self.std, "n": self.n}

    def to(self, device):
        """The same on another device."""
        mean, std = ({k: v.to(device) for k, v in d.items()} for d in (self.mean, self.std))
        return GaussianPosterior(mean, std, self.n)


def check_parameters(what, theta, parameters):
    """Raise UserError unless theta has the names and shapes of the network's."""
    shapes, others = ({k: v.shape for k, v in d.items()} for d in (theta, parameters))
    wrong = [k for k in {**others, **shapes} if shapes.get(k) != others.get(k)]
    if wrong:
        raise UserError(f"the parameters of {what} do not match the network's: {wrong[:3]} ...")


# --------------------------------------------------------------------------------------
# Training

def batch_indices(step, n, batch_size, seed):
    """Which images step number `step` sees: a function of the arguments alone, so that
    --resume needs no loader's state."""
    epoch, i = divmod(step, n // batch_size)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    return order[i * batch_size : (i + 1) * batch_size]


def seed_step(seed, step):
    """Seed what a training step draws (t, noise, mirrors) by (seed, step) alone, so
    that --resume needs no saved state of random numbers, on any device."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step)).generate_state(1)[0]))


def mirror_half(x):
    """Mirror each of the images (B, C, H, W), or not, at even odds."""
    return torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x.flip(3), x)


def train(settings, config, images, data, device, saved=None):
    """DDPM's training (algorithm 1), which gathers the posterior on the way.

    settings: as settle() returns them.  images: (N, C, H, W) uint8.  saved: the
    contents of an interrupted run's file.  Returns (UNet with theta*, Diffusion).
    Raises UserError for a loss that is not finite, KeyboardInterrupt once an
    interrupted run is saved."""
    output, steps, seed = (settings[k] for k in ("output", "steps", "seed"))
    B, step, loss, losses = min(settings["batch_size"], len(images)), 0, None, []
    torch.manual_seed(seed)
    (unet, diffusion), posterior = build(config, device), GaussianPosterior()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=settings["lr"], betas=(0.9, 0.99),
                                  weight_decay=0.0, fused=device.type != "mps")
    if saved is not None:
        now, step, losses = saved["train"], saved["step"], saved["losses"]
        unet.load_state_dict(now["unet"])
        optimizer.load_state_dict(now["optimizer"])
        loss = now["loss"]
        for name, v in now["posterior"].items():  # n, and dicts of tensors or None
            v = {k: tensor.to(device) for k, tensor in v.items()} if isinstance(v, dict) else v
            setattr(posterior, name, v)
    began, saved_step = time.time(), step
    with StopRequest() as stop, tqdm(total=steps * B, initial=step * B, desc="training", unit="img",
                                     unit_scale=True, dynamic_ncols=True) as bar:
        while step < steps:
            index = batch_indices(step, len(images), B, seed).to(images.device)
            x0 = to_float(images[index].to(device))  # (B, C, H, W)
            seed_step(seed, step)
            x0 = mirror_half(x0) if settings["flip"] else x0
            optimizer.param_groups[0]["lr"] = learning_rate(step, steps, settings["lr"])
            now = training_step(unet, diffusion, optimizer, x0)
            if not math.isfinite(now):
                raise UserError(f"the loss became {now} at step {step}, after saving step "
                                f"{saved_step}: try a smaller --lr than {settings['lr']:g}")
            # Every fifth step's weights, and the last, are samples of p(theta | D).
            if step >= posterior_start(steps) and (step % 5 == 0 or step == steps - 1):
                posterior.update(unet.named_parameters())
            step += 1
            loss = now if loss is None else 0.99 * loss + 0.01 * now
            if step % max(1, steps // 200) == 0:
                losses.append((step, loss))
            bar.update(B)
            bar.set_postfix(loss=f"{loss:.4f}", step=step, posterior=posterior.n, refresh=False)
            # Save now and then, on Ctrl-C, and at the end.
            if stop.requested or step == steps or step % settings["save_every"] == 0:
                # theta* is mu*, the mean over the wander: a last step adds noise.
                theta = posterior.mean if posterior.n > 1 else unet.state_dict()
                contents = {"config": config, "data": data, "step": step, "losses": losses,
                            "settings": settings, "weights": theta,
                            "posterior": posterior.contents() if posterior.n > 1 else None}
                if step < steps:  # what --resume needs besides; a finished file has no use for it
                    contents["train"] = {"unet": unet.state_dict(), "loss": loss,
                                         "optimizer": optimizer.state_dict(),
                                         "posterior": vars(posterior)}
                save_checkpoint(output, contents)
                saved_step = step
            if stop.requested and step < steps:
                bar.close()
                print(f"interrupted: saved step {step} of {steps} in {output}; go on with --resume")
                raise KeyboardInterrupt
    print(f"wrote {output} ({time.time() - began:.0f} s); loss along the way: "
          + " ".join(f"{value:.4f}" for _, value in losses[:: max(1, len(losses) // 9)]))
    unet.load_state_dict(theta)
    return unet.eval(), diffusion


def settle(args):
    """(settings, the saved run or None): the command line's, or of --resume's file."""
    own = args.dataset == "folder"
    if own and args.data_root is None:
        raise UserError("--dataset folder needs --data-root DIR, one sub-folder for each class")
    stem = os.path.basename(os.path.abspath(args.data_root)) if own else args.dataset
    output, saved = args.output or f"checkpoints/{stem}.pt", None
    settings = {**vars(args), "output": output}
    if args.resume:
        saved = read_file(output)
        if not isinstance(saved, dict) or not {"train", "settings", "data", "step"} <= set(saved):
            raise UserError(f"{output} is no interrupted run: there is nothing to resume")
        typed = {k: v for k, v in vars(args).items() if v != parser().get_default(k)}
        heard = ("data_root", "save_every", "device", "overwrite", "resume")
        there = {**saved["settings"], "output": output}  # where it lies now, not where it began
        settings |= {k: v for k, v in there.items() if k not in typed or k not in heard}
        unheard = [f"--{k.replace('_', '-')} {v}" for k, v in typed.items() if settings[k] != v]
        if unheard:
            print(f"continuing with the settings in {output}, not with {' '.join(unheard)}")
    return settings, saved


def main(args):
    """Run the command line. Raises UserError for what the user can put right."""
    settings, saved = settle(args)
    device, output = pick_device(args.device), settings["output"]
    grid = Path(output).with_suffix(".png")
    if os.path.exists(output) and not args.overwrite and not args.resume:
        raise UserError(f"{output} exists already: --resume continues it, --overwrite replaces it")
    check_outputs([output], True, (".pt", ".pth", ".ckpt"))
    check_outputs([grid], settings["overwrite"])
    # The images, less --exclude-class. A run that began on the shipped ones stays.
    shipped = saved is not None and saved["data"]["source"] == MNIST_5K.name
    own, size = settings["dataset"] == "folder", settings["image_size"]
    images, labels, data = load_dataset(
        settings["dataset"], MNIST_5K if shipped else settings["data_root"],
        image_shape=(None, size, size) if own else None)
    classes = data["classes"]
    excluded = class_indices(settings["exclude_class"], classes)
    if len(excluded) == len(classes):
        raise UserError("--exclude-class names all classes: nothing is left to learn")
    keep = ~torch.isin(labels, torch.tensor(excluded))
    images, labels = images[keep], labels[keep]
    data |= {"excluded": [classes[i] for i in excluded], "digest": digest([images, labels]),
             "images": len(images), "counts": labels.bincount(minlength=len(classes)).tolist()}
    if saved is not None and saved["data"].get("digest") != data["digest"]:
        raise UserError(f"{output} was trained on other images: say where with --data-root DIR")
    # The network: base wants a GPU; on a CPU, and for MNIST, small does.
    large = device.type != "cpu" and settings["dataset"] != "mnist"
    model = settings["model"] or ("base" if large else "small")
    image_shape = tuple(images.shape[1:])
    unet, defaults = NETWORKS[model](image_shape)
    settings |= {"model": model, **{k: v for k, v in defaults.items() if settings.get(k) is None}}
    config = {"unet": unet, "timesteps": TIMESTEPS, "image_shape": image_shape,
              **{k: settings[k] for k in ("schedule", "velocity")}}
    if device.type == "cuda" and images.nbytes < 2**32:
        images = images.to(device)  # once, not a batch at a time
    print(f"{title_of(data)}: {len(images):,} images of {'x'.join(map(str, image_shape))} "
          f"({data['source']}) in {len(classes)} classes ({', '.join(classes[:20])}), {model} "
          f"U-Net, {settings['steps']:,} steps of {settings['batch_size']} on {device}")
    unet, diffusion = train(settings, config, images, data, device, saved)
    samples = diffusion.sample(unet, 64, image_shape, 25, seed=settings["seed"])
    write_atomically(grid, lambda f: save_image(samples / 2 + 0.5, f, format="png"))
    print(f"wrote {grid}, a grid of samples")


# --------------------------------------------------------------------------------------
# Datasets

MNIST_5K = Path(__file__).parent / "tests" / "data" / "mnist_5k.npz"
SHIPPED = Path(__file__).parent / "tests" / "data" / "mnist.pt"
TINY_IMAGENET = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
# name: where its published files lie in the folder that is given as its root
DATASETS = {"mnist": "MNIST/raw", "cifar10": "cifar-10-batches-py",
            "tiny-imagenet": "tiny-imagenet-200", "folder": ""}


def load_dataset(name, root=None, train=True, image_shape=None, only=None, classes=None):
    """(images, labels, data) of a dataset: (N, C, H, W) uint8, (N,) int64, dict.

    name: one of DATASETS.  root: the folder that holds it; None downloads into data/;
    MNIST_5K: the images of MNIST that ship with the code.  train: that part, or the
    test part; images and labels are None where there is none.  image_shape: (C, S, S)
    to bring image files to; C None: grey if all are.  only: names of classes, whose
    files alone are opened.  classes: all of them, in the order of the labels, for a
    folder where some may be gone.  data: {"name", "source", "root", "classes"}.  Raises
    UserError if the folder does not hold it, or it cannot be downloaded."""
    here, files, digits = Path(root or "data"), None, [str(d) for d in range(10)]
    data = {"name": name, "source": "torchvision", "root": os.path.abspath(here)}
    if name not in DATASETS:
        raise UserError(f"the dataset {name!r} is not known here: {', '.join(DATASETS)} are")
    try:
        if here == MNIST_5K:
            data |= {"source": MNIST_5K.name, "root": None}
            arrays, n, classes = np.load(here), 5000 if train else 0, digits  # no test part
            images, labels = (torch.from_numpy(arrays[k][:n]) for k in ("images", "labels"))
            images, labels = images[:, None], labels.long()
        elif name == "folder":
            data["source"] = "folder"
            files, classes = folder_files(here, train, only, classes)
        elif name == "tiny-imagenet":
            files, classes = tiny_imagenet_files(here, root is None, train, only)
        else:
            if name == "mnist":
                if root is None:
                    MNIST(here, download=True)
                part, raw = "train" if train else "t10k", here / DATASETS[name]
                images, labels = map(read_sn3_pascalvincent_tensor,  # -idx3- or .idx3-
                                     sorted(raw.glob(f"{part}-*idx?-ubyte")))
                images, classes = images[:, None], digits
            else:
                dataset = CIFAR10(here, train, download=root is None)
                images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
                labels, classes = torch.tensor(dataset.targets), dataset.classes
            if len(images) != len(labels) or len(labels.unique()) < 10:
                raise ValueError(f"{len(images):,} images, {len(labels):,} labels")
    except (UserError, PermissionError):
        raise
    except Exception as e:  # over damaged files torchvision fails in many ways
        if name == "mnist" and root is None and not list(here.glob("MNIST/raw/*ubyte")):
            print(f"no network ({first_line(e)[:60]}): using the 5,000 images in {MNIST_5K.name}")
            return load_dataset("mnist", MNIST_5K, train, image_shape, only)
        raise UserError(f"{name} cannot be downloaded, or is damaged ({first_line(e)[:120]}): its "
                        f"published files belong in {here / DATASETS[name]} (--data-root)") from e
    if files is not None:
        images = read_images([path for path, _ in files], image_shape or (3, 64, 64))
        labels = torch.tensor([i for _, i in files])
    elif only is not None:
        keep = torch.isin(labels, torch.tensor([classes.index(c) for c in only]))
        images, labels = images[keep], labels[keep]
    found = len(images) > 0
    return images if found else None, labels if found else None, {**data, "classes": classes}


def folder_files(root, train, only, classes):
    """([(path, label)], classes) of a folder with one sub-folder of images per class,
    or with train/ and test/ (val/, valid/) of such."""
    training = here = root / "train" if subfolders(root / "train") else root
    classes = classes or list(subfolders(training))
    if not classes:
        raise UserError(f"no classes in {training}: it needs a sub-folder of images for each")
    if not train:
        parts = [root / name for name in ("test", "val", "valid") if (root / name).is_dir()]
        if training == root or not parts:
            return [], classes
        here = parts[0]
    folders, files = subfolders(here), []
    for i, name in enumerate(classes):
        if only is None or name in only:
            found = image_files(folders[name]) if name in folders else []
            if train and not found:
                raise UserError(f"no images of the class {name} in {here}")
            files += [(path, i) for path in found]
    return files, classes


def tiny_imagenet_files(root, download, train, only):
    """([(path, label)], classes) of tiny ImageNet as it is published:
    train/WNID/images/, and val/images/, whose classes stand in val/val_annotations.txt.

    A class is its words in words.txt ("goldfish, Carassius auratus"), in the order of
    the WordNet ids (n01443537). Raises OSError or ValueError where it is not there."""
    folder = root / "tiny-imagenet-200"
    if download and not (folder / "wnids.txt").exists():
        download_and_extract_archive(TINY_IMAGENET, root, md5="90528d7ca1a48142e341f4ef8d21d0de")
    wnids = sorted((folder / "wnids.txt").read_text().split())
    lines = (folder / "words.txt").read_text().splitlines()
    words = dict(line.split("\t", 1) for line in lines if line.strip())
    classes = [words[wnid] for wnid in wnids]
    chosen = {wnid: i for i, wnid in enumerate(wnids) if only is None or classes[i] in only}
    annotations = folder / "val" / "val_annotations.txt"
    if train or not annotations.exists():  # some sort the val part into class folders, too
        part = folder / ("train" if train else "val")
        files = [(path, i) for wnid, i in chosen.items() for path in image_files(part / wnid)]
    else:  # file name, WordNet id and a bounding box, between tabs
        rows = [line.split("\t") for line in annotations.read_text().splitlines() if line.strip()]
        files = [(folder / "val" / "images" / name, chosen[wnid]) for name, wnid, *_ in rows
                 if wnid in chosen]
    if len({i for _, i in files}) < len(chosen):
        raise ValueError("some classes have no images")
    return files, classes


def load_data_of(checkpoint, data_root=None, train=True, only=None):
    """The dataset that a checkpoint was trained on: (images, labels), or (None, None).
    data_root overrides its folder.  only: indices of the classes to read; the others
    may be gone.  Raises UserError if it is not there."""
    data, root = checkpoint.data, data_root or checkpoint.data["root"]
    if data_root is None and data["source"] == MNIST_5K.name:
        root = MNIST_5K
    elif root is not None and not os.path.isdir(root):
        raise UserError(f"the dataset is not in {root} any more: say where with --data-root DIR")
    names = None if only is None else [data["classes"][i] for i in only]
    return load_dataset(data["name"], root, train, checkpoint.config["image_shape"], names,
                        data["classes"])[:2]


def title_of(data):
    """What files of this dataset are called: mnist, or the name of the folder."""
    return Path(data["root"]).name if data["name"] == "folder" else data["name"]


def class_indices(names, classes):
    """Class names -> their indices, sorted; a name, or one of its words ("goldfish").
    A name counts as it is written, else without regard to capitals. Raises UserError
    that lists the classes there are, or those that a name could mean."""
    indices = set()
    for name in (unicodedata.normalize("NFC", name) for name in names):
        found = [i for i, c in enumerate(classes) if name == c] or [
            i for i, c in enumerate(classes) if name.lower() in [c.lower(), *c.lower().split(", ")]]
        if len(found) != 1:
            could = [classes[i] for i in found] or classes
            raise UserError(f"no class {name!r}, or more than one: choose among {'; '.join(could)}")
        indices.add(found[0])
    return sorted(indices)


# --------------------------------------------------------------------------------------
# Image files and pixels

def subfolders(folder):
    """{name: path} of the folders in a folder, in order; names in Unicode's NFC."""
    paths = folder.iterdir() if folder.is_dir() else ()
    found = {unicodedata.normalize("NFC", p.name): p for p in paths
             if p.is_dir() and not p.name.startswith(".")}
    return dict(sorted(found.items()))


def image_files(folder):
    """The images in a folder and below it, in order; says what it passes over.
    Links are followed, each folder once; what is hidden is left out. Raises OSError for
    a folder that may not be read."""
    def fail(error):
        raise error

    files, seen = [], set()
    for place, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        if os.path.realpath(place) in seen:  # a link back to where the walk has been
            folders.clear()
            continue
        seen.add(os.path.realpath(place))
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(place, name) for name in names if not name.startswith(".")]
    files.sort()
    images = [p for p in files if p.suffix.lower() in IMG_EXTENSIONS and p.is_file()]
    if len(images) < len(files):
        others = [p.name for p in files if p not in set(images)]
        print(f"{folder}: passing over {len(others)} files that are no images: {others[:5]}")
    return images


def open_image(path):
    """An image file as Pillow's RGB image: upright by its EXIF orientation, 16 bits a
    channel as 8, what is transparent over white. Pillow comes with torchvision."""
    with Image.open(path) as file:
        kind, image = file.format, ImageOps.exif_transpose(file)
    if image.mode == "F" or (image.mode == "I" and kind not in ("PNG", "PPM")):
        raise ValueError("its pixels are 32-bit numbers of unknown range")
    if image.mode.startswith("I"):  # one channel of 16 bits: 0 .. 65535 = 257 * 255
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def read_images(paths, image_shape):
    """Image files, centre-cropped to squares and resized: (N, C, S, S) uint8.
    image_shape: (C, S, S), C None: grey if all are.  Raises UserError, which names the
    file, for one that cannot be read."""
    channels, size = image_shape[0], image_shape[-1]
    images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
    for i, path in enumerate(tqdm(paths, "reading images", disable=len(paths) < 1000)):
        try:
            image = transforms.pil_to_tensor(open_image(path))  # (3, H, W) uint8
        except Exception as e:  # Pillow raises all kinds
            raise UserError(f"cannot read the image {path} ({first_line(e)[:80]})") from e
        image = transforms.center_crop(image, [min(image.shape[1:])] * 2)
        images[i] = transforms.resize(image, [size, size], antialias=True)
    grey = (torch.equal(c[:, :1].expand_as(c), c) for c in images.split(1000))
    if channels != 3 and all(grey):
        return images[:, :1].clone()
    return transforms.rgb_to_grayscale(images) if channels == 1 else images


def load_images(folder, image_shape):
    """Every image in a folder and below it: (N, C, S, S). Raises UserError for none."""
    paths = image_files(folder)
    if not paths:
        raise UserError(f"no images in {folder}: they end in {', '.join(IMG_EXTENSIONS)}")
    return read_images(paths, image_shape)


def to_float(images):
    """uint8 0 .. 255 -> float32 -1 .. 1, the range in which the diffusion works."""
    return images.float() / 127.5 - 1


def to_uint8(images):
    """float -1 .. 1 -> uint8 0 .. 255, rounded."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


# --------------------------------------------------------------------------------------
# The command line

def parser():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dataset", choices=DATASETS, default="mnist", help="default: mnist")
    p.add_argument("--data-root", help="folder that holds it already (default: download to data/)")
    p.add_argument("--image-size", type=number(int, 8), default=32, help="of --dataset folder: 32")
    p.add_argument("--model", choices=NETWORKS, help="default: small on a CPU and for mnist")
    p.add_argument("--output", help="default: checkpoints/DATASET.pt")
    p.add_argument("--resume", action="store_true", help="continue an interrupted run")
    p.add_argument("--exclude-class", nargs="+", default=[], help="retrain without these classes")
    p.add_argument("--steps", type=number(int, 1), help="default: as the model's settings say")
    p.add_argument("--batch-size", type=number(int, 1), help="images per step (default: likewise)")
    p.add_argument("--lr", type=number(float, 1e-12), help="AdamW's highest (default: likewise)")
    p.add_argument("--save-every", type=number(int, 1), default=1000, help="steps (default: 1000)")
    add_shared_flags(p)
    return p


if __name__ == "__main__":
    run_command_line(lambda: main(parser().parse_args()))
