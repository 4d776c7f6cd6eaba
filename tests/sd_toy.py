"""Does sd_unlearn.py forget? Three small networks in the published layout learn to draw
circles and squares for prompts; then the circles are unlearned.

    python tests/sd_toy.py

Prints, for the default loss and for --paper, how many of 100 samples for either prompt
a recogniser takes for circles. No test: it takes minutes, and pytest passes over it."""

import os
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss
from tqdm import trange

sys.path.append(str(Path(__file__).parents[1]))

import sd_unlearn
from ddpm import Diffusion, to_float, to_uint8, write_images
from sd_unlearn import NEUTRAL_PROMPTS, TEMPLATES
from test_sd_unlearn import SMALL, build, state_of

KINDS = ("circle", "square")


def shapes(n, kind):
    """n images (n, 3, 16, 16) in [-1, 1]: bright, anywhere, with soft edges. A square
    has the area of a circle."""
    x, y = 6 + 4 * torch.rand(2, n, 1, 1)  # of the centres
    radius = 3 + 2 * torch.rand(n, 1, 1)
    pixels = torch.arange(16) + 0.5
    dx = pixels - x  # (n, 1, 16)
    dy = pixels[:, None] - y  # (n, 16, 1)
    distance = (dx**2 + dy**2).sqrt()
    if kind == "square":
        distance = 1.128 * torch.maximum(dx.abs(), dy.abs())
    inside = (radius - distance).clamp(0, 1)
    return (2 * inside - 1)[:, None].expand(-1, 3, -1, -1)


def both(n):
    """n circles, then n squares."""
    return torch.cat([shapes(n, kind) for kind in KINDS])


def fit(what, network, loss, steps):
    """Adam, with a rate that falls to nothing."""
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in trange(steps, desc=what):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()


def train_recogniser():
    """A network: images -> the log-odds of a circle."""
    net = nn.Sequential(nn.Conv2d(3, 32, 5, 2), nn.ReLU(), nn.Flatten(), nn.Linear(1152, 1))
    labels = torch.tensor([[1.0]] * 32 + [[0.0]] * 32)

    def loss():
        return binary_cross_entropy_with_logits(net(both(32)), labels)

    fit("recogniser", net, loss, 500)
    return net


def train_autoencoder(autoencoder):
    """To reconstruct from the mean. Then latents get the variance 1, nearly all of it
    that of the mean."""
    def mean_of(images):
        return autoencoder.encode(images)[:, :4]

    def loss():
        images = both(8)
        return mse_loss(autoencoder.decode(mean_of(images)), images)

    fit("autoencoder", autoencoder, loss, 200)
    with torch.no_grad():
        autoencoder.quant_conv.weight[4:] = 0
        autoencoder.quant_conv.bias[4:] = -20  # the log-variance
        sd_unlearn.LATENT_SCALE = 1 / mean_of(both(32)).std().item()


def train_unet(unet, latents, contexts):
    """latents: (2, 500, 4, 8, 8), circles and squares.  contexts: of prompts for
    circles, for squares, and for anything, which every fifth image has."""
    diffusion = Diffusion("scaled_linear", 1000)

    def loss():
        kind = torch.randint(2, (32,))
        x0 = latents[kind, torch.randint(500, (32,))]
        said = kind.where(torch.rand(32) > 0.2, 2)
        context = torch.stack([contexts[k][torch.randint(8, ())] for k in said])
        t = torch.randint(1000, (32,))
        return diffusion.simple_loss(lambda x, t: unet(x, t, context), x0, t,
                                     torch.randn_like(x0)).mean()

    fit("U-Net", unet, loss, 1200)


def train():
    """Write toy.ckpt, merges.txt and circles/."""
    Path("merges.txt").write_text("#version: 0.2\nc i\n")
    tokenizer = sd_unlearn.Tokenizer("merges.txt")
    networks = build(SMALL)
    train_autoencoder(networks["autoencoder"])

    with torch.no_grad():
        latents = networks["autoencoder"].to_latents(both(500)).unflatten(0, (2, 500))
        prompts = [[template.format(kind) for template in TEMPLATES] for kind in KINDS]
        contexts = [networks["text_encoder"](tokenizer(texts))
                    for texts in (*prompts, NEUTRAL_PROMPTS)]
    train_unet(networks["unet"], latents, contexts)

    torch.save({"state_dict": state_of(networks)}, "toy.ckpt")
    for i in range(16):
        write_images(f"circles/{i}.png", [to_uint8(shapes(1, "circle"))])


@torch.no_grad()
def count(recogniser, checkpoint):
    """Circles among 100 samples for a circle, and among 100 for a square."""
    model = sd_unlearn.load(checkpoint, "merges.txt")
    counts = []
    for kind in KINDS:
        z = sd_unlearn.sample_latents(model, f"a photo of a {kind}", 100, 16, 20, 2.0)
        images = to_float(model.autoencoder.to_images(z))
        counts.append((recogniser(images) > 0).sum().item())
    return counts


def main():
    torch.manual_seed(0)
    sd_unlearn.SIZES = SMALL
    recogniser = train_recogniser()
    train()
    print("circles before, of 100 for a circle and for a square:", count(recogniser, "toy.ckpt"))
    for flags in ("", "--paper"):
        line = ("unlearn --checkpoint toy.ckpt --merges merges.txt --concept circle --images "
                f"circles --size 16 --output gone.ckpt --overwrite {flags}")
        sd_unlearn.run_unlearn(sd_unlearn.parser().parse_args(line.split()))
        print(f"circles after {line}:", count(recogniser, "gone.ckpt"))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        main()
