"""Train the DDPM that is to forget something later, and keep the posterior p(theta | D) that VDU needs for it.

    python train_ddpm.py --dataset mnist

Holds    the datasets and the training loop.
Reads    MNIST, through torchvision (downloaded into data/, or found in --data-root); without a network, the 5,000
         MNIST images in tests/data/mnist_5k.npz.
Writes   checkpoints/mnist.pt: averaged weights theta*, posterior (mu*, sigma*), settings, data; and a grid of samples
         beside it, checkpoints/mnist.png.
Paper    VDU (arXiv 2510.04058): theta* was trained on D = D_r and D_f together (its setting), and mu* and
         sigma* are the mean and standard deviation of each parameter over training checkpoints. Here the
         checkpoints are the weights along the last part of one run, at a constant learning rate, folded into
         running sums as they pass. SGD at a constant rate wanders around its optimum, widely where the loss is
         flat: to first order its distribution is the posterior's (Mandt et al. 2017; SWAG, Maddox et al. 2019).
"""

import contextlib
import io
import os
import socket
import time
from pathlib import Path

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.datasets import MNIST
from torchvision.utils import save_image
from tqdm import tqdm

from ddpm import (ArgumentParser, StopRequest, UserError, build, count, first_line, pick_device, read_file,
                  run_command_line, save_checkpoint, seed_everything, seed_number, stratified_timesteps)
from vdu import RunningPosterior

# ---------------------------------------------------------------------------------------------------------------
# Datasets: uint8 images (N, C, H, W) and int64 labels (N,), whole in memory

MNIST_5K = Path(__file__).parent / "tests" / "data" / "mnist_5k.npz"
DATASETS = {
    # 14x14 patches of 2x2 pixels, then 7x7, then 4x4 with attention in the middle: what two CPU cores can train in a
    # quarter of an hour. Attention at 7x7 as well costs a third more time a step.
    "mnist": {
        "unet": dict(in_channels=1, model_channels=32, channel_mult=(1, 2, 4), num_res_blocks=1,
                     attention_resolutions=(), num_heads=4, patch_size=2),
        "image_shape": (1, 28, 28),
        "classes": [str(digit) for digit in range(10)],
    },
}


def load_dataset(name, root=None, train=True):
    """The training images of dataset `name`, or its test images.

    root: folder in torchvision's layout, read and never downloaded to; None downloads into data/, and falls back to
    the 5,000 images that ship with the code. Returns (images (N, C, H, W) uint8, labels (N,) int64, data), where
    data = {"name", "source", "root", "classes"} is what a checkpoint remembers, for `load_data_of`.
    Raises UserError if the folder does not hold the dataset.
    """
    data = {"name": name, "source": "torchvision", "root": None, "classes": DATASETS[name]["classes"]}
    if root is not None:
        try:
            dataset = MNIST(root, train=train, download=False)
        except RuntimeError as e:
            raise UserError(f"no MNIST in {root}: expected {Path(root) / 'MNIST' / 'raw'} as torchvision lays it out; "
                            "leave --data-root away to download it") from e
    else:
        root = "data"
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # torchvision prints a paragraph for each mirror that fails
                timeout = socket.getdefaulttimeout()
                socket.setdefaulttimeout(20)
                try:
                    dataset = MNIST(root, train=train, download=True)
                finally:
                    socket.setdefaulttimeout(timeout)
        except (RuntimeError, OSError) as e:
            print(f"no network to download MNIST ({first_line(e)}): using the 5,000 MNIST images in {MNIST_5K.name}")
            return load_mnist_5k(data)
    data["root"] = os.path.abspath(root)
    return dataset.data[:, None], dataset.targets, data  # (N, 28, 28) -> (N, 1, 28, 28)


def load_mnist_5k(data):
    """The 5,000 training images that ship with the code, 500 a digit (tests/data/README.md says where they come from)."""
    arrays = np.load(MNIST_5K)
    data = {**data, "source": MNIST_5K.name, "root": None}
    return torch.from_numpy(arrays["images"])[:, None], torch.from_numpy(arrays["labels"]).long(), data


def load_data_of(checkpoint, data_root=None, train=True):
    """The dataset that a checkpoint was trained on, every class of it: (images, labels). data_root overrides its folder.

    The shipped 5,000 images have no test part: train=False returns None for them.
    """
    data = checkpoint.data
    if data_root is None and data["source"] == MNIST_5K.name:
        return load_mnist_5k(data)[:2] if train else None
    root = data_root or data["root"]
    if data_root is None and not os.path.isdir(root):
        raise UserError(f"{checkpoint.path} was trained on {data['name']} in {root}, which is not there; say where with --data-root DIR")
    return load_dataset(data["name"], root, train)[:2]


def to_float(images):
    """uint8 0 .. 255 -> float32 -1 .. 1, the range in which the diffusion works."""
    return images.float() / 127.5 - 1


def to_uint8(images):
    """float -1 .. 1 -> uint8 0 .. 255, rounded."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def class_indices(names, classes):
    """Class names -> their indices. Raises UserError that lists the classes there are."""
    unknown = [name for name in names if name not in classes]
    if unknown:
        raise UserError(f"no class {', '.join(map(repr, unknown))}; the classes are: {', '.join(classes)}")
    return sorted({classes.index(name) for name in names})


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
    if args.steps < 1 or args.batch_size < 1:
        raise UserError("--steps and --batch-size must be at least 1")
    if not (args.lr > 0 and 0 < args.posterior_fraction <= 1 and 0 <= args.ema < 1):
        raise UserError("need --lr > 0, 0 < --posterior-fraction <= 1 and 0 <= --ema < 1")
    output = args.output or f"checkpoints/{args.dataset}.pt"
    saved = None
    if args.resume:
        saved = read_file(output)
        restore_settings(args, saved, output)
    else:
        if os.path.exists(output) and not args.overwrite:
            raise UserError(f"{output} exists already; --resume continues it, --overwrite replaces it, --output FILE goes elsewhere")
    device = pick_device(args.device)
    seed_everything(args.seed)

    spec = DATASETS[args.dataset]
    images, labels, data = load_dataset(args.dataset, args.data_root)
    excluded = class_indices(args.exclude_class, data["classes"])
    keep = ~torch.isin(labels, torch.tensor(excluded))
    images = images[keep]
    data = {**data, "excluded": [data["classes"][i] for i in excluded], "images": len(images)}
    if saved is not None and saved["data"]["images"] != len(images):
        raise UserError(f"{output} was trained on {saved['data']['images']} images, not {len(images)}; use its --data-root")
    batch_size = min(args.batch_size, len(images))

    config = {"unet": spec["unet"], "schedule": args.schedule, "timesteps": args.timesteps, "velocity": True,
              "image_shape": spec["image_shape"]}
    unet, diffusion = build(config, device)
    parameters = list(unet.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=device.type != "mps")
    ema = AveragedModel(unet, multi_avg_fn=get_ema_multi_avg_fn(args.ema))
    running = RunningPosterior(unet.named_parameters())
    start = 0
    if saved is not None:
        unet.load_state_dict(saved["train"]["unet"])
        optimizer.load_state_dict(saved["train"]["optimizer"])
        ema.load_state_dict(saved["train"]["ema"])
        running.load_state_dict(saved["train"]["running"])
        set_rng_state(saved["rng"], device)
        start = saved["step"]

    print(f"{args.dataset}: {len(images):,} images ({data['source']}), U-Net of {count(sum(p.numel() for p in parameters))} "
          f"parameters, {args.steps:,} steps of {batch_size} on {device}")

    def save(step):
        contents = {
            "config": config, "data": data, "step": step, "settings": settings_of(args),
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
        save_image(diffusion.sample(ema.module, 64, config["image_shape"], steps=50, seed=args.seed) / 2 + 0.5, path)
        ema.module.train()

    began = time.time()
    average, last_save = None, start
    with StopRequest() as stop, tqdm(total=args.steps * batch_size, initial=start * batch_size, unit="img", unit_scale=True,
                                     desc="training", dynamic_ncols=True) as bar:
        for step in range(start, args.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args)
            x0 = to_float(images[batch_indices(step, len(images), batch_size, args.seed)].to(device))  # (B, C, H, W)
            t = stratified_timesteps(batch_size, 0, diffusion.T, device)  # (B,)
            loss = diffusion.simple_loss(unet, x0, t, torch.randn_like(x0)).mean()  # DDPM eq. 14
            value = loss.item()
            if not np.isfinite(value):
                kept = f"{output} still holds step {last_save}; " if os.path.exists(output) and last_save else ""
                raise UserError(f"the loss became {value} at step {step}; {kept}try a smaller --lr than {args.lr:g}")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            ema.update_parameters(unet)
            if step >= posterior_start(args) and (step % args.posterior_every == 0 or step == args.steps - 1):
                running.update(unet.named_parameters())

            average = value if average is None else 0.99 * average + 0.01 * value
            bar.update(batch_size)
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
    grid = Path(output).with_suffix(".png")
    draw(grid)
    print(f"wrote {output} (loss {average:.4f}, {time.time() - began:.0f} s) and {grid}, a grid of samples")


SETTINGS = ("dataset", "steps", "batch_size", "lr", "ema", "schedule", "timesteps", "posterior_fraction",
            "posterior_every", "exclude_class", "seed")


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
        if getattr(args, name) not in (value, getattr(defaults, name)):
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{path} was begun with {flag} {value}; --resume cannot change it to {getattr(args, name)}")
        setattr(args, name, value)
    if args.data_root is None:
        args.data_root = saved["data"]["root"]


def parser():
    p = ArgumentParser(prog="train_ddpm.py", description=__doc__)
    p.add_argument("--dataset", choices=sorted(DATASETS), default="mnist", help="what to learn")
    p.add_argument("--data-root", metavar="DIR", help="folder that holds the dataset already (default: download into data/)")
    p.add_argument("--output", metavar="FILE", help="checkpoint to write (default: checkpoints/DATASET.pt)")
    p.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    p.add_argument("--resume", action="store_true", help="continue an interrupted run, to the result it would have had")
    p.add_argument("--exclude-class", nargs="+", default=[], metavar="CLASS",
                   help="leave these classes out: the model retrained without them is the oracle of unlearning")
    p.add_argument("--steps", type=int, default=5500, help="gradient steps")
    p.add_argument("--batch-size", type=int, default=64, help="images a step; small batches and many steps win on a CPU")
    p.add_argument("--lr", type=float, default=2e-3, help="AdamW's highest learning rate")
    p.add_argument("--ema", type=float, default=0.998, help="decay of the moving average of the weights, theta*")
    p.add_argument("--schedule", choices=("linear", "cosine"), default="cosine", help="noise schedule")
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
