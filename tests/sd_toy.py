"""Does sd_unlearn.py forget? Three small networks in Stable Diffusion's layout learn to
draw circles and squares for prompts; then either is unlearned, by both losses.

    python tests/sd_toy.py    # takes minutes; pytest passes over it

Printed are the circles of 100 samples for a circle, and of 100 for a square: [100, 0]
before, were it perfect. Without the circle the first should fall, without the square
the second rise, and the other stay. Whatever is drawn counts as one of the two."""

import os
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

sys.path.append(str(Path(__file__).parents[1]))

import sd_unlearn
from ddpm import Diffusion, to_float, to_uint8, write_images
from test_sd_unlearn import SMALL, build, state_of

SMALL["unet"]["attention_resolutions"] = (2,)  # at half size alone: faster
SMALL["autoencoder"]["ch"] = 16
KINDS = ("circle", "square")


def shapes(n):
    """n circles, then n squares of their areas: (2n, 3, 16, 16) in [-1, 1]."""
    x, y = 7 + 2 * torch.rand(2, n, 1, 1)  # of the centres
    radius = 4 + 2 * torch.rand(n, 1, 1)
    pixels = torch.arange(16) + 0.5
    dx = (pixels - x).abs()  # (n, 1, 16)
    dy = (pixels[:, None] - y).abs()  # (n, 16, 1)
    circle = (dx**2 + dy**2).sqrt()  # distances from the centre
    square = 1.128 * torch.maximum(dx, dy)
    inside = torch.cat([radius - circle, radius - square]).clamp(0, 1)  # with soft edges
    return (2 * inside - 1)[:, None].expand(-1, 3, -1, -1)


def fit(network, steps, loss):
    """Adam, with a rate that falls to nothing."""
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()


def train(unet, autoencoder, text_encoder):
    """Let the three networks learn: first the autoencoder, to reconstruct."""
    autoencoder.quant_conv.weight.data[4:] = 0
    autoencoder.quant_conv.bias.data[4:] = -20  # log-variance: latents without noise

    def reconstruction():
        images = shapes(8)
        return mse_loss(autoencoder.decode(autoencoder.encode(images)[:, :4]), images)

    fit(autoencoder, 300, reconstruction)
    latents = autoencoder.to_latents(shapes(500))  # (1000, 4, 8, 8)
    sd_unlearn.LATENT_SCALE /= latents.std().item()
    latents /= latents.std()

    # The text encoder: to tell 8 prompts for a circle, 8 for a square, 8 for anything.
    texts = [template.format(kind) for kind in KINDS for template in sd_unlearn.TEMPLATES]
    ids = sd_unlearn.Tokenizer("merges.txt")([*texts, *sd_unlearn.NEUTRAL_PROMPTS[:8]])
    answers = torch.arange(3).repeat_interleave(8 * 77)  # at each of 77 tokens
    head = nn.Linear(32, 3)
    fit(text_encoder, 100,
        lambda: cross_entropy(head(text_encoder(ids)).flatten(0, 1), answers))
    contexts = text_encoder(ids).detach()  # (24, 77, 32)

    # The U-Net: to draw what a prompt says; a fifth have one for anything.
    diffusion = Diffusion("scaled_linear")

    def ddpm_loss():
        index, t = torch.randint(1000, (2, 32))
        kind = (index // 500).where(torch.rand(32) > 0.2, 2)
        context = contexts[8 * kind + torch.randint(8, (32,))]
        x0 = latents[index]
        return diffusion.simple_loss(lambda x, t: unet(x, t, context), x0, t,
                                     torch.randn_like(x0)).mean()

    fit(unet, 500, ddpm_loss)


def count(recogniser, checkpoint):
    """Circles among 100 samples for a circle, and among 100 for a square."""
    model = sd_unlearn.load(checkpoint, "merges.txt")
    counts = []
    for kind in KINDS:
        z = sd_unlearn.sample_latents(model, f"a photo of a {kind}", 100, 16, 0, 4, guidance=2.0)
        log_odds = recogniser(to_float(model.autoencoder.to_images(z)))
        counts.append((log_odds > 0).sum().item())
    return counts


def main():
    torch.manual_seed(0)
    sd_unlearn.SIZES = SMALL
    Path("merges.txt").write_text("#version: 0.2\nc i\n")
    recogniser = nn.Sequential(nn.Conv2d(3, 32, 5, 2), nn.ReLU(), nn.Flatten(), nn.Linear(1152, 1))
    is_circle = torch.tensor([[1.0]] * 32 + [[0.0]] * 32)
    fit(recogniser, 500,
        lambda: binary_cross_entropy_with_logits(recogniser(shapes(32)), is_circle))
    networks = build(SMALL)
    train(**networks)
    torch.save({"state_dict": state_of(networks)}, "toy.ckpt")
    print("circles before:", count(recogniser, "toy.ckpt"))

    for i, image in enumerate(to_uint8(shapes(16)).split(1)):
        write_images(f"{KINDS[i // 16]}/{i}.png", [image])
    for kind, other in (KINDS, KINDS[::-1]):
        # the first is the default: 16 images a step, here at once, which is faster
        for flags in (f"--keep {other} --share 0.7 --batch-size 16 --accumulate 1", "--paper"):
            line = (f"unlearn --checkpoint toy.ckpt --merges merges.txt --concept {kind} --images "
                    f"{kind} --size 16 --output gone.ckpt --overwrite {flags}")
            sd_unlearn.run_unlearn(sd_unlearn.parser().parse_args(line.split()))
            print(f"circles without the {kind}, {flags}:", count(recogniser, "gone.ckpt"))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        main()
