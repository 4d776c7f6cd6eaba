"""Variational Diffusion Unlearning: make a trained DDPM forget, from a few images of what must go and nothing else.

    python vdu.py --forget-class 1
    python vdu.py --checkpoint anyone.ckpt --forget-images my_images

Holds    the posterior p(theta | D), the two losses of the paper and their sum, the unlearning loop, the command line.
Reads    a checkpoint of train_ddpm.py, or DDPM weights that others published (ddpm.py, LAYOUTS); and images of what is to be
         forgotten alone: of a class, or those in a folder. Never a retained image.
Writes   a checkpoint of the same format, checkpoints/mnist-forget-1.pt, which remembers what was forgotten and how.
Paper    VDU (arXiv 2510.04058), its method: plasticity inducer, stability regularizer, objective. What departs from
         the paper is marked so wherever it appears: the option --function-space, and the posterior where one
         checkpoint is all there is, guessed or measured in a continued training on generated images.
"""

import math
import os
import time

import torch
import torch.nn.functional as F
from torch.func import functional_call
from tqdm import tqdm

from ddpm import (ArgumentParser, StopRequest, UserError, autocast, check_output, load_checkpoint, peak_memory, pick_device,
                  run_command_line, save_checkpoint, seed_everything, seed_number, stratified_timesteps, training_step)

# ---------------------------------------------------------------------------------------------------------------
# The posterior p(theta | D) ~ prod_i N(mu*_i, sigma*_i^2)

SIGMA_FLOOR = 1e-8  # for a parameter that no checkpoint moved: it stays where it is, and nothing divides by zero


class GaussianPosterior:
    """p(theta | D) as independent Gaussians, one a parameter (VDU, its approximation of p(theta | D)).

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

    @classmethod
    def from_one_checkpoint(cls, named_parameters, share=0.02):
        """Where one checkpoint is all there is: mu* its weights, sigma* `share` of each tensor's root mean square.

        A DEPARTURE from the paper, whose sigma* is measured. This one knows only the scale of each tensor, not which of its
        parameters training pinned down. (Measured on MNIST, the share is 0.015 for the median tensor, 0.006 to 0.07 for all
        that are matrices.) `n` is 1. std holds one number a tensor.
        """
        mean = {k: p.detach().clone() for k, p in named_parameters}
        return cls(mean, {k: share * m.float().square().mean().sqrt() for k, m in mean.items()}, 1)

    @classmethod
    def from_continued_training(cls, unet, diffusion, images, steps, lr=2e-4, batch_size=64, every=5, seed=0, progress=False):
        """Where one checkpoint is all there is, and time: mu* its weights, sigma* their spread while it trains on.

        A DEPARTURE from the paper, whose checkpoints saw D. images: (N, C, H, W) in [-1, 1] that the model itself generated, less
        those that look like D_f, so that no data is needed. DDPM's loss, AdamW at a constant lr; the first half of the steps is for
        the weights to leave theta*, every `every`-th of the second half counts. The mean stays theta*: the model that was handed
        over is the one to unlearn from. `unet` is unchanged at the end.
        """
        theta_star = {k: v.clone() for k, v in unet.state_dict().items()}
        torch.manual_seed(seed)
        optimizer = torch.optim.AdamW(unet.parameters(), lr, betas=(0.9, 0.99), weight_decay=0.0)
        running = RunningPosterior(unet.named_parameters())
        for step in tqdm(range(steps), desc="training on, for sigma*", unit="step", dynamic_ncols=True, disable=not progress):
            training_step(unet, diffusion, optimizer, images[torch.randint(len(images), (batch_size,)).to(images.device)])
            if step >= steps // 2 and (step % every == 0 or step >= steps - 2):
                running.update(unet.named_parameters())
        unet.load_state_dict(theta_star)
        return cls({k: p.detach().clone() for k, p in unet.named_parameters()}, running.posterior().std, running.n)

    def isotropic(self):
        """The same mean, with one sigma for all parameters: the root mean square of sigma*. For comparison only."""
        total = sum(m.numel() for m in self.mean.values())
        sigma = math.sqrt(sum(s.double().square().mean().item() * self.mean[k].numel() for k, s in self.std.items()) / total)
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
# The scale in which gamma is measured: A a dimension and B a parameter, that is A/D and B/P for images of D numbers and
# a network of P parameters. Both are means, so one gamma means about the same for any image size and network. It is
# the paper's loss up to a factor, with another name for the same balance: gamma_sum / (1 - gamma_sum) = (D/P) gamma / (1 - gamma).
#
# What the minimum looks like: near mu*, A ~ A(mu*) + (theta - mu*) . grad A, and L is least at
#     theta_i - mu*_i = (1 - gamma)/gamma (P/D) sigma*_i^2 dA/dtheta_i:
# every parameter moves along the gradient by its own variance, so loosely determined ones do the forgetting.


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


def vdu_loss(A, B, gamma, D=1, P=1):
    """L = -(1 - gamma) A/D + gamma B/P (VDU, objective). D = P = 1 is the paper's formula on the bare sums.

    A, B: scalars from the two functions above.  gamma: 0 is naive gradient ascent, 1 stays at the posterior's mean.
    """
    return -(1 - gamma) * A / D + gamma * B / P


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

    With it, L = -(1-gamma) E[ min(a, bound a*) / sqrt(a*) ] / E[ sqrt(a*) ] + gamma B/P + weight F / E[a*], where a is one
    image's error at one t and eps, and a* the pre-trained network's. Past the bound an image counts as forgotten and stops
    pushing: A has no floor of its own. The root of a* stands between two extremes that both did worse on MNIST: A as it is,
    ruled by the low t, where a 1 has long been a 1; and a / a*, ruled by the high t, where all classes are still one.

    frozen: eps_theta*, called as unet is.  images: (N, C, H, W) to anchor, from `generate` or from elsewhere.
    context: (N, L, E), the encoded prompt of each image, where the network takes any.
    """

    def __init__(self, frozen, diffusion, images, context=None):
        self.frozen, self.diffusion, self.images, self.context = frozen, diffusion, images, context

    @classmethod
    def generate(cls, frozen, diffusion, forget, n=2000, drop=0.2, sampling_steps=25, seed=0, progress=False):
        """Anchors for a network without prompts: n generated images, less the `drop` share that looks most like `forget`."""
        generated = diffusion.sample(frozen, n, tuple(forget.shape[1:]), steps=sampling_steps, eta=1.0, seed=seed, progress=progress)
        generated = generated.to(forget.device)
        ratio = looks_forgotten(frozen, diffusion, generated, forget)
        return cls(frozen, diffusion, generated[ratio.argsort(descending=True)[: round((1 - drop) * n)]])

    def loss(self, unet, batch_size, low, high):
        """F on a random batch of anchors: (B,), summed over the D dimensions, as A is.

        Half of the batch takes t from all of 0 .. T-1, half from low .. high-1, where A pushes: there F has most to hold.
        """
        index = torch.randint(len(self.images), (batch_size,)).to(self.images.device)
        x0, context = self.images[index], () if self.context is None else (self.context[index],)
        half = batch_size // 2
        t = torch.cat([stratified_timesteps(half, low, high, x0.device),
                       stratified_timesteps(batch_size - half, 0, self.diffusion.T, x0.device)])  # (B,)
        xt = self.diffusion.q_sample(x0, t, torch.randn_like(x0))
        with autocast(x0.device):
            with torch.no_grad():
                target = self.frozen(xt, t, *context)
            prediction = unet(xt, t, *context)
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


def unlearn(unet, diffusion, posterior, forget, gamma, lr, steps, batch_size=256, t_range=(0.7, 1.0), seed=0, context=None,
            accumulate=1, adam=False, anchor=None, weight=0.0, bound=None, stop_share=None, progress=False, stop=None):
    """Move `unet`, in place, from the posterior's mean towards a minimum of L. Returns a dict of what happened.

    Those parameters move that require a gradient; the posterior must be of the same.
    forget: (N, C, H, W) in [-1, 1] (or latents), images of D_f, all that is ever seen of the data.
    context: (M, L, E) encoded prompts, one drawn for each image at random, where the network takes any.
    gamma, lr, steps, batch_size: as on the command line.  t_range: shares of T between which A draws its t.
    accumulate: batches whose gradients make one step.  adam: its steps in z, whatever the size of the gradient, in place of SGD's.
    anchor, weight, bound, stop_share: beyond the paper, see FunctionSpaceAnchor and --help.  stop: has .requested.
    Raises UserError if the posterior is of another network, or the loss becomes infinite or nan (unet is then at mu*).

    The steps are taken in whitened coordinates z = (theta - mu*) / sigma*, in which the posterior is N(0, I) and
    B = |z|^2 / 2. By the chain rule dL/dz = sigma* dL/dtheta: a pinned-down parameter hardly feels A, a loose one does,
    and a step of gradient descent in z is one of sigma*^2 dL/dtheta in theta, preconditioned by the posterior's
    covariance. (Adam on theta moves every parameter by lr whatever its sigma*: it undoes what B is there for.)
    """
    theta = {k: p for k, p in unet.named_parameters() if p.requires_grad}
    check_parameters("the posterior", posterior.mean, "the network", theta)
    torch.manual_seed(seed)
    device, D, P = forget.device, forget[0].numel(), sum(p.numel() for p in theta.values())
    low, high = (round(share * diffusion.T) for share in t_range)
    z = {k: torch.zeros_like(p) for k, p in theta.items()}
    adam = adam or anchor is not None  # F is stiff in some directions and flat in others; a step of lr sigma* a parameter suits both
    # dL/dz = sigma* dL/dtheta; P / D instead of D, so that lr depends neither on the image's nor the network's size.
    scale = {k: posterior.std[k] * (P / D) for k in theta}
    optimizer = torch.optim.Adam(z.values(), lr, betas=(0.9, 0.99)) if adam else torch.optim.SGD(z.values(), lr, momentum=0.9)

    @torch.no_grad()
    def put():
        for k, p in theta.items():  # mu* + sigma* z, in p's own memory
            torch.mul(posterior.std[k], z[k], out=p).add_(posterior.mean[k])

    def one_batch():
        """L on one batch, and what the bar shows."""
        index = torch.randint(len(forget), (batch_size,)).to(device)
        x0, prompt = forget[index], () if context is None else (context[torch.randint(len(context), (batch_size,)).to(device)],)
        t = stratified_timesteps(batch_size, low, high, device)
        eps = torch.randn_like(x0)
        a = plasticity_loss(lambda xt, t: unet(xt, t, *prompt), diffusion, x0, t, eps)  # (B,)
        A, B = a.mean(), stability_loss(theta, posterior)
        seen = {"A": A.item() / D, "B": B.item() / P}
        if anchor is None:
            return vdu_loss(A, B, gamma, D, P), seen
        # Beyond the paper: a_star, what theta* makes of the same x_t, bounds each image's error and weighs it (FunctionSpaceAnchor).
        with torch.no_grad():
            a_star = plasticity_loss(lambda xt, t: anchor.frozen(xt, t, *prompt), diffusion, x0, t, eps)  # (B,)
        bounded = torch.minimum(a, bound * a_star)  # (B,); past the bound a sample counts as forgotten and stops pushing
        A_ = (bounded / a_star.sqrt()).mean() / a_star.sqrt().mean()  # 1 at theta*
        F_ = anchor.loss(unet, batch_size, low, high).mean()
        seen |= {"F": F_.item() / D, "past": (a > bound * a_star).float().mean().item()}
        return vdu_loss(A_, B, gamma, 1, P) + weight * F_ / a_star.mean(), seen

    put()
    past, history = 0.0, []
    with tqdm(range(steps), desc="unlearning", unit="step", dynamic_ncols=True, disable=not progress) as bar:
        for step in bar:
            if adam:
                optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)  # Adam's steps do not shrink by themselves
            batches = []
            for _ in range(accumulate):
                loss, seen = one_batch()
                batches.append(seen)
                if not math.isfinite(loss.item()):
                    for v in z.values():
                        v.zero_()
                    put()
                    raise UserError(f"the loss became {loss.item()} at step {step + 1}; nothing was written, the old checkpoint is as it was: "
                                    f"try a larger --gamma than {gamma:g} or a smaller --lr than {lr:g}")
                (D * loss / accumulate).backward()  # times D: gradients of the size that 16 bits can hold
            seen = {k: sum(b[k] for b in batches) / accumulate for k in seen}
            for k, p in theta.items():
                z[k].grad = p.grad.mul_(scale[k])
                p.grad = None
            optimizer.step()
            put()

            history.append(seen)
            shown = {"A": f"{seen['A']:.4f}", "B": f"{seen['B']:.5f}", "moved": f"{math.sqrt(2 * seen['B']):.4f} sigma"}
            if anchor is not None:
                past = 0.9 * past + 0.1 * seen["past"]
                shown |= {"F": f"{seen['F']:.5f}", "forgotten": f"{100 * past:.0f}%"}
            bar.set_postfix(shown, refresh=False)
            if (stop is not None and stop.requested) or (stop_share is not None and past >= stop_share):
                break
    B = stability_loss(theta, posterior).item()
    return {"steps": len(history), "A_before": history[0]["A"], "A_after": history[-1]["A"], "B": B / P,
            "moved_rms_sigma": math.sqrt(2 * B / P), "past_bound": past if bound is not None else None}


def check_settings(gamma, t_range):
    """Raise UserError unless gamma and t_range are what `unlearn` can take, in the words of the command lines."""
    if not 0 <= gamma <= 1:
        raise UserError(f"--gamma must be from 0 (gradient ascent alone) to 1 (no unlearning), not {gamma:g}")
    if not 0 <= t_range[0] < t_range[1] <= 1:
        raise UserError("--t-range needs two shares of T, 0 <= LOW < HIGH <= 1")


def main(args):
    """Run the command line. Raises UserError for anything that the user can put right."""
    from train_ddpm import class_indices, load_data_of, load_images, to_float  # here, not above: train_ddpm.py imports this file

    function_space = args.function_space > 0
    gamma, lr, steps, batch_size, t_range = (
        given if given is not None else default[function_space]
        for given, default in ((args.gamma, GAMMA), (args.lr, LR), (args.steps, STEPS), (args.batch_size, BATCH_SIZE), (args.t_range, T_RANGE))
    )
    check_settings(gamma, t_range)
    if args.self_train < 0 or args.self_train in (1, 2, 3) or (args.self_train and args.posterior):
        raise UserError("--self-train needs at least 4 steps, and no --posterior beside it: either measures sigma*")
    if not args.sigma > 0 or not 0 <= (args.drop or 0) < 1:
        raise UserError("need --sigma above 0 and --drop from 0 to below 1")
    if steps < 1 or batch_size < 1 or args.anchors < 10 or not lr > 0 or args.function_space < 0:
        raise UserError("need --steps and --batch-size of at least 1, --anchors of at least 10, --lr above 0 and --function-space of at least 0")
    if args.forget_samples is not None and args.forget_samples < 1:
        raise UserError("--forget-samples must be at least 1")
    device = pick_device(args.device)
    checkpoint = load_checkpoint(args.checkpoint, device)
    unet, diffusion, data = checkpoint.unet, checkpoint.diffusion, checkpoint.data
    if checkpoint.forgotten:
        raise UserError(f"{args.checkpoint} has already forgotten {', '.join(checkpoint.forgotten['classes']) or checkpoint.forgotten['images_from']}, "
                        f"and its posterior is that of {checkpoint.forgotten['checkpoint']}: forget all at once from there, --forget-class A B")
    indices = class_indices(args.forget_class, data) if args.forget_class else []
    names = [data["classes"][i] for i in indices]
    never_seen = [name for name in names if name in data["excluded"]]
    if never_seen:
        raise UserError(f"{args.checkpoint} was trained without {', '.join(never_seen)}: nothing to forget")
    stem, extension = os.path.splitext(args.checkpoint)
    if data["source"].startswith("published"):  # what is written is a checkpoint of this repository: where evaluate.py looks for it
        stem, extension = f"checkpoints/{os.path.basename(stem)}", ".pt"
    output = args.output or f"{stem}-forget-{'-'.join(names) or os.path.basename(os.path.abspath(args.forget_images))}{extension}"
    if os.path.abspath(output) == os.path.abspath(args.checkpoint):
        raise UserError("--output is the --checkpoint itself: evaluate.py needs both, choose another")
    check_output(output, args.overwrite)

    posterior = checkpoint.posterior
    if args.posterior:
        posterior = GaussianPosterior.from_checkpoints(args.posterior).to(device)
        check_parameters(", ".join(args.posterior), posterior.mean, args.checkpoint, dict(unet.named_parameters()))

    # D_f, and nothing else: images of other classes are not even decoded where each is a file of its own.
    generator = torch.Generator().manual_seed(args.seed)
    if args.forget_images:
        forget = load_images(args.forget_images, checkpoint.config["image_shape"])
        forget = forget[torch.randperm(len(forget), generator=generator)[: args.forget_samples]]
    else:
        images, labels = load_data_of(checkpoint, args.data_root, only=indices)
        chosen = []
        for i in indices:
            of_class = (labels == i).nonzero().flatten()
            chosen.append(of_class[torch.randperm(len(of_class), generator=generator)[: args.forget_samples]])
        chosen = torch.cat(chosen)
        if len(indices) > 1:  # mixed, so that any part of them is one of all
            chosen = chosen[torch.randperm(len(chosen), generator=generator)]
        forget = images[chosen]
    forget = to_float(forget).to(device)  # (N, C, H, W)

    # Twice the share of images that D_f is likely to be of what the model draws: the ranking is good, not perfect.
    drop = args.drop if args.drop is not None else min(0.6, 2 * len(indices) / len(data["classes"])) if indices else 0.2
    guessed = posterior is None and not args.self_train
    if guessed and "train" in checkpoint.raw:
        raise UserError(f"{args.checkpoint} holds no posterior yet: its training was interrupted; finish it with python train_ddpm.py --resume")
    if guessed:
        posterior = GaussianPosterior.from_one_checkpoint(unet.named_parameters(), args.sigma)
    what = args.forget_images or ", ".join(f"{name} ({data['words'][name]})" if "words" in data else name for name in names)
    print(f"forgetting {what}: {len(forget):,} images, gamma {gamma:g}, at most {steps} steps of {batch_size} on {device}; "
          + (f"one checkpoint and no posterior: sigma* is guessed, {100 * args.sigma:g}% of each tensor's root mean square (--self-train N and "
             "--posterior FILE FILE measure it)" if guessed else f"posterior of {args.self_train} steps of continued training" if args.self_train
             else f"posterior of {posterior.n} checkpoints"))

    seed_everything(args.seed)
    began = time.time()
    anchor = None
    if function_space or args.self_train:
        # eps_theta*, where unlearning starts, whatever `unet` has become: the same network with mu* in place of theta
        mean = {k: p.detach().clone() for k, p in unet.named_parameters()} if args.self_train else posterior.mean
        frozen = lambda *args, **kwargs: functional_call(unet, mean, args, kwargs)
        anchor = FunctionSpaceAnchor.generate(frozen, diffusion, forget, args.anchors, drop, seed=args.seed + 1, progress=True)
    if args.self_train:
        posterior = GaussianPosterior.from_continued_training(unet, diffusion, anchor.images, args.self_train, seed=args.seed, progress=True)
    if args.isotropic:
        posterior = posterior.isotropic()
    with StopRequest() as stop:
        result = unlearn(unet, diffusion, posterior, forget, gamma, lr, steps, batch_size, t_range, args.seed,
                         anchor=anchor if function_space else None, weight=args.function_space, bound=args.bound if function_space else None,
                         stop_share=args.stop_share if function_space else None, progress=True, stop=stop)
    settings = {"gamma": gamma, "lr": lr, "steps": steps, "batch_size": batch_size, "t_range": list(t_range),
                "forget_samples": args.forget_samples, "isotropic": args.isotropic, "posterior": args.posterior,
                "self_train": args.self_train, "sigma": args.sigma if guessed else None,
                "function_space": args.function_space, "anchors": args.anchors, "drop": drop, "bound": args.bound, "stop_share": args.stop_share, "seed": args.seed}
    save_checkpoint(output, {
        **{k: v for k, v in checkpoint.raw.items() if k != "train"},
        "weights": unet.state_dict(),
        "posterior": posterior.state_dict(),
        "forgotten": {"classes": names, "images_from": args.forget_images, "images": len(forget), "checkpoint": args.checkpoint, "settings": settings, **result},
    })
    why = "interrupted, and saved as it stood" if stop.requested else "done"
    print(f"{why} after {result['steps']} steps ({time.time() - began:.0f} s): A {result['A_before']:.4f} -> {result['A_after']:.4f}, "
          f"theta moved {result['moved_rms_sigma']:.4f} sigma (rms over parameters); peak memory {peak_memory(device)}\n"
          f"wrote {output}; see what came of it: python evaluate.py{'' if names else ' --forget-class CLASS, if the images are of one'}")
    if stop.requested:
        raise KeyboardInterrupt


# Defaults: (the paper's two terms alone, with --function-space), found on MNIST: the first on the digit 1, the second mostly on 1, 8 and 9.
GAMMA = (0.63, 0.63)
LR = (0.0083, 0.03)
STEPS = (85, 300)
BATCH_SIZE = (256, 64)
T_RANGE = ((0.7, 1.0), (0.3, 1.0))


def parser():
    def default(pair):
        return f"(default: {pair[0]}; with --function-space {pair[1]})"

    p = ArgumentParser(prog="vdu.py", description=__doc__)
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--forget-class", nargs="+", metavar="CLASS", help="one or several classes to forget, by name")
    what.add_argument("--forget-images", metavar="DIR", help="forget what the images in this folder show: no class, label or dataset is needed")
    p.add_argument("--checkpoint", default="checkpoints/mnist.pt", metavar="FILE", help="the trained model: of train_ddpm.py, or DDPM's published weights")
    p.add_argument("--output", metavar="FILE", help="the unlearned model (default: CHECKPOINT-forget-CLASS.pt, in checkpoints/ for published weights)")
    p.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    p.add_argument("--gamma", type=float, help=f"0 (gradient ascent alone) .. 1 (stay at the posterior's mean): smaller forgets more {default(GAMMA)}")
    p.add_argument("--lr", type=float, help="step size in posterior standard deviations: of gradient descent, or of Adam with "
                                            f"--function-space {default(LR)}")
    p.add_argument("--steps", type=int, help=f"steps, at most {default(STEPS)}")
    p.add_argument("--batch-size", type=int, help=f"images a step; large ones calm the gradient {default(BATCH_SIZE)}")
    p.add_argument("--t-range", type=float, nargs=2, metavar=("LOW", "HIGH"),
                   help="shares of T between which the plasticity term draws t: at high noise it is decided which class an image "
                        f"will be. 0 1 is the paper's choice, all of them {default(T_RANGE)}")
    p.add_argument("--forget-samples", type=int, metavar="N", help="see only N images, of each class if by class (default: all)")
    p.add_argument("--posterior", nargs="+", metavar="FILE", help="estimate mu* and sigma* from these checkpoints, snapshots of one "
                                                                  "training, instead of the posterior in --checkpoint")
    p.add_argument("--sigma", type=float, default=0.02, metavar="SHARE",
                   help="where --checkpoint holds no posterior and no other is given, a guess, NOT in the paper: sigma* as this share of each "
                        "tensor's root mean square")
    p.add_argument("--isotropic", action="store_true", help="one sigma for all parameters, for comparison: what the posterior's shape is worth")
    g = p.add_argument_group("beyond the paper")
    g.add_argument("--function-space", type=float, default=0.0, metavar="WEIGHT",
                   help="also keep eps_theta as it was on images that the model itself generates; 2 works well on MNIST, 5 held photographs better; 0 is off")
    g.add_argument("--anchors", type=int, default=2000, metavar="N", help="with --function-space: images to draw, less those that look like D_f")
    g.add_argument("--drop", type=float, metavar="SHARE", help="how many of them: those most like D_f (default: twice the share of the forgotten "
                                                               "among the classes, 0.2 for --forget-images)")
    g.add_argument("--self-train", type=int, default=0, metavar="N",
                   help="measure sigma* over N steps of training on, on --anchors images that the model itself generates, less those like D_f: for a "
                        "model of which there is one checkpoint")
    g.add_argument("--bound", type=float, default=4.0, help="with --function-space: an image whose error is this many times the old one "
                                                            "counts as forgotten and stops pushing")
    g.add_argument("--stop-share", type=float, default=0.8, help="with --function-space: stop once this share of images is past the bound")
    p.add_argument("--data-root", metavar="DIR", help="folder of the dataset (default: where the model was trained)")
    p.add_argument("--seed", type=seed_number, default=0, help="repeats a run on the same machine")
    p.add_argument("--device", default="auto", help="auto (CUDA, else MPS, else CPU), cpu, cuda, cuda:1, mps")
    return p


def arguments(forgotten, checkpoint, gamma, output, args):
    """The command line that unlearns as `forgotten` says, the record that main leaves in a checkpoint, but with another gamma. For sweeps."""
    line = ["--checkpoint", checkpoint, "--output", output, "--overwrite", "--gamma", f"{gamma:g}", "--device", args.device]
    line += ["--forget-class", *forgotten["classes"]] if forgotten["classes"] else ["--forget-images", forgotten["images_from"]]
    line += ["--data-root", args.data_root] if args.data_root else []
    for name, value in forgotten["settings"].items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            line.append(flag)
        elif name != "gamma" and value is not None and value is not False:
            line += [flag, *map(str, value if isinstance(value, list) else [value])]
    return line


if __name__ == "__main__":
    run_command_line(lambda: main(parser().parse_args()))
