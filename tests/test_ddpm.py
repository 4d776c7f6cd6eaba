"""The diffusion's mathematics: schedules, q, the bound, the samplers. Closed forms and
numerical integration. Then the network, and the weights that others published."""

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

import ddpm
from ddpm import (Diffusion, UserError, beta_schedule, grey_level_log_likelihood, image_noise,
                  stratified_timesteps)
from unet import UNet, timestep_embedding

DATA = Path(__file__).parent / "data"


def exact(d, mean, std):
    """The exact eps_theta = E[eps | x_t] for data x_0 ~ N(mean, std^2), iid."""
    def eps_theta(xt, t):
        abar = d.alpha_bar.double()[t].view(-1, 1, 1, 1)
        variance = abar * std**2 + 1 - abar  # of x_t
        return ((1 - abar).sqrt() * (xt - abar.sqrt() * mean) / variance).float()

    return eps_theta


@pytest.mark.parametrize("schedule", ["linear", "cosine", torch.rand(50) / 5], ids=str)
def test_alpha_bar_is_the_variance_of_composed_steps(schedule):
    d = Diffusion(schedule, 50)
    betas = beta_schedule(schedule, 50) if isinstance(schedule, str) else schedule
    signal, noise = 1.0, 0.0  # x_t = signal x_0 + N(0, noise), one step after the other
    for t, beta in enumerate(betas.tolist()):
        signal, noise = signal * math.sqrt(1 - beta), noise * (1 - beta) + beta
        assert [d.beta[t].item(), 1 - d.alpha[t].item()] == pytest.approx([beta] * 2, rel=1e-3)
        assert d.sqrt_alpha_bar[t].item() == pytest.approx(signal, rel=1e-4)
        assert d.alpha_bar[t].item() == pytest.approx(signal**2, rel=1e-4)
        assert d.sqrt_one_minus_alpha_bar[t].item() ** 2 == pytest.approx(noise, rel=1e-4)
    assert d.T == t + 1 == 50


def test_series_of_noise_share_nothing_whatever_their_seeds():
    """evaluate.py draws other samples than vdu.py learns from, whatever their seeds."""
    d = Diffusion("cosine", 4)
    still = lambda x, t: torch.zeros_like(x)
    draw = lambda series, seed: d.sample(still, 5, (1, 2, 2), 1, seed=seed, series=series,
                                         clip=False)
    images = torch.cat([draw(series, seed) for series in ("", "own samples", "retrained 0")
                        for seed in (0, 1, 2)])
    assert len(images.flatten(1).unique(dim=0)) == 45
    assert torch.equal(draw("own samples", 1), draw("own samples", 1))


def test_the_schedules_are_those_of_their_papers():
    d = Diffusion("cosine", 1000)  # abar_t = f(t) / f(0)
    f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in (0, 1, 500, 900)]
    assert d.alpha_bar[[0, 499, 899]].tolist() == pytest.approx([x / f[0] for x in f[1:]], rel=1e-4)
    assert d.beta.max().item() == pytest.approx(0.999)
    d = Diffusion("linear", 1000)
    assert d.beta[[0, -1]].tolist() == pytest.approx([1e-4, 0.02])
    assert d.alpha_bar[-1].item() == pytest.approx(4.0358e-5, rel=1e-3)
    roots = Diffusion("scaled_linear", 1000).beta.sqrt()
    assert roots[[0, -1]].square().tolist() == pytest.approx([0.00085, 0.012])
    assert torch.allclose(roots.diff(), roots.diff().mean(), rtol=1e-2)


@pytest.mark.parametrize("schedule,t", [("linear", 1), ("linear", 500), ("cosine", 30),
                                        ("cosine", 900)])
def test_a_step_with_eta_1_is_the_ancestral_step_by_bayes_rule(schedule, t):
    """q(x_{t-1} | x_t, x_0) prop. to q(x_t | x_{t-1}) q(x_{t-1} | x_0), on a grid."""
    d = Diffusion(schedule, 1000)
    betas = beta_schedule(schedule, 1000)  # float64: 1 - abar is small at low t
    x0, xt, tt = 0.4, torch.full((1, 1, 1, 1), -0.3), torch.tensor([t])
    noise = (xt - d.sqrt_alpha_bar[t] * x0) / d.sqrt_one_minus_alpha_bar[t]  # says x_0 = 0.4
    mean, shifted = (d.step(lambda x, t: noise, xt, tt, tt - 1, torch.full_like(xt, z), eta=1.0)
                     for z in (0.0, 1.0))
    variance, xt = (shifted - mean) ** 2, xt.item()
    assert variance.item() == pytest.approx(d.posterior_variance[t].item(), rel=2e-3)
    beta, abar_prev = betas[t].item(), (1 - betas[:t]).prod().item()
    x = mean.item() + np.linspace(-12, 12, 20001) * math.sqrt(variance.item())
    forward = (xt - math.sqrt(1 - beta) * x) ** 2 / (2 * beta)
    prior = (x - math.sqrt(abar_prev) * x0) ** 2 / (2 * (1 - abar_prev))
    p = np.exp((forward + prior).min() - forward - prior)
    p /= p.sum()
    numeric_mean = (p * x).sum()
    assert mean.item() == pytest.approx(numeric_mean, abs=2e-4)  # float32: abar is near 1 at low t
    assert variance.item() == pytest.approx((p * (x - numeric_mean) ** 2).sum(), rel=2e-3)


def test_the_loss_is_one_for_silence_and_zero_for_the_truth_from_which_x0_follows():
    d = Diffusion("cosine", 1000)
    x0, eps, t = *torch.randn(2, 5, 1, 4, 4), torch.tensor([0, 10, 200, 500, 900])
    assert torch.equal(d.simple_loss(lambda x, t: torch.zeros_like(x), x0, t, eps),
                       eps.square().flatten(1).mean(1))
    assert d.simple_loss(lambda x, t: eps, x0, t, eps).abs().max() == 0
    assert torch.allclose(d.predict_x0(d.q_sample(x0, t, eps), t, eps), x0, atol=1e-4)


def test_the_last_step_is_x0_clipped_to_its_box_and_eta_0_adds_no_noise():
    d = Diffusion("linear", 1000)
    t, xt, z = torch.tensor([400]), torch.randn(1, 1, 4, 4), torch.randn(1, 1, 4, 4)
    silent, gone = lambda x, t: torch.zeros_like(x), torch.tensor([-1])
    assert torch.equal(d.step(silent, 9 * xt, t, gone, z),
                       (9 * xt / d.alpha_bar[400].sqrt()).clamp(-1, 1))
    assert d.step(silent, 9 * xt, t, gone, z, clip=False).abs().max() > 1
    assert torch.equal(d.step(silent, xt, t, t - 1, z), d.step(silent, xt, t, t - 1, -z))


def test_variational_bound_of_the_exact_model_is_the_true_likelihood():
    """It lies above -log p(x_0), and closes in on it as T grows."""
    mean, std = -0.1, 0.2  # no value reaches the open bins at -1 and 1
    torch.manual_seed(0)
    x0 = ((torch.randn(1000, 1, 4, 4) * std + mean + 1) * 127.5).round() / 127.5 - 1
    # a bin is 2/255 wide; bits per dimension
    true = -(Normal(mean, std).log_prob(x0).mean().item() + math.log(2 / 255)) / math.log(2)
    gaps = []
    for T in (20, 100, 1000):
        d = Diffusion("linear", T)
        bound = d.variational_bound(exact(d, mean, std), x0)
        assert bound["L_t"].shape == (len(x0), T - 1)
        assert torch.allclose(bound["total"], bound["L_T"] + bound["L_t"].sum(1) + bound["L_0"])
        gaps.append(bound["total"].mean().item() - true)
    assert gaps[0] > gaps[1] > gaps[2] > 0 and gaps[2] < 0.005 * true
    few = d.variational_bound(exact(d, mean, std), x0, steps=50)
    assert few["L_t"].shape[1] == 50
    assert few["total"].mean().item() == pytest.approx(true + gaps[2], rel=0.02)
    wrong = d.variational_bound(exact(d, 0.5, std), x0)["total"].mean().item()
    assert wrong > true + 0.5


def test_each_term_of_the_bound_is_its_kl_divergence():
    """In a diffusion too short to forget x_0, of a network that is off by 0.3."""
    d, x0 = Diffusion(torch.linspace(0.05, 0.4, 10)), torch.rand(6, 1, 4, 4) - 0.5
    off = lambda xt, t: exact(d, x0, 0.0)(xt, t) + 0.3
    bound, (beta, alpha, abar) = d.variational_bound(off, x0), (d.beta, d.alpha, d.alpha_bar)
    kl = kl_divergence(Normal(abar[-1].sqrt() * x0, (1 - abar[-1]).sqrt()), Normal(0.0, 1.0))
    assert torch.allclose(bound["L_T"].float(), kl.flatten(1).mean(1) / math.log(2), rtol=1e-5)
    p = Normal(0.3 * beta / (alpha * (1 - abar)).sqrt(), beta.sqrt())  # from the mean of q
    kl = kl_divergence(Normal(0.0, d.posterior_variance.clamp(min=1e-9).sqrt()), p)[1:]
    assert torch.allclose(bound["L_t"].float(), kl.expand(6, 9) / math.log(2), rtol=1e-3)
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for mean, std in [(0.0, 0.3), (-1.0, 0.01), (0.97, 0.2), (0.003, 0.002)]:
        p = grey_level_log_likelihood(levels, torch.tensor(mean), torch.tensor(std)).exp()
        assert p.sum().item() == pytest.approx(1, abs=1e-9)


def test_stratified_timesteps_cover_the_range_evenly():
    for low, high, n in [(0, 1000, 100), (100, 500, 37), (3, 4, 5)]:
        t = stratified_timesteps(n, low, high)
        assert t.min() >= low and t.max() < high
        strata = ((t - low).double() * n / (high - low)).floor()
        assert (strata.sort().values - torch.arange(n)).abs().max() <= n / (high - low) + 1
    draws = torch.stack([stratified_timesteps(10, 0, 5) for _ in range(200)])
    assert (draws.flatten().bincount(minlength=5) == 400).all()
    assert (draws[:, 0].bincount(minlength=5) > 20).all()  # in random order


def test_samples_depend_on_seed_and_index_alone():
    d = Diffusion("cosine", 20)
    oracle = exact(d, 0.2, 0.3)
    for kwargs in (dict(steps=5), dict(steps=5, eta=1.0), dict()):
        whole = d.sample(oracle, 7, (1, 4, 4), seed=3, **kwargs)
        assert torch.equal(whole, d.sample(oracle, 7, (1, 4, 4), seed=3, batch_size=2, **kwargs))
        assert torch.equal(whole[:4], d.sample(oracle, 4, (1, 4, 4), seed=3, **kwargs))
        assert not torch.equal(whole, d.sample(oracle, 7, (1, 4, 4), seed=4, **kwargs))
    a, b = (image_noise([np.random.default_rng(key)], (1000,)) for key in ([0, 1], [1, 0]))
    assert abs((a * b).mean().item()) < 0.15  # streams of neighbouring seeds are not shifted copies
    nan = lambda x, t: x + float("nan")  # which is like no class, and would count as forgotten
    for steps, word in ((0, "from 1 to 20"), (21, "from 1 to 20"), (3, "not finite")):
        for clip in (True, False):
            with pytest.raises(UserError, match=word):
                Diffusion("linear", 20).sample(nan, 2, (1, 4, 4), steps=steps, clip=clip)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_sampling_takes_the_steps_of_step(eta):
    d, streams = Diffusion("cosine", 20), [np.random.default_rng([0, 3, i]) for i in range(2)]
    oracle, x = exact(d, 0.2, 0.3), image_noise(streams, (1, 4, 4))
    for t, t_prev in ((19, 10), (10, 0), (0, -1)):
        z = image_noise(streams, (1, 4, 4)) if eta and t_prev >= 0 else torch.zeros_like(x)
        x = d.step(oracle, x, torch.tensor([t] * 2), torch.tensor([t_prev] * 2), z, eta)
    assert torch.allclose(x, d.sample(oracle, 2, (1, 4, 4), steps=3, eta=eta, seed=3), atol=1e-5)


# --- the network ----------------------------------------------------------------------


@pytest.mark.parametrize("size", [(28, 28), (32, 32), (7, 7), (13, 18), (1, 5)])
@pytest.mark.parametrize("patch_size", [1, 2])
def test_unet_takes_any_size(size, patch_size):
    unet = UNet(in_channels=3, model_channels=16, channel_mult=(1, 2, 2),
                attention_resolutions=(2,), patch_size=patch_size)
    x = torch.randn(2, 3, *size)
    assert unet(x, torch.tensor([0, 999])).shape == x.shape


def test_unet_starts_at_zero_the_velocity_form_at_its_closed_form_and_t_is_embedded_as_in_ddpm():
    emb, w = timestep_embedding(torch.tensor([0, 7]), 8), 10_000 ** (-1 / 4)
    assert torch.equal(emb[0], torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0]))
    assert emb[1, [1, 5]].tolist() == pytest.approx([math.cos(7 * w), math.sin(7 * w)], abs=1e-6)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([100, 800])
    assert UNet(model_channels=16)(x, t).abs().max() == 0
    d = Diffusion("cosine", 1000)
    unet = UNet(model_channels=16, alpha_bar=d.alpha_bar)
    root = d.sqrt_one_minus_alpha_bar[t].view(-1, 1, 1, 1)
    assert torch.allclose(unet(x, t), root * x, atol=1e-5)
    unet.out[2].bias.data += 3.0  # v = 3
    assert torch.allclose(unet(x, t), root * x + 3 * (1 - root**2).sqrt(), atol=1e-4)
    assert "alpha_bar" not in unet.state_dict()  # which belongs to the schedule


# --- weights that others published ----------------------------------------------------

PUBLISHED = torch.load(DATA / "ddpm_reference.pt", weights_only=True)


@torch.no_grad()
@pytest.mark.parametrize("layout", PUBLISHED)
def test_published_networks_give_the_originals_outputs(layout, tmp_path):
    reference = PUBLISHED[layout]
    x, t, output = (reference[k] for k in ("x", "timesteps", "output"))
    torch.save(reference["state_dict"], tmp_path / "weights.bin")
    checkpoint = ddpm.load_checkpoint(tmp_path / "weights.bin")
    assert (checkpoint.unet(x, t) - output).abs().max() < 1e-4
    # each of the settings that sets these networks apart is needed for it
    for name, value in {"norm_eps": 1e-5, "sin_first": False, "pad_end": False}.items():
        unet, _ = ddpm.build({**checkpoint.config,
                              "unet": {**checkpoint.config["unet"], name: value}})
        unet.load_state_dict(checkpoint.unet.state_dict())
        assert (unet.eval()(x, t) - output).abs().max() > 1e-4, name


def test_the_newer_spelling_of_attention_and_trainers_wrappers_are_the_same_network():
    old = PUBLISHED["diffusers"]["state_dict"]
    text = "\n".join(old)
    for a, b in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
        assert f".{a}." in text
        text = text.replace(f".{a}.", f".{b}.")
    new = {f"module.{k}": v for k, v in zip(text.split("\n"), old.values())}
    a, b = ddpm.from_published(old, "x"), ddpm.from_published({"state_dict": new}, "x")
    assert a["config"] == b["config"] and a["weights"].keys() == b["weights"].keys()
    assert all(torch.equal(v, b["weights"][k]) for k, v in a["weights"].items())


@pytest.mark.parametrize("layout", PUBLISHED)
def test_every_tensor_of_the_published_cifar10_networks_has_its_place(layout):
    with gzip.open(DATA / "ddpm_cifar10_state_dicts.tsv.gz", "rt") as f:
        rows = [line.rstrip("\n").split("\t") for line in f]
    tensors = {k: torch.empty([int(n) for n in shape.split(",")], device="meta")
               for l, k, shape in rows if l == layout}
    assert len(tensors) == 328
    raw = ddpm.from_published(tensors, "cifar")
    assert sum(v.numel() for v in raw["weights"].values()) == 35_746_307
    assert raw["config"]["image_shape"] == (3, 32, 32) and raw["data"]["name"] == "cifar10"
    assert raw["config"]["unet"]["attention_resolutions"] == [2]
    some = sorted(tensors)[100]
    with pytest.raises(ValueError, match=some):
        ddpm.from_published({k: v for k, v in tensors.items() if k != some}, "cifar")
    with pytest.raises(ValueError, match="class_embedding.weight"):
        ddpm.from_published({**tensors, "class_embedding.weight": torch.empty(10, 512)}, "cifar")
    more = ddpm.from_published({**tensors, "logits.weight": torch.empty(1)}, "cifar")
    assert more["weights"].keys() == raw["weights"].keys()


@torch.no_grad()
def test_diffusers_config_says_what_no_tensor_does(tmp_path, capsys):
    """The courses' networks share the names of google/ddpm-cifar10-32's tensors."""
    course, weights = json.loads((DATA / "diffusers_course.json").read_text()), {}
    for place, (name, shape) in enumerate(sorted(course["shapes"].items())):
        is_vector = len(shape) == 1
        numbers = torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * (1 + place))
        numbers *= 0.2 if is_vector else 1.4 / math.sqrt(math.prod(shape[1:]))
        numbers += is_vector and name.endswith("weight")
        weights[name] = numbers.view(shape).float()
    x, t = torch.sin(torch.arange(384.0)).view(2, 3, 8, 8), torch.tensor([3, 700])
    output, config = torch.tensor(course["output"]).view(2, 3, 8, 8), course["config"]
    path = tmp_path / "diffusion_pytorch_model.bin"
    torch.save(weights, path)
    guessed = ddpm.load_checkpoint(path)
    assert "config.json: assuming" in capsys.readouterr().out
    assert (guessed.unet(x, t) - output).abs().max() > 1e-3  # what would pass silently
    for mark, change in (("", {"norm_eps": None}), ("\ufeff", {"sample_size": [8, 8]})):
        (tmp_path / "config.json").write_text(mark + json.dumps({**config, **change}), "utf-8")
        checkpoint = ddpm.load_checkpoint(path)
        assert (checkpoint.unet(x, t) - output).abs().max() < 2e-5
        assert checkpoint.config["image_shape"] == (3, 8, 8)
    for key, value in (("act_fn", "gelu"), ("sample_size", [8, 16]), ("num_class_embeds", 10),
                       ("", None)):
        change = {**config, key: value} if key else []  # a list at the top
        (tmp_path / "config.json").write_text(json.dumps(change))
        with pytest.raises(UserError, match=f"config.json.*{key}"):
            ddpm.load_checkpoint(path)
    with pytest.raises(UserError, match="sd_unlearn.py"):  # of another kind of model
        ddpm.from_published({"state_dict": {"model.diffusion_model.x": torch.zeros(1)}}, "x")
