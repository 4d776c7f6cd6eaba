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
         loss curve; and a grid of samples beside it, checkpoints/mnist.png. Ctrl-C
         saves what there is, and --resume goes on.
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
from torchvision.datasets.mnist import read_sn3_pascalvincent_tensor
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.transforms.v2 import functional as transforms
from tqdm import tqdm

from ddpm import (WEIGHTS, StopRequest, UserError, add_shared_flags, build, check_finite,
                  check_output, digest, first_line, number, pick_device, read_file,
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
    own.  n: of how many checkpoints. Made from these three, or without arguments and
    filled by `update`."""

    def __init__(self, mean=None, std=None, n=0):
        self.mean = mean or {}
        self.std = {k: s.clamp(min=SIGMA_FLOOR) for k, s in (std or {}).items()}
        self.n = n
        self.m2 = {}  # sums of squared deviations, while checkpoints come in

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
        buffers have no posterior and stay as they are; where files hold buffers, they
        must equal those of one file.  read: path -> {name: tensor}.  Raises UserError
        for fewer than two files, for equal ones, for numbers that are not finite, for
        those of another network, or for other buffers."""
        parameters = moving_parameters(net)
        buffers = dict(net.named_buffers())
        posterior = cls()
        digests = set()
        has_buffers = False  # of one of the files, or of one that holds none
        for path in paths:
            # Its parameters, which must be the network's.
            tensors = read(path)
            if not tensors:
                raise UserError(f"{path} holds no weights by name: save net.state_dict(), not net")
            theta = {k: tensors[k] for k in parameters if k in tensors}
            check_parameters(path, theta or tensors, parameters)
            check_finite(path, theta)
            digests.add(digest(theta.values()))
            for k, p in parameters.items():
                theta[k] = theta[k].to(p.device)
            posterior.update(theta)
            if all(torch.equal(tensors[k].to(v), v) for k, v in buffers.items() if k in tensors):
                has_buffers = True
        if len(digests) < max(2, len(paths)):
            raise UserError("a posterior needs two checkpoints or more, all different")
        if not has_buffers:  # running means of batches, for one
            raise UserError(f"the network's buffers ({', '.join(buffers)}) match none of these "
                            "files: load one of the checkpoints into it first")
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
        return GaussianPosterior(mean, std, self.n)


def all_to(tensors, device):
    """{name: tensor}, on another device."""
    return {k: v.to(device) for k, v in tensors.items()}


def moving_parameters(net):
    """{name: parameter} of those that require a gradient."""
    return {k: p for k, p in net.named_parameters() if p.requires_grad}


def check_parameters(what, theta, parameters):
    """Raise UserError unless theta has the names and shapes of the network's."""
    theirs = {k: tuple(v.shape) for k, v in theta.items()}
    ours = {k: tuple(v.shape) for k, v in parameters.items()}
    if theirs != ours or not ours:
        # three that differ, of each
        only_theirs = [item for item in theirs.items() if item not in ours.items()][:3]
        only_ours = [item for item in ours.items() if item not in theirs.items()][:3]
        raise UserError(f"the parameters of {what} do not match the network's (those that require "
                        f"a gradient): {only_theirs} ... there, {only_ours} ... here")


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
        self.loss = None   # a running mean
        self.losses = []   # (step, loss) along the way
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
            "losses": self.losses,
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
        self.losses = saved["losses"]
        self.loss = train["loss"]
        self.unet.load_state_dict(train["unet"])
        self.optimizer.load_state_dict(train["optimizer"])
        for name, value in train["posterior"].items():  # n, and dicts of tensors or None
            if isinstance(value, dict):
                value = all_to(value, device)
            setattr(self.posterior, name, value)
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

        # What is shown, and kept as the loss curve, is a mean over some 100 steps.
        self.step += 1
        if self.loss is None:
            self.loss = loss
        self.loss = 0.99 * self.loss + 0.01 * loss
        if self.step % max(1, steps // 200) == 0:
            self.losses.append((self.step, self.loss))
        return loss


def train(run, images, device):
    """DDPM's training (algorithm 1), which gathers the posterior on the way.

    run: a Run.  images: (N, C, H, W) uint8.  Raises UserError for a loss that is not
    finite, KeyboardInterrupt once an interrupted run is saved."""
    settings = run.settings
    steps = settings["steps"]
    B = min(settings["batch_size"], len(images))
    saved_step = run.step
    # The bar counts images: so its speed means the same at any batch size.
    bar = tqdm(total=steps * B, initial=run.step * B, desc="training", unit="img",
               unit_scale=True, dynamic_ncols=True)
    with StopRequest() as stop, bar:
        while run.step < steps:
            # A batch, mirrored or not.
            index = batch_indices(run.step, len(images), B, settings["seed"])
            x0 = images[index.to(images.device)]
            x0 = to_float(x0.to(device))  # (B, C, H, W)
            seed_step(settings["seed"], run.step)
            if settings["flip"]:
                x0 = mirror_half(x0)

            # A step.
            loss = run.take_step(x0)
            if not math.isfinite(loss):  # no step was taken: see training_step
                raise UserError(f"the loss became {loss} at step {run.step}, after saving step "
                                f"{saved_step}: try a smaller --lr than {settings['lr']:g}")
            bar.update(B)
            bar.set_postfix(loss=f"{run.loss:.4f}", step=run.step, posterior=run.posterior.n,
                            refresh=False)

            # Save now and then, on Ctrl-C, and at the end.
            finished = run.step == steps
            if stop.requested or finished or run.step % settings["save_every"] == 0:
                run.save()
                saved_step = run.step
            if stop.requested and not finished:
                bar.close()
                print(f"interrupted: saved step {run.step} of {steps} in {settings['output']}; "
                      "go on with --resume")
                raise KeyboardInterrupt
    run.unet.load_state_dict(run.theta())  # mu* from here on
    run.unet.eval()


def read_settings(args):
    """(settings, saved). Without --resume: the command line's, and None. With it: the
    file's settings, but --data-root and --save-every as typed, and its contents."""
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
    settings = {**vars(args), "output": output}
    if not args.resume:
        return settings, None

    # An interrupted run goes on with its own settings.
    saved = read_file(output)
    if not isinstance(saved, dict) or not {"train", "losses", "settings", "data"} <= set(saved):
        raise UserError(f"{output} is no interrupted run: there is nothing to resume")
    settings = dict(saved["settings"])
    settings.update(output=output, save_every=args.save_every)
    settings["overwrite"] = settings["overwrite"] or args.overwrite
    if root is not None:
        settings["data_root"] = root
    elif settings["data_root"] is not None:  # from whatever folder it is resumed
        settings["data_root"] = saved["data"]["root"]
    return settings, saved


def load_training_images(settings, saved):
    """(images, data) to train on: those of the dataset, less --exclude-class.
    Raises UserError if nothing is left, or if an interrupted run had others."""
    # A run that began on the images that ship with the code goes on with them.
    root = settings["data_root"]
    if saved is not None and saved["data"]["source"] == MNIST_5K.name:
        root = MNIST_5K
    size = settings["image_size"]  # for a folder, whose images have all sizes
    image_shape = (None, size, size) if settings["dataset"] == "folder" else None
    images, labels, data = load_dataset(settings["dataset"], root, image_shape=image_shape)

    classes = data["classes"]
    # Retraining leaves classes out.
    excluded = class_indices(settings["exclude_class"], classes)
    if len(excluded) == len(classes):
        raise UserError("--exclude-class names all classes: nothing is left to learn")
    keep = ~torch.isin(labels, torch.tensor(excluded))
    images = images[keep]
    labels = labels[keep]
    # What the file will say of its images. The digest tells them from any others.
    data.update(
        excluded=[classes[i] for i in excluded],
        images=len(images),
        counts=labels.bincount(minlength=len(classes)).tolist(),
        digest=digest([images, labels]))
    same = ("digest", "classes")
    if saved is not None and any(saved["data"][name] != data[name] for name in same):
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

    print(f"{title_of(data)}: {len(images):,} images of {'x'.join(map(str, image_shape))} "
          f"({data['source']}) in {len(data['classes'])} classes "
          f"({', '.join(data['classes'][:20])}), "
          f"{settings['model']} U-Net, {settings['steps']:,} steps of {settings['batch_size']} "
          f"on {device}")
    if device.type == "cuda" and images.nbytes < 2**32:
        images = images.to(device)  # under 4 GiB: once, not a batch at a time
    # Train, and draw what it has learned.
    run = Run(settings, config, data, device)
    if saved is not None:
        run.restore(saved, device)

    train(run, images, device)
    print(f"wrote {output}, loss {run.loss:.4f}")
    samples = run.diffusion.sample(run.unet, 64, image_shape, 25, seed=settings["seed"])
    write_images(grid, [to_uint8(samples)], settings["overwrite"])
    print(f"wrote {grid}, a grid of samples")


# --------------------------------------------------------------------------------------
# Datasets

MNIST_5K = Path(__file__).parent / "tests" / "data" / "mnist_5k.npz"
SHIPPED = MNIST_5K.with_name("mnist.pt")
TINY_IMAGENET = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
DIGITS = list("0123456789")
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
    folder = Path(root or "data")
    download = root is None  # into data/
    data = {"name": name, "source": "torchvision", "root": os.path.abspath(folder)}
    try:
        # images: the pixels, or where they are to be read from image files, the paths
        if folder == MNIST_5K:
            images, labels = load_mnist_5k(train)
            data.update(source=MNIST_5K.name, root=None, classes=DIGITS)
        elif name == "mnist":
            images, labels = load_mnist(folder, train, download)
            data["classes"] = DIGITS
        elif name == "cifar10":
            dataset = CIFAR10(folder, train, download=download)
            images = torch.from_numpy(dataset.data)  # (N, H, W, C)
            images = images.permute(0, 3, 1, 2).contiguous()
            labels = torch.tensor(dataset.targets)
            data["classes"] = dataset.classes
        elif name == "tiny-imagenet":
            images, labels, data["classes"] = list_tiny_imagenet(folder, train, download)
        elif name == "folder":
            images, labels, data["classes"] = list_folder(folder, train, classes)
            data["source"] = "folder"
        else:
            raise UserError(f"the dataset {name!r} is not known here: {', '.join(DATASETS)} are")
    except (UserError, PermissionError):
        raise
    except Exception as e:  # over damaged files torchvision fails in many ways
        if name == "mnist" and download and not list(folder.glob("MNIST/raw/*ubyte")):
            print(f"MNIST cannot be downloaded ({first_line(e)}): using the 5,000 images in "
                  f"{MNIST_5K.name}")
            return load_dataset("mnist", MNIST_5K, train, image_shape, only)
        raise UserError(f"{name} cannot be downloaded, or is damaged ({first_line(e)}): its "
                        f"published files belong in {folder / DATASETS[name]} (--data-root)") from e

    images, labels = only_classes(images, labels, data, only, train)
    if len(labels) == 0:
        return None, None, data
    if isinstance(images, list):
        images = read_images(images, image_shape or (3, 64, 64))
    return images, labels, data


def only_classes(images, labels, data, only, train):
    """(images, labels) of the classes that are asked for, of all where `only` is None.
    images: a tensor, or a list of paths. Raises UserError for one that has no training
    images."""
    wanted = data["classes"] if only is None else only
    # Each has to be there.
    indices = [data["classes"].index(name) for name in wanted]
    for name, i in zip(wanted, indices):
        if train and i not in labels:
            raise UserError(f"no images of the class {name} in {data['root']}")
    keep = torch.isin(labels, torch.tensor(indices))  # (N,) bool
    chosen = keep.nonzero().flatten()
    if isinstance(images, list):
        return [images[i] for i in chosen], labels[chosen]
    return images[chosen], labels[chosen]


def load_mnist_5k(train):
    """The images of MNIST that ship with the code: they have no test part."""
    arrays = np.load(MNIST_5K)
    # all of them are for training
    n = len(arrays["labels"]) if train else 0
    images = torch.from_numpy(arrays["images"][:n])[:, None]
    return images, torch.from_numpy(arrays["labels"][:n]).long()


def load_mnist(folder, train, download):
    """MNIST as it is published, in files named -idx3- or .idx3-. Raises any error."""
    if download:
        MNIST(folder, download=True)
    part = "train" if train else "t10k"
    raw = folder / DATASETS["mnist"]  # where torchvision puts them
    files = sorted(raw.glob(f"{part}-*idx?-ubyte"))  # images, then labels
    if len(files) != 2:
        raise ValueError(f"no {part}-images-idx3-ubyte and {part}-labels-idx1-ubyte, unpacked")
    images, labels = map(read_sn3_pascalvincent_tensor, files)
    if len(images) != len(labels):
        raise ValueError(f"{len(images):,} images, {len(labels):,} labels")
    return images[:, None], labels


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
        files = [(folder / "val" / "images" / name, index[wnid])
                 for name, wnid, *_ in read_rows(annotations)]
    else:  # some sort the val part into class folders, too
        files = list_images(folder / "val", index)
    return *apart(files), classes


def apart(files):
    """[(path, label), ...] -> ([path, ...], labels (N,))."""
    paths = [path for path, _ in files]
    return paths, torch.tensor([label for _, label in files])


def read_rows(path):
    """The rows of a text file, as lists of what stands between tabs."""
    lines = path.read_text().splitlines()
    return [line.split("\t") for line in lines if line.strip()]


def list_folder(root, train, classes):
    """(paths, labels, classes) of a folder with one sub-folder of images per class, or
    with train/ and test/ (or val/) of such. classes: as in load_dataset."""
    # train/ and a test part (the first, if there are several), in any capitals. With
    # other folders beside it, and no test part, train/ is a class like them.
    tests = []
    others = []
    here = root
    for name, path in subfolders(root).items():
        if name.lower() == "train" and here == root:
            here = path
        elif name.lower() in ("test", "val", "valid", "validation"):
            tests.append(path)
        else:
            others.append(name)
    if here == root and tests:
        raise UserError(f"{root} has {tests[0].name}/ but no train/: the folders of the classes "
                        "belong in train/")
    if others and not tests:
        here = root
    elif others:
        print(f"{root}: passing over the folders {', '.join(others)}")
    # The classes are the folders of the training part.
    classes = classes or list(subfolders(here))
    if not classes:
        raise UserError(f"no classes in {here}: it needs a sub-folder of images for each")
    if not train:
        if not tests:
            return [], torch.tensor([]), classes
        here = tests[0]
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
    # Where it is: as in training, if it is there still.
    root = data_root or data["root"]
    if data_root is None and data["source"] == MNIST_5K.name:
        root = MNIST_5K
    elif root is not None and not os.path.isdir(root):
        raise UserError(f"the dataset is not in {root} any more: say where with --data-root DIR")
    if only is not None:
        only = [data["classes"][i] for i in only]
    images, labels, _ = load_dataset(
        data["name"], root, train, checkpoint.config["image_shape"], only, data["classes"])
    return images, labels


def title_of(data):
    """What files of this dataset are called: mnist, or the name of the folder."""
    if data["name"] == "folder":
        return Path(data["root"]).name
    return data["name"]


def class_indices(names, classes):
    """Class names -> their indices, sorted; a name, or one of its words ("goldfish").
    A name counts as it is written, else without regard to capitals. Raises UserError
    that lists the classes there are, or those that a name could mean."""
    if names and not classes:
        raise UserError("this model has no names of classes: vdu.py takes --forget-images, and its "
                        "picture shows what came of it")
    indices = set()
    for name in names:
        name = unicodedata.normalize("NFC", name)  # an accent may be typed in two ways
        found = [i for i, c in enumerate(classes) if c == name]
        if not found:
            lower = name.lower()
            found = [i for i, c in enumerate(classes)
                     if lower == c.lower() or lower in c.lower().split(", ")]
        if len(found) != 1:
            could = [classes[i] for i in found] or classes
            raise UserError(f"no class {name!r}, or more than one: choose among {'; '.join(could)}")
        indices.update(found)
    return sorted(indices)


# --------------------------------------------------------------------------------------
# Image files and pixels

def subfolders(folder):
    """{name: path} of the folders in a folder, in order; names in Unicode's NFC. Raises
    UserError for two that differ in nothing else."""
    if not folder.is_dir():
        return {}
    found = {}
    for path in folder.iterdir():
        if path.is_dir() and not path.name.startswith((".", "__MACOSX")):
            name = unicodedata.normalize("NFC", path.name)
            if name in found:
                raise UserError(f"{folder} has two folders that are both called {name}")
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

    if not index:  # of which make_dataset makes an error
        return []
    files = make_dataset(folder, index, is_valid_file=is_image, allow_empty=True)
    # The others are no images, hidden, or in no folder of a class.
    taken = {path for path, _ in files}
    others = []
    for place, _, names in os.walk(folder, followlinks=True):
        paths = [os.path.join(place, name) for name in names]
        others += [path for path in paths if path not in taken]
    if others:
        print(f"{folder}: passing over {len(others)} files: {', '.join(others[:3])} ...")
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
    bar = tqdm(paths, "reading images", disable=len(paths) < 1000)
    for i, path in enumerate(bar):
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
    if not os.path.isdir(folder):
        raise UserError(f"{folder} is no folder: name one that holds the images")
    files = list_images(folder, {"": 0})
    if not files:
        raise UserError(f"no images in {folder}: they end in {', '.join(IMG_EXTENSIONS)}")
    return read_images([path for path, _ in files], image_shape)


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
    p.add_argument("--resume", action="store_true",
                   help="continue the interrupted run in --output, with its own settings; only "
                   "--data-root, --device and --save-every are heard")
    p.add_argument("--exclude-class", nargs="+", default=[], help="retrain without these classes")
    p.add_argument("--steps", type=number(int, 1), help="default: as the model's settings say")
    p.add_argument("--batch-size", type=number(int, 1), help="images per step (default: likewise)")
    p.add_argument("--lr", type=number(float, 1e-12), help="the highest rate (default: likewise)")
    p.add_argument("--save-every", type=number(int, 1), default=1000, help="steps (default: 1000)")
    add_shared_flags(p)
    return p


if __name__ == "__main__":
    run_command_line(lambda: main(parser().parse_args()))
