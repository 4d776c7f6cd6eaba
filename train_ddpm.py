"""Train the DDPM that is to forget something later, and keep the posterior p(theta | D) that VDU needs for it.

    python train_ddpm.py --dataset mnist
    python train_ddpm.py --dataset folder --data-root my_images --image-size 32

Holds    the datasets, the network sizes and the training loop.
Reads    MNIST, CIFAR-10 and tiny ImageNet (downloaded into data/, or found in --data-root), or a folder of images, one
         sub-folder a class; for MNIST without a network, the 5,000 images in tests/data/mnist_5k.npz.
Writes   checkpoints/mnist.pt: averaged weights theta*, posterior (mu*, sigma*), settings, data, loss curve; and a grid
         of samples beside it, checkpoints/mnist.png.
Paper    VDU (arXiv 2510.04058): theta* was trained on D = D_r and D_f together (its setting), and mu* and
         sigma* are the mean and standard deviation of each parameter over training checkpoints. Here the
         checkpoints are the weights along the last part of one run, at a constant learning rate, folded into
         running sums as they pass. SGD at a constant rate wanders around its optimum, widely where the loss is
         flat: to first order its distribution is the posterior's (Mandt et al. 2017; SWAG, Maddox et al. 2019).
"""

import argparse
import contextlib
import io
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.datasets import CIFAR10, MNIST, ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS, default_loader
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.transforms.v2 import functional as transforms
from torchvision.utils import save_image
from tqdm import tqdm

from ddpm import (ArgumentParser, StopRequest, UserError, build, count, first_line, peak_memory, pick_device, read_file,
                  run_command_line, save_checkpoint, seed_everything, seed_number, training_step)
from vdu import RunningPosterior

# ---------------------------------------------------------------------------------------------------------------
# Datasets: uint8 images (N, C, H, W) and int64 labels (N,), decoded once, whole in memory

MNIST_5K = Path(__file__).parent / "tests" / "data" / "mnist_5k.npz"
TINY_IMAGENET = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
DATASETS = ("mnist", "cifar10", "tiny-imagenet", "folder")


def load_dataset(name, root=None, train=True, image_shape=None, only=None):
    """The training images of dataset `name`, or its test images.

    root: folder that holds it, read and never downloaded to; None downloads into data/ (MNIST falls back to the 5,000
    images that ship with the code). image_shape: (C, H, W) to bring files to; None takes the dataset's own, and for a
    folder 32x32, grey if every image is. only: indices of the classes to read, and nothing of any other.
    Returns (images (N, C, H, W) uint8, labels (N,) int64, data), where data = {"name", "source", "root", "classes", ...}
    is what a checkpoint remembers, for `load_data_of`. Without a test part, train=False gives None for images and labels.
    Raises UserError if the folder does not hold the dataset, or it cannot be downloaded.
    """
    if name == "folder":
        images, labels, data = load_folder(root, train, image_shape, only)
    elif name == "tiny-imagenet":
        images, labels, data = load_tiny_imagenet(root, train, image_shape, only)
    else:
        images, labels, data = (load_mnist if name == "mnist" else load_cifar10)(root, train)
        images, labels = of_classes(images, labels, only)
    return images, labels, {"name": name, "source": "torchvision", **data}


def of_classes(images, labels, only):
    """The images and labels of the classes `only` (indices): all for None, and as they are where there are none (no test part)."""
    if images is None or only is None:
        return images, labels
    keep = torch.isin(labels, torch.tensor(only))
    return images[keep], labels[keep]


@contextlib.contextmanager
def quiet_download():
    """torchvision prints a paragraph for each mirror that fails, and waits for ever on one that does not answer."""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        socket.setdefaulttimeout(timeout)


def load_mnist(root, train):
    data = {"root": os.path.abspath(root or "data"), "classes": [str(digit) for digit in range(10)]}
    if root is not None:
        try:
            dataset = MNIST(root, train=train, download=False)
        except RuntimeError as e:
            raise UserError(f"no MNIST in {root}: expected {Path(root) / 'MNIST' / 'raw'} as torchvision lays it out; "
                            "leave --data-root away to download it") from e
    else:
        try:
            with quiet_download():
                dataset = MNIST("data", train=train, download=True)
        except (RuntimeError, OSError) as e:
            print(f"no network to download MNIST ({first_line(e)}): using the 5,000 MNIST images in {MNIST_5K.name}")
            return load_mnist_5k(train, data)
    return dataset.data[:, None], dataset.targets, data  # (N, 28, 28) -> (N, 1, 28, 28)


def load_mnist_5k(train, data):
    """The 5,000 training images that ship with the code, 500 a digit (tests/data/README.md says where they come from). No test part."""
    data = {**data, "source": MNIST_5K.name, "root": None}
    if not train:
        return None, None, data
    arrays = np.load(MNIST_5K)
    return torch.from_numpy(arrays["images"])[:, None], torch.from_numpy(arrays["labels"]).long(), data


def load_cifar10(root, train):
    try:
        with quiet_download():
            dataset = CIFAR10(root or "data", train=train, download=root is None)
    except (RuntimeError, OSError) as e:
        raise UserError(no_dataset("CIFAR-10", root, "cifar-10-batches-py", CIFAR10.url, e)) from e
    images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()  # (N, 32, 32, 3) -> (N, 3, 32, 32)
    return images, torch.tensor(dataset.targets), {"root": os.path.abspath(root or "data"), "classes": dataset.classes}


def no_dataset(title, root, folder, url, error):
    """What to do about a dataset that is neither here nor to be had."""
    if root is not None:
        return f"no {title} in {root}: expected {Path(root) / folder}; leave --data-root away to download it"
    return (f"{title} cannot be downloaded ({first_line(error)}); where there is a network, fetch {url} and unpack it, "
            f"then say with --data-root DIR which folder holds {folder}")


def load_tiny_imagenet(root, train, image_shape, only):
    """tiny ImageNet in its published layout: train/WNID/images/*.JPEG; val/images/*.JPEG with val/val_annotations.txt; words.txt.

    Classes are WordNet ids (n01443537); data["words"] has what each means ("goldfish, Carassius auratus").
    """
    folder = Path(root or "data") / "tiny-imagenet-200"
    if root is None and not (folder / "wnids.txt").exists():
        try:
            with quiet_download():
                download_and_extract_archive(TINY_IMAGENET, "data", md5="90528d7ca1a48142e341f4ef8d21d0de")
        except (RuntimeError, OSError) as e:
            raise UserError(no_dataset("tiny ImageNet", root, folder.name, TINY_IMAGENET, e)) from e
    try:
        classes = sorted((folder / "wnids.txt").read_text().split())
        words = dict(line.split("\t", 1) for line in (folder / "words.txt").read_text().splitlines() if line.strip())
        if train:
            files = [(p, i) for i, wnid in enumerate(classes) for p in sorted((folder / "train" / wnid / "images").glob("*.JPEG"))]
        else:  # file name, WordNet id and a bounding box, between tabs
            rows = [line.split("\t") for line in (folder / "val" / "val_annotations.txt").read_text().splitlines() if line.strip()]
            files = [(folder / "val" / "images" / row[0], classes.index(row[1])) for row in rows]
    except (OSError, ValueError, IndexError) as e:
        raise UserError(no_dataset("tiny ImageNet", root or "data", folder.name, TINY_IMAGENET, e) + f" ({first_line(e)})") from e
    images, labels = read_labelled(files, image_shape or (3, 64, 64), only, folder)
    return images, labels, {"root": str(folder.parent.resolve()), "classes": classes, "words": {wnid: words.get(wnid, wnid) for wnid in classes}}


def load_folder(root, train, image_shape, only):
    """A folder of images, one sub-folder a class (torchvision's ImageFolder); or one with such folders as train/ and test/ (or val/)."""
    if root is None:
        raise UserError("--dataset folder needs --data-root DIR, a folder with one sub-folder of images for each class")
    part = Path(root)
    if (part / "train").is_dir() and not any(p.suffix.lower() in IMG_EXTENSIONS for p in (part / "train").iterdir()):
        tests = [part / name for name in ("test", "val") if (part / name).is_dir()]
        part = part / "train" if train else tests[0] if tests else None
    elif not train:
        part = None
    data = {"source": "folder", "root": os.path.abspath(root)}
    if part is None:
        return None, None, data
    try:
        dataset = ImageFolder(part, allow_empty=False)
    except (FileNotFoundError, OSError) as e:
        raise UserError(f"{part} is no folder of classes: it needs one sub-folder of images for each ({first_line(e)})") from e
    images, labels = read_labelled(dataset.samples, image_shape or (None, 32, 32), only, part)
    return images, labels, {**data, "classes": dataset.classes}


def read_labelled(files, image_shape, only, folder):
    """(path, label) pairs -> images (N, C, H, W) uint8, labels (N,), of the classes `only`."""
    files = [(path, label) for path, label in files if only is None or label in only]
    if not files:
        raise UserError(f"no images in {folder}")
    return read_images([path for path, _ in files], image_shape), torch.tensor([label for _, label in files])


def read_images(paths, image_shape):
    """Image files, centre-cropped to squares and resized: (N, C, S, S) uint8. image_shape: (C, S, S), C None: grey if all are.

    Raises UserError, which names the file, for one that cannot be read.
    """
    channels, size = image_shape[0], image_shape[-1]

    def read(path):
        try:
            image = transforms.pil_to_tensor(default_loader(path))  # (3, H, W) uint8
        except (OSError, ValueError) as e:
            raise UserError(f"cannot read the image {path} ({first_line(e)}): remove it, or convert it to PNG") from e
        image = transforms.center_crop(image, [min(image.shape[1:])] * 2)
        return transforms.resize(image, [size, size], antialias=True) if image.shape[1] != size else image

    images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
    pool = ThreadPoolExecutor(os.cpu_count())  # decoding leaves Python's lock free
    try:
        for i, image in enumerate(tqdm(pool.map(read, paths), total=len(paths), desc="reading images", unit="image", disable=len(paths) < 1000)):
            images[i] = image
    finally:
        pool.shutdown(cancel_futures=True)  # an error or Ctrl-C waits for no further file
    if channels is None:
        channels = 1 if all(torch.equal(c[:, :1].expand_as(c), c) for c in images.split(1000)) else 3
    return transforms.rgb_to_grayscale(images) if channels == 1 else images


def load_images(folder, image_shape):
    """Every image in a folder and below it, whatever it shows: (N, C, S, S) uint8. Raises UserError where there are none."""
    paths = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in IMG_EXTENSIONS) if os.path.isdir(folder) else []
    if not paths:
        raise UserError(f"no images in {folder}: expected a folder with files ending in {', '.join(IMG_EXTENSIONS)}")
    return read_images(paths, image_shape)


def load_data_of(checkpoint, data_root=None, train=True, only=None):
    """The dataset that a checkpoint was trained on: (images, labels), or (None, None) where it has no such part.

    data_root overrides its folder. only: as in load_dataset.
    """
    data = checkpoint.data
    if data_root is None and data["source"] == MNIST_5K.name:
        return of_classes(*load_mnist_5k(train, data)[:2], only)
    root = data_root or data["root"]
    if data_root is None and root is not None and not os.path.isdir(root):
        raise UserError(f"{checkpoint.path} was trained on {data['name']} in {root}, which is not there; say where with --data-root DIR")
    images, labels, found = load_dataset(data["name"], root, train, checkpoint.config["image_shape"], only)
    if found.get("classes", data["classes"]) != data["classes"]:
        raise UserError(f"the classes in {root} are not those that {checkpoint.path} was trained on; say where those are with --data-root DIR")
    return images, labels


def title_of(data):
    """What files of this dataset are called: mnist, or the name of the folder."""
    return Path(data["root"]).name if data["name"] == "folder" else data["name"]


def mirror_half(x):
    """Mirror each of the images (B, C, H, W), or not, at even odds."""
    return torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x.flip(3), x)


def to_float(images):
    """uint8 0 .. 255 -> float32 -1 .. 1, the range in which the diffusion works."""
    return images.float() / 127.5 - 1


def to_uint8(images):
    """float -1 .. 1 -> uint8 0 .. 255, rounded."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def class_indices(names, data):
    """Class names -> their indices; for WordNet ids the word does as well ("goldfish"). Raises UserError that lists the classes there are."""
    classes, words = data["classes"], data.get("words", {})
    indices = set()
    for name in names:
        known_as = lambda c: [c, words.get(c, c).lower(), *words.get(c, c).lower().split(", ")]
        found = [i for i, c in enumerate(classes) if name == c] or [i for i, c in enumerate(classes) if name.lower() in known_as(c)]
        if len(found) > 1:
            raise UserError(f"{name!r} is {' and '.join(f'{classes[i]} ({words[classes[i]]})' for i in found)}: give the id")
        if not found:
            shown = [f"{c} ({words[c].split(', ')[0]})" if c in words else c for c in classes]
            raise UserError(f"no class {name!r}; the classes are: {', '.join(shown)}")
        indices.add(found[0])
    return sorted(indices)


# ---------------------------------------------------------------------------------------------------------------
# Network sizes, and how each is trained


def network(model, image_shape):
    """(UNet's arguments, training settings) of a size, "small" or "base", for images of a shape (C, H, W).

    "small" works on 2x2 patches of a 28x28 or 32x32 image, and on larger patches of larger ones: two CPU cores train it in
    a quarter of an hour for MNIST, half an hour for colour. (For MNIST, attention at 7x7 as well as in the middle costs a
    third more time a step.) "base" is DDPM's network for CIFAR-10 and its training (Ho et al.
    2020, appendix B): 35.7M parameters, attention at 16x16, eps predicted directly, for a GPU.
    """
    C, H, W = image_shape
    if model == "base":
        return (dict(in_channels=C, model_channels=128, channel_mult=(1, 2, 2, 2), num_res_blocks=2,
                     attention_resolutions=(max(1, round(H / 16)),), num_heads=1, dropout=0.1),
                dict(steps=200_000, batch_size=128, lr=2e-4, ema=0.9999, schedule="linear", velocity=False))
    grey = C == 1
    return (dict(in_channels=C, model_channels=32 if grey else 48, channel_mult=(1, 2, 4), num_res_blocks=1,
                 attention_resolutions=() if grey else (2,), num_heads=4, patch_size=min(4, -(-H // 16))),
            dict(steps=5500 if grey else 3500, batch_size=64, lr=2e-3, ema=0.998, schedule="cosine", velocity=True))


# ---------------------------------------------------------------------------------------------------------------
# Training


def learning_rate(step, args):
    """Warm up over 200 steps, fall linearly to a tenth, then hold it there while the posterior is gathered.

    The fall settles the weights; the constant rate keeps them wandering about one optimum, whose spread is sigma*.
    """
    warmup = min(1.0, (step + 1) / 200)
    hold = posterior_start(args)
    return args.lr * warmup * max(0.1, 1 - 0.9 * step / max(1, hold))


def posterior_start(args):
    """The step from which the weights enter the posterior."""
    return int(args.steps * (1 - args.posterior_fraction))


def batch_indices(step, n, batch_size, seed):
    """Which images step number `step` sees: a function of the arguments alone, so that --resume needs no loader state."""
    per_epoch = n // batch_size
    epoch, i = divmod(step, per_epoch)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    return order[i * batch_size : (i + 1) * batch_size]


def rng_state(device):
    state = {"cpu": torch.get_rng_state()}
    if device.type in ("cuda", "mps"):
        state[device.type] = getattr(torch, device.type).get_rng_state()
    return state


def set_rng_state(state, device):
    torch.set_rng_state(state["cpu"])
    if device.type in state and device.type != "cpu":
        getattr(torch, device.type).set_rng_state(state[device.type])


def train(args):
    """Run the command line's training. Raises UserError for bad settings and for a loss that is no number."""
    if args.dataset == "folder" and args.data_root is None:
        raise UserError("--dataset folder needs --data-root DIR, a folder with one sub-folder of images for each class")
    if args.image_size is not None and (args.dataset != "folder" or args.image_size < 8):
        raise UserError("--image-size is for --dataset folder, and at least 8; the other datasets have their own size")
    output = args.output or f"checkpoints/{Path(args.data_root).resolve().name if args.dataset == 'folder' else args.dataset}.pt"
    saved = None
    if args.resume:
        saved = read_file(output)
        restore_settings(args, saved, output)
    else:
        if os.path.exists(output) and not args.overwrite:
            raise UserError(f"{output} exists already; --resume continues it, --overwrite replaces it, --output FILE goes elsewhere")
    given = lambda value, default: default if value is None else value  # None: the network's own, below
    if given(args.steps, 1) < 1 or given(args.batch_size, 1) < 1:
        raise UserError("--steps and --batch-size must be at least 1")
    if not (given(args.lr, 1) > 0 and 0 < args.posterior_fraction <= 1 and 0 <= given(args.ema, 0) < 1):
        raise UserError("need --lr > 0, 0 < --posterior-fraction <= 1 and 0 <= --ema < 1")
    device = pick_device(args.device)
    seed_everything(args.seed)

    size = args.image_size or 32
    images, labels, data = load_dataset(args.dataset, args.data_root, image_shape=(None, size, size) if args.dataset == "folder" else None)
    excluded = class_indices(args.exclude_class, data)
    images = images[~torch.isin(labels, torch.tensor(excluded))]
    data = {**data, "excluded": [data["classes"][i] for i in excluded], "images": len(images)}
    if saved is not None and saved["data"]["images"] != len(images):
        raise UserError(f"{output} was trained on {saved['data']['images']} images, not {len(images)}; use its --data-root")
    image_shape = tuple(images.shape[1:])
    # The paper's networks want a GPU; on a CPU, and for MNIST's strokes anywhere, the small one is the sensible choice.
    args.model = args.model or ("base" if device.type != "cpu" and args.dataset != "mnist" else "small")
    unet_args, defaults = network(args.model, image_shape)
    defaults["flip"] = image_shape[0] == 3  # mirrored photographs are photographs; mirrored digits and letters are not
    for name, value in defaults.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    batch_size = min(args.batch_size, len(images))
    if device.type == "cuda" and images.nbytes < 2**32:
        images = images.to(device)  # once, not a batch at a time

    config = {"unet": unet_args, "schedule": args.schedule, "timesteps": args.timesteps, "velocity": args.velocity,
              "image_shape": image_shape}
    unet, diffusion = build(config, device)
    parameters = list(unet.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=device.type != "mps")
    ema = AveragedModel(unet, multi_avg_fn=get_ema_multi_avg_fn(args.ema))
    running = RunningPosterior(unet.named_parameters())
    start, losses = 0, []  # losses: (step, moving average), 200 or so over the run
    if saved is not None:
        losses = saved.get("losses", [])
        unet.load_state_dict(saved["train"]["unet"])
        optimizer.load_state_dict(saved["train"]["optimizer"])
        ema.load_state_dict(saved["train"]["ema"])
        running.load_state_dict(saved["train"]["running"])
        set_rng_state(saved["rng"], device)
        start = saved["step"]

    print(f"{title_of(data)}: {len(images):,} images of {'x'.join(map(str, image_shape))} ({data['source']}), {args.model} U-Net of "
          f"{count(sum(p.numel() for p in parameters))} parameters, {args.steps:,} steps of {batch_size} on {device}")

    def save(step):
        contents = {
            "config": config, "data": data, "step": step, "settings": settings_of(args), "losses": losses,
            "weights": ema.module.state_dict(),
            "posterior": running.posterior().state_dict() if running.n > 1 else None,
            "rng": rng_state(device),
        }
        if step < args.steps:  # what --resume needs and nobody else: left out once training is done
            contents["train"] = {"unet": unet.state_dict(), "optimizer": optimizer.state_dict(),
                                 "ema": ema.state_dict(), "running": running.state_dict()}
        save_checkpoint(output, contents)

    def draw(path):
        ema.module.eval()
        save_image(diffusion.sample(ema.module, 64, config["image_shape"], steps=25, seed=args.seed) / 2 + 0.5, path)
        ema.module.train()

    began = time.time()
    average, last_save = None, start
    with StopRequest() as stop, tqdm(total=args.steps * batch_size, initial=start * batch_size, unit="img", unit_scale=True,
                                     desc="training", dynamic_ncols=True) as bar:
        for step in range(start, args.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args)
            index = batch_indices(step, len(images), batch_size, args.seed).to(images.device)
            x0 = to_float(images[index].to(device))  # (B, C, H, W)
            if args.flip:
                x0 = mirror_half(x0)
            value = training_step(unet, diffusion, optimizer, x0)
            if not np.isfinite(value):
                kept = f"{output} still holds step {last_save}; " if os.path.exists(output) and last_save else ""
                raise UserError(f"the loss became {value} at step {step}; {kept}try a smaller --lr than {args.lr:g}")
            ema.update_parameters(unet)
            if step >= posterior_start(args) and (step % args.posterior_every == 0 or step == args.steps - 1):
                running.update(unet.named_parameters())

            average = value if average is None else 0.99 * average + 0.01 * value
            if (step + 1) % max(1, args.steps // 200) == 0:
                losses.append((step + 1, average))
            bar.update(batch_size)
            if step == start + 20:  # the first ones are slower
                warm = time.time()
            if step == start + 40:
                left = (args.steps - step) * (time.time() - warm) / 20
                bar.write("at this speed the training takes " + (f"{left / 60:.0f} minutes" if left < 5400 else f"{left / 3600:.1f} hours"))
            bar.set_postfix(loss=f"{average:.4f}", step=step + 1, posterior=running.n, refresh=False)
            if args.sample_every and (step + 1) % args.sample_every == 0:
                draw(Path(output).with_suffix(f".{step + 1}.png"))
            if stop.requested or (step + 1) % args.save_every == 0 or step + 1 == args.steps:
                save(step + 1)
                last_save = step + 1
            if stop.requested and step + 1 < args.steps:
                bar.close()
                print(f"interrupted: saved step {step + 1} of {args.steps} in {output}; continue with --resume")
                raise KeyboardInterrupt
    print(f"wrote {output} ({time.time() - began:.0f} s, peak memory {peak_memory(device)}); loss along the way: "
          + " ".join(f"{value:.4f}" for _, value in losses[:: max(1, len(losses) // 9)]))
    grid = Path(output).with_suffix(".png")
    draw(grid)
    print(f"wrote {grid}, a grid of samples")


SETTINGS = ("dataset", "model", "image_size", "steps", "batch_size", "lr", "ema", "schedule", "timesteps", "velocity", "flip",
            "posterior_fraction", "posterior_every", "exclude_class", "seed")


def settings_of(args):
    return {name: getattr(args, name) for name in SETTINGS}


def restore_settings(args, saved, path):
    """Continue with the settings that the run began with; refuse a flag that says otherwise."""
    if not isinstance(saved, dict) or "settings" not in saved:
        raise UserError(f"{path} is no checkpoint of train_ddpm.py")
    if "train" not in saved:
        raise UserError(f"{path} is finished ({saved['step']} steps): nothing to resume; --overwrite starts anew")
    defaults = parser().parse_args([])
    for name, value in saved["settings"].items():
        if name == "velocity":  # no flag of its own: it goes with the model
            args.velocity = value
            continue
        if getattr(args, name) not in (value, getattr(defaults, name)):
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{path} was begun with {flag} {value}; --resume cannot change it to {getattr(args, name)}")
        setattr(args, name, value)
    if args.data_root is None:
        args.data_root = saved["data"]["root"]


def parser():
    small, base, grey = network("small", (3, 32, 32))[1], network("base", (3, 32, 32))[1], network("small", (1, 28, 28))[1]
    default = lambda name: (f"(default: {small[name]} for small, " + (f"{grey[name]} if grey, " if grey[name] != small[name] else "")
                            + f"{base[name]} for base)")
    p = ArgumentParser(prog="train_ddpm.py", description=__doc__)
    p.add_argument("--dataset", choices=DATASETS, default="mnist", help="what to learn; folder: your own images, one sub-folder a class")
    p.add_argument("--data-root", metavar="DIR", help="folder that holds the dataset already (default: download into data/); with --dataset "
                                                      "folder the one with the classes, or with train/ and test/ folders of classes")
    p.add_argument("--image-size", type=int, metavar="N", help="with --dataset folder: images are cropped to squares and resized to NxN (default: 32)")
    p.add_argument("--model", choices=("small", "base"), help="small: for two CPU cores; base: DDPM's 35.7M parameters, for a GPU (default: small "
                                                              "on a CPU and for mnist, else base)")
    p.add_argument("--output", metavar="FILE", help="checkpoint to write (default: checkpoints/DATASET.pt)")
    p.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    p.add_argument("--resume", action="store_true", help="continue an interrupted run, to the result it would have had")
    p.add_argument("--exclude-class", nargs="+", default=[], metavar="CLASS",
                   help="leave these classes out: the model retrained without them is the oracle of unlearning")
    p.add_argument("--steps", type=int, help=f"gradient steps {default('steps')}")
    p.add_argument("--batch-size", type=int, help=f"images a step; small batches and many steps win on a CPU {default('batch_size')}")
    p.add_argument("--lr", type=float, help=f"AdamW's highest learning rate {default('lr')}")
    p.add_argument("--ema", type=float, help=f"decay of the moving average of the weights, theta* {default('ema')}")
    p.add_argument("--schedule", choices=("linear", "cosine"), help=f"noise schedule {default('schedule')}")
    p.add_argument("--flip", action=argparse.BooleanOptionalAction, help="mirror half of the images (default: for colour images)")
    p.add_argument("--timesteps", type=int, default=1000, help="T, the length of the diffusion")
    p.add_argument("--posterior-fraction", type=float, default=0.25,
                   help="share of training, at its end, over which the weights' mean and spread become the posterior")
    p.add_argument("--posterior-every", type=int, default=5, metavar="N", help="take every N-th step's weights into it")
    p.add_argument("--sample-every", type=int, default=0, metavar="N", help="draw a grid of samples every N steps (0: at the end only)")
    p.add_argument("--save-every", type=int, default=1000, metavar="N", help="save every N steps, in case the machine stops")
    p.add_argument("--seed", type=seed_number, default=0, help="repeats a run on the same machine")
    p.add_argument("--device", default="auto", help="auto (CUDA, else MPS, else CPU), cpu, cuda, cuda:1, mps")
    return p


if __name__ == "__main__":
    run_command_line(lambda: train(parser().parse_args()))
