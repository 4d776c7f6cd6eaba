"""Variational Diffusion Unlearning: make a DDPM forget, from a few images of it.

    python vdu.py --forget-class 1
    python vdu.py --checkpoint anyone.ckpt --forget-images my_images

Holds    the derivation, the losses, the objective, the loop; below a rule what goes
         beyond the paper; last the command line. The posterior is in train_ddpm.py.
Reads    a checkpoint of train_ddpm.py (or, where there is none, the model of MNIST that
         ships with the code), or DDPM weights of others; images of what will be
         forgotten, of a class or in a folder. No retained image is used.
Writes   a checkpoint, checkpoints/mnist-forget-1.pt, that remembers what it forgot, and
         a picture beside it: samples of the same noise before and after.
Paper    VDU (arXiv 2510.04058), its method: the two terms, posterior, objective.
"""

import argparse
import math
import os
import shlex
import time
from pathlib import Path

import torch
from torch.func import functional_call
from torch.nn.functional import adaptive_avg_pool2d, logsigmoid
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from ddpm import (UserError, add_shared_flags, autocast, check_outputs, digest, load_checkpoint,
                  number, pick_device, run_command_line, save_checkpoint, stratified_timesteps,
                  write_atomically)
from train_ddpm import (SHIPPED, GaussianPosterior, check_parameters, class_indices, load_data_of,
                        load_images, to_float)

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
#     is DDPM's training loss and the default; --bound-weights takes the bound's.)
#     This is the method's one leap: A with C_t, plus constants, is an UPPER bound on
#     -log p(D_f | theta), and to raise an upper bound guarantees nothing about what it
#     bounds. (With C_t = 1 it is no bound at all.) So evaluate.py
#     measures the likelihood, too. A has a floor, 0, and no ceiling: without B nothing
#     holds L; with B a local minimum near mu* is sought.
#
# (5) Their sum, with a factor to balance them:
#         L(theta) = -(1 - gamma) A + gamma B.
#     (A sums over D_f and t. The code takes the mean over images and over t in t_range,
#     1/(N_f T) of that sum where t_range is all of 0 .. 1.)
#
# The unit in which gamma is measured: A per dimension of an image, B per parameter.
# With d dimensions and P parameters B is brought to A's size by d/P, so that one gamma
# means about the same for any image size and network. It is the paper's loss with
# another name for the same balance (N_f T: from a mean over D_f and t to the sum, with
# t_range 0 .. 1):
#         gamma_paper / (1 - gamma_paper) = N_f T (d/P) gamma / (1 - gamma).
#
# What the minimum looks like: near mu*, A ~ A(mu*) + (theta - mu*) . grad A, and L is
# least at theta_i - mu*_i = (1 - gamma)/gamma (P/d) sigma*_i^2 dA/dtheta_i: there each
# parameter has moved in proportion to its variance sigma*_i^2, and loosely determined
# ones do the forgetting. (SGD in z, with --paper, takes this way from its first step;
# Adam in z does not, see `unlearn`.)

def plasticity_loss(unet, diffusion, x0, t, eps, C_t=1.0):
    """A of each image: C_t || eps - eps_theta(sqrt(abar_t) x_0 + sqrt(1-abar_t) eps, t)
    ||^2.  x0, eps: (n, C, H, W), images of D_f and unit noise.  t, C_t: (n,).  Returns
    (n,), the sum over the d dimensions (VDU, plasticity inducer)."""
    return C_t * diffusion.simple_loss(unet, x0, t, eps) * x0[0].numel()


def stability_loss(theta, posterior):
    """B = sum_i (theta_i - mu*_i)^2 / (2 sigma*_i^2): the KL of (3), less constants.
    theta: {name: parameter}.  Returns a scalar (VDU, stability regularizer)."""
    return sum(((p - posterior.mean[k]) / posterior.std[k]).square().sum()
               for k, p in theta.items()) / 2


def vdu_loss(A, B, gamma):
    """L = -(1 - gamma) A + gamma B (VDU, objective).
    A, B: scalars.  gamma: 0 is naive gradient ascent, 1 stays at the posterior's mean.
    """
    return -(1 - gamma) * A + gamma * B


class PaperObjective:
    """L on a random batch of D_f. Called with the network, it returns (L, {"A", "B"}).

    diffusion: Diffusion.  posterior: GaussianPosterior of the parameters that move.
    forget: (N, C, H, W) in [-1, 1] (or latents), images of D_f.  gamma: 0 .. 1.
    batch_size: images per call.  t_range: shares of T between which t is drawn.
    bound_weights: C_t of the bound in place of 1.  context: (M, L, E) encoded prompts,
    one drawn for each image, where the network takes any.  The attribute `unit`, d/P,
    is what `unlearn` measures L in.  A is shown per dimension and without C_t, B per
    parameter.  Raises UserError for an empty t_range."""

    def __init__(self, diffusion, posterior, forget, gamma, batch_size=64, t_range=(0, 1),
                 context=None, bound_weights=False):
        self.diffusion, self.posterior, self.forget = diffusion, posterior, forget
        self.gamma, self.batch_size, self.context = gamma, batch_size, context
        self.low, self.high = (round(share * diffusion.T) for share in t_range)
        if self.low >= self.high:
            raise UserError("--t-range needs two shares of T, 0 <= LOW < HIGH <= 1")
        self.d, self.P = forget[0].numel(), sum(m.numel() for m in posterior.mean.values())
        self.unit, C_t = self.d / self.P, diffusion.bound_weight(torch.arange(diffusion.T))
        self.C_t = C_t if bound_weights else torch.ones_like(C_t)

    def draw(self):
        """x_0 (n, C, H, W) of D_f, t (n,), eps like x_0, and prompts, () for none."""
        device, n, prompts = self.forget.device, self.batch_size, ()
        x0 = self.forget[torch.randint(len(self.forget), (n,)).to(device)]
        if self.context is not None:
            prompts = (self.context[torch.randint(len(self.context), (n,)).to(device)],)
        t = stratified_timesteps(n, self.low, self.high, device)
        return x0, t, torch.randn_like(x0), prompts

    def __call__(self, unet):
        x0, t, eps, prompts = self.draw()
        eps_theta = lambda xt, t: unet(xt, t, *prompts)
        A = plasticity_loss(eps_theta, self.diffusion, x0, t, eps, self.C_t[t])  # (n,)
        B = self.stability(unet)
        L = vdu_loss(A.mean(), self.unit * B, self.gamma)
        return L, {"A": (A / self.C_t[t]).mean().item() / self.d, "B": B.item() / self.P}

    def stability(self, unet):
        """B of those parameters that move."""
        theta = {k: p for k, p in unet.named_parameters() if p.requires_grad}
        return stability_loss(theta, self.posterior)


def unlearn(net, posterior, objective, lr, steps, adam=False, accumulate=1, seed=0,
            progress=False):
    """Move `net`, in place, from mu* towards a minimum of the objective.

    net: any nn.Module; those parameters move that require a gradient, and the posterior
    must be of the same.  objective: called with net, returns (loss, dict of numbers to
    show); its `unit`, 1 where it has none, divides the loss.  lr: of the steps in z.
    adam: its steps in z in place of SGD's.  accumulate: batches per step.  Sets torch's
    global seed; train or eval mode is the caller's choice.  Returns {"steps", "before",
    "after": the objective's numbers, of one and the same batch, "moved_rms_sigma"}.
    Raises UserError if the posterior is of another network, or if loss or weights
    become infinite or nan; net is at mu* then."""
    # The steps are in whitened coordinates z = (theta - mu*) / sigma*, in which the
    # posterior is N(0, I) and B = |z|^2 / 2. A step of SGD in z moves theta_i by -lr
    # sigma*_i^2 dL/dtheta_i: what training pinned down hardly moves. (Adam makes all
    # steps of z alike, so that there each theta_i moves by its own sigma*_i.)
    theta = {k: p for k, p in net.named_parameters() if p.requires_grad}
    check_parameters("the posterior", posterior.mean, theta)
    z = {k: torch.zeros_like(p) for k, p in theta.items()}
    posterior.unwhiten(z, theta)
    if adam:
        optimizer = torch.optim.Adam(z.values(), lr, betas=(0.9, 0.99))
    else:
        optimizer = torch.optim.SGD(z.values(), lr, momentum=0.9)
    unit = getattr(objective, "unit", 1.0)  # d/P: B's own pull in z is then gamma z

    def measure():
        torch.manual_seed(seed)
        with torch.no_grad():
            return objective(net)[1]

    before = measure()
    broken = None
    with tqdm(range(steps), desc="unlearning", unit="step", disable=not progress) as bar:
        for step in bar:
            if adam:  # whose steps do not shrink by themselves
                optimizer.param_groups[0]["lr"] = lr * (1 - step / steps) ** 2
            for _ in range(accumulate):
                loss, numbers = objective(net)
                if not math.isfinite(loss.item()):
                    broken = f"the loss became {loss.item()} at step {step + 1}"
                    break
                (loss / accumulate).backward()
            if broken:
                break
            for k, p in theta.items():  # dL/dz = sigma* dL/dtheta, by the chain rule
                if p.grad is not None:
                    z[k].grad = p.grad.mul_(posterior.std[k]).div_(unit)
                p.grad = None
            optimizer.step()
            posterior.unwhiten(z, theta)
            bar.set_postfix({k: f"{v:.4g}" for k, v in numbers.items()}, refresh=False)

    squares = sum(v.square().sum().item() for v in z.values())
    moved = math.sqrt(squares / sum(v.numel() for v in z.values()))
    if broken or not math.isfinite(moved):
        posterior.unwhiten({k: torch.zeros_like(p) for k, p in theta.items()}, theta)
        raise UserError(f"{broken or 'the weights became infinite in the last step'}; nothing was "
                        f"written: try a larger --gamma or a smaller --lr than {lr:g}")
    return {"steps": steps, "before": before, "after": measure(), "moved_rms_sigma": moved}


# The paper's method ends here: what goes beyond it, then the command line, follow.
# ======================================================================================
# BEYOND THE PAPER, ours: a posterior where one checkpoint is all there is.

def guessed_posterior(named_parameters, share=0.02):
    """mu* = the weights, sigma* = `share` of each tensor's root mean square.

    A DEPARTURE from the paper, whose sigma* is measured. This one knows only the scale
    of each tensor, not which of its parameters training pinned down. (Measured on
    MNIST, the share is 0.015 for the median tensor, 0.006 to 0.07 for all that are
    matrices.) `n` is 1; std holds one number per tensor."""
    mean = {k: p.detach().clone() for k, p in named_parameters}
    std = {k: share * m.float().square().mean().sqrt() for k, m in mean.items()}
    return GaussianPosterior(mean, std, 1)


# --------------------------------------------------------------------------------------
# BEYOND THE PAPER, ours, and the default: stability in function space, F, beside B; and
# A with a floor. (The paper names function space as future work.)
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
#     are not of D_f stand for D_r. Where D_r has next to nothing, the push should die
#     out, too; but eps_theta* is not exact, and what is left of the push meets no pull
#     and has no end. || delta ||^2 / K, added on D_f, is the floor under -A:
#         (1/K) || delta - K (eps_theta* - eps) ||^2
#             = || delta ||^2 / K - 2 delta . (eps_theta* - eps) + const.
#     So two regressions do it: what stays is held at eps_theta*, with the weight 1-rho;
#     D_f is drawn towards eps_target = eps_theta* + K (eps_theta* - eps), with rho/K.
#     A weight for each t, the same in both, moves no minimum of a function that is free
#     at each t; for a network it says which t matter. It is 1/abar_t: errors count as
#     those of the velocity (see UNet). At high noise, where it is decided what an image
#     will show, eps itself hardly tells.
#
#     The minimum at one x_t, where a share w(x_t) of the data is of D_f and eps_f is
#     E[eps | x_t, D_f]:
#         eps_theta* + w / (1 - w + w/K) (eps_theta* - eps_f).
#     For K = infinity that is E[eps | x_t, D_r], what a network retrained without D_f
#     predicts, since eps_theta* = w eps_f + (1-w) E[eps | x_t, D_r]. For a finite one
#     it stays near eps_theta* where x_t is plainly of D_f (1-w below 1/K).
#
# (c) Which samples of theta* are of D_f, theta* can say: w(x_0) below, of clean images.
#     No label and no retained image is needed. A share 1-rho of them should stay; w is
#     unsure of those near the border, so a further share rho of these is left out, a
#     rule of thumb: (1-rho)^2 stays. (By Bayes' rule each would stay with the weight
#     1 - w. But what is held at eps_theta* by mistake holds D_f, too, and what is left
#     out by mistake is held by its neighbours.)

LEVELS = (0.2, 0.3)  # levels of noise, as shares of T, at which the features are taken


class Likeness:
    """w(x_0), how surely an image is of D_f: a logistic regression in the features of
    theta*, from images of D_f and theta*'s own samples, of which a share rho is like
    them (learning from positive and unlabelled data, Elkan & Noto 2008).

    features: images (n, C, H, W) -> (n, d).  forget: (N, C, H, W).  own: (M, C, H, W).
    Called with images it returns w, (n,), on the CPU.  `of_own`: w of `own`, (M,)."""

    def __init__(self, features, forget, own, rho, decay=1e-3):
        self.features = features
        x_forget = features(forget)
        x_own = features(own)
        self.mean = x_own.mean(0)
        self.std = x_own.std(0) + 1e-6
        x = torch.cat([x_forget, x_own]).sub(self.mean).div(self.std)  # (N + M, d)
        self.weight = torch.zeros(x.shape[1], requires_grad=True)
        self.bias = torch.tensor(math.log(rho / (1 - rho)), requires_grad=True)

        # p(x_0 | D_f) / p(x_0) is w / rho, by Bayes' rule. So of equal heaps of D_f and
        # of own samples (the means below make them equal) an image is of D_f's with the
        # odds w : rho.
        def cross_entropy():
            log_w = logsigmoid(x @ self.weight + self.bias)
            log_sum = torch.logaddexp(log_w, torch.tensor(math.log(rho)))
            of_forget = log_w[: len(x_forget)] - log_sum[: len(x_forget)]
            of_own = math.log(rho) - log_sum[len(x_forget) :]
            loss = decay * self.weight.square().sum() - of_forget.mean() - of_own.mean()
            optimizer.zero_grad()
            loss.backward()
            return loss

        optimizer = torch.optim.LBFGS([self.weight, self.bias], max_iter=200,
                                      line_search_fn="strong_wolfe")
        optimizer.step(cross_entropy)

        # The mean of w over own samples is rho, as far as theta* draws D_f as often as
        # the data holds it. The bias is shifted until that is so.
        with torch.no_grad():
            scores = x[len(x_forget) :] @ self.weight
            low, high = -scores.max() - 30, 30 - scores.min()
            for _ in range(60):
                middle = (low + high) / 2
                if (scores + middle).sigmoid().mean() < rho:
                    low = middle
                else:
                    high = middle
            self.bias = middle
            self.of_own = (scores + middle).sigmoid()

    @torch.no_grad()
    def __call__(self, images):
        x = (self.features(images) - self.mean) / self.std
        return (x @ self.weight + self.bias).sigmoid()


class FunctionSpaceObjective(PaperObjective):
    """L = (1 - gamma) [ rho/K E_D_f || eps_theta - eps_target ||^2 / abar_t
          + (1 - rho) E_kept || eps_theta - eps_theta* ||^2 / abar_t ] + gamma (d/P) B.

    Plasticity (-A, with a floor), stability in function space, and in parameters (B).
    frozen: eps_theta*, called as unet is.  kept: (M, C, H, W), theta*'s samples that
    are not of D_f.  kept_context: (M, L, E), their encoded prompts, where the network
    takes any.  rho: the share of D_f in the training data, or more, to push harder.
    Others: PaperObjective's."""

    K = 20.0  # how far past eps_theta* the push may lead, in multiples of eps_theta* - eps
    LEAST = 0.003  # abar_t counts as no less: near t = T it is 0

    def __init__(self, *args, frozen, kept, rho, kept_context=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.frozen = frozen
        self.kept = kept
        self.kept_context = kept_context
        self.rho = rho
        self.weight_of_forget = rho / self.K

    def draw_kept(self, n):
        """n of the kept images, and their prompts, () for none."""
        index = torch.randint(len(self.kept), (n,)).to(self.kept.device)
        if self.kept_context is None:
            return self.kept[index], ()
        return self.kept[index], (self.kept_context[index],)

    def __call__(self, unet):
        n = self.batch_size
        device = self.forget.device
        x0, t, eps, prompts = self.draw()
        kept, kept_prompts = self.draw_kept(n)

        # Kept images are needed at all t, and most where D_f pushes: half of their t
        # are of t_range. There they are `ratio` times as dense in t as those of D_f,
        # whose error is multiplied by it: so both count, at each t, as in (b).
        t_near = stratified_timesteps(n // 2, self.low, self.high, device)
        t_all = stratified_timesteps(n - n // 2, 0, self.diffusion.T, device)
        near = n // 2 / n
        ratio = near + (1 - near) * (self.high - self.low) / self.diffusion.T

        # D_f, then what is kept, in one batch: (2n, C, H, W)
        t = torch.cat([t, t_near, t_all])
        x0 = torch.cat([x0, kept])
        eps = torch.cat([eps, torch.randn_like(kept)])
        prompts = tuple(torch.cat(both) for both in zip(prompts, kept_prompts))
        xt = self.diffusion.q_sample(x0, t, eps)
        with autocast(device):
            with torch.no_grad():
                eps_star = self.frozen(xt, t, *prompts).float()
                eps_target = self.eps_target(xt[:n], t[:n], eps[:n], eps_star[:n])
            eps_theta = unet(xt, t, *prompts)

        # (b): D_f goes to eps_target, what is kept to eps_theta*.
        target = torch.cat([eps_target, eps_star[n:]])
        error = (eps_theta - target).square().flatten(1).sum(1)  # (2n,)
        error = error / self.diffusion.alpha_bar[t].clamp(min=self.LEAST)  # of the velocity
        fit = (ratio * self.weight_of_forget * error[:n].mean()
               + (1 - self.rho) * error[n:].mean())
        B = self.stability(unet)
        L = (1 - self.gamma) * fit + self.gamma * self.unit * B

        A = (eps_theta - eps)[:n].square().mean()
        F = (eps_theta - eps_star)[n:].square().mean()
        return L, {"A": A.item(), "F": F.item(), "B": B.item() / self.P}

    def eps_target(self, xt, t, eps, eps_star):
        """eps_theta* + K (eps_theta* - eps): where images of D_f are drawn to."""
        return eps_star + self.K * (eps_star - eps)


def frozen_network(unet, posterior):
    """eps_theta*: the network with mu* in place of what moves. For no_grad alone."""
    return lambda *args, **kwargs: functional_call(unet, posterior.mean, args, kwargs)


def middle_features(frozen, diffusion, prompts=()):
    """Clean images (n, C, H, W) -> the middle block's features of their noisy copies at
    the levels LEVELS, pooled to 2x2: (n, d), on the CPU. The same noise at each call.
    prompts: what the network takes beside images and t, for one image."""
    @torch.no_grad()
    def features(images):
        generator = torch.Generator().manual_seed(0)
        chunks = []
        for x0 in images.split(max(1, min(250, 2**20 // images[0].numel()))):
            levels = []
            for share in LEVELS:
                t = torch.full((len(x0),), int(share * diffusion.T), device=x0.device)
                eps = torch.randn(x0.shape, generator=generator).to(x0.device)
                expanded = [p.expand(len(x0), *p.shape[1:]) for p in prompts]
                with autocast(x0.device):
                    h = frozen(diffusion.q_sample(x0, t, eps), t, *expanded, return_middle=True)
                side = [min(2, n) for n in h.shape[2:]]
                levels.append(adaptive_avg_pool2d(h.float(), side).flatten(1).cpu())
            chunks.append(torch.cat(levels, dim=1))
        return torch.cat(chunks)

    return features


# --------------------------------------------------------------------------------------
# The command line. OURS was chosen on the 4 of MNIST shrunk to 14x14 pixels, by the
# distance to a model retrained without it; PAPER on the 1.

DEFAULT_CHECKPOINT = "checkpoints/mnist.pt"
CHECK_SAMPLES = 300  # that the self-check draws: 1% of them is 3
JUDGED = 1000        # images of D_f from which w is learned, at most
OURS = dict(
    gamma=3e-5,         # a little of B: the weights stay within the posterior
    lr=1.0,             # Adam's, in sigma*; it falls to 0
    steps=180,          # with all else it costs a fifth of train_ddpm.py's training
    batch_size=64,      # of D_f, and as many of theta*'s samples
    t_range=[0.3, 1.0],  # at high noise it is decided which class an image will be
    anchors=1000,       # samples of theta*: they stand for the data that nobody has
    adam=True, accumulate=1)
PAPER = dict(
    gamma=0.63,         # found on the digit 1: less takes its neighbours along
    lr=0.0083,          # SGD's, in sigma*
    steps=30,           # A has no ceiling: after 50 the digits are gone, and all else, too
    batch_size=256,     # one gradient of less noise, since few steps are taken
    t_range=[0.7, 1.0],  # the paper: 0, 1
    anchors=300,        # for the self-check alone
    adam=False, accumulate=1)


def with_defaults(args, ours, paper):
    """The flags, those that were left away (None) as the chosen loss has them; and the
    loss, printed. Raises UserError for a flag in which the loss has no part."""
    if args.bound_weights and not args.paper:
        raise UserError("--bound-weights belongs to --paper")
    settings = vars(args).copy()
    for name, value in (paper if args.paper else ours).items():
        if settings.get(name) is None:
            settings[name] = value
    if args.paper:
        loss = "L = -(1-{gamma:g}) A + {gamma:g} (d/P) B"
    else:
        loss = ("L = (1-{gamma:g}) [rho/K |eps_theta-eps_target|^2 + "
                "(1-rho) |eps_theta-eps_theta*|^2] / abar_t + {gamma:g} (d/P) B")
    if args.bound_weights:
        loss += ", A with the bound's C_t"
    print(loss.format(**settings))
    return argparse.Namespace(**settings)


def count_evaluations(net):
    """A dict whose "evaluations" grows with each image that passes `net`: by 1, or by 3
    with a gradient, as a backward pass costs two forward ones."""
    counter = {"evaluations": 0}

    def count(module, inputs):
        passes = 3 if torch.is_grad_enabled() else 1
        counter["evaluations"] += passes * len(inputs[0])

    net.register_forward_pre_hook(count)
    return counter


def main(args):
    """Run the command line. Raises UserError for what the user can put right."""
    args = with_defaults(args, OURS, PAPER)
    device = pick_device(args.device)
    path = args.checkpoint
    if path == DEFAULT_CHECKPOINT and not os.path.exists(path):
        print(f"no {path}: taking the model of MNIST that ships with the code")
        path = str(SHIPPED)
    checkpoint = load_checkpoint(path, device)
    unet, diffusion, data = checkpoint.unet, checkpoint.diffusion, checkpoint.data
    if checkpoint.forgotten:
        raise UserError(f"{path} has already forgotten something: go back to "
                        f"{checkpoint.forgotten['checkpoint']} and forget all at once")
    indices = class_indices(args.forget_class or [], data["classes"])
    classes = [data["classes"][i] for i in indices]
    if set(classes) & set(data["excluded"]):
        raise UserError(f"{path} was trained without {', '.join(classes)}: nothing to forget")
    if 0 < len(classes) == len(data["classes"]) - len(data["excluded"]):
        raise UserError("--forget-class names all classes: nothing would stay")
    output = choose_output(args, path, checkpoint, classes)
    picture = str(Path(output).with_suffix(".png"))
    check_outputs([picture], args.overwrite)

    # What is given: the posterior, and images of D_f.
    posterior, origin = choose_posterior(args, path, checkpoint, device)
    forget, counted = load_forget_images(args, checkpoint, indices)
    rho = args.share or counted  # that of --share weighs the push, and no more
    forget = forget.to(device)
    what = args.forget_images or ", ".join(classes)
    print(f"forgetting {what}, from images {len(forget):,}: rho {rho:.3g}, {args.steps} "
          f"steps of {args.batch_size} on {device}; {origin}")
    parent = digest(unet.state_dict().values())
    unet.load_state_dict(posterior.mean, strict=False)  # theta* = mu*; buffers never moved
    counter = count_evaluations(unet)

    # What theta* itself draws stands for the data, less what is of D_f.
    def draw(n, progress=False):
        shape = tuple(forget.shape[1:])
        return diffusion.sample(unet, n, shape, 25, eta=1.0, seed=args.seed, series="own samples",
                                progress=progress).to(device)

    own = draw(args.anchors, progress=True)
    frozen = frozen_network(unet, posterior)
    likeness = Likeness(middle_features(frozen, diffusion), forget[:JUDGED], own, counted)
    stays = likeness.of_own.argsort()[: math.ceil((1 - counted) ** 2 * len(own))]
    common = (diffusion, posterior, forget, args.gamma, args.batch_size, args.t_range)
    if args.paper:
        objective = PaperObjective(*common, bound_weights=args.bound_weights)
    else:
        objective = FunctionSpaceObjective(*common, frozen=frozen, kept=own[stays.to(device)],
                                           rho=rho)

    # Unlearn, and look at the same noise again.
    before = own[:CHECK_SAMPLES]
    record, after = run(args, unet, posterior, objective, likeness, before,
                        lambda: draw(len(before)))
    record |= {"classes": classes, "images_from": args.forget_images, "images": len(forget),
               "checkpoint": os.path.abspath(path), "settings": vars(args), "rho": counted,
               "parent": parent, **counter}

    # Without the posterior: mu* is the model that knew what was to be forgotten.
    contents = {k: v for k, v in checkpoint.raw.items() if k not in ("train", "posterior")}
    save_checkpoint(output, {**contents, "weights": unet.state_dict(), "forgotten": record})
    sides = [make_grid(x[:64].cpu() / 2 + 0.5, nrow=8, pad_value=1) for x in (before, after)]
    write_atomically(picture, lambda f: save_image(torch.cat(sides, dim=2), f, format="png"))
    print(f"cost: {cost_of(counter['evaluations'], checkpoint)}")
    print(f"wrote {output}, and {picture}: before on the left, after on the right")
    if classes:
        more = f" --data-root {shlex.quote(args.data_root)}" if args.data_root else ""
        print(f"measure it: python evaluate.py --after {shlex.quote(output)}{more}")


def cost_of(evaluations, checkpoint):
    """In words, beside what training took, where the checkpoint says that."""
    said = f"{evaluations:,} network evaluations of one image"
    settings = checkpoint.raw.get("settings")
    if settings is None:
        return said
    training = 3 * settings["steps"] * settings["batch_size"]  # forward, and backward
    return f"{said}, {100 * evaluations / training:.0f}% of training's {training:,}"


def run(args, net, posterior, objective, likeness, before, draw_again):
    """Unlearn as the flags say, and say what came of it, as the network itself judges.
    before: samples.  draw_again: a function, those of the same noise as the network is
    then.  Returns (record, samples after)."""
    began = time.time()
    try:
        record = unlearn(net, posterior, objective, args.lr, args.steps, args.adam,
                         args.accumulate, args.seed, progress=True)
        after = draw_again()
    except KeyboardInterrupt:
        print("\ninterrupted: nothing was written")
        raise
    first, last = ((likeness(x) > 0.5).float().mean().item() for x in (before, after))
    record["like_D_f"] = first, last
    A_before, A = record["before"]["A"], record["after"]["A"]
    print(f"done after {record['steps']} steps ({time.time() - began:.0f} s): A from "
          f"{A_before:.4f} to {A:.4f}, theta by {record['moved_rms_sigma']:.4f} sigma (rms), "
          f"samples like D_f from {100 * first:.1f}% to {100 * last:.1f}%")
    if A > 1:  # what a broken network draws does not look like D_f either
        also = ("was so before the first step" if A_before > 1 else
                "has lost more than D_f; try a larger --gamma, or a smaller --lr")
        print(f"it is broken (A of a network that always says 0 is 1, here {A:.3g}) and {also}")
    elif first >= 0.01 and last > 0.2 * first:
        also = "leave --paper away" if args.paper else "a larger --share, which pushes harder"
        print(f"It is still there: try more --steps, or {also}")
    return record, after


def choose_output(args, path, checkpoint, classes):
    """Where the result goes. Raises UserError if that may not be replaced."""
    place = Path(path)
    if checkpoint.data["source"].startswith("published") or place == SHIPPED:
        place = Path("checkpoints") / f"{place.stem}.pt"  # the result is a checkpoint of ours
    what = "-".join(classes) or os.path.basename(os.path.abspath(args.forget_images))
    # never a path, and no longer than a file's name may be
    what = "".join(c if c.isalnum() or c in " .-_" else "_" for c in what)[:60]
    output = args.output or str(place.with_name(f"{place.stem}-forget-{what}{place.suffix}"))
    if os.path.abspath(output) == os.path.abspath(path):
        raise UserError("--output is the --checkpoint itself, and evaluate.py needs both")
    check_outputs([output], args.overwrite, (".pt", ".pth", ".ckpt"))
    return output


def choose_posterior(args, path, checkpoint, device):
    """(the posterior given, kept or guessed, in words where it comes from).
    Raises UserError for files that are no samples of p(theta | D), or of others."""
    def snapshot(file):  # the weights at one moment of a training
        moment = load_checkpoint(file)
        same = all(moment.config[k] == checkpoint.config[k] for k in ("schedule", "velocity"))
        if moment.forgotten or not same:
            raise UserError(f"{file} is no sample of p(theta | D): it is unlearned, or another's")
        if moment.posterior and "train" not in moment.raw:
            raise UserError(f"{file} is the mean of a whole training: give copies made on the way")
        # that step's weights, not their mean so far
        return moment.raw.get("train", {"unet": moment.unet.state_dict()})["unet"]

    parameters = dict(checkpoint.unet.named_parameters())
    if args.posterior:
        posterior = GaussianPosterior.from_checkpoints(args.posterior, parameters, snapshot)
    elif checkpoint.posterior:
        posterior = GaussianPosterior(**checkpoint.posterior)
    elif "train" in checkpoint.raw:
        raise UserError(f"{path} holds no posterior yet: finish its training with python "
                        f"train_ddpm.py --resume --output {shlex.quote(path)}")
    else:
        return guessed_posterior(parameters.items()), (
            "sigma* is guessed, 2% of each tensor's scale (--posterior FILE FILE measures it)")
    return posterior.to(device), f"posterior of {posterior.n} checkpoints"


def load_forget_images(args, checkpoint, indices):
    """D_f as (N, C, H, W) in [-1, 1], and rho, its share of the training set: counted;
    of --forget-images --share, else 0.1. Other classes' files stay shut."""
    generator = torch.Generator().manual_seed(args.seed)
    shuffled = lambda x: x[torch.randperm(len(x), generator=generator)]
    if args.forget_images:
        images = shuffled(load_images(args.forget_images, checkpoint.config["image_shape"]))
        return to_float(images[: args.forget_samples]), args.share or 0.1
    (images, labels), data = load_data_of(checkpoint, args.data_root, only=indices), checkpoint.data
    n = sum(data["counts"][i] for i in indices) if "counts" in data else len(images)
    chosen = torch.cat([shuffled((labels == i).nonzero().flatten())[: args.forget_samples]
                        for i in indices])
    if len(indices) > 1:  # mixed, so that any part of them is one of all
        chosen = shuffled(chosen)
    return to_float(images[chosen]), n / data["images"]


def add_unlearning_flags(p, ours, paper):
    """The flags that vdu.py and sd_unlearn.py share; with their dicts of defaults."""
    said = {k: f"(default: {ours[k]}, {paper[k]} with --paper)" for k in paper}
    p.add_argument("--paper", action="store_true", help="the paper's two terms alone, A and B")
    p.add_argument("--bound-weights", action="store_true", help="--paper with the bound's C_t")
    p.add_argument("--gamma", type=number(float, 0, 1), help=f"weight of B {said['gamma']}")
    p.add_argument("--lr", type=number(float, 1e-12), help=f"step size in sigma* {said['lr']}")
    p.add_argument("--steps", type=number(int, 1), help=said["steps"])
    p.add_argument("--batch-size", type=number(int, 1), help=f"images a step {said['batch_size']}")
    p.add_argument("--t-range", type=number(float, 0, 1), nargs=2, metavar=("LOW", "HIGH"),
                   help=f"shares of T between which A draws t; the paper: 0 1 {said['t_range']}")
    p.add_argument("--anchors", type=number(int, 10), help=f"own samples {said['anchors']}")
    p.add_argument("--share", type=number(float, 1e-6, 1 - 1e-6),
                   help="rho, D_f's share of the data; more pushes harder (default: counted; "
                   "0.1 for --forget-images, 0.5 for Stable Diffusion)")
    p.add_argument("--posterior", nargs="+", help="mu*, sigma* from these files of one training")


def parser():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--forget-class", nargs="+", help="by name; -a as --forget-class=-a")
    what.add_argument("--forget-images", metavar="DIR", help="what these images show; no labels")
    p.add_argument("--checkpoint", default=DEFAULT_CHECKPOINT, help="default: checkpoints/mnist.pt")
    p.add_argument("--output", help="default: CHECKPOINT-forget-CLASS.pt")
    p.add_argument("--forget-samples", type=number(int, 1), help="images per class (default: all)")
    p.add_argument("--data-root", help="folder of the dataset (default: as in training)")
    add_unlearning_flags(p, OURS, PAPER)
    add_shared_flags(p)
    return p


if __name__ == "__main__":
    run_command_line(lambda: main(parser().parse_args()))
