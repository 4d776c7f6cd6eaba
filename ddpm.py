"""The diffusion: schedules, loss, variational bound, sampling; the checkpoint file.

Holds    Diffusion (q and p of DDPM, sampling), the training step,
         load_checkpoint and save_checkpoint; last, what the command lines share.
Reads    checkpoint files, and DDPM's weights as others publish them.
Writes   checkpoint files, atomically.
Paper    VDU (arXiv 2510.04058), its background on diffusion models. The sources, below:
         DDPM = Ho et al. 2020 (arXiv 2006.11239), DDIM = Song et al. 2021 (2010.02502).

The paper counts t = 1 .. T. Here t is an index, 0 .. T-1, into buffers: t=0 is the
paper's first noise step, so `alpha_bar[t]` is the paper's abar_{t+1}, and "x_{t-1}" at
index 0 is the clean image x_0. Images are float32 in [-1, 1], shape (B, C, H, W);
D = C*H*W.
"""

import argparse
import contextlib
import hashlib
import json
import math
import mmap
import os
import pickle
import pickletools
import re
import signal
import sys
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch.distributions import Normal, kl_divergence
from tqdm import tqdm

from unet import UNet, from_published, is_diffusers

try:
    import resource
except ImportError:  # Windows
    resource = None

# --------------------------------------------------------------------------------------
# The diffusion


def linear_schedule(T):
    """beta_t from 1e-4 to 0.02, evenly (DDPM, section 4), scaled to T. (T,) float64."""
    scale = 1000 / T
    return torch.linspace(1e-4 * scale, 0.02 * scale, T, dtype=torch.float64).clamp(max=0.999)


def cosine_schedule(T):
    """abar_t = cos^2((t/T + s) / (1 + s) pi/2), s = 0.008 (Nichol & Dhariwal 2021).

    Returns betas, (T,) float64. The linear schedule was made for 256x256 images: at
    28x28 it leaves nothing to see for a third of the steps.
    """
    u = torch.arange(T + 1, dtype=torch.float64) / T
    f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)


def scaled_linear_schedule(T):
    """sqrt(beta_t) from sqrt(0.00085) to sqrt(0.012), evenly: Stable Diffusion's."""
    return torch.linspace(0.00085**0.5, 0.012**0.5, T, dtype=torch.float64) ** 2


SCHEDULES = {"linear": linear_schedule, "cosine": cosine_schedule,
             "scaled_linear": scaled_linear_schedule}


def stratified_timesteps(n, low, high, device="cpu"):
    """n step indices, one from each n-th of low .. high-1, in random order: (n,) int64.

    The loss differs a hundredfold between t near 0 and t near T. Covering the range
    evenly within a batch takes that out of the gradient's noise and leaves its
    expectation.
    """
    u = (torch.randperm(n) + torch.rand(n)) / n  # (n,) in [0, 1)
    return (low + u * (high - low)).long().clamp(max=high - 1).to(device)


class Diffusion(nn.Module):
    """q and p_theta of DDPM, for a network eps_theta called as unet(x_t, t).

    schedule: a name in SCHEDULES.  timesteps: T.  Every buffer is (T,), float32,
    computed in float64.
    """

    def __init__(self, schedule="linear", timesteps=1000):
        super().__init__()
        self.schedule, self.T = schedule, timesteps
        beta = SCHEDULES[schedule](timesteps)
        alpha = 1 - beta
        alpha_bar = alpha.cumprod(0)  # abar_t = prod_{s<=t} alpha_s
        alpha_bar_prev = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        for name, value in {
            "beta": beta,
            "alpha": alpha,
            "alpha_bar": alpha_bar,
            "sqrt_alpha_bar": alpha_bar.sqrt(),
            "sqrt_one_minus_alpha_bar": (1 - alpha_bar).sqrt(),
            "posterior_variance": beta * (1 - alpha_bar_prev) / (1 - alpha_bar),  # eq. 7
        }.items():
            self.register_buffer(name, value.float())

    @staticmethod
    def _at(buffer, t, x):
        return buffer[t].view(-1, *[1] * (x.dim() - 1))  # (B,) -> (B, 1, 1, 1)

    def q_sample(self, x0, t, eps):
        """x_t ~ N(sqrt(abar_t) x_0, (1 - abar_t) I), given its noise (DDPM eq. 4)."""
        return (self._at(self.sqrt_alpha_bar, t, x0) * x0
                + self._at(self.sqrt_one_minus_alpha_bar, t, x0) * eps)

    def predict_x0(self, xt, t, eps):
        """The x_0 that q_sample needs to give x_t with this noise (eq. 15)."""
        noise = self._at(self.sqrt_one_minus_alpha_bar, t, xt) * eps
        return (xt - noise) / self._at(self.sqrt_alpha_bar, t, xt)

    def simple_loss(self, unet, x0, t, eps):
        """|| eps - eps_theta(x_t, t) ||^2 / D, x_t of q_sample (DDPM eq. 14).

        x0, eps: (B, C, H, W).  t: (B,).  Returns (B,): the squared error per dimension,
        1 for a network that says 0. Averaged over t and eps it is the variational bound
        below with every term's weight set to 1.
        """
        with autocast(x0.device):
            eps_theta = unet(self.q_sample(x0, t, eps), t)
        return (eps - eps_theta).square().flatten(1).mean(1)  # (B, C, H, W) -> (B,)

    @torch.no_grad()
    def variational_bound(self, unet, x0, steps=None, seed=0, progress=False):
        """-log p_theta(x_0) <= L_0 + sum_t L_{t-1} + L_T (eq. 5), bits per dimension.

        x0: (B, C, H, W) images of 256 grey levels, scaled to [-1, 1].  sigma_t^2 =
        beta_t. steps=None computes every L_{t-1}; steps=S about S of them, close
        together where t is small and they are large, and sums by the trapezoidal rule.
        One draw of eps for each. Returns a dict of float64 tensors, in the paper's
        names:
          "L_T" (B,)     KL(q(x_T | x_0) || N(0, I)): what x_T still knows, no theta
          "L_t" (B, S)   KL(q(x_{t-1} | x_t, x_0) || p_theta(x_{t-1} | x_t)), t > 1
          "L_0" (B,)      -log p_theta(x_0 | x_1), over the grey levels
          "total" (B,)    their sum
        `simple_loss` drops the weights beta_t^2 / (2 sigma_t^2 alpha_t (1 - abar_t))
        that make each L_{t-1} a KL divergence (eq. 12): only the weighted sum bounds
        -log p.
        """
        B, D = x0.shape[0], x0[0].numel()
        generator = torch.Generator().manual_seed(seed)
        x0_64, abar_T = x0.cpu().double(), self.alpha_bar[-1].cpu().double()
        q_T = Normal(abar_T.sqrt() * x0_64, (1 - abar_T).sqrt())
        L_T = kl_divergence(q_T, Normal(0.0, 1.0)).flatten(1).sum(1)  # (B,) nats

        def noised(t):  # x_t, t as a batch, and the noise
            tt = torch.full((B,), t, device=x0.device)
            eps = torch.randn(x0.shape, generator=generator).to(x0.device)
            return self.q_sample(x0, tt, eps), tt, eps

        grid = np.unique(np.geomspace(1, self.T - 1, steps).round()) if steps else None
        grid = np.arange(1, self.T) if grid is None else grid.astype(int)
        edges = np.concatenate([[0.5], (grid[1:] + grid[:-1]) / 2, [self.T - 0.5]])
        L_t = torch.zeros(B, len(grid), dtype=torch.float64)
        for i in tqdm(reversed(range(len(grid))), desc="variational bound", total=len(grid),
                      disable=not progress):
            t = int(grid[i])
            xt, tt, eps = noised(t)
            with autocast(x0.device):
                error = eps - unet(xt, tt)
            error = error.cpu().double().square().flatten(1).sum(1)  # (B,)
            beta, alpha, abar, q_var = (b[t].cpu().double() for b in (
                self.beta, self.alpha, self.alpha_bar, self.posterior_variance))
            weight = beta**2 / (2 * beta * alpha * (1 - abar))  # eq. 12: between the means
            spread = (beta / q_var).log() + q_var / beta - 1  # and between the variances
            L_t[:, i] = weight * error + D / 2 * spread

        x1, t0, _ = noised(0)
        with autocast(x0.device):
            eps_theta = unet(x1, t0)
        mean = self.predict_x0(x1, t0, eps_theta).cpu().double()
        L_0 = -grey_level_log_likelihood(x0_64, mean, self.beta[0].cpu().double().sqrt())
        L_0 = L_0.flatten(1).sum(1)
        total = L_T + L_t @ torch.from_numpy(np.diff(edges)) + L_0
        nats = D * math.log(2)  # nats per image -> bits per dimension
        return {"L_T": L_T / nats, "L_t": L_t / nats, "L_0": L_0 / nats, "total": total / nats}

    # --- sampling ---------------------------------------------------------------------

    def step(self, unet, xt, t, t_prev, z, eta=0.0, clip=True):
        """One step from t down to t_prev (DDIM eq. 12). t, t_prev: (B,); -1 is clean.

        z: unit noise of x_t's shape.  eta = 0 is deterministic; eta = 1 with t_prev =
        t-1 is DDPM's ancestral step, of mean mu tilde_t and variance beta tilde_t (DDIM
        eq. 16).
        """
        with autocast(xt.device):
            eps = unet(xt, t)
        x0 = self.predict_x0(xt, t, eps)
        x0 = x0.clamp(-1, 1) if clip else x0  # images live in [-1, 1], latents do not
        abar = self._at(self.alpha_bar, t, xt)
        abar_prev = torch.where(t_prev < 0, 1.0, self.alpha_bar[t_prev.clamp(min=0)])
        abar_prev = abar_prev.view_as(abar)
        # The direction to x_t comes from the clipped x_0, so that the two agree.
        eps = (xt - abar.sqrt() * x0) / (1 - abar).sqrt()
        sigma = eta * ((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)).sqrt()
        direction = (1 - abar_prev - sigma**2).clamp(min=0).sqrt() * eps
        return abar_prev.sqrt() * x0 + direction + sigma * z

    @torch.no_grad()  # not inference_mode, in which autocast caches nothing
    def sample(self, unet, n, shape, steps=None, eta=0.0, seed=0, batch_size=None, clip=True,
               progress=False):
        """n samples of p_theta, shape (C, H, W): (n, C, H, W) float32, on the CPU.

        steps=S: through S evenly spaced steps, all T for None; with eta = 1 that is
        DDPM's ancestral sampling.  Image i gets its noise from (seed, i) alone, so
        neither batch_size nor n changes it.  batch_size: None takes 500 on a GPU, 125
        on a CPU, whose caches hold no more.  Raises UserError if S is not in 1 .. T, or
        if an image is not finite.
        """
        if steps is not None and not 1 <= steps <= self.T:
            raise UserError(f"sampling steps must be from 1 to {self.T}, not {steps}")
        grid = np.linspace(self.T - 1, 0, steps or self.T).round().astype(int).tolist()
        device = self.alpha_bar.device
        batch_size = batch_size or (125 if device.type == "cpu" else 500)
        out = torch.empty(n, *shape)
        bar = tqdm(total=n * len(grid), desc="sampling", unit="img*step", unit_scale=True,
                   disable=not progress)
        # autocast around the loop, too: each weight is cast once and not at every step
        with autocast(device), bar:
            for start in range(0, n, batch_size):
                B = min(batch_size, n - start)
                noise = ImageNoise(seed, range(start, start + B), shape, device)
                x = noise().clone()  # x_T ~ N(0, I): (B, C, H, W)
                zeros = torch.zeros_like(x)
                for t, t_prev in zip(grid, [*grid[1:], -1]):
                    tt = torch.full((B,), t, device=device)
                    z = noise() if eta > 0 and t_prev >= 0 else zeros
                    x = self.step(unet, x, tt, torch.full_like(tt, t_prev), z, eta, clip)
                    bar.update(B)
                out[start : start + B] = x.cpu()
        if not torch.isfinite(out).all():  # which nothing that counts samples would notice
            raise UserError("the network draws images that are not finite: it is broken, or too "
                            "large for half precision; if it was to unlearn, nothing was written: "
                            "try a larger --gamma or a smaller --lr")
        return out


class ImageNoise:
    """Unit Gaussian noise, a stream per image: stream i depends on (seed, i) alone."""

    def __init__(self, seed, indices, shape, device="cpu"):
        self.streams = [np.random.default_rng([seed, i]) for i in indices]
        self.draws = np.empty((len(self.streams), *shape), dtype=np.float32)
        self.device = device

    def __call__(self):
        """The next draw, (B, C, H, W). On a CPU it takes the memory of the last one."""
        for rng, draw in zip(self.streams, self.draws):
            rng.standard_normal(dtype=np.float32, out=draw)
        return torch.from_numpy(self.draws).to(self.device)


def grey_level_log_likelihood(x, mean, std):
    """log of the mass that N(mean, std^2) gives to x's grey level (DDPM eq. 13).

    The bin is x +- 1/255, open at both ends of [-1, 1].
    """
    upper, lower = ((x + edge - mean) / std for edge in (1 / 255, -1 / 255))
    upper = torch.where(x > 0.999, torch.ones_like(x), torch.special.ndtr(upper))
    lower = torch.where(x < -0.999, torch.zeros_like(x), torch.special.ndtr(lower))
    return (upper - lower).clamp(min=1e-12).log()


def training_step(unet, diffusion, optimizer, x0):
    """One step of DDPM's training (algorithm 1) on x0 (B, C, H, W). Returns the loss.

    Where the loss is not a finite number, no step was taken.
    """
    t = stratified_timesteps(len(x0), 0, diffusion.T, x0.device)  # (B,)
    loss = diffusion.simple_loss(unet, x0, t, torch.randn_like(x0)).mean()  # DDPM eq. 14
    value = loss.item()
    if math.isfinite(value):
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return value


# --------------------------------------------------------------------------------------
# The checkpoint file


@dataclass
class Checkpoint:
    """What load_checkpoint returns.

    unet        UNet with the weights theta*, in eval mode, called as unet(x, t)
    diffusion   Diffusion with the schedule that it was trained with
    posterior   {"mean", "std": dicts of tensors, "n"}, or None where training kept none
    config      {"unet": arguments, "schedule", "timesteps", "velocity", "image_shape"}
    data        which images exactly: {"name", "source", "classes", "excluded", ...}
    step        training steps done
    forgotten   None, or what vdu.py unlearned, from which checkpoint, and how
    raw         the file's whole dictionary
    """

    unet: UNet
    diffusion: Diffusion
    posterior: dict | None
    config: dict
    data: dict
    step: int
    forgotten: dict | None
    path: str
    raw: dict


def build(config, device="cpu"):
    """(UNet, Diffusion) from a checkpoint's `config`, with fresh weights."""
    diffusion = Diffusion(config["schedule"], config["timesteps"])
    alpha_bar = diffusion.alpha_bar.clone() if config["velocity"] else None
    with torch.device(device):
        unet = UNet(**config["unet"], alpha_bar=alpha_bar)
    return unet.to(device), diffusion.to(device)


def load_checkpoint(path, device="cpu", assume=None):
    """A checkpoint of train_ddpm.py or vdu.py, or published DDPM weights.

    Its unet is in eval mode and on `device`, the posterior as it lies in the file, in
    float32. assume: published_checkpoint's.
    Raises UserError if the file is missing, truncated, not weights, or in none of these
    layouts.
    """
    raw = read_file(path)
    raw = published_checkpoint(raw, path, assume) or raw
    entries = set(raw) if isinstance(raw, dict) else set()
    missing = {"config", "weights", "data", "step"} - entries
    if missing:
        raise UserError(f"{path} is not a checkpoint of this repository, nor DDPM's published "
                        f"weights: it lacks {', '.join(sorted(missing))}")
    try:
        return checkpoint_of(raw, os.fspath(path), device)
    except UserError:
        raise
    except Exception as e:  # the right names, and anything below them
        reason = str(e).splitlines()[-1:] or [type(e).__name__]
        raise UserError(f"{path}: what it holds does not fit together, as a checkpoint "
                        f"({reason[0].strip()[:120]})") from e


def checkpoint_of(raw, path, device):
    """A file's dictionary as a Checkpoint. Raises whatever wrong contents cause."""
    config, data, weights, posterior = (raw.get(k) for k in ("config", "data", "weights",
                                                             "posterior"))
    blocks = config["unet"].get("num_res_blocks", 1)
    if not 1 <= config["timesteps"] <= 10**5 or blocks > len(weights):
        raise ValueError("sizes out of range")
    # compared before they take memory: the file may describe a network of any size
    build(config, "meta")[0].load_state_dict({k: v.to("meta") for k, v in weights.items()})
    check_finite(path, weights)
    unet, diffusion = build(config, device)
    unet.load_state_dict(weights)
    if posterior:
        mean, std = ({k: v.float() for k, v in posterior[m].items()} for m in ("mean", "std"))
        both = {k: mean[k] + std[k] for k in mean}  # std may be one number for a tensor
        shapes = {k: p.shape for k, p in unet.named_parameters()}
        if any({k: v.shape for k, v in d.items()} != shapes for d in (mean, both)):
            raise ValueError("the posterior is of another network")
        check_finite(path, {f"posterior's {k}": v for k, v in both.items()})
        posterior = {"mean": mean, "std": std, "n": int(posterior["n"])}
    forgotten = raw.get("forgotten")
    lacking = {"name", "source", "root", "classes", "excluded", "images"} - set(data)
    if forgotten:
        lacking |= {"classes", "images_from", "checkpoint", "settings"} - set(forgotten)
    if lacking:
        raise ValueError(f"it lacks {', '.join(sorted(lacking))}")
    return Checkpoint(unet.eval(), diffusion, posterior, config, data, int(raw["step"]), forgotten,
                      path, raw)


CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse",
                   "ship", "truck"]


def published_checkpoint(raw, path, assume=None):
    """Published DDPM weights (unet.py) as the dictionary of a checkpoint.

    raw: what the file holds.  assume: entries of diffusers' config.json, beside which
    such weights lie; they go before what it says.  Returns None for a file in none of
    the published layouts. Where nothing says the size of the images, it is read off
    where the network attends, at 16x16 in every DDPM (Ho et al. 2020, appendix B).
    Raises UserError that lists the names that are missing.
    """
    raw = raw.get("state_dict", raw) if isinstance(raw, dict) else None
    if not isinstance(raw, dict):
        return None
    if any(str(k).startswith("model.diffusion_model.") for k in raw):
        raise UserError(f"{path} is a Stable Diffusion checkpoint: sd_unlearn.py is for those")
    try:
        config = read_diffusers_config(path, assume or {}) if is_diffusers(raw) else {}
        published = from_published(raw, config)
    except (ValueError, AttributeError, OSError) as e:
        raise UserError(f"{path}, in a layout of DDPM's published weights, {e}") from e
    if published is None:
        return None
    sizes, weights = published
    channels = sizes["in_channels"]
    size = config.get("sample_size") or 16 * (sizes["attention_resolutions"] or [2])[0]
    config = {"unet": sizes, "schedule": "linear", "timesteps": 1000, "velocity": False,
              "image_shape": (channels, size, size)}
    cifar10 = (channels, size) == (3, 32)
    data = {"name": "cifar10" if cifar10 else "unknown", "source": "published weights",
            "root": None, "classes": CIFAR10_CLASSES if cifar10 else [], "excluded": [],
            "images": 50_000 if cifar10 else None}
    print(f"{path}: published weights; taken to be of images of {size}x{size}, trained with the "
          f"linear schedule of 1,000 steps{', and CIFAR-10' * cifar10}")
    return {"config": config, "weights": weights, "data": data, "step": 0, "posterior": None}


# What google/ddpm-cifar10-32's config.json says of what no tensor tells.
DDPM_CONFIG = {"attention_head_dim": None, "norm_eps": 1e-6, "downsample_padding": 0,
               "flip_sin_to_cos": False, "freq_shift": 1}


def read_diffusers_config(path, assume):
    """The config.json beside the weights, or DDPM's, with the entries of `assume`."""
    beside = Path(path).with_name("config.json")
    if beside.exists():
        return {**json.loads(beside.read_text(encoding="utf-8")), **assume}
    config = {**DDPM_CONFIG, **assume}
    entries = [f"{key}={json.dumps(value)}" for key, value in config.items()]
    print(f"no config.json beside {path}: assuming that it would say {', '.join(entries)} (vdu.py "
          "--assume KEY=VALUE says otherwise)")
    return config


def save_checkpoint(path, contents):
    """Write the dictionary `contents` (tensors and plain values), all or nothing."""
    write_atomically(path, lambda f: torch.save(contents, f))


def write_atomically(path, write):
    """Open `path` for bytes, and call write(file).

    The bytes go to a temporary file beside it, which then takes the name in one step: a
    crash, Ctrl-C or a full disk leaves the old file as it was. Raises UserError when it
    cannot be written.
    """
    path = os.fspath(path)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # torch reports a full disk as a RuntimeError
        kept = ", the file that was there is untouched" if os.path.exists(path) else ""
        raise UserError(f"cannot write {path} ({first_line(e)}){kept}; free some space or choose "
                        "another --output") from e
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


class StandIn:
    """What a class of another package becomes when a file is read: it does nothing."""

    def __new__(cls, *args, **kwargs):
        # torch's reader fills no mapping but its own; numpy's arrays set a state.
        return super().__new__(cls) if cls.__module__.startswith("numpy") else OrderedDict()

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


# What training tools leave beside the weights, and Python, numpy and torch count as
# their own: settings, dates, paths, states of schedulers and of random numbers.
HARMLESS = re.compile(
    r"argparse\.Namespace|collections\.(defaultdict|deque)|datetime\.\w+|typing\.Any|"
    r"pathlib\.(\w+\.)?\w*Path|numpy\.(_?core\.multiarray\.)?(scalar|dtype|ndarray|"
    r"_reconstruct)|numpy\.random\.\w+\.\w+|torch\.optim\.\w+\.[A-Z]\w+|"
    r"builtins\.(bool|dict|float|frozenset|int|list|str|tuple)")


def harmless(name):
    """Whether a foreign name in a pickle may be read past: listed above, or a class
    (CapWords) from outside Python and torch.

    Nothing of that name is imported or called either way: a StandIn takes its place.
    But a file that asks for a function (posix.system, builtins.exec, ...) is better
    refused.
    """
    module, _, last = name.rpartition(".")
    root = module.split(".")[0]
    foreign = root not in sys.stdlib_module_names and root != "torch"
    return HARMLESS.fullmatch(name) or (foreign and last[:1].isupper())


def check_archive(path):
    """Raise UserError for what torch never writes and a reader could choke on.

    A compressed archive, memory asked for by number (bytearray), or tuples in tuples
    without end, which are found before anything is unpickled.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > os.path.getsize(path):
            raise UserError(f"{path} was refused: it is compressed, and files of weights are not")
        pickles = [archive.read(e) for e in entries if e.filename.endswith("data.pkl")]
    depth = 0  # tuples since anything else was built: no more than a handful in a tensor
    for opcode, argument, _ in (op for text in pickles for op in pickletools.genops(text)):
        if opcode.name in ("REDUCE", "BINPERSID", "SETITEM", "SETITEMS", "APPEND", "APPENDS"):
            depth = 0
        depth += opcode.name.startswith("TUPLE")
        if depth > 1000 or (opcode.name == "GLOBAL" and argument.endswith(" bytearray")):
            raise UserError(f"{path} was refused: it holds what a file of weights never needs")


def check_tensors(contents, path):
    """Raise UserError for a tensor that is larger than the numbers behind it."""
    values = [contents]
    while values:
        value = values.pop()
        if isinstance(value, torch.Tensor) and value.layout == torch.strided:
            if value.untyped_storage().nbytes() < value.numel() * value.element_size():
                raise UserError(f"{path} was refused: it holds a tensor that repeats its numbers")
        elif isinstance(value, (dict, list, tuple)):
            values += value.values() if isinstance(value, dict) else value


def read_file(path, lazy=False, make_one="train one with: python train_ddpm.py --dataset mnist"):
    """torch.load(weights_only=True) with errors that say what is wrong; safetensors.

    Never executes what a pickle asks for: objects of other packages beside the weights
    (a trainer's callbacks) are read as StandIns. lazy=True leaves the numbers on disk
    until they are needed. Raises UserError for a file that is missing, cut short, or
    asks for more.
    """
    if not os.path.isfile(path):
        raise UserError(f"no checkpoint at {path}; {make_one}")
    if os.fspath(path).endswith(".safetensors"):
        return read_safetensors(path)
    try:
        is_zip = zipfile.is_zipfile(path)  # torch's format since 1.6: it can be listed and mapped
        foreign = []
        if is_zip:
            check_archive(path)
            foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        refused = sorted(name for name in foreign if not harmless(name))
        if refused:
            raise UserError(f"{path} is not a file of weights and was refused: it asks for "
                            f"{', '.join(refused[:3])}")
        split = [name.rpartition(".") for name in foreign]
        stand_ins = [type(last, (StandIn,), {"__module__": module}) for module, _, last in split]
        with torch.serialization.safe_globals(stand_ins):
            raw = torch.load(path, map_location="cpu", weights_only=True, mmap=lazy and is_zip)
        check_tensors(raw, path)
        return raw
    except UserError:
        raise
    except pickle.UnpicklingError as e:
        raise UserError(f"{path} is not a file of weights and was refused: it holds other Python "
                        "objects, or no pickle at all") from e
    except Exception as e:  # a reader of pickles can stumble in any way over other bytes
        raise UserError(f"{path} is damaged or cut short, or not a PyTorch file "
                        f"({first_line(e)[:80]})") from e


# The safetensors format: 8 bytes that count the header's, the header in JSON (name ->
# dtype, shape, first and last byte of the data), then the data of all tensors.
SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
               "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
               "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path):
    """{name: tensor}, left on disk until they are used.

    Raises UserError for a file whose header and size do not agree in everything.
    """
    def unique(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a name stands there twice")
        return dict(pairs)

    try:
        with open(path, "rb") as f:
            content = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)  # the file stays as it is
        start = 8 + int.from_bytes(content[:8], "little")
        if not 8 < start <= min(len(content), 8 + 100_000_000):
            raise ValueError("its header's length is wrong")
        header = json.loads(content[8:start], object_pairs_hook=unique)
        header.pop("__metadata__", None)
        tensors, end = {}, 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape, (first, last) = (SAFETENSORS[entry["dtype"]], entry["shape"],
                                           entry["data_offsets"])
            fits = last - first == math.prod(shape) * dtype.itemsize and min(shape, default=0) >= 0
            if first != end or not fits or start + last > len(content):  # no gap, no overlap
                raise ValueError(f"{name} does not lie where the header says")
            data = torch.empty(0, dtype=torch.uint8)
            if last > first:
                data = torch.frombuffer(content, dtype=torch.uint8, count=last - first,
                                        offset=start + first)
            aligned = (start + first) % dtype.itemsize == 0
            tensors[name] = (data if aligned else data.clone()).view(dtype).view(shape)
            end = last
        if start + end != len(content):
            raise ValueError("it holds bytes that its header does not name")
        return tensors
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as e:
        raise UserError(f"{path} is damaged or cut short, or not a safetensors file "
                        f"({first_line(e)[:80]})") from e


def write_safetensors(file, tensors, metadata):
    """Write {name: tensor} to an open file. metadata: {str: str}."""
    names, header, end = {v: k for k, v in SAFETENSORS.items()}, {"__metadata__": metadata}, 0
    for name, v in tensors.items():
        first, end = end, end + v.numel() * v.element_size()
        header[name] = {"dtype": names[v.dtype], "shape": list(v.shape),
                        "data_offsets": [first, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the data begin at a multiple of 8
    file.write(len(text).to_bytes(8, "little") + text)
    for v in tensors.values():
        file.write(bytes_of(v))


def bytes_of(tensor):
    """The bytes of a tensor's numbers, in order: a numpy array."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def digest(tensors):
    """A name for the numbers of tensors: 16 hexadecimal digits of their SHA-256."""
    sha = hashlib.sha256()
    for v in tensors:
        sha.update(bytes_of(v))
    return sha.hexdigest()[:16]


def check_finite(path, tensors):
    """Raise UserError that names the first of {name: tensor} with a nan or infinity."""
    for name, v in tensors.items():
        if v.is_floating_point() and not torch.isfinite(v).all():
            raise UserError(f"{path} is broken: {name} holds numbers that are not finite")


# --------------------------------------------------------------------------------------
# What the command lines share: errors, arguments, Ctrl-C, devices


class UserError(ValueError):
    """What the person at the keyboard can put right: one line, exit code 2."""


def first_line(error):
    """The first line of an exception's message, or its type's name without one."""
    return (str(error).splitlines() or [type(error).__name__])[0]


class ArgumentParser(argparse.ArgumentParser):
    """argparse with one line per error, and every default in --help."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=HelpFormatter, **kwargs)

    def error(self, message):
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):  # no "(default: None)", and none beside one in the text
        plain = not action.default or "(default:" in action.help
        return action.help if plain else super()._get_help_string(action)


def number(kind, low, high=math.inf, above=False, below=False):
    """An argparse `type`: a `kind` (int or float) from low to high, finite.

    above: low itself is excluded.  below: high itself is.
    """
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        inside = low <= value <= high and abs(value) < math.inf  # nan is inside of nothing
        if not inside or (above and value == low) or (below and value == high):
            words = f"{'above' if above else 'at least'} {low:g}"
            words += f" and {'below' if below else 'at most'} {high:.10g}" * (high < math.inf)
            whole = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"must be a {whole} {words}, not {text!r}")
        return value

    return parse


def key_value(text):
    """An argparse `type`: KEY=VALUE, the value in JSON -> (key, value)."""
    key, equals, value = text.partition("=")
    try:
        return key, json.loads(value if equals else "")
    except ValueError as e:
        raise argparse.ArgumentTypeError(f"must be KEY=VALUE, such as norm_eps=1e-5 or "
                                         f"attention_head_dim=null, not {text!r}") from e


class TimeRange(argparse.Action):
    """--t-range LOW HIGH: two shares of T, 0 <= LOW < HIGH <= 1."""

    def __call__(self, parser, namespace, values, option=None):
        low, high = values
        if not (0 <= low < high <= 1 and high - low >= 0.01):
            parser.error(f"argument {option}: needs two shares of T, 0 <= LOW < HIGH <= 1, at "
                         "least 0.01 apart")
        setattr(namespace, self.dest, [low, high])


def add_shared_flags(parser):
    """The flags that all commands have."""
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    parser.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=0,
                        help="repeats a run on the same machine")
    parser.add_argument("--device", default="auto",
                        help="auto (CUDA, else MPS, else CPU), cpu, cuda, cuda:1, mps")


def fill_in(args, defaults):
    """Give the arguments that the command line left open, as None, their defaults."""
    for name, value in defaults.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)


def check_outputs(paths, overwrite):
    """Raise UserError, before any work, for what may not or cannot be written."""
    for path in map(Path, paths):
        if len(path.name.encode()) > 240:  # most file systems end at 255
            raise UserError(f"{path} cannot be written, its name is too long: choose another "
                            "--output")
        if path.is_dir():
            raise UserError(f"{path} is a folder, and a file of that name is to be written")
        if path.exists() and not overwrite:
            raise UserError(f"{path} exists already; add --overwrite to replace it, or choose "
                            "another --output")
        folder = next(p for p in path.absolute().parents if p.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise UserError(f"{path} cannot be written; choose another --output")


def check_checkpoint_name(path):
    """Raise UserError for an --output that looks like a file of another kind."""
    if Path(path).suffix.lower() in (".safetensors", ".png", ".json"):
        raise UserError(f"{path}: a checkpoint holds more than tensors, and is a PyTorch file: "
                        "choose an --output that ends in .pt")


def run_command_line(main):
    """Call main(). A UserError ends in one line and exit code 2, Ctrl-C in 130."""
    for stream in (sys.stdout, sys.stderr):  # a class may have a name that a terminal cannot show
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


class StopRequest:
    """The first Ctrl-C (or SIGTERM) becomes a flag, read between two steps; a second
    one interrupts at once."""

    def __enter__(self):
        self.requested = False
        signals = (signal.SIGINT, signal.SIGTERM)
        self.previous = {s: signal.signal(s, self._handle) for s in signals}
        return self

    def _handle(self, signum, frame):
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(self, *exc):
        for s, handler in self.previous.items():
            signal.signal(s, handler)


def pick_device(name="auto"):
    """A torch.device by name; "auto" is the accelerator, or the CPU."""
    if name == "auto":
        available = torch.accelerator.is_available()
        name = torch.accelerator.current_accelerator().type if available else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise UserError(f"device {name!r} cannot be used here ({first_line(e)}); try --device "
                        "cpu") from e
    return device


PRECISIONS = {"auto": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
precision = "auto"  # the command line that offers --precision sets it


def autocast(device):
    """Autocast to `precision`; "auto" is bfloat16 where that is fast, or float32.

    Fast means recent CUDA GPUs, and CPUs with AVX512-BF16.
    """
    device = torch.device(device)
    if device.type == "cuda":
        gains = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        gains = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    dtype = PRECISIONS[precision] or (torch.bfloat16 if gains else torch.float32)
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def peak_memory(device):
    """The most memory that this process has held: of the GPU's, or resident."""
    if torch.device(device).type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"
    if resource is None:
        return "not known on this system"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.1f} GiB"


def count(n):
    """2587000 -> '2.59M'."""
    return f"{n / 1e6:.2f}M" if n >= 1e6 else f"{n / 1e3:.0f}k"
