"""Train the DDPM that is to forget something later, with the posterior that VDU needs.

    python train_ddpm.py --dataset mnist
    python train_ddpm.py --dataset folder --data-root my_images --image-size 32

Holds    the training loop, what it keeps of the weights, and the datasets.
Reads    MNIST, CIFAR-10, tiny ImageNet (downloaded into data/, or in --data-root), or a
         folder of images, one sub-folder per class; for MNIST without a network, the
         5,000 images in tests/data/mnist_5k.npz.
Writes   checkpoints/mnist.pt: theta* = mu*, posterior (mu*, sigma*), settings, data,
         loss curve; and a grid of samples beside it, checkpoints/mnist.png.
Paper    VDU (arXiv 2510.04058): theta* was trained on D = D_r and D_f, and mu* and
         sigma* are the mean and standard deviation of each parameter over training
         checkpoints. Here those are the weights along the last part of one run, at a
         constant learning rate, folded into running sums as they pass. SGD at a
         constant rate wanders around its optimum, widely where the loss is flat: to
         first order its distribution is the posterior's (Mandt et al. 2017; SWAG,
         Maddox et al. 2019).
"""

import argparse
import contextlib
import io
import math
import os
import socket
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.datasets import CIFAR10, MNIST
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.transforms.v2 import functional as transforms
from torchvision.utils import save_image
from tqdm import tqdm

from ddpm import (ArgumentParser, StopRequest, UserError, add_shared_flags, build,
                  check_checkpoint_name, check_outputs, count, digest, fill_in, first_line,
                  number, peak_memory, pick_device, read_file, run_command_line, save_checkpoint,
                  training_step)

# --------------------------------------------------------------------------------------
# Settings


def small_network(image_shape):
    """(UNet's arguments, settings) for two CPU cores: MNIST in a quarter of an hour,
    colour in half an hour. It works on 2x2 patches, larger ones of larger images.
    """
    C, H, W = image_shape
    grey = C == 1  # attention at 7x7, too, would cost MNIST a third more time per step
    return (dict(in_channels=C, model_channels=32 if grey else 48, channel_mult=(1, 2, 4),
                 num_res_blocks=1, attention_resolutions=() if grey else (2,), num_heads=4,
                 patch_size=min(4, -(-H // 16))),
            dict(steps=5500 if grey else 3500, batch_size=64, lr=2e-3, schedule="cosine",
                 velocity=True, flip=not grey))


def base_network(image_shape):
    """DDPM's network for CIFAR-10 and its training (Ho et al. 2020), for a GPU:
    35.7M parameters, attention at 16x16, eps predicted directly.
    """
    C, H, W = image_shape
    return (dict(in_channels=C, model_channels=128, channel_mult=(1, 2, 2, 2),
                 num_res_blocks=2, attention_resolutions=(max(1, round(H / 16)),), num_heads=1,
                 dropout=0.1),
            dict(steps=200_000, batch_size=128, lr=2e-4, schedule="linear", velocity=False,
                 flip=C == 3))


NETWORKS = {"small": small_network, "base": base_network}


def posterior_start(args):
    """The step from which the weights enter the posterior."""
    return int(args.steps * (1 - args.posterior_fraction))


def learning_rate(step, args):
    """Warm up over 200 steps, fall to a tenth, hold it while the posterior gathers.

    The fall settles the weights; the constant rate keeps them wandering about one
    optimum, whose spread is sigma*.
    """
    warmup = min(1.0, (step + 1) / 200)
    return args.lr * warmup * max(0.1, 1 - 0.9 * step / max(1, posterior_start(args)))


# --------------------------------------------------------------------------------------
# Training


class RunningPosterior:
    """mu* and sigma* of weights that pass by one at a time (Welford 1962)."""

    def __init__(self, named_parameters):
        self.n = 0
        self.mean = {k: torch.zeros_like(p, dtype=torch.float32) for k, p in named_parameters}
        self.m2 = {k: torch.zeros_like(m) for k, m in self.mean.items()}  # squared deviations

    @torch.no_grad()
    def update(self, named_parameters):
        self.n += 1
        for name, p in named_parameters:
            deviation = p - self.mean[name]  # from the old mean
            self.mean[name] += deviation / self.n
            self.m2[name] += deviation * (p - self.mean[name])  # times that from the new one

    def posterior(self):
        """{"mean", "std": the unbiased estimate, "n"}; None of fewer than two."""
        if self.n < 2:
            return None
        std = {k: (m2 / (self.n - 1)).sqrt() for k, m2 in self.m2.items()}
        return {"mean": self.mean, "std": std, "n": self.n}

    def state_dict(self):
        return {"n": self.n, "mean": self.mean, "m2": self.m2}

    def load_state_dict(self, state):
        self.n = state["n"]
        for mine, theirs in ((self.mean, state["mean"]), (self.m2, state["m2"])):
            for k, v in theirs.items():
                mine[k].copy_(v)


class Training:
    """All that changes while training: network, optimizer, posterior, step, losses."""

    def __init__(self, args, config, data, device):
        self.args, self.config, self.data, self.device = args, config, data, device
        self.unet, self.diffusion = build(config, device)
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), lr=args.lr, betas=(0.9, 0.99),
                                           weight_decay=0.0, fused=device.type != "mps")
        self.running = RunningPosterior(self.unet.named_parameters())
        self.step = self.saved = 0
        self.loss, self.losses = None, []  # losses: (step, moving average), about 200

    def update(self, x0):
        """One step on images x0 (B, C, H, W). Raises UserError for an infinite loss."""
        args = self.args
        self.optimizer.param_groups[0]["lr"] = learning_rate(self.step, args)
        loss = training_step(self.unet, self.diffusion, self.optimizer, x0)
        if not math.isfinite(loss):
            kept = f"{args.output} still holds step {self.saved}; " if self.saved else ""
            raise UserError(f"the loss became {loss} at step {self.step}; {kept}try a smaller --lr "
                            f"than {args.lr:g}")
        last = self.step == args.steps - 1
        if self.step >= posterior_start(args) and (last or self.step % args.posterior_every == 0):
            self.running.update(self.unet.named_parameters())
        self.step += 1
        self.loss = loss if self.loss is None else 0.99 * self.loss + 0.01 * loss
        if self.step % max(1, args.steps // 200) == 0:
            self.losses.append((self.step, self.loss))

    def theta_star(self):
        """The weights to sample from: mu*, or those of this step before it begins."""
        return self.running.mean if self.running.n > 1 else self.unet.state_dict()

    def save(self):
        """Write the checkpoint; "train" is for --resume, and goes once it is done."""
        contents = {
            "config": self.config, "data": self.data, "step": self.step, "losses": self.losses,
            "settings": vars(self.args), "weights": self.theta_star(),
            "posterior": self.running.posterior(),
        }
        if self.step < self.args.steps:
            contents["train"] = {"unet": self.unet.state_dict(), "loss": self.loss,
                                 "optimizer": self.optimizer.state_dict(),
                                 "running": self.running.state_dict()}
        save_checkpoint(self.args.output, contents)
        self.saved = self.step

    def load(self, saved):
        """Continue from what `save` wrote. Raises UserError if it saw other images."""
        for key in ("classes", "excluded", "images", "digest"):
            if saved["data"].get(key) != self.data[key]:
                raise UserError(f"{self.args.output} was trained on other images ({key}: "
                                f"{saved['data'].get(key)}, not {self.data[key]}): use its "
                                "--data-root")
        self.unet.load_state_dict(saved["train"]["unet"])
        self.optimizer.load_state_dict(saved["train"]["optimizer"])
        self.running.load_state_dict(saved["train"]["running"])
        self.step = self.saved = saved["step"]
        self.loss, self.losses = saved["train"]["loss"], saved["losses"]


def seed_step(seed, step):
    """Seed what a training step draws (t, noise, mirrors) by (seed, step) alone, so
    that --resume needs no saved state of random numbers, on any device."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step)).generate_state(1)[0]))


def batch_indices(step, n, batch_size, seed):
    """Which images step number `step` sees: a function of the arguments alone, so that
    --resume needs no loader's state."""
    epoch, i = divmod(step, n // batch_size)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    return order[i * batch_size : (i + 1) * batch_size]


def train(args):
    """Run the command line. Raises UserError for what the user can put right."""
    saved = settle_output(args)
    device = pick_device(args.device)
    images, data = training_images(args, saved)
    config = settle_network(args, tuple(images.shape[1:]), device)
    if device.type == "cuda" and images.nbytes < 2**32:
        images = images.to(device)  # once, not a batch at a time
    torch.manual_seed(args.seed)
    run = Training(args, config, data, device)
    if saved is not None:
        run.load(saved)
    B = min(args.batch_size, len(images))
    print(f"{title_of(data)}: {len(images):,} images of {'x'.join(map(str, images.shape[1:]))} "
          f"({data['source']}) in {len(data['classes'])} classes ({', '.join(data['classes'][:20])}"
          f"{', ...' * (len(data['classes']) > 20)}), {args.model} U-Net of "
          f"{count(sum(p.numel() for p in run.unet.parameters()))} parameters, "
          f"{args.steps:,} steps of {B} on {device}")

    began = time.time()
    bar = tqdm(total=args.steps * B, initial=run.step * B, desc="training", unit="img",
               unit_scale=True, dynamic_ncols=True)
    with StopRequest() as stop, bar:
        while run.step < args.steps:
            index = batch_indices(run.step, len(images), B, args.seed).to(images.device)
            x0 = to_float(images[index].to(device))  # (B, C, H, W)
            seed_step(args.seed, run.step)
            run.update(mirror_half(x0) if args.flip else x0)
            bar.update(B)
            bar.set_postfix(loss=f"{run.loss:.4f}", step=run.step, posterior=run.running.n,
                            refresh=False)
            done = run.step == args.steps
            if stop.requested or done or run.step % args.save_every == 0:
                run.save()
            if stop.requested and not done:
                bar.close()
                print(f"interrupted: saved step {run.step} of {args.steps} in {args.output}; "
                      "continue with --resume")
                raise KeyboardInterrupt
    curve = " ".join(f"{loss:.4f}" for _, loss in run.losses[:: max(1, len(run.losses) // 9)])
    print(f"wrote {args.output} ({time.time() - began:.0f} s, peak memory {peak_memory(device)}); "
          f"loss along the way: {curve}")

    run.unet.load_state_dict(run.theta_star())
    samples = run.diffusion.sample(run.unet.eval(), 64, images.shape[1:], 25, seed=args.seed)
    grid = Path(args.output).with_suffix(".png")
    save_image(samples / 2 + 0.5, grid)
    print(f"wrote {grid}, a grid of samples")


def settle_output(args):
    """Fill in args.output; with --resume the saved settings, too, and return it."""
    if args.dataset == "folder" and args.data_root is None:
        raise UserError("--dataset folder needs --data-root DIR, a folder with one sub-folder of "
                        "images for each class")
    if args.image_size is not None and args.dataset != "folder":
        raise UserError("--image-size is for --dataset folder; the others have their own size")
    folder = args.dataset == "folder"
    stem = os.path.basename(os.path.abspath(args.data_root)) if folder else args.dataset
    args.output = args.output or f"checkpoints/{stem}.pt"
    check_checkpoint_name(args.output)
    if os.path.exists(args.output) and not args.overwrite and not args.resume:
        raise UserError(f"{args.output} exists already; --resume continues it, --overwrite "
                        "replaces it, --output FILE goes elsewhere")
    saved = resume_settings(args) if args.resume else None
    check_outputs([args.output], overwrite=True)
    check_outputs([Path(args.output).with_suffix(".png")], args.overwrite)
    return saved


def resume_settings(args):
    """The saved run, whose settings become those of args; refuses other flags."""
    saved = read_file(args.output)
    if not isinstance(saved, dict) or not isinstance(saved.get("settings"), dict):
        raise UserError(f"{args.output} is not a checkpoint of train_ddpm.py")
    if "train" not in saved:
        raise UserError(f"{args.output} is finished ({saved['step']} steps): nothing to resume; "
                        "--overwrite starts anew")
    defaults = vars(parser().parse_args([]))
    for name, value in saved["settings"].items():
        if name in ("output", "overwrite", "resume", "device", "save_every"):
            continue
        if name == "data_root" and args.data_root is not None:
            continue
        mine = getattr(args, name, None)
        if mine not in (value, defaults.get(name)):
            raise UserError(f"{args.output} was begun with --{name.replace('_', '-')} {value}; "
                            f"--resume cannot change it to {mine}")
        setattr(args, name, value)
    return saved


def training_images(args, saved=None):
    """(uint8 images (N, C, H, W), data) of the dataset, less --exclude-class."""
    size = args.image_size or 32
    shape = (None, size, size) if args.dataset == "folder" else None
    shipped = saved is not None and saved["data"]["source"] == MNIST_5K.name
    images, labels, data = (load_mnist_5k() if shipped else
                            load_dataset(args.dataset, args.data_root, image_shape=shape))
    excluded = class_indices(args.exclude_class, data)
    keep = ~torch.isin(labels, torch.tensor(excluded))
    if not keep.any():
        raise UserError("--exclude-class names all classes: nothing is left to learn")
    images, labels = images[keep], labels[keep]
    counts = labels.bincount(minlength=len(data["classes"])).tolist()
    return images, {**data, "excluded": [data["classes"][i] for i in excluded],
                    "images": len(images), "counts": counts, "digest": digest([images, labels])}


def settle_network(args, image_shape, device):
    """Fill in what the network decides (model, steps, lr, ...); the config to build."""
    # The paper's networks want a GPU; on a CPU and for MNIST the small one does.
    large = device.type != "cpu" and args.dataset != "mnist"
    args.model = args.model or ("base" if large else "small")
    unet, defaults = NETWORKS[args.model](image_shape)
    fill_in(args, defaults)
    return {"unet": unet, "schedule": args.schedule, "timesteps": args.timesteps,
            "velocity": args.velocity, "image_shape": image_shape}


# --------------------------------------------------------------------------------------
# Datasets. A loader is called as load(root, train, image_shape, only), and returns
# uint8 images (N, C, H, W), int64 labels (N,), and what a checkpoint remembers of them.
#   root         the folder that holds it; None downloads into data/
#   train        or the test part; images and labels are None where there is none
#   image_shape  (C, H, W) to bring files to; None: its own; C None: grey if all are
#   only         names of the classes to read, and nothing of any other; None: all

MNIST_5K = Path(__file__).parent / "tests" / "data" / "mnist_5k.npz"
SHIPPED = Path(__file__).parent / "tests" / "data" / "mnist.pt"
TINY_IMAGENET = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"


def load_dataset(name, root=None, train=True, image_shape=None, only=None):
    """The dataset `name`: (images, labels, data), by its loader, above.

    data: {"name", "source", "root", "classes", ...}.  Raises UserError if the folder
    does not hold it, or it cannot be downloaded.
    """
    if name not in LOADERS:
        raise UserError(f"{name} is not a dataset that is known here, but {', '.join(LOADERS)} are")
    images, labels, data = LOADERS[name](root, train, image_shape, only)
    return images, labels, {"name": name, "source": "torchvision", **data}


def of_classes(images, labels, classes, only):
    """The images and labels of the classes `only`; all for None."""
    if only is None:
        return images, labels
    keep = torch.isin(labels, torch.tensor([classes.index(name) for name in only]))
    return images[keep], labels[keep]


@contextlib.contextmanager
def quiet_download():
    """torchvision prints a paragraph per mirror that fails, and waits for ever on
    one that does not answer."""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        socket.setdefaulttimeout(timeout)


def load_mnist(root, train, image_shape=None, only=None):
    data = {"root": os.path.abspath(root or "data"), "classes": [str(d) for d in range(10)]}
    raw = Path(root or "data") / "MNIST" / "raw"
    try:
        with quiet_download():
            dataset = MNIST(root or "data", train=train, download=root is None)
        sizes = [len(dataset.data), len(dataset.targets)]
        if sizes != [60_000 if train else 10_000] * 2:
            raise ValueError(f"{sizes[0]:,} images and {sizes[1]:,} labels")
    except Exception as e:  # over damaged files torchvision stumbles in many ways
        if any(raw.glob("*-ubyte")):
            raise UserError(f"MNIST in {raw} is damaged, or not all there ({first_line(e)}): "
                            "remove that folder and leave --data-root away to download it") from e
        if root is not None:
            raise UserError(f"no MNIST in {root}: expected {raw} as torchvision lays it out; leave "
                            "--data-root away to download it") from e
        print(f"no network to download MNIST ({first_line(e)}): using the 5,000 MNIST images in "
              f"{MNIST_5K.name}")
        return load_mnist_5k(root, train, image_shape, only)
    images = dataset.data[:, None]  # (N, 28, 28) -> (N, 1, 28, 28)
    return *of_classes(images, dataset.targets, data["classes"], only), data


def load_mnist_5k(root=None, train=True, image_shape=None, only=None):
    """The 5,000 training images that ship with the code, 500 per digit."""
    data = {"name": "mnist", "source": MNIST_5K.name, "root": None,
            "classes": [str(d) for d in range(10)]}
    if not train:
        return None, None, data
    arrays = np.load(MNIST_5K)
    images, labels = (torch.from_numpy(arrays[name]) for name in ("images", "labels"))
    return *of_classes(images[:, None], labels.long(), data["classes"], only), data


def load_cifar10(root, train, image_shape=None, only=None):
    try:
        with quiet_download():
            dataset = CIFAR10(root or "data", train=train, download=root is None)
    except Exception as e:  # missing, damaged, or not to be had
        folder = "cifar-10-batches-py"
        raise UserError(no_dataset("CIFAR-10", root, folder, CIFAR10.url, e)) from e
    images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()  # (N, 3, 32, 32)
    data = {"root": os.path.abspath(root or "data"), "classes": dataset.classes}
    return *of_classes(images, torch.tensor(dataset.targets), data["classes"], only), data


def no_dataset(title, root, folder, url, error):
    """What to do about a dataset that is neither here nor to be had."""
    if root is not None:
        return (f"no {title} in {root}: expected {Path(root) / folder} ({first_line(error)}); "
                "leave --data-root away to download it")
    return (f"{title} cannot be downloaded ({first_line(error)}); where there is a network, fetch "
            f"{url} and unpack it, then say with --data-root DIR which folder holds {folder}")


def load_tiny_imagenet(root, train, image_shape=None, only=None):
    """In its published layout: train/WNID/images/*.JPEG; val/images/*.JPEG with
    val/val_annotations.txt; words.txt, whose words ("goldfish, Carassius auratus") go
    into data["words"]. Classes are WordNet ids (n01443537).
    """
    folder = Path(root or "data") / "tiny-imagenet-200"
    try:
        if root is None and not (folder / "wnids.txt").exists():
            with quiet_download():
                download_and_extract_archive(TINY_IMAGENET, "data",
                                             md5="90528d7ca1a48142e341f4ef8d21d0de")
        classes = sorted((folder / "wnids.txt").read_text().split())
        lines = (folder / "words.txt").read_text().splitlines()
        words = dict(line.split("\t", 1) for line in lines if line.strip())
        files = (tiny_imagenet_train if train else tiny_imagenet_val)(folder, classes)
    except (RuntimeError, OSError, ValueError, IndexError) as e:
        raise UserError(no_dataset("tiny ImageNet", root, folder.name, TINY_IMAGENET, e)) from e
    empty = sorted(set(range(len(classes))) - {label for _, label in files})
    if empty:
        raise UserError(f"{folder} is not all there: no images of {classes[empty[0]]} and of "
                        f"{len(empty) - 1} more classes; unpack it again")
    files = [(p, i) for p, i in files if only is None or classes[i] in only]
    images, labels = read_labelled(files, image_shape or (3, 64, 64))
    return images, labels, {"root": str(folder.parent.resolve()), "classes": classes,
                            "words": {wnid: words.get(wnid, wnid) for wnid in classes}}


def tiny_imagenet_train(folder, classes):
    folders = [folder / "train" / wnid / "images" for wnid in classes]
    return [(p, i) for i, images in enumerate(folders) for p in sorted(images.glob("*.JPEG"))]


def tiny_imagenet_val(folder, classes):
    """Annotations: file name, WordNet id and a bounding box, between tabs."""
    lines = (folder / "val" / "val_annotations.txt").read_text().splitlines()
    rows = [line.split("\t") for line in lines if line.strip()]
    return [(folder / "val" / "images" / row[0], classes.index(row[1])) for row in rows]


def load_folder(root, train, image_shape=None, only=None):
    """One sub-folder of images per class; or such as train/ and test/ (or val/)."""
    if not subfolders(Path(root)):
        raise UserError(f"no folder of classes at {root}: it needs one sub-folder of images for "
                        "each")
    training, test = folder_parts(Path(root))
    data = {"source": "folder", "root": os.path.abspath(root)}
    here = training if train else test
    if here is None:
        return None, None, data
    loose = sum(map(is_image, here.iterdir()))
    if loose:
        print(f"{here}: passing over {loose} images that lie in no class's folder")
    classes, folders, files = list(subfolders(training)), subfolders(here), []
    wanted = classes if only is None else only
    if set(wanted) - set(classes):
        raise UserError(f"the classes in {training} are {', '.join(classes[:20])}: no folder of "
                        f"{', '.join(set(wanted) - set(classes))}")
    for name in wanted:
        found = image_files(folders[name]) if name in folders else []
        if train and not found:
            raise UserError(f"no images of the class {name} in {here}")
        files += [(path, classes.index(name)) for path in found]
    images, labels = read_labelled(files, image_shape or (None, 32, 32), here)
    return images, labels, {**data, "classes": classes}


def folder_parts(folder):
    """(folder to train on, folder to test on or None), by the names that are usual."""
    inside = {name.lower(): path for name, path in subfolders(folder).items()}
    for name in ("train", "training"):
        if name in inside and subfolders(inside[name]):
            tests = [inside[n] for n in ("test", "testing", "val", "validation") if n in inside]
            return inside[name], (tests or [None])[0]
    return folder, None


def subfolders(folder):
    """{name: path} of the folders in a folder, in order; names in Unicode's NFC."""
    paths = folder.iterdir() if folder.is_dir() else ()
    found = {unicodedata.normalize("NFC", p.name): p for p in paths
             if p.is_dir() and not p.name.startswith(".")}
    return dict(sorted(found.items()))


LOADERS = {"mnist": load_mnist, "cifar10": load_cifar10, "tiny-imagenet": load_tiny_imagenet,
           "folder": load_folder}


def load_data_of(checkpoint, data_root=None, train=True, only=None):
    """The dataset that a checkpoint was trained on: (images, labels), or (None, None).

    data_root overrides its folder.  only: indices of the classes to read, of which
    alone there need be anything left.  Raises UserError if other classes are there.
    """
    data = checkpoint.data
    names = only if only is None else [data["classes"][i] for i in only]
    if data_root is None and data["source"] == MNIST_5K.name:
        return load_mnist_5k(None, train, None, names)[:2]
    root = data_root or data["root"]
    if data_root is None and root is not None and not os.path.isdir(root):
        raise UserError(f"{checkpoint.path} was trained on {data['name']} in {root}, which is not "
                        "there; say where with --data-root DIR")
    images, labels, found = load_dataset(data["name"], root, train,
                                         checkpoint.config["image_shape"], names)
    classes = found.get("classes", data["classes"])
    if classes == data["classes"]:
        return images, labels
    if names is None:
        raise UserError(f"the classes in {root} are {', '.join(classes[:20])}, and not those that "
                        f"{checkpoint.path} was trained on, {', '.join(data['classes'][:20])}; say "
                        "where those are with --data-root DIR")
    of_name = {name: i for i, name in enumerate(data["classes"])}  # some are gone: count as it did
    return images, torch.tensor([of_name[classes[i]] for i in labels.tolist()])


# --------------------------------------------------------------------------------------
# Image files, classes, pixels


def is_image(path):
    hidden = path.name.startswith(".")
    return path.suffix.lower() in IMG_EXTENSIONS and not hidden and path.is_file()


def image_files(folder):
    """The images in a folder and below it, in order; says what it passes over."""
    files = [p for p in sorted(Path(folder).rglob("*")) if p.is_file() and not any(
        name.startswith(".") for name in p.relative_to(folder).parts)]
    images = [p for p in files if is_image(p)]
    if len(images) < len(files):
        endings = sorted({p.suffix.lower() or p.name for p in files} - set(IMG_EXTENSIONS))
        print(f"{folder}: passing over {len(files) - len(images)} files, by their endings "
              f"({', '.join(endings[:5])}); if they are images that matter, convert them to PNG")
    return images


def read_labelled(files, image_shape, folder=""):
    """(path, label) pairs -> images (N, C, H, W), labels (N,)."""
    if not files:
        raise UserError(f"no images in {folder}")
    labels = torch.tensor([label for _, label in files])
    return read_images([path for path, _ in files], image_shape), labels


def open_image(path):
    """An image file as Pillow's RGB image: upright by its EXIF orientation, 16 bits a
    channel as 8, what is transparent over white. Pillow comes with torchvision.
    """
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


def read_image(path, size):
    """An image file, centre-cropped to a square and resized: (3, size, size) uint8."""
    try:
        image = transforms.pil_to_tensor(open_image(path))  # (3, H, W) uint8
    except Exception as e:  # Pillow raises all kinds
        raise UserError(f"cannot read the image {path} ({first_line(e)}): remove it, or convert "
                        "it to PNG") from e
    image = transforms.center_crop(image, [min(image.shape[1:])] * 2)
    if image.shape[1] == size:
        return image
    return transforms.resize(image, [size, size], antialias=True)


def read_images(paths, image_shape):
    """Image files as squares: (N, C, S, S). image_shape: (C, S, S), C None: grey if all
    are. Raises UserError, which names the file, for one that cannot be read.
    """
    channels, size = image_shape[0], image_shape[-1]
    images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
    pool = ThreadPoolExecutor(os.cpu_count())  # decoding leaves Python's lock free
    try:
        decoded = pool.map(read_image, paths, [size] * len(paths))
        for i, image in enumerate(tqdm(decoded, total=len(paths), desc="reading images",
                                       unit="image", disable=len(paths) < 1000)):
            images[i] = image
    finally:
        pool.shutdown(cancel_futures=True)  # an error or Ctrl-C waits for no further file
    if channels == 3:
        return images
    grey = all(torch.equal(c[:, :1].expand_as(c), c) for c in images.split(1000))
    if channels is None and not grey:
        return images
    return images[:, :1].clone() if grey else transforms.rgb_to_grayscale(images)


def load_images(folder, image_shape):
    """Every image in a folder and below it: (N, C, S, S). Raises UserError for none."""
    paths = image_files(folder) if os.path.isdir(folder) else []
    if not paths:
        raise UserError(f"no images in {folder}: expected a folder with files ending in "
                        f"{', '.join(IMG_EXTENSIONS)}")
    return read_images(paths, image_shape)


def title_of(data):
    """What files of this dataset are called: mnist, or the name of the folder."""
    return Path(data["root"]).name if data["name"] == "folder" else data["name"]


def class_indices(names, data):
    """Class names -> their indices; of tiny ImageNet a word does as well ("goldfish").

    A name counts as it is written, else without regard to capitals. Raises UserError
    that lists the classes there are, or those that a name could mean.
    """
    classes, words = data["classes"], data.get("words", {})
    titles = [f"{c} ({words[c]})" if c in words else c for c in classes]
    spellings = [[c, *([words[c], *words[c].split(", ")] if c in words else [])] for c in classes]
    indices = set()
    for name in names:
        name = unicodedata.normalize("NFC", name)
        found = [i for i, c in enumerate(classes) if name == c] or [
            i for i, of_class in enumerate(spellings)
            if name.lower() in [spelling.lower() for spelling in of_class]]
        if not found:
            raise UserError(f"no class {name!r}; the classes are: {', '.join(titles)}")
        if len(found) > 1:
            raise UserError(f"{name!r} could be {' or '.join(titles[i] for i in found)}: give it "
                            "as it stands there")
        indices.add(found[0])
    return sorted(indices)


def mirror_half(x):
    """Mirror each of the images (B, C, H, W), or not, at even odds."""
    return torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x.flip(3), x)


def to_float(images):
    """uint8 0 .. 255 -> float32 -1 .. 1, the range in which the diffusion works."""
    return images.float() / 127.5 - 1


def to_uint8(images):
    """float -1 .. 1 -> uint8 0 .. 255, rounded."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


# --------------------------------------------------------------------------------------
# The command line


def parser():
    small, base = (network((3, 32, 32))[1] for network in NETWORKS.values())
    grey = small_network((1, 28, 28))[1]

    def default(name):
        of_grey = f"{grey[name]} if grey, " if grey[name] != small[name] else ""
        return f"(default: {small[name]} for small, {of_grey}{base[name]} for base)"

    p = ArgumentParser(prog="train_ddpm.py", description=__doc__)
    p.add_argument("--dataset", choices=LOADERS, default="mnist",
                   help="what to learn; folder: your own images, one sub-folder per class")
    p.add_argument("--data-root", metavar="DIR",
                   help="folder that holds the dataset already (default: download into data/); "
                        "with --dataset folder the one with the classes, or with train/ and test/ "
                        "folders of classes")
    p.add_argument("--image-size", type=number(int, 8), metavar="N",
                   help="with --dataset folder: crop images to squares and resize them to NxN "
                        "(default: 32)")
    p.add_argument("--model", choices=NETWORKS,
                   help="small: for two CPU cores; base: DDPM's 35.7M parameters, for a GPU "
                        "(default: small on a CPU and for mnist, otherwise base)")
    p.add_argument("--output", metavar="FILE",
                   help="checkpoint to write (default: checkpoints/DATASET.pt)")
    p.add_argument("--resume", action="store_true",
                   help="continue an interrupted run, to the result it would have had")
    p.add_argument("--exclude-class", nargs="+", default=[], metavar="CLASS",
                   help="leave these classes out: the model retrained without them is the oracle "
                        "of unlearning")
    p.add_argument("--steps", type=number(int, 1), help=f"gradient steps {default('steps')}")
    p.add_argument("--batch-size", type=number(int, 1),
                   help="images per step; small batches and many steps win on a CPU "
                        f"{default('batch_size')}")
    p.add_argument("--lr", type=number(float, 0, above=True),
                   help=f"AdamW's highest learning rate {default('lr')}")
    p.add_argument("--schedule", choices=("linear", "cosine"),
                   help=f"noise schedule {default('schedule')}")
    p.add_argument("--flip", action=argparse.BooleanOptionalAction,
                   help="mirror half of the images (default: for colour images)")
    p.add_argument("--timesteps", type=number(int, 25), default=1000,
                   help="T, the length of the diffusion")
    p.add_argument("--posterior-fraction", type=number(float, 0, 1, above=True), default=0.25,
                   help="share of training, at its end, over which the weights' mean and spread "
                        "become the posterior")
    p.add_argument("--posterior-every", type=number(int, 1), default=5, metavar="N",
                   help="take every N-th step's weights into it")
    p.add_argument("--save-every", type=number(int, 1), default=1000, metavar="N",
                   help="save every N steps, in case the machine stops")
    add_shared_flags(p)
    return p


if __name__ == "__main__":
    run_command_line(lambda: train(parser().parse_args()))
