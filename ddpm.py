"""The diffusion: schedules, loss, variational bound, sampling; the checkpoint file.

    python ddpm.py checkpoints/mnist.pt checkpoints/mnist-forget-1.pt    # a picture

Holds    Diffusion (q and p of DDPM, sampling) and the training step; images; the
         checkpoint file; DDPM's weights in the diffusers library's layout; what the
         command lines share; last its own, which draws samples of models.
Reads    checkpoint files, and folders of DDPM's weights as diffusers saves them.
Writes   files whole or not at all: checkpoints, and a picture of samples.
Paper    VDU (arXiv 2510.04058), its background on diffusion models. The sources:
         DDPM = Ho et al. 2020 (arXiv 2006.11239), DDIM = Song et al. 2021 (2010.02502).

The papers count t = 1 .. T. Here t is an index, 0 .. T-1, into buffers: t=0 is the
paper's first noise step, so `alpha_bar[t]` is the paper's abar_{t+1}, and "x_{t-1}" at
index 0 is the clean image x_0. Images are float32 in [-1, 1], shape (B, C, H, W);
D = C*H*W.
"""

import argparse
import hashlib
import json
import math
import os
import pickle
import re
import signal
import sys
import tempfile
import zipfile
from collections import OrderedDict, namedtuple
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
import torch.nn as nn
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from unet import UNet

# --------------------------------------------------------------------------------------
# The diffusion

def beta_schedule(name, T):
    """The variances beta_t of the forward process: (T,) float64.

    linear         from 1e-4 to 0.02 in even steps, for T = 1000 (DDPM, section 4); a
                   shorter chain takes proportionally larger steps
    cosine         from abar_t = f(t) / f(0), f(t) = cos^2((t/T + s) / (1 + s) pi/2),
                   s = 0.008 (Nichol & Dhariwal 2021, eq. 17): noise grows more slowly
    scaled_linear  sqrt(beta_t) from sqrt(0.00085) to sqrt(0.012) evenly: Stable
                   Diffusion's"""
    if name == "linear":
        scale = 1000 / T
        beta = torch.linspace(1e-4 * scale, 0.02 * scale, T, dtype=torch.float64)
    elif name == "cosine":
        u = torch.arange(T + 1, dtype=torch.float64) / T  # t / T
        angle = (u + 0.008) / 1.008 * math.pi / 2
        f = angle.cos() ** 2
        beta = 1 - f[1:] / f[:-1]  # abar_t / abar_{t-1} = alpha_t = 1 - beta_t: f(0) cancels
    elif name == "scaled_linear":
        root = torch.linspace(0.00085**0.5, 0.012**0.5, T, dtype=torch.float64)
        beta = root**2
    else:
        raise ValueError(f"no noise schedule is called {name!r}")
    return beta.clamp(max=0.999)  # the cosine's last one would be 1


def stratified_timesteps(n, low, high, device="cpu"):
    """n step indices (n,) int64: low .. high-1 is cut into n equal parts, one index is
    drawn from each, and they are shuffled. The loss differs a thousandfold between t
    near 0 and t near T: independent draws would make a noisier gradient."""
    u = (torch.randperm(n) + torch.rand(n)) / n  # (n,) in [0, 1)
    t = (low + u * (high - low)).long()
    return t.clamp(max=high - 1).to(device)


def per_image(buffer, t, x):
    """buffer[t] for a batch of steps t (B,), in a shape that multiplies x (B, ...)."""
    ones = [1] * (x.dim() - 1)  # (B,) -> (B, 1, 1, 1)
    return buffer[t].view(-1, *ones)


def image_noise(streams, shape):
    """The next unit noise of each stream: (B, *shape) float32. One stream per image."""
    draws = [rng.standard_normal(shape, dtype=np.float32) for rng in streams]
    return torch.from_numpy(np.stack(draws))


def float64(x):
    """A tensor in double precision, on the CPU (MPS has none)."""
    return x.cpu().double()


def grey_level_log_likelihood(x, mean, std):
    """log of the mass that N(mean, std^2) gives to x's grey level (DDPM eq. 13).
    The bin is x +- 1/255; black's reaches down to -infinity, white's up to infinity."""
    # The mass of the bin is the difference of two distribution functions.
    below_upper = torch.special.ndtr((x + 1 / 255 - mean) / std)
    below_lower = torch.special.ndtr((x - 1 / 255 - mean) / std)
    below_upper = below_upper.masked_fill(x > 0.999, 1.0)
    below_lower = below_lower.masked_fill(x < -0.999, 0.0)
    return (below_upper - below_lower).clamp(min=1e-12).log()  # no log of 0


class Diffusion(nn.Module):
    """q and p_theta of DDPM, for a network eps_theta called as unet(x_t, t).
    schedule: a name that beta_schedule knows, or a (T,) tensor of betas of your own.
    timesteps: T, where schedule is a name.  Every buffer is (T,), float32."""

    def __init__(self, schedule="linear", timesteps=1000):
        super().__init__()
        if isinstance(schedule, torch.Tensor):
            beta = schedule.double()
        else:
            beta = beta_schedule(schedule, timesteps)
        self.T = len(beta)
        alpha = 1 - beta
        alpha_bar = alpha.cumprod(0)  # abar_t = prod_{s<=t} alpha_s
        one = torch.ones(1, dtype=torch.float64)
        alpha_bar_prev = torch.cat([one, alpha_bar[:-1]])  # abar_{t-1}
        posterior_variance = beta * (1 - alpha_bar_prev) / (1 - alpha_bar)  # eq. 7

        # Computed in float64, kept in float32, moved to a device with the module.
        buffers = {
            "beta": beta,
            "alpha": alpha,
            "alpha_bar": alpha_bar,
            "sqrt_alpha_bar": alpha_bar.sqrt(),
            "sqrt_one_minus_alpha_bar": (1 - alpha_bar).sqrt(),
            "posterior_variance": posterior_variance}
        for name, value in buffers.items():
            self.register_buffer(name, value.float())

    def q_sample(self, x0, t, eps):
        """x_t ~ N(sqrt(abar_t) x_0, (1 - abar_t) I), given its noise (DDPM eq. 4)."""
        signal_scale = per_image(self.sqrt_alpha_bar, t, x0)  # (B, 1, 1, 1)
        noise_scale = per_image(self.sqrt_one_minus_alpha_bar, t, x0)
        return signal_scale * x0 + noise_scale * eps

    def predict_x0(self, xt, t, eps):
        """The x_0 from which q_sample makes x_t with this noise (eq. 15)."""
        noise = per_image(self.sqrt_one_minus_alpha_bar, t, xt) * eps
        return (xt - noise) / per_image(self.sqrt_alpha_bar, t, xt)

    def predict_eps(self, unet, xt, t):
        """eps_theta(x_t, t), like x_t; in bfloat16 where that is fast. Raises
        ValueError for a network that returns another shape."""
        with autocast(xt.device):
            eps_theta = unet(xt, t)
        if eps_theta.shape != xt.shape:  # a loss would broadcast, and say nothing
            raise ValueError(f"the network returns {tuple(eps_theta.shape)} for images of "
                             f"{tuple(xt.shape)}")
        return eps_theta

    def bound_weight(self, t):
        """C_t = beta_t^2 / (2 sigma_t^2 alpha_t (1-abar_t)) with sigma_t^2 = beta_t:
        the weight of || eps - eps_theta ||^2 in the bound (DDPM eq. 12).  t: (B,), like
        what is returned."""
        one_minus_abar = 1 - self.alpha_bar[t]
        return self.beta[t] / (2 * self.alpha[t] * one_minus_abar)

    def simple_loss(self, unet, x0, t, eps):
        """|| eps - eps_theta(x_t, t) ||^2 / D, x_t of q_sample (DDPM eq. 14).
        x0, eps: (B, C, H, W).  t: (B,).  Returns (B,): the squared error per dimension,
        1 for a network that always says 0. Unlike the bound below it has C_t = 1, takes
        t = 0 like any t, and leaves out L_T, which does not depend on theta."""
        eps_theta = self.predict_eps(unet, self.q_sample(x0, t, eps), t)
        return (eps - eps_theta).square().flatten(1).mean(1)  # (B, C, H, W) -> (B,)

    @torch.no_grad()
    def variational_bound(self, unet, x0, steps=None, seed=0):
        """-log p_theta(x_0) <= L_0 + sum_t L_{t-1} + L_T (eq. 5), bits/dimension.

        x0: (B, C, H, W) images of 256 grey levels, scaled to [-1, 1].  steps=None
        computes every L_{t-1}; steps=S computes S of them, close together where t is
        small and they are large, and interpolates between them in straight lines. One
        draw of eps for each. The variance of p_theta is beta_t here, where `step` draws
        with the smaller beta tilde_t: not quite the same model.
        Returns a dict of float64 tensors, named as in the paper:
          "L_T" (B,)     KL(q(x_T | x_0) || N(0, I)): what x_T still knows, no theta
          "L_t" (B, S)   L_{t-1} = KL(q(x_{t-1} | x_t, x_0) || p_theta(x_{t-1} | x_t))
          "L_0" (B,)     -log p_theta(x_0 | x_1), over the grey levels
          "total" (B,)   their sum, with each L_{t-1} as often as it stands for others
        """
        D = x0[0].numel()
        generator = torch.Generator().manual_seed(seed)  # the same noise for every model

        # L_{t-1}, a KL between Gaussians: the simple loss with the weight C_t for their
        # means (eq. 12), and `spread` for their variances.
        grid, stands_for = bound_grid(self.T, steps)
        L_t = torch.zeros(len(x0), len(grid), dtype=torch.float64)
        for i in tqdm(range(len(grid))[::-1], "bound"):
            t, eps = noise_at(grid[i], x0, generator)
            error = D * float64(self.simple_loss(unet, x0, t, eps))  # (B,)
            ratio = float64(self.posterior_variance[t]) / float64(self.beta[t])
            spread = ratio - 1 - ratio.log()
            C_t = float64(self.bound_weight(t))
            L_t[:, i] = C_t * error + D / 2 * spread  # (B,) nats

        # L_0: the mass at x_0's grey levels.
        t, eps = noise_at(0, x0, generator)
        x1 = self.q_sample(x0, t, eps)
        eps_theta = self.predict_eps(unet, x1, t)
        mean = float64(self.predict_x0(x1, t, eps_theta))
        std = float64(self.beta[0]).sqrt()
        L_0 = -grey_level_log_likelihood(float64(x0), mean, std)
        L_0 = L_0.flatten(1).sum(1)  # (B,) nats

        # L_T: the KL between N(sqrt(abar_T) x_0, (1-abar_T) I) and N(0, I).
        abar_T = float64(self.alpha_bar[-1])
        L_T = abar_T * (float64(x0) ** 2 - 1) - torch.log1p(-abar_T)
        L_T = L_T.flatten(1).sum(1) / 2  # (B,) nats

        terms = {"L_T": L_T, "L_t": L_t, "L_0": L_0, "total": L_T + L_t @ stands_for + L_0}
        bit = D * math.log(2)  # nats per image -> bits per dimension
        return {name: value / bit for name, value in terms.items()}

    def step(self, unet, xt, t, t_prev, z, eta=0.0, clip=True):
        """One step from t down to t_prev (DDIM eq. 12). t, t_prev: (B,); -1 is clean.

        z: unit noise of x_t's shape.  eta = 0 is deterministic; eta = 1 with t_prev =
        t-1 is DDPM's ancestral step, of mean mu tilde_t and variance beta tilde_t (DDIM
        eq. 16).  clip: keep x_0 in [-1, 1], as images are (DDPM's code clips, its text
        does not say so)."""
        eps = self.predict_eps(unet, xt, t)  # (B, C, H, W)
        # what it takes the clean image to be
        x0 = self.predict_x0(xt, t, eps)
        if clip:
            x0 = x0.clamp(-1, 1)

        # abar at both steps; of a clean image it is 1
        abar = per_image(self.alpha_bar, t, xt)
        abar_prev = self.alpha_bar[t_prev].where(t_prev >= 0, 1.0)
        abar_prev = abar_prev.view_as(abar)

        # The direction to x_t comes from the clipped x_0, so that the two agree.
        eps = (xt - abar.sqrt() * x0) / (1 - abar).sqrt()
        variance = (1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)
        sigma = eta * variance.sqrt()
        rest = (1 - abar_prev - sigma**2).clamp(min=0)  # so that the variance is 1-abar_prev
        return abar_prev.sqrt() * x0 + rest.sqrt() * eps + sigma * z

    @torch.no_grad()  # not inference_mode, in which autocast caches nothing
    def sample(self, unet, n, shape, steps=None, eta=0.0, seed=0, batch_size=125, clip=True,
               series=""):
        """n samples of p_theta, shape (C, H, W): (n, C, H, W) float32, on the CPU.

        steps=S: through S evenly spaced steps, all T for None; with eta = 1 that is
        DDPM's ancestral sampling.  The noise of image i depends on (series, seed, i)
        alone.  Raises UserError if an image is not finite."""
        # The steps, from T-1 down to 0.
        grid = np.linspace(self.T - 1, 0, steps or self.T)
        grid = grid.round().astype(int).tolist()
        following = [*grid[1:], -1]  # the step after the last is the clean image
        device = self.alpha_bar.device

        out = torch.empty(n, *shape)  # (n, C, H, W)
        series_number = crc32(series.encode())
        bar = tqdm(total=n * len(grid), desc="sampling")
        # Autocast around the loop, too: each weight is cast once and not at every step.
        with autocast(device), bar:
            for images in torch.arange(n).split(batch_size):
                streams = [np.random.default_rng([series_number, seed, i])
                           for i in images.tolist()]
                x = image_noise(streams, shape).to(device)  # x_T ~ N(0, I): (B, C, H, W)
                for step, step_prev in zip(grid, following):
                    z = torch.zeros_like(x)
                    if eta > 0 and step_prev >= 0:
                        z = image_noise(streams, shape).to(device)
                    t = torch.full((len(x),), step, device=device)  # (B,)
                    t_prev = torch.full_like(t, step_prev)
                    x = self.step(unet, x, t, t_prev, z, eta, clip)
                    bar.update(len(x))
                out[images] = x.cpu()
        if not torch.isfinite(out).all():  # a classifier would count such images as something
            raise UserError("the network draws images that are not finite: if it was to unlearn, "
                            "try a larger gamma or a smaller lr")
        return out


def noise_at(step, x0, generator):
    """One step as a batch t (B,), and unit noise like x_0 (B, C, H, W)."""
    eps = torch.randn(x0.shape, generator=generator)
    t = torch.full((len(x0),), step, device=x0.device)
    return t, eps.to(x0.device)


def bound_grid(T, steps=None):
    """The indices t in 1 .. T-1 at which the bound is computed, a list of all of them,
    or of `steps`, whose distance grows with t. And how many steps each of them stands
    for, by the trapezoidal rule: up to halfway to its neighbours. A float64 tensor."""
    steps = min(steps or T, T - 1)
    even = np.geomspace(1, T - 1, steps).round()  # in log t; the first ones coincide
    grid = np.maximum(even, range(1, steps + 1)).astype(int)
    halfway = (grid[:-1] + grid[1:]) / 2
    edges = [0.5, *halfway, T - 0.5]
    return grid.tolist(), torch.tensor(np.diff(edges))


def training_step(unet, diffusion, optimizer, x0):
    """A step of DDPM's training (algorithm 1) on x0 (B, C, H, W). Returns the loss."""
    # t, x_t and the loss.
    t = stratified_timesteps(len(x0), 0, diffusion.T, x0.device)  # (B,)
    eps = torch.randn_like(x0)
    loss = diffusion.simple_loss(unet, x0, t, eps).mean()  # DDPM eq. 14

    # The gradient, clipped, and the optimizer's step.
    loss.backward()
    nn.utils.clip_grad_norm_(unet.parameters(), 1.0)  # as in DDPM's code
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


# --------------------------------------------------------------------------------------
# Images

def to_float(images):
    """uint8 0 .. 255 -> float32 -1 .. 1, the range in which the diffusion works."""
    return images.float() / 127.5 - 1


def to_uint8(images):
    """float -1 .. 1 -> uint8 0 .. 255, rounded."""
    levels = (images.clamp(-1, 1) + 1) * 127.5
    return levels.round().to(torch.uint8)


def write_images(path, blocks, overwrite=False, nrow=8):
    """A PNG: each of `blocks`, (N, C, H, W) uint8, as a grid with nrow images to a row;
    the grids, of one size, side by side. Whole or not at all."""
    grids = [make_grid(images, nrow, pad_value=255) for images in blocks]
    picture = torch.cat(grids, dim=2) / 255  # (3, rows, columns of pixels)
    write_atomically(path, lambda file: save_image(picture, file, format="png"), overwrite)


# --------------------------------------------------------------------------------------
# The checkpoint file: a dictionary of tensors and plain values, by torch.save

class Checkpoint(namedtuple("_", "unet diffusion posterior config data forgotten path raw")):
    """What load_checkpoint returns.

    unet        UNet with the weights theta*, in eval mode, called as unet(x, t)
    diffusion   Diffusion with the schedule that it was trained with
    posterior   {"mean", "std": dicts of tensors, "n"}, or None where the file has none
    config      {"unet": arguments, "schedule", "timesteps", "velocity", "image_shape"}
    data        which images exactly: {"name", "source", "classes", "excluded", ...}
    forgotten   None, or what vdu.py unlearned, from which checkpoint, and how
    path        the file that it is from
    raw         the file's whole dictionary"""


def build(config, device="cpu"):
    """(UNet, Diffusion) from a checkpoint's `config`, with fresh weights."""
    diffusion = Diffusion(config["schedule"], config["timesteps"]).to(device)
    alpha_bar = diffusion.alpha_bar if config["velocity"] else None  # see UNet
    with torch.device(device):
        unet = UNet(**config["unet"], alpha_bar=alpha_bar)
    return unet, diffusion


def load_checkpoint(path, device="cpu"):
    """A checkpoint of train_ddpm.py or vdu.py, or DDPM's weights as diffusers saves
    them: the folder, or the file of weights in it.
    Returns a Checkpoint, its network on `device`. Raises UserError if the file is
    missing, cut short, not weights, in none of these layouts, or not finite."""
    try:
        # Whose file is it? Ours is a dictionary with everything in its place.
        file = weights_file(path)
        raw = read_file(file)
        published = state_dict_of(raw)
        if "time_embedding.linear_1.weight" in published:
            raw = from_diffusers(published, file)
        elif "model.diffusion_model.out.2.weight" in published:
            raise UserError(f"{path} is a Stable Diffusion checkpoint: sd_unlearn.py is for those")

        unet, diffusion = build(raw["config"], device)
        unet.load_state_dict(raw["weights"])  # theta*
        check_finite(path, raw["weights"])
        posterior = raw.get("posterior")
        if posterior:
            for part in ("mean", "std"):
                check_finite(path, posterior[part])
                posterior[part] = {k: v.float() for k, v in posterior[part].items()}
        return Checkpoint(
            unet=unet.eval(),
            diffusion=diffusion,
            posterior=posterior,
            config=raw["config"],
            data=dict(raw["data"]),
            forgotten=raw.get("forgotten"),
            path=os.fspath(path),
            raw=raw)
    except UserError:
        raise
    except Exception as e:  # a file may hold anything under any name
        what = f"{type(e).__name__}: {first_line(e)}"
        raise UserError(f"{path} holds no model of this code, nor diffusers' DDPM ({what})") from e


def save_checkpoint(path, contents, overwrite=False):
    """Write the dictionary `contents` (tensors, plain values), whole or not at all."""
    write_atomically(path, lambda file: torch.save(contents, file), overwrite)


def check_finite(path, tensors):
    """Raise UserError that names the first of {name: tensor} with a nan or infinity."""
    for name, v in tensors.items():
        if v.is_floating_point() and not torch.isfinite(v).all():
            raise UserError(f"{path} is broken: {name} holds numbers that are not finite")


def digest(tensors):
    """A name for the numbers of tensors: 16 hexadecimal digits of their SHA-256."""
    sha = hashlib.sha256()
    for v in tensors:
        flat = v.detach().cpu().flatten()
        sha.update(flat.view(torch.uint8).numpy())
    return sha.hexdigest()[:16]


# Packages for whose objects no StandIn may stand in. The few of Python's own that are
# left out hold plain values.
REFUSED = {"torch", *sys.stdlib_module_names} - {
    "argparse", "collections", "datetime", "pathlib", "typing"}


class StandIn:
    """What a class of another package becomes when a file is read. It does nothing."""

    def __new__(cls, *args, **kwargs):
        # torch's reader fills dictionaries alone; numpy's objects it gives a state.
        if cls.__module__.startswith("numpy"):
            return super().__new__(cls)
        return OrderedDict()

    def __setstate__(self, state):
        pass


def read_file(path, lazy=False):
    """The contents of a PyTorch file or a safetensors file, whatever its name.

    torch.load(weights_only=True) never executes what a pickle asks for. Objects beside
    the weights (a trainer's callbacks, arguments, dates, paths, schedules) are read as
    StandIns; torch refuses any other. lazy=True leaves the numbers on disk until they
    are used (a PyTorch file must not be called .safetensors then). Raises UserError for
    another file."""
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise UserError(f"no checkpoint at {path}: train_ddpm.py trains one; sd-v1-4.ckpt is at "
                        "huggingface.co/CompVis/stable-diffusion-v-1-4-original")
    try:
        with open(path, "rb") as f:
            begins = f.read(9)
        if begins[8:] == b"{":  # see SAFETENSORS
            return read_safetensors(path)

        # What the pickle asks for by name, beside what torch itself allows.
        is_zip = zipfile.is_zipfile(path)  # torch's format since 1.6: it can be listed and mapped
        asked_for = []
        if is_zip:
            asked_for = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        stand_ins = []
        for name in asked_for:
            module, _, last = name.rpartition(".")
            package = module.split(".")[0]
            # of torch a schedule of the learning rate may be beside the weights
            if package not in REFUSED or module.startswith("torch.optim."):
                stand_ins.append(type(last, (StandIn,), {"__module__": module}))

        lazy = lazy and is_zip
        with torch.serialization.safe_globals(stand_ins), open(path, "rb") as f:
            source = path if lazy else f
            return torch.load(source, "cpu", weights_only=True, mmap=lazy)
    except pickle.UnpicklingError as e:
        asks = re.findall(r"GLOBAL ([\w.]+)", str(e)) or ["other Python objects"]
        raise UserError(f"{path} was refused: no file of weights, or it asks for {asks[0]} (of a "
                        "network save net.state_dict(), not net itself)") from e
    except Exception as e:  # over other bytes a reader of pickles can fail in any way
        raise UserError(f"{path} is damaged or cut short ({first_line(e)})") from e


# The safetensors format: 8 bytes that count the header's, the header in JSON, which
# begins with a brace (name -> dtype, shape, first and last byte of the data), then the
# data of all tensors. Other types than these are refused.
SAFETENSORS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "U8": torch.uint8}


def read_safetensors(path):
    """{name: tensor}, left on disk until they are used. Raises any error."""
    # Mode "c" is copy on write: a tensor may be changed, and the file stays as it is.
    content = np.memmap(path, dtype=np.uint8, mode="c")  # (bytes,)
    start = 8 + int.from_bytes(content[:8].tobytes(), "little")
    header = json.loads(content[8:start].tobytes())  # {name: entry}
    header.pop("__metadata__", None)  # notes
    tensors = {}
    for name, entry in header.items():
        dtype = SAFETENSORS[entry["dtype"]]
        first, last = entry["data_offsets"]  # counted from the end of the header
        data = torch.from_numpy(content[start + first : start + last])
        if (start + first) % dtype.itemsize:  # torch wants numbers at multiples of their size
            data = data.clone()
        tensors[name] = data.view(dtype).view(entry["shape"])  # fails where the sizes disagree
    return tensors


def state_dict_of(raw):
    """{name: tensor} of what a file holds. Of a list: of its last item with weights
    (DDIM's code keeps its moving average there). Of a dictionary: of its first entry in
    `names` that has weights, else its own. The prefixes of DataParallel ("module.") and
    torch.compile ("_orig_mod.") are taken off."""
    if isinstance(raw, list):
        return next(filter(None, map(state_dict_of, reversed(raw))), {})  # the last not empty
    if not isinstance(raw, dict):
        return {}
    # Entries may hold entries.
    names = ("state_dict", "model_state_dict", "ema", "model")
    entries = {name: state_dict_of(raw.get(name)) for name in names}
    found = [name for name in names if entries[name]]
    if len(found) > 1:
        print(f"taking the entry {found[0]!r}, of {', '.join(found)}")
    if found:
        return entries[found[0]]
    tensors = {}
    for name, v in raw.items():
        if isinstance(v, torch.Tensor):
            tensors[re.sub(r"^((module|_orig_mod)\.)+", "", str(name))] = v
    return tensors


# --------------------------------------------------------------------------------------
# DDPM's weights as the diffusers library saves them (google/ddpm-cifar10-32): a folder
# with config.json, the weights, and scheduler_config.json; or a pipeline's, with these
# in unet/ and scheduler/.

CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
# unet.py             diffusers
NAMES = [row.split() for row in """
    time_embed.0.       time_embedding.linear_1.
    time_embed.2.       time_embedding.linear_2.
    input_blocks.0.0.   conv_in.
    middle_block.0.     mid_block.resnets.0.
    middle_block.1.     mid_block.attentions.0.
    middle_block.2.     mid_block.resnets.1.
    out.0.              conv_norm_out.
    out.2.              conv_out.
    .in_layers.0.       .norm1.
    .in_layers.2.       .conv1.
    .emb_layers.1.      .time_emb_proj.
    .out_layers.0.      .norm2.
    .out_layers.3.      .conv2.
    .skip_connection.   .conv_shortcut.
    .norm.              .group_norm.
    .q.                 .to_q.
    .k.                 .to_k.
    .v.                 .to_v.
    .proj_out.          .to_out.0.
""".strip().splitlines()]
OLD_SPELLING = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.",
                ".proj_attn.": ".to_out.0."}

# config.json: the entries that say what the network is to be, and those in which
# unet.py has no choice; with what diffusers takes for an entry that is left out.
FREE = {
    "in_channels": 3, "layers_per_block": 2, "dropout": 0.0, "attention_head_dim": 8,
    "norm_eps": 1e-5, "flip_sin_to_cos": True, "downsample_padding": 1, "sample_size": None}
FIXED = {
    "out_channels": 3, "freq_shift": 0, "act_fn": "silu", "norm_num_groups": 32,
    "resnet_time_scale_shift": "default", "mid_block_scale_factor": 1, "add_attention": True,
    "time_embedding_type": "positional", "center_input_sample": False, "downsample_type": "conv",
    "mid_block_type": "UNetMidBlock2D", "upsample_type": "conv"}
# scheduler_config.json: likewise. Its other entries are about sampling.
SCHEDULER = {
    "num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02,
    "prediction_type": "epsilon", "trained_betas": None, "rescale_betas_zero_snr": False}


def read_json(path):
    """The dictionary in a JSON file. Raises ValueError for a damaged one."""
    return json.loads(path.read_text("utf-8-sig"))


def refuse_others(path, config, ours):
    """Raise UserError that names the entries whose values are not as in `ours`; names
    that begin with "_" are notes."""
    wrong = [f"{name} = {value}" for name, value in config.items()
             if value != ours[name] and not name.startswith("_")]
    if wrong:
        raise UserError(f"{path} is of a network that this code cannot be: {', '.join(wrong)}")


def read_unet_config(path):
    """config.json -> (UNet's arguments, (C, S, S)). Raises UserError for a network that
    unet.py cannot be."""
    config = {**FREE, **FIXED, **read_json(path)}
    widths = config["block_out_channels"]  # of each level
    attends = ["Attn" in kind for kind in config["down_block_types"]]
    unet = dict(
        in_channels=config["in_channels"],
        model_channels=widths[0],
        channel_mult=[width // widths[0] for width in widths],
        num_res_blocks=config["layers_per_block"],
        attention_resolutions=[2**level for level, attn in enumerate(attends) if attn],
        num_heads=1,
        head_channels=config["attention_head_dim"],
        dropout=config["dropout"],
        norm_eps=config["norm_eps"],
        sin_first=not config["flip_sin_to_cos"],
        pad_end=config["downsample_padding"] == 0)

    # How diffusers would describe this UNet, to compare it with the file. An entry of
    # which this code has not heard is to be null.
    ours = {**dict.fromkeys(config), **FIXED}
    for name in FREE:
        ours[name] = config[name]
    # One number; any other value is refused.
    size = config["sample_size"]
    ours["sample_size"] = size if isinstance(size, int) else "pixels"
    ours["downsample_padding"] = 0 if unet["pad_end"] else 1
    ours["out_channels"] = config["in_channels"]
    # DDPM's embedding puts the sines first, and its frequencies end one sooner.
    ours["freq_shift"] = 1 if unet["sin_first"] else 0
    # Widths are multiples of the first.
    ours["block_out_channels"] = [widths[0] * multiple for multiple in unet["channel_mult"]]
    # With attention or without, on the way up as on the way down.
    down = ["AttnDownBlock2D" if attn else "DownBlock2D" for attn in attends]
    ours["down_block_types"] = down
    ours["up_block_types"] = [kind.replace("Down", "Up") for kind in reversed(down)]
    refuse_others(path, config, ours)
    return unet, (config["in_channels"], size, size)


def read_scheduler_config(path):
    """scheduler_config.json -> (schedule as `build` takes it, the entries). A network
    that was saved alone, without one, is taken to be trained as DDPM's was."""
    config = dict(SCHEDULER)
    if path.exists():
        config.update(read_json(path))
    linear = config["beta_schedule"] == "linear"
    velocity = config["prediction_type"] == "v_prediction"
    ours = dict(config, trained_betas=None, rescale_betas_zero_snr=False)
    ours["beta_schedule"] = "linear" if linear else "squaredcos_cap_v2"
    ours["prediction_type"] = "v_prediction" if velocity else "epsilon"
    refuse_others(path, config, ours)

    # The schedule: a tensor of betas, or a name that beta_schedule knows.
    schedule = "cosine"
    if linear:
        schedule = torch.linspace(config["beta_start"], config["beta_end"],
                                  config["num_train_timesteps"], dtype=torch.float64)
    return schedule, config


def diffusers_name(ours, blocks):
    """diffusers' name of a tensor of unet.py; q, k and v apart (".q." for ".qkv.").
    blocks: residual blocks per level on the way down. diffusers counts blocks and
    attention level by level, unet.py counts blocks through: blocks + 1 to a level, the
    last of which is Downsample on the way down."""
    numbered = re.match(r"(in|out)put_blocks\.(\d+)\.(\d)\.(op|conv)?", ours)
    if numbered and not ours.startswith("input_blocks.0."):
        way, number, layer, resampling = numbered.groups()
        down = way == "in"
        way = "down" if down else "up"
        number = int(number) - 1 if down else int(number)  # input_blocks.0 is conv_in
        level, i = divmod(number, blocks + 1)  # which level, which block of it
        part = "resnets" if layer == "0" else "attentions"
        inner = f"{way}samplers.0.conv" if resampling else f"{part}.{i}."
        ours = f"{way}_blocks.{level}.{inner}{ours[numbered.end():]}"
    for unet_name, name in NAMES:
        ours = ours.replace(unet_name, name)
    return ours


def diffusers_names(unet, blocks):
    """{name in unet.py: diffusers' names}: three for attention's queries, keys and
    values, which are one tensor in unet.py, else one."""
    names = {}
    for ours in unet.state_dict():
        parts = [ours]  # one tensor
        if ".qkv." in ours:
            parts = [ours.replace(".qkv.", f".{x}.") for x in "qkv"]  # three
        names[ours] = [diffusers_name(part, blocks) for part in parts]
    return names


def weights_file(path):
    """The file of weights in a diffusers folder; any other path as it is."""
    path = Path(path)
    if not path.is_dir():
        return path
    folder = path / "unet" if (path / "unet").is_dir() else path
    file = folder / "diffusion_pytorch_model.safetensors"
    return file if file.exists() else file.with_suffix(".bin")


def from_diffusers(tensors, file):
    """What diffusers saved, as the dictionary of a checkpoint.
    tensors: weights by diffusers' names.  file: where they were, with the JSON files
    beside it.  Raises OSError without a config.json, UserError for another network,
    KeyError that names a missing tensor, ValueError one too many, RuntimeError for one
    of another shape."""
    config_file = file.with_name("config.json")
    arguments, image_shape = read_unet_config(config_file)

    # A pipeline has the scheduler in a folder of its own.
    scheduler = file.with_name("scheduler_config.json")
    if not scheduler.exists():
        scheduler = file.parent.parent / "scheduler" / "scheduler_config.json"
    schedule, entries = read_scheduler_config(scheduler)
    T = entries["num_train_timesteps"]
    prediction = entries["prediction_type"]

    # Every tensor goes to its place. Attention is a matrix there and a 1x1 convolution
    # here: the same numbers.
    for old, new in OLD_SPELLING.items():
        tensors = {name.replace(old, new): v for name, v in tensors.items()}
    with torch.device("meta"):  # sizes without memory
        unet = UNet(**arguments)
    names = diffusers_names(unet, arguments["num_res_blocks"])
    weights = {}
    for ours, v in unet.state_dict().items():
        parts = [tensors.pop(name).float() for name in names[ours]]
        weights[ours] = torch.cat(parts).view(v.shape)
    if tensors:
        raise ValueError(f"{len(tensors)} tensors are too many: {list(tensors)[:3]}")

    # A guess: 32x32 pixels in colour are taken for CIFAR-10's.
    data = {"name": "unknown", "source": "published weights", "root": None, "classes": [],
            "excluded": []}
    if image_shape == (3, 32, 32):
        data.update(name="cifar10", classes=CIFAR10_CLASSES, images=50_000)
    print(f"{file}: diffusers' network, taken to be of {data['name']} images, {image_shape}; "
          f"schedule {entries['beta_schedule']}, T = {T}, predicts {prediction}")
    config = {"unet": arguments, "image_shape": image_shape, "schedule": schedule,
              "timesteps": T, "velocity": prediction == "v_prediction"}
    # Its JSON files as text: vdu.py writes them beside the result.
    described = {path.name: path.read_text("utf-8-sig") for path in (config_file, scheduler)
                 if path.exists()}
    return {"weights": weights, "config": config, "data": data, "diffusers": described}


def to_diffusers(unet, blocks):
    """{diffusers' name: tensor}, as UNet2DModel.load_state_dict takes them; the reverse
    of from_diffusers. blocks: residual blocks per level."""
    tensors = {}
    weights = unet.state_dict()
    for ours, theirs in diffusers_names(unet, blocks).items():
        v = weights[ours].cpu()
        if v.dim() == 3:  # a 1x1 convolution of attention, there a matrix
            v = v.squeeze(2)
        for name, part in zip(theirs, v.chunk(len(theirs))):
            tensors[name] = part.clone()
    return tensors


# --------------------------------------------------------------------------------------
# What the command lines share: errors, flags, files, Ctrl-C, devices

class UserError(ValueError):
    """What the user can mend: one line, exit code 2."""


def first_line(error, length=120):
    """The first line of an exception's message, cut to fit into another; or its type's
    name without one. length: None leaves it whole."""
    return str(error).partition("\n")[0][:length] or type(error).__name__


def run_command_line(main, parser):
    """main(what was typed). An error that the user can mend: one line and code 2.
    Ctrl-C: code 130."""
    args = parser.parse_args()
    try:
        main(args)
    except (UserError, OSError) as e:
        print(f"error: {first_line(e, None)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)  # as shells have it


def number(kind, low, high=1e18):
    """An argparse `type`: a `kind` (int or float) from low to high."""
    def number_in_range(text):  # argparse calls it so in its message
        value = kind(text)  # where this fails, argparse says so
        if not low <= value <= high:  # nan is inside of nothing
            raise argparse.ArgumentTypeError(f"must be from {low:g} to {high:g}, not {text}")
        return value

    return number_in_range


positive = number(int, 1)  # an integer of 1 or more


def add_shared_flags(parser):
    """The flags that all commands have."""
    add = parser.add_argument
    add("--overwrite", action="store_true", help="replace what is there")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="default: 0")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")


WEIGHTS = (".pt", ".pth", ".ckpt")  # endings of the files that hold weights


def check_output(path, overwrite, endings=None):
    """Raise UserError for a file that may not, or OSError for one that cannot be
    written; called before any work, and again when the work is to be saved.
    endings: those that its name may have, by which readers tell its kind."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder, and a file is to be written: name the file")
    if endings and path.suffix.lower() not in endings:
        raise UserError(f"{path} has to end in {' or '.join(endings)}, for what it will hold")
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists already: choose another --output, or add --overwrite")
    # that its folder can be written to is tried now, rather than after hours of work
    path.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=path.parent).close()


def write_atomically(path, write, overwrite=False):
    """Open `path` for bytes, and call write(file).
    Ctrl-C or a full disk leaves the old file as it was. Raises UserError, and what
    check_output does."""
    check_output(path, overwrite)
    # The bytes go to a temporary file beside it, which then takes the name in one step.
    path = os.path.realpath(path)  # where a link leads: the link stays
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as f:
            write(f)
        check_output(path, overwrite)  # another command may have been there since
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # torch reports a full disk as a RuntimeError
        raise UserError(f"cannot write {path} ({first_line(e)}); any old file is untouched") from e
    finally:
        Path(temporary).unlink(missing_ok=True)


class StopRequest:
    """The first Ctrl-C becomes a flag, read between two steps; a second one interrupts
    at once. Likewise SIGTERM, and SIGHUP of a terminal that was closed."""

    def __enter__(self):
        self.requested = False
        self.previous = {}  # what the signals did before
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            if hasattr(signal, name):  # Windows has no SIGHUP
                s = getattr(signal, name)
                self.previous[s] = signal.signal(s, self.handle)
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
        name = "cpu"
        if torch.accelerator.is_available():
            name = torch.accelerator.current_accelerator().type
    try:
        return torch.zeros(1, device=name).device  # fails where there is none
    except Exception as e:  # each device has its own
        raise UserError(f"no device {name!r} here ({first_line(e)}); try --device cpu") from e


def autocast(device):
    """Autocast to bfloat16 where that is fast: AVX512-BF16, or CUDA of compute
    capability 8.0 and more."""
    fast = False
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    elif device.type == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


# --------------------------------------------------------------------------------------
# The command line: what does any model draw?

def draw(model, n, steps, seed, series=""):
    """n samples of a Checkpoint's model, uint8 (n, C, H, W): of one series and seed the
    same noise."""
    samples = model.diffusion.sample(model.unet, n, model.config["image_shape"], steps, eta=1.0,
                                     seed=seed, series=series)
    return to_uint8(samples)


def main(args):
    """A picture with a block of samples for each model, of the same noise."""
    check_output(args.output, args.overwrite, (".png",))
    device = pick_device(args.device)
    models = [load_checkpoint(path, device) for path in args.checkpoints]
    blocks = [draw(model, args.n, 25, args.seed) for model in models]
    write_images(args.output, blocks, args.overwrite)
    print(f"wrote {args.output}: from left to right {', '.join(args.checkpoints)}")


def parser():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("checkpoints", nargs="+", metavar="CHECKPOINT", help="a block of samples each")
    add("--n", type=positive, default=64, help="samples of each (default: 64)")
    add("--output", default="grid.png", help="default: grid.png")
    add_shared_flags(p)
    return p


if __name__ == "__main__":
    run_command_line(main, parser())
