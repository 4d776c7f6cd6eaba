"""The network eps_theta(x_t, t): one U-Net for every dataset of this repository.

Holds    UNet and its blocks: sinusoidal time embedding, residual block, self-attention,
         down- and upsampling; for text-to-image models the spatial transformer, which
         attends to the prompt as well.
Reads    nothing.            Writes    nothing.
Paper    VDU (arXiv 2510.04058) takes this network as given and moves its weights.
         The architecture is DDPM's (Ho et al. 2020, appendix B). The modules have the
         names of Stable Diffusion v1's files, so that the same class can load those.

Shapes in the comments: B images, C channels, H x W pixels, E = 4 * model_channels (the
time embedding's width), L tokens of context_dim numbers (the encoded prompt), h
attention heads.
"""

import math
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F


def timestep_embedding(t, dim, sin_first=False):
    """Sinusoidal embedding of the time step (Vaswani et al. 2017, section 3.5).

    t: (B,) step indices.  dim: an even number.  Returns (B, dim) float32: cos(t w_k)
    beside sin(t w_k).  sin_first: DDPM's own order, whose last frequency is 1/10,000
    itself; Stable Diffusion's stops one short of it."""
    # Frequencies w_k fall geometrically from 1 to 1/10,000: the slow ones tell early
    # from late, the fast ones tell neighbouring steps apart.
    half = dim // 2  # that many of each
    last = half - 1 if sin_first else half
    k = torch.arange(half, device=t.device, dtype=torch.float32)
    freqs = torch.exp(-math.log(10_000) * k / last)  # w_k = 10000^(-k / last)
    args = t.float()[:, None] * freqs[None]  # (B, half)

    waves = [args.cos(), args.sin()]
    if sin_first:
        waves.reverse()
    return torch.cat(waves, dim=1)  # (B, dim)


def normalization(channels, eps=1e-5, groups=32):
    """GroupNorm in gcd(groups, channels) groups, a number that divides the channels.

    Each group loses its mean. In a group of one channel that is how dark the image is:
    see `groups` in UNet."""
    return nn.GroupNorm(math.gcd(groups, channels), channels, eps=eps)


def zero_module(module):
    """Zero the weights: a residual branch that starts so is the identity."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


class ResBlock(nn.Module):
    """x + f(x, t): two 3x3 convolutions with the time embedding added between them."""

    def __init__(self, channels, out_channels, emb_channels, dropout, norm_eps=1e-5, groups=32):
        super().__init__()
        self.in_layers = nn.Sequential(
            normalization(channels, norm_eps, groups),
            nn.SiLU(),
            nn.Conv2d(channels, out_channels, 3, padding=1))
        self.emb_layers = nn.Sequential(
            nn.SiLU(),
            nn.Linear(emb_channels, out_channels))
        self.out_layers = nn.Sequential(
            normalization(out_channels, norm_eps, groups),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_module(nn.Conv2d(out_channels, out_channels, 3, padding=1)))

        # x joins f(x, t) as it is, or through a 1x1 convolution to the new width.
        self.skip_connection = nn.Identity()
        if channels != out_channels:
            self.skip_connection = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x, emb):
        h = self.in_layers(x)  # (B, C, H, W) -> (B, C', H, W)
        shift = self.emb_layers(emb)  # (B, E) -> (B, C')
        h = h + shift[:, :, None, None]  # the same at every pixel
        return self.skip_connection(x) + self.out_layers(h)  # (B, C', H, W)


class AttentionBlock(nn.Module):
    """x + attention(x): every pixel attends to every pixel.
    head_channels: the channels of a head, in place of num_heads."""

    def __init__(self, channels, num_heads, norm_eps=1e-5, groups=32, head_channels=None):
        super().__init__()
        self.num_heads = channels // head_channels if head_channels else num_heads
        self.norm = normalization(channels, norm_eps, groups)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)  # one matrix for all three
        self.proj_out = zero_module(nn.Conv1d(channels, channels, 1))

    def forward(self, x):
        # Queries, keys and values come out of one convolution.
        qkv = self.qkv(self.norm(x).flatten(2))  # (B, C, HW) -> (B, 3C, HW)
        qkv = qkv.unflatten(1, (3, self.num_heads, -1))  # (B, 3, h, C/h, HW)
        q, k, v = qkv.transpose(3, 4).unbind(1)  # 3 x (B, h, HW, C/h)

        h = F.scaled_dot_product_attention(q, k, v)  # softmax(q k^T / sqrt(C/h)) v
        h = h.transpose(2, 3).flatten(1, 2)  # (B, C, HW)
        return x + self.proj_out(h).view_as(x)


def split_heads(x, num_heads):
    """(B, N, C) -> (B, h, N, C/h)."""
    return x.unflatten(2, (num_heads, -1)).transpose(1, 2)


class CrossAttention(nn.Module):
    """Attention from x to a context: the encoded prompt, or x itself where there is
    none (Rombach et al. 2022, section 3.3)."""

    def __init__(self, channels, context_dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim, channels, bias=False)
        self.to_v = nn.Linear(context_dim, channels, bias=False)
        # the Identity is a dropout of 0 in the published model
        self.to_out = nn.Sequential(nn.Linear(channels, channels), nn.Identity())

    def forward(self, x, context=None):
        if context is None:
            context = x
        q = split_heads(self.to_q(x), self.num_heads)  # (B, h, N, C/h)
        k = split_heads(self.to_k(context), self.num_heads)  # (B, h, L, C/h)
        v = split_heads(self.to_v(context), self.num_heads)
        h = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(h.transpose(1, 2).flatten(2))  # (B, h, N, C/h) -> (B, N, C)


class GEGLU(nn.Module):
    """a * gelu(gate), both linear in x (Shazeer 2020)."""

    def __init__(self, channels, out_channels):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * out_channels)

    def forward(self, x):
        a, gate = self.proj(x).chunk(2, dim=-1)  # (B, N, C) -> 2 x (B, N, C')
        return a * F.gelu(gate)


class TransformerBlock(nn.Module):
    """Pixels attend to each other (attn1), then to the prompt (attn2); then each pixel
    passes a feed-forward network by itself (ff)."""

    def __init__(self, channels, context_dim, num_heads):
        super().__init__()
        self.attn1 = CrossAttention(channels, channels, num_heads)
        layers = nn.Sequential(
            GEGLU(channels, 4 * channels),
            nn.Identity(),  # a dropout of 0 in the published model
            nn.Linear(4 * channels, channels))
        self.ff = nn.ModuleDict({"net": layers})
        self.attn2 = CrossAttention(channels, context_dim, num_heads)
        self.norm1 = nn.LayerNorm(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.norm3 = nn.LayerNorm(channels)

    def forward(self, x, context):  # (B, HW, C), (B, L, context_dim)
        x = x + self.attn1(self.norm1(x))  # pixels among themselves
        x = x + self.attn2(self.norm2(x), context)  # pixels and prompt
        return x + self.ff["net"](self.norm3(x))


class SpatialTransformer(nn.Module):
    """x + transformer(x, context): the place where the prompt enters the network."""

    def __init__(self, channels, num_heads, context_dim):
        super().__init__()
        self.norm = normalization(channels, eps=1e-6)  # as published; 1e-5 elsewhere
        self.proj_in = nn.Conv2d(channels, channels, 1)
        block = TransformerBlock(channels, context_dim, num_heads)
        self.transformer_blocks = nn.ModuleList([block])  # a list of one in the published model
        self.proj_out = zero_module(nn.Conv2d(channels, channels, 1))

    def forward(self, x, context):
        H, W = x.shape[-2:]
        h = self.proj_in(self.norm(x))
        h = h.flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, HW, C)
        h = self.transformer_blocks[0](h, context)  # (B, HW, C)
        h = h.transpose(1, 2).unflatten(2, (H, W))  # (B, C, H, W)
        return x + self.proj_out(h)


class Downsample(nn.Module):
    """Halve height and width with a strided convolution. An odd size rounds up, or with
    pad_end down: a border of zeros at the right and the bottom only, as TensorFlow pads
    and DDPM's own weights expect."""

    def __init__(self, channels, pad_end=False):
        super().__init__()
        self.pad_end = pad_end
        padding = 0 if pad_end else 1
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x):  # (B, C, H, W) -> (B, C, H/2, W/2)
        if self.pad_end:
            x = F.pad(x, (0, 1, 0, 1))  # right and bottom
        return self.op(x)


class Upsample(nn.Module):
    """Return to the size of the matching skip connection: double, or one off."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, size):
        x = F.interpolate(x, size=size, mode="nearest")
        return self.conv(x)  # (B, C, *size)


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


def way_down(first, ch, widths, attends, num_res_blocks, residual, attention, pad_end):
    """The input blocks: `first`, then level by level residual blocks, with attention on
    the levels that have it, and Downsample.

    ch: channels after `first`.  widths: channels of each level.  attends: for each
    level, whether it has attention.  Returns (blocks, channels of each one's output):
    every output is kept, and handed across to the way up."""
    blocks = nn.ModuleList([TimestepEmbedSequential(first)])
    skip_channels = [ch]
    for level, width in enumerate(widths):
        for _ in range(num_res_blocks):
            layers = [residual(ch, width)]  # the first of a level changes the width
            if attends[level]:
                layers.append(attention(width))
            blocks.append(TimestepEmbedSequential(*layers))
            skip_channels.append(width)
            ch = width
        if level < len(widths) - 1:
            blocks.append(TimestepEmbedSequential(Downsample(ch, pad_end)))
            skip_channels.append(ch)
    return blocks, skip_channels


def way_up(skip_channels, widths, attends, num_res_blocks, residual, attention):
    """The output blocks: the same levels in reverse, with one residual block more in
    each, for the output of Downsample, or of the first convolution."""
    blocks = nn.ModuleList()
    ch = widths[-1]
    for level in reversed(range(len(widths))):
        for i in range(num_res_blocks + 1):
            layers = [residual(ch + skip_channels.pop(), widths[level])]
            ch = widths[level]
            if attends[level]:
                layers.append(attention(ch))
            if level > 0 and i == num_res_blocks:
                layers.append(Upsample(ch))
            blocks.append(TimestepEmbedSequential(*layers))
    return blocks


class UNet(nn.Module):
    """eps_theta(x_t, t): predicts eps in x_t = sqrt(abar_t) x_0 + sqrt(1-abar_t) eps.

    in_channels            channels of the images (and of the noise it returns)
    model_channels         width of the first level
    channel_mult           width of each level, in model_channels; each halves the size
    num_res_blocks         residual blocks per level on the way down (one more up)
    attention_resolutions  despite the name: downsampling factors (1, 2, 4, ...) of the
                           levels with attention
    num_heads              attention heads
    head_channels          channels of a head, in place of num_heads
    context_dim            None: self-attention. Otherwise the width of the encoded
                           prompt, and a SpatialTransformer takes its place
    dropout                inside the residual blocks
    patch_size             space-to-depth factor p: the network works on (H/p) x (W/p)
                           "pixels" of p*p*C numbers. 2 costs about a quarter of 1.
    alpha_bar              None: the last layer gives eps_theta itself, as in DDPM and
                           Stable Diffusion. A (T,) schedule: it gives v, the velocity
                           of Salimans & Ho (2022), and eps_theta = sqrt(1-abar_t) x_t +
                           sqrt(abar_t) v. The loss is the same. Near t = T eps_theta is
                           almost x_t; what is left is too small for bfloat16, v is not.
    groups                 of each normalization: 32 as published. A narrow network has
                           fewer, so that each has four channels or more (Karras et al.
                           2022): else it cannot see how dark black is.
    norm_eps, sin_first, pad_end
                           1e-6, True, True in DDPM's published weights; see
                           normalization, timestep_embedding, Downsample."""

    def __init__(self, in_channels=1, model_channels=64, channel_mult=(1, 2), num_res_blocks=1,
                 attention_resolutions=(2,), num_heads=4, dropout=0.0, patch_size=1,
                 alpha_bar=None, context_dim=None, norm_eps=1e-5, sin_first=False, pad_end=False,
                 head_channels=None, groups=32):
        super().__init__()
        self.model_channels = model_channels
        self.sin_first = sin_first
        self.patch_size = patch_size
        # The schedule belongs to ddpm.py: persistent=False keeps it out of state_dict.
        self.register_buffer("alpha_bar", alpha_bar, persistent=False)

        # The time embedding passes two layers, once for all residual blocks.
        E = 4 * model_channels
        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, E),
            nn.SiLU(),
            nn.Linear(E, E))

        # What the three parts below are made of.
        residual = partial(ResBlock, emb_channels=E, dropout=dropout, norm_eps=norm_eps,
                           groups=groups)
        if context_dim is None:
            attention = partial(AttentionBlock, num_heads=num_heads, norm_eps=norm_eps,
                                groups=groups, head_channels=head_channels)
        else:
            attention = partial(SpatialTransformer, num_heads=num_heads, context_dim=context_dim)
        widths = [mult * model_channels for mult in channel_mult]  # of the levels
        attends = [2**level in attention_resolutions for level in range(len(widths))]

        # Down, middle, up. The middle always has attention: at the smallest size it is
        # cheap.
        io_channels = in_channels * patch_size**2  # see patch_size
        first = nn.Conv2d(io_channels, model_channels, 3, padding=1)
        self.input_blocks, skip_channels = way_down(
            first, model_channels, widths, attends, num_res_blocks, residual, attention, pad_end)
        ch = widths[-1]
        self.middle_block = TimestepEmbedSequential(
            residual(ch, ch),
            attention(ch),
            residual(ch, ch))
        self.output_blocks = way_up(
            skip_channels, widths, attends, num_res_blocks, residual, attention)

        # The last convolution starts at zero, and so does the output.
        last = zero_module(nn.Conv2d(widths[0], io_channels, 3, padding=1))
        self.out = nn.Sequential(
            normalization(widths[0], norm_eps, groups),
            nn.SiLU(),
            last)

    def forward(self, x, t, context=None, return_middle=False):
        """x: (B, C, H, W) images x_t.  t: (B,) indices.  Returns eps_theta, like x.
        context: (B, L, context_dim), the encoded prompts, where the network takes any.
        return_middle=True returns the middle block's features (B, C', H', W')."""
        H, W = x.shape[-2:]
        p = self.patch_size
        h = F.pad(x, (0, -W % p, 0, -H % p))  # to a multiple of p
        h = F.pixel_unshuffle(h, p)  # (B, C, H, W) -> (B, C*p*p, H/p, W/p)

        # Time enters every residual block.
        emb = timestep_embedding(t, self.model_channels, self.sin_first)
        emb = self.time_embed(emb)  # (B, E)

        # Down, across the middle, and up; the skips carry fine detail.
        skips = []
        for block in self.input_blocks:
            h = block(h, emb, context)
            skips.append(h)
        h = self.middle_block(h, emb, context)
        if return_middle:
            return h.float()
        for block in self.output_blocks:
            h = torch.cat([h, skips.pop()], dim=1)  # (B, C + C_skip, h, w)
            size = skips[-1].shape[-2:] if skips else None  # of the level above
            h = block(h, emb, context, size)

        h = F.pixel_shuffle(self.out(h).float(), p)  # patches -> pixels
        h = h[..., :H, :W]  # (B, C, H, W), without the padding
        if self.alpha_bar is None:
            return h
        # eps_theta = sqrt(1-abar_t) x_t + sqrt(abar_t) v (Salimans & Ho 2022)
        abar = self.alpha_bar[t].view(-1, 1, 1, 1)  # (B, 1, 1, 1)
        return (1 - abar).sqrt() * x + abar.sqrt() * h
