"""Variational Diffusion Unlearning: make a DDPM forget, from a few images of it.

    python vdu.py --forget-class 1
    python vdu.py --checkpoint anyone.ckpt --forget-images my_images

Holds    the derivation, the losses, the posterior p(theta | D), the objective, the
         loop; below a rule what goes beyond the paper; last the command line.
Reads    a checkpoint of train_ddpm.py, or DDPM weights of others; and images of
         what is to be forgotten alone, of a class or in a folder. Never a retained
         image.
Writes   a checkpoint, checkpoints/mnist-forget-1.pt, that remembers what it forgot.
Paper    VDU (arXiv 2510.04058), its method: plasticity inducer, stability regularizer,
         objective.
"""

import math
import os
import time
from pathlib import Path

import torch
from torch.func import functional_call
from torch.nn.functional import adaptive_avg_pool2d
from tqdm import tqdm

from ddpm import (ArgumentParser, StopRequest, TimeRange, UserError, add_shared_flags, autocast,
                  check_output, load_checkpoint, number, peak_memory, pick_device,
                  run_command_line, save_checkpoint, stratified_timesteps, training_step)
from train_ddpm import RunningPosterior, class_indices, load_data_of, load_images, to_float

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

    theta: dict from names to parameters.  Returns a scalar (VDU, stability
    regularizer).
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

    mean, std: dicts from parameter names to tensors of the parameters' shapes (mu*,
    sigma*). n: checkpoints behind them.
    """

    def __init__(self, mean, std, n):
        self.mean, self.n = mean, n
        self.std = {k: s.clamp(min=SIGMA_FLOOR) for k, s in std.items()}

    @classmethod
    def from_checkpoints(cls, paths):
        """mu* and sigma* over checkpoint files, read one at a time.

        Raises UserError for fewer than two files, or if one differs from the first.
        """
        if len(paths) < 2:
            raise UserError("a posterior needs at least two checkpoints: one has no spread")
        running = None
        for path in paths:
            unet = load_checkpoint(path).unet
            running = running or RunningPosterior(unet.named_parameters())
            check_parameters(path, dict(unet.named_parameters()), paths[0], running.mean)
            running.update(unet.named_parameters())
        return cls(**running.posterior())

    def isotropic(self):
        """The same mean, with one sigma: the root mean square of sigma*."""
        P = sum(m.numel() for m in self.mean.values())
        variance = sum(s.double().square().mean().item() * self.mean[k].numel()
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
    image at random, where the network takes any.  scale: d/P, the unit of L.
    """

    finished = False  # an objective may ask the loop to stop

    def __init__(self, diffusion, posterior, forget, gamma, batch_size, t_range, context=None):
        self.diffusion, self.posterior, self.forget = diffusion, posterior, forget
        self.gamma, self.batch_size, self.context = gamma, batch_size, context
        self.low, self.high = (round(share * diffusion.T) for share in t_range)
        self.d, self.P = forget[0].numel(), sum(m.numel() for m in posterior.mean.values())
        self.scale = self.d / self.P

    def draw(self):
        """x_0 (n, C, H, W) of D_f, t (n,), eps like x_0, and prompts, () for none."""
        device, n = self.forget.device, self.batch_size
        x0, prompts = self.forget[torch.randint(len(self.forget), (n,)).to(device)], ()
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
            progress=False, stop=None):
    """Move `unet`, in place, from mu* towards a minimum of the objective.

    Those parameters move that require a gradient; the posterior must be of the same.
    objective: called with unet, returns (loss, dict of numbers).  lr: in posterior
    standard deviations.  adam: its steps in z in place of SGD's.  accumulate: batches
    per step. stop: has .requested.  Raises UserError if the posterior is of another
    network, or the loss becomes infinite or nan (unet is then at mu*).

    The steps are taken in whitened coordinates z = (theta - mu*) / sigma*, in which the
    posterior is N(0, I) and B = |z|^2 / 2: a pinned-down parameter hardly feels A, a
    loose one does. (Adam on theta would move every parameter by lr, whatever its
    sigma*.)
    """
    theta = trainable(unet)
    check_parameters("the posterior", posterior.mean, "the network", theta)
    torch.manual_seed(seed)
    z = {k: torch.zeros_like(p) for k, p in theta.items()}
    posterior.unwhiten(z, theta)
    kind, options = (torch.optim.Adam, {"betas": (0.9, 0.99)}) if adam else (
        torch.optim.SGD, {"momentum": 0.9})
    optimizer, history = kind(z.values(), lr, **options), []
    with tqdm(range(steps), desc="unlearning", unit="step", disable=not progress) as bar:
        for step in bar:
            if adam:  # whose steps do not shrink by themselves
                optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
            batches = []
            for _ in range(accumulate):
                loss, numbers = objective(unet)
                if not math.isfinite(loss.item()):
                    posterior.unwhiten({k: v.zero_() for k, v in z.items()}, theta)
                    raise UserError(f"the loss became {loss.item()} at step {step + 1}; nothing "
                                    "was written, the old checkpoint is as it was: try a larger "
                                    f"--gamma or a smaller --lr than {lr:g}")
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
            bar.set_postfix({k: f"{v:.4g}" for k, v in history[-1].items()}, refresh=False)
            if objective.finished or (stop is not None and stop.requested):
                break
    P = sum(v.numel() for v in z.values())
    moved = math.sqrt(sum(v.square().sum().item() for v in z.values()) / P)
    return {"steps": len(history), "first": history[0], "last": history[-1],
            "moved_rms_sigma": moved}


# The paper's method ends here. What remains of this file: helpers; what goes beyond the
# paper; the command line.


def trainable(unet):
    return {k: p for k, p in unet.named_parameters() if p.requires_grad}


def prompted(unet, prompts):
    """unet as a function of (x_t, t) alone, with the prompts of the batch."""
    return lambda xt, t: unet(xt, t, *prompts)


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


def measured_posterior(unet, diffusion, images, steps, lr=2e-4, batch_size=64, every=5, seed=0,
                       progress=False):
    """mu* = the weights, sigma* = their spread while the model trains on.

    A DEPARTURE from the paper, whose checkpoints saw D. images: (N, C, H, W) that the
    model itself generated, less those like D_f, so that no data is needed. AdamW at a
    constant lr; the first half of the steps is for the weights to leave theta*, every
    `every`-th of the second half counts. `unet` is unchanged at the end.
    """
    theta_star = {k: v.clone() for k, v in unet.state_dict().items()}
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(unet.parameters(), lr, betas=(0.9, 0.99), weight_decay=0.0)
    running = RunningPosterior(unet.named_parameters())
    for step in tqdm(range(steps), desc="training on, for sigma*", unit="step",
                     disable=not progress):
        x0 = images[torch.randint(len(images), (batch_size,)).to(images.device)]
        training_step(unet, diffusion, optimizer, x0)
        if step >= steps // 2 and (step % every == 0 or step >= steps - 2):
            running.update(unet.named_parameters())
    unet.load_state_dict(theta_star)
    mean = {k: p.detach().clone() for k, p in unet.named_parameters()}
    return GaussianPosterior(mean, running.posterior()["std"], running.n)


# --------------------------------------------------------------------------------------
# BEYOND THE PAPER, ours: stability in function space. B measures each parameter alone,
# so it cannot see a direction that many loose parameters share, and along which
# eps_theta changes for every class. This term measures the change itself, on anchors:
# images that the model itself generates, less those that look like D_f (F would hold on
# to what A pushes away). The paper names inference in function space as future work.


class FunctionSpaceObjective(PaperObjective):
    """L = -(1-gamma) E[ min(a, bound a*) / sqrt(a*) ] / E[ sqrt(a*) ]
    + weight F / E[ a* ] + gamma B, per dimension;
    F = E || eps_theta(x_t, t) - eps_theta*(x_t, t) ||^2.

    a is one image's error at one t and eps, a* the pre-trained network's. Past the
    bound an image counts as forgotten and stops pushing; once `stop_share` of them has,
    it is over. frozen: eps_theta*, called as unet is.  anchors: (M, C, H, W).
    anchor_context: (M, L, E), their encoded prompts, where the network takes any.
    Other arguments: PaperObjective's.
    """

    def __init__(self, *args, frozen, anchors, weight, bound, stop_share, anchor_context=None,
                 **kwargs):
        super().__init__(*args, **kwargs)
        self.frozen, self.anchors, self.anchor_context = frozen, anchors, anchor_context
        self.weight, self.bound, self.stop_share, self.past = weight, bound, stop_share, 0.0

    @property
    def finished(self):
        return self.past >= self.stop_share

    def __call__(self, unet):
        x0, t, eps, prompts = self.draw()
        a = plasticity_loss(prompted(unet, prompts), self.diffusion, x0, t, eps)  # (n,)
        B = stability_loss(trainable(unet), self.posterior)
        with torch.no_grad():
            a_star = plasticity_loss(prompted(self.frozen, prompts), self.diffusion, x0, t, eps)
        bounded = torch.minimum(a, self.bound * a_star)  # (n,)
        weighted = (bounded / a_star.sqrt()).mean() / a_star.sqrt().mean()  # 1 at theta*
        change = self.function_change(unet).mean()
        L = vdu_loss(weighted * self.d, B, self.gamma, self.scale)
        L = L + self.weight * change * self.d / a_star.mean()
        share = (a > self.bound * a_star).float().mean().item()
        self.past = 0.9 * self.past + 0.1 * share
        return L, {"A": a.mean().item() / self.d, "B": B.item() / self.P,
                   "F": change.item() / self.d, "forgotten": self.past}

    def function_change(self, unet):
        """F on a random batch of anchors: (n,), summed over the d dimensions, as A is.

        Half of the batch takes t from all steps, half from those where A pushes: there
        F has most to hold.
        """
        device, half = self.anchors.device, self.batch_size // 2
        index = torch.randint(len(self.anchors), (self.batch_size,)).to(device)
        x0 = self.anchors[index]
        prompts = () if self.anchor_context is None else (self.anchor_context[index],)
        t = torch.cat([stratified_timesteps(half, self.low, self.high, device),
                       stratified_timesteps(self.batch_size - half, 0, self.diffusion.T, device)])
        xt = self.diffusion.q_sample(x0, t, torch.randn_like(x0))
        with autocast(device):
            with torch.no_grad():
                target = self.frozen(xt, t, *prompts)
            prediction = unet(xt, t, *prompts)
        return (prediction - target).square().flatten(1).sum(1)  # (n, C, H, W) -> (n,)


def frozen_copy(unet, posterior):
    """eps_theta*: the network with mu* in place of what moves. For no_grad alone."""
    return lambda *args, **kwargs: functional_call(unet, posterior.mean, args, kwargs)


def generate_anchors(unet, diffusion, forget, n, drop, seed=0, progress=False):
    """n images that the model draws, less the `drop` share most like `forget`."""
    shape = tuple(forget.shape[1:])
    generated = diffusion.sample(unet, n, shape, 25, eta=1.0, seed=seed, progress=progress)
    generated = generated.to(forget.device)
    ratio = looks_forgotten(unet, diffusion, generated, forget)
    return generated[ratio.argsort(descending=True)[: round((1 - drop) * n)]]


@torch.no_grad()
def looks_forgotten(unet, diffusion, generated, forget, neighbours=5):
    """How unlike D_f the network finds each generated image: (N,), small is like D_f.

    In its own features: the distance to the fifth nearest image of D_f over that to the
    fifth nearest other generated image. The ratio asks which of the two sets is denser
    around the image, so that it needs neither a label nor a scale.
    """
    drawn, gone = (middle_features(unet, diffusion, x) for x in (generated, forget[:1000]))
    mean, std = drawn.mean(0), drawn.std(0) + 1e-6
    drawn, gone = (drawn - mean) / std, (gone - mean) / std
    to_gone = torch.cdist(drawn, gone).kthvalue(min(neighbours, len(gone)), dim=1).values  # (N,)
    among = min(neighbours, len(drawn) - 1) + 1  # + 1: the image itself is nearest
    return to_gone / torch.cdist(drawn, drawn).kthvalue(among, dim=1).values


@torch.no_grad()
def middle_features(unet, diffusion, images, at=(50, 150)):
    """The middle block's features at two low noise levels, pooled: (N, 18 C')."""
    levels = []
    for step in at:
        chunks = []
        for x0 in images.split(250):
            t = torch.full((len(x0),), step * diffusion.T // 1000, device=x0.device)
            with autocast(x0.device):
                xt = diffusion.q_sample(x0, t, torch.randn_like(x0))
                h = unet(xt, t, return_middle=True)  # (n, C', h, w)
            size = [min(3, n) for n in h.shape[2:]]
            chunks.append(adaptive_avg_pool2d(h, size).flatten(1))  # (n, 9 C')
        levels.append(torch.cat(chunks))
    return torch.cat(levels, dim=1)


# --------------------------------------------------------------------------------------
# The command line. Defaults were found on MNIST: the first on the digit 1, the second
# mostly on 1, 8 and 9. t: at high noise it is decided which class an image will be.

PAPER = dict(gamma=0.63, lr=0.0083, steps=85, batch_size=256, t_range=[0.7, 1.0])
FUNCTION_SPACE = dict(gamma=0.63, lr=0.03, steps=300, batch_size=64, t_range=[0.3, 1.0])


def main(args):
    """Run the command line. Raises UserError for what the user can put right."""
    for name, value in (FUNCTION_SPACE if args.function_space else PAPER).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    device = pick_device(args.device)
    checkpoint, indices = load_model(args, device)
    output = choose_output(args, checkpoint, indices)
    posterior = choose_posterior(args, checkpoint, device)
    forget = load_forget_images(args, checkpoint, indices).to(device)
    what = args.forget_images or ", ".join(class_titles(checkpoint, indices))
    print(f"forgetting {what}: {len(forget):,} images, gamma {args.gamma:g}, at most "
          f"{args.steps} steps of {args.batch_size} on {device}; "
          f"{origin_of(args, checkpoint, posterior)}")

    began = time.time()
    torch.manual_seed(args.seed)
    posterior, objective = build_objective(args, checkpoint, posterior, forget, indices)
    with StopRequest() as stop:
        record = unlearn(checkpoint.unet, posterior, objective, args.lr, args.steps,
                         adam=bool(args.function_space), seed=args.seed, progress=True, stop=stop)
    save_unlearned(output, args, checkpoint, posterior, indices, len(forget), record)
    print(summary(record, stop.requested, time.time() - began, device))
    hint = "" if indices else " --forget-class CLASS, if the images are of one"
    print(f"wrote {output}; see what came of it: python evaluate.py{hint}")
    if stop.requested:
        raise KeyboardInterrupt


def load_model(args, device):
    """(Checkpoint, indices of the classes to forget); refuses a second forgetting."""
    checkpoint = load_checkpoint(args.checkpoint, device)
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


def choose_output(args, checkpoint, indices):
    """Where the result goes. Raises UserError if that may not be replaced."""
    path = Path(args.checkpoint)
    if checkpoint.data["source"].startswith("published"):  # the result is a checkpoint of ours
        path = Path("checkpoints") / f"{path.stem}.pt"
    classes = [checkpoint.data["classes"][i] for i in indices]
    what = "-".join(classes) or os.path.basename(os.path.abspath(args.forget_images))
    output = args.output or str(path.with_name(f"{path.stem}-forget-{what}{path.suffix}"))
    if os.path.abspath(output) == os.path.abspath(args.checkpoint):
        raise UserError("--output is the --checkpoint itself: evaluate.py needs both, choose "
                        "another")
    check_output(output, args.overwrite)
    return output


def choose_posterior(args, checkpoint, device):
    """The posterior given, kept or guessed; None where it is yet to be measured."""
    parameters = dict(checkpoint.unet.named_parameters())
    if args.posterior and args.self_train:
        raise UserError("--self-train and --posterior both measure sigma*: leave one away")
    if args.posterior:
        posterior = GaussianPosterior.from_checkpoints(args.posterior)
        files = ", ".join(args.posterior)
        check_parameters(files, posterior.mean, args.checkpoint, parameters)
        return posterior.to(device)
    if args.self_train:
        return None
    if checkpoint.posterior:
        return GaussianPosterior(**checkpoint.posterior).to(device)
    if "train" in checkpoint.raw:
        raise UserError(f"{args.checkpoint} holds no posterior yet: its training was interrupted; "
                        "finish it with python train_ddpm.py --resume")
    return guessed_posterior(parameters.items(), args.sigma)


def origin_of(args, checkpoint, posterior):
    """Where the posterior comes from, for the first line of output."""
    if posterior is None:
        return f"posterior of {args.self_train} steps of continued training"
    if posterior.n > 1:
        return f"posterior of {posterior.n} checkpoints"
    return ("one checkpoint and no posterior: sigma* is guessed, "
            f"{100 * args.sigma:g}% of each tensor's root mean square (--self-train N and "
            "--posterior FILE FILE measure it)")


def load_forget_images(args, checkpoint, indices):
    """D_f as (N, C, H, W) in [-1, 1]: files of other classes stay shut."""
    generator = torch.Generator().manual_seed(args.seed)
    if args.forget_images:
        images = load_images(args.forget_images, checkpoint.config["image_shape"])
        order = torch.randperm(len(images), generator=generator)
        return to_float(images[order[: args.forget_samples]])
    images, labels = load_data_of(checkpoint, args.data_root, only=indices)
    chosen = []
    for i in indices:
        of_class = (labels == i).nonzero().flatten()
        order = torch.randperm(len(of_class), generator=generator)
        chosen.append(of_class[order[: args.forget_samples]])
    chosen = torch.cat(chosen)
    if len(indices) > 1:  # mixed, so that any part of them is one of all
        chosen = chosen[torch.randperm(len(chosen), generator=generator)]
    return to_float(images[chosen])


def build_objective(args, checkpoint, posterior, forget, indices):
    """(posterior, objective) as the flags say; measures the posterior if asked."""
    unet, diffusion = checkpoint.unet, checkpoint.diffusion
    frozen = frozen_copy(unet, posterior or guessed_posterior(unet.named_parameters()))
    if args.function_space or args.self_train:
        # Twice the share of D_f among what the model draws: the ranking is not perfect.
        share = min(0.6, 2 * len(indices) / len(checkpoint.data["classes"])) if indices else 0.2
        drop = share if args.drop is None else args.drop
        anchors = generate_anchors(frozen, diffusion, forget, args.anchors, drop, args.seed + 1,
                                   progress=True)
    if args.self_train:
        posterior = measured_posterior(unet, diffusion, anchors, args.self_train, seed=args.seed,
                                       progress=True)
    if args.isotropic:
        posterior = posterior.isotropic()
    common = (diffusion, posterior, forget, args.gamma, args.batch_size, args.t_range)
    if not args.function_space:
        return posterior, PaperObjective(*common)
    return posterior, FunctionSpaceObjective(
        *common, frozen=frozen, anchors=anchors, weight=args.function_space, bound=args.bound,
        stop_share=args.stop_share)


def save_unlearned(output, args, checkpoint, posterior, indices, images, record):
    """The checkpoint again, with the unlearned weights and a record."""
    raw = {k: v for k, v in checkpoint.raw.items() if k != "train"}
    forgotten = {"classes": [checkpoint.data["classes"][i] for i in indices],
                 "images_from": args.forget_images, "images": images,
                 "checkpoint": args.checkpoint, "settings": vars(args), **record}
    save_checkpoint(output, {**raw, "weights": checkpoint.unet.state_dict(),
                             "posterior": vars(posterior), "forgotten": forgotten})


def summary(record, interrupted, seconds, device):
    """What unlearning did, in one line."""
    why = "interrupted, and saved as it stood" if interrupted else "done"
    return (f"{why} after {record['steps']} steps ({seconds:.0f} s, peak memory "
            f"{peak_memory(device)}): A {record['first']['A']:.4f} -> {record['last']['A']:.4f}, "
            f"theta moved {record['moved_rms_sigma']:.4f} sigma (rms over parameters)")


def add_unlearning_flags(p, defaults):
    """The flags that vdu.py and sd_unlearn.py share; defaults: {flag: last words}."""
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


def add_function_space_flags(p, anchors):
    g = p.add_argument_group("beyond the paper")
    g.add_argument("--function-space", type=number(float, 0), default=0.0, metavar="WEIGHT",
                   help="also keep eps_theta as it was on images that the model itself "
                        "generates; 2 works well on MNIST, 5 held photographs better; 0 is off")
    g.add_argument("--anchors", type=number(int, 10), default=anchors, metavar="N",
                   help="images to draw for it")
    g.add_argument("--bound", type=number(float, 1), default=4.0,
                   help="an image whose error is this many times the old one counts as forgotten "
                        "and stops pushing")
    g.add_argument("--stop-share", type=number(float, 0), default=0.8,
                   help="stop once this share of images is past the bound")
    return g


def parser():
    p = ArgumentParser(prog="vdu.py", description=__doc__)
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--forget-class", nargs="+", metavar="CLASS",
                      help="one or several classes to forget, by name")
    what.add_argument("--forget-images", metavar="DIR",
                      help="forget what the images in this folder show: no class, label or "
                           "dataset is needed")
    p.add_argument("--checkpoint", default="checkpoints/mnist.pt", metavar="FILE",
                   help="the trained model: of train_ddpm.py, or DDPM's published weights")
    p.add_argument("--output", metavar="FILE",
                   help="the unlearned model (default: CHECKPOINT-forget-CLASS.pt, in "
                        "checkpoints/ for published weights)")
    p.add_argument("--forget-samples", type=number(int, 1), metavar="N",
                   help="see only N images, of each class if by class (default: all)")
    p.add_argument("--isotropic", action="store_true",
                   help="one sigma for all parameters: what the posterior's shape is worth")
    p.add_argument("--data-root", metavar="DIR",
                   help="folder of the dataset (default: where the model was trained)")
    add_unlearning_flags(p, {k: f"(default: {PAPER[k]}; with --function-space "
                                f"{FUNCTION_SPACE[k]})" for k in PAPER})
    g = add_function_space_flags(p, anchors=2000)
    g.add_argument("--drop", type=number(float, 0, 1, below=True), metavar="SHARE",
                   help="leave out the anchors most like D_f (default: twice the share of the "
                        "forgotten among the classes, 0.2 for --forget-images)")
    g.add_argument("--self-train", type=number(int, 4), metavar="N",
                   help="measure sigma* over N steps of training on, on --anchors images that "
                        "the model itself generates: for a model of one checkpoint")
    add_shared_flags(p)
    return p


if __name__ == "__main__":
    run_command_line(lambda: main(parser().parse_args()))
