"""The network eps_theta(x_t, t): one U-Net for every dataset of this repository.

Holds    UNet and its blocks: sinusoidal time embedding, residual block, self-attention,
         down- and upsampling; for text-to-image models the spatial transformer, which
         attends to the prompt as well; and the names that others give to the weights.
Reads    nothing.            Writes    nothing.
Paper    VDU (arXiv 2510.04058) takes this network as given: it moves its weights.
         The architecture is DDPM's (Ho et al. 2020, appendix B); the modules bear the
         names of Stable Diffusion v1's files, so that the same class can load those.

Shapes in the comments: B images, C channels, H x W pixels, E = 4 * model_channels (the
time embedding's width), L tokens of context_dim numbers (the encoded prompt), h
attention heads.
"""

import math
import re

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


def timestep_embedding(t, dim, max_period=10_000, sin_first=False):
    """Sinusoidal embedding of the time step (Vaswani et al. 2017, section 3.5).

    t: (B,) step indices, integer or float.  Returns (B, dim) float32: cos(t w_k) beside
    sin(t w_k), with frequencies w_k falling geometrically from 1 to 1/max_period: the
    slow ones tell early from late, the fast ones tell neighbouring steps apart.
    sin_first: DDPM's own order, which reaches the last frequency 1/max_period itself,
    where Stable Diffusion's stops one short of it.
    """
    half = dim // 2
    last = half - 1 if sin_first else half
    k = torch.arange(half, device=t.device, dtype=torch.float32)
    freqs = torch.exp(-math.log(max_period) * k / last)
    args = t.float()[:, None] * freqs[None]  # (B, half)
    emb = [args.sin(), args.cos()] if sin_first else [args.cos(), args.sin()]
    return F.pad(torch.cat(emb, dim=1), (0, dim % 2))  # (B, dim)


def normalization(channels, eps=1e-5):
    """GroupNorm in 32 groups, or in the most that divide both 32 and `channels`."""
    return nn.GroupNorm(math.gcd(32, channels), channels, eps=eps)


def zero_module(module):
    """Zero the weights: a residual branch that starts so starts as the identity."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


class ResBlock(nn.Module):
    """x + f(x, t): two 3x3 convolutions, the time embedding added between them."""

    def __init__(self, channels, out_channels, emb_channels, dropout, norm_eps=1e-5):
        super().__init__()
        self.in_layers = nn.Sequential(
            normalization(channels, norm_eps),
            nn.SiLU(),
            nn.Conv2d(channels, out_channels, 3, padding=1),
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels))
        self.out_layers = nn.Sequential(
            normalization(out_channels, norm_eps),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_module(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection = (
            nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)
        )

    def forward(self, x, emb):
        h = self.in_layers(x)  # (B, C, H, W) -> (B, C', H, W)
        h = h + self.emb_layers(emb)[:, :, None, None]  # (B, E) -> (B, C', 1, 1): every pixel's
        return self.skip_connection(x) + self.out_layers(h)  # (B, C', H, W)


class AttentionBlock(nn.Module):
    """x + attention(x): every pixel attends to every pixel: distant strokes agree."""

    def __init__(self, channels, num_heads, norm_eps=1e-5):
        super().__init__()
        self.num_heads = num_heads
        self.norm = normalization(channels, norm_eps)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero_module(nn.Conv1d(channels, channels, 1))

    def forward(self, x):
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x).flatten(2))  # (B, C, HW) -> (B, 3C, HW)
        qkv = qkv.view(B, 3, self.num_heads, C // self.num_heads, H * W).transpose(3, 4)
        q, k, v = qkv.unbind(1)  # 3 x (B, h, HW, C/h)
        h = F.scaled_dot_product_attention(q, k, v)  # softmax(q k^T / sqrt(C/h)) v
        h = h.transpose(2, 3).reshape(B, C, H * W)
        return x + self.proj_out(h).view(B, C, H, W)


def split_heads(x, num_heads):
    """(B, N, C) -> (B, h, N, C/h)."""
    return x.unflatten(2, (num_heads, -1)).transpose(1, 2)


class CrossAttention(nn.Module):
    """Attention from x to a context: the encoded prompt, or x where there is none
    (Rombach et al. 2022, section 3.3)."""

    def __init__(self, channels, context_dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim, channels, bias=False)
        self.to_v = nn.Linear(context_dim, channels, bias=False)
        # the second is a dropout of 0 in the published model
        self.to_out = nn.Sequential(nn.Linear(channels, channels), nn.Identity())

    def forward(self, x, context=None):
        context = x if context is None else context  # (B, L, context_dim)
        qkv = (self.to_q(x), self.to_k(context), self.to_v(context))
        h = F.scaled_dot_product_attention(*(split_heads(y, self.num_heads) for y in qkv))
        return self.to_out(h.transpose(1, 2).flatten(2))  # (B, h, N, C/h) -> (B, N, C)


class GEGLU(nn.Module):
    """a * gelu(b), a, b linear maps of x: one half gates the other (Shazeer 2020)."""

    def __init__(self, channels, out_channels):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * out_channels)

    def forward(self, x):
        a, gate = self.proj(x).chunk(2, dim=-1)  # (B, N, C) -> 2 x (B, N, C')
        return a * F.gelu(gate)


class FeedForward(nn.Module):
    """Two layers, four times as wide inside, pixel by pixel."""

    def __init__(self, channels):
        super().__init__()
        self.net = nn.Sequential(
            GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)
        )

    def forward(self, x):
        return self.net(x)


class TransformerBlock(nn.Module):
    """Pixels attend to each other (attn1), to the prompt (attn2), then alone (ff)."""

    def __init__(self, channels, context_dim, num_heads):
        super().__init__()
        self.attn1 = CrossAttention(channels, channels, num_heads)
        self.ff = FeedForward(channels)
        self.attn2 = CrossAttention(channels, context_dim, num_heads)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))

    def forward(self, x, context):  # (B, HW, C), (B, L, context_dim)
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """x + transformer(x, context): where the prompt enters the network."""

    def __init__(self, channels, num_heads, context_dim):
        super().__init__()
        self.norm = normalization(channels, eps=1e-6)  # here alone; its residual blocks keep 1e-5
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            [TransformerBlock(channels, context_dim, num_heads)]
        )
        self.proj_out = zero_module(nn.Conv2d(channels, channels, 1))

    def forward(self, x, context):
        H, W = x.shape[-2:]
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, HW, C)
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + self.proj_out(h.transpose(1, 2).unflatten(2, (H, W)))  # (B, C, H, W)


class Downsample(nn.Module):
    """Halve height and width with a strided convolution (an odd size rounds up).

    pad_end: a border of zeros at the right and the bottom only, as TensorFlow pads and
    DDPM's own weights expect.
    """

    def __init__(self, channels, pad_end=False):
        super().__init__()
        self.pad_end = pad_end
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if pad_end else 1)

    def forward(self, x):
        if self.pad_end:
            x = F.pad(x, (0, 1, 0, 1))
        return self.op(x)  # (B, C, H, W) -> (B, C, ceil(H/2), ceil(W/2))


class Upsample(nn.Module):
    """Return to the matching skip connection's size: double, or one less."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, size):
        return self.conv(F.interpolate(x, size=size, mode="nearest"))  # -> (B, C, *size)


class TimestepEmbedSequential(nn.Sequential):
    """Call each layer with what it needs beside x: time, prompt, or size."""

    def forward(self, x, emb, context=None, size=None):
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            elif isinstance(layer, Upsample):
                x = layer(x, size)
            else:  # a convolution, self-attention
                x = layer(x)
        return x


class UNet(nn.Module):
    """eps_theta(x_t, t): predicts eps in x_t = sqrt(abar_t) x_0 + sqrt(1-abar_t) eps.

    in_channels            channels of the images (and of the noise it returns)
    model_channels         width of the first level
    channel_mult           width of each level, in model_channels; each halves the size
    num_res_blocks         residual blocks per level on the way down (one more up)
    attention_resolutions  downsampling factors (1, 2, 4, ...) of levels with attention
    num_heads              attention heads; or head_channels, the channels of each
    context_dim            None: self-attention, and no context. Otherwise a spatial
                           transformer stands in its place and attends to a context of
                           that width too: Stable Diffusion's encoded prompt.
    dropout                inside the residual blocks
    patch_size             space-to-depth factor p: the network works on (H/p) x (W/p)
                           "pixels" of p*p*C numbers. 2 costs a quarter of 1.
    alpha_bar              None: the last layer gives eps_theta itself, as in DDPM and
                           Stable Diffusion. A (T,) schedule: that output is v, and
                           eps_theta = sqrt(1-abar_t) x_t + sqrt(abar_t) v. Still a
                           prediction of eps, and the same loss, but the network
                           computes the velocity of Salimans & Ho (2022), of unit scale
                           at every t. Without it, near t = T, it must copy x_t through
                           all its layers to within sqrt(abar_t), since an error e in
                           eps is one of e sqrt((1-abar_t)/abar_t) in x_0: more than
                           bfloat16 can give.
    norm_eps, sin_first, pad_end
                           1e-6, True, True in DDPM's published weights; see
                           normalization, timestep_embedding, Downsample.
    """

    def __init__(self, in_channels=1, model_channels=64, channel_mult=(1, 2), num_res_blocks=1,
                 attention_resolutions=(2,), num_heads=4, dropout=0.0, patch_size=1,
                 alpha_bar=None, context_dim=None, norm_eps=1e-5, sin_first=False, pad_end=False,
                 head_channels=None):
        super().__init__()
        self.model_channels, self.sin_first, self.patch_size = model_channels, sin_first, patch_size
        self.gradient_checkpointing = False  # True: compute activations again on the way back
        # The schedule belongs to ddpm.py: persistent=False keeps it out of state_dict.
        self.register_buffer("alpha_bar", alpha_bar, persistent=False)

        emb_channels = 4 * model_channels
        self.time_embed = nn.Sequential(nn.Linear(model_channels, emb_channels), nn.SiLU(),
                                        nn.Linear(emb_channels, emb_channels))

        def residual(channels, out_channels):
            return ResBlock(channels, out_channels, emb_channels, dropout, norm_eps)

        def attention(channels):
            heads = channels // head_channels if head_channels else num_heads
            if context_dim is None:
                return AttentionBlock(channels, heads, norm_eps)
            return SpatialTransformer(channels, heads, context_dim)

        ch = model_channels
        io_channels = in_channels * patch_size**2
        layer = nn.Conv2d(io_channels, ch, 3, padding=1)
        self.input_blocks = nn.ModuleList([TimestepEmbedSequential(layer)])
        skip_channels = [ch]  # what each input block hands across to its output block
        factor = 1  # downsampling so far
        for level, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                layers = [residual(ch, mult * model_channels)]
                ch = mult * model_channels
                if factor in attention_resolutions:
                    layers.append(attention(ch))
                self.input_blocks.append(TimestepEmbedSequential(*layers))
                skip_channels.append(ch)
            if level < len(channel_mult) - 1:
                self.input_blocks.append(TimestepEmbedSequential(Downsample(ch, pad_end)))
                skip_channels.append(ch)
                factor *= 2

        self.middle_block = TimestepEmbedSequential(
            residual(ch, ch), attention(ch), residual(ch, ch)
        )

        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(channel_mult))):
            for i in range(num_res_blocks + 1):
                layers = [residual(ch + skip_channels.pop(), mult * model_channels)]
                ch = mult * model_channels
                if factor in attention_resolutions:
                    layers.append(attention(ch))
                if level > 0 and i == num_res_blocks:
                    layers.append(Upsample(ch))
                    factor //= 2
                self.output_blocks.append(TimestepEmbedSequential(*layers))

        last = zero_module(nn.Conv2d(ch, io_channels, 3, padding=1))
        self.out = nn.Sequential(normalization(ch, norm_eps), nn.SiLU(), last)

    def forward(self, x, t, context=None, return_middle=False):
        """x: (B, C, H, W) images x_t.  t: (B,) indices.  Returns eps_theta, like x.

        context: (B, L, context_dim), the encoded prompts, where the network takes any.
        return_middle=True returns the middle block's features (B, C', h, w) instead:
        what the network itself sees in an image.
        """
        H, W = x.shape[-2:]
        p = self.patch_size
        h = F.pad(x, (0, -W % p, 0, -H % p))  # to a multiple of p
        h = F.pixel_unshuffle(h, p)  # (B, C, H, W) -> (B, C*p*p, H/p, W/p)

        emb = timestep_embedding(t, self.model_channels, sin_first=self.sin_first)
        emb = self.time_embed(emb)  # (B, E)
        skips = []
        for block in self.input_blocks:
            h = self._call(block, h, emb, context)
            skips.append(h)
        h = self._call(self.middle_block, h, emb, context)
        if return_middle:
            return h.float()
        for block in self.output_blocks:
            h = torch.cat([h, skips.pop()], dim=1)  # (B, C + C_skip, h, w)
            h = self._call(block, h, emb, context, skips[-1].shape[-2:] if skips else None)
        h = F.pixel_shuffle(self.out(h).float(), p)[..., :H, :W]  # -> (B, C, H, W)

        if self.alpha_bar is None:
            return h
        abar = self.alpha_bar[t].view(-1, 1, 1, 1)  # (B, 1, 1, 1)
        return (1 - abar).sqrt() * x + abar.sqrt() * h

    def _call(self, block, *args):
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)


# --------------------------------------------------------------------------------------
# The names in which others publish DDPM's weights: "original", the converted TensorFlow
# weights (ema_diffusion_cifar10_model-790000.ckpt), and "diffusers"
# (diffusion_pytorch_model.bin of google/ddpm-cifar10-32, whose attention has two
# spellings).

NAMES = [row.split() for row in """
    time_embed.0.       temb.dense.0.       time_embedding.linear_1.
    time_embed.2.       temb.dense.1.       time_embedding.linear_2.
    input_blocks.0.0.   conv_in.            conv_in.
    middle_block.0.     mid.block_1.        mid_block.resnets.0.
    middle_block.1.     mid.attn_1.         mid_block.attentions.0.
    middle_block.2.     mid.block_2.        mid_block.resnets.1.
    out.0.              norm_out.           conv_norm_out.
    out.2.              conv_out.           conv_out.
    .in_layers.0.       .norm1.             .norm1.
    .in_layers.2.       .conv1.             .conv1.
    .emb_layers.1.      .temb_proj.         .time_emb_proj.
    .out_layers.0.      .norm2.             .norm2.
    .out_layers.3.      .conv2.             .conv2.
    .skip_connection.   .nin_shortcut.      .conv_shortcut.
    .norm.              .norm.              .group_norm.
    .q.                 .q.                 .query.
    .k.                 .k.                 .key.
    .v.                 .v.                 .value.
    .proj_out.          .proj_out.          .proj_attn.
""".strip().splitlines()]
NEW_SPELLING = ((".to_q.", ".query."), (".to_k.", ".key."), (".to_v.", ".value."),
                (".to_out.0.", ".proj_attn."))


def renamed(name, renamings):
    for old, new in renamings:
        name = name.replace(old, new)
    return name


def block_names(levels, blocks, attention, diffusers):
    """(prefix of unet.py, prefix in the layout), in the order of UNet.__init__.

    levels: how many.  blocks: residual ones per level on the way down.  attention: the
    levels that have it. Diffusers counts the upward levels from the coarsest.
    """
    suffix, block, attn = ("_blocks", "resnets", "attentions") if diffusers else (
        "", "block", "attn")
    n, middle = 1, "downsamplers.0" if diffusers else "downsample"
    for level in range(levels):
        for i in range(blocks):
            yield f"input_blocks.{n}.0.", f"down{suffix}.{level}.{block}.{i}."
            yield f"input_blocks.{n}.1.", f"down{suffix}.{level}.{attn}.{i}."
            n += 1
        yield f"input_blocks.{n}.0.op.", f"down{suffix}.{level}.{middle}.conv."
        n += 1
    n, middle = 0, "upsamplers.0" if diffusers else "upsample"
    for level in reversed(range(levels)):
        up = f"up{suffix}.{levels - 1 - level if diffusers else level}"
        for i in range(blocks + 1):
            yield f"output_blocks.{n}.0.", f"{up}.{block}.{i}."
            if level in attention:
                yield f"output_blocks.{n}.1.", f"{up}.{attn}.{i}."
            n += 1
        yield f"output_blocks.{n - 1}.{1 + (level in attention)}.conv.", f"{up}.{middle}.conv."


def published_sizes(tensors):
    """UNet's arguments, read off published tensors. Raises ValueError if it cannot."""
    pattern = re.compile(r"down(?:_blocks)?\.(\d+)\.(\w+)\.(\d+)\.conv1\.weight")
    convs = {(int(m[1]), int(m[3])): tensors[m[0]] for m in map(pattern.match, tensors) if m}
    levels, blocks = (1 + max((key[i] for key in convs), default=-1) for i in (0, 1))
    if "conv_in.weight" not in tensors or not all((level, 0) in convs for level in range(levels)):
        raise ValueError("is cut short: it lacks conv_in or whole levels")
    width, in_channels = tensors["conv_in.weight"].shape[:2]
    pattern = re.compile(r"down(?:_blocks)?\.(\d+)\.(?:attn|attentions)\.0\.")
    attention = sorted({int(m[1]) for m in map(pattern.match, tensors) if m})
    return dict(in_channels=in_channels, model_channels=width,
                channel_mult=[convs[level, 0].shape[0] // width for level in range(levels)],
                num_res_blocks=blocks, attention_resolutions=[2**level for level in attention],
                num_heads=1, dropout=0.1, norm_eps=1e-6, sin_first=True, pad_end=True)


# What diffusers' config.json must say where unet.py knows one way alone.
DIFFUSERS = {"act_fn": "silu", "norm_num_groups": 32, "resnet_time_scale_shift": "default",
             "mid_block_scale_factor": 1, "time_embedding_type": "positional",
             "class_embed_type": None, "add_attention": True, "center_input_sample": False}


def configured_sizes(config):
    """UNet's arguments that diffusers' config.json says, and no tensor does.

    What it leaves out is as diffusers has it by default. Raises ValueError for what
    this network cannot be.
    """
    for key, value in DIFFUSERS.items():
        if config.get(key, value) != value:
            raise ValueError(f"is of another network: its config.json says {key} = {config[key]}")
    embedding = (config.get("flip_sin_to_cos", True), config.get("freq_shift", 0))
    padding = config.get("downsample_padding", 1)
    if embedding not in ((False, 1), (True, 0)) or padding not in (0, 1):
        raise ValueError(f"is of another network: its config.json says flip_sin_to_cos, freq_shift "
                         f"= {embedding}, downsample_padding = {padding}")
    return dict(norm_eps=config.get("norm_eps", 1e-5), sin_first=not embedding[0],
                pad_end=padding == 0, head_channels=config.get("attention_head_dim", 8))


def is_diffusers(tensors):
    return "time_embedding.linear_1.weight" in tensors


def from_published(tensors, config=None):
    """Published weights of an unconditional DDPM -> (UNet's arguments, its state dict).

    tensors: what the file holds, by its names.  config: diffusers' config.json; None is
    DDPM's own network.  Returns None for a file in neither layout; says which tensors
    it has no use for. Raises ValueError, which lists the names, where tensors are
    missing or of another shape.
    """
    diffusers = is_diffusers(tensors)
    if not diffusers and "temb.dense.0.weight" not in tensors:
        return None
    tensors = {renamed(k, NEW_SPELLING): v for k, v in tensors.items()}
    sizes = {**published_sizes(tensors), **(configured_sizes(config) if config else {})}
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in UNet(**sizes).state_dict().items()}
    attention = [int(math.log2(factor)) for factor in sizes["attention_resolutions"]]
    renamings = [*block_names(len(sizes["channel_mult"]), sizes["num_res_blocks"], attention,
                              diffusers), *((row[0], row[1 + diffusers]) for row in NAMES)]
    names = {}  # ours: theirs, three where unet.py keeps q, k and v as one tensor
    for ours in shapes:
        split = [ours.replace(".qkv.", f".{x}.") for x in "qkv"] if ".qkv." in ours else [ours]
        names[ours] = [renamed(name, renamings) for name in split]
    wanted = {name for theirs in names.values() for name in theirs}
    missing, extra = sorted(wanted - set(tensors)), sorted(set(tensors) - wanted)
    if missing:
        raise ValueError(f"lacks: {', '.join(missing)}")
    if extra:
        print(f"not reading {len(extra)} tensors that DDPM's network does not have: "
              f"{', '.join(extra[:5])}{', ...' * (len(extra) > 5)}")

    weights = {}
    for ours, theirs in names.items():
        joined = torch.cat([tensors[name].float() for name in theirs])
        if joined.numel() != shapes[ours].numel():
            raise ValueError(f"{', '.join(theirs)} has the shape {tuple(joined.shape)}, "
                             f"not {tuple(shapes[ours])}")
        # attention as a matrix or as a 1x1 convolution: the same numbers
        weights[ours] = joined.reshape(shapes[ours])
    return sizes, weights
