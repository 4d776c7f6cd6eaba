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
         and a grid of samples beside it, checkpoints/mnist.png. Ctrl-C saves what there
         is, and --resume goes on.
Paper    VDU (arXiv 2510.04058): theta* was trained on D = D_r and D_f, and mu* and
         sigma* are the mean and standard deviation of each parameter over training
         checkpoints. Here those are the weights along the last part of one run, at a
         constant learning rate, folded into running sums as they pass: a departure,
         since the mean of independent runs is no working network. So sigma* says how
         far training lets each weight wander. That is not the posterior's spread (Mandt
         et al. 2017 tune SGD's rate to come close to it); gamma absorbs its scale.
"""

import argparse
import math
import os
import unicodedata
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.datasets import CIFAR10, MNIST
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.transforms.v2 import functional as transforms
from tqdm import tqdm

from ddpm import (WEIGHTS, StopRequest, UserError, add_shared_flags, build, check_finite,
                  check_output, digest, first_line, number, pick_device, positive, read_file,
                  run_command_line, save_checkpoint, state_dict_of, to_float, to_uint8,
                  training_step, write_images)

# --------------------------------------------------------------------------------------
# Settings

def small(image_shape):
    """(UNet's arguments, training settings) for two CPU cores: MNIST in half an hour
    where they have AVX2, faster with AVX512-BF16; colour takes about three times as
    long."""
    C, H, W = image_shape
    grey = C == 1
    return dict(
        in_channels=C,
        model_channels=32 if grey else 48,       # colour has more to say
        channel_mult=(1, 2, 4),                  # the width doubles as the size halves
        num_res_blocks=1,
        attention_resolutions=() if grey else (2,),  # not for MNIST: a third slower
        num_heads=4,
        groups=2,                                # 16 channels or more in each: better digits
                                                 # than 8; with 1 black turns grey
        patch_size=min(4, math.ceil(H / 16)),    # up to 64 pixels, a grid of 16x16 patches
    ), dict(
        steps=3500,                              # half the Frechet distance of 2,000; 5,500
                                                 # take off another quarter
        batch_size=64,                           # small batches and many steps win on a CPU
        lr=2e-3,                                 # ten times DDPM's: a small network bears it
        schedule="cosine",                       # linear's last steps are only noise
        velocity=True,                           # bfloat16 needs it, see UNet's alpha_bar
        flip=not grey)                           # a mirrored digit is no digit


def base(image_shape):
    """DDPM's network for CIFAR-10 (Ho et al. 2020), for a GPU: 35.7M parameters,
    attention at about 16x16, eps predicted directly. (Their training took 800,000 steps
    at a constant rate and kept a moving average of the weights.)"""
    C, H, W = image_shape
    level = round(math.log2(H / 16))  # where it attends, of levels 0 .. 3
    return dict(
        in_channels=C,
        model_channels=128,
        channel_mult=(1, 2, 2, 2),
        num_res_blocks=2,
        attention_resolutions=(2 ** min(3, max(0, level)),),
        num_heads=1,
        dropout=0.1,
    ), dict(
        steps=200_000,
        batch_size=128,
        lr=2e-4,
        schedule="linear",
        velocity=False,
        flip=C == 3)


NETWORKS = {"small": small, "base": base}
TIMESTEPS = 1000           # T, as in DDPM
POSTERIOR_FRACTION = 0.25  # share of training, at its end, whose weights form the posterior:
POSTERIOR_EVERY = 5        # steps: the weights of neighbours hardly differ
SAVE_EVERY = 1000          # steps, in case it is killed
SIGMA_FLOOR = 1e-8         # sigma* of a weight that never moved: tiny, but no 0 to divide by


def set_missing(settings, defaults):
    """Give those settings that are None, or not there, their defaults."""
    for name, value in defaults.items():
        if settings.get(name) is None:
            settings[name] = value


def learning_rate(step, steps, lr):
    """Warm up over 200 steps, fall to a tenth, hold it while the posterior gathers.
    The fall settles the weights; the constant rate keeps them wandering about one
    optimum. How far they wander is sigma*."""
    warmup = min(1.0, (step + 1) / 200)
    fallen = 1 - 0.9 * step / max(1, posterior_start(steps))
    return lr * warmup * max(0.1, fallen)


def posterior_start(steps):
    """The step from which the weights enter the posterior."""
    return int(steps * (1 - POSTERIOR_FRACTION))


# --------------------------------------------------------------------------------------
# The posterior

class GaussianPosterior:
    """p(theta | D) ~ prod_i N(mu*_i, sigma*_i^2) (VDU's approximation).
    mean, std: {name: tensor} like the parameters, mu* and sigma*, in memory of their
    own.  n: of how many checkpoints.  m2: sums of squared deviations, while checkpoints
    come in. Made from these, or without arguments and filled by `update`."""

    def __init__(self, mean=None, std=None, n=0, m2=None):
        self.mean = mean or {}
        self.std = {k: s.clamp(min=SIGMA_FLOOR) for k, s in (std or {}).items()}
        self.n = n
        self.m2 = m2 or {}

    @torch.no_grad()
    def update(self, parameters):
        """Take in one more checkpoint: {name: tensor}, or named_parameters() (Welford
        1962). sigma* means something from the second on."""
        self.n += 1
        for k, p in dict(parameters).items():
            p = p.float()
            old = self.mean.get(k, 0.0)
            new = old + (p - old) / self.n
            self.m2[k] = self.m2.get(k, 0.0) + (p - old) * (p - new)
            self.mean[k] = new
            variance = self.m2[k] / max(1, self.n - 1)  # without bias
            self.std[k] = variance.sqrt().clamp(min=SIGMA_FLOOR)

    @classmethod
    def from_checkpoints(cls, paths, net, read=lambda path: state_dict_of(read_file(path))):
        """mu* and sigma* over files of one training, read one at a time.
        net: the network; those of its parameters are taken that require a gradient. Its
        other tensors (buffers, frozen parameters) have no posterior and stay as they
        are; where files hold such, they must equal those of one file.  read: path ->
        {name: tensor}.  Raises UserError for fewer than two files, for equal ones, for
        numbers that are not finite, for those of another network, or for other tensors
        that do not move."""
        parameters = moving_parameters(net)
        fixed = {k: v for k, v in net.state_dict(keep_vars=True).items() if not v.requires_grad}
        posterior = cls()
        digests = set()
        matches = False  # whether what is fixed is as in one of the files
        for path in paths:
            # Its parameters, which must be the network's.
            tensors = read(path)
            theta = {k: tensors[k] for k in parameters if k in tensors}
            check_parameters(path, theta or tensors, parameters)
            check_finite(path, theta)
            digests.add(digest(theta.values()))
            for k, p in parameters.items():
                theta[k] = theta[k].to(p.device)
            posterior.update(theta)
            if all(torch.equal(tensors[k].to(v), v) for k, v in fixed.items() if k in tensors):
                matches = True
        if len(digests) < max(2, len(paths)):
            raise UserError("a posterior needs two checkpoints or more, all different")
        if not matches:  # running means of batches, for one
            raise UserError(f"what does not move in the network ({list(fixed)[:3]}) is as in none "
                            "of these files: load one of the checkpoints into it first")
        return posterior

    @torch.no_grad()
    def set_weights(self, z, theta):
        """theta = mu* + sigma* z, into theta's memory: p(theta | D) is N(0, I) in z."""
        for k, p in theta.items():
            torch.mul(self.std[k], z[k], out=p)  # sigma* z
            p.add_(self.mean[k])  # + mu*

    def contents(self):
        """What a checkpoint file keeps of it; None of fewer than two moments."""
        if self.n < 2:
            return None
        return {"mean": self.mean, "std": self.std, "n": self.n}

    def to(self, device):
        """The same on another device."""
        mean = all_to(self.mean, device)
        std = all_to(self.std, device)
        return GaussianPosterior(mean, std, self.n, all_to(self.m2, device))


def all_to(tensors, device):
    """{name: tensor}, on another device."""
    return {k: v.to(device) for k, v in tensors.items()}


def moving_parameters(net):
    """{name: parameter} of those that require a gradient."""
    return {k: p for k, p in net.named_parameters() if p.requires_grad}


def check_parameters(what, theta, parameters):
    """Raise UserError unless theta has the names and shapes of the network's."""
    theirs = {(k, *v.shape) for k, v in theta.items()}
    ours = {(k, *v.shape) for k, v in parameters.items()}
    if theirs != ours:  # name three that differ, of each
        raise UserError(f"the parameters of {what} do not match the network's (those that require "
                        f"a gradient): {sorted(theirs - ours)[:3]} ... there, "
                        f"{sorted(ours - theirs)[:3]} ... here")


# --------------------------------------------------------------------------------------
# Training

def batch_indices(step, n, batch_size, seed):
    """Which images step number `step` sees: a function of the arguments alone, so that
    --resume needs no loader's state."""
    epoch, i = divmod(step, n // batch_size)  # the i-th batch of an epoch
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(n, generator=generator)  # the epoch's
    return order[i * batch_size : (i + 1) * batch_size]


def seed_step(seed, step):
    """Seed what a training step draws (t, noise, mirrors) by (seed, step) alone, so
    that --resume needs no saved state of random numbers, on any device."""
    sequence = np.random.SeedSequence((seed, step))  # mixes the two
    torch.manual_seed(int(sequence.generate_state(1)[0]))


def mirror_half(x):
    """Mirror each of the images (B, C, H, W), or not, at even odds."""
    u = torch.rand(len(x), 1, 1, 1, device=x.device)
    return torch.where(u < 0.5, x.flip(3), x)


class Run:
    """A training under way, and all that must be saved to go on with it later."""

    def __init__(self, settings, config, data, device):
        self.settings = settings
        self.config = config
        self.data = data
        torch.manual_seed(settings["seed"])
        self.unet, self.diffusion = build(config, device)
        self.posterior = GaussianPosterior()
        self.optimizer = torch.optim.Adam(
            self.unet.parameters(),
            lr=settings["lr"],
            betas=(0.9, 0.99),
            fused=device.type != "mps")
        self.step = 0  # done so far
        self.loss = None  # a running mean
        self.overwrite = settings["overwrite"]  # what it wrote itself it may replace

    def theta(self):
        """mu*, once there is one: the last weights alone have the noise of a step."""
        if self.posterior.n > 1:
            return self.posterior.mean
        return self.unet.state_dict()

    def save(self):
        """Write the checkpoint; of an unfinished run, with what --resume needs."""
        contents = {
            "config": self.config,
            "data": self.data,
            "settings": self.settings,
            "step": self.step,
            "weights": self.theta(),
            "posterior": self.posterior.contents()}
        # a finished file has no use for these
        if self.step < self.settings["steps"]:
            contents["train"] = {
                "unet": self.unet.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "loss": self.loss,
                "posterior": vars(self.posterior)}
        save_checkpoint(self.settings["output"], contents, self.overwrite)
        self.overwrite = True

    def restore(self, saved, device):
        """Go on from the contents of an interrupted run's file."""
        train = saved["train"]
        self.step = saved["step"]
        self.loss = train["loss"]
        self.unet.load_state_dict(train["unet"])
        self.optimizer.load_state_dict(train["optimizer"])
        self.posterior = GaussianPosterior(**train["posterior"]).to(device)
        self.overwrite = True

    def take_step(self, x0):
        """One step of Adam on images x0 (B, C, H, W); returns its loss."""
        steps = self.settings["steps"]
        # DDPM's step.
        lr = learning_rate(self.step, steps, self.settings["lr"])
        self.optimizer.param_groups[0]["lr"] = lr
        loss = training_step(self.unet, self.diffusion, self.optimizer, x0)

        # Some steps' weights, and the last, are taken as samples of p(theta | D).
        taken = self.step % POSTERIOR_EVERY == 0 or self.step == steps - 1
        if self.step >= posterior_start(steps) and taken:
            self.posterior.update(self.unet.named_parameters())

        # What is shown is a mean over some 100 steps.
        self.step += 1
        self.loss = 0.99 * (self.loss or loss) + 0.01 * loss
        return loss


def train(run, images, device):
    """DDPM's training (algorithm 1), which gathers the posterior on the way.

    run: a Run.  images: (N, C, H, W) uint8.  Raises UserError for a loss that is not
    finite, KeyboardInterrupt once an interrupted run is saved."""
    settings = run.settings
    steps = settings["steps"]
    B = min(settings["batch_size"], len(images))
    bar = tqdm(total=steps, initial=run.step, desc="training")
    with StopRequest() as stop, bar:
        while run.step < steps:
            # A batch, mirrored or not.
            index = batch_indices(run.step, len(images), B, settings["seed"])
            x0 = to_float(images[index].to(device))  # (B, C, H, W)
            seed_step(settings["seed"], run.step)
            if settings["flip"]:
                x0 = mirror_half(x0)

            # A step.
            loss = run.take_step(x0)
            if not math.isfinite(loss):  # the file is of the step that was saved last
                raise UserError(f"the loss became {loss} at step {run.step}: try a smaller --lr "
                                f"than {settings['lr']:g}")
            bar.update()
            bar.set_postfix(loss=run.loss, posterior=run.posterior.n, refresh=False)

            # Save now and then, on Ctrl-C, and at the end.
            finished = run.step == steps
            if stop.requested or finished or run.step % SAVE_EVERY == 0:
                run.save()
            if stop.requested and not finished:
                print(f"\ninterrupted: saved step {run.step} of {steps} in {settings['output']}; "
                      "go on with --resume")
                raise KeyboardInterrupt
    run.unet.load_state_dict(run.theta())  # mu* from here on
    run.unet.eval()


def read_settings(args):
    """(settings, saved). Without --resume: the command line's, and None. With it: the
    file's settings, but --data-root as typed, and its contents."""
    root = args.data_root
    name = args.dataset  # by which files are called
    if args.dataset == "folder":
        if root is None:
            raise UserError("--dataset folder needs --data-root DIR, a sub-folder for each class")
        name = Path(root).resolve().name
    output = args.output or f"checkpoints/{name}.pt"
    if os.path.exists(output) and not args.overwrite and not args.resume:
        raise UserError(f"{output} exists already: --resume continues it, --overwrite replaces it")
    check_output(output, True, WEIGHTS)
    if not args.resume:
        return {**vars(args), "output": output}, None

    # An interrupted run goes on with its own settings.
    saved = read_file(output)
    if "train" not in saved:
        raise UserError(f"{output} is no interrupted run: there is nothing to resume")
    settings = dict(saved["settings"], output=output, overwrite=args.overwrite)
    settings["data_root"] = root or saved["data"]["root"]
    return settings, saved


def load_training_images(settings, saved):
    """(images, data) to train on: those of the dataset, less --exclude-class.
    Raises UserError if an interrupted run had others."""
    size = settings["image_size"]  # for a folder, whose images have all sizes
    images, labels, data = load_dataset(settings["dataset"], settings["data_root"],
                                        image_shape=(None, size, size))

    # Retraining leaves classes out.
    classes = data["classes"]
    excluded = class_indices(settings["exclude_class"], classes)
    keep = ~torch.isin(labels, torch.tensor(excluded))
    images = images[keep]
    labels = labels[keep]
    # What the file will say of its images. The digest tells them from any others.
    data.update(
        excluded=[classes[i] for i in excluded],
        images=len(images),
        counts=labels.bincount(minlength=len(classes)).tolist(),
        digest=digest([images, labels]))
    if saved is not None and saved["data"]["digest"] != data["digest"]:
        raise UserError(f"{settings['output']} was trained on other images: say where they are "
                        "with --data-root DIR")
    return images, data


def main(args):
    """Run the command line. Raises UserError for what the user can put right."""
    settings, saved = read_settings(args)
    output = settings["output"]
    grid = Path(output).with_suffix(".png")
    check_output(grid, settings["overwrite"])
    device = pick_device(args.device)
    images, data = load_training_images(settings, saved)  # (N, C, H, W) uint8
    image_shape = tuple(images.shape[1:])

    # The network: base wants a GPU; on a CPU, and for MNIST, small does.
    if settings["model"] is None:
        large = device.type != "cpu" and settings["dataset"] != "mnist"
        settings["model"] = "base" if large else "small"
    unet, defaults = NETWORKS[settings["model"]](image_shape)
    set_missing(settings, defaults)
    config = {"unet": unet, "timesteps": TIMESTEPS, "image_shape": image_shape,
              "schedule": settings["schedule"], "velocity": settings["velocity"]}

    print(f"{data['name']}: {len(images):,} images of {'x'.join(map(str, image_shape))} "
          f"({data['root']}) in {len(data['classes'])} classes "
          f"({', '.join(data['classes'][:20])}), "
          f"{settings['model']} U-Net, {settings['steps']:,} steps of {settings['batch_size']} "
          f"on {device}")
    # Train, and draw what it has learned.
    run = Run(settings, config, data, device)
    if saved is not None:
        run.restore(saved, device)

    train(run, images, device)
    samples = run.diffusion.sample(run.unet, 64, image_shape, 25, seed=settings["seed"])
    write_images(grid, [to_uint8(samples)], settings["overwrite"])
    print(f"wrote {output}, loss {run.loss:.4f}, and {grid}, a grid of samples")


# --------------------------------------------------------------------------------------
# Datasets

MNIST_5K = Path(__file__).parent / "tests" / "data" / "mnist_5k.npz"
SHIPPED = MNIST_5K.with_name("mnist.pt")
TINY_IMAGENET = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
DIGITS = list("0123456789")
# name: where its published files lie in the folder that is given as its root
DATASETS = {"mnist": "MNIST/raw", "cifar10": "cifar-10-batches-py",
            "tiny-imagenet": "tiny-imagenet-200", "folder": ""}
PARTS = {"train": "train", "test": "test", "val": "test", "valid": "test", "validation": "test"}


def load_dataset(name, root=None, train=True, image_shape=(None, 32, 32), only=None,
                 classes=None):
    """(images, labels, data) of a dataset: (N, C, H, W) uint8, (N,) int64, dict.

    name: one of DATASETS.  root: the folder that holds it; None downloads into data/;
    MNIST_5K's name: the images of MNIST that ship with the code.  train: that part, or
    the test part; images and labels are None where there is none.  image_shape: (C, S,
    S) to bring the image files of a folder to; C None: grey if all are.  only: indices
    of classes, whose files alone are opened.  classes: the names of all, in the order
    of the labels, for a folder where some may be gone.  data: {"name", "source",
    "root", "classes"}.  Raises UserError if the folder does not hold it, or it cannot
    be downloaded."""
    folder = Path(root or "data")
    download = root is None  # into data/
    data = {"name": name, "source": str(folder), "root": os.path.abspath(folder)}
    try:
        # images: the pixels, or where they are to be read from image files, the paths
        if root == MNIST_5K.name:
            images, labels, data["classes"] = load_mnist_5k(train)
            data["root"] = root
        else:
            images, labels, data["classes"] = load_published(name, folder, train, download, classes)
    except UserError:
        raise
    except Exception as e:  # over damaged files torchvision fails in many ways
        if name == "mnist" and download:
            print(f"MNIST cannot be read or downloaded ({first_line(e)}): "
                  f"using the 5,000 images in {MNIST_5K.name}")
            return load_dataset("mnist", MNIST_5K.name, train, image_shape, only)
        raise UserError(f"{name} is damaged, not there, or cannot be downloaded ({first_line(e)}): "
                        f"its files belong in {folder / DATASETS[name]} (--data-root)") from e

    # Of the classes that are asked for, each has to be there, in the training part.
    wanted = range(len(data["classes"])) if only is None else only
    for i in wanted:
        if train and i not in labels:
            raise UserError(f"no images of the class {data['classes'][i]} in {folder} "
                            "(--data-root says where)")
    if len(labels) == 0:
        return None, None, data
    keep = torch.isin(labels, torch.tensor(wanted)).numpy()  # (N,) bool
    images = images[keep]
    if name == "tiny-imagenet":
        image_shape = (3, 64, 64)
    if isinstance(images, np.ndarray):  # paths
        images = read_images(images, image_shape)
    return images, labels[keep], data


def load_published(name, folder, train, download, classes):
    """(images or paths, labels, classes): a dataset by torchvision, or a folder."""
    if name == "mnist":
        dataset = MNIST(folder, train, download=download)
        return dataset.data[:, None], dataset.targets, DIGITS
    if name == "cifar10":
        dataset = CIFAR10(folder, train, download=download)
        # (N, H, W, C) -> (N, C, H, W)
        images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
        return images, torch.tensor(dataset.targets), dataset.classes
    if name == "tiny-imagenet":
        return list_tiny_imagenet(folder, train, download)
    return list_folder(folder, train, classes)


def load_mnist_5k(train):
    """The images of MNIST that ship with the code: they have no test part."""
    arrays = np.load(MNIST_5K)
    # all of them are for training
    n = len(arrays["labels"]) if train else 0
    images = torch.from_numpy(arrays["images"][:n])[:, None]
    return images, torch.from_numpy(arrays["labels"][:n]).long(), DIGITS


def list_tiny_imagenet(root, train, download):
    """(paths, labels, classes) of tiny ImageNet as it is published:
    train/WNID/images/, and val/images/, whose classes stand in val/val_annotations.txt.

    A class is its words in words.txt ("goldfish, Carassius auratus"), in the order of
    the WordNet ids (n01443537). Raises OSError or ValueError where it is not there."""
    folder = root / DATASETS["tiny-imagenet"]
    if download and not (folder / "wnids.txt").exists():
        download_and_extract_archive(TINY_IMAGENET, root, md5="90528d7ca1a48142e341f4ef8d21d0de")
    wnids = sorted((folder / "wnids.txt").read_text().split())  # the 200 classes
    index = {wnid: i for i, wnid in enumerate(wnids)}
    words = dict(read_rows(folder / "words.txt"))  # {id: words}
    classes = [words[wnid] for wnid in wnids]

    # Which files there are.
    annotations = folder / "val" / "val_annotations.txt"
    if train:
        files = list_images(folder / "train", index)
    elif annotations.exists():  # file name, WordNet id, and a bounding box
        files = [(f"{folder}/val/images/{name}", index[wnid])
                 for name, wnid, *_ in read_rows(annotations)]
    else:  # some sort the val part into class folders, too
        files = list_images(folder / "val", index)
    return *apart(files), classes


def apart(files):
    """[(path, label), ...] -> (an array of paths (N,), labels (N,))."""
    paths = [path for path, _ in files]
    return np.array(paths), torch.tensor([label for _, label in files])


def read_rows(path):
    """The rows of a text file, as lists of what stands between tabs."""
    lines = path.read_text().splitlines()
    return [line.split("\t") for line in lines if line.strip()]


def list_folder(root, train, classes):
    """(paths, labels, classes) of a folder with one sub-folder of images per class, or
    with train/ and test/ (or val/) of such. classes: as in load_dataset."""
    # The two parts, in any capitals. With other folders beside it, and no test part,
    # train/ is a class like them.
    parts = {}
    others = []
    for name, path in subfolders(root).items():
        part = PARTS.get(name.lower())
        if part is None or part in parts:
            others.append(name)
        else:
            parts[part] = path
    if "test" in parts and "train" not in parts:
        raise UserError(f"{root} has {parts['test'].name}/ but no train/: the folders of the "
                        "classes belong in train/")
    if others and "test" not in parts:
        parts = {}
    elif others:
        print(f"{root}: passing over the folders {', '.join(others)}")

    # The classes are the folders of the training part.
    here = parts.get("train", root)
    classes = classes or list(subfolders(here))
    if not classes:
        raise UserError(f"no classes in {here}: it needs a sub-folder of images for each")
    if not train:
        if "test" not in parts:
            return *apart([]), classes
        here = parts["test"]
    index = {}  # what a folder's images are labelled
    for name, path in subfolders(here).items():
        if name in classes:
            index[path.name] = classes.index(name)
    return *apart(list_images(here, index)), classes


def load_data_of(checkpoint, data_root=None, train=True, only=None):
    """The dataset that a checkpoint was trained on: (images, labels), or (None, None).
    data_root overrides its folder.  only: indices of the classes to read; the others
    may be gone.  Raises UserError if it is not there."""
    data = checkpoint.data
    root = data_root or data["root"]  # as in training
    if root is None and data["source"] == MNIST_5K.name:  # so it is with the shipped model
        root = MNIST_5K.name
    images, labels, _ = load_dataset(
        data["name"], root, train, checkpoint.config["image_shape"], only, data["classes"])
    return images, labels


def class_indices(names, classes):
    """Class names -> their indices, sorted; a name, or one of its words ("goldfish").
    A name counts as it is written, a word without regard to capitals. Raises UserError
    that lists the classes there are."""
    if names and not classes:
        raise UserError("this model has no names of classes: vdu.py takes --forget-images, and its "
                        "picture shows what came of it")
    indices = set()
    for name in names:
        name = unicodedata.normalize("NFC", name)  # an accent may be typed in two ways
        found = [i for i, c in enumerate(classes) if c == name]
        if not found:
            found = [i for i, c in enumerate(classes) if name.lower() in c.lower().split(", ")]
        if len(found) != 1:
            raise UserError(f"no class {name!r}, or more than one: choose among "
                            f"{'; '.join(classes)}")
        indices.update(found)
    return sorted(indices)


# --------------------------------------------------------------------------------------
# Image files and pixels

def subfolders(folder):
    """{name: path} of the folders in a folder, in order; names in Unicode's NFC. Raises
    UserError for two names that NFC makes equal."""
    found = {}
    for path in filter(Path.is_dir, folder.glob("*")):
        name = unicodedata.normalize("NFC", path.name)
        if name in found:
            raise UserError(f"{folder} has two folders that are both called {name}")
        if not name.startswith((".", "__MACOSX")):
            found[name] = path
    return dict(sorted(found.items()))


def list_images(folder, index):
    """[(path, label)] of the images in the sub-folders that `index` has labels for, and
    below them, in order; says which files of the folder it passes over. Links are
    followed; what is hidden, a file or a folder, is left out."""
    def is_image(path):
        inside = Path(path).relative_to(folder)
        hidden = any(part.startswith(".") for part in inside.parts)
        return inside.suffix.lower() in IMG_EXTENSIONS and os.path.isfile(path) and not hidden

    files = []
    if index:  # without a folder make_dataset ends in an error
        files = make_dataset(folder, index, is_valid_file=is_image, allow_empty=True)
    # The others are no images, hidden, or in no folder of a class.
    others = []
    for place, _, names in os.walk(folder, followlinks=True):
        others += [os.path.join(place, name) for name in names]
    others = sorted(set(others) - {path for path, _ in files})
    if others:
        print(f"{folder}: passing over {len(others)} files: {others[:3]!a} ...")
    return files


def open_image(path):
    """An image file as Pillow's RGB image: upright by its EXIF orientation, 16 bits a
    channel as 8, what is transparent over white. Pillow comes with torchvision."""
    with Image.open(path) as file:
        kind = file.format
        image = ImageOps.exif_transpose(file)
    unknown = image.mode == "I" and kind not in ("PNG", "PPM")  # in which "I" is 16 bits
    if image.mode == "F" or unknown:
        raise ValueError("its pixels are 32-bit numbers of unknown range")
    if image.mode.startswith("I"):  # one channel of 16 bits: 0 .. 65535 = 257 * 255
        grey = np.asarray(image)
        levels = (grey / 257).round()  # 0 .. 255
        levels[grey == image.info.get("transparency")] = 255  # the grey that is none
        image = Image.fromarray(levels.astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")  # what shows through
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def read_images(paths, image_shape):
    """Image files, centre-cropped to squares and resized: (N, C, S, S) uint8.
    image_shape: (C, S, S), C None: grey if all are.  Raises UserError, which names the
    file, for one that cannot be read."""
    channels = image_shape[0]
    size = image_shape[-1]
    images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)  # in colour, for now
    for i, path in enumerate(tqdm(paths, "reading images")):
        try:
            image = transforms.pil_to_tensor(open_image(path))  # (3, H, W) uint8
        except Exception as e:  # Pillow raises all kinds
            raise UserError(f"cannot read the image {path} ({first_line(e)})") from e
        side = min(image.shape[1:])  # of the largest square
        image = transforms.center_crop(image, [side, side])
        images[i] = transforms.resize(image, [size, size], antialias=True)

    # Grey is one channel: where all of these are, or where the model's images are.
    if channels != 3 and all((image == image[:1]).all() for image in images):
        return images[:, :1].clone()
    if channels == 1:
        return transforms.rgb_to_grayscale(images)
    return images


def load_images(folder, image_shape):
    """Every image in a folder and below it: (N, C, S, S). Raises UserError for none."""
    files = list_images(folder, {"": 0})
    if not files:
        raise UserError(f"no images in the folder {folder}: they end in "
                        f"{', '.join(IMG_EXTENSIONS)}")
    return read_images([path for path, _ in files], image_shape)


# --------------------------------------------------------------------------------------
# The command line

def parser():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--dataset", choices=DATASETS, default="mnist", help="default: mnist")
    add("--data-root", help="folder that holds it already (default: download to data/)")
    add("--image-size", type=number(int, 8), default=32, help="of --dataset folder: 32")
    add("--model", choices=NETWORKS, help="default: small on a CPU and for mnist")
    add("--output", help="default: checkpoints/DATASET.pt")
    add("--resume", action="store_true",
        help="continue the interrupted run in --output, with its own settings; only --data-root "
        "and --device are heard")
    add("--exclude-class", nargs="+", default=[], help="retrain without these classes")
    add("--steps", type=positive, help="default: as the model's settings say")
    add("--batch-size", type=positive, help="images per step (default: likewise)")
    add("--lr", type=number(float, 1e-12), help="the highest rate (default: likewise)")
    add_shared_flags(p)
    return p


if __name__ == "__main__":
    run_command_line(main, parser())
