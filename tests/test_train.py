"""Training: the learning rate, the gradient's bound, the posterior, random numbers."""

import copy
from types import SimpleNamespace

import torch
from pytest import MonkeyPatch, approx, fixture, mark
from torch.nn.utils import parameters_to_vector

import ddpm
import train_ddpm
from train_ddpm import (GaussianPosterior, batch_indices, learning_rate, mirror_half, seed_step,
                        to_float)
from unet import UNet

CONFIG = {
    "unet": dict(model_channels=8, channel_mult=[1], num_heads=1),
    "schedule": "linear",
    "timesteps": 50,
    "velocity": False,
    "image_shape": [1, 8, 8]}
IMAGES = torch.randint(256, (20, 1, 8, 8), dtype=torch.uint8)


@mark.parametrize("step, share", [
    (0, 1 / 200),
    (99, 0.5 * (1 - 0.9 * 99 / 750)),
    (600, 1 - 0.9 * 600 / 750),
    (750, 0.1),
    (999, 0.1)])
def test_the_learning_rate_warms_up_falls_to_a_tenth_and_stays(step, share):
    assert learning_rate(step, 1000, 1e-3) == approx(1e-3 * share)


@fixture(scope="module")
def trained(tmp_path_factory):
    """A network after 40 steps, its file, and what each step saw and left behind."""
    path = str(tmp_path_factory.mktemp("trained") / "x.pt")
    seen = []

    def step(unet, diffusion, optimizer, x0):
        loss = ddpm.training_step(unet, diffusion, optimizer, x0)
        weights = copy.deepcopy(unet.state_dict())
        rate = optimizer.param_groups[0]["lr"]
        seen.append(SimpleNamespace(x0=x0, rate=rate, weights=weights))
        return loss

    settings = dict(
        output=path,
        overwrite=False,
        steps=40,
        seed=3,
        batch_size=4,
        lr=1e-3,
        flip=False)
    cpu = torch.device("cpu")
    run = train_ddpm.Run(settings, CONFIG, {}, cpu)
    with MonkeyPatch.context() as patch:
        patch.setattr(train_ddpm, "training_step", step)
        train_ddpm.train(run, IMAGES, cpu)
    return run.unet, ddpm.read_file(path), seen


def test_each_step_has_its_batch_and_learning_rate(trained):
    _, _, seen = trained

    for i, step in enumerate(seen):
        batch = IMAGES[batch_indices(i, 20, 4, 3)]
        assert torch.equal(step.x0, to_float(batch))
        assert step.rate == learning_rate(i, 40, 1e-3)


def test_the_posterior_is_of_every_fifth_step_of_the_last_quarter_and_the_last(trained):
    _, saved, seen = trained
    posterior = GaussianPosterior(**saved["posterior"])

    assert posterior.n == 3
    for k, mean in posterior.mean.items():
        std = posterior.std[k]
        weights = torch.stack([seen[i].weights[k] for i in (30, 35, 39)])
        assert torch.allclose(mean, weights.mean(0), atol=1e-7)
        assert torch.allclose(std, weights.std(0), atol=1e-7)


def test_the_network_and_its_file_are_the_posteriors_mean(trained):
    unet, saved, _ = trained

    for k, mean in saved["posterior"]["mean"].items():
        assert torch.equal(mean, saved["weights"][k])
        assert torch.equal(mean, unet.state_dict()[k])


def test_a_training_step_bounds_the_gradient():
    unet, diffusion = ddpm.build(CONFIG)
    unet.out[2].bias.data += 1000  # a gradient of 2000
    optimizer = torch.optim.SGD(unet.parameters(), lr=1.0)
    before = parameters_to_vector(unet.parameters())
    x0 = torch.zeros(4, 1, 8, 8)

    loss = ddpm.training_step(unet, diffusion, optimizer, x0)

    moved = parameters_to_vector(unet.parameters()) - before
    assert moved.norm().item() == approx(1, rel=1e-3)
    assert loss == approx(1e6, rel=0.01)


@mark.parametrize("image_shape", [(1, 28, 28), (3, 32, 32)])
def test_the_small_network_can_see_how_dark_black_is(image_shape):
    """A normalization takes the mean out of each group: of one channel, that is all."""
    arguments, _ = train_ddpm.small(image_shape)

    for layer in UNet(**arguments).modules():
        if isinstance(layer, torch.nn.GroupNorm):
            channels = torch.randn(1, layer.num_channels, 1, 1)
            even = channels.expand(-1, -1, 4, 4)
            assert layer(even).std(dim=1).mean() > 0.5


def test_seed_and_step_say_what_a_step_draws():
    def draw(seed, step):
        seed_step(seed, step)
        return torch.rand(()).item()

    assert draw(0, 0) == draw(0, 0)
    assert len({draw(0, 0), draw(0, 1), draw(1, 0)}) == 3


def test_an_epoch_sees_no_image_twice_and_each_has_its_own_order():
    batches = [batch_indices(step, 21, 5, seed=1) for step in range(8)]

    first, second = torch.cat(batches).split(20)

    assert len(first.unique()) == len(second.unique()) == 20
    assert not torch.equal(first, second)


def test_half_of_the_images_are_mirrored():
    x = torch.rand(1000, 1, 1, 2)

    y = mirror_half(x)

    mirrored = (y == x.flip(3)).all(3).sum()
    others = (y == x).all(3).sum()
    assert 400 < mirrored < 600
    assert mirrored + others == 1000
