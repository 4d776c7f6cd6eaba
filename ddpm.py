"""The diffusion: noise schedules, losses, the variational bound, samplers; and the checkpoint file.

Holds    Diffusion (q and p of DDPM, both losses, ancestral and DDIM sampling), load_checkpoint, save_checkpoint,
         and the small things that the three command lines share (devices, errors, seeds).
Reads    checkpoint files, and DDPM's weights as others publish them (LAYOUTS).      Writes    checkpoint files, atomically.
Paper    VDU (arXiv 2510.04058), its background on diffusion models. The sources, cited below as
         DDPM = Ho et al. 2020 (arXiv 2006.11239), DDIM = Song et al. 2021 (arXiv 2010.02502).

The paper counts t = 1 .. T. Here t is an index, 0 .. T-1, into buffers: t=0 is the paper's first noise step, so
`alpha_bar[t]` is the paper's abar_{t+1}, and "x_{t-1}" at index 0 is the clean image x_0.
Images are float32 in [-1, 1], shape (B, C, H, W); D = C*H*W is the number of dimensions of one image.
"""

import argparse
import contextlib
import math
import os
import pickle
import random
import signal
import sys
import zipfile
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
from torch.distributions import Normal, kl_divergence
from tqdm import tqdm

from unet import AttentionBlock, Downsample, ResBlock, UNet, Upsample

# ---------------------------------------------------------------------------------------------------------------
# The diffusion


def linear_schedule(timesteps):
    """beta_t from 1e-4 to 0.02, evenly (DDPM, section 4), scaled so that other T end at the same noise. (T,) float64."""
    scale = 1000 / timesteps
    return torch.linspace(1e-4 * scale, 0.02 * scale, timesteps, dtype=torch.float64).clamp(max=0.999)


def cosine_schedule(timesteps):
    """abar_t = cos^2((t/T + s) / (1 + s) * pi/2), s = 0.008 (Nichol & Dhariwal 2021, eq. 17). Betas, (T,) float64.

    The linear schedule was made for 256x256 images: at 28x28 it leaves nothing to see for a third of the steps.
    """
    u = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)


def scaled_linear_schedule(timesteps):
    """sqrt(beta_t) from sqrt(0.00085) to sqrt(0.012), evenly: latent diffusion's and Stable Diffusion's (Rombach et al. 2022). (T,) float64."""
    return torch.linspace(0.00085**0.5, 0.012**0.5, timesteps, dtype=torch.float64) ** 2


SCHEDULES = {"linear": linear_schedule, "cosine": cosine_schedule, "scaled_linear": scaled_linear_schedule}


def stratified_timesteps(n, low, high, device="cpu", generator=None):
    """n step indices, each uniform on low .. high-1, one from each n-th of that range, in random order: (n,) int64.

    The loss differs a hundredfold between t near 0 and t near T. Covering the range evenly within a batch takes
    that difference out of the gradient's noise, and leaves its expectation as it was.
    """
    u = (torch.randperm(n, generator=generator) + torch.rand(n, generator=generator)) / n  # (n,) in [0, 1)
    return (low + u * (high - low)).long().clamp(max=high - 1).to(device)


class Diffusion(nn.Module):
    """The forward process q and the reverse process p_theta of DDPM, for a network eps_theta called as unet(x_t, t).

    schedule: "linear", "cosine" or "scaled_linear".  timesteps: T.  Every buffer is (T,), float32, computed in float64.
    """

    def __init__(self, schedule="linear", timesteps=1000):
        super().__init__()
        self.schedule, self.T = schedule, timesteps
        beta = SCHEDULES[schedule](timesteps)
        alpha = 1 - beta
        alpha_bar = alpha.cumprod(0)  # abar_t = prod_{s<=t} alpha_s
        alpha_bar_prev = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])  # abar_{t-1}; abar_0 = 1
        posterior_variance = beta * (1 - alpha_bar_prev) / (1 - alpha_bar)  # beta tilde_t, DDPM eq. 7
        for name, value in {
            "beta": beta,
            "alpha": alpha,
            "alpha_bar": alpha_bar,
            "alpha_bar_prev": alpha_bar_prev,
            "sqrt_alpha_bar": alpha_bar.sqrt(),
            "sqrt_one_minus_alpha_bar": (1 - alpha_bar).sqrt(),
            "posterior_variance": posterior_variance,
            # mu tilde_t = coef_x0 * x_0 + coef_xt * x_t, DDPM eq. 7
            "posterior_mean_coef_x0": alpha_bar_prev.sqrt() * beta / (1 - alpha_bar),
            "posterior_mean_coef_xt": alpha.sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar),
        }.items():
            self.register_buffer(name, value.float())

    @staticmethod
    def _at(buffer, t, x):
        return buffer[t].view(-1, *[1] * (x.dim() - 1))  # (B,) -> (B, 1, 1, 1), to multiply images

    def q_sample(self, x0, t, eps):
        """x_t ~ q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I), with its noise eps given (DDPM eq. 4)."""
        return self._at(self.sqrt_alpha_bar, t, x0) * x0 + self._at(self.sqrt_one_minus_alpha_bar, t, x0) * eps

    def predict_x0(self, xt, t, eps):
        """The x_0 that q_sample would have needed to give x_t with this noise (DDPM eq. 15)."""
        return (xt - self._at(self.sqrt_one_minus_alpha_bar, t, xt) * eps) / self._at(self.sqrt_alpha_bar, t, xt)

    def q_posterior(self, x0, xt, t):
        """q(x_{t-1} | x_t, x_0) = N(mu tilde_t, beta tilde_t I) (DDPM eqs. 6, 7). Returns mean (B, ...), variance (B, 1, 1, 1)."""
        mean = self._at(self.posterior_mean_coef_x0, t, xt) * x0 + self._at(self.posterior_mean_coef_xt, t, xt) * xt
        return mean, self._at(self.posterior_variance, t, xt)

    # --- losses -------------------------------------------------------------------------------------------------

    def simple_loss(self, unet, x0, t, eps):
        """|| eps - eps_theta(sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, t) ||^2 / D, for each image (DDPM eq. 14).

        x0, eps: (B, C, H, W).  t: (B,).  Returns (B,): the squared error a dimension, 1 for a network that says 0.
        Averaged over t and eps it is the variational bound below with every term's weight set to 1.
        """
        with autocast(x0.device):
            eps_theta = unet(self.q_sample(x0, t, eps), t)
        return (eps - eps_theta).square().flatten(1).mean(1)  # (B, C, H, W) -> (B,)

    @torch.no_grad()
    def variational_bound(self, unet, x0, variance="beta", seed=0, progress=False):
        """The exact bound -log p_theta(x_0) <= L_0 + sum_t L_{t-1} + L_T (DDPM eq. 5), a term at a time, in bits per dimension.

        x0: (B, C, H, W) images of 256 grey levels, scaled to [-1, 1].  All T terms are computed, one draw of eps each.
        variance: sigma_t^2 of p_theta, "beta" or "posterior" (beta tilde): right for x_0 ~ N(0, I) and for a single known x_0
        (DDPM, section 3.2). Data that fills its space is nearer to the first, whose bound is the tighter one.
        Returns a dict of float64 tensors, in the paper's names:
          "L_T" (B,)       KL(q(x_T | x_0) || N(0, I)): what the last step still knows about x_0; no theta in it
          "L_t" (B, T-1)   KL(q(x_{t-1} | x_t, x_0) || p_theta(x_{t-1} | x_t)), t = 2 .. T
          "L_0" (B,)       -log p_theta(x_0 | x_1), over the grey levels
          "total" (B,)     their sum
        This is what "-log p(D_f | theta) is bounded by the loss" means: `simple_loss` drops the weights
        beta_t^2 / (2 sigma_t^2 alpha_t (1 - abar_t)) that make each L_{t-1} a KL divergence (DDPM eq. 12).
        """
        B, D = x0.shape[0], x0[0].numel()
        generator = torch.Generator().manual_seed(seed)
        x0_64 = x0.cpu().double()
        abar_T = self.alpha_bar[-1].cpu().double()
        q_T = Normal(abar_T.sqrt() * x0_64, (1 - abar_T).sqrt())
        L_T = kl_divergence(q_T, Normal(0.0, 1.0)).flatten(1).sum(1)  # (B,) nats

        L_t = torch.zeros(B, self.T - 1, dtype=torch.float64)
        for t in tqdm(range(self.T - 1, 0, -1), desc="variational bound", disable=not progress):
            tt = torch.full((B,), t, device=x0.device)
            eps = torch.randn(x0.shape, generator=generator).to(x0.device)
            error = (eps - unet(self.q_sample(x0, tt, eps), tt)).cpu().double().square().flatten(1).sum(1)  # (B,)
            beta, alpha, abar = (b[t].cpu().double() for b in (self.beta, self.alpha, self.alpha_bar))
            q_var = self.posterior_variance[t].cpu().double()  # beta tilde_t
            p_var = beta if variance == "beta" else q_var  # sigma_t^2
            weight = beta**2 / (2 * p_var * alpha * (1 - abar))  # DDPM eq. 12: the KL between means, in terms of eps
            spread = (p_var / q_var).log() + q_var / p_var - 1  # and between variances: 0 where they are equal
            L_t[:, t - 1] = weight * error + D / 2 * spread

        t0 = torch.zeros(B, dtype=torch.long, device=x0.device)
        eps = torch.randn(x0.shape, generator=generator).to(x0.device)
        x1 = self.q_sample(x0, t0, eps)
        mean = self.predict_x0(x1, t0, unet(x1, t0)).cpu().double()  # sigma_1^2 = beta_1 either way: beta tilde_1 = 0
        L_0 = -discretized_gaussian_log_likelihood(x0_64, mean, self.beta[0].cpu().double().sqrt()).flatten(1).sum(1)

        nats = 1 / (D * math.log(2))  # nats of an image -> bits per dimension
        return {"L_T": L_T * nats, "L_t": L_t * nats, "L_0": L_0 * nats, "total": (L_T + L_t.sum(1) + L_0) * nats}

    # --- sampling -----------------------------------------------------------------------------------------------

    def ancestral_step(self, unet, xt, t, z, clip=True):
        """x_{t-1} ~ p_theta(x_{t-1} | x_t) with variance beta tilde_t (DDPM, algorithm 2). t: (B,), z: unit noise like x_t."""
        x0 = self._x0(unet, xt, t, clip)
        mean, variance = self.q_posterior(x0, xt, t)
        return mean + variance.sqrt() * z

    def ddim_step(self, unet, xt, t, t_prev, z, eta=0.0, clip=True):
        """One step from t down to t_prev (DDIM eq. 12). t, t_prev: (B,); t_prev = -1 is the clean image. z as above.

        eta = 0 is deterministic; eta = 1 is the ancestral step when t_prev = t-1 (DDIM eq. 16).
        """
        x0 = self._x0(unet, xt, t, clip)
        abar = self._at(self.alpha_bar, t, xt)
        abar_prev = torch.where(t_prev < 0, 1.0, self.alpha_bar[t_prev.clamp(min=0)]).view_as(abar)
        # The direction to x_t comes from the clipped x_0, so that the two agree.
        eps = (xt - abar.sqrt() * x0) / (1 - abar).sqrt()
        sigma = eta * ((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)).sqrt()
        return abar_prev.sqrt() * x0 + (1 - abar_prev - sigma**2).clamp(min=0).sqrt() * eps + sigma * z

    def _x0(self, unet, xt, t, clip):
        with autocast(xt.device):
            eps = unet(xt, t)
        x0 = self.predict_x0(xt, t, eps)
        return x0.clamp(-1, 1) if clip else x0  # images live in [-1, 1]; latents (clip=False) have no such box

    @torch.no_grad()  # not inference_mode, in which autocast caches nothing
    def sample(self, unet, n, shape, steps=None, eta=0.0, seed=0, batch_size=None, clip=True, progress=False):
        """n samples of p_theta.  shape: (C, H, W).  Returns (n, C, H, W) float32 in [-1, 1], on the CPU.

        steps=None: ancestral sampling through all T steps.  steps=S: DDIM through S evenly spaced ones, with `eta`.
        Image i gets its noise from (seed, i) alone, so neither batch_size nor n changes it. batch_size: None takes 500 on a GPU, 125
        on a CPU, whose caches hold no more.
        Raises UserError if S is not in 1 .. T.
        """
        if steps is not None and not 1 <= steps <= self.T:
            raise UserError(f"sampling steps must be from 1 to {self.T}, not {steps}")
        grid = range(self.T - 1, -1, -1) if steps is None else np.linspace(self.T - 1, 0, steps).round().astype(int).tolist()
        device = self.alpha_bar.device
        batch_size = batch_size or (125 if device.type == "cpu" else 500)
        out = torch.empty(n, *shape)
        # autocast around the whole loop, too: it keeps the weights it has cast until it ends, so that each is cast once, not once a step
        with autocast(device), tqdm(total=n * len(grid), desc="sampling", unit="img*step", unit_scale=True, disable=not progress) as bar:
            for start in range(0, n, batch_size):
                B = min(batch_size, n - start)
                noise = ImageNoise(seed, range(start, start + B), shape, device)
                x = noise().clone()  # x_T ~ N(0, I): (B, C, H, W)
                zeros = torch.zeros_like(x)
                for t, t_prev in zip(grid, [*grid[1:], -1]):
                    tt = torch.full((B,), t, device=device)
                    z = noise() if (steps is None or eta > 0) and t_prev >= 0 else zeros
                    if steps is None:
                        x = self.ancestral_step(unet, x, tt, z, clip)
                    else:
                        x = self.ddim_step(unet, x, tt, torch.full_like(tt, t_prev), z, eta, clip)
                    bar.update(B)
                out[start : start + B] = x.cpu()
        return out


def training_step(unet, diffusion, optimizer, x0):
    """One step of DDPM's training (algorithm 1) on x0 (B, C, H, W). Returns the loss; where that is no number, no step was taken."""
    t = stratified_timesteps(len(x0), 0, diffusion.T, x0.device)  # (B,)
    loss = diffusion.simple_loss(unet, x0, t, torch.randn_like(x0)).mean()  # DDPM eq. 14
    value = loss.item()
    if math.isfinite(value):
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return value


class ImageNoise:
    """Unit Gaussian noise, a stream an image: stream i depends on (seed, i) alone, on every device."""

    def __init__(self, seed, indices, shape, device="cpu"):
        self.streams = [np.random.default_rng([seed, i]) for i in indices]
        self.draws = np.empty((len(self.streams), *shape), dtype=np.float32)
        self.device = device

    def __call__(self):
        """The next draw, (B, C, H, W). On a CPU it stands in the memory of the draw before."""
        for rng, draw in zip(self.streams, self.draws):
            rng.standard_normal(dtype=np.float32, out=draw)
        return torch.from_numpy(self.draws).to(self.device)


def discretized_gaussian_log_likelihood(x, mean, std):
    """log of the mass that N(mean, std^2) gives to x's grey level: the bin x +- 1/255, open at both ends (DDPM eq. 13)."""
    upper = torch.where(x > 0.999, torch.ones_like(x), torch.special.ndtr((x + 1 / 255 - mean) / std))
    lower = torch.where(x < -0.999, torch.zeros_like(x), torch.special.ndtr((x - 1 / 255 - mean) / std))
    return (upper - lower).clamp(min=1e-12).log()


# ---------------------------------------------------------------------------------------------------------------
# Devices, seeds, errors


class UserError(ValueError):
    """Something that the person at the keyboard can put right. The command lines print its one line and exit with 2."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse that keeps to one line on an error, and shows every default in --help."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=HelpFormatter, **kwargs)

    def error(self, message):
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):  # no "(default: None)", and none beside a default that the text explains
        return action.help if not action.default or "(default:" in action.help else super()._get_help_string(action)


def seed_number(text):
    """A seed from the command line: an integer from 0 up."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"a seed is a whole number from 0 up, not {text!r}")
    return int(text)


def run_command_line(main):
    """Call main(); a UserError becomes one line on standard error and exit code 2, Ctrl-C exit code 130."""
    try:
        main()
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


class StopRequest:
    """Turns the first Ctrl-C (or SIGTERM) into a flag that is read between two steps; a second one interrupts at once."""

    def __enter__(self):
        self.requested = False
        self.previous = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _handle(self, signum, frame):
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(self, *exc):
        for s, handler in self.previous.items():
            signal.signal(s, handler)


def pick_device(name="auto"):
    """torch.device from "auto" (CUDA, else MPS, else CPU) or a name. Raises UserError where it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise UserError(f"device {name!r} cannot be used here ({first_line(e)}); try --device cpu") from e
    return device


PRECISIONS = {"auto": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
precision = "auto"  # the command lines that offer --precision set it


def autocast(device):
    """Autocast to `precision`; "auto" is bfloat16 where the device gains by it (recent CUDA GPUs, CPUs with AVX512-BF16), else nothing."""
    device = torch.device(device)
    gains = (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)) or (
        device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    )
    dtype = PRECISIONS[precision] or (torch.bfloat16 if gains else torch.float32)
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def seed_everything(seed):
    """Seed every random number generator in use; draws after it repeat on the same machine."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def peak_memory(device):
    """The most memory that this process has held, as text: of the GPU's, or the resident set on a CPU."""
    if torch.device(device).type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"
    try:
        import resource  # not on Windows
    except ImportError:
        return "not known on this system"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.1f} GiB"


def count(n):
    """2587000 -> '2.59M'."""
    return f"{n / 1e6:.2f}M" if n >= 1e6 else f"{n / 1e3:.0f}k"


# ---------------------------------------------------------------------------------------------------------------
# The checkpoint file


@dataclass
class Checkpoint:
    """What load_checkpoint returns.

    unet        UNet with the (averaged) weights theta*, in eval mode, called as unet(x, t)
    diffusion   Diffusion with the schedule it was trained with
    posterior   vdu.GaussianPosterior over unet's parameters, or None where training kept none
    config      {"unet": UNet's arguments, "schedule", "timesteps", "velocity", "image_shape"}
    dataset     name of the dataset, e.g. "mnist"
    data        which images exactly: {"name", "source", "classes", "excluded", ...}
    step        training steps done
    forgotten   None, or what vdu.py unlearned, from which checkpoint and with which settings
    raw         the file's whole dictionary
    """

    unet: UNet
    diffusion: Diffusion
    posterior: object
    config: dict
    dataset: str
    data: dict
    step: int
    forgotten: dict | None
    path: str
    raw: dict


def build(config, device="cpu"):
    """(UNet, Diffusion) from a checkpoint's `config`, with fresh weights."""
    diffusion = Diffusion(config["schedule"], config["timesteps"])
    with torch.device(device):
        unet = UNet(**config["unet"], alpha_bar=diffusion.alpha_bar.clone() if config["velocity"] else None)
    return unet.to(device), diffusion.to(device)


def save_checkpoint(path, contents):
    """Write the dictionary `contents` (tensors and plain Python values) to `path`, all or nothing.

    The bytes go to a temporary file beside it, which then takes the name in one step: a crash, Ctrl-C or a full disk
    leaves the old file as it was. Raises UserError when it cannot be written.
    """
    path = os.fspath(path)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(temporary, "wb") as f:
            torch.save(contents, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # torch reports a full disk as a RuntimeError
        kept = ", the file that was there is untouched" if os.path.exists(path) else ""
        raise UserError(f"cannot write {path} ({first_line(e)}){kept}; free some space or choose another --output") from e
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def first_line(error):
    """The first line of an exception's message, or its type's name where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


class StandIn:
    """What a class of somebody else's package becomes when a file is read: it takes whatever it is given, and does nothing."""

    def __new__(cls, *args, **kwargs):
        # A trainer's objects and dictionaries: torch's reader fills no mapping but its own. numpy's numbers set a state.
        return super().__new__(cls) if cls.__module__.startswith("numpy") else OrderedDict()

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


# What training tools leave beside the weights in a file, and which the standard library would count among its own.
HARMLESS = {"argparse.Namespace", "collections.defaultdict", "collections.deque", "datetime.datetime", "datetime.timedelta",
            "pathlib.PosixPath", "pathlib.WindowsPath", "pathlib.Path", "typing.Any", "numpy.core.multiarray.scalar",
            "numpy._core.multiarray.scalar", "numpy.dtype", "builtins.bool", "builtins.dict", "builtins.float", "builtins.frozenset",
            "builtins.int", "builtins.list", "builtins.str", "builtins.tuple"}


def harmless(name):
    """Whether a foreign name in a pickle may be read past: a class (CapWords) from outside Python and torch, or one listed above.

    Nothing of that name is imported or called either way: a StandIn takes its place. But a file that asks for a function
    (posix.system, builtins.exec, ...) is no file of weights with a trainer's leftovers, and is better refused.
    """
    module, _, last = name.rpartition(".")
    root = module.split(".")[0]
    return name in HARMLESS or (root not in sys.stdlib_module_names and root != "torch" and last[:1].isupper())


def read_file(path, mmap=False, make_one="train one with: python train_ddpm.py --dataset mnist"):
    """torch.load(weights_only=True) with errors that say what is wrong. Never executes what a pickle asks for.

    Objects of other packages beside the weights (a trainer's callbacks) are read as StandIns. mmap=True leaves the
    numbers on disk until they are needed. Raises UserError for a file that is missing, cut short, or asks for more.
    """
    if not os.path.isfile(path):
        raise UserError(f"no checkpoint at {path}; {make_one}")
    try:
        is_zip = zipfile.is_zipfile(path)  # torch's format since 1.6; only this one can be listed and mapped
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path) if is_zip else []
        refused = sorted(name for name in foreign if not harmless(name))
        if refused:
            raise UserError(f"{path} is not a file of weights and was refused: it asks for {', '.join(refused[:3])}")
        stand_ins = [type(name.rpartition(".")[2], (StandIn,), {"__module__": name.rpartition(".")[0]}) for name in foreign]
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and is_zip)
    except UserError:
        raise
    except pickle.UnpicklingError as e:
        raise UserError(f"{path} is not a file of weights and was refused: it holds other Python objects, or no pickle at all") from e
    except Exception as e:  # a reader of pickles can stumble in any way over bytes that are none
        raise UserError(f"{path} is damaged or cut short, or no PyTorch file ({first_line(e)[:80]})") from e


# The two layouts in which DDPM's weights are published, beside unet.py's own names. {l} is the level, 0 the finest; {u} the
# same counted from the coarsest; {i} the block in its level. A list names tensors that unet.py keeps as one.
LAYOUTS = {
    # the converted TensorFlow weights, ema_diffusion_cifar10_model-790000.ckpt
    "original": {
        "time_embed.0": "temb.dense.0", "time_embed.2": "temb.dense.1", "input_blocks.0.0": "conv_in", "out.0": "norm_out", "out.2": "conv_out",
        "down": "down.{l}.block.{i}", "down attention": "down.{l}.attn.{i}", "downsample": "down.{l}.downsample.conv",
        "middle_block.0": "mid.block_1", "middle_block.1": "mid.attn_1", "middle_block.2": "mid.block_2",
        "up": "up.{l}.block.{i}", "up attention": "up.{l}.attn.{i}", "upsample": "up.{l}.upsample.conv",
        "block": {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "temb_proj", "out_layers.0": "norm2", "out_layers.3": "conv2",
                  "skip_connection": "nin_shortcut"},
        "attention": {"norm": "norm", "qkv": ["q", "k", "v"], "proj_out": "proj_out"},
    },
    # google/ddpm-cifar10-32's diffusion_pytorch_model.bin
    "diffusers": {
        "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2", "input_blocks.0.0": "conv_in",
        "out.0": "conv_norm_out", "out.2": "conv_out",
        "down": "down_blocks.{l}.resnets.{i}", "down attention": "down_blocks.{l}.attentions.{i}",
        "downsample": "down_blocks.{l}.downsamplers.0.conv",
        "middle_block.0": "mid_block.resnets.0", "middle_block.1": "mid_block.attentions.0", "middle_block.2": "mid_block.resnets.1",
        "up": "up_blocks.{u}.resnets.{i}", "up attention": "up_blocks.{u}.attentions.{i}", "upsample": "up_blocks.{u}.upsamplers.0.conv",
        "block": {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2", "out_layers.3": "conv2",
                  "skip_connection": "conv_shortcut"},
        "attention": {"norm": "group_norm", "qkv": ["query", "key", "value"], "proj_out": "proj_attn"},
    },
}
# Diffusers has renamed its attention since; both spellings are read.
NEW_SPELLING = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def published_names(layout, unet):
    """{name of unet.py's: [names in a published layout]} for every tensor of `unet`, by LAYOUTS."""
    names, table = {}, LAYOUTS[layout]

    def put(ours, theirs, module):
        if isinstance(module, ResBlock | AttentionBlock):
            for part, their_part in table["block" if isinstance(module, ResBlock) else "attention"].items():
                if not isinstance(getattr(module, part, None), nn.Identity):  # an identity for a skip connection has no tensors
                    for kind in ("weight", "bias"):
                        names[f"{ours}.{part}.{kind}"] = [f"{theirs}.{p}.{kind}" for p in ([their_part] if isinstance(their_part, str) else their_part)]
        else:  # a convolution, a linear map, a norm
            for kind in ("weight", "bias"):
                names[f"{ours}.{kind}"] = [f"{theirs}.{kind}"]

    modules = dict(unet.named_modules())
    for ours in ("time_embed.0", "time_embed.2", "input_blocks.0.0", "middle_block.0", "middle_block.1", "middle_block.2", "out.0", "out.2"):
        put(ours, table[ours], modules[ours])
    levels = 1 + sum(isinstance(m, Downsample) for m in modules.values())
    for side, blocks, level, step in (("down", unet.input_blocks, 0, 1), ("up", unet.output_blocks, levels - 1, -1)):
        i = 0
        for n, block in enumerate(blocks):
            if n == 0 and side == "down":
                continue  # the first convolution, above
            for m, module in enumerate(block):
                resample = isinstance(module, Downsample | Upsample)
                kind = f"{side}sample" if resample else side if isinstance(module, ResBlock) else f"{side} attention"
                ours = f"{'input' if side == 'down' else 'output'}_blocks.{n}.{m}" + {"downsample": ".op", "upsample": ".conv"}.get(kind, "")
                put(ours, table[kind].format(l=level, u=levels - 1 - level, i=i), modules[ours])
                if resample:
                    level, i = level + step, -1
            i += 1
    return names


def from_published(raw, path):
    """The published weights of an unconditional DDPM, in either layout of LAYOUTS, as the dictionary of a checkpoint of this repository.

    raw: what the file holds.  Returns None for a file in neither layout. The network's sizes are read off the tensors; that of the
    images from where it attends, at 16x16 in every DDPM (Ho et al. 2020, appendix B). Raises UserError that lists the names that
    are missing or too many.
    """
    raw = raw.get("state_dict", raw) if isinstance(raw, dict) else None
    if not isinstance(raw, dict):
        return None
    if any(str(k).startswith("model.diffusion_model.") for k in raw):
        raise UserError(f"{path} is a Stable Diffusion checkpoint: sd_unlearn.py is for those")
    layout = "original" if "temb.dense.0.weight" in raw else "diffusers" if "time_embedding.linear_1.weight" in raw else None
    if layout is None:
        return None
    table, tensors = LAYOUTS[layout], dict(raw)
    if layout == "diffusers":
        for new, old in NEW_SPELLING.items():
            tensors = {k.replace(f".{new}.", f".{old}."): v for k, v in tensors.items()}
    first = lambda kind, l, i=0: table[kind].format(l=l, i=i) + (".weight" if "sample" in kind else f".{table['block']['in_layers.2']}.weight")
    has_attention = lambda l: f"{table['down attention'].format(l=l, i=0)}.{table['attention']['norm']}.weight" in tensors
    try:
        model_channels, in_channels = tensors["conv_in.weight"].shape[:2]
        levels = next(l for l in range(64) if first("down", l) not in tensors)
        blocks = next(i for i in range(64) if first("down", 0, i) not in tensors)
        mult = [tensors[first("down", l)].shape[0] // model_channels for l in range(levels)]
    except (KeyError, AttributeError, ValueError) as e:
        raise UserError(f"{path} is cut short: the {layout} layout of DDPM's weights, without {first_line(e)}") from e
    attention = [2**l for l in range(levels) if has_attention(l)]
    size = 16 * (attention[0] if attention else 2)
    config = {"unet": dict(in_channels=in_channels, model_channels=model_channels, channel_mult=mult, num_res_blocks=blocks,
                           attention_resolutions=attention, num_heads=1, dropout=0.1, norm_eps=1e-6, sin_first=True, pad_end=True),
              "schedule": "linear", "timesteps": 1000, "velocity": False, "image_shape": (in_channels, size, size)}
    unet, _ = build(config, "meta")
    names = published_names(layout, unet)
    theirs = {t for ts in names.values() for t in ts}
    missing, extra = sorted(theirs - set(tensors)), sorted(set(tensors) - theirs)
    if missing or extra:
        raise UserError(f"{path} is in the {layout} layout of DDPM's weights, but " + " and ".join(
            f"{word}: {', '.join(some)}" for word, some in (("lacks", missing), ("has names of no use", extra)) if some))
    shapes = {k: v.shape for k, v in unet.state_dict().items()}
    weights = {}
    for ours, parts in names.items():
        joined = torch.cat([tensors[t].float() for t in parts])  # q, k, v -> qkv; a single tensor stays as it is
        if joined.numel() != shapes[ours].numel():
            raise UserError(f"{path}: {', '.join(parts)} has the shape {tuple(joined.shape)}, not {tuple(shapes[ours])}")
        weights[ours] = joined.reshape(shapes[ours])  # attention as a matrix or a 1x1 convolution: the same numbers
    cifar10 = (in_channels, size) == (3, 32)
    data = {"name": "cifar10" if cifar10 else "unknown", "source": f"published weights, {layout} layout", "root": None,
            "classes": CIFAR10_CLASSES if cifar10 else [], "excluded": [], "images": 50_000 if cifar10 else None}
    return {"config": config, "weights": weights, "data": data, "step": 0, "posterior": None}


def load_checkpoint(path, device="cpu"):
    """Read a checkpoint of train_ddpm.py or vdu.py, or published DDPM weights. Returns a Checkpoint, its unet in eval mode on `device`.

    Raises UserError if the file is missing, truncated, not weights, or in none of these layouts.
    """
    from vdu import GaussianPosterior  # here, not above: vdu.py imports this file

    raw = read_file(path)
    raw = from_published(raw, path) or raw
    missing = {"config", "weights", "data", "step"} - set(raw if isinstance(raw, dict) else ())
    if missing:
        raise UserError(f"{path} is no checkpoint of this repository, nor DDPM's published weights: it lacks {', '.join(sorted(missing))}")
    unet, diffusion = build(raw["config"], device)
    try:
        unet.load_state_dict(raw["weights"])
    except RuntimeError as e:
        raise UserError(f"{path}: the weights do not fit the network that the file describes ({str(e).splitlines()[-1].strip()[:120]})") from e
    posterior = raw.get("posterior") and GaussianPosterior(**raw["posterior"]).to(device)
    return Checkpoint(unet.eval(), diffusion, posterior, raw["config"], raw["data"]["name"], raw["data"],
                      raw["step"], raw.get("forgotten"), os.fspath(path), raw)


def check_output(path, overwrite):
    """Raise UserError before any work is done if `path` exists and may not be replaced."""
    if os.path.exists(path) and not overwrite:
        raise UserError(f"{path} exists already; add --overwrite to replace it, or choose another --output")
