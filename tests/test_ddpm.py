"""The diffusion's mathematics: schedules, q, the bound, the samplers. Closed forms and
numerical integration."""

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn

import ddpm
from ddpm import (SCHEDULES, Diffusion, ImageNoise, UserError, grey_level_log_likelihood,
                  stratified_timesteps)
from unet import UNet, from_published, timestep_embedding

DATA = Path(__file__).parent / "data"


class GaussianOracle:
    """The exact eps_theta for data x_0 ~ N(mean, std^2), every dimension alike: E[eps |
    x_t]."""

    def __init__(self, diffusion, mean, std):
        self.diffusion, self.mean, self.std = diffusion, mean, std

    def __call__(self, xt, t):
        abar = self.diffusion.alpha_bar.double()[t].view(-1, 1, 1, 1)
        variance = abar * self.std**2 + 1 - abar  # of x_t
        return ((1 - abar).sqrt() * (xt - abar.sqrt() * self.mean) / variance).float()


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_alpha_bar_is_the_variance_of_composed_steps(schedule):
    d = Diffusion(schedule, 50)
    signal, noise = 1.0, 0.0  # x_t = signal x_0 + N(0, noise), one step after the other
    for t in range(50):
        alpha = 1 - d.beta[t].item()
        signal, noise = signal * math.sqrt(alpha), noise * alpha + d.beta[t].item()
        assert d.sqrt_alpha_bar[t].item() == pytest.approx(signal, rel=1e-4)
        assert d.sqrt_one_minus_alpha_bar[t].item() ** 2 == pytest.approx(noise, rel=1e-4)


def test_cosine_schedule_is_nichols_and_dhariwals():
    """Equation 17: abar_t = f(t) / f(0), f(t) = cos^2((t/T + 0.008) / 1.008 pi/2)."""
    d, T = Diffusion("cosine", 1000), 1000
    f = [math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2 for t in (0, 1, 500, 900)]
    assert d.alpha_bar[[0, 499, 899]].tolist() == pytest.approx([x / f[0] for x in f[1:]], rel=1e-4)
    assert d.beta.max().item() == pytest.approx(0.999)


def test_linear_schedule_is_ddpms():
    d = Diffusion("linear", 1000)
    assert d.beta[0].item() == pytest.approx(1e-4) and d.beta[-1].item() == pytest.approx(0.02)
    assert d.alpha_bar[-1].item() == pytest.approx(4.0358e-5, rel=1e-3)


@pytest.mark.parametrize("schedule,t", [("linear", 1), ("linear", 500), ("cosine", 30),
                                        ("cosine", 900)])
def test_a_step_with_eta_1_is_the_ancestral_step_by_bayes_rule(schedule, t):
    """q(x_{t-1} | x_t, x_0) prop. to q(x_t | x_{t-1}) q(x_{t-1} | x_0), on a grid."""
    d = Diffusion(schedule, 1000)
    betas = SCHEDULES[schedule](1000)  # float64: 1 - abar is small at low t
    x0, xt, tt = 0.4, torch.full((1, 1, 1, 1), -0.3), torch.tensor([t])
    noise = (xt - d.sqrt_alpha_bar[t] * x0) / d.sqrt_one_minus_alpha_bar[t]  # says x_0 = 0.4
    mean, shifted = (d.step(lambda x, t: noise, xt, tt, tt - 1, torch.full_like(xt, z), eta=1.0)
                     for z in (0.0, 1.0))
    variance, xt = (shifted - mean) ** 2, xt.item()
    assert variance.item() == pytest.approx(d.posterior_variance[t].item(), rel=2e-3)
    beta, abar_prev = betas[t].item(), (1 - betas[:t]).prod().item()
    x = np.linspace(mean.item() - 12 * math.sqrt(variance.item()),
                    mean.item() + 12 * math.sqrt(variance.item()), 20001)
    forward = (xt - math.sqrt(1 - beta) * x) ** 2 / (2 * beta)
    prior = (x - math.sqrt(abar_prev) * x0) ** 2 / (2 * (1 - abar_prev))
    log_density = -forward - prior
    p = np.exp(log_density - log_density.max())
    p /= p.sum()
    numeric_mean = (p * x).sum()
    assert mean.item() == pytest.approx(numeric_mean, abs=2e-4)  # float32: abar is near 1 at low t
    assert variance.item() == pytest.approx((p * (x - numeric_mean) ** 2).sum(), rel=2e-3)


def test_predict_x0_inverts_q_sample():
    d = Diffusion("cosine", 1000)
    x0, eps, t = torch.randn(5, 1, 4, 4), torch.randn(5, 1, 4,
                                                      4), torch.tensor([0, 10, 200, 500, 900])
    assert torch.allclose(d.predict_x0(d.q_sample(x0, t, eps), t, eps), x0, atol=1e-4)


def test_clipping_keeps_x0_in_its_box_and_eta_0_adds_no_noise():
    d = Diffusion("linear", 1000)
    t, xt, z = torch.tensor([400]), torch.randn(1, 1, 4, 4), torch.randn(1, 1, 4, 4)
    silent, gone = lambda x, t: torch.zeros_like(x), torch.tensor([-1])
    assert torch.equal(d.step(silent, 9 * xt, t, gone, z),
                       (9 * xt / d.alpha_bar[400].sqrt()).clamp(-1, 1))
    assert d.step(silent, 9 * xt, t, gone, z, clip=False).abs().max() > 1
    assert torch.equal(d.step(silent, xt, t, t - 1, z), d.step(silent, xt, t, t - 1, -z))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_last_step_is_the_predicted_image(eta):
    d = Diffusion("linear", 100)
    xt = 0.1 * torch.randn(3, 1, 4, 4)
    oracle, t = GaussianOracle(d, 0.0, 0.3), torch.zeros(3, dtype=torch.long)
    x0 = d.predict_x0(xt, t, oracle(xt, t))
    assert torch.allclose(d.step(oracle, xt, t, t - 1, torch.zeros_like(xt), eta), x0, atol=1e-5)


@pytest.mark.parametrize("steps,eta", [(None, 1.0), (50, 0.0), (200, 1.0)])
def test_samplers_reach_the_data_distribution(steps, eta):
    """With the exact eps_theta of N(0.2, 0.3^2), samples have that mean and spread."""
    d = Diffusion("linear", 200)
    x = d.sample(GaussianOracle(d, 0.2, 0.3), 64, (1, 8, 8), steps=steps, eta=eta, clip=False)
    n = x.numel()
    assert x.mean().item() == pytest.approx(0.2, abs=5 * 0.3 / math.sqrt(n) + 0.005)
    assert x.std().item() == pytest.approx(0.3, rel=0.08)


def test_variational_bound_of_the_exact_model_is_the_true_likelihood():
    """A model that knows the data: the bound lies above -log p(x_0), and closes in on
    it as T grows."""
    mean, std = -0.1, 0.2  # no value reaches the open bins at -1 and 1
    torch.manual_seed(0)
    x0 = ((torch.randn(1000, 1, 4, 4) * std + mean + 1) * 127.5).round() / 127.5 - 1
    log_density = torch.distributions.Normal(mean, std).log_prob(x0).mean().item()
    # a bin is 2/255 wide; bits per dimension
    true = -(log_density + math.log(2 / 255)) / math.log(2)
    gaps = []
    for T in (20, 100, 1000):
        d = Diffusion("linear", T)
        bound = d.variational_bound(GaussianOracle(d, mean, std), x0)
        assert bound["L_t"].shape == (len(x0), T - 1)
        assert torch.allclose(bound["total"], bound["L_T"] + bound["L_t"].sum(1) + bound["L_0"])
        gaps.append(bound["total"].mean().item() - true)
    assert gaps[0] > gaps[1] > gaps[2] > 0
    assert gaps[2] < 0.005 * true


def test_the_bound_counts_what_x_T_still_knows():
    """L_T by its closed form, in a diffusion too short to forget x_0."""
    d, x0 = Diffusion("scaled_linear", 10), torch.rand(6, 1, 4, 4) - 0.5
    bound = d.variational_bound(GaussianOracle(d, 0.0, 0.3), x0)
    abar = d.alpha_bar[-1].double()
    kl = (abar * x0.double() ** 2 + (1 - abar) - 1 - (1 - abar).log()) / 2
    assert torch.allclose(bound["L_T"], kl.flatten(1).mean(1) / math.log(2), rtol=1e-5)
    assert (bound["L_T"] > 0.1 * bound["total"]).all()
    assert torch.allclose(bound["total"], bound["L_T"] + bound["L_t"].sum(1) + bound["L_0"])


def test_variational_bound_in_a_few_steps_is_near_the_whole():
    d = Diffusion("linear", 1000)
    x0 = (torch.randn(400, 1, 4, 4,
                      generator=torch.Generator().manual_seed(0)) * 0.2).clamp(-0.9, 0.9)
    whole, few = (d.variational_bound(GaussianOracle(d, 0.0, 0.2), x0, steps)["total"].mean()
                  for steps in (None, 50))
    assert few.item() == pytest.approx(whole.item(), rel=0.02)


def test_variational_bound_grows_when_the_model_is_wrong():
    d = Diffusion("linear", 100)
    x0 = (torch.randn(50, 1, 4, 4) * 0.2).clamp(-0.9, 0.9)
    right, wrong = (d.variational_bound(GaussianOracle(d, m, 0.2), x0)["total"].mean()
                    for m in (0.0, 0.5))
    assert wrong > right + 0.5


def test_the_likelihood_of_grey_levels_sums_to_one():
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for mean, std in [(0.0, 0.3), (-1.0, 0.01), (0.97, 0.2), (0.003, 0.002)]:
        p = grey_level_log_likelihood(levels, torch.tensor(mean), torch.tensor(std)).exp()
        assert p.sum().item() == pytest.approx(1, abs=1e-9)


def test_simple_loss_is_one_for_silence_and_zero_for_the_truth():
    d = Diffusion()
    x0, eps = torch.randn(3, 1, 8, 8), torch.randn(3, 1, 8, 8)
    t = torch.tensor([5, 500, 999])
    assert torch.equal(d.simple_loss(lambda x, t: torch.zeros_like(x), x0, t, eps),
                       eps.square().flatten(1).mean(1))
    assert d.simple_loss(lambda x, t: eps, x0, t, eps).abs().max() == 0


def test_stratified_timesteps_cover_the_range_evenly():
    for low, high, n in [(0, 1000, 100), (100, 500, 37), (3, 4, 5)]:
        t = stratified_timesteps(n, low, high)
        assert t.min() >= low and t.max() < high
        strata = ((t - low).double() * n / (high - low)).floor()
        assert (strata.sort().values - torch.arange(n)).abs().max() <= n / (high - low) + 1
    counts = torch.stack([stratified_timesteps(10, 0, 5)
                          for _ in range(200)]).flatten().bincount(minlength=5)
    assert (counts == 400).all()


def test_samples_depend_on_seed_and_index_alone():
    d = Diffusion("cosine", 20)
    oracle = GaussianOracle(d, 0.2, 0.3)
    for kwargs in (dict(steps=5), dict(steps=5, eta=1.0), dict()):
        whole = d.sample(oracle, 7, (1, 4, 4), seed=3, **kwargs)
        assert torch.equal(whole, d.sample(oracle, 7, (1, 4, 4), seed=3, batch_size=2, **kwargs))
        assert torch.equal(whole[:4], d.sample(oracle, 4, (1, 4, 4), seed=3, **kwargs))
        assert not torch.equal(whole, d.sample(oracle, 7, (1, 4, 4), seed=4, **kwargs))
    a, b = ImageNoise(0, [1], (1000,))(), ImageNoise(1, [0], (1000,))()
    assert abs((a * b).mean().item()) < 0.15  # streams of neighbouring seeds are not shifted copies


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_sampling_takes_the_steps_of_step(eta):
    d = Diffusion("cosine", 20)
    oracle, noise = GaussianOracle(d, 0.2, 0.3), ImageNoise(3, range(2), (1, 4, 4))
    x = noise().clone()
    for t, t_prev in ((19, 10), (10, 0), (0, -1)):
        z = noise() if eta and t_prev >= 0 else torch.zeros_like(x)
        x = d.step(oracle, x, torch.tensor([t] * 2), torch.tensor([t_prev] * 2), z, eta)
    assert torch.allclose(x, d.sample(oracle, 2, (1, 4, 4), steps=3, eta=eta, seed=3), atol=1e-5)


def test_a_networks_samples_do_not_depend_on_the_batch_size():
    d = Diffusion("cosine", 100)
    torch.manual_seed(0)
    unet = UNet(model_channels=32, channel_mult=(1, 2), patch_size=2, alpha_bar=d.alpha_bar)
    torch.nn.init.normal_(unet.out[2].weight, std=0.05)
    unet.eval()
    a = d.sample(unet, 9, (1, 28, 28), steps=4, batch_size=9)
    b = d.sample(unet, 9, (1, 28, 28), steps=4, batch_size=2)
    assert (a - b).abs().max() < 1 / 255  # not one grey level


def test_sampling_refuses_impossible_step_counts():
    with pytest.raises(UserError, match="from 1 to 20"):
        Diffusion("linear", 20).sample(None, 1, (1, 4, 4), steps=21)


@pytest.mark.parametrize("clip", [True, False])
def test_a_network_that_draws_nan_is_refused(clip):
    """Whose samples are like no class at all, and would count as forgotten."""
    with pytest.raises(UserError, match="not finite: it is broken"):
        Diffusion("linear", 20).sample(lambda x, t: x + float("nan"), 2, (1, 4, 4), steps=3,
                                       clip=clip)


@pytest.mark.parametrize("size", [(28, 28), (32, 32), (7, 7), (13, 18), (1, 5)])
@pytest.mark.parametrize("patch_size", [1, 2])
def test_unet_takes_any_size(size, patch_size):
    unet = UNet(in_channels=3, model_channels=16, channel_mult=(1, 2, 2),
                attention_resolutions=(2,), patch_size=patch_size)
    x = torch.randn(2, 3, *size)
    assert unet(x, torch.tensor([0, 999])).shape == x.shape


def test_unet_starts_at_zero_and_the_velocity_form_at_its_closed_form():
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([100, 800])
    assert UNet(model_channels=16)(x, t).abs().max() == 0
    d = Diffusion("cosine", 1000)
    eps = UNet(model_channels=16, alpha_bar=d.alpha_bar)(x, t)
    assert torch.allclose(eps, d.sqrt_one_minus_alpha_bar[t].view(-1, 1, 1, 1) * x, atol=1e-5)


def test_gradient_checkpointing_computes_again_and_gives_the_same_gradients():
    torch.manual_seed(0)
    unet, calls, gradients = UNet(model_channels=16), [], []
    nn.init.normal_(unet.out[2].weight, std=0.1)
    unet.middle_block.register_forward_pre_hook(lambda *args: calls.append(args))
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 700])
    for again in (False, True):
        unet.gradient_checkpointing = again
        calls.clear()
        unet(x, t).square().mean().backward()
        gradients.append(unet.input_blocks[0][0].weight.grad.clone())
        unet.zero_grad()
        assert len(calls) == 1 + again
    assert gradients[0].abs().max() > 0 and torch.allclose(*gradients, rtol=1e-4)


def test_unets_names_are_stable_diffusions():
    names = set(dict(UNet(model_channels=16, channel_mult=(1, 2),
                          attention_resolutions=(1,)).named_parameters()))
    for name in ["time_embed.0.weight", "time_embed.2.bias", "input_blocks.0.0.weight",
                 "input_blocks.1.0.in_layers.2.weight", "input_blocks.1.0.emb_layers.1.weight",
                 "input_blocks.1.0.out_layers.3.weight", "input_blocks.1.1.norm.weight",
                 "input_blocks.2.0.op.weight", "input_blocks.3.0.skip_connection.weight",
                 "middle_block.0.in_layers.0.weight", "middle_block.1.proj_out.weight",
                 "output_blocks.1.1.conv.weight", "out.0.weight", "out.2.weight"]:
        assert name in names
    assert "alpha_bar" not in UNet(model_channels=16, alpha_bar=torch.rand(10)).state_dict()


def test_timestep_embedding_is_ddpms():
    emb = timestep_embedding(torch.tensor([0, 7]), 8)
    assert torch.equal(emb[0], torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0]))
    w = 10_000 ** (-1 / 4)
    assert emb[1, 1].item() == pytest.approx(math.cos(7 * w), abs=1e-6)
    assert emb[1, 5].item() == pytest.approx(math.sin(7 * w), abs=1e-6)


# --- weights that others published ----------------------------------------------------

PUBLISHED = torch.load(DATA / "ddpm_reference.pt", weights_only=True)


@pytest.mark.parametrize("layout", PUBLISHED)
def test_published_networks_give_the_originals_outputs(layout, tmp_path):
    reference = PUBLISHED[layout]
    torch.save(reference["state_dict"], tmp_path / "weights.bin")
    checkpoint = ddpm.load_checkpoint(tmp_path / "weights.bin")
    with torch.no_grad():
        output = checkpoint.unet(reference["x"], reference["timesteps"])
    assert (output - reference["output"]).abs().max() < 1e-4
    # each of the settings that sets these networks apart is needed for it
    for name, value in {"norm_eps": 1e-5, "sin_first": False, "pad_end": False}.items():
        unet, _ = ddpm.build({**checkpoint.config,
                              "unet": {**checkpoint.config["unet"], name: value}})
        unet.load_state_dict(checkpoint.unet.state_dict())
        with torch.no_grad():
            assert (unet.eval()(reference["x"], reference["timesteps"])
                    - reference["output"]).abs().max() > 1e-4, name


def test_the_newer_spelling_of_attention_is_the_same_network(tmp_path):
    old = PUBLISHED["diffusers"]["state_dict"]
    spelling = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.",
                ".proj_attn.": ".to_out.0."}
    new = {}
    for k, v in old.items():
        for a, b in spelling.items():
            k = k.replace(a, b)
        new[k] = v
    assert set(new) != set(old)
    (sizes, a), (new_sizes, b) = from_published(old), from_published(new)
    assert sizes == new_sizes
    assert a.keys() == b.keys()
    assert all(torch.equal(v, b[k]) for k, v in a.items())


@pytest.mark.parametrize("layout", PUBLISHED)
def test_every_tensor_of_the_published_cifar10_networks_has_its_place(layout, capsys):
    with gzip.open(DATA / "ddpm_cifar10_state_dicts.tsv.gz", "rt") as f:
        rows = [line.rstrip("\n").split("\t") for line in f]
    tensors = {k: torch.empty([int(n) for n in shape.split(",")], device="meta")
               for l, k, shape in rows if l == layout}
    assert len(tensors) == 328
    raw = ddpm.published_checkpoint(tensors, "cifar")
    assert sum(v.numel() for v in raw["weights"].values()) == 35_746_307
    assert raw["config"]["image_shape"] == (3, 32, 32)
    assert raw["data"]["name"] == "cifar10"
    assert raw["config"]["unet"]["attention_resolutions"] == [2]
    some = sorted(tensors)[100]
    lacking = {k: v for k, v in tensors.items() if k != some}
    with pytest.raises(ddpm.UserError, match=f"lacks: {some}"):
        ddpm.published_checkpoint(lacking, "cifar")
    more = ddpm.published_checkpoint({**tensors, "logits.weight": torch.empty(1, device="meta")},
                                     "cifar")
    assert more["weights"].keys() == raw["weights"].keys()
    assert "not reading 1 tensors that DDPM's network does not have: logits.weight" in (
        capsys.readouterr().out)


def course_network():
    """(config.json, weights) of diffusers_course.json, x and the output for it."""
    course = json.loads((DATA / "diffusers_course.json").read_text())
    weights = {}
    for place, (name, shape) in enumerate(sorted(course["shapes"].items())):
        is_vector = len(shape) == 1
        numbers = torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * (1 + place))
        numbers *= 0.2 if is_vector else 1.4 / math.sqrt(math.prod(shape[1:]))
        numbers += is_vector and name.endswith("weight")
        weights[name] = numbers.view(shape).float()
    x = torch.sin(torch.arange(384.0)).view(2, 3, 8, 8)
    return course["config"], weights, x, torch.tensor(course["output"]).view(2, 3, 8, 8)


@torch.no_grad()
def test_diffusers_config_says_what_no_tensor_does(tmp_path, capsys):
    """The courses' networks share the names of google/ddpm-cifar10-32's tensors."""
    config, weights, x, output = course_network()
    path, t = tmp_path / "diffusion_pytorch_model.safetensors", torch.tensor([3, 700])
    ddpm.write_atomically(path, lambda f: ddpm.write_safetensors(f, weights, {}))
    guessed = ddpm.load_checkpoint(path)
    assert "no config.json" in (said := capsys.readouterr().out) and "norm_eps=1e-06" in said
    assert (guessed.unet(x, t) - output).abs().max() > 1e-3  # what would pass silently
    keys = ("attention_head_dim", "norm_eps", "downsample_padding", "flip_sin_to_cos", "freq_shift",
            "sample_size")
    assumed = ddpm.load_checkpoint(path, assume={k: config[k] for k in keys})
    (tmp_path / "config.json").write_text(json.dumps(config))
    for checkpoint in (assumed, ddpm.load_checkpoint(path)):
        assert (checkpoint.unet(x, t) - output).abs().max() < 2e-5
        assert checkpoint.config["image_shape"] == (3, 8, 8)
    for key, value in (("act_fn", "gelu"), ("freq_shift", 1), ("norm_num_groups", 16),
                       ("downsample_padding", 2)):
        (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(ddpm.UserError, match=f"another network: .*{key}"):
            ddpm.load_checkpoint(path)


def test_a_file_of_another_model_says_so(tmp_path):
    torch.save({"state_dict": {"model.diffusion_model.out.2.weight": torch.zeros(1)}},
               tmp_path / "sd.ckpt")
    with pytest.raises(ddpm.UserError, match="sd_unlearn.py"):
        ddpm.load_checkpoint(tmp_path / "sd.ckpt")
    torch.save({"state_dict": torch.zeros(1)}, tmp_path / "odd.ckpt")
    with pytest.raises(ddpm.UserError, match="nor DDPM's published weights"):
        ddpm.load_checkpoint(tmp_path / "odd.ckpt")
