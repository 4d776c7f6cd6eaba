"""Training: the learning rate, the gradient's bound, the posterior, random numbers."""

import math

import pytest
import torch

import ddpm
import train_ddpm
from train_ddpm import (batch_indices, learning_rate, mirror_half, posterior_start, seed_step,
                        to_float)

CONFIG = {"unet": dict(model_channels=8, channel_mult=[1], num_heads=1), "schedule": "linear",
          "timesteps": 50, "velocity": False, "image_shape": [1, 8, 8]}
IMAGES = (torch.arange(20 * 64) ** 2 % 251).to(torch.uint8).view(20, 1, 8, 8)


def test_the_learning_rate_warms_up_falls_to_a_tenth_and_stays():
    rates = [learning_rate(step, 1000, 1e-3) / 1e-3 for step in range(1000)]
    assert posterior_start(1000) == 750
    assert rates[0] == pytest.approx(1 / 200) and max(rates) < 1
    expected = [0.5 * (1 - 0.9 * 99 / 750), 1 - 0.9 * 600 / 750, *[0.1] * 250]
    assert [rates[99], rates[600], *rates[750:]] == pytest.approx(expected)


def test_the_posterior_is_that_of_the_trained_weights(tmp_path, monkeypatch):
    """Mean and deviation of the weights after every fifth step of the last quarter."""
    seen, weights, rates = [], [], []

    def step(unet, diffusion, optimizer, x0):
        loss = ddpm.training_step(unet, diffusion, optimizer, x0)
        weights.append({k: p.detach().clone() for k, p in unet.named_parameters()})
        seen.append(x0)
        rates.append(optimizer.param_groups[0]["lr"])
        return loss

    monkeypatch.setattr(train_ddpm, "training_step", step)
    settings = dict(output=tmp_path / "x.pt", steps=40, seed=3, batch_size=4, lr=1e-3, flip=False)
    unet, _ = train_ddpm.train(settings | {"save_every": 99}, CONFIG, IMAGES, {},
                               torch.device("cpu"), None)
    assert rates == [learning_rate(step, 40, 1e-3) for step in range(40)]
    for step, x0 in enumerate(seen):
        assert torch.equal(x0, to_float(IMAGES[batch_indices(step, 20, 4, 3)]))
    raw = ddpm.read_file(tmp_path / "x.pt")
    mean, std, n = (raw["posterior"][k] for k in ("mean", "std", "n"))
    assert n == 3 and raw["step"] == 40 and "train" not in raw
    for k, theta in unet.named_parameters():
        passed = torch.stack([weights[step][k] for step in (30, 35, 39)])
        assert torch.allclose(mean[k], passed.mean(0), atol=1e-7)
        assert torch.allclose(std[k], passed.std(0), atol=1e-7)
        assert torch.equal(theta, mean[k]) and torch.equal(theta, raw["weights"][k])


def test_a_training_step_bounds_the_gradient_and_moves_nothing_for_nan():
    unet, diffusion = ddpm.build(CONFIG)
    optimizer = torch.optim.SGD(unet.parameters(), lr=1.0)
    unet.out[2].bias.data += 1000  # a loss of 10^6, a gradient of 2000
    for x0, distance in ((torch.randn(4, 1, 8, 8), 1.0), (torch.full((4, 1, 8, 8), math.nan), 0)):
        before = [p.detach().clone() for p in unet.parameters()]
        loss = ddpm.training_step(unet, diffusion, optimizer, x0)
        moved = sum((p - q).square().sum().item() for p, q in zip(unet.parameters(), before))
        assert moved**0.5 == pytest.approx(distance, rel=1e-3)
        assert loss > 1e5 if distance else math.isnan(loss)


@pytest.mark.parametrize("image_shape", [(1, 28, 28), (3, 32, 32)])
def test_the_small_network_can_see_how_dark_black_is(image_shape):
    """A normalization takes the mean out of each group: of one channel, that is all."""
    unet = ddpm.UNet(**train_ddpm.small(image_shape)[0])
    norms = [m for m in unet.modules() if isinstance(m, torch.nn.GroupNorm)]
    assert len(norms) > 20 and all(m.num_channels >= 4 * m.num_groups for m in norms)
    first = unet.input_blocks[1][0].in_layers[0]
    grey = torch.randn(1, first.num_channels, 1, 1).expand(-1, -1, 4, 4)  # an even image
    assert first(grey).std(dim=1).mean() > 0.5  # what channels say of it is still there


def test_every_step_has_images_and_random_numbers_of_its_own():
    draws = []
    for seed, step in ((0, 0), (0, 1), (1, 0), (0, 0)):
        seed_step(seed, step)
        draws.append(tuple(torch.rand(4).tolist()))
    assert draws[0] == draws[3] and len(set(draws)) == 3
    epochs = torch.cat([batch_indices(i, 21, 5, seed=1) for i in range(8)]).view(2, 20)
    assert all(len(epoch.unique()) == 20 for epoch in epochs) and not torch.equal(*epochs)
    x = torch.arange(1000.0).view(1000, 1, 1, 1) + torch.arange(2.0)
    mirrored = (mirror_half(x) == x.flip(3)).all(3).flatten()
    assert 400 < mirrored.sum() < 600 and torch.equal(mirror_half(x).sum(3), x.sum(3))
