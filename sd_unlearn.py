"""Stable Diffusion v1: unlearn a feature from published weights, with a handful of images of it and nothing else.

    python sd_unlearn.py sample  --checkpoint sd-v1-4.ckpt --merges merges.txt --prompt "a photo of a golf ball" --output golf.png
    python sd_unlearn.py unlearn --checkpoint sd-v1-4.ckpt --merges merges.txt --concept "golf ball" --images golf/ --output sd-golf-forgotten.ckpt
    python sd_unlearn.py compare --before sd-v1-4.ckpt --after sd-golf-forgotten.ckpt --merges merges.txt --prompts prompts.txt --output compare/

Holds    what Stable Diffusion has and a plain DDPM has not: the autoencoder, the text encoder and its tokenizer, guidance;
         and its files. The network is unet.py's with context_dim set, the diffusion ddpm.py's, the unlearning vdu.py's.
Reads    a checkpoint in the published layout (sd-v1-1.ckpt .. sd-v1-5.ckpt), CLIP's merges, images of what must go.
Writes   a checkpoint of the same layout; images.
Paper    VDU (arXiv 2510.04058), its experiments on Stable Diffusion (feature unlearning). The model: Rombach et al. 2022,
         "High-Resolution Image Synthesis with Latent Diffusion Models" (arXiv 2112.10752), called LDM below.

Shapes in the comments: images (B, 3, H, W) in [-1, 1]; latents (B, 4, h, w), h = H/8 in the published model; L = 77 tokens;
E numbers a token (768).
"""

import gzip
import html
import json
import os
import re
import time
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

import ddpm
from ddpm import (ArgumentParser, Diffusion, StopRequest, UserError, check_output, count, peak_memory, pick_device, read_file,
                  run_command_line, save_checkpoint, seed_everything, seed_number)
from evaluate import frechet_distance, inception_features, load_inception
from train_ddpm import load_images, to_float, to_uint8
from unet import UNet, normalization
from vdu import FunctionSpaceAnchor, GaussianPosterior, RunningPosterior, check_parameters, check_settings, unlearn

# ---------------------------------------------------------------------------------------------------------------
# The autoencoder: images <-> latents, `first_stage_model.` in the file (LDM, section 3.1)

LATENT_SCALE = 0.18215  # brings the latents to unit variance, in which the diffusion works


class ResnetBlock(nn.Module):
    """x + f(x): two 3x3 convolutions; unet.py's ResBlock without a time step, and with the names of its file."""

    def __init__(self, channels, out_channels):
        super().__init__()
        self.norm1, self.conv1 = normalization(channels, 1e-6), nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2, self.conv2 = normalization(out_channels, 1e-6), nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if channels != out_channels:
            self.nin_shortcut = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x):
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class PixelAttention(nn.Module):
    """x + attention(x), in one head, over all pixels."""

    def __init__(self, channels):
        super().__init__()
        self.norm = normalization(channels, 1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))  # (B, C, h, w) -> (B, hw, C)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h.transpose(1, 2).unflatten(2, x.shape[-2:]))


def middle(channels):
    return nn.ModuleDict({"block_1": ResnetBlock(channels, channels), "attn_1": PixelAttention(channels),
                          "block_2": ResnetBlock(channels, channels)})


class Encoder(nn.Module):
    """Images -> mean and log-variance of the latents, before quant_conv. ch, ch_mult: widths, each level half the size of the last."""

    def __init__(self, ch, ch_mult, num_res_blocks, z_channels):
        super().__init__()
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down = nn.ModuleList()
        width = ch
        for level, mult in enumerate(ch_mult):
            blocks = nn.ModuleList()
            for _ in range(num_res_blocks):
                blocks.append(ResnetBlock(width, ch * mult))
                width = ch * mult
            down = nn.ModuleDict({"block": blocks})
            if level < len(ch_mult) - 1:
                down["downsample"] = nn.ModuleDict({"conv": nn.Conv2d(width, width, 3, stride=2)})
            self.down.append(down)
        self.mid = middle(width)
        self.norm_out, self.conv_out = normalization(width, 1e-6), nn.Conv2d(width, 2 * z_channels, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(x)
        for down in self.down:
            for block in down["block"]:
                h = block(h)
            if "downsample" in down:
                # Padded on the right and below only, as the published network was trained.
                h = down["downsample"]["conv"](F.pad(h, (0, 1, 0, 1)))  # (B, C, H, W) -> (B, C, H/2, W/2)
        for layer in self.mid.values():
            h = layer(h)
        return self.conv_out(F.silu(self.norm_out(h)))  # (B, 2 z, h, w)


class Decoder(nn.Module):
    """Latents, after post_quant_conv, -> images."""

    def __init__(self, ch, ch_mult, num_res_blocks, z_channels):
        super().__init__()
        width = ch * ch_mult[-1]
        self.conv_in = nn.Conv2d(z_channels, width, 3, padding=1)
        self.mid = middle(width)
        ups = []  # built from the smallest level up, numbered in the file from the largest
        for level, mult in reversed(list(enumerate(ch_mult))):
            blocks = nn.ModuleList()
            for _ in range(num_res_blocks + 1):
                blocks.append(ResnetBlock(width, ch * mult))
                width = ch * mult
            up = nn.ModuleDict({"block": blocks})
            if level > 0:
                up["upsample"] = nn.ModuleDict({"conv": nn.Conv2d(width, width, 3, padding=1)})
            ups.insert(0, up)
        self.up = nn.ModuleList(ups)
        self.norm_out, self.conv_out = normalization(width, 1e-6), nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, z):
        h = self.conv_in(z)
        for layer in self.mid.values():
            h = layer(h)
        for up in reversed(self.up):
            for block in up["block"]:
                h = block(h)
            if "upsample" in up:
                h = up["upsample"]["conv"](F.interpolate(h, scale_factor=2.0, mode="nearest"))  # (B, C, h, w) -> (B, C, 2h, 2w)
        return self.conv_out(F.silu(self.norm_out(h)))  # (B, 3, H, W)


class Autoencoder(nn.Module):
    """The KL autoencoder: q(z | x) = N(mean, exp(logvar)) and its decoder. Both without LATENT_SCALE, see to_latents and to_images."""

    def __init__(self, ch=128, ch_mult=(1, 2, 4, 4), num_res_blocks=2, z_channels=4):
        super().__init__()
        self.encoder = Encoder(ch, ch_mult, num_res_blocks, z_channels)
        self.decoder = Decoder(ch, ch_mult, num_res_blocks, z_channels)
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * z_channels, 1)
        self.post_quant_conv = nn.Conv2d(z_channels, z_channels, 1)
        self.factor, self.z_channels = 2 ** (len(ch_mult) - 1), z_channels  # pixels a latent pixel

    def encode(self, x):
        """(B, 3, H, W) in [-1, 1] -> moments (B, 8, h, w): mean and log-variance, 4 channels each."""
        return self.quant_conv(self.encoder(x))

    def decode(self, z):
        """Unscaled latents (B, 4, h, w) -> images (B, 3, H, W), about in [-1, 1]."""
        return self.decoder(self.post_quant_conv(z))

    @torch.no_grad()
    def to_latents(self, x, sampled=True):
        """Images -> the diffusion's latents, scaled (B, 4, h, w): a sample of q(z | x), or its mean."""
        mean, logvar = self.encode(x).chunk(2, dim=1)
        std = (logvar.clamp(-30, 20) / 2).exp()
        return LATENT_SCALE * (mean + std * torch.randn_like(mean) if sampled else mean)

    @torch.no_grad()
    def to_images(self, z):
        """The diffusion's latents (B, 4, h, w) -> uint8 images (B, 3, H, W), on the CPU; one at a time, which bounds the memory."""
        return torch.cat([to_uint8(self.decode(latent[None] / LATENT_SCALE)).cpu() for latent in z])


# ---------------------------------------------------------------------------------------------------------------
# The text encoder: token ids -> context, `cond_stage_model.transformer.` in the file (CLIP, Radford et al. 2021)


class SelfAttention(nn.Module):
    """Causal self-attention: a token sees those before it."""

    def __init__(self, width, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        heads = lambda y: y.unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (B, L, E) -> (B, heads, L, E/heads)
        h = F.scaled_dot_product_attention(heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x)), is_causal=True)
        return self.out_proj(h.transpose(1, 2).flatten(2))  # (B, L, E)


class TextLayer(nn.Module):
    def __init__(self, width, num_heads, mlp_width):
        super().__init__()
        self.self_attn = SelfAttention(width, num_heads)
        self.layer_norm1 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, mlp_width), "fc2": nn.Linear(mlp_width, width)})
        self.layer_norm2 = nn.LayerNorm(width)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        h = self.mlp["fc1"](self.layer_norm2(x))
        return x + self.mlp["fc2"](h * (1.702 * h).sigmoid())  # CLIP's "quick GELU"


class TextEncoder(nn.Module):
    """CLIP ViT-L/14's text tower: ids (B, L) -> the last hidden state after the final layer norm, (B, L, E)."""

    def __init__(self, vocab_size=49408, width=768, layers=12, num_heads=12, mlp_width=3072, positions=77):
        super().__init__()
        self.text_model = nn.ModuleDict({
            "embeddings": nn.ModuleDict({"token_embedding": nn.Embedding(vocab_size, width),
                                         "position_embedding": nn.Embedding(positions, width)}),
            "encoder": nn.ModuleDict({"layers": nn.ModuleList(TextLayer(width, num_heads, mlp_width) for _ in range(layers))}),
            "final_layer_norm": nn.LayerNorm(width),
        })

    def forward(self, ids):
        embeddings = self.text_model["embeddings"]
        x = embeddings["token_embedding"](ids) + embeddings["position_embedding"].weight[: ids.shape[1]]  # (B, L) -> (B, L, E)
        for layer in self.text_model["encoder"]["layers"]:
            x = layer(x)
        return self.text_model["final_layer_norm"](x)


class Tokenizer:
    """CLIP's byte-pair encoding: texts -> ids (N, 77), start and end token included, cut or padded with the end token.

    merges: a merges.txt, or bpe_simple_vocab_16e6.txt.gz; a header line, then a pair a line, the most frequent first.
    Text is lowercased and its whitespace collapsed. Ids: the 256 bytes, the same ending a word, the merges, start, end.
    Raises UserError if the file is missing or holds no merges.
    """

    MERGES = 49152 - 256 - 2  # that many of the file belong to the vocabulary

    def __init__(self, merges, length=77):
        self.length = length
        try:
            with (gzip.open if str(merges).endswith(".gz") else open)(merges, "rt", encoding="utf-8") as f:
                lines = f.read().split("\n")[1 : self.MERGES + 1]
        except (OSError, UnicodeDecodeError, EOFError) as e:
            raise UserError(f"cannot read the merges in {merges} ({e}): it is tokenizer/merges.txt of a Stable Diffusion v1 "
                            "repository, or bpe_simple_vocab_16e6.txt.gz of CLIP's") from e
        pairs = [tuple(line.split()) for line in lines if line.strip()]
        if any(len(pair) != 2 for pair in pairs):
            raise UserError(f"{merges} is no file of merges: a line of it is not a pair")
        # A printable character for each byte: those that print stand for themselves, the others for 256, 257, ...
        printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
        others = [b for b in range(256) if b not in printable]
        self.byte_symbol = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
        symbols = list(self.byte_symbol.values())
        symbols += [s + "</w>" for s in symbols] + ["".join(pair) for pair in pairs] + ["<|startoftext|>", "<|endoftext|>"]
        self.id = {symbol: i for i, symbol in enumerate(symbols)}
        self.rank = {pair: i for i, pair in enumerate(pairs)}
        self.cache = {}

    def __call__(self, texts):
        """A list of texts -> (N, 77) int64."""
        start, end = self.id["<|startoftext|>"], self.id["<|endoftext|>"]
        rows = []
        for text in texts:
            ids = [i for word in self.words(text) for i in self.word_ids(word)][: self.length - 2]
            rows.append([start, *ids, *[end] * (self.length - 1 - len(ids))])
        return torch.tensor(rows)

    @staticmethod
    def words(text):
        """Runs of letters, single digits, runs of anything else, and English contractions; in Unicode's sense of letter and digit."""
        text = " ".join(html.unescape(unicodedata.normalize("NFC", text)).split()).lower()
        of_kind = lambda kind: re.escape("".join(c for c in set(text) if unicodedata.category(c)[0] == kind))
        letters, numbers = "a-z" + of_kind("L"), "0-9" + of_kind("N")  # re has no \p{L} and \p{N}: spell out those that occur
        return re.findall(rf"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[{letters}]+|[{numbers}]|[^\s{letters}{numbers}]+", text)

    def word_ids(self, word):
        """Byte-pair encoding (Sennrich et al. 2016): join the most frequent neighbouring pair until none is known."""
        if word in ("<|startoftext|>", "<|endoftext|>"):
            return [self.id[word]]
        if word not in self.cache:
            parts = [self.byte_symbol[b] for b in word.encode("utf-8")]
            parts[-1] += "</w>"
            while len(parts) > 1:
                pair = min(zip(parts, parts[1:]), key=lambda p: self.rank.get(p, float("inf")))
                if pair not in self.rank:
                    break
                joined, i = [], 0
                while i < len(parts):
                    step = 2 if tuple(parts[i : i + 2]) == pair else 1
                    joined.append("".join(parts[i : i + step]))
                    i += step
                parts = joined
            self.cache[word] = [self.id[part] for part in parts]
        return self.cache[word]


# ---------------------------------------------------------------------------------------------------------------
# The file

PREFIX = {"unet": "model.diffusion_model.", "autoencoder": "first_stage_model.", "text_encoder": "cond_stage_model.transformer."}


@dataclass
class StableDiffusion:
    """What `load` returns.

    unet          unet(x, t, context) -> eps_theta: latents (B, 4, h, w), t (B,), context (B, 77, 768)
    autoencoder   .encode(x) -> moments, .decode(z) of unscaled latents, .to_latents(x), .to_images(z)
    text_encoder  text_encoder(ids) -> context
    tokenizer     tokenizer(texts) -> ids (N, 77)
    diffusion     ddpm.Diffusion with Stable Diffusion's schedule
    """

    unet: UNet
    autoencoder: Autoencoder
    text_encoder: TextEncoder
    tokenizer: Tokenizer
    diffusion: Diffusion

    @torch.no_grad()
    def context(self, prompts):
        """Prompts (a list of N) -> (N, 77, E). Raises UserError if the merges are not those of the text encoder."""
        ids, known = self.tokenizer(prompts), self.text_encoder.text_model["embeddings"]["token_embedding"].num_embeddings
        if ids.max() >= known:
            raise UserError(f"the merges make {len(self.tokenizer.id)} tokens and the checkpoint's text encoder knows {known}: they are of another model")
        return self.text_encoder(ids.to(self.diffusion.beta.device))


def read_tensors(path, ema=False):
    """The tensors of a published checkpoint, by name, left on disk until needed. Returns (tensors, the file's other entries).

    ema: take the U-Net's moving average (`model_ema.`) for the U-Net. Raises UserError if there is none, or no tensors.
    """
    raw = read_file(path, mmap=True, make_one="download one, e.g. sd-v1-4.ckpt (huggingface.co/CompVis/stable-diffusion-v-1-4-original)")
    wrapped = isinstance(raw, dict) and isinstance(raw.get("state_dict"), dict)
    state = raw["state_dict"] if wrapped else raw
    tensors = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)} if isinstance(state, dict) else {}
    if not tensors:
        raise UserError(f"{path} holds no tensors: not a Stable Diffusion checkpoint")
    if ema:
        # The names of the averages are those of the weights below `model.`, without their dots.
        average = lambda k: "model_ema." + k.removeprefix("model.").replace(".", "")
        unet = [k for k in tensors if k.startswith(PREFIX["unet"])]
        missing = [k for k in unet if average(k) not in tensors]
        if missing:
            raise UserError(f"{path} has no EMA weights for {len(missing)} of the U-Net's {len(unet)} tensors ({missing[0]}, ...): leave --ema away")
        tensors |= {k: tensors[average(k)] for k in unet}
    others = {k: v for k, v in raw.items() if isinstance(v, (int, float, str))} if wrapped else None
    return tensors, others


def part(tensors, name):
    """The tensors of one of the three networks, by the name they have inside it."""
    prefix = PREFIX[name]
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix) and not k.endswith(".position_ids")}


def build(tensors, unet_heads=None, text_heads=None):
    """The three networks, on the meta device (no memory), of the sizes that the tensors' shapes tell: {"unet", "autoencoder", "text_encoder"}.

    tensors: as the file names them; only their shapes are looked at. The one thing that shapes do not tell is how many heads
    share a width. None: Stable Diffusion's 8 and CLIP's heads of 64, or heads of 8 in networks narrower than any published one.
    Raises KeyError where a tensor that tells a size is missing.
    """
    u, a, c = (part(tensors, name) for name in PREFIX)
    ch = u["input_blocks.0.0.weight"].shape[0]
    widths, attention, res_blocks = [], [], 0
    i = 1
    while f"input_blocks.{i}.0.op.weight" in u or f"input_blocks.{i}.0.in_layers.2.weight" in u:
        if f"input_blocks.{i}.0.op.weight" in u:
            res_blocks = 0
        else:
            res_blocks += 1
            if res_blocks == 1:
                widths.append(u[f"input_blocks.{i}.0.in_layers.2.weight"].shape[0])
                if f"input_blocks.{i}.1.proj_in.weight" in u:
                    attention.append(2 ** (len(widths) - 1))
        i += 1
    levels = len({k.split(".")[2] for k in a if k.startswith("encoder.down.")})
    ae_ch = a["encoder.conv_in.weight"].shape[0]
    ae_mult = [a[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] // ae_ch for level in range(levels)]
    vocab, width = c["text_model.embeddings.token_embedding.weight"].shape
    layers = len({k.split(".")[3] for k in c if k.startswith("text_model.encoder.layers.")})
    with torch.device("meta"):
        return {
            "unet": UNet(u["input_blocks.0.0.weight"].shape[1], ch, [w // ch for w in widths], res_blocks, attention,
                         unet_heads or (8 if ch >= 64 else max(1, ch // 8)),
                         context_dim=u["middle_block.1.transformer_blocks.0.attn2.to_k.weight"].shape[1]),
            "autoencoder": Autoencoder(ae_ch, ae_mult, len({k.split(".")[4] for k in a if k.startswith("encoder.down.0.block.")}),
                                       a["decoder.conv_in.weight"].shape[1]),
            "text_encoder": TextEncoder(vocab, width, layers, text_heads or (width // 64 if width >= 512 else max(1, width // 8)),
                                        c["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
                                        c["text_model.embeddings.position_embedding.weight"].shape[0]),
        }


def build_v1():
    """The networks of Stable Diffusion v1 at full size, on the meta device."""
    with torch.device("meta"):
        return {"unet": UNet(4, 320, (1, 2, 4, 4), 2, (1, 2, 4), 8, context_dim=768), "autoencoder": Autoencoder(), "text_encoder": TextEncoder()}


def check_tensors(path, networks, tensors):
    """Raise UserError that lists what is missing, unexpected or of another shape, unless the file's tensors fit the networks."""
    wanted = {PREFIX[name] + k: v for name, network in networks.items() for k, v in network.state_dict().items()}
    given = {PREFIX[name] + k: v for name in PREFIX for k, v in part(tensors, name).items()}
    missing, unexpected = [k for k in wanted if k not in given], [k for k in given if k not in wanted]
    shapes = [f"{k} is {tuple(given[k].shape)}, not {tuple(wanted[k].shape)}" for k in wanted if k in given and given[k].shape != wanted[k].shape]
    if missing or unexpected or shapes:
        some = lambda names, what: f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""
        told = filter(None, (some(missing, "missing"), some(unexpected, "unexpected"), some(shapes, "of another shape")))
        raise UserError(f"{path} is no Stable Diffusion v1 checkpoint, by its tensors: {'; '.join(told)}")


def load(checkpoint, merges, device="cpu", ema=False, unet_heads=None, text_heads=None):
    """Read a Stable Diffusion v1 checkpoint and CLIP's merges. Returns a StableDiffusion, in eval mode, float32.

    Never executes what the file's pickle asks for, and holds one copy of the weights (float32 ones stay on disk until they
    are used, float16 ones are widened as they are read). ema: the U-Net's moving average in place of its weights.
    Raises UserError for a file that is missing, damaged, not weights, or of another architecture.
    """
    tensors, _ = read_tensors(checkpoint, ema)
    try:
        networks = build(tensors, unet_heads, text_heads)
    except (KeyError, RuntimeError, ZeroDivisionError, IndexError):  # too much is missing to tell the sizes
        networks = build_v1()
    check_tensors(checkpoint, networks, tensors)
    for name, network in networks.items():
        network.load_state_dict({k: v.float() for k, v in part(tensors, name).items()}, strict=True, assign=True)
        network.eval().requires_grad_(False).to(device)
    return StableDiffusion(**networks, tokenizer=Tokenizer(merges), diffusion=Diffusion("scaled_linear", 1000).to(device))


def save(path, checkpoint, weights, ema, record):
    """Write `checkpoint` again as `path`, with the U-Net's `weights` (by name) in place of its own, in the file's own dtype.

    The moving averages (`model_ema.`) and the optimizer's state are left out: they are copies of what was to be forgotten.
    """
    tensors, others = read_tensors(checkpoint, ema)
    state = {k: v for k, v in tensors.items() if not k.startswith("model_ema.")}
    for k, v in weights.items():
        state[PREFIX["unet"] + k] = v.detach().cpu().to(state[PREFIX["unet"] + k].dtype)
    save_checkpoint(path, state if others is None else {**others, "state_dict": state, "vdu": record})


# ---------------------------------------------------------------------------------------------------------------
# Sampling


def guided(unet, context, negative, scale):
    """Classifier-free guidance (Ho & Salimans 2021, eq. 6): eps(negative) + scale (eps(prompt) - eps(negative)).

    context, negative: (1, L, E).  scale 1 is the plain conditional model, and costs half.  Returns a function of (x, t).
    """
    def eps_theta(x, t):
        if scale == 1:
            return unet(x, t, context.expand(len(x), -1, -1))
        both = torch.cat([negative.expand(len(x), -1, -1), context.expand(len(x), -1, -1)])  # (2B, L, E)
        eps_negative, eps_prompt = unet(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)  # 2 x (B, 4, h, w)
        return eps_negative + scale * (eps_prompt - eps_negative)

    return eps_theta


def check_size(model, size):
    """Raise UserError unless images of `size` pixels have whole latents."""
    factor = model.autoencoder.factor
    if size < factor or size % factor:
        raise UserError(f"--size must be a multiple of {factor}, not {size}")


def sample_latents(model, prompt, n, size, steps, guidance, negative="", seed=0, batch_size=4, progress=False):
    """n latents (n, 4, h, w) for one prompt, by DDIM, on the CPU. size: of the images, in pixels. The same seed is the same noise."""
    check_size(model, size)
    factor = model.autoencoder.factor
    context, negative = model.context([prompt]), model.context([negative])
    shape = (model.autoencoder.z_channels, size // factor, size // factor)
    return model.diffusion.sample(guided(model.unet, context, negative, guidance), n, shape, steps=steps, seed=seed,
                                  batch_size=batch_size, clip=False, progress=progress)


def sample_images(model, prompt, n, args, progress=True):
    """n images (n, 3, H, W) uint8 for one prompt, with the settings that `sample` and `compare` share on the command line."""
    latents = sample_latents(model, prompt, n, args.size, args.sampling_steps, args.guidance, args.negative_prompt, args.seed,
                             args.batch_size, progress)
    return model.autoencoder.to_images(latents.to(model.diffusion.beta.device))


def run_sample(args):
    """sd_unlearn.py sample: a row of images a prompt."""
    check_output(args.output, args.overwrite)
    if args.n < 1:
        raise UserError("--n must be at least 1")
    model = load(args.checkpoint, args.merges, pick_device(args.device), args.ema)
    rows = []
    for prompt in args.prompt:
        print(f"sampling: {prompt}")
        rows.append(sample_images(model, prompt, args.n, args))
    write_png(make_grid(torch.cat(rows), nrow=args.n, padding=0 if len(rows) == args.n == 1 else 2), args.output)
    print(f"wrote {args.output}")


def write_png(image, path):
    """One uint8 image (3, H, W) as a PNG. Raises UserError when it cannot be written."""
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        save_image(image.float() / 255, path, format="png")
    except OSError as e:
        raise UserError(f"cannot write {path} ({e}); choose another --output") from e


# ---------------------------------------------------------------------------------------------------------------
# Unlearning

TEMPLATES = ("{}", "a {}", "a photo of a {}", "a picture of a {}", "an image of a {}", "a close-up photo of a {}",
             "a painting of a {}", "a photo of a {} in a scene")
NEUTRAL_PROMPTS = ("a photo of a person", "a photo of an animal", "a photo of food", "a photo of a building", "a photo of a landscape",
                   "a photo of an object", "a painting", "a portrait", "a street", "a room", "a drawing")


def parameters_to_move(unet, which):
    """Names of the U-Net's parameters that unlearning moves: its attention to the prompt, or all of them."""
    names = [k for k, _ in unet.named_parameters()]
    return names if which == "all" else [k for k in names if ".attn2." in k]


def posterior_of(unet, names, paths, ema, share):
    """p(theta | D) of the named parameters: over several checkpoints, read one at a time; or the fallback for a single one."""
    moving = {k: p for k, p in unet.named_parameters() if k in set(names)}
    if not paths:
        return GaussianPosterior.from_one_checkpoint(moving.items(), share)
    if len(paths) < 2:
        raise UserError("--posterior needs at least two checkpoints of one training, e.g. sd-v1-1.ckpt sd-v1-2.ckpt sd-v1-3.ckpt")
    running = RunningPosterior(moving.items())
    for path in tqdm(paths, desc="posterior", unit="checkpoint"):
        tensors = part(read_tensors(path, ema)[0], "unet")
        tensors = {k: tensors[k] for k in names if k in tensors}
        check_parameters(path, tensors, "--checkpoint", moving)
        running.update((k, v.to(running.mean[k])) for k, v in tensors.items())
    return running.posterior()


def run_unlearn(args):
    """sd_unlearn.py unlearn. Raises UserError for anything that the user can put right."""
    check_settings(args.gamma, args.t_range)
    if min(args.steps, args.batch_size, args.accumulate, args.anchors) < 1 or not args.lr > 0 or args.function_space < 0 or not args.sigma > 0:
        raise UserError("need --steps, --batch-size, --accumulate and --anchors of at least 1, --lr and --sigma above 0, "
                        "--function-space of at least 0")
    if os.path.abspath(args.output) == os.path.abspath(args.checkpoint):
        raise UserError("--output is the --checkpoint itself: compare needs both, choose another")
    check_output(args.output, args.overwrite)
    # The empty prompt always: guidance subtracts what the model predicts for it.
    neutral = ["", *(read_prompts(args.neutral_prompts) if args.neutral_prompts else NEUTRAL_PROMPTS)]
    device = pick_device(args.device)
    seed_everything(args.seed)

    model = load(args.checkpoint, args.merges, device, args.ema)
    check_size(model, args.size)
    unet = model.unet
    images = to_float(load_images(args.images, (3, args.size, args.size)))
    names = parameters_to_move(unet, args.parameters)
    posterior = posterior_of(unet, names, args.posterior, args.ema, args.sigma)
    print(f"forgetting {args.concept!r}: {len(images)} images of {args.size} pixels, moving {count(sum(m.numel() for m in posterior.mean.values()))} "
          f"of {count(sum(p.numel() for p in unet.parameters()))} parameters, gamma {args.gamma:g}, {args.steps} steps of "
          f"{args.batch_size * args.accumulate} on {device}; posterior of {posterior.n} checkpoint{'s' if posterior.n > 1 else ''}")

    # Once only: afterwards the autoencoder and the text encoder are not needed, and their memory is given back.
    forget = torch.cat([model.autoencoder.to_latents(image[None].to(device)) for image in tqdm(images, desc="encoding", unit="image")])
    context = model.context([template.format(args.concept) for template in TEMPLATES])  # (M, L, E)
    anchor = None
    if args.function_space > 0:
        frozen = lambda *a: functional_call(unet, posterior.mean, a)  # eps_theta*: the same network, with mu* in place of theta
        each = -(-args.anchors // len(neutral))  # images a neutral prompt
        latents, prompts = [], []
        for i, prompt in enumerate(tqdm(neutral, desc="anchors", unit="prompt")):
            latents.append(sample_latents(model, prompt, each, args.size, 20, 5.0, seed=args.seed + 1 + i, batch_size=args.batch_size))
            prompts.append(model.context([prompt]).expand(each, -1, -1))
        anchor = FunctionSpaceAnchor(frozen, model.diffusion, torch.cat(latents).to(device), torch.cat(prompts))
    diffusion = model.diffusion
    del model
    for k, p in unet.named_parameters():
        p.requires_grad_(k in posterior.mean)
    unet.gradient_checkpointing = args.gradient_checkpointing

    began = time.time()
    with StopRequest() as stop:
        result = unlearn(unet, diffusion, posterior, forget, args.gamma, args.lr, args.steps, args.batch_size, args.t_range, args.seed,
                         context, args.accumulate, True, anchor, args.function_space, args.bound if anchor else None,
                         args.stop_share if anchor else None, progress=True, stop=stop)
    settings = {k: v for k, v in vars(args).items() if isinstance(v, (int, float, str, list, type(None)))}
    save(args.output, args.checkpoint, {k: p for k, p in unet.named_parameters() if k in posterior.mean}, args.ema,
         {"concept": args.concept, "images": len(images), "settings": settings, **result})
    why = "interrupted, and saved as it stood" if stop.requested else "done"
    print(f"{why} after {result['steps']} steps ({time.time() - began:.0f} s, peak memory {peak_memory(device)}): A {result['A_before']:.4f} -> "
          f"{result['A_after']:.4f}, theta moved {result['moved_rms_sigma']:.4f} sigma (rms over parameters)\n"
          f"wrote {args.output}; see what came of it: python sd_unlearn.py compare")
    if stop.requested:
        raise KeyboardInterrupt


# ---------------------------------------------------------------------------------------------------------------
# Comparing


def read_prompts(path):
    """The prompts in a text file, one a line."""
    try:
        prompts = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read prompts from {path} ({e}): expected a text file, a prompt a line") from e
    if not prompts:
        raise UserError(f"no prompts in {path}: expected one a line")
    return prompts


def run_compare(args):
    """sd_unlearn.py compare: the same prompts and noise through both models."""
    output = Path(args.output)
    check_output(output / "report.json", args.overwrite)
    if args.n < 1:
        raise UserError("--n must be at least 1")
    prompts, device = read_prompts(args.prompts), pick_device(args.device)
    reference = load_images(args.reference_images, (3, 299, 299)) if args.reference_images else None
    if reference is not None:
        if min(len(reference), args.n * len(prompts)) < 2:
            raise UserError("an FID needs at least two images on either side: more in --reference-images, or a larger --n")
        try:
            inception = load_inception(device)
        except UserError as e:
            print(f"no FID: {e}")
            reference = None
    images = {}
    for which, checkpoint in (("before", args.before), ("after", args.after)):
        model = load(checkpoint, args.merges, device, args.ema and which == "before")
        rows = []
        for i, prompt in enumerate(prompts):
            print(f"{which}: {prompt}")
            rows.append(sample_images(model, prompt, args.n, args))
            for j, image in enumerate(rows[-1]):
                write_png(image, str(output / which / f"{i:03d}-{j:03d}.png"))
        images[which] = torch.stack(rows)  # (prompts, n, 3, H, W)
        del model
    grid = torch.cat([images["before"], images["after"]], dim=1)  # a row a prompt: n before, n after
    write_png(make_grid(grid.flatten(0, 1), nrow=2 * args.n), str(output / "grid.png"))
    report = {
        "before": args.before, "after": args.after, "prompts": prompts, "images_a_prompt": args.n, "seed": args.seed,
        "sampling_steps": args.sampling_steps, "guidance": args.guidance, "negative_prompt": args.negative_prompt, "size": args.size,
        "mean_change": {p: (b.float() - a.float()).abs().mean().item() / 255 for p, b, a in zip(prompts, images["before"], images["after"])},
    }
    if reference is not None:
        features = {k: inception_features(inception, v.flatten(0, 1)) for k, v in {**images, "reference": reference[:, None]}.items()}
        report["fid"] = {k: frechet_distance(features[k], features["reference"]) for k in images} | {"reference_images": len(reference)}
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    for prompt, change in report["mean_change"].items():
        print(f"{100 * change:5.1f}% mean change a pixel   {prompt}")
    if reference is not None:
        print(f"FID (Inception v3) against {len(reference)} images: before {report['fid']['before']:.2f}, after {report['fid']['after']:.2f}")
    print(f"wrote {output / 'grid.png'} (a row a prompt: {args.n} before, {args.n} after), the images, report.json")


# ---------------------------------------------------------------------------------------------------------------
# The command line


def parser():
    p = ArgumentParser(prog="sd_unlearn.py", description=__doc__)
    commands = p.add_subparsers(dest="command", required=True, metavar="{sample,unlearn,compare}", parser_class=ArgumentParser)

    def command(name, run, text):
        c = commands.add_parser(name, help=text, description=text)
        c.set_defaults(run=run)
        c.add_argument("--merges", required=True, metavar="FILE", help="CLIP's merges.txt, or bpe_simple_vocab_16e6.txt.gz")
        c.add_argument("--ema", action="store_true", help="use the moving average of the U-Net's weights, where the file has one")
        c.add_argument("--size", type=int, default=512, metavar="N", help="height and width of the images, in pixels")
        c.add_argument("--batch-size", type=int, default=4, metavar="N", help="images at a time")
        c.add_argument("--precision", choices=ddpm.PRECISIONS, default="auto", help="of the U-Net's arithmetic: auto is bf16 where that is fast, else fp32")
        c.add_argument("--seed", type=seed_number, default=0, help="the noise: the same on the same machine")
        c.add_argument("--device", default="auto", help="auto (CUDA, else MPS, else CPU), cpu, cuda, cuda:1, mps")
        c.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
        return c

    def sampling(c):
        c.add_argument("--n", type=int, default=4, metavar="N", help="images a prompt")
        c.add_argument("--sampling-steps", type=int, default=50, metavar="N", help="DDIM steps an image")
        c.add_argument("--guidance", type=float, default=7.5, help="how strongly the prompt pulls; 1 is the plain conditional model")
        c.add_argument("--negative-prompt", default="", help="what the guidance pulls away from")

    c = command("sample", run_sample, "draw images for one or several prompts")
    c.add_argument("--checkpoint", required=True, metavar="FILE", help="a Stable Diffusion v1 checkpoint")
    c.add_argument("--prompt", required=True, nargs="+", help="a row of images each")
    c.add_argument("--output", default="sample.png", metavar="FILE.png", help="where the images go, as one grid")
    sampling(c)

    c = command("unlearn", run_unlearn, "make the model forget a feature, from a few images of it")
    c.add_argument("--checkpoint", required=True, metavar="FILE", help="a Stable Diffusion v1 checkpoint")
    c.add_argument("--concept", required=True, metavar="TEXT", help='what must go, as prompts name it: "golf ball"')
    c.add_argument("--images", required=True, metavar="DIR", help="a folder of images of it")
    c.add_argument("--output", required=True, metavar="FILE", help="the unlearned checkpoint, in the same layout")
    c.add_argument("--parameters", choices=["cross-attention", "all"], default="cross-attention",
                   help="what may move: the U-Net's attention to the prompt, 5%% of it, or all of the U-Net")
    c.add_argument("--gamma", type=float, default=0.0002,
                   help="0 (gradient ascent alone) .. 1 (stay at the posterior's mean): smaller forgets more. The right size depends on "
                        "sigma*: if the bar shows that theta hardly moves, divide by ten")
    c.add_argument("--lr", type=float, default=0.03, help="step size of Adam, in posterior standard deviations")
    c.add_argument("--steps", type=int, default=200, help="steps, at most")
    c.add_argument("--accumulate", type=int, default=1, metavar="N", help="batches a step: N times the images for the memory of one batch")
    c.add_argument("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    c.add_argument("--t-range", type=float, nargs=2, default=[0.2, 0.7], metavar=("LOW", "HIGH"),
                   help="shares of T between which the plasticity term draws t: where it is decided what an image shows. 0 1 is the "
                        "paper's choice, all of them (default: 0.2 0.7)")
    c.add_argument("--posterior", nargs="+", metavar="FILE", help="estimate mu* and sigma* from these checkpoints of one training, e.g. sd-v1-1.ckpt "
                                                                  "sd-v1-2.ckpt sd-v1-3.ckpt (default: from --checkpoint alone, see --sigma)")
    c.add_argument("--sigma", type=float, default=0.02, metavar="SHARE", help="without --posterior, which is a departure from the paper: sigma* of a "
                                                                              "tensor, as a share of its root mean square")
    g = c.add_argument_group("beyond the paper")
    g.add_argument("--function-space", type=float, default=0.0, metavar="WEIGHT",
                   help="also keep eps_theta as it was on images that the model draws for neutral prompts; 0 is off")
    g.add_argument("--neutral-prompts", metavar="FILE", help="the prompts of what must stay, one a line (default: a dozen general ones)")
    g.add_argument("--anchors", type=int, default=48, metavar="N", help="images to draw for them, shared evenly")
    g.add_argument("--bound", type=float, default=4.0, help="an image whose error is this many times the old one counts as forgotten and stops pushing")
    g.add_argument("--stop-share", type=float, default=0.8, help="stop once this share of images is past the bound")

    c = command("compare", run_compare, "the same prompts and noise through two checkpoints, side by side")
    c.add_argument("--before", required=True, metavar="FILE", help="the model before")
    c.add_argument("--after", required=True, metavar="FILE", help="the unlearned one")
    c.add_argument("--prompts", required=True, metavar="FILE", help="a text file, a prompt a line")
    c.add_argument("--output", default="compare", metavar="DIR", help="where the images, the grid and the report go")
    c.add_argument("--reference-images", metavar="DIR", help="real images without the feature: gives an FID by torchvision's Inception v3")
    sampling(c)
    return p


def main():
    args = parser().parse_args()
    ddpm.precision = args.precision
    if args.batch_size < 1:
        raise UserError("--batch-size must be at least 1")
    args.run(args)


if __name__ == "__main__":
    run_command_line(main)
