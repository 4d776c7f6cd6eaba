"""Variational Diffusion Unlearning: make a DDPM forget, from a few images of it.

    python vdu.py --forget-class 1
    python vdu.py --checkpoint anyone.ckpt --forget-images my_images

Holds    the derivation, the losses, the posterior p(theta | D), the objective, the
         loop; below a rule what goes beyond the paper; last the command line.
Reads    a checkpoint of train_ddpm.py, or DDPM weights of others; images of what is
         to be forgotten, of a class or in a folder. Never a retained image.
Writes   a checkpoint, checkpoints/mnist-forget-1.pt, that remembers what it forgot.
Paper    VDU (arXiv 2510.04058), its method: the two terms, posterior, objective.
"""

import math
import os
import shlex
import time
from pathlib import Path

import torch
from torch.func import functional_call
from torch.nn.functional import adaptive_avg_pool2d
from tqdm import tqdm

from ddpm import (ArgumentParser, StopRequest, TimeRange, UserError, add_shared_flags, autocast,
                  check_checkpoint_name, check_outputs, digest, fill_in, key_value, load_checkpoint,
                  number, peak_memory, pick_device, run_command_line, save_checkpoint,
                  stratified_timesteps, training_step)
from train_ddpm import (SHIPPED, RunningPosterior, class_indices, load_data_of, load_images,
                        to_float)

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
# (2) Look for it among Gaussians q(theta) = prod_i N(theta_i, s_i^2):
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
#     DDPM bounds, with weights w_t that make each summand a KL divergence:
#         -log p(x_0 | theta) <= sum_t w_t E || eps - eps_theta(x_t, t) ||^2 + const.
#     With w_t = 1, as in DDPM's training loss, the sum is the plasticity inducer A; -A
#     stands for log p(D_f | theta). A itself is neither a bound nor floored, so L is
#     a surrogate that shares the KL's direction, and without B raising A never ends.
#
# (5) Their sum, with a factor to balance them (the exact weights: N_f w_t against 1):
#         L(theta) = -(1 - gamma) A + gamma B.
#
# The unit in which gamma is measured: A per dimension of an image, B per parameter.
# With d dimensions and P parameters B is brought to A's size by d/P, so that one gamma
# means about the same for any image size and network. It is the paper's loss with
# another name for the same balance:
#         gamma_paper / (1 - gamma_paper) = (d/P) gamma / (1 - gamma).
#
# What the minimum looks like: near mu*, A ~ A(mu*) + (theta - mu*) . grad A, and L is
# least at theta_i - mu*_i = (1 - gamma)/gamma (P/d) sigma*_i^2 dA/dtheta_i: every
# parameter moves along the gradient by its own variance, so loosely determined ones do
# the forgetting.


def plasticity_loss(unet, diffusion, x0, t, eps):
    """A per image: || eps - eps_theta(sqrt(abar_t) x_0 + sqrt(1-abar_t) eps, t) ||^2.

    x0, eps: (n, C, H, W), images of D_f and unit noise.  t: (n,).  Returns (n,), the
    sum over the d dimensions (VDU, plasticity inducer).
    """
    return diffusion.simple_loss(unet, x0, t, eps) * x0[0].numel()


def stability_loss(theta, posterior):
    """B = sum_i (theta_i - mu*_i)^2 / (2 sigma*_i^2): the KL of (3), less constants.

    theta: {name: parameter}.  Returns a scalar (VDU, stability regularizer).
    """
    return sum(((p - posterior.mean[k]) / posterior.std[k]).square().sum()
               for k, p in theta.items()) / 2


def vdu_loss(A, B, gamma, scale=1.0):
    """L = -(1 - gamma) A + gamma B (VDU, objective). scale: d/P, or 1 for bare sums.

    A, B: scalars.  gamma: 0 is naive gradient ascent, 1 stays at the posterior's mean.
    """
    return -(1 - gamma) * A + gamma * scale * B


SIGMA_FLOOR = 1e-8  # for a parameter that never moved: it stays, and nothing divides by zero


class GaussianPosterior:
    """p(theta | D) ~ prod_i N(mu*_i, sigma*_i^2) (VDU's approximation).

    mean, std: {name: tensor} like the parameters, mu* and sigma*.  n: of n checkpoints.
    """

    def __init__(self, mean, std, n):
        self.mean, self.n = mean, n
        self.std = {k: s.clamp(min=SIGMA_FLOOR) for k, s in std.items()}

    @classmethod
    def from_checkpoints(cls, paths, read):
        """mu* and sigma* over files of one training, one at a time. read: path -> dict.

        Raises UserError for fewer than two, for equal ones, or another network.
        """
        running, digests = None, set()
        for path in tqdm(paths, "posterior", unit="checkpoint", disable=len(paths) < 2):
            theta = read(path)
            running = running or RunningPosterior(theta.items())
            check_parameters(path, theta, paths[0], running.mean)
            running.update(theta.items())
            digests.add(digest(theta.values()))
        if len(digests) < max(2, len(paths)):
            raise UserError("--posterior needs two checkpoints that differ: one has no spread")
        return cls(**running.posterior())

    def isotropic(self):
        """The same mean, with one sigma: the root mean square of sigma*."""
        P = sum(m.numel() for m in self.mean.values())
        variance = sum(s.cpu().double().square().mean().item() * self.mean[k].numel()
                       for k, s in self.std.items()) / P
        std = {k: torch.full_like(s, math.sqrt(variance)) for k, s in self.std.items()}
        return GaussianPosterior(self.mean, std, self.n)

    @torch.no_grad()
    def unwhiten(self, z, theta):
        """theta = mu* + sigma* z, into theta's memory: p(theta | D) is N(0, I) in z."""
        for k, p in theta.items():
            torch.mul(self.std[k], z[k], out=p).add_(self.mean[k])

    def to(self, device):
        mean, std = ({k: v.to(device) for k, v in d.items()} for d in (self.mean, self.std))
        return GaussianPosterior(mean, std, self.n)


class PaperObjective:
    """L on a random batch of D_f: called with the network, (L, what the bar shows).

    forget: (N, C, H, W) in [-1, 1] (or latents), images of D_f.  t_range: shares of T
    between which t is drawn.  context: (M, L, E) encoded prompts, one drawn for each
    image, where the network takes any.  scale: d/P, the unit of L.
    """

    def __init__(self, diffusion, posterior, forget, gamma, batch_size, t_range, context=None):
        self.diffusion, self.posterior, self.forget = diffusion, posterior, forget
        self.gamma, self.batch_size, self.context = gamma, batch_size, context
        self.low, self.high = (round(share * diffusion.T) for share in t_range)
        self.high = max(self.high, self.low + 1)
        self.d, self.P = forget[0].numel(), sum(m.numel() for m in posterior.mean.values())
        self.scale = self.d / self.P

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
        A = plasticity_loss(prompted(unet, prompts), self.diffusion, x0, t, eps).mean()
        B = stability_loss(trainable(unet), self.posterior)
        L = vdu_loss(A, B, self.gamma, self.scale)
        return L, {"A": A.item() / self.d, "B": B.item() / self.P}


def unlearn(unet, posterior, objective, lr, steps, adam=False, accumulate=1, seed=0,
            check=None, progress=False, stop=None):
    """Move `unet`, in place, from mu* towards a minimum of the objective.

    Those parameters move that require a gradient; the posterior must be of the same.
    objective: called with unet, returns (loss, dict of numbers).  lr: in posterior
    standard deviations.  adam: its steps in z in place of SGD's.  accumulate: batches
    per step. check: called after each step with its number, True ends the loop.  stop:
    has .requested.  Raises UserError if the posterior is of another network, or if loss
    or weights become infinite or nan (unet is then at mu*).

    The steps are in whitened coordinates z = (theta - mu*) / sigma*, in which the
    posterior is N(0, I) and B = |z|^2 / 2: a pinned-down parameter hardly feels A.
    (Adam on theta would move each by lr, whatever its sigma*.)
    """
    theta = trainable(unet)
    check_parameters("the posterior", posterior.mean, "the network", theta)
    torch.manual_seed(seed)
    z = {k: torch.zeros_like(p) for k, p in theta.items()}
    posterior.unwhiten(z, theta)
    optimizer = (torch.optim.Adam(z.values(), lr, betas=(0.9, 0.99)) if adam else
                 torch.optim.SGD(z.values(), lr, momentum=0.9))
    history = []
    with tqdm(range(steps), desc="unlearning", unit="step", disable=not progress) as bar:
        for step in bar:
            if adam:  # whose steps do not shrink by themselves
                optimizer.param_groups[0]["lr"] = lr * (1 - step / steps) ** 2
            batches = []
            for _ in range(accumulate):
                loss, numbers = objective(unet)
                if not math.isfinite(loss.item()):
                    raise diverged(posterior, theta, lr, f"loss {loss.item()} at step {step + 1}")
                (loss / accumulate).backward()
                batches.append(numbers)
            for k, p in theta.items():
                # dL/dz = sigma* dL/dtheta; over d/P, so that B's own pull in z is gamma
                # z and one lr serves every size of image and network.
                z[k].grad = p.grad.mul_(posterior.std[k]).div_(objective.scale)
                p.grad = None
            optimizer.step()
            posterior.unwhiten(z, theta)
            history.append({k: sum(b[k] for b in batches) / accumulate for k in numbers})
            done = check is not None and check(step + 1)
            bar_text = {k: f"{v:.4g}" for k, v in history[-1].items()}
            bar.set_postfix({**bar_text, **(check.text if check else {})}, refresh=False)
            if done or (stop is not None and stop.requested):
                break
    P = sum(v.numel() for v in z.values())
    moved = math.sqrt(sum(v.square().sum().item() for v in z.values()) / P)
    if not math.isfinite(moved):
        raise diverged(posterior, theta, lr, "weights became infinite in the last step")
    return {"steps": len(history), "first": history[0], "last": history[-1],
            "moved_rms_sigma": moved}


# The paper's method ends here: helpers, what goes beyond it, the command line follow.


def trainable(unet):
    return {k: p for k, p in unet.named_parameters() if p.requires_grad}


def prompted(unet, prompts):
    """unet as a function of (x_t, t) alone, with the prompts of the batch."""
    return lambda xt, t: unet(xt, t, *prompts)


def diverged(posterior, theta, lr, what):
    """The error to raise; theta is put back to mu*."""
    posterior.unwhiten({k: torch.zeros_like(p) for k, p in theta.items()}, theta)
    return UserError(f"{what}; nothing was written, the old checkpoint is as it was: try a larger "
                     f"--gamma or a smaller --lr than {lr:g}")


def check_parameters(path, parameters, other_path, others):
    """Raise UserError unless both dicts have the same names and shapes."""
    shapes, other_shapes = ({k: v.shape for k, v in d.items()} for d in (parameters, others))
    wrong = [k for k in {**shapes, **other_shapes} if shapes.get(k) != other_shapes.get(k)]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"the parameters of {path} do not match those of {other_path}: "
                        f"{', '.join(wrong[:3])}{more}")


# ======================================================================================
# BEYOND THE PAPER, ours: a posterior where one checkpoint is all there is.


def guessed_posterior(named_parameters, share=0.02):
    """mu* = the weights, sigma* = `share` of each tensor's root mean square.

    A DEPARTURE from the paper, whose sigma* is measured. This one knows only the scale
    of each tensor, not which of its parameters training pinned down. (Measured on
    MNIST, the share is 0.015 for the median tensor, 0.006 to 0.07 for all that are
    matrices.) `n` is 1; std holds one number per tensor.
    """
    mean = {k: p.detach().clone() for k, p in named_parameters}
    std = {k: share * m.float().square().mean().sqrt() for k, m in mean.items()}
    return GaussianPosterior(mean, std, 1)


def measured_posterior(unet, diffusion, images, steps, lr=2e-4, batch_size=64, progress=False):
    """mu* = the weights, sigma* = their spread while the network trains on.

    A DEPARTURE from the paper, whose checkpoints saw D. images: (N, C, H, W) that the
    network drew itself, so that no data is needed. The first half of the steps is for
    the weights to leave theta*; of the second every fifth counts, and the last. unet is
    as it was at the end.
    """
    mean = {k: p.detach().clone() for k, p in unet.named_parameters()}
    optimizer = torch.optim.AdamW(unet.parameters(), lr, betas=(0.9, 0.99), weight_decay=0.0)
    running = RunningPosterior(mean.items())
    for step in tqdm(range(steps), desc="training on, for sigma*", unit="step",
                     disable=not progress):
        index = torch.randint(len(images), (batch_size,)).to(images.device)
        training_step(unet, diffusion, optimizer, images[index])
        if step >= steps // 2 and (step % 5 == 0 or step == steps - 1):
            running.update(unet.named_parameters())
    unet.load_state_dict(mean, strict=False)  # buffers never moved
    return GaussianPosterior(mean, running.posterior()["std"], running.n)


# --------------------------------------------------------------------------------------
# BEYOND THE PAPER, ours: the same KL with the full covariance, in function space (which
# the paper names as future work).
#
# (a) With -log p(D|theta) = N (mean DDPM loss on D) and -log p(D_f|theta) = N_f A,
#         -log p(D_r|theta) = N [ F(theta) - rho A(theta) ] + const,    rho = N_f / N,
#         F = E_D || eps_theta(x_t, t) - eps_theta*(x_t, t) ||^2,
#     for a squared loss whose minimiser eps_theta* is the conditional mean, so that
#         E_D || eps - eps_theta ||^2 = E_D || eps - eps_theta* ||^2 + F.
#     To second order F = (theta - theta*)^T G (theta - theta*), G the Gauss-Newton
#     matrix of the training loss: B with the full covariance of the Laplace posterior
#     for its diagonal, at the cost of a forward pass. Samples of theta* stand for D.
#     (SISS, ICLR 2025, uses the identity with real data.)
#
# (b) At one point x_t, where a share w of the data is D_f, its minimum is
#         eps_theta* + w/(1-w) (eps_theta* - eps_f),    eps_f = E[eps | x_t, D_f]:
#     what overlaps is hardly moved, what does not is pushed away without end. A
#     regression has the same minimum: kept samples, a share 1-w, towards eps_theta*,
#     and images of D_f, a share w, towards
#         eps_target = eps_theta* + 1/(1-w) (eps_theta* - eps).
#     With 1/(1-w) = 1 + odds cut off at 20 it has a floor, and cannot run away. The
#     odds w/(1-w) are taken times 1 + (kappa - 1) w: as they are where x_t could be
#     anything, kappa times where it is surely of D_f. kappa = 1 is Bayes' rule; more
#     gets there in fewer steps.
#
# (c) w is asked of theta* itself: a logistic regression in its own features tells D_f
#     from its samples. No label and no retained image is needed.


class Likeness:
    """w(x_t), how surely x_t is of D_f, by logistic regression in theta*'s features.

    One regression per level of noise, of the middle block's features, pooled: images of
    D_f against other images.
    frozen: eps_theta*, called as unet is.  forget: (N, C, H, W).  others: (M, C, H, W),
    samples of theta*.  rho: share of D_f among all.  prompts: what the network takes
    beside images and t, for one image.  levels: which, of 20.  images: of either kind,
    each.
    """

    LEVELS, OF_IMAGES = 20, (4, 6)  # clean images are judged at two of the levels

    def __init__(self, frozen, diffusion, forget, others, rho, prompts=(), levels=OF_IMAGES,
                 images=500):
        self.frozen, self.diffusion, self.rho, self.prompts = frozen, diffusion, rho, prompts
        self.row = {level: i for i, level in enumerate(levels)}
        images = min(images, 10 * min(len(forget), len(others)))  # few say little by repetition
        features = []
        for level in levels:
            t = torch.randint(level * diffusion.T // self.LEVELS,
                              (level + 1) * diffusion.T // self.LEVELS, (2 * images,))
            x0 = torch.cat([x[torch.randint(len(x), (images,)).to(x.device)]
                            for x in (forget, others)])
            features.append(self.features(diffusion.q_sample(
                x0, t.to(x0.device), torch.randn_like(x0)), t.to(x0.device)))
        x = torch.stack(features)  # (levels, 2 * images, d)
        self.mean, self.std = x.mean(1, keepdim=True), x.std(1, keepdim=True) + 1e-6
        is_gone = (torch.arange(2 * images) < images).float().expand(len(levels), -1)
        self.weight, self.bias = fit_logistic((x - self.mean) / self.std, is_gone)

    @torch.no_grad()
    def features(self, xt, t):
        """The middle block's features of x_t (n, C, H, W), pooled: (n, 4 C'), CPU."""
        chunks = []
        for x, times in zip(xt.split(250), t.split(250)):
            prompts = [p.expand(len(x), *p.shape[1:]) for p in self.prompts]
            with autocast(x.device):
                h = self.frozen(x, times, *prompts, return_middle=True).cpu()
            chunks.append(adaptive_avg_pool2d(h, [min(2, n) for n in h.shape[2:]]).flatten(1))
        return torch.cat(chunks)

    def log_odds(self, xt, t):
        """log w/(1-w): (n,), on the CPU."""
        level = (t * self.LEVELS // self.diffusion.T).tolist()
        row = torch.tensor([self.row[n] for n in level])
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

    Mean cross-entropy + decay |weight|^2, by Newton's method.
    """
    x = torch.cat([x, torch.ones_like(x[..., :1])], dim=2)  # the last weight is the bias
    ridge = torch.full(x.shape[2:], 2 * decay)
    ridge[-1] = 1e-6
    weight, n = torch.zeros(x.shape[0], x.shape[2]), x.shape[1]
    for _ in range(iterations):
        p = torch.einsum("lnd,ld->ln", x, weight).sigmoid()
        gradient = torch.einsum("ln,lnd->ld", p - y, x) / n + ridge * weight
        hessian = (x * (p * (1 - p))[..., None]).transpose(1, 2) @ x / n + ridge.diag()
        weight = weight - torch.linalg.solve(hessian, gradient)
    return weight[:, :-1], weight[:, -1]


class FunctionSpaceObjective(PaperObjective):
    """L = (1-rho) E_kept || eps_theta - eps_theta* ||^2
          + rho E_D_f || eps_theta - eps_target ||^2,  both weighted by lambda(t).

    lambda(t) = 1 / sqrt(a*(t)), a* the error of theta*: low t would rule otherwise.
    frozen: eps_theta*, called as unet is.  kept: (M, C, H, W), images of theta*.
    kept_context: (M, L, E), their encoded prompts, where the network takes any.
    likeness: w(x_t).  kappa: see (b), 1 is Bayes' rule.  Others: PaperObjective's.
    """

    FURTHEST = 20.0  # times its old error that an image of D_f is pushed past, at most

    def __init__(self, *args, frozen, kept, likeness, rho, kappa, kept_context=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.frozen, self.kept, self.kept_context = frozen, kept, kept_context
        self.likeness, self.rho, self.kappa = likeness, rho, kappa
        self.weight = self.measure_weight().to(kept.device)

    @torch.no_grad()
    def measure_weight(self, levels=25, images=64):
        """lambda(t), (T,), of mean 1: a* measured at 25 levels of noise."""
        errors = []
        for level in range(levels):
            x0, prompts = self.draw_kept(images)
            t = torch.full((images,), (2 * level + 1) * self.diffusion.T // (2 * levels))
            a = plasticity_loss(prompted(self.frozen, prompts), self.diffusion, x0,
                                t.to(x0.device), torch.randn_like(x0))
            errors.append(a.mean().cpu())
        weight = torch.stack(errors).rsqrt()
        weight = weight[torch.arange(self.diffusion.T) * levels // self.diffusion.T]
        return weight / weight.mean()

    def draw_kept(self, n):
        index = torch.randint(len(self.kept), (n,)).to(self.kept.device)
        context = self.kept_context
        return self.kept[index], () if context is None else (context[index],)

    def __call__(self, unet):
        n, device = self.batch_size, self.forget.device
        x0, t, eps, prompts = self.draw()
        kept, kept_prompts = self.draw_kept(n)
        # F has most to hold where A pushes: half of its t from there, half from all.
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
        L = (1 - self.rho) * error[n:].mean() + self.rho * error[:n].mean()
        A = (eps_theta - eps)[:n].square().mean().item()
        F = (eps_theta - eps_star)[n:].square().mean().item()
        return L, {"A": A, "F": F}

    def eps_target(self, xt, t, eps, eps_star):
        """Where an image of D_f is pulled: past eps_theta*, by 1/(1-w) of its error."""
        w = self.likeness(xt, t)
        odds = w / (1 - w) * (1 + (self.kappa - 1) * w)
        past = (1 + odds).clamp(max=self.FURTHEST)
        return eps_star + past.to(xt.device).view(-1, 1, 1, 1) * (eps_star - eps)


def frozen_copy(unet, posterior):
    """eps_theta*: the network with mu* in place of what moves. For no_grad alone."""
    return lambda *args, **kwargs: functional_call(unet, posterior.mean, args, kwargs)


# --------------------------------------------------------------------------------------
# BEYOND THE PAPER, ours: is it forgotten? Samples are drawn on the way and judged by
# theta*.


class ForgottenCheck:
    """Every so many steps: what share of new samples looks like D_f? For `unlearn`.

    sample: a function without arguments, samples (N, C, H, W) of the network as it is,
    with the same noise each time.  steps: the last of which is always looked at, the
    others every 50; half-way where nothing stops.  until: done once the share has
    fallen by this much of itself; 0 is never. `history` is a list of (step, share).
    """

    def __init__(self, sample, likeness, steps, until=0.99):
        self.sample, self.likeness, self.steps, self.until = sample, likeness, steps, until
        self.every = 50 if until else -(-steps // 2)
        self.history = [(0, self.share())]

    def share(self):
        """The share that is more likely of D_f than not: w > 1/2."""
        return (self.likeness.of_images(self.sample()) > 0).float().mean().item()

    def __call__(self, step):
        if step % self.every and step != self.steps:
            return False
        self.history.append((step, self.share()))
        fallen = self.history[-1][1] <= (1 - self.until) * self.history[0][1]
        return self.until > 0 and fallen

    @property
    def text(self):
        first, last = self.history[0][1], self.history[-1][1]
        return {"like D_f": f"{100 * first:.1f}% -> {100 * last:.1f}%"}


# --------------------------------------------------------------------------------------
# The command line. Defaults were found on MNIST. t: at high noise it is decided which
# class an image will be.

DEFAULT_CHECKPOINT = "checkpoints/mnist.pt"
CHECK_SAMPLES = 300
PAPER = dict(gamma=0.63, lr=0.0083, steps=85, batch_size=256, t_range=[0.7, 1.0], anchors=600,
             kappa=None, until=0.99)
FUNCTION_SPACE = dict(gamma=None, lr=0.3, steps=250, batch_size=64, t_range=[0.3, 1.0],
                      anchors=2000, kappa=5.0, until=0.0)


def main(args):
    """Run the command line. Raises UserError for what the user can put right."""
    fill_in(args, FUNCTION_SPACE if args.function_space else PAPER)
    device = pick_device(args.device)
    checkpoint, indices = load_model(args, device)
    output = choose_output(args, checkpoint, indices)
    posterior, origin = choose_posterior(args, checkpoint, device)
    forget, rho = load_forget_images(args, checkpoint, indices)
    what = args.forget_images or ", ".join(class_titles(checkpoint, indices))
    print(f"forgetting {what}: {len(forget):,} images, {method_of(args, rho)}, at most "
          f"{args.steps} steps of {args.batch_size} on {device}; {origin}")

    began, parent = time.time(), digest(checkpoint.unet.state_dict().values())
    torch.manual_seed(args.seed)
    posterior, objective, check = build_objective(args, checkpoint, posterior, forget.to(device),
                                                  rho)
    with StopRequest() as stop:
        record = unlearn(checkpoint.unet, posterior, objective, args.lr, args.steps,
                         adam=args.function_space, seed=args.seed, check=check, progress=True,
                         stop=stop)
        record = {**record, "rho": rho, "like_D_f": check.history, "parent": parent}
        save_unlearned(output, args, checkpoint, posterior, indices, len(forget), record)
    print(summary(record, stop.requested, time.time() - began, device))
    print(verdict(check, record, args))
    root = f" --data-root {shlex.quote(args.data_root)}" if args.data_root else ""
    classes = "" if indices else " --forget-class CLASS (if the images are of one)"
    print(f"wrote {output}; see what came of it: python evaluate.py --after "
          f"{shlex.quote(output)}{root}{classes}")
    if stop.requested:
        raise KeyboardInterrupt


def load_model(args, device):
    """(Checkpoint, indices of the classes to forget); refuses a second forgetting."""
    if args.checkpoint == DEFAULT_CHECKPOINT and not os.path.exists(args.checkpoint):
        print(f"no {args.checkpoint}: taking the model of MNIST that ships with the code")
        args.checkpoint = str(SHIPPED)
    checkpoint = load_checkpoint(args.checkpoint, device, dict(args.assume))
    earlier = checkpoint.forgotten
    if earlier:
        what = ", ".join(earlier["classes"]) or earlier["images_from"]
        raise UserError(f"{args.checkpoint} has already forgotten {what}, and its posterior is "
                        f"that of {earlier['checkpoint']}: forget all at once from there, "
                        "--forget-class A B")
    data = checkpoint.data
    indices = class_indices(args.forget_class, data) if args.forget_class else []
    never_seen = [data["classes"][i] for i in indices if data["classes"][i] in data["excluded"]]
    if never_seen:
        raise UserError(f"{args.checkpoint} was trained without {', '.join(never_seen)}: nothing "
                        "to forget")
    return checkpoint, indices


def class_titles(checkpoint, indices):
    data = checkpoint.data
    names = [data["classes"][i] for i in indices]
    return [f"{name} ({data['words'][name]})" if "words" in data else name for name in names]


def method_of(args, rho):
    if args.function_space:
        return f"in function space, share {rho:.3g} of the data, kappa {args.kappa:g}"
    return f"the paper's two terms, gamma {args.gamma:g}"


def choose_output(args, checkpoint, indices):
    """Where the result goes. Raises UserError if that may not be replaced."""
    path = Path(args.checkpoint)
    if checkpoint.data["source"].startswith("published") or path == SHIPPED:
        path = Path("checkpoints") / f"{path.stem}.pt"  # the result is a checkpoint of ours
    classes = [checkpoint.data["classes"][i] for i in indices]
    what = "-".join(classes) or os.path.basename(os.path.abspath(args.forget_images))
    what = what if len(what) < 100 else f"{len(classes)}-classes"
    what = "".join(c if c.isalnum() or c in " .-_" else "_" for c in what)  # never a path
    output = args.output or str(path.with_name(f"{path.stem}-forget-{what}{path.suffix}"))
    if os.path.abspath(output) == os.path.abspath(args.checkpoint):
        raise UserError("--output is the --checkpoint itself: evaluate.py needs both, choose "
                        "another")
    check_checkpoint_name(output)
    check_outputs([output], args.overwrite)
    return output


def choose_posterior(args, checkpoint, device):
    """The posterior given, kept or guessed, and in words where it comes from.

    With --self-train a guess stands in until `build_objective` has drawn what to train
    on.
    """
    parameters = dict(checkpoint.unet.named_parameters())
    if args.self_train:
        if args.posterior or args.isotropic:
            raise UserError("--self-train measures sigma* by itself: leave --posterior and "
                            "--isotropic away")
        posterior = guessed_posterior(parameters.items()).to(device)
        return posterior, f"sigma* is measured over {args.self_train} steps of training on"
    if args.posterior:
        posterior = GaussianPosterior.from_checkpoints(
            args.posterior, lambda path: snapshot(path, checkpoint.config, dict(args.assume)))
        files = ", ".join(args.posterior)
        check_parameters(files, posterior.mean, args.checkpoint, parameters)
    elif checkpoint.posterior:
        posterior = GaussianPosterior(**checkpoint.posterior)
    elif "train" in checkpoint.raw:
        raise UserError(f"{args.checkpoint} holds no posterior yet: its training was interrupted; "
                        "finish it with python train_ddpm.py --resume --output "
                        f"{shlex.quote(args.checkpoint)}")
    else:
        posterior = guessed_posterior(parameters.items(), args.sigma)
    if args.isotropic:
        posterior = posterior.isotropic()
    origin = f"posterior of {posterior.n} checkpoints"
    if posterior.n == 1:
        origin = ("one checkpoint and no posterior: sigma* is guessed, "
                  f"{100 * args.sigma:g}% of each tensor's root mean square (--self-train N "
                  "and --posterior FILE FILE measure it)")
    return posterior.to(device), origin


def snapshot(path, config, assume):
    """The parameters of one moment of a training, for a posterior over several.

    Raises UserError for what is not a sample of p(theta | D), or of another model.
    """
    checkpoint = load_checkpoint(path, assume=assume)
    if checkpoint.forgotten:
        raise UserError(f"{path} has unlearned something: it is not a sample of p(theta | D)")
    if any(checkpoint.config[k] != config[k] for k in ("schedule", "timesteps", "velocity")) or (
            tuple(checkpoint.config["image_shape"]) != tuple(config["image_shape"])):
        raise UserError(f"{path} has another schedule or another size of images than --checkpoint")
    if "train" in checkpoint.raw:  # saved on the way: that step's weights, not their mean so far
        checkpoint.unet.load_state_dict(checkpoint.raw["train"]["unet"])
    elif checkpoint.posterior:
        raise UserError(f"{path} holds the mean of a whole training, and its posterior, too: "
                        "give copies that --save-every made on the way, or leave --posterior away")
    return dict(checkpoint.unet.named_parameters())


def load_forget_images(args, checkpoint, indices):
    """D_f as (N, C, H, W) in [-1, 1], and rho, its share of the training set.

    Files of other classes stay shut. rho is counted where that can be, or it is
    --share.
    """
    generator = torch.Generator().manual_seed(args.seed)
    if args.forget_images:
        images = load_images(args.forget_images, checkpoint.config["image_shape"])
        order = torch.randperm(len(images), generator=generator)
        return to_float(images[order[: args.forget_samples]]), args.share or 0.1
    images, labels = load_data_of(checkpoint, args.data_root, only=indices)
    data = checkpoint.data
    n = sum(data["counts"][i] for i in indices) if "counts" in data else len(images)
    rho = args.share or n / data["images"]
    chosen = []
    for i in indices:
        of_class = (labels == i).nonzero().flatten()
        order = torch.randperm(len(of_class), generator=generator)
        chosen.append(of_class[order[: args.forget_samples]])
    chosen = torch.cat(chosen)
    if len(indices) > 1:  # mixed, so that any part of them is one of all
        chosen = chosen[torch.randperm(len(chosen), generator=generator)]
    return to_float(images[chosen]), rho


def build_objective(args, checkpoint, posterior, forget, rho):
    """(posterior, objective, check) as the flags say; draws the samples for all."""
    unet, diffusion, shape = checkpoint.unet, checkpoint.diffusion, tuple(forget.shape[1:])
    frozen = frozen_copy(unet, posterior)
    generated = diffusion.sample(frozen, args.anchors, shape, 25, eta=1.0, seed=args.seed + 1,
                                 progress=True).to(forget.device)
    # A first guess leaves out twice as many as are of D_f; the rest is what stays.
    order = Likeness(frozen, diffusion, forget, generated, rho).of_images(generated)
    keep = order.argsort()[: round((1 - min(0.6, 2 * rho)) * len(order))]
    kept = generated[keep.to(forget.device)]
    if args.self_train:
        posterior = measured_posterior(unet, diffusion, kept, args.self_train, progress=True)
    levels = Likeness.OF_IMAGES
    if args.function_space:
        levels = range(min(int(args.t_range[0] * Likeness.LEVELS), *levels), Likeness.LEVELS)
    likeness = Likeness(frozen, diffusion, forget, kept, rho, levels=levels)
    n = min(CHECK_SAMPLES, args.anchors)

    def sample():
        x = diffusion.sample(unet, n, shape, 25, eta=1.0, seed=args.seed + 2)
        return x.to(forget.device)

    check = ForgottenCheck(sample, likeness, args.steps, args.until)
    common = (diffusion, posterior, forget, args.gamma, args.batch_size, args.t_range)
    if not args.function_space:
        return posterior, PaperObjective(*common), check
    return posterior, FunctionSpaceObjective(*common, frozen=frozen, kept=kept, likeness=likeness,
                                             rho=rho, kappa=args.kappa), check


def save_unlearned(output, args, checkpoint, posterior, indices, images, record):
    """The checkpoint again, with the unlearned weights and a record."""
    raw = {k: v for k, v in checkpoint.raw.items() if k != "train"}
    forgotten = {"classes": [checkpoint.data["classes"][i] for i in indices],
                 "images_from": args.forget_images, "images": images,
                 "checkpoint": os.path.abspath(args.checkpoint), "settings": vars(args), **record}
    save_checkpoint(output, {**raw, "weights": checkpoint.unet.state_dict(),
                             "posterior": vars(posterior), "forgotten": forgotten})


def summary(record, interrupted, seconds, device):
    """What unlearning did, in one line."""
    why = "interrupted, and saved as it stood" if interrupted else "done"
    return (f"{why} after {record['steps']} steps ({seconds:.0f} s, peak memory "
            f"{peak_memory(device)}): A {record['first']['A']:.4f} in the first step, "
            f"{record['last']['A']:.4f} in the last, theta moved "
            f"{record['moved_rms_sigma']:.4f} sigma (rms over parameters)")


def verdict(check, record, args):
    """Whether D_f is gone, as the network itself judges, and what to try if not."""
    A = record["last"]["A"]
    if A > 1:  # nothing that a broken network draws looks like D_f
        hold = "smaller --kappa" if args.function_space else f"larger --gamma than {args.gamma:g}"
        return (f"A ended at {A:.3g}, and a network that always says 0 has 1: this one is broken, "
                f"and has lost more than D_f; try a {hold}, or a smaller --lr than {args.lr:g}")
    (_, first), (step, last) = check.history[0], check.history[-1]
    text = (f"samples that look like D_f to the pre-trained network: {100 * first:.1f}% before, "
            f"{100 * last:.1f}% after {step} steps")
    if first < 0.01:
        return f"{text}; so few before tell nothing: judge by eye, or with evaluate.py"
    if last <= 0.1 * first:
        return text
    if args.function_space:
        return f"{text}. It is still there: try --kappa {2 * args.kappa:g}, or more --steps"
    also = "more --steps"
    if args.gamma:
        also = f"a smaller --gamma than {args.gamma:g}, in steps of 0.02"
    return f"{text}. It is still there: try --function-space, which is beyond the paper; or {also}"


def default_texts(paper, function_space):
    """{name: "(default: ...)"} for --help, from the two dicts of defaults."""
    texts = {}
    for name, value in paper.items():
        sides = [] if value is None else [f"{value}"]
        if function_space[name] not in (None, value):
            sides.append(f"{function_space[name]} with --function-space")
        texts[name] = f"(default: {', '.join(sides)})"
    return texts


def add_unlearning_flags(p, paper, function_space):
    """The flags that vdu.py and sd_unlearn.py share; with their dicts of defaults."""
    defaults = default_texts(paper, function_space)
    p.add_argument("--gamma", type=number(float, 0, 1),
                   help="0 (gradient ascent alone) .. 1 (stay at the posterior's mean): smaller "
                        f"forgets more {defaults['gamma']}")
    p.add_argument("--lr", type=number(float, 0, above=True),
                   help=f"step size in posterior standard deviations {defaults['lr']}")
    p.add_argument("--steps", type=number(int, 1), help=f"steps, at most {defaults['steps']}")
    p.add_argument("--batch-size", type=number(int, 1), metavar="N",
                   help=f"images per step {defaults['batch_size']}")
    p.add_argument("--t-range", type=float, nargs=2, metavar=("LOW", "HIGH"), action=TimeRange,
                   help="shares of T between which the plasticity inducer draws t; 0 1 is the "
                        f"paper's choice, all of them {defaults['t_range']}")
    p.add_argument("--posterior", nargs="+", metavar="FILE",
                   help="estimate mu* and sigma* from these checkpoints of one training")
    p.add_argument("--sigma", type=number(float, 0, above=True), default=0.02, metavar="SHARE",
                   help="where there is no posterior, a guess, NOT in the paper: sigma* as this "
                        "share of each tensor's root mean square")
    g = p.add_argument_group("beyond the paper, ours")
    g.add_argument("--function-space", action="store_true",
                   help="the KL with the full covariance: keep eps_theta as it was on images that "
                        "the model itself draws, in place of the parameters as they were")
    g.add_argument("--share", type=number(float, 0, 1, above=True, below=True), metavar="RHO",
                   help="share of D_f in the training set (default: counted, or 0.1 where it "
                        "cannot be; with prompts 0.5)")
    g.add_argument("--kappa", type=number(float, 0, above=True),
                   help="with --function-space: 1 weighs as Bayes' rule does, more forgets sooner "
                        f"and harms more {defaults['kappa']}")
    g.add_argument("--anchors", type=number(int, 10), metavar="N",
                   help=f"images that the model draws of what it knows {defaults['anchors']}")
    g.add_argument("--until", type=number(float, 0, 1), metavar="SHARE",
                   help="every 50 steps, count the samples that look like D_f; stop once they "
                        "have fallen by this share. 0 goes on to --steps: in function space "
                        f"what was harmed on the way heals by then {defaults['until']}")
    return g


def parser():
    p = ArgumentParser(prog="vdu.py", description=__doc__)
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--forget-class", nargs="+", metavar="CLASS",
                      help="one or several classes to forget, by name")
    what.add_argument("--forget-images", metavar="DIR",
                      help="forget what the images in this folder show: no class, label or "
                           "dataset is needed; what is transparent in them becomes white")
    p.add_argument("--checkpoint", default=DEFAULT_CHECKPOINT, metavar="FILE",
                   help="the trained model: of train_ddpm.py, or DDPM's published weights; where "
                        "the default is missing, the one of MNIST that ships with the code")
    p.add_argument("--output", metavar="FILE",
                   help="the unlearned model (default: CHECKPOINT-forget-CLASS.pt, in "
                        "checkpoints/ for published weights)")
    p.add_argument("--forget-samples", type=number(int, 1), metavar="N",
                   help="see only N images, of each class if by class (default: all)")
    p.add_argument("--isotropic", action="store_true",
                   help="one sigma for all parameters: what the posterior's shape is worth")
    p.add_argument("--self-train", type=number(int, 12), metavar="N",
                   help="for a model of one checkpoint, NOT in the paper: measure sigma* over N "
                        "steps (400, say) of training on, on the --anchors")
    p.add_argument("--data-root", metavar="DIR",
                   help="folder of the dataset (default: where the model was trained)")
    p.add_argument("--assume", nargs="+", type=key_value, default=[], metavar="KEY=VALUE",
                   help="for published weights in diffusers' layout: entries of its config.json, "
                        "such as sample_size=64 attention_head_dim=8, where it is not beside them")
    add_unlearning_flags(p, PAPER, FUNCTION_SPACE)
    add_shared_flags(p)
    return p


if __name__ == "__main__":
    run_command_line(lambda: main(parser().parse_args()))
