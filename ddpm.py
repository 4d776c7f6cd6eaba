"""The diffusion: schedules, loss, variational bound, sampling; the checkpoint file.

Holds    Diffusion (q and p of DDPM, sampling) and the training step; the checkpoint
         file; the names under which others publish DDPM's weights; last, what the
         command lines share.
Reads    checkpoint files, and DDPM's weights as others publish them.
Writes   checkpoint files, whole or not at all.
Paper    VDU (arXiv 2510.04058), its background on diffusion models. The sources:
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
import os
import pickle
import re
import signal
import sys
import zipfile
from collections import OrderedDict, namedtuple
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
import torch.nn as nn
from torch.distributions import Normal, kl_divergence
from tqdm import tqdm

from unet import UNet

# --------------------------------------------------------------------------------------
# The diffusion

def beta_schedule(name, T):
    """The variances beta_t of the forward process: (T,) float64.

    linear         from 1e-4 to 0.02 in even steps, for T = 1000 (DDPM, section 4); a
                   shorter chain takes proportionally larger steps
    cosine         from abar_t = f(t) / f(0), f(t) = cos^2((t/T + s) / (1 + s) pi/2),
                   s = 0.008 (Nichol & Dhariwal 2021, eq. 17): it leaves more to see
    scaled_linear  sqrt(beta_t) from sqrt(0.00085) to sqrt(0.012) evenly: Stable
                   Diffusion's"""
    if name == "linear":
        scale = 1000 / T
        beta = torch.linspace(1e-4 * scale, 0.02 * scale, T, dtype=torch.float64)
    elif name == "cosine":
        u = torch.arange(T + 1, dtype=torch.float64) / T
        f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        beta = 1 - f[1:] / f[:-1]  # abar_t / abar_{t-1} = alpha_t = 1 - beta_t: f(0) cancels
    elif name == "scaled_linear":
        beta = torch.linspace(0.00085**0.5, 0.012**0.5, T, dtype=torch.float64) ** 2
    else:
        raise ValueError(f"no noise schedule is called {name!r}")
    return beta.clamp(max=0.999)


def stratified_timesteps(n, low, high, device="cpu"):
    """n step indices, one from each n-th of low .. high-1, in random order: (n,) int64.
    The loss differs a thousandfold between t near 0 and t near T. To cover the range
    evenly within a batch takes that out of the gradient's noise."""
    u = (torch.randperm(n) + torch.rand(n)) / n  # (n,) in [0, 1)
    return (low + u * (high - low)).long().clamp(max=high - 1).to(device)


def at(buffer, t, x):
    """buffer[t] for a batch of steps t (B,), in a shape that multiplies x (B, ...)."""
    return buffer[t].view(-1, *[1] * (x.dim() - 1))


def image_noise(streams, shape):
    """The next unit noise of each stream: (B, *shape) float32. One stream per image."""
    draws = [rng.standard_normal(shape, dtype=np.float32) for rng in streams]
    return torch.from_numpy(np.stack(draws))


def grey_level_log_likelihood(x, mean, std):
    """log of the mass that N(mean, std^2) gives to x's grey level (DDPM eq. 13).
    The bin is x +- 1/255, open at both ends of [-1, 1]. Shapes: like x."""
    upper, lower = ((x + edge - mean) / std for edge in (1 / 255, -1 / 255))
    upper = torch.where(x > 0.999, torch.ones_like(x), torch.special.ndtr(upper))
    lower = torch.where(x < -0.999, torch.zeros_like(x), torch.special.ndtr(lower))
    return (upper - lower).clamp(min=1e-12).log()


class Diffusion(nn.Module):
    """q and p_theta of DDPM, for a network eps_theta called as unet(x_t, t).
    schedule: a name that beta_schedule knows, or a (T,) tensor of betas of your own.
    timesteps: T, where schedule is a name.  Every buffer is (T,), float32."""

    def __init__(self, schedule="linear", timesteps=1000):
        super().__init__()
        own = isinstance(schedule, torch.Tensor)
        beta = schedule.double() if own else beta_schedule(schedule, timesteps)
        self.T = len(beta)
        alpha = 1 - beta
        alpha_bar = alpha.cumprod(0)  # abar_t = prod_{s<=t} alpha_s
        alpha_bar_prev = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        for name, value in {
                "beta": beta, "alpha": alpha, "alpha_bar": alpha_bar,
                "sqrt_alpha_bar": alpha_bar.sqrt(),
                "sqrt_one_minus_alpha_bar": (1 - alpha_bar).sqrt(),
                # eq. 7
                "posterior_variance": beta * (1 - alpha_bar_prev) / (1 - alpha_bar)}.items():
            self.register_buffer(name, value.float())

    def q_sample(self, x0, t, eps):
        """x_t ~ N(sqrt(abar_t) x_0, (1 - abar_t) I), given its noise (DDPM eq. 4)."""
        return at(self.sqrt_alpha_bar, t, x0) * x0 + at(self.sqrt_one_minus_alpha_bar, t, x0) * eps

    def predict_x0(self, xt, t, eps):
        """The x_0 from which q_sample makes x_t with this noise (eq. 15)."""
        noise = at(self.sqrt_one_minus_alpha_bar, t, xt) * eps
        return (xt - noise) / at(self.sqrt_alpha_bar, t, xt)

    def bound_weight(self, t):
        """C_t = beta_t^2 / (2 sigma_t^2 alpha_t (1-abar_t)) with sigma_t^2 = beta_t:
        the weight of || eps - eps_theta ||^2 in the bound (DDPM eq. 12), like t."""
        return self.beta[t] / (2 * self.alpha[t] * (1 - self.alpha_bar[t]))

    def simple_loss(self, unet, x0, t, eps):
        """|| eps - eps_theta(x_t, t) ||^2 / D, x_t of q_sample (DDPM eq. 14).
        x0, eps: (B, C, H, W).  t: (B,).  Returns (B,): the squared error per dimension,
        1 for a network that always says 0. Of the bound below it keeps the errors of
        eps with C_t = 1, that of t = 0 too, where the bound has L_0 over grey levels.
        It drops L_T, which does not depend on theta, and constants."""
        with autocast(x0.device):
            eps_theta = unet(self.q_sample(x0, t, eps), t)
        return (eps - eps_theta).square().flatten(1).mean(1)  # (B, C, H, W) -> (B,)

    @torch.no_grad()
    def variational_bound(self, unet, x0, steps=None, seed=0):
        """-log p_theta(x_0) <= L_0 + sum_t L_{t-1} + L_T (eq. 5), bits/dimension.

        x0: (B, C, H, W) images of 256 grey levels, scaled to [-1, 1].  This p_theta has
        sigma_t^2 = beta_t, the one that `step` draws from beta tilde_t: two models.
        steps=None computes every L_{t-1}; steps=S computes S of them, close together
        where t is small and they are large, and sums by the trapezoidal rule.
        One draw of eps for each. Returns a dict of float64 tensors, named as in the
        paper:
          "L_T" (B,)     KL(q(x_T | x_0) || N(0, I)): what x_T still knows, no theta
          "L_t" (B, S)   KL(q(x_{t-1} | x_t, x_0) || p_theta(x_{t-1} | x_t)), t > 1
          "L_0" (B,)     -log p_theta(x_0 | x_1), over the grey levels
          "total" (B,)   their sum
        Only with the weights of eq. 12, which `simple_loss` drops, are they bounds."""
        B, D = x0.shape[0], x0[0].numel()
        generator = torch.Generator().manual_seed(seed)
        x0_64, abar_T = x0.cpu().double(), self.alpha_bar[-1].cpu().double()
        q_T = Normal(abar_T.sqrt() * x0_64, (1 - abar_T).sqrt())
        L_T = kl_divergence(q_T, Normal(0.0, 1.0)).flatten(1).sum(1)  # (B,) nats

        def prediction(t):  # x_t, t as a batch, the noise, and the network's guess of it
            tt = torch.full((B,), t, device=x0.device)
            eps = torch.randn(x0.shape, generator=generator).to(x0.device)
            xt = self.q_sample(x0, tt, eps)
            with autocast(x0.device):
                return xt, tt, eps, unet(xt, tt)
        # The steps to compute, and the edges between which each of them stands for all.
        grid = np.arange(1, self.T)
        if steps and steps < self.T - 1:
            i = np.arange(steps)  # whole numbers, each larger than the one before
            grid = np.maximum.accumulate(np.geomspace(1, self.T - 1, steps).round() - i) + i
            grid = grid.astype(int)
        edges = np.concatenate([[0.5], (grid[1:] + grid[:-1]) / 2, [self.T - 0.5]])
        L_t = torch.zeros(B, len(grid), dtype=torch.float64)
        for i in reversed(range(len(grid))):
            t = int(grid[i])
            _, _, eps, eps_theta = prediction(t)
            error = (eps - eps_theta).cpu().double().square().flatten(1).sum(1)  # (B,)
            beta, q_var = (b[t].cpu().double() for b in (self.beta, self.posterior_variance))
            # A KL between Gaussians: of their means (eq. 12), and of their variances.
            spread = (beta / q_var).log() + q_var / beta - 1
            L_t[:, i] = self.bound_weight(t).cpu().double() * error + D / 2 * spread

        x1, t0, _, eps_theta = prediction(0)
        mean = self.predict_x0(x1, t0, eps_theta).cpu().double()
        L_0 = -grey_level_log_likelihood(x0_64, mean, self.beta[0].cpu().double().sqrt())
        L_0 = L_0.flatten(1).sum(1)
        total = L_T + L_t @ torch.from_numpy(np.diff(edges)) + L_0
        bit = D * math.log(2)  # nats per image -> bits per dimension
        return {"L_T": L_T / bit, "L_t": L_t / bit, "L_0": L_0 / bit, "total": total / bit}

    def step(self, unet, xt, t, t_prev, z, eta=0.0, clip=True):
        """One step from t down to t_prev (DDIM eq. 12). t, t_prev: (B,); -1 is clean.

        z: unit noise of x_t's shape.  eta = 0 is deterministic; eta = 1 with t_prev =
        t-1 is DDPM's ancestral step, of mean mu tilde_t and variance beta tilde_t (DDIM
        eq. 16).  clip: keep x_0 in [-1, 1], as images are (DDPM's code clips, its text
        does not say so)."""
        with autocast(xt.device):
            eps = unet(xt, t)
        x0 = self.predict_x0(xt, t, eps)
        x0 = x0.clamp(-1, 1) if clip else x0
        abar = at(self.alpha_bar, t, xt)
        abar_prev = torch.where(t_prev < 0, 1.0, self.alpha_bar[t_prev.clamp(min=0)])
        abar_prev = abar_prev.view_as(abar)
        # The direction to x_t comes from the clipped x_0, so that the two agree.
        eps = (xt - abar.sqrt() * x0) / (1 - abar).sqrt()
        sigma = eta * ((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)).sqrt()
        direction = (1 - abar_prev - sigma**2).clamp(min=0).sqrt() * eps
        return abar_prev.sqrt() * x0 + direction + sigma * z

    @torch.no_grad()  # not inference_mode, in which autocast caches nothing
    def sample(self, unet, n, shape, steps=None, eta=0.0, seed=0, batch_size=None, clip=True,
               progress=False, series=""):
        """n samples of p_theta, shape (C, H, W): (n, C, H, W) float32, on the CPU.

        steps=S: through S evenly spaced steps, all T for None; with eta = 1 that is
        DDPM's ancestral sampling.  Image i gets its noise from (series, seed, i) alone,
        so neither batch_size nor n changes it, and two series share nothing, whatever
        their seeds.  Raises UserError if S is not in 1 .. T, or
        if an image is not finite."""
        if steps is not None and not 1 <= steps <= self.T:
            raise UserError(f"sampling steps must be from 1 to {self.T}, not {steps}")
        grid = np.linspace(self.T - 1, 0, steps or self.T).round().astype(int).tolist()
        device = self.alpha_bar.device
        # a CPU's caches hold no more than 125
        batch_size = batch_size or (125 if device.type == "cpu" else 500)
        out = torch.empty(n, *shape)
        bar = tqdm(total=n * len(grid), desc="sampling", unit="img*step", unit_scale=True,
                   disable=not progress)
        # autocast around the loop, too: each weight is cast once and not at every step
        with autocast(device), bar:
            for start in range(0, n, batch_size):
                B = min(batch_size, n - start)
                streams = [np.random.default_rng([crc32(series.encode()), seed, start + i])
                           for i in range(B)]
                x = image_noise(streams, shape).to(device)  # x_T ~ N(0, I): (B, C, H, W)
                for t, t_prev in zip(grid, [*grid[1:], -1]):
                    tt, noisy = torch.full((B,), t, device=device), eta > 0 and t_prev >= 0
                    z = image_noise(streams, shape).to(device) if noisy else torch.zeros_like(x)
                    x = self.step(unet, x, tt, torch.full_like(tt, t_prev), z, eta, clip)
                    bar.update(B)
                out[start : start + B] = x.cpu()
        if not torch.isfinite(out).all():  # a classifier would count such images as something
            raise UserError("the network draws images that are not finite: if it was to unlearn, "
                            "try a larger --gamma or a smaller --lr")
        return out


def training_step(unet, diffusion, optimizer, x0):
    """One step of DDPM's training (algorithm 1) on x0 (B, C, H, W). Returns the loss.
    Where the loss is not a finite number, no step is taken."""
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
# The checkpoint file: a dictionary of tensors and plain values, by torch.save

class Checkpoint(namedtuple("_", "unet diffusion posterior config data step forgotten path raw")):
    """What load_checkpoint returns.

    unet        UNet with the weights theta*, in eval mode, called as unet(x, t)
    diffusion   Diffusion with the schedule that it was trained with
    posterior   {"mean", "std": dicts of tensors, "n"}, or None where training kept none
    config      {"unet": arguments, "schedule", "timesteps", "velocity", "image_shape"}
    data        which images exactly: {"name", "source", "classes", "excluded", ...}
    step        training steps done
    forgotten   None, or what vdu.py unlearned, from which checkpoint, and how
    raw         the file's whole dictionary"""


def build(config, device="cpu"):
    """(UNet, Diffusion) from a checkpoint's `config`, with fresh weights."""
    diffusion = Diffusion(config["schedule"], config["timesteps"])
    alpha_bar = diffusion.alpha_bar.clone() if config["velocity"] else None
    with torch.device(device):
        unet = UNet(**config["unet"], alpha_bar=alpha_bar)
    return unet.to(device), diffusion.to(device)


def load_checkpoint(path, device="cpu"):
    """A checkpoint of train_ddpm.py or vdu.py, or published DDPM weights.
    Returns a Checkpoint, its network on `device`. Raises UserError if the file is
    missing, cut short, not weights, in none of these layouts, or not finite."""
    raw = read_file(path)
    try:
        raw = from_published(raw, path) or raw
        posterior, needed = raw.get("posterior"), ("name", "source", "classes", "excluded")
        unet, diffusion = build(raw["config"], device)
        unet.load_state_dict(raw["weights"])
        tensors = dict(unet.state_dict())
        if posterior:
            posterior = {m: {k: v.float() for k, v in posterior[m].items()}
                         for m in ("mean", "std")} | {"n": int(posterior["n"])}
            for k, p in unet.named_parameters():  # a std may be one number for a whole tensor
                both = posterior["std"][k] + posterior["mean"][k].view(p.shape)
                tensors[f"posterior's {k}"] = both
        data = {"root": None, **{k: raw["data"][k] for k in needed}, **raw["data"]}
        checkpoint = Checkpoint(unet.eval(), diffusion, posterior, raw["config"], data,
                                int(raw["step"]), raw.get("forgotten"), os.fspath(path), raw)
    except UserError:
        raise
    except Exception as e:  # a file may hold anything under any name
        what = f"{type(e).__name__}: {first_line(e)[:120]}"
        raise UserError(f"{path} holds no model of this code, nor DDPM's weights ({what})") from e
    check_finite(path, tensors)
    return checkpoint


def save_checkpoint(path, contents):
    """Write the dictionary `contents` (tensors, plain values), whole or not at all."""
    write_atomically(path, lambda f: torch.save(contents, f))


def check_finite(path, tensors):
    """Raise UserError that names the first of {name: tensor} with a nan or infinity."""
    for name, v in tensors.items():
        if v.is_floating_point() and not torch.isfinite(v).all():
            raise UserError(f"{path} is broken: {name} holds numbers that are not finite")


def digest(tensors):
    """A name for the numbers of tensors: 16 hexadecimal digits of their SHA-256."""
    sha = hashlib.sha256()
    for v in tensors:
        sha.update(v.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()[:16]


class StandIn:
    """What a class of another package becomes when a file is read. It does nothing."""

    def __new__(cls, *args, **kwargs):
        # torch's reader fills no mapping but its own; numpy's arrays set a state.
        return super().__new__(cls) if cls.__module__.startswith("numpy") else OrderedDict()

    def __setstate__(self, state):
        pass


def read_file(path, lazy=False, make_one="train one with: python train_ddpm.py --dataset mnist"):
    """The contents of a PyTorch file or a safetensors file, by its content.

    torch.load(weights_only=True) never executes what a pickle asks for. Objects of
    other packages beside the weights (a trainer's callbacks, arguments, dates, paths)
    are read as StandIns; torch refuses any other. lazy=True leaves the numbers on disk
    until they are used. Raises UserError for another file."""
    if not os.path.isfile(path):
        what = "it is a folder, name a file in it" if os.path.isdir(path) else make_one
        raise UserError(f"no checkpoint at {path}: {what}")
    if re.search(r"-\d+-of-\d+\.", os.fspath(path)):
        raise UserError(f"{path} is one shard of several: save the model as one file first")
    try:
        with open(path, "rb") as f:
            if f.read(9)[8:] == b"{":
                return read_safetensors(path)
        is_zip = zipfile.is_zipfile(path)  # torch's format since 1.6: it can be listed and mapped
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if is_zip else []
        own = {*sys.stdlib_module_names, "torch"} - {"argparse", "collections", "datetime",
                                                     "pathlib", "typing"}
        split = [name.rpartition(".") for name in names if name.split(".")[0] not in own]
        stand_ins = [type(last, (StandIn,), {"__module__": module}) for module, _, last in split]
        lazy = lazy and is_zip and not os.fspath(path).endswith(".safetensors")  # torch goes by it
        with torch.serialization.safe_globals(stand_ins), open(path, "rb") as f:
            return torch.load(path if lazy else f, "cpu", weights_only=True, mmap=lazy)
    except pickle.UnpicklingError as e:
        asks = re.findall(r"GLOBAL ([\w.]+)", str(e)) or ["other Python objects"]
        raise UserError(f"{path} was refused: no file of weights, or it asks for {asks[0]}") from e
    except Exception as e:  # over other bytes a reader of pickles can fail in any way
        raise UserError(f"{path} is damaged or cut short ({first_line(e)[:80]})") from e


# The safetensors format: 8 bytes that count the header's, the header in JSON (name ->
# dtype, shape, first and last byte of the data), then the data of all tensors.
SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
               "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
               "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
               "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path):
    """{name: tensor}, left on disk until they are used. Raises any error."""
    content = np.memmap(path, dtype=np.uint8, mode="c")  # in memory they may change, there not
    start = 8 + int.from_bytes(content[:8].tobytes(), "little")
    header = json.loads(content[8:start].tobytes())
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        dtype, (first, last) = SAFETENSORS[entry["dtype"]], entry["data_offsets"]
        data = torch.from_numpy(content[start + first : start + last])
        if (start + first) % dtype.itemsize:  # torch wants numbers at multiples of their size
            data = data.clone()
        tensors[name] = data.view(dtype).view(entry["shape"])  # fails where the sizes disagree
    return tensors


# --------------------------------------------------------------------------------------
# The names under which others publish DDPM's weights: "original", the converted
# TensorFlow weights (ema_diffusion_cifar10_model-790000.ckpt), and "diffusers"
# (diffusion_pytorch_model.bin of google/ddpm-cifar10-32, in two spellings).

CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse",
                   "ship", "truck"]
# unet.py             original            diffusers
NAMES = [row.split() for row in """
    time_embed.0.       temb.dense.0.       time_embedding.linear_1.
    time_embed.2.       temb.dense.1.       time_embedding.linear_2.
    input_blocks.0.0.   conv_in.            conv_in.
    middle_block.0.     mid.block_1.        mid_block.resnets.0.
    middle_block.1.     mid.attn_1.         mid_block.attentions.0.
    middle_block.2.     mid.block_2.        mid_block.resnets.1.
    out.0.              norm_out.           conv_norm_out.
    out.2.              conv_out.           conv_out.
    .in_layers.0.       .norm1.             .norm1.
    .in_layers.2.       .conv1.             .conv1.
    .emb_layers.1.      .temb_proj.         .time_emb_proj.
    .out_layers.0.      .norm2.             .norm2.
    .out_layers.3.      .conv2.             .conv2.
    .skip_connection.   .nin_shortcut.      .conv_shortcut.
    .norm.              .norm.              .group_norm.
    .q.                 .q.                 .to_q.
    .k.                 .k.                 .to_k.
    .v.                 .v.                 .to_v.
    .proj_out.          .proj_out.          .to_out.0.
""".strip().splitlines()]
OLD_SPELLING = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.",
                ".proj_attn.": ".to_out.0."}
# diffusers' config.json: what unet.py can be alone; what google/ddpm-cifar10-32 is; and
# what stands for an entry that is left out.
FIXED = {"act_fn": "silu", "norm_num_groups": 32, "resnet_time_scale_shift": "default",
         "mid_block_scale_factor": 1, "time_embedding_type": "positional", "add_attention": True,
         "center_input_sample": False, "class_embed_type": None, "num_class_embeds": None}
DDPM_CONFIG = {"attention_head_dim": None, "norm_eps": 1e-6, "downsample_padding": 0,
               "flip_sin_to_cos": False, "freq_shift": 1, "sample_size": None}
DEFAULTS = {**FIXED, "attention_head_dim": 8, "norm_eps": 1e-5, "downsample_padding": 1,
            "flip_sin_to_cos": True, "freq_shift": 0, "sample_size": None}


def read_config(path):
    """The config.json beside diffusers' weights, or DDPM's own where there is none.
    Raises UserError for a network that unet.py cannot be."""
    path = Path(path).with_name("config.json")
    if not path.exists():
        print(f"no {path}: assuming the settings of google/ddpm-cifar10-32's")
        return DDPM_CONFIG
    try:
        said = json.loads(path.read_text(encoding="utf-8-sig"))
        config = DEFAULTS | {k: v for k, v in said.items() if v is not None or k in (
            "attention_head_dim", "sample_size")}  # null says something there alone
        height, width = map(int, np.broadcast_to(config["sample_size"] or 0, 2))
        possible = {**{k: [v] for k, v in FIXED.items()}, "downsample_padding": (0, 1),
                    "freq_shift": [0 if config["flip_sin_to_cos"] else 1],
                    "act_fn": ("silu", "swish"), "attention_head_dim": (None, *range(1, 1025))}
        wrong = [f"{k} = {config[k]}" for k, values in possible.items() if config[k] not in values]
        if wrong or height != width or height < 0:
            raise ValueError(f"it says {', '.join(wrong) or f'sample_size = {height}, {width}'}")
        return {**config, "sample_size": height or None, "norm_eps": float(config["norm_eps"])}
    except (AttributeError, TypeError, ValueError) as e:
        raise UserError(f"{path} is not of a network like DDPM's: {first_line(e)}") from e


def published_name(ours, levels, blocks, diffusers):
    """Their name of a tensor of unet.py; q, k and v apart (".q." in place of ".qkv.").
    levels, blocks: how many levels the network has, and residual blocks per level on
    the way down. Both layouts count blocks and attention by level, where unet.py counts
    blocks: blocks + 1 to a level, the last of which is Downsample on the way down."""
    m = re.match(r"(in|out)put_blocks\.(\d+)\.(\d)\.(op|conv)?", ours)
    if m and not ours.startswith("input_blocks.0."):
        way = "down" if m[1] == "in" else "up"
        level, i = divmod(int(m[2]) - (way == "down"), blocks + 1)  # input_blocks.0 is conv_in
        level = level if diffusers or way == "down" else levels - 1 - level  # up: coarsest first
        part = (("resnets", "attentions") if diffusers else ("block", "attn"))[int(m[3]) % 2]
        part = f"{way}sample{'rs.0' * diffusers}.conv" if m[4] else f"{part}.{i}."
        ours = f"{way}{'_blocks' * diffusers}.{level}.{part}{ours[m.end():]}"
    for row in NAMES:
        ours = ours.replace(row[0], row[1 + diffusers])
    return ours


def from_published(raw, path):
    """Published weights of an unconditional DDPM as the dictionary of a checkpoint.

    raw: what the file holds.  Returns None for a file in none of the published layouts.
    What no tensor tells, a config.json beside diffusers' weights does; where nothing
    says the size of the images, it is read off where the network attends, which is at
    16x16 in every DDPM (Ho et al. 2020, appendix B). Raises ValueError that names what
    is missing, of another shape, or of a class-conditional network."""
    tensors = state_dict_of(raw)
    for old, new in OLD_SPELLING.items():
        tensors = {name.replace(old, new): v for name, v in tensors.items()}
    if any(k.startswith("model.diffusion_model.") for k in tensors):
        raise UserError(f"{path} is a Stable Diffusion checkpoint: sd_unlearn.py is for those")
    diffusers = "time_embedding.linear_1.weight" in tensors
    if not diffusers and "temb.dense.0.weight" not in tensors:
        return None
    config = read_config(path) if diffusers else DDPM_CONFIG
    # The network's sizes: levels, blocks and attention by name, widths by shape.
    pattern = re.compile(r"down(?:_blocks)?\.(\d+)\.(block|resnets|attn|attentions)\.(\d+)\."
                         r"(?:conv1|norm|group_norm)\.weight")
    found = {(m[2][0], int(m[1]), int(m[3])): v for k, v in tensors.items()
             if (m := pattern.match(k))}
    (width, in_channels), levels = tensors["conv_in.weight"].shape[:2], 1 + max(k[1] for k in found)
    attention = sorted({2**level for kind, level, _ in found if kind == "a"})
    first = "r" if diffusers else "b"  # of "resnets", of "block"
    sizes = dict(in_channels=in_channels, model_channels=width, dropout=0.1, num_heads=1,
                 channel_mult=[found[first, i, 0].shape[0] // width for i in range(levels)],
                 num_res_blocks=1 + max(k[2] for k in found), attention_resolutions=attention,
                 head_channels=config["attention_head_dim"], norm_eps=config["norm_eps"],
                 sin_first=not config["flip_sin_to_cos"], pad_end=config["downsample_padding"] == 0)
    with torch.device("meta"):
        unet = UNet(**sizes)
    # Every tensor of the network has its place; a trainer's leftovers may have none.
    shapes, names = unet.state_dict(), {}
    for ours in shapes:
        split = [ours.replace(".qkv.", f".{x}.") for x in "qkv"] if ".qkv." in ours else [ours]
        names[ours] = [published_name(name, levels, sizes["num_res_blocks"], diffusers)
                       for name in split]
    wanted = {name for theirs in names.values() for name in theirs}
    parts = {name.split(".")[0] for name in wanted} | {"class_embedding", "label_emb"}
    extra = sorted(name for name in tensors if name not in wanted and name.split(".")[0] in parts)
    for what, some in (("lacks", sorted(wanted - set(tensors))), ("has, unlike DDPM's,", extra)):
        if some:
            raise ValueError(f"the network {what} {len(some)} tensors: {', '.join(some[:3])}")
    # attention as a matrix or as a 1x1 convolution: the same numbers
    weights = {ours: torch.cat([tensors[name].float() for name in theirs]).view(shapes[ours].shape)
               for ours, theirs in names.items()}

    size = config["sample_size"] or 16 * (attention or [2])[0]
    cifar10 = (in_channels, size) == (3, 32)
    print(f"{path}: published weights, taken to be of {'CIFAR-10, ' * cifar10}{size}x{size} pixels")
    return {"weights": weights, "step": 0, "posterior": None,
            "config": {"unet": sizes, "schedule": "linear", "timesteps": 1000, "velocity": False,
                       "image_shape": (in_channels, size, size)},
            "data": {"name": "cifar10" if cifar10 else "unknown", "source": "published weights",
                     "classes": CIFAR10_CLASSES if cifar10 else [], "excluded": [],
                     "images": 50_000 if cifar10 else None}}


def state_dict_of(raw):
    """{name: tensor} of what a file holds: of itself, or below the name that trainers
    use. Without the prefix that DataParallel ("module.") or torch.compile
    ("_orig_mod.") puts before every name."""
    raw = raw if isinstance(raw, dict) else {}
    for key in ("state_dict", "model_state_dict", "ema", "model"):
        raw = raw[key] if isinstance(raw.get(key), dict) else raw
    return {re.sub(r"^((module|_orig_mod)\.)+", "", str(k)): v for k, v in raw.items()
            if isinstance(v, torch.Tensor)}


# --------------------------------------------------------------------------------------
# What the command lines share: errors, flags, files, Ctrl-C, devices

class UserError(ValueError):
    """What the person at the keyboard can put right: one line, exit code 2."""


def first_line(error):
    """The first line of an exception's message, or its type's name without one."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def run_command_line(main):
    """Call main(). What the user can mend: one line and code 2. Ctrl-C: code 130."""
    for stream in (sys.stdout, sys.stderr):  # a class may have a name that a terminal cannot show
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except (UserError, OSError) as e:
        print(f"error: {first_line(e)}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as e:
        if not isinstance(e, MemoryError) and "memory" not in str(e):
            raise
        print("error: out of memory: try a smaller --batch-size, --image-size or --anchors",
              file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


def number(kind, low, high=math.inf):
    """An argparse `type`: a `kind` (int or float) from low to high, and finite."""
    def parse(text):
        value = kind(text)  # where this fails, argparse says so
        if not low <= value <= high or value == math.inf:  # nan is inside of nothing
            raise argparse.ArgumentTypeError(f"must be from {low:g} to {high:g}, not {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


def add_shared_flags(parser):
    """The flags that all commands have."""
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=0, help="default: 0")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")


def check_outputs(paths, overwrite, endings=None):
    """Raise UserError, before any work, for what may not or cannot be written.
    endings: those that the file's name may have, by which readers tell its kind."""
    for text in map(os.fspath, paths):
        path = Path(text)
        if os.path.isdir(text) or text.endswith(("/", os.sep)):
            raise UserError(f"{text} is a folder, and a file is to be written: name the file")
        if endings and path.suffix.lower() not in endings:
            raise UserError(f"{text} has to end in {' or '.join(endings)}, for what it will hold")
        if os.path.exists(text) and not overwrite:
            raise UserError(f"{text} exists already: choose another --output, or add --overwrite")
        folder = next(p for p in path.absolute().parents if p.exists())
        if not os.access(folder, os.W_OK) or not folder.is_dir() or len(path.name.encode()) > 240:
            raise UserError(f"{text} cannot be written; choose another --output")


def write_atomically(path, write):
    """Open `path` for bytes, and call write(file).
    A crash, Ctrl-C or a full disk leaves the old file as it was. Raises UserError."""
    # The bytes go to a temporary file beside it, which then takes the name in one step.
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
        raise UserError(f"cannot write {path} ({first_line(e)}); any old file is untouched") from e
    finally:
        Path(temporary).unlink(missing_ok=True)


class StopRequest:
    """The first Ctrl-C (or SIGTERM) becomes a flag, read between two steps; a second
    one interrupts at once."""

    def __enter__(self):
        self.requested = False
        self.previous = {s: signal.signal(s, self.handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def handle(self, signum, frame):
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
        raise UserError(f"no device {name!r} here ({first_line(e)[:80]}); try --device cpu") from e
    return device


def autocast(device):
    """Autocast to bfloat16 where that is fast: CUDA since 8.0, AVX512-BF16."""
    kind = torch.device(device).type
    fast = (kind == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
            or kind == "cpu" and torch.cpu._is_avx512_bf16_supported())
    return torch.autocast(kind, torch.bfloat16) if fast else contextlib.nullcontext()
