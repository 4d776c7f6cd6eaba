"""Training: the learning rate, the gradient's bound, what enters the posterior."""

import argparse
import math

import pytest
import torch

import ddpm
from train_ddpm import RunningPosterior, Training, learning_rate, posterior_start, seed_step

CONFIG = {"unet": dict(model_channels=8, channel_mult=[1], num_heads=1), "schedule": "linear",
          "timesteps": 50, "velocity": False, "image_shape": [1, 8, 8]}


def settings(**changes):
    return argparse.Namespace(**{**dict(steps=400, lr=1e-3, posterior_fraction=0.25,
                                        posterior_every=5, output="x.pt"), **changes})


def test_learning_rate_warms_up_falls_to_a_tenth_and_stays():
    args = settings(steps=1000)
    rates = [learning_rate(step, args) / args.lr for step in range(1000)]
    assert posterior_start(args) == 750
    assert rates[0] == pytest.approx(1 / 200)
    assert rates[99] == pytest.approx(0.5 * (1 - 0.9 * 99 / 750))
    assert max(rates) < 1 and rates[600] == pytest.approx(1 - 0.9 * 600 / 750)
    assert all(r == pytest.approx(0.1) for r in rates[750:])
    run = Training(args, CONFIG, {}, torch.device("cpu"))
    for step in (0, 300, 800):
        run.step = step
        run.update(torch.zeros(4, 1, 8, 8))
        assert run.optimizer.param_groups[0]["lr"] == learning_rate(step, args)


def test_the_posterior_is_that_of_the_trained_weights():
    """Mean and deviation of the weights after every fifth step of the last quarter."""
    torch.manual_seed(0)
    run = Training(settings(steps=40), CONFIG, {}, torch.device("cpu"))
    passed = []
    for step in range(40):
        run.update(torch.randn(4, 1, 8, 8))
        if step >= 30 and (step % 5 == 0 or step == 39):
            passed.append({k: p.detach().clone() for k, p in run.unet.named_parameters()})
    posterior = run.running.posterior()
    assert posterior["n"] == len(passed) == 3
    for k in passed[0]:
        weights = torch.stack([w[k] for w in passed])
        assert torch.allclose(posterior["mean"][k], weights.mean(0), atol=1e-7)
        assert torch.allclose(posterior["std"][k], weights.std(0), atol=1e-7)
        assert torch.equal(run.theta_star()[k], posterior["mean"][k])


def test_a_training_step_bounds_the_gradient_and_moves_nothing_for_nan():
    unet, diffusion = ddpm.build(CONFIG)
    optimizer = torch.optim.SGD(unet.parameters(), lr=1.0)
    with torch.no_grad():
        unet.out[2].bias += 1000  # a loss of 10^6, a gradient of 2000
    before = {k: p.detach().clone() for k, p in unet.named_parameters()}
    loss = ddpm.training_step(unet, diffusion, optimizer, torch.randn(4, 1, 8, 8))
    moved = math.sqrt(sum((p - before[k]).square().sum().item()
                          for k, p in unet.named_parameters()))
    assert loss > 1e5 and moved == pytest.approx(1.0, rel=1e-3)
    before = {k: p.detach().clone() for k, p in unet.named_parameters()}
    assert math.isnan(ddpm.training_step(unet, diffusion, optimizer,
                                         torch.full((4, 1, 8, 8), math.nan)))
    assert all(torch.equal(p, before[k]) for k, p in unet.named_parameters())


def test_a_run_continues_on_the_device_that_it_ran_on():
    """What a file holds is on the CPU: it is copied to where the network is."""
    passed = {"weight": torch.ones(3)}
    saved, running = (RunningPosterior({"weight": torch.ones(3, device=d)}.items())
                      for d in ("cpu", "meta"))  # meta stands for an accelerator
    saved.update(passed.items())
    running.load_state_dict(saved.state_dict())
    assert running.n == 1
    assert all(d["weight"].device.type == "meta" for d in (running.mean, running.m2))


def test_every_step_has_random_numbers_of_its_own():
    draws = {}
    for seed, step in ((0, 0), (0, 1), (1, 0), (0, 0)):
        seed_step(seed, step)
        draws.setdefault((seed, step), []).append(torch.rand(4).tolist())
    assert draws[0, 0][0] == draws[0, 0][1]
    assert len({tuple(d[0]) for d in draws.values()}) == 3
