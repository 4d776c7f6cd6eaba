"""Variational Diffusion Unlearning: make a DDPM forget, from a few images of it.

    python vdu.py --forget-class 1
    python vdu.py --checkpoint anyone.ckpt --forget-images my_images

Holds    the derivation, the losses, the objective, the loop; below a rule what goes
         beyond the paper; last the command line. The posterior is in train_ddpm.py.
Reads    a checkpoint of train_ddpm.py (or, where there is none, the model of MNIST that
         ships with the code), or DDPM weights of others; images of what will be
         forgotten, of a class or in a folder. No retained image is used.
Writes   a checkpoint, checkpoints/mnist-forget-1.pt, that remembers what it forgot.
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
from torch.nn.functional import adaptive_avg_pool2d
from tqdm import tqdm

from ddpm import (StopRequest, UserError, add_shared_flags, autocast, check_outputs, digest,
                  load_checkpoint, number, pick_device, run_command_line, save_checkpoint,
                  stratified_timesteps)
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
#     This is the method's one leap: A is an UPPER bound on -log p(D_f | theta), and to
#     raise an upper bound guarantees nothing about what it bounds. So evaluate.py
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
# another name for the same balance (N_f T: from a mean over D_f and t to the sum):
#         gamma_paper / (1 - gamma_paper) = N_f T (d/P) gamma / (1 - gamma).
#
# What the minimum looks like: near mu*, A ~ A(mu*) + (theta - mu*) . grad A, and L is
# least at theta_i - mu*_i = (1 - gamma)/gamma (P/d) sigma*_i^2 dA/dtheta_i: every
# parameter moves along the gradient by its own variance, so loosely determined ones do
# the forgetting.

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


def unlearn(net, posterior, objective, lr, steps, adam=False, accumulate=1, seed=0, check=None,
            progress=False):
    """Move `net`, in place, from mu* towards a minimum of the objective.

    net: any nn.Module; those parameters move that require a gradient, and the posterior
    must be of the same.  objective: called with net, returns (loss, dict of numbers to
    show); its `unit`, 1 where it has none, divides the loss.  lr: of the steps in z.
    adam: its steps in z in place of SGD's.  accumulate: batches per step. check: called
    after each step with its number, True ends the loop; its `text`, a dict, is shown.
    Sets torch's global seed; train or eval mode is the caller's choice. Returns
    {"steps", "first", "last": the numbers of these steps, "moved_rms_sigma"}. Raises
    UserError if the posterior is of another network, or if loss or weights become
    infinite or nan; net is at mu* then."""
    # The steps are in whitened coordinates z = (theta - mu*) / sigma*, in which the
    # posterior is N(0, I) and B = |z|^2 / 2: a pinned-down parameter hardly feels A.
    # (Adam on theta would move each by lr, whatever its sigma*.)
    theta = {k: p for k, p in net.named_parameters() if p.requires_grad}
    check_parameters("the posterior", posterior.mean, theta)
    torch.manual_seed(seed)
    z = {k: torch.zeros_like(p) for k, p in theta.items()}
    posterior.unwhiten(z, theta)
    optimizer = (torch.optim.Adam(z.values(), lr, betas=(0.9, 0.99)) if adam else
                 torch.optim.SGD(z.values(), lr, momentum=0.9))
    unit = getattr(objective, "unit", 1.0)  # d/P: B's own pull in z is then gamma z
    history, size, broken = [], math.sqrt(sum(v.numel() for v in z.values())), None
    with tqdm(range(steps), desc="unlearning", unit="step", disable=not progress) as bar:
        for step in bar:
            if adam:  # whose steps do not shrink by themselves
                optimizer.param_groups[0]["lr"] = lr * (1 - step / steps) ** 2
            batches = []
            for _ in range(accumulate):
                loss, numbers = objective(net)
                if not math.isfinite(loss.item()):
                    broken = f"the loss became {loss.item()} at step {step + 1}"
                    break
                (loss / accumulate).backward()
                batches.append(numbers)
            if broken:
                break
            for k, p in theta.items():  # dL/dz = sigma* dL/dtheta, by the chain rule
                if p.grad is not None:
                    z[k].grad = p.grad.mul_(posterior.std[k]).div_(unit)
                p.grad = None
            optimizer.step()
            posterior.unwhiten(z, theta)
            history.append({k: sum(b[k] for b in batches) / accumulate for k in numbers})
            done = check is not None and check(step + 1)
            bar.set_postfix({k: f"{v:.4g}" for k, v in history[-1].items()}
                            | getattr(check, "text", {}), refresh=False)
            if done:
                break
    moved = math.sqrt(sum(v.square().sum().item() for v in z.values())) / size
    if broken or not math.isfinite(moved):
        posterior.unwhiten({k: torch.zeros_like(p) for k, p in theta.items()}, theta)
        raise UserError(f"{broken or 'the weights became infinite in the last step'}; nothing was "
                        f"written: try a larger --gamma or a smaller --lr than {lr:g}")
    first, last = (history[0], history[-1]) if history else ({}, {})
    return {"steps": len(history), "first": first, "last": last, "moved_rms_sigma": moved}


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
# (a) theta* = mu* is the model as it was. With the mean DDPM loss over D in place of
#     -log p(D|theta) / N, and A, as a mean over D_f, of -log p(D_f|theta) / N_f,
#         -log p(D_r|theta) = N [ F(theta) - rho A(theta) ] + const,    rho = N_f / N,
#         F = E_D || eps_theta(x_t, t) - eps_theta*(x_t, t) ||^2,
#     for a squared loss whose minimiser eps_theta* is the conditional mean, so that
#         E_D || eps - eps_theta ||^2 = E_D || eps - eps_theta* ||^2 + F.
#     To second order F = (theta - theta*)^T G (theta - theta*), G = E[J^T J] with J the
#     Jacobian of eps_theta: F sees directions that parameters share, where B measures
#     each alone. (N F would be B with the full covariance if sigma* were the Laplace
#     posterior's; sigma* says how far training lets a weight wander.) Samples of theta*
#     stand for D.
#
# (b) At one x_t, where a share w of the data is D_f, the minimum of F - rho A is
#         eps_theta* + w/(1-w) (eps_theta* - eps_f) = E[eps | x_t, D_r],
#     with eps_f = E[eps | x_t, D_f]: it is what a network retrained without D_f says.
#     A regression has the same minimum where both kinds draw t alike, and a floor: own
#     samples of what stays, a share 1-w, go to eps_theta*, images of D_f, a share w, to
#         eps_target = eps_theta* + 1/(1-w) (eps_theta* - eps).
#     Its gradient on D_f at theta* is 2 (eps_theta* - eps_target), -1/(1-w) times that
#     of A, 2 (eps_theta* - eps): the push of -A, that ends by itself. In the code
#     1/(1-w) = 1 + odds is min(20, 1 + (1 + (kappa - 1) w) odds): the odds as they are
#     where x_t could be anything, kappa times where it is surely of D_f. kappa = 1 is
#     Bayes' rule; more gets there in fewer steps.
#
# (c) w comes from theta* itself: a logistic regression in its own features tells D_f
#     from samples of theta* that are not of D_f. No label and no retained image is
#     needed. An own sample x_0 stays, by Bayes' rule, with the probability 1 - w(x_0).

class Likeness:
    """w(x_t), how surely x_t is of D_f: a logistic regression per level of noise, in
    the middle block's pooled features, of images of D_f against other images.

    frozen: eps_theta*, called as unet is.  forget: (N, C, H, W).  others: (M, C, H, W),
    samples of theta* that stay.  rho: share of D_f among all.  prompts: what the
    network takes beside images and t, for one image.  levels: those of the 20 that are
    fitted.  images: noisy ones of each kind, per level."""

    LEVELS, OF_IMAGES = 20, (4, 6)  # clean images are judged at two of the levels

    def __init__(self, frozen, diffusion, forget, others, rho, prompts=(), levels=OF_IMAGES,
                 images=500):
        self.frozen, self.diffusion, self.rho, self.prompts = frozen, diffusion, rho, prompts
        self.row = {level: i for i, level in enumerate(levels)}
        images = min(images, 10 * min(len(forget), len(others)))  # at most 10 copies of each
        features = []
        for level in levels:
            t = torch.randint(level * diffusion.T // self.LEVELS,
                              (level + 1) * diffusion.T // self.LEVELS, (2 * images,))
            x0 = torch.cat([x[torch.randint(len(x), (images,)).to(x.device)]
                            for x in (forget, others)])
            xt = diffusion.q_sample(x0, t.to(x0.device), torch.randn_like(x0))
            features.append(self.features(xt, t.to(x0.device)))
        x = torch.stack(features)  # (levels, 2 * images, d)
        self.mean, self.std = x.mean(1, keepdim=True), x.std(1, keepdim=True) + 1e-6
        is_gone = (torch.arange(2 * images) < images).float().expand(len(levels), -1)
        self.weight, self.bias = fit_logistic((x - self.mean) / self.std, is_gone)

    @torch.no_grad()
    def features(self, xt, t):
        """The middle block's features of x_t (n, C, H, W), pooled: (n, 4 C'), CPU."""
        chunks, n = [], max(1, min(250, 2**20 // xt[0].numel()))  # at most a million numbers
        for x, times in zip(xt.split(n), t.split(n)):
            prompts = [p.expand(len(x), *p.shape[1:]) for p in self.prompts]
            with autocast(x.device):
                h = self.frozen(x, times, *prompts, return_middle=True).cpu()
            chunks.append(adaptive_avg_pool2d(h, [min(2, n) for n in h.shape[2:]]).flatten(1))
        return torch.cat(chunks)

    def log_odds(self, xt, t):
        """log w/(1-w): (n,), on the CPU."""
        row = torch.tensor([self.row[n] for n in (t * self.LEVELS // self.diffusion.T).tolist()])
        x = (self.features(xt, t) - self.mean[row, 0]) / self.std[row, 0]
        log_ratio = (x * self.weight[row]).sum(1) + self.bias[row]  # as many of each kind
        return log_ratio + math.log(self.rho / (1 - self.rho))

    def __call__(self, xt, t):
        """w(x_t): (n,), on the CPU."""
        return self.log_odds(xt, t).sigmoid()

    def of_images(self, x0):
        """The log odds of clean images (N, C, H, W), at two levels of noise: (N,)."""
        generator, total = torch.Generator().manual_seed(0), 0
        for level in self.OF_IMAGES:
            t = torch.full((len(x0),), level * self.diffusion.T // self.LEVELS, device=x0.device)
            eps = torch.randn(x0.shape, generator=generator).to(x0.device)
            total = total + self.log_odds(self.diffusion.q_sample(x0, t, eps), t)
        return total / len(self.OF_IMAGES)


def fit_logistic(x, y, decay=0.02, iterations=10):
    """L logistic regressions: x (L, n, d), y (L, n) of 0 and 1 -> (L, d), (L,).
    Mean cross-entropy + decay |weight|^2, by Newton's method."""
    x = torch.cat([x, torch.ones_like(x[..., :1])], dim=2)  # the last weight is the bias
    ridge = torch.full(x.shape[2:], 2 * decay)
    ridge[-1] = 1e-6
    weight, n = torch.zeros(x.shape[0], x.shape[2]), x.shape[1]
    for _ in range(iterations):
        p = torch.einsum("lnd,ld->ln", x, weight).sigmoid()
        gradient = torch.einsum("ln,lnd->ld", p - y, x) / n + ridge * weight
        hessian = (x * (p * (1 - p))[..., None]).transpose(1, 2) @ x / n + ridge.diag()
        # by Cholesky, since it is positive definite: LU's pivots fail on some threads
        root = torch.linalg.cholesky(hessian)
        weight = weight - torch.cholesky_solve(gradient[..., None], root)[..., 0]
    return weight[:, :-1], weight[:, -1]


def keep_own_samples(frozen, diffusion, forget, generated, rho, seed=0):
    """Which of theta*'s own samples (M, C, H, W) are not of D_f: each stays with the
    probability 1 - w(x_0), w first from a fit against all of them, then, better, from
    one against those that stayed. Returns their indices, on the CPU."""
    kept = torch.arange(len(generated))
    draws = torch.rand(len(generated), generator=torch.Generator().manual_seed(seed))
    for _ in range(2):
        others = generated[kept.to(generated.device)]
        w = Likeness(frozen, diffusion, forget, others, rho).of_images(generated).sigmoid()
        kept = (draws >= w).nonzero().flatten()
    return kept


class FunctionSpaceObjective(PaperObjective):
    """L = (1 - gamma) [ rho E_D_f lambda(t) || eps_theta - eps_target ||^2
          + (1 - rho) E_kept lambda(t) || eps_theta - eps_theta* ||^2 ] + gamma (d/P) B.

    Plasticity (A, with a floor), stability in function space, and in parameters (B).
    lambda(t) = 1 / sqrt(a*(t)) of mean 1, a* the error of theta*: else low t rules.
    frozen: eps_theta*, called as unet is.  kept: (M, C, H, W), images of theta*.
    kept_context: (M, L, E), their encoded prompts, where the network takes any.
    likeness: w(x_t).  kappa: see (b).  Others: PaperObjective's."""

    FURTHEST = 20.0  # the largest push past eps_theta*, in multiples of eps_theta* - eps

    def __init__(self, *args, frozen, kept, likeness, rho, kappa, kept_context=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.frozen, self.kept, self.kept_context = frozen, kept, kept_context
        self.likeness, self.rho, self.kappa = likeness, rho, kappa
        self.weight = self.measure_weight().to(kept.device)

    @torch.no_grad()
    def measure_weight(self, levels=25, images=64):
        """lambda(t), (T,), of mean 1: a* measured at 25 levels of noise."""
        T, n = self.diffusion.T, min(images, self.batch_size)  # no more at once than in a step
        errors = torch.zeros(levels)
        for level in range(levels):
            for _ in range(0, images, n):
                x0, prompts = self.draw_kept(n)
                t = torch.full((n,), (2 * level + 1) * T // (2 * levels)).to(x0.device)
                eps_star = lambda xt, t: self.frozen(xt, t, *prompts)
                errors[level] += plasticity_loss(eps_star, self.diffusion, x0, t,
                                                 torch.randn_like(x0)).mean().cpu()
        weight = errors.rsqrt()[torch.arange(T) * levels // T]
        return weight / weight.mean()

    def draw_kept(self, n):
        """n of the kept images, and their prompts, () for none."""
        index = torch.randint(len(self.kept), (n,)).to(self.kept.device)
        context = self.kept_context
        return self.kept[index], () if context is None else (context[index],)

    def __call__(self, unet):
        n, device = self.batch_size, self.forget.device
        x0, t, eps, prompts = self.draw()
        kept, kept_prompts = self.draw_kept(n)
        # Own samples hold most where D_f pushes: half their t are of t_range.
        t = torch.cat([t, stratified_timesteps(n // 2, self.low, self.high, device),
                       stratified_timesteps(n - n // 2, 0, self.diffusion.T, device)])
        x0, eps = torch.cat([x0, kept]), torch.cat([eps, torch.randn_like(kept)])
        prompts = tuple(torch.cat(both) for both in zip(prompts, kept_prompts))
        xt = self.diffusion.q_sample(x0, t, eps)  # (2n, C, H, W): D_f, then kept
        with autocast(device):
            with torch.no_grad():
                eps_star = self.frozen(xt, t, *prompts).float()
                eps_target = self.eps_target(xt[:n], t[:n], eps[:n], eps_star[:n])
            eps_theta = unet(xt, t, *prompts)
        target = torch.cat([eps_target, eps_star[n:]])
        error = self.weight[t] * (eps_theta - target).square().flatten(1).sum(1)  # (2n,)
        fit = self.rho * error[:n].mean() + (1 - self.rho) * error[n:].mean()
        B = self.stability(unet)
        L = (1 - self.gamma) * fit + self.gamma * self.unit * B
        A = (eps_theta - eps)[:n].square().mean().item()
        F = (eps_theta - eps_star)[n:].square().mean().item()
        return L, {"A": A, "F": F, "B": B.item() / self.P}

    def eps_target(self, xt, t, eps, eps_star):
        """Where an image of D_f is pulled: past eps_theta*, as (b) says."""
        w = self.likeness(xt, t)
        odds = w / (1 - w) * (1 + (self.kappa - 1) * w)
        past = (1 + odds).clamp(max=self.FURTHEST)
        return eps_star + past.to(xt.device).view(-1, 1, 1, 1) * (eps_star - eps)


def frozen_copy(unet, posterior):
    """eps_theta*: the network with mu* in place of what moves. For no_grad alone."""
    return lambda *args, **kwargs: functional_call(unet, posterior.mean, args, kwargs)


class ForgottenCheck:
    """Is it forgotten? For `unlearn`: the share of new samples that look like D_f to
    theta*, every 50 steps and at the end (with until=0 half-way and at the end).

    sample: a function without arguments, samples (N, C, H, W) of the network as it is,
    from the same noise each time.  until: done once the share has fallen by this much
    of itself; 0 is never.  stop: has .requested, which ends the loop.  `history` is a
    list of (step, share)."""

    def __init__(self, sample, likeness, steps, until=0.99, stop=None):
        self.sample, self.likeness, self.steps, self.until = sample, likeness, steps, until
        self.every, self.stop, self.history = 50 if until else -(-steps // 2), stop, []
        self(0)

    def __call__(self, step):
        if step % self.every == 0 or step == self.steps:
            like = (self.likeness.of_images(self.sample()) > 0).float().mean().item()  # w > 1/2
            self.history.append((step, like))
        first, last = self.history[0][1], self.history[-1][1]
        self.text = {"like D_f": f"{100 * first:.1f}% -> {100 * last:.1f}%"}
        fallen = self.history[-1][0] == step and first > 0 and last <= (1 - self.until) * first
        return bool(self.until and fallen or self.stop and self.stop.requested)


# --------------------------------------------------------------------------------------
# The command line. OURS was chosen on the digits 4 and 9, by the distance to the models
# retrained without them; PAPER on the 1.

DEFAULT_CHECKPOINT = "checkpoints/mnist.pt"
CHECK_SAMPLES = 300  # that the self-check draws: 1% of them is 3
OURS = dict(
    gamma=0.003,        # a little of B: the weights stay within the posterior
    lr=0.3,             # Adam's, in sigma*; it falls to 0
    steps=500,          # half as many end a third further from the retrained model
    batch_size=64,      # of D_f, and as many of theta*'s samples
    t_range=[0.3, 1.0],  # at high noise it is decided which class an image will be
    anchors=2000,       # samples of theta*: they stand for the data that nobody has
    kappa=5.0,          # Bayes' rule says 1; 5 gets there in these steps
    adam=True, accumulate=1,
    until=0.0)          # go on to the end: what was harmed on the way heals by then
PAPER = dict(
    gamma=0.63,         # found on the digit 1: less takes its neighbours along
    lr=0.0083,          # SGD's, in sigma*
    steps=85,
    batch_size=256,     # one gradient of less noise, since few steps are taken
    t_range=[0.7, 1.0],  # the paper: 0, 1
    anchors=600,        # the self-check compares D_f with them
    kappa=None, adam=False, accumulate=1,
    until=0.99)         # stop once 99% of what looked like D_f is gone


def with_defaults(args, ours, paper):
    """The flags, those that were left away (None) as the chosen loss has them; and the
    loss, printed. Raises UserError for a flag in which the loss has no part."""
    if args.bound_weights > args.paper or args.paper and args.kappa:
        raise UserError("--bound-weights belongs to --paper, and --kappa to the default loss")
    settings = vars(args) | {k: v for k, v in (paper if args.paper else ours).items()
                             if getattr(args, k, None) is None}
    loss = "-(1-{gamma:g}) A + {gamma:g} (d/P) B" if args.paper else (
        "(1-{gamma:g}) [rho |eps_theta-eps_target|^2 + (1-rho) |eps_theta-eps_theta*|^2] + "
        "{gamma:g} (d/P) B, kappa {kappa:g}")
    print("L =", loss.format(**settings) + ", A with the bound's C_t" * args.bound_weights)
    return argparse.Namespace(**settings)


def main(args):
    """Run the command line. Raises UserError for what the user can put right."""
    args = with_defaults(args, OURS, PAPER)
    device, path = pick_device(args.device), args.checkpoint
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
    posterior, origin = choose_posterior(args, path, checkpoint, device)
    forget, rho = load_forget_images(args, checkpoint, indices)
    forget, what = forget.to(device), args.forget_images or ", ".join(classes)
    print(f"forgetting {what}, from images {len(forget):,}: rho {rho:.3g}, at most {args.steps} "
          f"steps of {args.batch_size} on {device}; {origin}")
    # What theta* itself draws stands for the data, less what is of D_f.
    parent, shape = digest(unet.state_dict().values()), tuple(forget.shape[1:])
    torch.manual_seed(args.seed)
    frozen = frozen_copy(unet, posterior)
    draw = lambda n, seed: diffusion.sample(unet, n, shape, 25, eta=1.0, seed=seed,
                                            progress=seed == args.seed + 1).to(device)
    unet.load_state_dict(posterior.mean, strict=False)  # theta* = mu*; buffers never moved
    generated = draw(args.anchors, args.seed + 1)
    kept = generated[keep_own_samples(frozen, diffusion, forget, generated, rho,
                                      seed=args.seed).to(device)]
    lowest = min(int(args.t_range[0] * Likeness.LEVELS), *Likeness.OF_IMAGES)
    levels = Likeness.OF_IMAGES if args.paper else range(lowest, Likeness.LEVELS)
    likeness = Likeness(frozen, diffusion, forget, kept, rho, levels=levels)
    common = (diffusion, posterior, forget, args.gamma, args.batch_size, args.t_range)
    objective = (PaperObjective(*common, bound_weights=args.bound_weights) if args.paper else
                 FunctionSpaceObjective(*common, frozen=frozen, kept=kept, likeness=likeness,
                                        rho=rho, kappa=args.kappa))

    def save(record):
        forgotten = {"classes": classes, "images_from": args.forget_images, "images": len(forget),
                     "checkpoint": os.path.abspath(path), "settings": vars(args), **record,
                     "rho": rho, "parent": parent}
        raw = {k: v for k, v in checkpoint.raw.items() if k != "train"}
        save_checkpoint(output, {**raw, "weights": unet.state_dict(), "forgotten": forgotten,
                                 "posterior": posterior.contents()})

    run(args, unet, posterior, objective, likeness, save=save,
        sample=lambda: draw(min(CHECK_SAMPLES, args.anchors), args.seed + 2))
    more = f" --data-root {shlex.quote(args.data_root)}" if args.data_root else ""
    more += "" if classes else " --forget-class CLASS"
    print(f"wrote {output}; measure it: python evaluate.py --after {shlex.quote(output)}{more}")


def run(args, net, posterior, objective, likeness, sample, save):
    """Unlearn as the flags say, save (also after Ctrl-C), and say what came of it, as
    the network itself judges."""
    began = time.time()
    with StopRequest() as stop:
        check = ForgottenCheck(sample, likeness, args.steps, args.until, stop)
        record = unlearn(net, posterior, objective, args.lr, args.steps, args.adam,
                         args.accumulate, args.seed, check, progress=True)
        save({**record, "like_D_f": check.history})
    A, (_, first), (_, last) = record["last"]["A"], check.history[0], check.history[-1]
    print(f"{'interrupted, and saved as it stood' if stop.requested else 'done'} after "
          f"{record['steps']} steps ({time.time() - began:.0f} s): A from "
          f"{record['first']['A']:.4f} to {A:.4f}, theta by {record['moved_rms_sigma']:.4f} sigma "
          f"(rms), samples like D_f from {100 * first:.1f}% to {100 * last:.1f}%")
    if A > 1:  # what a broken network draws does not look like D_f either
        also = ("was so before the first step" if record["first"]["A"] > 1 else
                "has lost more than D_f; try a larger --gamma, or a smaller --lr or --kappa")
        print(f"it is broken (A of a network that always says 0 is 1, here {A:.3g}) and {also}")
    elif first >= 0.01 and last > 0.1 * first:
        also = "leave --paper away" if args.paper else "a larger --kappa"
        print(f"It is still there: try more --steps, or {also}")
    if stop.requested:
        raise KeyboardInterrupt


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
    """D_f as (N, C, H, W) in [-1, 1], and rho, its share of the training set.
    Other classes' files stay shut. rho: --share, else counted, else 0.1."""
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
    return to_float(images[chosen]), args.share or n / data["images"]


def add_unlearning_flags(p, ours, paper):
    """The flags that vdu.py and sd_unlearn.py share; with their dicts of defaults."""
    said = {k: f"(default: {ours[k]}, {paper[k]} with --paper)" for k in paper}
    p.add_argument("--paper", action="store_true", help="the paper's two terms alone, A and B")
    p.add_argument("--bound-weights", action="store_true", help="--paper with the bound's C_t")
    p.add_argument("--gamma", type=number(float, 0, 1), help=f"weight of B {said['gamma']}")
    p.add_argument("--kappa", type=number(float, 1e-6), help=f"1 is Bayes' rule {said['kappa']}")
    p.add_argument("--lr", type=number(float, 1e-12), help=f"step size in sigma* {said['lr']}")
    p.add_argument("--steps", type=number(int, 1), help=f"at most {said['steps']}")
    p.add_argument("--batch-size", type=number(int, 1), help=f"images a step {said['batch_size']}")
    p.add_argument("--t-range", type=number(float, 0, 1), nargs=2, metavar=("LOW", "HIGH"),
                   help=f"shares of T between which A draws t; the paper: 0 1 {said['t_range']}")
    p.add_argument("--anchors", type=number(int, 10), help=f"own samples {said['anchors']}")
    p.add_argument("--share", type=number(float, 1e-6, 1 - 1e-6), help="rho (default: counted)")
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
