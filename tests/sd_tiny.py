"""A complete Stable Diffusion that fits into a test: trained here on drawn circles and
squares, with prompts, in under a minute.

Holds    the drawings, a recogniser for them, the training, and a writer of checkpoint
         files as published ones are.
Run as   a program by conftest.py: python sd_tiny.py FOLDER trains, python sd_tiny.py
         COMMAND ... is sd_unlearn.py for networks of these sizes.
Writes   a checkpoint in Stable Diffusion v1's layout, merges, circles/ and squares/:
         into the folder it is given.
"""

import sys
import types
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.datasets.folder import default_loader
from torchvision.transforms.v2.functional import pil_to_tensor
from torchvision.utils import save_image

import sd_unlearn
from ddpm import Diffusion, run_command_line
from sd_unlearn import LATENT_SCALE, PREFIX, TEMPLATES, Autoencoder, TextEncoder, Tokenizer
from unet import UNet

SIZE, SHAPES = 16, ("circle", "square")
SIZES = {  # in place of sd_unlearn.SIZES
    "unet": dict(in_channels=4, model_channels=32, channel_mult=(1, 2), num_res_blocks=1,
                 attention_resolutions=(2,), num_heads=4, context_dim=32),
    "autoencoder": dict(ch=16, ch_mult=(1, 2), num_res_blocks=1, z_channels=4),
    "text_encoder": dict(vocab_size=518, width=32, layers=2, num_heads=4, mlp_width=128),
}


def draw(shape, radius, dy, dx):
    """One white shape on black: (16, 16) in 0 .. 1, its edge softened."""
    y, x = torch.meshgrid(torch.arange(SIZE) - 7.5 - dy, torch.arange(SIZE) - 7.5 - dx,
                          indexing="ij")
    inside = radius - (y**2 + x**2).sqrt()
    if shape == "square":
        inside = 0.9 * radius - torch.maximum(y.abs(), x.abs())
    ring = 1.2 - (inside - 1.2).abs()  # outlines: full discs and full squares are too much alike
    return (ring + 0.5).clamp(0, 1)


def drawings(shape, n, seed=0):
    """n of them, of random size and place: (n, 3, 16, 16) in [-1, 1]."""
    g = torch.Generator().manual_seed(seed)
    r, dy, dx = 4.5 + torch.rand(n, generator=g), *(torch.rand(2, n, generator=g) - 0.5)
    images = torch.stack([draw(shape, *args) for args in zip(r, dy, dx)])
    return (2 * images - 1)[:, None].expand(-1, 3, -1, -1).contiguous()


def recognise(images):
    """For each image (N, 3, 16, 16), "circle", "square", or None if it is like no
    drawing: by its best correlation with any."""
    grid = torch.cartesian_prod(torch.linspace(4, 6, 5), torch.linspace(-1, 1, 5),
                                torch.linspace(-1, 1, 5))
    whiten = lambda x: F.normalize(x.flatten(1) - x.flatten(1).mean(1, keepdim=True), dim=1)
    flat = whiten(images.float().mean(1))  # (N, 256)
    best = torch.stack([(flat @ whiten(torch.stack([draw(s, *g) for g in grid])).T).amax(1)
                        for s in SHAPES])  # (2, N)
    return [SHAPES[i] if score > 0.85 else None for score, i in zip(*best.max(0))]


def read_image(path):
    return pil_to_tensor(default_loader(path))  # (3, H, W) uint8


def read_grid(path):
    """Its images, without the borders: (rows, columns, 3, 16, 16) uint8."""
    grid = read_image(path)[:, 2:, 2:]
    return grid.unfold(1, SIZE, SIZE + 2).unfold(2, SIZE, SIZE + 2).permute(1, 2, 0, 3, 4)


def train(folder, seed=0, ae_steps=200, steps=600):
    """Train the three networks, and write what the top of this file says."""
    torch.manual_seed(seed)
    (folder / "merges.txt").write_text("#version: 0.2\nc i\nci r\ns q\nsq u\n")
    tokenizer = Tokenizer(folder / "merges.txt")
    images = torch.cat([drawings(shape, 1000, i) for i, shape in enumerate(SHAPES)])  # (2000, ...)

    autoencoder = Autoencoder(**SIZES["autoencoder"])
    optimizer = torch.optim.Adam(autoencoder.parameters(), 2e-3)
    for _ in range(ae_steps):
        x = images[torch.randint(len(images), (16,))]
        mean, logvar = autoencoder.encode(x).chunk(2, 1)
        z = mean + (logvar / 2).exp() * torch.randn_like(mean)
        kl = (mean.square() + logvar.exp() - 1 - logvar).mean() / 2
        loss = (autoencoder.decode(z) - x).square().mean() + 1e-3 * kl
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    autoencoder.eval()
    with torch.no_grad():
        # The published autoencoder's latents have a spread of 1 / LATENT_SCALE; this
        # one's are scaled to match.
        mean = torch.cat([autoencoder.encode(x).chunk(2, 1)[0] for x in images.split(500)])
        scale = 1 / (LATENT_SCALE * mean.std())
        for p in (autoencoder.quant_conv.weight, autoencoder.quant_conv.bias):
            p[:4] *= scale
        autoencoder.quant_conv.bias[4:] += 2 * scale.log()
        autoencoder.post_quant_conv.weight /= scale
        latents = torch.cat([autoencoder.to_latents(x) for x in images.split(500)])  # 4 x 8 x 8

    text = TextEncoder(**SIZES["text_encoder"])
    unet = UNet(**SIZES["unet"])
    diffusion = Diffusion("scaled_linear", 1000)
    prompts = [template.format(shape) for shape in SHAPES for template in TEMPLATES] + [""]
    ids, n = tokenizer(prompts), len(TEMPLATES)
    meaning = torch.tensor([1.0] * n + [-1.0] * n + [0.0])
    optimizer = torch.optim.Adam(text.parameters(), 3e-3)
    # first teach the text encoder what the two words mean, as CLIP was before Stable
    # Diffusion's training
    for _ in range(80):
        loss = (text(ids)[..., :4] - meaning[:, None, None]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    contexts = text(ids).detach()  # (17, 77, 32)
    optimizer = torch.optim.Adam(unet.parameters(), 2e-3)
    average = AveragedModel(unet, multi_avg_fn=get_ema_multi_avg_fn(0.98))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 20, 1.2 * (1 - step / steps))
        index = torch.randint(len(images), (16,))
        prompt = (index >= 1000) * n + torch.randint(n, (16,))
        prompt[torch.rand(16) < 0.1] = 2 * n  # the empty prompt now and then, for guidance
        context = contexts[prompt]
        x0, t = latents[index], torch.randint(1000, (16,))
        loss = diffusion.simple_loss(lambda x, t: unet(x, t, context), x0, t,
                                     torch.randn_like(x0)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update_parameters(unet)
    networks = {"unet": average.module, "autoencoder": autoencoder, "text_encoder": text}
    write_published(folder / "tiny.ckpt", {PREFIX[k] + name: v for k, m in networks.items()
                                           for name, v in m.state_dict().items()})
    for shape in SHAPES:
        (folder / f"{shape}s").mkdir()
        for i, image in enumerate(drawings(shape, 40, seed=9)):
            save_image(image / 2 + 0.5, folder / f"{shape}s" / f"{i}.png")


def write_published(path, state_dict):
    """A checkpoint file as Lightning writes it: the state dict beside counters and
    objects of packages that a reader may lack."""
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    for name, base in (("ModelCheckpoint", object), ("AttributeDict", dict)):
        setattr(module, name, type(name, (base,), {"__module__": module.__name__}))
    sys.modules |= {name: types.ModuleType(name) for name in (
        "pytorch_lightning", "pytorch_lightning.callbacks")} | {module.__name__: module}
    callback = module.ModelCheckpoint()
    callback.monitor, callback.best = "val/loss", torch.tensor(0.1)
    torch.save({"epoch": 1, "global_step": 470000, "pytorch-lightning_version": "1.4.2",
                "state_dict": state_dict, "callbacks": {module.ModelCheckpoint: {"best": callback}},
                "hyper_parameters": module.AttributeDict(lr=1e-4), "optimizer_states": []}, path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) == 2:
        train(Path(sys.argv[1]))
    else:
        sd_unlearn.SIZES = SIZES
        run_command_line(sd_unlearn.main)
