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

import torch
import torch.nn as nn
import torch.nn.functional as F


def timestep_embedding(t, dim, sin_first=False):
    """Sinusoidal embedding of the time step (Vaswani et al. 2017, section 3.5).

    t: (B,) step indices, integer or float.  Returns (B, dim) float32: cos(t w_k) beside
    sin(t w_k).  sin_first: DDPM's own order, whose last frequency is 1/10,000 itself;
    Stable Diffusion's stops one short of it."""
    # Frequencies w_k fall geometrically from 1 to 1/10,000: the slow ones tell early
    # from late, the fast ones tell neighbouring steps apart.
    half = dim // 2
    last = half - 1 if sin_first else half
    k = torch.arange(half, device=t.device, dtype=torch.float32)
    freqs = torch.exp(-math.log(10_000) * k / last)  # w_k = 10000^(-k / last)
    args = t.float()[:, None] * freqs[None]  # (B, half)
    emb = [args.sin(), args.cos()] if sin_first else [args.cos(), args.sin()]
    return F.pad(torch.cat(emb, dim=1), (0, dim % 2))  # (B, dim)


def normalization(channels, eps=1e-5, groups=32):
    """GroupNorm in gcd(groups, channels) groups.
    It takes the mean out of each group. A group of one channel so loses that channel's
    own mean, which is how dark the image is: see `groups` in UNet."""
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
            normalization(channels, norm_eps, groups), nn.SiLU(),
            nn.Conv2d(channels, out_channels, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels))
        self.out_layers = nn.Sequential(
            normalization(out_channels, norm_eps, groups), nn.SiLU(), nn.Dropout(dropout),
            zero_module(nn.Conv2d(out_channels, out_channels, 3, padding=1)))
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x, emb):
        h = self.in_layers(x)  # (B, C, H, W) -> (B, C', H, W)
        # the same shift at every pixel: (B, E) -> (B, C', 1, 1)
        h = h + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)  # (B, C', H, W)


class AttentionBlock(nn.Module):
    """x + attention(x): every pixel attends to every pixel, near or far."""

    def __init__(self, channels, num_heads, norm_eps=1e-5, groups=32):
        super().__init__()
        self.num_heads = num_heads
        self.norm = normalization(channels, norm_eps, groups)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero_module(nn.Conv1d(channels, channels, 1))

    def forward(self, x):
        B, C, H, W = x.shape
        # queries, keys and values in one convolution, then apart, and by heads
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
        context = x if context is None else context  # (B, L, context_dim)
        qkv = (self.to_q(x), self.to_k(context), self.to_v(context))
        h = F.scaled_dot_product_attention(*(split_heads(y, self.num_heads) for y in qkv))
        return self.to_out(h.transpose(1, 2).flatten(2))  # (B, h, N, C/h) -> (B, N, C)


class GEGLU(nn.Module):
    """a * gelu(b), where a and b are linear maps of x: b gates a (Shazeer 2020)."""

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
        self.ff = nn.ModuleDict({"net": nn.Sequential(
            GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels))})
        self.attn2 = CrossAttention(channels, context_dim, num_heads)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))

    def forward(self, x, context):  # (B, HW, C), (B, L, context_dim)
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff["net"](self.norm3(x))


class SpatialTransformer(nn.Module):
    """x + transformer(x, context): the place where the prompt enters the network."""

    def __init__(self, channels, num_heads, context_dim):
        super().__init__()
        self.norm = normalization(channels, eps=1e-6)  # 1e-5 in the residual blocks beside it
        self.proj_in = nn.Conv2d(channels, channels, 1)
        block = TransformerBlock(channels, context_dim, num_heads)
        self.transformer_blocks = nn.ModuleList([block])  # a list of one in the published model
        self.proj_out = zero_module(nn.Conv2d(channels, channels, 1))

    def forward(self, x, context):
        H, W = x.shape[-2:]
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, HW, C)
        h = self.transformer_blocks[0](h, context)
        return x + self.proj_out(h.transpose(1, 2).unflatten(2, (H, W)))  # (B, C, H, W)


class Downsample(nn.Module):
    """Halve height and width with a strided convolution (an odd size rounds up).
    pad_end: a border of zeros at the right and the bottom only, as TensorFlow pads and
    DDPM's own weights expect."""

    def __init__(self, channels, pad_end=False):
        super().__init__()
        self.pad_end = pad_end
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if pad_end else 1)

    def forward(self, x):  # (B, C, H, W) -> (B, C, ceil(H/2), ceil(W/2))
        return self.op(F.pad(x, (0, 1, 0, 1)) if self.pad_end else x)


class Upsample(nn.Module):
    """Return to the size of the matching skip connection: double, or one less."""

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
                           Stable Diffusion. A (T,) schedule: that output is v, the
                           velocity of Salimans & Ho (2022), and eps_theta =
                           sqrt(1-abar_t) x_t + sqrt(abar_t) v. The loss is the same,
                           but v is of unit scale at every t, where eps_theta itself
                           must near t = T copy x_t through all layers to within
                           sqrt(abar_t), which is more than bfloat16 can give.
    groups                 of each normalization: 32 in the published networks. A narrow
                           network needs fewer, of four channels at least each (as in
                           Karras et al. 2022): else it cannot see how dark black is.
    norm_eps, sin_first, pad_end
                           1e-6, True, True in DDPM's published weights; see
                           normalization, timestep_embedding, Downsample."""

    def __init__(self, in_channels=1, model_channels=64, channel_mult=(1, 2), num_res_blocks=1,
                 attention_resolutions=(2,), num_heads=4, dropout=0.0, patch_size=1,
                 alpha_bar=None, context_dim=None, norm_eps=1e-5, sin_first=False, pad_end=False,
                 head_channels=None, groups=32):
        super().__init__()
        self.model_channels, self.sin_first, self.patch_size = model_channels, sin_first, patch_size
        # The schedule belongs to ddpm.py: persistent=False keeps it out of state_dict.
        self.register_buffer("alpha_bar", alpha_bar, persistent=False)

        E = 4 * model_channels
        self.time_embed = nn.Sequential(nn.Linear(model_channels, E), nn.SiLU(), nn.Linear(E, E))
        residual = lambda channels, out: ResBlock(channels, out, E, dropout, norm_eps, groups)

        def attention(channels):
            heads = channels // head_channels if head_channels else num_heads
            if context_dim is None:
                return AttentionBlock(channels, heads, norm_eps, groups)
            return SpatialTransformer(channels, heads, context_dim)
        # Down: at each level residual blocks, with attention at the sizes that ask for
        # it, then half the size. Every block's output is kept for the way up.
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
        # The middle always has attention: at the smallest size it is cheap.
        self.middle_block = TimestepEmbedSequential(residual(ch, ch), attention(ch),
                                                    residual(ch, ch))
        # Up: the same levels in reverse, one residual block more in each, since the way
        # down hands over one more output per level (that of Downsample, or the first).
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
        # A zero at the end: eps_theta starts as 0 (or, with alpha_bar, as x_t's share).
        last = zero_module(nn.Conv2d(ch, io_channels, 3, padding=1))
        self.out = nn.Sequential(normalization(ch, norm_eps, groups), nn.SiLU(), last)

    def forward(self, x, t, context=None, return_middle=False):
        """x: (B, C, H, W) images x_t.  t: (B,) indices.  Returns eps_theta, like x.
        context: (B, L, context_dim), the encoded prompts, where the network takes any.
        return_middle=True returns the middle block's features (B, C', h, w) instead:
        what the network itself sees in an image."""
        (H, W), p = x.shape[-2:], self.patch_size
        h = F.pad(x, (0, -W % p, 0, -H % p))  # to a multiple of p
        h = F.pixel_unshuffle(h, p)  # (B, C, H, W) -> (B, C*p*p, H/p, W/p)
        # Time enters every residual block.
        emb = self.time_embed(timestep_embedding(t, self.model_channels, self.sin_first))  # (B, E)
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
            h = block(h, emb, context, skips[-1].shape[-2:] if skips else None)
        h = F.pixel_shuffle(self.out(h).float(), p)[..., :H, :W]  # -> (B, C, H, W)

        if self.alpha_bar is None:
            return h
        # eps_theta = sqrt(1-abar_t) x_t + sqrt(abar_t) v (Salimans & Ho 2022)
        abar = self.alpha_bar[t].view(-1, 1, 1, 1)  # (B, 1, 1, 1)
        return (1 - abar).sqrt() * x + abar.sqrt() * h
