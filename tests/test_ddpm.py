"""The diffusion's mathematics in closed form: schedules, q, the bound, the samplers.
Then the network, and the weights that others published."""

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from pytest import approx, raises
from torch import allclose, equal
from torch.distributions import Normal, kl_divergence

import ddpm
from ddpm import (Diffusion, UserError, beta_schedule, load_checkpoint, per_image, to_float,
                  to_uint8)
from train_ddpm import base
from unet import UNet, timestep_embedding

parametrize = pytest.mark.parametrize
X0 = torch.rand(5, 1, 4, 4) - 0.5
EPS = torch.randn(5, 1, 4, 4)
STEPS = torch.tensor([0, 10, 200, 500, 900])


def exact(d, mean, std):
    """The exact eps_theta = E[eps | x_t] for data x_0 ~ N(mean, std^2), iid."""
    def eps_theta(xt, t):
        abar = per_image(d.alpha_bar, t, xt).double()
        variance = abar * std**2 + 1 - abar  # of x_t
        away = (xt - abar.sqrt() * mean) / variance
        eps = (1 - abar).sqrt() * away
        return eps.float()

    return eps_theta


def silent(xt, t):
    return torch.zeros_like(xt)


@parametrize("schedule", ["linear", "cosine"])
def test_alpha_bar_is_the_variance_of_composed_steps(schedule):
    d = Diffusion(schedule, 50)
    signal = 1.0  # x_t = signal x_0 + N(0, noise), one step after the other
    noise = 0.0

    for t, beta in enumerate(beta_schedule(schedule, 50).tolist()):
        signal *= math.sqrt(1 - beta)
        noise = noise * (1 - beta) + beta

        assert d.beta[t] == approx(beta, rel=1e-5)
        assert d.alpha_bar[t] == approx(signal**2, rel=1e-5)
        assert d.sqrt_alpha_bar[t] == approx(signal, rel=1e-5)
        assert d.sqrt_one_minus_alpha_bar[t] ** 2 == approx(noise, rel=1e-5)


@parametrize("schedule, T, power, ends", [
    ("linear", 1000, 1, [1e-4, 0.02]),
    ("linear", 250, 1, [4e-4, 0.08]),
    ("scaled_linear", 1000, 0.5, [0.00085, 0.012]),
])
def test_betas_or_their_roots_rise_evenly(schedule, T, power, ends):
    beta = Diffusion(schedule, T).beta

    rises = (beta**power).diff()
    assert beta[[0, -1]].tolist() == approx(ends)
    assert allclose(rises, rises.mean(), rtol=1e-2)


def test_the_cosine_schedule_is_that_of_its_paper():
    d = Diffusion("cosine", 1000)

    u = torch.arange(1001) / 1000
    angles = (u + 0.008) / 1.008 * math.pi / 2
    f = angles.cos() ** 2
    assert allclose(d.alpha_bar, f[1:] / f[0], rtol=1e-4, atol=1e-7)
    assert d.beta.max() == approx(0.999)


@parametrize("schedule, t", [
    ("linear", 1),
    ("cosine", 30),
    ("cosine", 900),
])
def test_a_step_with_eta_1_is_the_ancestral_step_by_bayes_rule(schedule, t):
    """q(x_{t-1} | x_t, x_0) prop. to q(x_t | x_{t-1}) q(x_{t-1} | x_0)."""
    d = Diffusion(schedule, 1000)
    x0 = 0.4
    xt = torch.full((2, 1, 1, 1), -0.3)
    noise = xt - d.sqrt_alpha_bar[t] * x0
    noise /= d.sqrt_one_minus_alpha_bar[t]
    z = torch.tensor([0.0, 1.0]).view_as(xt)
    tt = torch.tensor([t, t])

    steps = d.step(lambda x, t: noise, xt, tt, tt - 1, z, eta=1.0)

    mean, shifted = steps.flatten().tolist()
    betas = beta_schedule(schedule, 1000)  # float64: 1 - abar is small at low t
    beta = betas[t].item()
    abar = (1 - betas[:t]).prod().item()
    precision = (1 - beta) / beta + 1 / (1 - abar)
    pull = math.sqrt(1 - beta) / beta * -0.3 + math.sqrt(abar) / (1 - abar) * x0
    assert mean == approx(pull / precision, abs=2e-4)  # float32: abar is near 1 at low t
    assert (shifted - mean) ** 2 == approx(1 / precision, rel=2e-3)
    assert d.posterior_variance[t] == approx(1 / precision, rel=1e-5)


def test_the_loss_is_one_for_silence_and_zero_for_the_truth():
    d = Diffusion("cosine", 1000)

    silence = d.simple_loss(silent, X0, STEPS, EPS)
    truth = d.simple_loss(lambda x, t: EPS, X0, STEPS, EPS)

    assert equal(silence, EPS.square().flatten(1).mean(1))
    assert truth.tolist() == [0] * 5


def test_the_last_step_is_the_x0_of_its_noise_clipped_to_its_box():
    d = Diffusion("cosine", 1000)
    x0 = 9 * X0
    xt = d.q_sample(x0, STEPS, EPS)
    gone = torch.full_like(STEPS, -1)

    def step(clip):
        return d.step(lambda x, t: EPS, xt, STEPS, gone, EPS, clip=clip)

    assert allclose(step(clip=False), x0, atol=1e-4)
    assert allclose(step(clip=True), x0.clamp(-1, 1), atol=1e-4)


# --- the bound ------------------------------------------------------------------------


def gap(T, steps=None):
    """The bound of the exact model, less the true -log p(x_0), in bits per dimension,
    for data x_0 ~ N(-0.1, 0.2^2), of which nothing reaches the open bins."""
    torch.manual_seed(0)
    data = Normal(-0.1, 0.2)
    x0 = data.sample((1000, 1, 4, 4))
    x0 = to_float(to_uint8(x0))
    d = Diffusion("linear", T)
    bound = d.variational_bound(exact(d, -0.1, 0.2), x0, steps)
    log_p = data.log_prob(x0).mean()
    log_p += math.log(2 / 255)  # a bin is 2/255 wide
    return bound["total"].mean() + log_p / math.log(2)


def test_the_bound_of_the_exact_model_closes_in_on_the_true_likelihood():
    short = gap(20)
    middle = gap(100)
    long = gap(1000)

    assert short > middle > long > 0
    assert long < 0.03  # of 6.7 bits
    assert gap(1000, steps=50) == approx(long.item(), abs=0.03)


@parametrize("steps", [2, 50, 998])
def test_a_few_steps_of_the_bound_sum_a_straight_line_exactly(steps):
    grid, stands_for = ddpm.bound_grid(1000, steps)

    grid = torch.tensor(grid)
    assert len(grid.unique()) == steps
    assert stands_for.sum() == 999
    assert grid.double() @ stands_for == 499_500  # 1 + 2 + ... + 999


def test_each_term_of_the_bound_is_its_kl_divergence():
    """In a diffusion too short to forget x_0, of a network that is off by 0.3."""
    d = Diffusion(torch.linspace(0.05, 0.4, 10))
    eps = exact(d, X0, 0.0)

    bits = d.variational_bound(lambda xt, t: eps(xt, t) + 0.3, X0)

    nats = {name: value.float() * math.log(2) for name, value in bits.items()}
    q_T = Normal(d.sqrt_alpha_bar[-1] * X0, d.sqrt_one_minus_alpha_bar[-1])
    L_T = kl_divergence(q_T, Normal(0.0, 1.0))
    assert allclose(nats["L_T"], L_T.flatten(1).mean(1))
    noise = d.alpha * (1 - d.alpha_bar)
    away = 0.3 * d.beta / noise.sqrt()  # of p's mean from q's
    p = Normal(away[1:], d.beta[1:].sqrt())
    q = Normal(0.0, d.posterior_variance[1:].sqrt())
    L_t = kl_divergence(q, p)
    assert allclose(nats["L_t"], L_t, rtol=1e-3)
    total = nats["L_T"] + nats["L_t"].sum(1) + nats["L_0"]
    assert allclose(nats["total"], total)


@parametrize("mean, std", [
    (-1.0, 0.01),
    (0.97, 0.2),
    (0.003, 0.002),
])
def test_the_masses_of_all_grey_levels_sum_to_one(mean, std):
    levels = torch.arange(256).double() / 127.5 - 1

    log_p = ddpm.grey_level_log_likelihood(levels, mean, std)

    assert log_p.exp().sum() == approx(1, abs=1e-9)


# --- what is drawn --------------------------------------------------------------------


@parametrize("n, low, high", [
    (100, 0, 1000),
    (37, 100, 500),
    (10, 0, 5),
])
def test_one_timestep_is_drawn_from_each_of_n_equal_parts_in_random_order(n, low, high):
    torch.manual_seed(0)
    drawn = ddpm.stratified_timesteps(n, low, high)

    t = drawn.sort().values
    parts = torch.arange(n + 1) / n
    edges = low + parts * (high - low)
    assert (t >= edges[:-1].floor()).all()
    assert (t < edges[1:].ceil()).all()
    assert not equal(t, drawn)


def test_samples_depend_on_seed_and_index_alone():
    d = Diffusion("cosine", 20)
    oracle = exact(d, 0.2, 0.3)

    def draw(n, seed=3, batch_size=7):
        return d.sample(oracle, n, (1, 4, 4), 5, 1.0, seed, batch_size)

    whole = draw(7)

    assert equal(whole, draw(7, batch_size=2))
    assert equal(whole[:4], draw(4))
    assert not equal(whole, draw(7, seed=4))


def test_series_and_seeds_of_noise_share_no_image():
    """evaluate.py draws other samples than vdu.py learns from, whatever their seeds."""
    d = Diffusion("cosine", 4)
    images = []

    for series in ("", "own samples", "retrained 0"):
        for seed in range(3):
            images += d.sample(silent, 5, (1, 2, 2), seed=seed, clip=False, series=series)

    assert len(torch.stack(images).unique(dim=0)) == 45


@parametrize("eta", [0.0, 0.6, 1.0])
def test_sampling_takes_the_steps_of_step(eta):
    d = Diffusion("cosine", 20)
    oracle = exact(d, 0.2, 0.3)

    sample = d.sample(oracle, 1, (1, 4, 4), steps=3, eta=eta, seed=5)

    stream = np.random.default_rng([0, 5, 0])  # of no series, seed 5, image 0
    x, *z = [ddpm.image_noise([stream], (1, 4, 4)) for _ in range(4)]
    t = torch.tensor([[19], [10], [0], [-1]])
    for i in range(3):
        x = d.step(oracle, x, t[i], t[i + 1], z[i], eta)
    assert allclose(x, sample, atol=1e-5)


def test_images_of_nan_are_refused():
    """nan is like no class, and would count as forgotten."""
    d = Diffusion("linear", 20)

    with raises(UserError, match="not finite"):
        d.sample(lambda x, t: x * math.nan, 2, (1, 4, 4), 3)


# --- the network ----------------------------------------------------------------------


@parametrize("patch_size", [1, 2])
@parametrize("H, W", [(13, 18), (1, 5)])
def test_unet_takes_any_size_and_starts_at_zero(H, W, patch_size):
    unet = UNet(
        model_channels=16,
        channel_mult=(1, 2, 2),
        patch_size=patch_size)

    eps = unet(torch.randn(2, 1, H, W), torch.tensor([0, 999]))

    assert equal(eps, torch.zeros(2, 1, H, W))


def test_t_is_embedded_as_cosines_beside_sines_of_falling_frequencies():
    seen = timestep_embedding(torch.tensor([7]), 8)[0]

    powers = torch.tensor([0, 0.25, 0.5, 0.75])
    waves = 7 * 10_000**-powers
    expected = torch.cat([waves.cos(), waves.sin()])
    assert allclose(seen, expected, atol=1e-6)


def test_a_network_that_returns_another_shape_is_refused():
    """A loss would stretch one channel over three."""
    d = Diffusion("linear", 10)

    with raises(ValueError, match="returns"):
        d.simple_loss(lambda x, t: x[:, :1], torch.ones(2, 3, 4, 4), torch.tensor([1, 2]), 0)


# --- weights that others published ----------------------------------------------------

DATA = Path(__file__).parent / "data"
REFERENCE = torch.load(DATA / "ddpm_reference.pt", weights_only=True)["diffusers"]
WEIGHTS = REFERENCE["state_dict"]
X = REFERENCE["x"]
T = REFERENCE["timesteps"]
OUTPUT = REFERENCE["output"]
CONFIG = {
    "block_out_channels": [32, 64],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": None,
    "sample_size": 16,
    "norm_eps": 1e-6,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "downsample_padding": 0,
}


def write(folder, weights=WEIGHTS, config=CONFIG, ending="bin", **scheduler):
    """A folder as diffusers saves it."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(weights, folder / f"diffusion_pytorch_model.{ending}")
    (folder / "config.json").write_text(json.dumps(config), "utf-8-sig")
    if scheduler:
        (folder / "scheduler_config.json").write_text(json.dumps(scheduler))


@torch.no_grad()
@parametrize("path", [
    "flat",
    "flat/diffusion_pytorch_model.bin",
    "pipeline",
    "pipeline/unet/diffusion_pytorch_model.safetensors",
])
def test_a_pipelines_folder_and_a_flat_one_and_their_files_are_one_network(path, tmp_path):
    write(tmp_path / "flat", num_train_timesteps=500)
    write(tmp_path / "pipeline/unet", ending="safetensors")
    write(tmp_path / "pipeline/scheduler", num_train_timesteps=500)

    checkpoint = load_checkpoint(tmp_path / path)

    output = checkpoint.unet(X, T)
    assert allclose(output, OUTPUT, atol=1e-5)
    assert checkpoint.diffusion.T == 500


def test_a_network_goes_back_to_diffusers_as_it_came(tmp_path):
    write(tmp_path)
    unet = load_checkpoint(tmp_path).unet

    tensors = ddpm.to_diffusers(unet, blocks=1)

    came = {}
    for name, v in WEIGHTS.items():
        for old, new in ddpm.OLD_SPELLING.items():
            name = name.replace(old, new)
        came[name] = v
    assert tensors.keys() == came.keys()
    assert all(equal(v, tensors[name]) for name, v in came.items())


@torch.no_grad()
def test_a_courses_network_with_other_settings_gives_diffusers_output(tmp_path):
    """It shares the names of its tensors with google/ddpm-cifar10-32."""
    course = json.loads((DATA / "diffusers_course.json").read_text())
    weights = {}
    for place, (name, shape) in enumerate(course["shapes"].items(), 1):
        i = torch.arange(math.prod(shape), dtype=torch.float64)
        numbers = torch.sin(i * place)
        if len(shape) > 1:
            numbers *= 1.4 / math.sqrt(math.prod(shape[1:]))
        else:
            numbers *= 0.2
            numbers += name.endswith("weight")
        weights[name] = numbers.view(shape).float()
    write(tmp_path, weights, course["config"])

    checkpoint = load_checkpoint(tmp_path)

    x = torch.arange(384.0).sin().view(2, 3, 8, 8)
    output = checkpoint.unet(x, torch.tensor([3, 700]))
    expected = torch.tensor(course["output"])
    assert allclose(output.flatten(), expected, atol=1e-5)
    assert checkpoint.config["image_shape"] == (3, 8, 8)


def test_the_published_cifar10_network_has_the_names_and_shapes_of_diffusers():
    with torch.device("meta"):
        unet = UNet(**base((3, 32, 32))[0])
    names = ddpm.diffusers_names(unet, blocks=2)

    rows = set()
    for ours, v in unet.state_dict().items():
        shape = list(v.shape)
        shape[0] //= len(names[ours])
        if len(shape) == 3:  # attention is a matrix there and a 1x1 convolution here
            shape.pop()
        sizes = ",".join(map(str, shape))
        for name in names[ours]:
            rows.add(f"diffusers\t{name}\t{sizes}")

    with gzip.open(DATA / "ddpm_cifar10_state_dicts.tsv.gz", "rt") as f:
        published = f.read()
    for old, new in ddpm.OLD_SPELLING.items():
        published = published.replace(old, new)
    assert rows <= set(published.splitlines())
    assert len(rows) == published.count("diffusers")


@parametrize("scheduler, beta", [
    ({}, torch.linspace(1e-4, 0.02, 1000)),
    ({"beta_start": 0.01, "beta_end": 0.3, "num_train_timesteps": 60},
     torch.linspace(0.01, 0.3, 60)),
    ({"beta_schedule": "squaredcos_cap_v2"},
     beta_schedule("cosine", 1000).float()),
])
def test_the_schedule_is_that_of_scheduler_config_json(scheduler, beta, tmp_path):
    write(tmp_path, **scheduler)

    diffusion = load_checkpoint(tmp_path).diffusion

    assert allclose(diffusion.beta, beta)


@torch.no_grad()
def test_v_prediction_is_the_velocity_form_of_the_same_network(tmp_path):
    write(tmp_path, prediction_type="v_prediction")

    unet, diffusion = load_checkpoint(tmp_path)[:2]

    abar = per_image(diffusion.alpha_bar, T, X)
    expected = (1 - abar).sqrt() * X + abar.sqrt() * OUTPUT
    assert allclose(unet(X, T), expected, atol=1e-5)
    assert "alpha_bar" not in unet.state_dict()  # which belongs to the schedule


@parametrize("file, name, value", [
    ("config", "act_fn", "gelu"),
    ("config", "sample_size", [8, 16]),
    ("config", "downsample_padding", 2),
    ("config", "out_channels", 6),
    ("config", "freq_shift", 0),
    ("config", "block_out_channels", [32, 48]),
    ("config", "down_block_types", ["DownBlock2D", "CrossAttnDownBlock2D"]),
    ("config", "up_block_types", ["UpBlock2D", "UpBlock2D"]),
    ("config", "unheard_of", True),
    ("scheduler_config", "beta_schedule", "sigmoid"),
    ("scheduler_config", "prediction_type", "sample"),
    ("scheduler_config", "trained_betas", [0.1, 0.2]),
    ("scheduler_config", "rescale_betas_zero_snr", True),
])
def test_what_this_code_cannot_be_is_refused_by_name(file, name, value, tmp_path):
    write(tmp_path)
    text = json.dumps({**CONFIG, name: value})
    (tmp_path / f"{file}.json").write_text(text)

    with raises(UserError, match=f"/{file}.json.*cannot be: {name} = "):
        load_checkpoint(tmp_path)


@parametrize("name, tensor", [
    ("conv_out.bias", None),
    ("logits.bias", torch.ones(1)),
])
def test_a_tensor_too_few_or_too_many_is_named(name, tensor, tmp_path):
    write(tmp_path, {**WEIGHTS, name: tensor})

    with raises(UserError, match=name):
        load_checkpoint(tmp_path)


@parametrize("name, word", [
    ("model.diffusion_model.out.2.weight", "sd_unlearn.py"),
    ("time_embedding.linear_1.weight", "No such file .*config.json"),
])
def test_files_of_another_kind_are_refused_by_name(name, word, tmp_path):
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": {name: torch.ones(1)}}, path)

    with raises(UserError, match=f"x.ckpt.*{word}"):
        load_checkpoint(path)
