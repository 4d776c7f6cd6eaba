"""Stable Diffusion v1: unlearn a feature from published weights and a few images.

    python sd_unlearn.py unlearn --checkpoint sd-v1-4.ckpt --merges merges.txt \\
        --concept "golf ball" --images golf/ --output sd-no-golf.ckpt
    python sd_unlearn.py sample --checkpoint sd-v1-4.ckpt sd-no-golf.ckpt \\
        --merges merges.txt --prompt "a photo of a golf ball" --output golf.png

Their flags: python sd_unlearn.py unlearn --help, python sd_unlearn.py sample --help

Holds    unlearning and sampling; what Stable Diffusion has and a plain DDPM has not:
         the autoencoder, the text encoder, its tokenizer, the file. The network is
         unet.py's with context_dim set, the diffusion ddpm.py's, the method vdu.py's.
Reads    checkpoints in the published layout (sd-v1-1.ckpt .. sd-v1-5.ckpt, or the same
         names in .safetensors), merges, images of what will be forgotten.
Writes   a checkpoint of the same layout; a grid of images.
Paper    VDU (arXiv 2510.04058), its experiments on Stable Diffusion. The
         model: Rombach et al. 2022 (arXiv 2112.10752), called LDM below.

Shapes in the comments: images (B, 3, H, W) in [-1, 1]; latents (B, 4, h, w), h = H/8 in
the published model; L = 77 tokens; E numbers per token (768).
"""

import argparse
import html
import math
import re
import unicodedata
from collections import OrderedDict, namedtuple
from dataclasses import KW_ONLY, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from ddpm import (WEIGHTS, Diffusion, UserError, add_shared_flags, check_finite, check_output,
                  number, pick_device, positive, read_file, run_command_line, save_checkpoint,
                  state_dict_of, to_float, to_uint8, write_images)
from train_ddpm import GaussianPosterior, load_images, moving_parameters
from unet import UNet, normalization, split_heads
from vdu import (FunctionSpaceObjective, Likeness, PaperObjective, add_unlearning_flags,
                 features_of_clean, frozen_network, guessed_posterior, middle_features,
                 print_outcome, share_like, unlearn, with_defaults)

# Stable Diffusion v1: the sizes of its networks, their names in the file, and the
# factor that brings latents to unit variance, in which the diffusion works.
SIZES = {
    "unet": dict(
        in_channels=4,
        model_channels=320,
        channel_mult=(1, 2, 4, 4),
        num_res_blocks=2,
        attention_resolutions=(1, 2, 4),
        num_heads=8,
        context_dim=768),
    "autoencoder": dict(
        ch=128,
        ch_mult=(1, 2, 4, 4),
        num_res_blocks=2),
    "text_encoder": dict(
        vocab_size=49408,
        width=768,
        layers=12,
        num_heads=12,
        mlp_width=3072)}
PREFIX = {"unet": "model.diffusion_model.", "autoencoder": "first_stage_model.",
          "text_encoder": "cond_stage_model.transformer."}
LATENT_CHANNELS = 4
LATENT_SCALE = 0.18215
LENGTH = 77  # tokens of a prompt: one to start, at least one to end


class StableDiffusion(namedtuple("_", "unet autoencoder text_encoder tokenizer diffusion device")):
    """What `load` returns.

    unet          unet(x, t, context) -> eps_theta: latents, (B,), (B, 77, 768)
    autoencoder   .encode(x) -> moments, .decode(z), .to_latents(x), .to_images(z)
    text_encoder  text_encoder(ids) -> context
    tokenizer     tokenizer(texts) -> ids (N, 77)
    diffusion     ddpm.Diffusion with Stable Diffusion's schedule
    device        where they are, but for the tokenizer"""

    @torch.no_grad()
    def context(self, prompts):
        """Prompts (a list of N) -> (N, 77, E)."""
        ids = self.tokenizer(prompts)  # (N, 77)
        return self.text_encoder(ids.to(self.device))


# --------------------------------------------------------------------------------------
# Unlearning

OURS = dict(
    gamma=0.001,
    lr=0.25,
    steps=300,
    batch_size=2,
    accumulate=8,        # batches per step: 16 images of D_f, 2 at once (and 2 kept)
    adam=True,
    t_range=[0.2, 1.0],
    anchors=48,          # images of other prompts, drawn by theta*; as many of each
    parameters="cross-attention")  # where the prompt enters: 5% of the U-Net
PAPER = dict(            # the paper's loss; gamma in vdu.py's unit. Chosen by us
    OURS,
    gamma=0.0002,
    lr=0.03,
    steps=200,
    batch_size=4,
    accumulate=1,
    t_range=[0.2, 0.7])
CHECK_SAMPLES = 16  # for the concept's prompt, before and after
TEMPLATES = ("{}", "a {}", "a photo of a {}", "a picture of a {}", "an image of a {}",
             "a close-up photo of a {}", "a painting of a {}", "a photo of a {} in a scene")
# The empty prompt is among them: guidance uses its prediction, which must not change.
NEUTRAL_PROMPTS = ("", "a photo of a person", "a photo of an animal", "a photo of food",
                   "a photo of a building", "a photo of a landscape", "a photo of an object",
                   "a painting", "a portrait", "a street", "a room", "a drawing")


@dataclass
class PromptedObjective(FunctionSpaceObjective):
    """FunctionSpaceObjective with prompts. In (b) of vdu.py, theta* with the empty
    prompt stands for eps_theta*, that of all images, and with the concept's prompt for
    eps_f, that of D_f. So (b)'s minimum, for its K = infinity, is known without noise.
    It is the target: eps_theta* + w/(1-w) (eps_theta* - eps_f), as in ESD (Gandikota et
    al. 2023).  empty: (1, L, E)."""

    _: KW_ONLY
    empty: torch.Tensor  # the encoded prompt of no words

    K = 3.0  # not (b)'s K: w/(1-w), as if of images like x_t three in four were of D_f

    def __post_init__(self):
        super().__post_init__()
        self.weight_of_forget = self.rho  # no noise to damp: not rho/K

    def eps_target(self, xt, t, eps, eps_f):
        """eps_theta* + K (eps_theta* - eps_f), eps_theta* for the empty prompt. With
        the prompts of D_f FunctionSpaceObjective has computed eps_f, which it hands
        over as its eps_star. eps, the noise, is not used."""
        prompts = self.empty.expand(len(xt), -1, -1)
        eps_star = self.frozen(xt, t, prompts).float()
        return eps_star + self.K * (eps_star - eps_f)


def run_unlearn(args):
    """sd_unlearn.py unlearn. Raises UserError for what the user can put right."""
    args = with_defaults(args, OURS, PAPER)
    check_output(args.output, args.overwrite, WEIGHTS)
    if args.concept.strip().lower() in ["", *map(str.lower, args.keep)]:
        raise UserError("--concept must say what will be forgotten, and --keep something else")
    device = pick_device(args.device)
    torch.manual_seed(args.seed)

    # What is given: the model, its posterior, images. Say what will happen.
    model = load(args.checkpoint, args.merges, device)
    images = load_images(args.images, (3, args.size, args.size))
    posterior = choose_moving(model.unet, args)
    print(f"forgetting {args.concept!r}: images {len(images)}, of {args.size} pixels, moving "
          f"{args.parameters} parameters in {args.steps} steps, on {device}; posterior of "
          f"{posterior.n} checkpoints (with 1, sigma* is a guess)")
    objective, likeness = choose_objective(model, posterior, to_float(images), args)

    # Unlearn; and draw from the same noise before and after.
    def share_of_concept():
        prompt = TEMPLATES[2].format(args.concept)
        latents = sample_latents(model, prompt, CHECK_SAMPLES, args.size, args.seed,
                                 args.batch_size)
        return share_like(likeness(latents))

    was_like = share_of_concept()
    record = unlearn(model.unet, posterior, objective, args.lr, args.steps, args.adam,
                     args.accumulate, args.seed)
    record["like_D_f"] = [was_like, share_of_concept()]
    print_outcome(record, args)

    # The file: the checkpoint with other weights, and what was done.
    record.update(images=len(images), settings=vars(args))
    moved = moving_parameters(model.unet)
    save(args.output, args.checkpoint, moved, record, args.overwrite)
    print(f"wrote {args.output}; look at it: python sd_unlearn.py sample --checkpoint "
          f"{args.checkpoint} {args.output} ...")


def choose_moving(unet, args):
    """The posterior of the parameters that move, measured over checkpoints or guessed
    from one; the U-Net is set to its mean, and the other parameters are frozen."""
    for k, p in unet.named_parameters():  # the others stay as they are
        p.requires_grad_(args.parameters == "all" or ".attn2." in k)

    def read_unet(path):
        return {k.removeprefix(PREFIX["unet"]): v for k, v in read_tensors(path).items()}

    if args.posterior:
        posterior = GaussianPosterior.from_checkpoints(args.posterior, unet, read_unet)
    else:
        posterior = guessed_posterior(moving_parameters(unet).items())
    unet.load_state_dict(posterior.mean, strict=False)  # theta* = mu*
    return posterior


def choose_objective(model, posterior, images, args):
    """(the loss, Likeness) of images (N, 3, H, W) in [-1, 1]."""
    # D_f as latents, one by one, which bounds the memory; with its prompts ...
    to_latents = model.autoencoder.to_latents
    latents = [to_latents(image.to(model.device)) for image in images.split(1)]
    forget = torch.cat(latents)  # (N, 4, h, w)
    prompts = [template.format(args.concept) for template in TEMPLATES]
    context = model.context(prompts)
    arguments = (model.diffusion, posterior, forget, args.gamma, args.batch_size,
                 args.t_range, context)
    # made now, so that a wrong t_range ends it before any drawing; paper alone keeps it
    objective = PaperObjective(*arguments, bound_weights=args.bound_weights)

    # ... and what theta* draws for other prompts: as many images of each.
    others = [prompt for prompt in NEUTRAL_PROMPTS if args.concept.lower() not in prompt]
    for name in args.keep:
        others += [template.format(name) for template in TEMPLATES]
    each = math.ceil(args.anchors / len(others))  # images of each prompt
    kept = []
    for seed, prompt in enumerate(others, args.seed + 1):
        kept.append(sample_latents(model, prompt, each, args.size, seed, args.batch_size))
    kept = torch.cat(kept)
    kept_context = model.context(others).repeat_interleave(each, 0)

    # `kept` is taken to hold nothing of D_f. So in both together the share of D_f is
    # known: they stand for theta*'s own samples, in which w is learned.
    empty = model.context([""])
    both = torch.cat([forget, kept])
    frozen = frozen_network(model.unet, posterior)
    features = middle_features(model.unet, frozen, empty)
    of_clean = features_of_clean(features, model.diffusion)
    likeness = Likeness(of_clean, forget, both, len(forget) / len(both))

    if not args.paper:
        objective = PromptedObjective(*arguments, frozen=frozen, kept=kept, rho=args.share or 0.5,
                                      kept_context=kept_context, empty=empty)
    return objective, likeness


# --------------------------------------------------------------------------------------
# Sampling

def guided(unet, contexts, scale):
    """Classifier-free guidance (Ho & Salimans 2021, eq. 6), as a function of (x, t):
    eps(negative) + scale (eps(prompt) - eps(negative)).
    contexts: (2, L, E), of the negative prompt and of the prompt."""
    def eps_theta(x, t):
        # both in one batch: (2B, L, E)
        prompts = contexts.repeat_interleave(len(x), 0)
        xx = torch.cat([x, x])
        tt = torch.cat([t, t])
        eps_negative, eps_prompt = unet(xx, tt, prompts).chunk(2)  # 2 x (B, 4, h, w)
        return eps_negative + scale * (eps_prompt - eps_negative)

    return eps_theta


def sample_latents(model, prompt, n, size, seed, batch_size, steps=20, guidance=5.0):
    """n latents (n, 4, h, w) for one prompt, by DDIM, on the model's device.
    size: in pixels, rounded down to whole latents, as the encoder does."""
    print(f"drawing {n} images for {prompt!r}")
    side = size // model.autoencoder.factor  # latent pixels
    shape = (LATENT_CHANNELS, side, side)
    contexts = model.context(["", prompt])
    eps_theta = guided(model.unet, contexts, guidance)
    latents = model.diffusion.sample(eps_theta, n, shape, steps, seed=seed, clip=False,
                                     batch_size=batch_size)
    return latents.to(model.device)


def run_sample(args):
    """sd_unlearn.py sample: a row per prompt, a block of columns per checkpoint, the
    same noise in each block."""
    check_output(args.output, args.overwrite, (".png",))
    device = pick_device(args.device)
    for checkpoint in args.checkpoint:  # all are there before the first draws
        read_tensors(checkpoint)

    blocks = []
    for checkpoint in args.checkpoint:
        model = load(checkpoint, args.merges, device)
        rows = []
        for prompt in args.prompt:
            z = sample_latents(model, prompt, args.n, args.size, args.seed, args.batch_size,
                               args.sampling_steps, args.guidance)
            rows.append(model.autoencoder.to_images(z))  # (n, 3, H, W)
        blocks.append(torch.cat(rows))
        del model  # before the next is read: one copy of the weights at a time

    write_images(args.output, blocks, args.overwrite, nrow=args.n)
    print(f"wrote {args.output}: a row per prompt, {args.n} images per checkpoint")


# --------------------------------------------------------------------------------------
# The autoencoder: images <-> latents, `first_stage_model.` in the file (LDM, section
# 3.1). Names of layers are those of its file.

def named(**layers):
    """The layers in a row, by name."""
    return nn.Sequential(OrderedDict(layers))


class ResnetBlock(nn.Module):
    """x + f(x): unet.py's ResBlock without a time step."""

    def __init__(self, channels, out_channels):
        super().__init__()
        self.norm1 = normalization(channels, 1e-6)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = normalization(out_channels, 1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        # x joins f(x) as it is, or through a 1x1 convolution to the new width.
        self.nin_shortcut = nn.Identity()
        if channels != out_channels:
            self.nin_shortcut = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))  # (B, C, h, w) -> (B, C', h, w)
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class PixelAttention(nn.Module):
    """x + attention(x), in one head, over all pixels."""

    def __init__(self, channels):
        super().__init__()
        self.norm = normalization(channels, 1e-6)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        h = self.norm(x)
        # mT swaps the last two dimensions
        q = self.q(h).flatten(2).mT  # (B, C, h, w) -> (B, hw, C)
        k = self.k(h).flatten(2).mT
        v = self.v(h).flatten(2).mT
        h = F.scaled_dot_product_attention(q, k, v)
        h = h.mT.unflatten(2, x.shape[-2:])  # (B, C, h, w)
        return x + self.proj_out(h)


def middle(channels):
    """Two residual blocks with attention between them."""
    return named(
        block_1=ResnetBlock(channels, channels),
        attn_1=PixelAttention(channels),
        block_2=ResnetBlock(channels, channels))


def blocks(channels, out_channels, n):
    """n residual blocks, the first of which changes the width."""
    layers = [ResnetBlock(channels, out_channels)]
    for _ in range(n - 1):
        layers.append(ResnetBlock(out_channels, out_channels))
    return nn.Sequential(*layers)


def encoder(ch, ch_mult, num_res_blocks):
    """Images -> mean and log-variance of the latents, before quant_conv.
    ch, ch_mult: widths, each level half the size of the last."""
    conv_in = nn.Conv2d(3, ch, 3, padding=1)
    # Level by level: residual blocks, then half the size, but for the last.
    levels = []
    width = ch
    for mult in ch_mult:
        out = ch * mult
        downsample = nn.Identity()
        if len(levels) < len(ch_mult) - 1:  # to H/2, W/2
            # Padded on the right and below only, as the published network is.
            downsample = named(
                pad=nn.ZeroPad2d((0, 1, 0, 1)),
                conv=nn.Conv2d(out, out, 3, stride=2))
        block = blocks(width, out, num_res_blocks)
        levels.append(named(block=block, downsample=downsample))
        width = out
    return named(
        conv_in=conv_in,
        down=nn.Sequential(*levels),
        mid=middle(width),
        norm_out=normalization(width, 1e-6),
        silu=nn.SiLU(),
        conv_out=nn.Conv2d(width, 2 * LATENT_CHANNELS, 3, padding=1))


def decoder(ch, ch_mult, num_res_blocks):
    """Latents, after post_quant_conv, -> images."""
    widths = [ch * mult for mult in ch_mult]
    smallest = widths[-1]  # of the level of smallest size: where it begins
    conv_in = nn.Conv2d(LATENT_CHANNELS, smallest, 3, padding=1)
    mid = middle(smallest)
    # The same levels; numbered from the largest, run from the smallest.
    inputs = [*widths[1:], smallest]  # of each level: what the one below it returns
    levels = {}
    for i, out in enumerate(widths):
        upsample = nn.Identity()
        if i > 0:  # to 2h, 2w
            upsample = named(
                up=nn.Upsample(scale_factor=2.0),
                conv=nn.Conv2d(out, out, 3, padding=1))
        block = blocks(inputs[i], out, num_res_blocks + 1)
        levels[str(i)] = named(block=block, upsample=upsample)
    from_smallest = OrderedDict(reversed(levels.items()))
    return named(
        conv_in=conv_in,
        mid=mid,
        up=nn.Sequential(from_smallest),
        norm_out=normalization(ch, 1e-6),
        silu=nn.SiLU(),
        conv_out=nn.Conv2d(ch, 3, 3, padding=1))


class Autoencoder(nn.Module):
    """The KL autoencoder: q(z | x) = N(mean, exp(logvar)), and its decoder."""

    def __init__(self, ch, ch_mult, num_res_blocks):
        super().__init__()
        self.encoder = encoder(ch, ch_mult, num_res_blocks)
        self.decoder = decoder(ch, ch_mult, num_res_blocks)
        self.quant_conv = nn.Conv2d(2 * LATENT_CHANNELS, 2 * LATENT_CHANNELS, 1)
        self.post_quant_conv = nn.Conv2d(LATENT_CHANNELS, LATENT_CHANNELS, 1)
        self.factor = 2 ** (len(ch_mult) - 1)  # pixels per latent pixel

    def encode(self, x):
        """(B, 3, H, W) in [-1, 1] -> moments (B, 8, h, w): mean and log-variance."""
        return self.quant_conv(self.encoder(x))

    def decode(self, z):
        """Unscaled latents (B, 4, h, w) -> images (B, 3, H, W), about in [-1, 1]."""
        return self.decoder(self.post_quant_conv(z))

    @torch.no_grad()
    def to_latents(self, x):
        """Images -> a sample of the diffusion's latents, (B, 4, h, w)."""
        mean, logvar = self.encode(x).chunk(2, dim=1)  # 2 x (B, 4, h, w)
        std = (logvar.clamp(-30, 20) / 2).exp()  # as the published code clamps it
        return LATENT_SCALE * (mean + std * torch.randn_like(mean))

    @torch.no_grad()
    def to_images(self, z):
        """The diffusion's latents (B, 4, h, w) -> uint8 (B, 3, H, W), on the CPU.
        One at a time, which bounds the memory."""
        images = []
        for latent in z.split(1):
            x = self.decode(latent / LATENT_SCALE)  # (1, 3, H, W)
            images.append(to_uint8(x).cpu())
        return torch.cat(images)


# --------------------------------------------------------------------------------------
# The text encoder: token ids -> context, `cond_stage_model.transformer.` in the file
# (CLIP, Radford et al. 2021)

class SelfAttention(nn.Module):
    """Causal self-attention: a token sees those before it."""

    def __init__(self, width, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x):
        q = split_heads(self.q_proj(x), self.num_heads)  # (B, heads, L, E/heads)
        k = split_heads(self.k_proj(x), self.num_heads)
        v = split_heads(self.v_proj(x), self.num_heads)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, heads, L, E/heads)
        return self.out_proj(h.transpose(1, 2).flatten(2))  # (B, L, E)


class TextLayer(nn.Module):
    """Tokens attend to those before them, then each passes two layers by itself."""

    def __init__(self, width, num_heads, mlp_width):
        super().__init__()
        self.self_attn = SelfAttention(width, num_heads)
        self.layer_norm1 = nn.LayerNorm(width)
        self.layer_norm2 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({
            "fc1": nn.Linear(width, mlp_width),
            "fc2": nn.Linear(mlp_width, width)})

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))  # (B, L, E)
        h = self.mlp["fc1"](self.layer_norm2(x))
        h = h * (1.702 * h).sigmoid()  # CLIP's "quick GELU"
        return x + self.mlp["fc2"](h)


class TextEncoder(nn.Module):
    """CLIP ViT-L/14's text tower: ids (B, L) -> its last hidden state, (B, L, E)."""

    def __init__(self, vocab_size, width, layers, num_heads, mlp_width):
        super().__init__()
        # Modules in modules, for the names that they have in the file.
        layers = [TextLayer(width, num_heads, mlp_width) for _ in range(layers)]
        embeddings = nn.ModuleDict({
            "token_embedding": nn.Embedding(vocab_size, width),
            "position_embedding": nn.Embedding(LENGTH, width)})
        self.text_model = nn.ModuleDict({
            "embeddings": embeddings,
            "encoder": named(layers=nn.Sequential(*layers)),
            "final_layer_norm": nn.LayerNorm(width)})

    def forward(self, ids):
        embeddings = self.text_model["embeddings"]  # of tokens, and of their places
        x = embeddings["token_embedding"](ids)  # (B, L) -> (B, L, E)
        x = x + embeddings["position_embedding"].weight[: ids.shape[1]]
        return self.text_model["final_layer_norm"](self.text_model["encoder"](x))


class Tokenizer:
    """CLIP's byte-pair encoding: texts -> ids (N, 77), from start token to end token.

    merges: a merges.txt; a header line, then a pair per line, the most frequent first.
    A file of other text gives another number of ids, and is not refused here."""

    def __init__(self, merges):
        with open(merges, encoding="utf-8", errors="replace") as f:
            lines = f.readlines()[1:]  # below the header
        pairs = [tuple(line.split()) for line in lines]

        # Bytes that print stand for themselves, the others for characters 256, 257, ...
        printable = [b for b in range(256) if chr(b).isprintable() and b != ord(" ")]
        others = [b for b in range(256) if b not in printable]
        self.byte_symbol = {b: chr(b) for b in printable}
        for i, b in enumerate(others, 256):
            self.byte_symbol[b] = chr(i)

        # Ids: the 256 bytes, the same ending a word, the merges, start, end.
        symbols = list(self.byte_symbol.values())
        symbols += [s + "</w>" for s in symbols]
        symbols += ["".join(pair) for pair in pairs]
        symbols += ["<|startoftext|>", "<|endoftext|>"]
        self.id = {symbol: i for i, symbol in enumerate(symbols)}  # in that order
        self.rank = {pair: i for i, pair in enumerate(pairs)}  # 0: the most frequent

    def __call__(self, texts):
        """A list of texts -> (N, 77) int64, cut or padded with the end token."""
        start = self.id["<|startoftext|>"]
        end = self.id["<|endoftext|>"]
        rows = []
        for text in texts:
            row = [start]
            for word in self.words(text):
                row += self.word_ids(word)
            lost = len(row) - (LENGTH - 1)  # how many do not fit
            if lost > 0:
                print(f"the model reads {LENGTH - 2} tokens of a prompt, and of this one not "
                      f"the last {lost}: {text[:60]}...")
            row = row[: LENGTH - 1]
            padding = [end] * (LENGTH - len(row))
            rows.append(row + padding)
        return torch.tensor(rows)

    def words(self, text):
        """Runs of letters, single digits, runs of anything else, contractions."""
        text = unicodedata.normalize("NFC", text)
        text = html.unescape(text).lower()
        # re has no \p{L} and \p{N} for Unicode's letters and digits: spell them out
        letters = "a-z"  # what stands between [ and ]
        digits = "0-9"
        for c in set(text):
            if c.isalpha():
                letters += c
            elif c.isnumeric():
                digits += c
        return re.findall(rf"'s|'t|'re|'ve|'m|'ll|'d|[{letters}]+|[{digits}]|"
                          rf"[^\s{letters}{digits}]+", text)

    def word_ids(self, word):
        """Byte-pair encoding (Sennrich et al. 2016): join the most frequent pair, again
        and again, until no pair is left that is in the merges."""
        # Every byte a symbol, the last one marked.
        symbols = [self.byte_symbol[b] for b in word.encode("utf-8")]
        symbols[-1] += "</w>"
        while True:
            pairs = list(zip(symbols, symbols[1:]))
            known = [pair for pair in pairs if pair in self.rank]
            if not known:
                return [self.id[symbol] for symbol in symbols]
            # Join this pair where it first stands. (Where it stands again, it is still
            # the most frequent: a pair with what was joined comes later in the merges.)
            pair = min(known, key=self.rank.get)
            i = pairs.index(pair)
            symbols[i : i + 2] = ["".join(pair)]


# --------------------------------------------------------------------------------------
# The file

KINDS = {"unet": UNet, "autoencoder": Autoencoder, "text_encoder": TextEncoder}


def read_tensors(path):
    """{name: tensor} of a published checkpoint, left on disk until they are used."""
    return state_dict_of(read_file(path, lazy=True))


def load(checkpoint, merges, device="cpu"):
    """A Stable Diffusion v1 checkpoint and CLIP's merges as a StableDiffusion.
    Holds one copy of the weights, as float32. Raises UserError for a file that is
    missing, damaged, not weights, or of another architecture, and for other merges."""
    # The tokenizer, then the networks, one by one.
    tensors = read_tensors(checkpoint)
    tokenizer = Tokenizer(merges)
    tokens = SIZES["text_encoder"]["vocab_size"]
    if len(tokenizer.id) != tokens:
        raise UserError(f"{merges} makes {len(tokenizer.id)} tokens, not {tokens}: take the "
                        "tokenizer/merges.txt of a Stable Diffusion v1 repository")
    networks = {}
    for name, kind in KINDS.items():
        with torch.device("meta"):  # sizes without memory: the weights come from the file
            network = kind(**SIZES[name])
        fill(network, tensors, PREFIX[name], checkpoint)
        networks[name] = network.eval().requires_grad_(False).to(device)
    diffusion = Diffusion("scaled_linear").to(device)  # it is in no file
    return StableDiffusion(**networks, tokenizer=tokenizer, diffusion=diffusion, device=device)


def fill(network, tensors, prefix, checkpoint):
    """Give a network on the meta device its weights, out of a file's {name: tensor}.
    Raises UserError unless there is one of the right shape for each."""
    weights = {}
    for name, v in network.state_dict(prefix=prefix).items():  # shapes alone
        if name not in tensors or tensors[name].shape != v.shape:
            raise UserError(f"{checkpoint} is not a Stable Diffusion v1 checkpoint: {name} is "
                            "missing or of another shape")
        # float32 stays on disk until it is used; what is narrower is widened in memory
        weights[name.removeprefix(prefix)] = tensors[name].float()
    check_finite(checkpoint, weights)
    network.load_state_dict(weights, assign=True)


def save(path, checkpoint, weights, record, overwrite):
    """Write the tensors of `checkpoint` again as `path`, with the U-Net's `weights` as
    float32: in half precision a small move of a weight would be rounded away."""
    # without the moving averages of training, a copy that remembers
    state = {k: v for k, v in read_tensors(checkpoint).items() if not k.startswith("model_ema.")}
    for k, v in weights.items():
        state[PREFIX["unet"] + k] = v.detach().cpu()
    save_checkpoint(path, {"state_dict": state, "vdu": record}, overwrite)


# --------------------------------------------------------------------------------------
# The command line

def parser():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True)
    # Two commands, with some flags in common.
    sample = commands.add_parser("sample", help="draw images for one or several prompts")
    gone = commands.add_parser("unlearn", help="make the model forget a feature")
    for command in (sample, gone):
        add = command.add_argument
        add("--merges", required=True, help="CLIP's merges.txt")
        add("--size", type=number(int, 8), default=512,
            help="pixels, rounded down to a multiple of 8 (default: 512)")
        add_shared_flags(command)
    # sample's own
    add = sample.add_argument
    add("--checkpoint", required=True, nargs="+", help="a block of columns each")
    add("--prompt", required=True, nargs="+", help="a row of images each")
    add("--output", default="sample.png", help="a grid (default: sample.png)")
    add("--n", type=positive, default=4, help="images a prompt (default: 4)")
    add("--batch-size", type=positive, default=4, help="at once (default: 4)")
    add("--sampling-steps", type=positive, default=50, help="default: 50")
    add("--guidance", type=number(float, 0), default=7.5, help="default: 7.5")
    # unlearn's own; those of the losses are vdu.py's
    add = gone.add_argument
    add("--checkpoint", required=True, help="a Stable Diffusion v1 file")
    add("--concept", required=True, help='as prompts name it: "golf ball"')
    add("--images", required=True, help="a folder of images of it")
    add("--output", required=True, help="the unlearned checkpoint")
    add("--parameters", choices=["cross-attention", "all"], help="what moves: 5%% of the U-Net, "
        "where the prompt enters (default, 10 GiB), or all (25 GiB)")
    add("--accumulate", type=positive, help="batches per step (default: 8, 1 with --paper)")
    add("--keep", nargs="+", default=[], help="neighbours of it that must stay")
    add_unlearning_flags(gone, OURS, PAPER, "0.5")
    return p


def main(args):
    """Run the command line. Raises UserError for what the user can put right."""
    if args.command == "sample":
        run_sample(args)
    else:
        run_unlearn(args)


if __name__ == "__main__":
    run_command_line(main, parser())
