"""Variational Diffusion Unlearning: make a trained DDPM forget, from a few images of what must go and nothing else.

    python vdu.py --forget-class 1

Holds    the posterior p(theta | D), the two losses of the paper and their sum, the unlearning loop, the command line.
Reads    a checkpoint of train_ddpm.py, and the images of the forgotten class alone. Never a retained image.
Writes   a checkpoint of the same format, checkpoints/mnist-forget-1.pt, which remembers what was forgotten and how.
Paper    VDU (arXiv 2510.04058), section 4: plasticity inducer, stability regularizer, objective. What goes beyond
         the paper is the option --function-space alone, and is marked so wherever it appears.
"""

import math
import os
import time

import torch
import torch.nn.functional as F
from torch.func import functional_call
from tqdm import tqdm

from ddpm import (ArgumentParser, UserError, autocast, check_output, load_checkpoint, pick_device, read_file,
                  run_command_line, save_checkpoint, seed_everything, stratified_timesteps)

# ---------------------------------------------------------------------------------------------------------------
# The posterior p(theta | D) ~ prod_i N(mu*_i, sigma*_i^2)

SIGMA_FLOOR = 1e-8  # for a parameter that no checkpoint moved: it stays where it is, and nothing divides by zero


class GaussianPosterior:
    """p(theta | D) as independent Gaussians, one a parameter (VDU, section 4).

    mean, std: dicts from parameter names to tensors of the parameters' shapes (mu*, sigma*).  n: checkpoints behind them.
    """

    def __init__(self, mean, std, n):
        self.mean, self.std, self.n = mean, {k: s.clamp(min=SIGMA_FLOOR) for k, s in std.items()}, n

    @classmethod
    def from_checkpoints(cls, paths):
        """mu* and sigma* over checkpoint files, which must agree in their parameters, read one at a time.

        Raises UserError for fewer than two files, or if one differs from the first (it names the parameters).
        """
        if len(paths) < 2:
            raise UserError("a posterior needs at least two checkpoints: one alone has no spread")
        running = None
        for path in paths:
            unet = load_checkpoint(path).unet
            running = running or RunningPosterior(unet.named_parameters())
            check_parameters(path, dict(unet.named_parameters()), paths[0], running.mean)
            running.update(unet.named_parameters())
        return running.posterior()

    def isotropic(self):
        """The same mean, with one sigma for all parameters: the root mean square of sigma*. For comparison only."""
        total = sum(s.numel() for s in self.std.values())
        sigma = math.sqrt(sum(s.double().square().sum().item() for s in self.std.values()) / total)
        return GaussianPosterior(self.mean, {k: torch.full_like(s, sigma) for k, s in self.std.items()}, self.n)

    def to(self, device):
        move = lambda tensors: {k: v.to(device) for k, v in tensors.items()}
        return GaussianPosterior(move(self.mean), move(self.std), self.n)

    def state_dict(self):
        return {"mean": self.mean, "std": self.std, "n": self.n}


class RunningPosterior:
    """mu* and sigma* of weights that pass by one at a time (Welford 1962), in float32: no pile of snapshots."""

    def __init__(self, named_parameters):
        self.n = 0
        self.mean = {k: torch.zeros_like(p, dtype=torch.float32) for k, p in named_parameters}
        self.m2 = {k: torch.zeros_like(m) for k, m in self.mean.items()}  # sum of squared deviations from the mean

    @torch.no_grad()
    def update(self, named_parameters):
        self.n += 1
        for name, p in named_parameters:
            deviation = p - self.mean[name]  # from the old mean
            self.mean[name] += deviation / self.n
            self.m2[name] += deviation * (p - self.mean[name])  # times the deviation from the new one

    def posterior(self):
        """The GaussianPosterior so far; sigma* is the unbiased estimate, over n - 1. Needs n >= 2."""
        std = {k: (m2 / (self.n - 1)).sqrt() for k, m2 in self.m2.items()}
        return GaussianPosterior({k: m.clone() for k, m in self.mean.items()}, std, self.n)

    def state_dict(self):
        return {"n": self.n, "mean": self.mean, "m2": self.m2}

    def load_state_dict(self, state):
        self.n, self.mean, self.m2 = state["n"], state["mean"], state["m2"]


def check_parameters(path, parameters, other_path, others):
    """Raise UserError unless both dicts have the same names and shapes."""
    wrong = [k for k in {**parameters, **others} if k not in parameters or k not in others or parameters[k].shape != others[k].shape]
    if wrong:
        raise UserError(f"the parameters of {path} do not match those of {other_path}: {', '.join(wrong[:3])}"
                        f"{f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''}")


# ---------------------------------------------------------------------------------------------------------------
# The loss, from the KL divergence to the formula
#
# (1) What we want. Bayes' rule for D = D_r u D_f, whose parts are independent given theta:
#         p(theta | D) = p(D_f | theta) p(D_r | theta) p(theta) / p(D),    p(theta | D_r) = p(D_r | theta) p(theta) / p(D_r)
#     Divide the second by the first, and everything that needs D_r as data is gone:
#         p(theta | D_r) = Z p(theta | D) / p(D_f | theta),    Z = p(D) / p(D_r).
#
# (2) Look for it among Gaussians q(theta) = prod_i N(theta_i, s_i^2):
#         KL( q || Z p(theta | D) / p(D_f | theta) )
#           = E_q[ log q(theta) - log p(theta | D) ] + E_q[ log p(D_f | theta) ] - log Z
#           = KL( q || p(theta | D) )                + E_q[ log p(D_f | theta) ] - log Z.
#     log Z does not depend on q: it drops out.
#
# (3) The first term, between Gaussians, with p(theta | D) = prod_i N(mu*_i, sigma*_i^2):
#         KL( q || p(theta | D) ) = sum_i [ (theta_i - mu*_i)^2 / (2 sigma*_i^2) + s_i^2 / (2 sigma*_i^2) - 1/2 + log(sigma*_i / s_i) ].
#     We need one network, not a distribution over networks: s is held fixed, all but the first part are constants
#     and drop out. What remains is the stability regularizer B.
#
# (4) The second term, at q's mean: E_q[ log p(D_f | theta) ] ~ log p(D_f | theta), which DDPM bounds:
#         -log p(x_0 | theta) <= sum_t w_t E_eps || eps - eps_theta(x_t, t) ||^2 + const.
#     With w_t = 1, as in DDPM's training loss, that is the plasticity inducer A, and log p(D_f | theta) becomes -A.
#     Note what this is not: -A is a LOWER bound on log p(D_f | theta), so putting it in place of log p(D_f | theta)
#     gives neither a bound on the KL nor its value, but a surrogate that shares its direction. And -A has no floor:
#     without B, raising A never ends. That is why stability decides everything.
#
# (5) Their sum, with a factor to balance them (the exact weights above: N_f images times the w_t, against 1):
#         L(theta) = -(1 - gamma) A + gamma B.
#
# The scale in which gamma is measured: A is the squared error of one image, summed over its D dimensions, averaged over
# images, t and eps; B is summed over all parameters. Around mu*, where A ~ A(mu*) + (theta - mu*) . grad A, the
# minimum is theta - mu* = (1-gamma)/gamma sigma*^2 grad A: each parameter moves by its own variance.


def plasticity_loss(unet, diffusion, x0, t, eps):
    """A, image by image: || eps - eps_theta(sqrt(abar_t) x_0 + sqrt(1-abar_t) eps, t) ||^2 (VDU, plasticity inducer).

    x0, eps: (B, C, H, W), images of D_f and unit noise.  t: (B,).  Returns (B,), the sum over the D dimensions.
    """
    return diffusion.simple_loss(unet, x0, t, eps) * x0[0].numel()  # mean -> sum over dimensions


def stability_loss(theta, posterior):
    """B = sum_i (theta_i - mu*_i)^2 / (2 sigma*_i^2): KL(q || p(theta | D)) less its constants (VDU, stability regularizer).

    theta: dict from names to parameters, as dict(unet.named_parameters()).  Returns a scalar. Zero at mu* alone.
    """
    return sum(((p - posterior.mean[k]) / posterior.std[k]).square().sum() for k, p in theta.items()) / 2


def vdu_loss(A, B, gamma):
    """L = -(1 - gamma) A + gamma B (VDU, objective)."""
    return -(1 - gamma) * A + gamma * B


# ---------------------------------------------------------------------------------------------------------------
# Beyond the paper: stability in function space (--function-space WEIGHT)


class FunctionSpaceAnchor:
    """A second stability term, NOT in the paper: keep eps_theta near eps_theta* on images that the model itself generates.

    B measures each parameter alone, so it cannot see a direction that many loose parameters share, and along which
    eps_theta changes for every class. This term measures the change itself,
        F = E_{x ~ p_theta*, t, eps} || eps_theta(x_t, t) - eps_theta*(x_t, t) ||^2,
    and still needs no retained image: generated ones stand in for D_r. Those that look like D_f must not be anchored,
    or F would hold on to what A pushes away: `looks_forgotten` ranks them, from D_f and the network alone, and the
    `drop` share that looks most like D_f is left out.

    unet: the pre-trained network, at theta*.  forget: (N, C, H, W) images of D_f.  n: images to generate.
    """

    def __init__(self, unet, diffusion, forget, n=1000, drop=0.2, sampling_steps=25, seed=0, progress=False):
        self.unet, self.diffusion = unet, diffusion
        shape = tuple(forget.shape[1:])
        generated = diffusion.sample(unet, n, shape, steps=sampling_steps, eta=1.0, seed=seed, progress=progress)
        ratio = looks_forgotten(unet, diffusion, generated.to(forget.device), forget)
        self.images = generated[ratio.cpu().argsort(descending=True)[: round((1 - drop) * n)]].to(forget.device)
        self.ratio, self.generated = ratio, generated

    def loss(self, unet, batch_size):
        """F on a random batch of anchors: (B,), summed over the D dimensions, as A is."""
        x0 = self.images[torch.randint(len(self.images), (batch_size,)).to(self.images.device)]
        t = stratified_timesteps(batch_size, 0, self.diffusion.T, x0.device)
        xt = self.diffusion.q_sample(x0, t, torch.randn_like(x0))
        with autocast(x0.device):
            with torch.no_grad():
                target = self.unet(xt, t)
            prediction = unet(xt, t)
        return (prediction - target).square().flatten(1).sum(1)  # (B, C, H, W) -> (B,)


@torch.no_grad()
def looks_forgotten(unet, diffusion, generated, forget, k=5, at=(50, 150)):
    """For each generated image, how unlike D_f the network finds it: small means like D_f. Returns (N,) positive ratios.

    In the middle block's features, at two low noise levels, pooled to at most 3x3 and standardised: the distance to the k-th
    nearest image of D_f over the distance to the k-th nearest other generated image. The ratio asks which of the two sets
    is denser around the image, so that it needs neither a label nor a scale.
    """
    def features(images):
        out = []
        for step in at:
            chunks = []
            for x0 in images.split(250):
                t = torch.full((len(x0),), step * diffusion.T // 1000, device=x0.device)
                with autocast(x0.device):
                    h = unet(diffusion.q_sample(x0, t, torch.randn_like(x0)), t, return_middle=True)  # (B, C', h, w)
                chunks.append(F.adaptive_avg_pool2d(h, (min(3, h.shape[2]), min(3, h.shape[3]))).flatten(1))  # (B, 9 C')
            out.append(torch.cat(chunks))
        return torch.cat(out, dim=1)  # (N, 18 C')

    g, f = features(generated), features(forget[:1000])
    mean, std = g.mean(0), g.std(0) + 1e-6
    g, f = (g - mean) / std, (f - mean) / std
    to_forget = torch.cdist(g, f).kthvalue(min(k, len(f)), dim=1).values  # (N,)
    to_generated = torch.cdist(g, g).kthvalue(min(k, len(g) - 1) + 1, dim=1).values  # (N,); + 1: the image itself is nearest
    return to_forget / to_generated


# ---------------------------------------------------------------------------------------------------------------
# Unlearning
