"""Variational Diffusion Unlearning: make a DDPM forget, from a few images of it.

    python vdu.py --forget-class 1
    python vdu.py --checkpoint ddpm-cifar10-32 --forget-images my_images

Holds    the derivation, the losses, the objective, the loop; below a rule what goes
         beyond the paper; last the command line. The posterior is in train_ddpm.py.
Reads    a checkpoint of train_ddpm.py (or, where there is none, the model of MNIST that
         ships with the code), or diffusers' DDPM weights; images of what will be
         forgotten, of a class or in a folder. No retained image is used.
Writes   a checkpoint, checkpoints/mnist-forget-1.pt, that records what was forgotten,
         and a picture beside it: samples of the same noise before and after. For a
         model of diffusers a folder that diffusers reads, too.
Paper    VDU (arXiv 2510.04058), its method: the two terms, posterior, objective.
"""

import argparse
import inspect
import math
import os
import re
import shlex
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

import torch
from torch.func import functional_call
from torch.nn.functional import adaptive_avg_pool2d, logsigmoid
from tqdm import tqdm

from ddpm import (WEIGHTS, Diffusion, UserError, add_shared_flags, autocast, check_output, digest,
                  load_checkpoint, noise_at, number, pick_device, positive, run_command_line,
                  save_checkpoint, stratified_timesteps, to_diffusers, to_float, to_uint8,
                  write_images)
from train_ddpm import (SHIPPED, GaussianPosterior, check_parameters, class_indices, load_data_of,
                        load_images, moving_parameters, set_missing)

# --------------------------------------------------------------------------------------
# The loss, from the KL divergence to the formula
#
# (1) What we want. Bayes' rule for D = D_r u D_f, whose parts are independent given
# theta:
#         p(theta | D)   = p(D_f | theta) p(D_r | theta) p(theta) / p(D),
#         p(theta | D_r) = p(D_r | theta) p(theta) / p(D_r).
#     Divide the second by the first, and all that needs D_r as data is gone:
#         p(theta | D_r) = Z p(theta | D) / p(D_f | theta),    Z = p(D) / p(D_r).
#
# (2) Look for it among Gaussians q of means theta_i and standard deviations s_i:
#         KL( q || Z p(theta | D) / p(D_f | theta) )
#           = E_q[ log q(theta) - log p(theta | D) ] + E_q[ log p(D_f | theta) ] - log Z
#           = KL( q || p(theta | D) )                + E_q[ log p(D_f | theta) ] - log Z
#     log Z does not depend on q: it drops out.
#
# (3) The first term, with p(theta | D) = prod_i N(mu*_i, sigma*_i^2):
#         KL( q || p(theta | D) ) = sum_i [ (theta_i - mu*_i)^2 / (2 sigma*_i^2)
#                              + s_i^2 / (2 sigma*_i^2) - 1/2 + log(sigma*_i / s_i) ].
#     We need one network, not a distribution over networks: s is held fixed, all but
#     the first part are constants and drop out. It is the stability regularizer B.
#
# (4) The second term, at q's mean: E_q[ log p(D_f | theta) ] ~ log p(D_f | theta), that
#     DDPM bounds, with weights C_t that make each summand a KL divergence:
#         -log p(x_0 | theta) <= sum_t C_t E || eps - eps_theta(x_t, t) ||^2 + const.
#     The sum is the plasticity inducer A; -A stands for log p(D_f | theta). (C_t = 1
#     is DDPM's training loss, and --paper's; --bound-weights takes the bound's.)
#     This is the method's leap: A with C_t, plus constants, is an UPPER bound on
#     -log p(D_f | theta), and to raise an upper bound guarantees nothing about what it
#     bounds. The "bits" of evaluate.py are such a bound, too: no proof. A has no
#     ceiling, and L no floor: B, a quadratic, holds it near mu* alone, where a local
#     minimum is sought.
#
# (5) Their sum, with a factor to balance them:
#         L(theta) = -(1 - gamma) A + gamma B.
#     (A sums over the N_f images of D_f and the T steps. The code takes the mean over
#     images and over t in t_range: 1/(N_f T) of that sum where t_range is 0 .. 1.)
#
# The unit in which gamma is measured: A per dimension of an image, B per parameter.
# With d dimensions and P parameters B is brought to A's size by d/P, so that one gamma
# means about the same for any image size and network. It is the paper's loss with
# another name for the same balance. With t_range 0 .. 1, the paper's own is
#         gamma_paper / (1 - gamma_paper) = N_f T (d/P) gamma / (1 - gamma).
# The gradient of that B in z = (theta - mu*) / sigma* is (d/P) z, a tiny number where a
# network has many parameters. `unlearn` divides the gradient of L by `unit`, d/P, so
# that one lr serves any network.
#
# What the minimum looks like: near mu*, A ~ A(mu*) + (theta - mu*) . grad A, and L is
# least at theta_i - mu*_i = (1 - gamma)/gamma (P/d) sigma*_i^2 dA/dtheta_i: there each
# parameter has moved in proportion to its variance sigma*_i^2, and loosely determined
# ones do the forgetting. (SGD in z takes this way from its first step; Adam in z does
# not, see `unlearn`.)

def plasticity_loss(unet, diffusion, x0, t, eps, C_t=1.0):
    """A of each image: C_t || eps - eps_theta(sqrt(abar_t) x_0 + sqrt(1-abar_t) eps, t)
    ||^2.  x0, eps: (n, C, H, W), images of D_f and unit noise.  t, C_t: (n,).  Returns
    (n,), the sum over the d dimensions (VDU, plasticity inducer)."""
    d = x0[0].numel()
    return C_t * d * diffusion.simple_loss(unet, x0, t, eps)  # simple_loss is a mean over d


def stability_loss(theta, posterior):
    """B = sum_i (theta_i - mu*_i)^2 / (2 sigma*_i^2): the KL of (3), less constants.
    theta: {name: parameter}.  Returns a scalar (VDU, stability regularizer)."""
    B = 0.0
    for k, p in theta.items():
        z = (p - posterior.mean[k]) / posterior.std[k]
        B = B + z.square().sum() / 2
    return B


def vdu_loss(A, B, gamma):
    """L = -(1 - gamma) A + gamma B (VDU, objective).
    A, B: scalars.  gamma: 0 is naive gradient ascent, 1 stays at the posterior's mean.
    """
    return -(1 - gamma) * A + gamma * B


def random_indices(n, x):
    """n indices into x, at random, on x's device."""
    return torch.randint(len(x), (n,)).to(x.device)


@dataclass
class PaperObjective:
    """L on a random batch of D_f. Called with the network, it returns (L, {"A", "B"}).

    diffusion: Diffusion.  posterior: GaussianPosterior of the parameters that move.
    images: (N, C, H, W) in [-1, 1] (or latents), of D_f.  gamma: 0 .. 1.  batch_size:
    images per call.  t_range: shares of T between which t is drawn.  context: (M, L,
    E) encoded prompts, one drawn for each image, where the network takes any.
    bound_weights: C_t of the bound in place of 1.  A is shown per dimension and without
    C_t, B per parameter.  Raises UserError for an empty t_range."""

    diffusion: Diffusion
    posterior: GaussianPosterior
    images: torch.Tensor
    gamma: float
    batch_size: int = 64
    t_range: tuple = (0, 1)
    context: torch.Tensor = None
    bound_weights: bool = False

    def __post_init__(self):
        low, high = self.t_range
        self.low = round(low * self.diffusion.T)
        self.high = round(high * self.diffusion.T)
        if self.low >= self.high:
            raise UserError("t_range needs two shares of T, 0 <= LOW < HIGH <= 1")
        self.d = self.images[0].numel()
        self.P = sum(mean.numel() for mean in self.posterior.mean.values())
        self.unit = self.d / self.P  # brings B to A's size

    def draw(self):
        """x_0 (n, C, H, W) of D_f, t (n,), eps like x_0, and prompts, () for none."""
        n = self.batch_size
        device = self.images.device
        x0 = self.images[random_indices(n, self.images)]
        prompts = ()
        if self.context is not None:
            prompts = (self.context[random_indices(n, self.context)],)
        t = stratified_timesteps(n, self.low, self.high, device)
        return x0, t, torch.randn_like(x0), prompts

    def __call__(self, unet):
        x0, t, eps, prompts = self.draw()

        def eps_theta(xt, t):
            return unet(xt, t, *prompts)

        errors = plasticity_loss(eps_theta, self.diffusion, x0, t, eps)  # (n,)
        C_t = self.diffusion.bound_weight(t) if self.bound_weights else 1.0
        A = (C_t * errors).mean()
        B = self.stability(unet)
        L = vdu_loss(A, self.unit * B, self.gamma)
        shown = {"A": errors.mean() / self.d, "B": B / self.P}
        return L, {name: value.item() for name, value in shown.items()}

    def stability(self, unet):
        """B of those parameters that move."""
        return stability_loss(moving_parameters(unet), self.posterior)


def unlearn(net, posterior, objective, lr, steps, adam=False, accumulate=1, seed=0):
    """Move `net`, in place, from mu* towards a minimum of the objective.

    net: any nn.Module; those parameters move that require a gradient, and the posterior
    must be of the same.  objective: called with net, returns (loss, dict of numbers to
    show); its `unit`, 1 where it has none, divides the loss.  lr: of the steps in z.
    adam: its steps in z in place of SGD's.  accumulate: batches per step.  Sets torch's
    global seed; train or eval mode is the caller's choice.  Returns {"steps", "before",
    "after": the objective's numbers, of one and the same batch, "moved_rms_sigma"}.
    Raises UserError if the posterior is of another network (net is untouched), or if
    loss or weights become infinite or nan (net is at mu* then)."""
    # The steps are in whitened coordinates z = (theta - mu*) / sigma*, in which the
    # posterior is N(0, I) and B = |z|^2 / 2. A step of SGD in z moves theta_i by
    # -(lr/unit) sigma*_i^2 dL/dtheta_i: what training pinned down hardly moves. (Adam
    # makes all steps of z alike, so that each theta_i moves by its own sigma*_i.)
    theta = moving_parameters(net)
    check_parameters("the posterior", posterior.mean, theta)
    z = {k: torch.zeros_like(p) for k, p in theta.items()}
    posterior.set_weights(z, theta)
    optimizer = torch.optim.SGD(z.values(), lr, momentum=0.9)
    if adam:
        optimizer = torch.optim.Adam(z.values(), lr, betas=(0.9, 0.99))
    unit = getattr(objective, "unit", 1.0)

    before = numbers_on_one_batch(objective, net, seed)
    net.zero_grad()  # of what came before
    bar = tqdm(range(steps), "unlearning")
    finite = True
    for step in bar:
        if adam:  # whose steps do not shrink by themselves
            optimizer.param_groups[0]["lr"] = lr * (1 - step / steps) ** 2

        # dL/dtheta, a mean over batches
        for _ in range(accumulate):
            loss, numbers = objective(net)
            (loss / accumulate).backward()

        # dL/dz = sigma* dL/dtheta, by the chain rule
        for k, p in theta.items():
            if p.grad is not None:
                z[k].grad = p.grad.mul_(posterior.std[k]).div_(unit)
            p.grad = None
        optimizer.step()
        posterior.set_weights(z, theta)

        bar.set_postfix(numbers, refresh=False)
        finite = math.isfinite(loss.item())
        if not finite:
            break

    flat = torch.cat([v.flatten() for v in z.values()])
    moved = flat.square().mean().sqrt().item()
    if not finite or not math.isfinite(moved):
        net.load_state_dict(posterior.mean, strict=False)
        raise UserError(f"loss or weights became infinite at step {step + 1}; nothing was written: "
                        f"try a larger gamma or a smaller lr than {lr:g}")
    after = numbers_on_one_batch(objective, net, seed)
    return {"steps": steps, "before": before, "after": after, "moved_rms_sigma": moved}


@torch.no_grad()
def numbers_on_one_batch(objective, net, seed):
    """What an objective shows; of the same images, t and noise at every call."""
    torch.manual_seed(seed)
    return objective(net)[1]


# The paper's method ends here: what goes beyond it, then the command line, follow.
# ======================================================================================
# BEYOND THE PAPER, ours: a posterior where one checkpoint is all there is.

def guessed_posterior(named_parameters, fraction=0.02):
    """mu* = the weights, sigma* = a fraction of each tensor's root mean square.

    A DEPARTURE from the paper, whose sigma* is measured. This one knows only the scale
    of each tensor, not which of its parameters training pinned down. (Measured on
    MNIST, the fraction is 0.015 for the median tensor, 0.006 to 0.07 for all that are
    matrices.) `n` is 1; std holds one number per tensor."""
    mean = {}
    std = {}
    for k, p in named_parameters:
        mean[k] = p.detach().clone()
        std[k] = fraction * mean[k].float().square().mean().sqrt()
    return GaussianPosterior(mean, std, 1)


# --------------------------------------------------------------------------------------
# BEYOND THE PAPER, ours, and the default: stability in function space, F, beside B; and
# a floor under -A. (The paper names function space as future work.)
#
# (a) theta* = mu* is the model as it was. Put the mean DDPM loss over D in place of
#     -log p(D | theta) / N, and A, as a mean over D_f, in that of -log p(D_f | theta) /
#     N_f. Then
#         -log p(D_r | theta) = N [ F(theta) - rho A(theta) ] + const,    rho = N_f / N,
#         F = E_D || delta ||^2,    delta = eps_theta(x_t, t) - eps_theta*(x_t, t),
#     if eps_theta* is the conditional mean of eps, the minimum of a squared loss, since
#     then E_D || eps - eps_theta ||^2 = E_D || eps - eps_theta* ||^2 + F.
#     To second order F = (theta - theta*)^T G (theta - theta*), G = E[J^T J] with J the
#     Jacobian of eps_theta: F sees directions that parameters share, where B measures
#     each alone.
#
# (b) F is a mean over D = D_r u D_f: F = (1-rho) F_r + rho F_f. What belongs to D_f is
#         F_f - A = E_D_f [ || delta ||^2 - || delta + eps_theta* - eps ||^2 ]
#                 = -2 E_D_f [ delta . (eps_theta* - eps) ] + const,
#     so that
#         F - rho A = (1-rho) F_r - 2 rho E_D_f [ delta . (eps_theta* - eps) ] + const:
#     D_f pushes, at a constant force, and what stays pulls back. Samples of theta* that
#     are not of D_f stand for D_r. Where D_r is rare, the pull is weak. An exact
#     eps_theta* would there be E[eps | x_t, D_f], and the push vanish; an inexact one
#     leaves a push without end. || delta ||^2 / K, added on D_f, is the floor under -A:
#         (1/K) || delta - K (eps_theta* - eps) ||^2
#             = || delta ||^2 / K - 2 delta . (eps_theta* - eps) + const.
#     So two regressions do it: what stays is held at eps_theta*, with the weight 1-rho;
#     D_f is pulled towards eps_target = eps_theta* + K (eps_theta* - eps), with rho/K.
#     A weight for each t, the same in both, moves no minimum of a function that is free
#     at each t; for a network it says which t matter. It is 1/abar_t: errors count as
#     those of the velocity (see UNet). At high noise, where it is decided what an image
#     will show, errors of eps itself are tiny.
#
#     The minimum at one x_t, where a share w(x_t) of the data is of D_f and eps_f is
#     E[eps | x_t, D_f]:
#         eps_theta* + w / (1 - w + w/K) (eps_theta* - eps_f).
#     For K = infinity that is E[eps | x_t, D_r], what a network retrained without D_f
#     predicts, since eps_theta* = w eps_f + (1-w) E[eps | x_t, D_r]. For a finite K the
#     step is small where x_t is plainly of D_f (1-w below 1/K), since eps_theta* -
#     eps_f is (1-w) (E[eps | x_t, D_r] - eps_f).
#
# (c) Which samples of theta* are of D_f, theta* can say: w(x_0) below, of clean images.
#     No label and no retained image is needed. A share 1-rho of them should stay; w is
#     unsure of those near the border, so a further share rho of these is left out, a
#     rule of thumb: (1-rho)^2 stays. (By Bayes' rule each would stay with the weight
#     1 - w. But what is held at eps_theta* by mistake holds D_f, too, and what is left
#     out by mistake is held by its neighbours.)

LEVELS = (0.2, 0.3)  # shares of T: so much noise hides detail, not yet what an image shows


class Likeness:
    """w(x_0), how surely an image is of D_f: a logistic regression in the features of
    theta*, from images of D_f and theta*'s own samples, of which a share rho is like
    them (learning from positive and unlabelled data, Elkan & Noto 2008).

    features: images (n, C, H, W) -> (n, d).  images: (N, C, H, W), of D_f.  own: (M, C,
    H, W).  Called with images it returns w, (n,), on the CPU.  `of_own`: w of `own`,
    (M,)."""

    def __init__(self, features, images, own, rho):
        self.features = features
        f_images = features(images)
        f_own = features(own)
        self.mean = f_own.mean(0)
        self.std = f_own.std(0) + 1e-6
        f_images = (f_images - self.mean) / self.std  # (N, d)
        f_own = (f_own - self.mean) / self.std  # (M, d)
        self.weight = torch.zeros(f_own.shape[1], requires_grad=True)
        self.bias = torch.tensor(math.log(rho / (1 - rho)), requires_grad=True)

        # p(x_0 | D_f) / p(x_0) is w / rho, by Bayes' rule. So of equal heaps of D_f and
        # of own samples (the means below make them equal) an image is of D_f's heap
        # with the odds w : rho.
        def log_odds(f):
            log_w = logsigmoid(f @ self.weight + self.bias)
            return log_w - math.log(rho)

        def cross_entropy():
            of_images = logsigmoid(log_odds(f_images)).mean()
            of_own = logsigmoid(-log_odds(f_own)).mean()
            penalty = 1e-3 * self.weight.square().sum()  # which keeps the weights small
            loss = penalty - of_images - of_own
            optimizer.zero_grad()
            loss.backward()
            return loss

        optimizer = torch.optim.LBFGS([self.weight, self.bias], max_iter=200,
                                      line_search_fn="strong_wolfe")
        optimizer.step(cross_entropy)
        self.weight = self.weight.detach()

        # The mean of w over own samples is rho, as far as theta* draws D_f as often as
        # the data holds it. The bias is shifted until that is so, by bisection.
        scores = f_own @ self.weight
        low = -scores.max() - 30
        high = -scores.min() + 30
        for _ in range(60):
            self.bias = (low + high) / 2
            if (scores + self.bias).sigmoid().mean() < rho:
                low = self.bias
            else:
                high = self.bias
        self.of_own = (scores + self.bias).sigmoid()

    def __call__(self, images):
        f = (self.features(images) - self.mean) / self.std
        return (f @ self.weight + self.bias).sigmoid()


@dataclass
class FunctionSpaceObjective(PaperObjective):
    """L = (1 - gamma) [ rho/K E_D_f || eps_theta - eps_target ||^2 / abar_t
          + (1 - rho) E_kept || eps_theta - eps_theta* ||^2 / abar_t ] + gamma (d/P) B.

    Plasticity (-A, with a floor), stability in function space, and in parameters (B).
    frozen: eps_theta*, called as unet is.  kept: (M, C, H, W), theta*'s samples that
    are not of D_f.  kept_context: (M, L, E), their encoded prompts, where the network
    takes any.  rho: the share of D_f in the training data, or more, to push harder.
    The means over t are in one density on t_range (see ratio); elsewhere D_f has no
    part. Others: PaperObjective's."""

    _: KW_ONLY  # the fields below are given by name
    frozen: Callable
    kept: torch.Tensor
    rho: float
    kept_context: torch.Tensor = None

    K = 20.0  # how far past eps_theta* the push may lead, in multiples of eps_theta* - eps
    LEAST = 0.003  # abar_t counts as no less: near t = T it is almost 0

    def __post_init__(self):
        super().__post_init__()
        self.weight_of_forget = self.rho / self.K

        # Half of the kept images' t, and more, are of t_range (see draw_kept). There
        # they are `ratio` times as dense in t as those of D_f. The error of D_f is
        # multiplied by it: so both count as in (b), at each t of t_range.
        near = self.batch_size // 2 / self.batch_size
        self.ratio = near + (1 - near) * (self.high - self.low) / self.diffusion.T

    def draw_kept(self):
        """Kept images, their t, noise and prompts: as `draw` for D_f."""
        n = self.batch_size
        device = self.kept.device
        index = random_indices(n, self.kept)
        kept = self.kept[index]
        prompts = ()
        if self.kept_context is not None:
            prompts = (self.kept_context[index],)
        # They are needed at all t, and most where D_f pushes: half of the t are there.
        t_near = stratified_timesteps(n // 2, self.low, self.high, device)
        t_all = stratified_timesteps(n - n // 2, 0, self.diffusion.T, device)
        t = torch.cat([t_near, t_all])
        return kept, t, torch.randn_like(kept), prompts

    def __call__(self, unet):
        # D_f, then what is kept, in one batch: (2n, C, H, W)
        n = self.batch_size
        x0, t, eps, prompts = self.draw()
        kept, t_kept, eps_kept, kept_prompts = self.draw_kept()
        x0 = torch.cat([x0, kept])
        t = torch.cat([t, t_kept])
        eps = torch.cat([eps, eps_kept])
        prompts = [torch.cat(both) for both in zip(prompts, kept_prompts)]

        xt = self.diffusion.q_sample(x0, t, eps)
        with autocast(x0.device):
            with torch.no_grad():
                eps_star = self.frozen(xt, t, *prompts).float()
                eps_target = self.eps_target(xt[:n], t[:n], eps[:n], eps_star[:n])
            eps_theta = unet(xt, t, *prompts)

        # (b): D_f goes to eps_target, what is kept to eps_theta*.
        target = torch.cat([eps_target, eps_star[n:]])
        error = (eps_theta - target).square().flatten(1).sum(1)  # (2n,)
        abar = self.diffusion.alpha_bar[t].clamp(min=self.LEAST)
        error = error / abar  # of the velocity
        push = self.ratio * self.weight_of_forget * error[:n].mean()
        hold = (1 - self.rho) * error[n:].mean()
        B = self.stability(unet)
        L = (1 - self.gamma) * (push + hold) + self.gamma * self.unit * B

        # What is shown is of eps, per dimension; B per parameter.
        A = (eps_theta - eps)[:n].square().mean()
        F = (eps_theta - eps_star)[n:].square().mean()
        shown = {"A": A, "F": F, "B": B / self.P}
        return L, {name: value.item() for name, value in shown.items()}

    def eps_target(self, xt, t, eps, eps_star):
        """eps_theta* + K (eps_theta* - eps): where images of D_f are pulled to."""
        return eps_star + self.K * (eps_star - eps)


def frozen_network(unet, posterior):
    """eps_theta*: the network with mu* in place of what moves. For no_grad alone."""
    return lambda *args, **kwargs: functional_call(unet, posterior.mean, args, kwargs)


def middle_features(net, frozen, *prompts):
    """The features in which w is learned, as a function (x_t, t) -> (n, d): the output
    of the middle block, pooled to 2x2, where the network returns it; of any other
    network its prediction, pooled to 8x8. prompts: what it takes beside x_t and t, for
    one image."""
    has_middle = "return_middle" in inspect.signature(net.forward).parameters

    def features(xt, t):
        expanded = [p.expand(len(xt), *p.shape[1:]) for p in prompts]
        if has_middle:
            h = frozen(xt, t, *expanded, return_middle=True)  # (n, C', h, w)
            return adaptive_avg_pool2d(h, 2).flatten(1)
        return adaptive_avg_pool2d(frozen(xt, t, *expanded), 8).flatten(1)

    return features


def features_of_clean(features, diffusion):
    """Features of noisy images as a function of clean ones: (n, C, H, W) -> (n, d), on
    the CPU, of noisy copies at the levels LEVELS. The same noise at each call."""
    @torch.no_grad()
    def of_clean(images):
        generator = torch.Generator().manual_seed(0)
        chunks = []
        size = min(250, 2**20 // images[0].numel())  # images at once: a million numbers
        for x0 in tqdm(images.split(max(1, size)), "features"):
            levels = []
            for level in LEVELS:
                t, eps = noise_at(int(level * diffusion.T), x0, generator)
                xt = diffusion.q_sample(x0, t, eps)
                with autocast(x0.device):
                    levels.append(features(xt, t).float().cpu())
            chunks.append(torch.cat(levels, dim=1))
        return torch.cat(chunks)

    return of_clean


# --------------------------------------------------------------------------------------
# Putting it together. OURS was chosen on the 4 of MNIST shrunk to 14x14 pixels, by the
# distance to a model retrained without it; PAPER on the 1 of MNIST as it is.

CHECK_SAMPLES = 300  # that the self-check draws: 1% of them is 3
EXAMPLES = 1000      # images of D_f from which w is learned, at most
OURS = dict(
    gamma=3e-5,         # a little of B: as near to retraining as with none
    lr=1.0,             # of Adam, in sigma*; it falls to 0
    steps=180,          # with all else it takes a sixth of the time of the training
    batch_size=64,      # of D_f, and as many of theta*'s samples
    t_range=[0.3, 1.0],  # at high noise it is decided which class an image will be
    anchors=1000,       # samples of theta*: they stand for the data that nobody has
    adam=True, accumulate=1)
PAPER = dict(
    gamma=0.63,         # found on the digit 1: less takes its neighbours along
    lr=0.0083,          # of SGD in z
    steps=30,           # A has no ceiling: after 50 the digits are gone, and all else, too
    batch_size=256,     # one gradient of less noise, since few steps are taken
    t_range=[0.7, 1.0],  # the paper: 0, 1
    anchors=300,        # for the self-check alone
    adam=False, accumulate=1)


def forget(net, diffusion, posterior, images, rho, share=None, features=None, paper=False,
           bound_weights=False, seed=0, **settings):
    """Make `net` forget `images`, in place: all that main does between two files.

    net: an nn.Module, called as net(x_t, t).  diffusion, posterior: its own.  images:
    (N, C, H, W) in [-1, 1], of D_f.  rho: D_f's share of the training data.  share: in
    the push alone, another rho.  features: (x_t, t) -> (n, d), in which w is learned;
    middle_features unless given.  settings: any of OURS, or with paper=True of PAPER.
    Returns (record, before, after): what `unlearn` returns, with the share of samples
    like D_f before and after; and samples of the same noise, (n, C, H, W).
    Raises TypeError for another setting, UserError as `unlearn` does, and for a rho
    that is not between 0 and 1."""
    if not 0 < rho < 1:
        raise UserError(f"what is to be forgotten is {100 * rho:g}% of what the model was trained "
                        "on: it must be more than 0% and less than 100%")
    if not set(settings) <= set(OURS):
        raise TypeError(f"the settings are {list(OURS)}, not {list(settings)}")
    settings = {**(PAPER if paper else OURS), **settings}
    arguments = (diffusion, posterior, images, settings["gamma"], settings["batch_size"],
                 settings["t_range"])
    # made now, so that a wrong t_range ends it before any drawing; paper alone keeps it
    objective = PaperObjective(*arguments, bound_weights=bound_weights)
    net.load_state_dict(posterior.mean, strict=False)  # theta* = mu*; it holds no buffers

    # What theta* itself draws stands for the data, less what is of D_f.
    def draw(n):
        samples = diffusion.sample(net, n, images.shape[1:], 25, 1.0, seed, series="own samples")
        return samples.to(images.device)

    own = draw(settings["anchors"])
    frozen = frozen_network(net, posterior)
    if features is None:
        features = middle_features(net, frozen)
    of_clean = features_of_clean(features, diffusion)
    likeness = Likeness(of_clean, images[:EXAMPLES], own, rho)
    n_kept = math.ceil((1 - rho) ** 2 * len(own))
    least_like = likeness.of_own.argsort()[:n_kept]
    kept = own[least_like.to(own.device)]

    # The steps.
    if not paper:
        objective = FunctionSpaceObjective(*arguments, frozen=frozen, kept=kept,
                                           rho=share or rho)
    record = unlearn(net, posterior, objective, settings["lr"], settings["steps"],
                     settings["adam"], settings["accumulate"], seed)

    # The self-check: the same noise before and after; theta*'s features judge both.
    before = own[:CHECK_SAMPLES]
    after = draw(len(before))
    was_like = share_like(likeness.of_own[:CHECK_SAMPLES])
    record["like_D_f"] = [was_like, share_like(likeness(after))]
    return record, before, after


def share_like(w):
    """The share of images that w, (n,), says are of D_f."""
    return (w > 0.5).float().mean().item()


def print_outcome(record, args):
    """What came of it, in words, and what to try next."""
    A = record["after"]["A"]
    first, last = record["like_D_f"]
    print(f"done after {record['steps']} steps: A from {record['before']['A']:.4f} to {A:.4f}, "
          f"theta by {record['moved_rms_sigma']:.4f} sigma (rms), samples like D_f from "
          f"{first:.1%} to {last:.1%}")
    if A > 1:  # what a broken network draws does not look like D_f either
        print(f"it is broken (A of a network that always says 0 is 1, here {A:.3g}): try a larger "
              "--gamma, or a smaller --lr")
    elif first == last == 0:
        print("nothing like D_f was seen before or after: look at the picture")
    elif first >= 0.01 and last > 0.2 * first:
        also = "more --steps, or a larger --share, which pushes harder"
        if args.gamma == 1:
            also = "a smaller --gamma: 1 is B alone, which moves nothing"
        elif args.paper:
            also = "more --steps, or leave --paper away"
        print(f"It is still there: try {also}")


# --------------------------------------------------------------------------------------
# The command line

DEFAULT_CHECKPOINT = "checkpoints/mnist.pt"


def with_defaults(args, ours, paper):
    """The flags, in place: those that were left away (None) as the chosen loss has
    them. --bound-weights implies --paper. Raises UserError for a flag in which the loss
    has no part."""
    args.paper = args.paper or args.bound_weights
    if args.share and args.paper:
        raise UserError("--share has no part in --paper's loss: there --steps push harder")
    set_missing(vars(args), paper if args.paper else ours)
    return args


def main(args):
    """Run the command line. Raises UserError for what the user can put right."""
    args = with_defaults(args, OURS, PAPER)
    device = pick_device(args.device)
    path, checkpoint = choose_checkpoint(args, device)
    indices = class_indices(args.forget_class or [], checkpoint.data["classes"])
    classes = [checkpoint.data["classes"][i] for i in indices]
    output, picture = choose_output(args, path, checkpoint, classes)

    # What is given: the posterior, and images of D_f.
    posterior, origin = choose_posterior(args, checkpoint, device)
    images, rho = load_forget_images(args, checkpoint, indices)
    images = images.to(device)
    print(f"forgetting {args.forget_images or ', '.join(classes)}, from images {len(images):,}: "
          f"rho {args.share or rho:.3g}, {args.steps} steps of {args.batch_size} on {device}; "
          f"{origin}")
    if args.paper:
        same = gamma_paper(args.gamma, checkpoint, images)
        print(f"gamma {args.gamma:g} here is gamma = {same:.8g} in the paper's sum over N_f images "
              "and T steps, with --t-range 0 1")

    # Unlearn.
    unet = checkpoint.unet
    parent = digest(unet.state_dict().values())
    settings = {name: getattr(args, name) for name in OURS}
    try:
        record, before, after = forget(
            unet, checkpoint.diffusion, posterior, images, rho, share=args.share, paper=args.paper,
            bound_weights=args.bound_weights, seed=args.seed, **settings)
    except KeyboardInterrupt:
        print("\ninterrupted: nothing was written")
        raise
    print_outcome(record, args)

    # What was done, and how, goes into the file.
    record.update(
        classes=classes,
        rho=rho,
        checkpoint=os.path.abspath(path),
        parent=parent,
        settings=vars(args))
    write_result(output, checkpoint, record, args.overwrite)
    blocks = [to_uint8(samples[:64].cpu()) for samples in (before, after)]
    write_images(picture, blocks, args.overwrite)

    print(f"wrote {output}, and {picture}: before on the left, after on the right")
    if classes:
        print(f"measure it: python evaluate.py --after {shlex.quote(output)} (--data-root as here)")


def gamma_paper(gamma, checkpoint, images):
    """The gamma of the paper's own L, which sums over the N_f images and T steps: from
    gamma_paper / (1 - gamma_paper) = N_f T (d/P) gamma / (1 - gamma), see (5)."""
    P = sum(p.numel() for p in checkpoint.unet.parameters())
    weight = images.numel() * checkpoint.diffusion.T / P * gamma  # numel is N_f d
    return weight / (weight + 1 - gamma)


def choose_checkpoint(args, device):
    """(path, Checkpoint): the one that is named, or the one that ships with the code.
    Raises UserError for one that has forgotten already."""
    path = args.checkpoint
    if path == DEFAULT_CHECKPOINT and not os.path.exists(path):
        print(f"no {path}: taking the model of MNIST that ships with the code")
        path = str(SHIPPED)
    checkpoint = load_checkpoint(path, device)
    if checkpoint.forgotten:
        raise UserError(f"{path} has already forgotten something: go back to "
                        f"{checkpoint.forgotten['checkpoint']} and forget all at once")
    return path, checkpoint


def choose_output(args, path, checkpoint, classes):
    """Where the result and its picture go. Raises UserError for what may not be
    replaced."""
    place = Path(path)
    if checkpoint.data["source"] == "published weights" or place == SHIPPED:
        place = Path("checkpoints") / f"{place.stem}.pt"  # the result is a checkpoint of ours
    what = "-".join(classes) or Path(args.forget_images).resolve().name
    what = re.sub(r"[^\w .-]", "_", what)[:60]  # never a path, nor longer than a name may be
    output = args.output or str(place.with_name(f"{place.stem}-forget-{what}{place.suffix}"))
    if os.path.realpath(output) == os.path.realpath(path):
        raise UserError("--output is the --checkpoint itself, and evaluate.py needs both")
    picture = str(Path(output).with_suffix(".png"))
    check_output(output, args.overwrite, WEIGHTS)
    check_output(picture, args.overwrite)
    folder = Path(output).with_suffix("")
    if "diffusers" in checkpoint.raw and folder.exists():
        # also with --overwrite: diffusers may read another file in it first
        raise UserError(f"{folder} exists, where the folder for diffusers would go: choose "
                        "another --output, or remove it")
    return output, picture


def write_result(output, checkpoint, record, overwrite):
    """Write the network that forgot, as a checkpoint; and, if the one from before came
    from diffusers, a folder in its layout."""
    # The posterior stays behind: mu* is the model that knew what was to be forgotten.
    contents = dict(checkpoint.raw)
    contents.update(weights=checkpoint.unet.state_dict(), forgotten=record)
    for key in ("posterior", "train"):
        contents.pop(key, None)
    save_checkpoint(output, contents, overwrite)
    if "diffusers" in checkpoint.raw:
        folder = Path(output).with_suffix("")
        tensors = to_diffusers(checkpoint.unet, checkpoint.config["unet"]["num_res_blocks"])
        save_checkpoint(folder / "diffusion_pytorch_model.bin", tensors)
        for name, text in checkpoint.raw["diffusers"].items():
            (folder / name).write_text(text, "utf-8")
        print(f"wrote {folder}, a folder for UNet2DModel.from_pretrained")


def choose_posterior(args, checkpoint, device):
    """(the posterior, its origin in words): given, kept with the model, or guessed.
    Raises UserError for files that are no samples of p(theta | D), or of others."""
    def weights_at_one_moment(file):
        moment = load_checkpoint(file)
        if "train" in moment.raw:  # that step's weights, not their mean so far
            return moment.raw["train"]["unet"]
        other = str(moment.config) != str(checkpoint.config)
        if moment.posterior or moment.forgotten or other:
            raise UserError(f"{file} is no sample of p(theta | D), but a mean of such, unlearned, "
                            "or another's: give copies made in the course of one training")
        return moment.unet.state_dict()

    if args.posterior:
        posterior = GaussianPosterior.from_checkpoints(args.posterior, checkpoint.unet,
                                                       weights_at_one_moment)
    elif checkpoint.posterior:
        posterior = GaussianPosterior(**checkpoint.posterior)
    else:
        return guessed_posterior(checkpoint.unet.named_parameters()), (
            "sigma* is guessed, 2% of the scale (--posterior or a finished training has it)")
    return posterior.to(device), f"posterior of {posterior.n} checkpoints"


def load_forget_images(args, checkpoint, indices):
    """D_f as (N, C, H, W) in [-1, 1], and rho, its share of the training set: counted;
    with --forget-images it is --share, or 0.1. Other classes' files stay shut."""
    data = checkpoint.data
    if args.forget_images is not None:
        images = load_images(args.forget_images, checkpoint.config["image_shape"])
        rho = args.share or 0.1
    else:
        images, _ = load_data_of(checkpoint, args.data_root, only=indices)
        n = len(images)
        if "counts" in data:  # when it was trained; some may be gone
            n = sum(data["counts"][i] for i in indices)
        rho = n / data["images"]

    # In random order, so that the first few are of every class.
    generator = torch.Generator().manual_seed(args.seed)
    order = torch.randperm(len(images), generator=generator)
    return to_float(images[order[: args.forget_samples]]), rho


def add_unlearning_flags(p, ours, paper, share):
    """The flags that vdu.py and sd_unlearn.py share; with their dicts of defaults, and
    what --share is by default, in words."""
    add = p.add_argument
    said = {k: f"(default: {ours[k]}, {paper[k]} with --paper)" for k in paper}
    add("--paper", action="store_true", help="the paper's two terms alone, A and B")
    add("--bound-weights", action="store_true", help="--paper with the bound's C_t")
    add("--gamma", type=number(float, 0, 1), help=f"weight of B {said['gamma']}")
    add("--lr", type=number(float, 1e-12), help=f"step size in z {said['lr']}")
    add("--steps", type=positive, help=said["steps"])
    add("--batch-size", type=positive, help=f"images a step {said['batch_size']}")
    add("--t-range", type=number(float, 0, 1), nargs=2, metavar=("LOW", "HIGH"),
        help=f"shares of T between which A draws t; the paper: 0 1 {said['t_range']}")
    add("--anchors", type=number(int, 10), help=f"own samples {said['anchors']}")
    add("--share", type=number(float, 1e-6, 1 - 1e-6),
        help=f"rho of the push: more pushes harder (default: {share})")
    add("--posterior", nargs="+", help="mu*, sigma* from these files of one training")


def parser():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--forget-class", nargs="+", help="by name; -a as --forget-class=-a")
    what.add_argument("--forget-images", metavar="DIR", help="what these images show; no labels")
    add("--checkpoint", default=DEFAULT_CHECKPOINT, help="default: checkpoints/mnist.pt")
    add("--output", help="default: CHECKPOINT-forget-CLASS.pt")
    add("--forget-samples", type=positive, help="images of it, at most (default: all)")
    add("--data-root", help="folder of the dataset (default: as in training)")
    add_unlearning_flags(p, OURS, PAPER, "counted; 0.1 for --forget-images")
    add_shared_flags(p)
    return p


if __name__ == "__main__":
    run_command_line(main, parser())
