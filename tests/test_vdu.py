"""The paper's losses, posterior and loop: against torch.distributions, finite
differences, and toys of known minimum; and what goes beyond the paper."""

import copy
import inspect
import itertools
import re
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torchvision.utils import save_image

import ddpm
import vdu
from ddpm import Diffusion, UserError
from train_ddpm import GaussianPosterior
from vdu import (FunctionSpaceObjective, Likeness, PaperObjective, count_evaluations,
                 guessed_posterior, middle_features, plasticity_loss, stability_loss, unlearn,
                 vdu_loss)


@pytest.mark.parametrize("known", [0, 2, 40])  # before it goes on from mean, std and n
def test_the_posterior_is_mean_and_standard_deviation(known):
    torch.manual_seed(0)
    # a spread small beside the mean, where naive sums of squares fail; and none at all
    draws = {"w": torch.randn(40, 3, 2) * 0.01 + 5, "still": torch.ones(40, 2)}
    first = [{k: f(v[:known], 0) for k, v in draws.items()} for f in (torch.mean, torch.std)
             if known]
    posterior = GaussianPosterior(*first, n=known)
    for i in range(known, 40):
        posterior.update((k, v[i]) for k, v in draws.items())
    assert torch.allclose(posterior.mean["w"].double(), draws["w"].double().mean(0), rtol=1e-6)
    assert torch.allclose(posterior.std["w"].double(), draws["w"].double().std(0), rtol=1e-3)
    assert posterior.n == 40 and stability_loss(posterior.mean, posterior) == 0
    assert torch.isfinite(stability_loss({**posterior.mean, "still": torch.zeros(2)}, posterior))
    guess = guessed_posterior({"a": torch.tensor([3.0, -4.0])}.items(), share=0.5)
    assert guess.n == 1 and guess.mean["a"].tolist() == [3, -4]
    assert guess.std["a"].item() == pytest.approx(0.5 * 12.5**0.5)  # of the root mean square


def test_the_posterior_over_files_of_one_training(tmp_path):
    """Of anyone's network, whatever stands around its parameters in the files."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))  # with buffers
    theta, state = dict(net.named_parameters()), net.state_dict().items()
    a, b, c, d = moments = [{k: torch.randn(v.shape) for k, v in state} for _ in range(4)]
    for name, contents in {"a": a, "b": {"state_dict": b, "epoch": 3},
                           "c": {f"module.{k}": v for k, v in c.items()},
                           "d": {"model": {f"_orig_mod.{k}": v for k, v in d.items()}},
                           "less": {k: v for k, v in b.items() if k != "0.bias"},
                           "wider": {**b, "1.weight": torch.ones(3)}}.items():
        torch.save(contents, tmp_path / name)
    posterior_of = lambda names, parameters: GaussianPosterior.from_checkpoints(
        [str(tmp_path / name) for name in names], parameters)
    posterior = posterior_of("abcd", net.named_parameters())
    assert posterior.n == 4 and posterior.mean.keys() == theta.keys()
    for k in theta:
        assert torch.allclose(posterior.mean[k], torch.stack([m[k] for m in moments]).mean(0))
        assert torch.allclose(posterior.std[k], torch.stack([m[k] for m in moments]).std(0))
    elsewhere = {k: v.to("meta") for k, v in theta.items()}  # stands for an accelerator
    for p in (posterior.to("meta"), posterior_of("ab", elsewhere)):
        assert {v.device.type for part in (p.mean, p.std) for v in part.values()} == {"meta"}
    for names, word in ((["a", "less"], "less .*match.*0.bias"), ("a", "two"),
                        (["a", "wider"], "wider .*match.*1.weight"), ("aba", "differ"),
                        (["gone"], "no checkpoint at .*gone")):
        with pytest.raises(UserError, match=word):
            posterior_of(names, theta)


@pytest.fixture
def anyone():
    """Not our network, called as net(x, t); its 8 parameters; their posterior."""
    torch.manual_seed(0)
    net = torch.nn.Bilinear(2, 1, 2).double()
    net.unused = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    net.frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    theta = {k: p for k, p in net.named_parameters() if p.requires_grad}
    return net, theta, GaussianPosterior({k: torch.randn_like(p) for k, p in theta.items()},
                                         {k: torch.rand_like(p) + 0.2 for k, p in theta.items()}, 5)


@torch.no_grad()
def test_objective_is_the_kl_of_gaussians_up_to_its_constants(anyone):
    """B = KL(q || p(theta | D)) - KL at mu*, for q = prod N(theta_i, s_i^2), any s."""
    _, theta, posterior = anyone
    s = {k: torch.rand_like(v) + 0.05 for k, v in theta.items()}

    def kl(center):
        return sum(kl_divergence(Normal(center[k], s[k]),
                                 Normal(posterior.mean[k], posterior.std[k])).sum() for k in s)

    B = stability_loss(theta, posterior)
    assert B.item() == pytest.approx((kl(theta) - kl(posterior.mean)).item(), rel=1e-12)
    # The whole: KL(q || Z p(theta|D) / p(D_f|theta)) = KL(q || p(theta|D)) - A + const,
    # for an A that is quadratic in theta. gamma = 1/2 gives both terms the weight 1/2.
    A = lambda theta: sum((v - 2).square().sum() for v in theta.values())
    exact = kl(theta) - A(theta) - (kl(posterior.mean) - A(posterior.mean))
    difference = vdu_loss(A(theta), B, 0.5) - vdu_loss(A(posterior.mean), 0.0, 0.5)
    assert difference.item() == pytest.approx(0.5 * exact.item(), rel=1e-12)
    assert vdu_loss(3.0, 5.0, 0.0) == -3 and vdu_loss(3.0, 5.0, 1.0) == 5
    assert vdu_loss(3.0, 5.0, 0.25) == pytest.approx(-0.75 * 3 + 0.25 * 5)


def test_plasticity_loss_is_the_squared_error_and_its_gradient():
    d, w = Diffusion("cosine", 100), torch.tensor(0.3, requires_grad=True)
    torch.manual_seed(0)
    x0, eps, t = *torch.randn(2, 4, 1, 5, 5), torch.tensor([0, 20, 60, 99])
    a, C_t = plasticity_loss(lambda x, t: w * x, d, x0, t, eps), torch.tensor([3.0, 0.5, 1, 2])
    assert torch.equal(plasticity_loss(lambda x, t: w * x, d, x0, t, eps, C_t), C_t * a)
    abar = d.alpha_bar[t].view(-1, 1, 1, 1)
    xt = abar.sqrt() * x0 + (1 - abar).sqrt() * eps
    assert torch.allclose(a, (eps - 0.3 * xt).square().sum((1, 2, 3)), rtol=1e-5)
    gradient = (-2 * xt * (eps - 0.3 * xt)).sum((1, 2, 3)).mean().item()
    assert torch.autograd.grad(a.mean(), w)[0].item() == pytest.approx(gradient, rel=1e-4)


def test_a_step_is_the_chain_rule_and_its_minimum_the_closed_form(anyone):
    """A quadratic toy whose A = a . theta: SGD in z ends at theta_i - mu*_i =
    ((1-gamma)/gamma) (P/d) sigma*_i^2 dA/dtheta_i, and its first step is lr sigma*^2
    dL/dtheta, of the mean over batches, in the objective's unit (1 if it has none)."""
    net, theta, posterior = anyone
    slope = {k: torch.randn_like(m) for k, m in posterior.mean.items()}
    gamma, unit = 0.3, 4 / 8  # d = 4 dimensions, P = 8 parameters
    factors = itertools.cycle([1.5, 0.5])  # of two batches, of mean 1

    def objective(net):
        A = sum((slope[k] * p).sum() for k, p in theta.items())
        if torch.is_grad_enabled():  # before and after it is measured without
            A = A * next(factors)
        return vdu_loss(A, unit * stability_loss(theta, posterior), gamma), {"A": A.item()}

    for unit_of_steps in (1.0, unit):
        record = unlearn(net, posterior, objective, lr=0.01, steps=1, accumulate=2)
        at_mean = sum((slope[k] * posterior.mean[k]).sum().item() for k in theta)
        assert record["before"] == {"A": pytest.approx(at_mean)}
        assert record["after"]["A"] > record["before"]["A"]
        for k, p in theta.items():  # at mu* the gradient is that of -(1 - gamma) A
            step = 0.01 * posterior.std[k] ** 2 * (1 - gamma) * slope[k] / unit_of_steps
            assert torch.allclose(p - posterior.mean[k], step, rtol=1e-4, atol=1e-7)
        objective.unit = unit
    record, squares = unlearn(net, posterior, objective, lr=0.1, steps=800, accumulate=2), 0
    for k, p in theta.items():
        z = (1 - gamma) / gamma / unit * posterior.std[k] * slope[k]
        assert torch.allclose(p - posterior.mean[k], posterior.std[k] * z, rtol=1e-3, atol=1e-5)
        squares += z.square().sum().item() / 8
    assert record["moved_rms_sigma"] == pytest.approx(squares**0.5, rel=1e-3)


@pytest.mark.parametrize("adam", [False, True])
def test_what_the_objective_does_not_use_stays_at_its_mean(anyone, adam):
    (net, theta, posterior), x = anyone, torch.ones(3, 2, dtype=torch.float64)
    objective = lambda net: (-net(x, x[:, :1]).sum(), {"A": torch.rand(()).item()})
    record = unlearn(net, posterior, objective, lr=0.1, steps=0, adam=adam)
    assert record["steps"] == record["moved_rms_sigma"] == 0
    assert record["before"] == record["after"]  # of one batch: all is drawn alike
    assert all(torch.equal(p, posterior.mean[k]) for k, p in theta.items())
    unlearn(net, posterior, objective, lr=0.1, steps=3, adam=adam)
    assert torch.equal(net.unused, posterior.mean["unused"]) and (net.frozen == 1).all()
    # Adam's steps fall with (1 - step/steps)^2, SGD's grow by its momentum of 0.9.
    z = 0.1 * (1 + 4 / 9 + 1 / 9) if adam else 0.1 * 3 * posterior.std["bias"] * (1 + 1.9 + 2.71)
    assert torch.allclose(net.bias, posterior.mean["bias"] + posterior.std["bias"] * z)
    away = lambda net: (-100 * net.weight.square().sum(), {})  # what runs away ends at the mean
    for lr, steps, word in ((1e12, 50, r"at step \d+"), (1e308, 1, "infinite")):
        with pytest.raises(UserError, match=word):
            unlearn(net, posterior, away, lr, steps)
        assert all(torch.equal(p, posterior.mean[k]) for k, p in theta.items())
    with pytest.raises(UserError, match="posterior .*match.*frozen"):
        unlearn(net.requires_grad_(), posterior, objective, 0.1, 1)


def test_evaluations_are_counted_by_images_and_three_with_a_gradient(anyone):
    net, theta, posterior = anyone
    counter, x = count_evaluations(net), torch.ones(5, 2, dtype=torch.float64)
    net(x, x[:, :1])
    assert counter["evaluations"] == 3 * 5
    with torch.no_grad():
        net(x, x[:, :1])
        vdu.frozen_network(net, posterior)(x[:2], x[:2, :1])
    assert counter["evaluations"] == 3 * 5 + 5 + 2


# A toy: 4x4 images of two classes, bright left and bright right.
CONFIG = {"unet": dict(model_channels=16, channel_mult=[1], num_heads=1), "schedule": "cosine",
          "timesteps": 100, "velocity": True, "image_shape": [1, 4, 4]}
is_left = lambda x: x[..., :2].mean((1, 2, 3)) > x[..., 2:].mean((1, 2, 3))


def toy_images(n, left, seed=0):
    x = torch.full((n, 1, 4, 4), 0.7)
    x[..., 2 * left : 2 * left + 2] = -0.7
    return x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def toy():
    """A small DDPM of both classes and its posterior, trained here in a few seconds."""
    torch.manual_seed(0)
    unet, d = ddpm.build(CONFIG)
    images = torch.cat([toy_images(500, 1), toy_images(500, 0, seed=1)])
    optimizer, posterior = torch.optim.Adam(unet.parameters(), lr=3e-3), GaussianPosterior()
    for step in range(500):
        optimizer.param_groups[0]["lr"] = 3e-3 * max(0.1, 1 - step / 350)
        ddpm.training_step(unet, d, optimizer, images[torch.randint(len(images), (64,))])
        if step >= 350:
            posterior.update(unet.named_parameters())
    unet.load_state_dict(posterior.mean)
    return d, unet.eval(), posterior


def test_the_papers_objective_is_the_sum_of_its_terms(toy):
    """Away from mu*, where B is not 0; at gamma = 1 it is d/P B alone."""
    d, unet, posterior = toy
    net, P = copy.deepcopy(unet), sum(p.numel() for p in unet.parameters())
    with torch.no_grad():
        for k, p in net.named_parameters():
            p += 2 * posterior.std[k]
    B = stability_loss(dict(net.named_parameters()), posterior).item()
    assert B == pytest.approx(2 * P, rel=1e-2)  # (2 sigma)^2 / (2 sigma^2) each
    for gamma in (0.0, 0.3, 1.0):
        objective = PaperObjective(d, posterior, toy_images(9, 1), gamma, 25, (0.25, 0.5))
        assert objective.draw()[1].sort().values.tolist() == [*range(25, 50)]
        L, numbers = objective(net)
        assert numbers["B"] == pytest.approx(B / P) and objective.unit == 16 / P
        assert L.item() == pytest.approx(-(1 - gamma) * 16 * numbers["A"] + gamma * 16 * B / P,
                                         rel=1e-4)
    objective = PaperObjective(d, posterior, toy_images(9, 1), 0, 25, (0, 1), bound_weights=True)
    torch.manual_seed(1)
    L, numbers = objective(net)
    torch.manual_seed(1)
    x0, t, eps, _ = objective.draw()
    C_t = d.beta**2 / (2 * d.beta * d.alpha * (1 - d.alpha_bar))  # sigma_t^2 = beta_t
    a = plasticity_loss(net, d, x0, t, eps)
    shown = [(C_t[t] * a).mean().item(), a.mean().item() / 16]
    assert [-L.item(), numbers["A"]] == pytest.approx(shown, rel=1e-4)
    with pytest.raises(UserError, match="--t-range"):
        PaperObjective(d, posterior, toy_images(9, 1), 0.5, 16, (0.7, 0.7))
    record = unlearn(net, posterior, PaperObjective(d, posterior, x0, 1.0), 0.01, 5)  # stays there
    assert all(torch.equal(p, posterior.mean[k]) for k, p in net.named_parameters())
    assert record["moved_rms_sigma"] == record["after"]["B"] == 0 and record["steps"] == 5
    assert record["before"] == record["after"]  # no weight moved, and the noise is the same


def test_forgets_one_of_two_classes(toy):
    """Left goes, and what is drawn instead is as the others are."""
    (d, unet, posterior), forget, net = toy, toy_images(500, 1), copy.deepcopy(toy[1])
    draw = lambda net, n=200: d.sample(net, n, (1, 4, 4), steps=20, eta=1.0)
    own = draw(unet, 300)
    likeness = Likeness(middle_features(unet, d), forget, own, 0.5)
    kept = own[likeness.of_own < 0.5]  # exact, as the two are far apart
    assert is_left(kept).float().mean() < 0.02 and len(kept) > 100
    objective = lambda gamma: FunctionSpaceObjective(  # a larger share pushes harder
        d, posterior, forget, gamma, 64, (0.3, 1.0), frozen=unet, kept=kept, rho=0.85)
    unlearn(net, posterior, objective(1.0), lr=0.5, steps=3, adam=True)  # stays, bit for bit
    assert all(torch.equal(p, posterior.mean[k]) for k, p in net.named_parameters())

    record = unlearn(net, posterior, objective(3e-5), lr=1.0, steps=200, adam=True)

    assert record["before"]["B"] == record["before"]["F"] == 0 < record["after"]["B"]
    samples = draw(net)
    before, after = (is_left(x).float().mean().item() for x in (draw(unet), samples))
    assert 0.3 < before < 0.7 and after < 0.1 * before
    right = samples[~is_left(samples)].mean(0)
    assert (right - toy_images(500, 0).mean(0)).abs().mean() < 0.05


# Two Gaussians of one pixel, x_0 ~ N(+-0.5, 0.3^2), of which all is known.
RHO = 0.2
TWO = Diffusion("linear", 100)


def known(mean, xt, t):
    """The density of x_t, (n,), and E[eps | x_t], for x_0 ~ N(mean, 0.3^2)."""
    abar = TWO.alpha_bar[t].view(-1, 1, 1, 1)
    x = Normal(abar.sqrt() * mean, (abar * 0.09 + 1 - abar).sqrt())
    return x.log_prob(xt).exp().flatten(), (1 - abar).sqrt() * (xt - x.mean) / x.variance


def share(xt, t):
    """w(x_t), by Bayes' rule: (n,)."""
    gone, stays = known(0.5, xt, t)[0], known(-0.5, xt, t)[0]
    return RHO * gone / (RHO * gone + (1 - RHO) * stays)


def of_all(xt, t):
    """eps_theta*: E[eps | x_t] of D_f and D_r together."""
    w = share(xt, t).view(-1, 1, 1, 1)
    return w * known(0.5, xt, t)[1] + (1 - w) * known(-0.5, xt, t)[1]


def two_gaussians(batch_size, posterior, t_range=(0.3, 0.7)):
    torch.manual_seed(0)
    forget, kept = (mean + 0.3 * torch.randn(200_000, 1, 1, 1) for mean in (0.5, -0.5))
    return FunctionSpaceObjective(TWO, posterior, forget, 0.0, batch_size, t_range,
                                  frozen=of_all, kept=kept, rho=RHO)


@pytest.mark.parametrize("K", [1e4, 5.0])
def test_the_objective_is_least_at_the_retrained_model(anyone, monkeypatch, K):
    """The loss along eps_theta* + a (target - eps_theta*) is least at a = 1, where the
    target is E[eps | x_t, D_r] for an endless K, and else the closed form of (b)."""
    monkeypatch.setattr(FunctionSpaceObjective, "K", K)
    objective = two_gaussians(200_000, anyone[-1])
    monkeypatch.setattr(objective, "stability", lambda net: torch.tensor(0.0))

    def loss(a):
        def net(xt, t):
            w = share(xt, t).view(-1, 1, 1, 1)
            step = w / (1 - w + w / K) * (of_all(xt, t) - known(0.5, xt, t)[1])
            if K > 1e3:
                step = known(-0.5, xt, t)[1] - of_all(xt, t)
            inside = ((t >= 30) & (t < 70)).view(-1, 1, 1, 1)  # D_f pushes nowhere else
            return of_all(xt, t) + a * step * inside

        torch.manual_seed(1)
        with torch.no_grad():
            return objective(net)[0].double().item()

    at_0, at_1, at_2 = loss(0), loss(1), loss(2)
    vertex = 1 - (at_2 - at_0) / (2 * (at_2 - 2 * at_1 + at_0))
    assert vertex == pytest.approx(1, abs=0.02)


def test_the_push_at_the_start_is_that_of_minus_a(anyone, monkeypatch):
    """At theta* the gradient is -rho times that of A, whatever K is, and F's is 0."""
    objective = two_gaussians(64, anyone[-1])
    monkeypatch.setattr(objective, "stability", lambda net: torch.tensor(3.0))
    shift = torch.tensor(0.0, requires_grad=True)

    torch.manual_seed(3)
    loss, numbers = objective(lambda xt, t: of_all(xt, t) + shift)
    push = torch.autograd.grad(loss, shift)[0]

    torch.manual_seed(3)
    x0, t, eps, _ = objective.draw()
    A = plasticity_loss(lambda xt, t: of_all(xt, t) + shift, TWO, x0, t, eps)
    weighted = (A / TWO.alpha_bar[t].clamp(min=0.003)).mean()
    ratio = 0.5 + 0.5 * 0.4  # what is kept has half of its t elsewhere
    of_A = torch.autograd.grad(weighted, shift)[0]
    assert push.item() == pytest.approx(-RHO * ratio * of_A.item())
    assert numbers["A"] == pytest.approx(A.mean().item()) and numbers["F"] == 0
    # F and B have their weights, and gamma
    objective.gamma, objective.rho, objective.weight_of_forget = 0.3, 0.0, 0.0
    velocity = lambda t: TWO.alpha_bar[t].clamp(min=0.003).sqrt().view(-1, 1, 1, 1)
    loss, numbers = objective(lambda xt, t: of_all(xt, t) + 0.5 * velocity(t))
    assert 0 < numbers["F"] < 0.25
    assert loss.item() == pytest.approx(0.7 * 0.25 + 0.3 * objective.unit * 3, rel=1e-4)


def test_likeness_is_the_share_of_d_f_and_calibrated():
    """Of two clouds w is known, and its mean over own samples is rho."""
    torch.manual_seed(0)
    forget = torch.randn(2000, 2) + torch.tensor([1.0, -0.5])
    is_gone = torch.arange(4000) < 4000 * RHO
    own = torch.randn(4000, 2) + is_gone[:, None] * torch.tensor([1.0, -0.5])

    likeness = Likeness(lambda x: x, forget, own, RHO)

    assert likeness.of_own.mean().item() == pytest.approx(RHO, rel=1e-3)
    new = 2 * torch.randn(2000, 2)
    gone = (-(new - torch.tensor([1.0, -0.5])).square().sum(1) / 2).exp()
    stays = (-new.square().sum(1) / 2).exp()
    w = RHO * gone / (RHO * gone + (1 - RHO) * stays)
    assert (likeness(new) - w).abs().mean() < 0.03


def test_likeness_tells_images_of_d_f_by_the_networks_own_features(toy):
    d, unet, _ = toy
    features = middle_features(unet, d)
    own = torch.cat([toy_images(60, 1, seed=5), toy_images(140, 0, seed=4)])

    likeness = Likeness(features, toy_images(100, 1, seed=3), own, rho=0.3)

    left, right = toy_images(200, 1, seed=6), toy_images(200, 0, seed=7)
    assert likeness(left).mean() > 0.9 and likeness(right).mean() < 0.1
    assert torch.equal(features(left), features(left))  # the same noise each time


def test_bfloat16_computes_what_float32_does(toy, monkeypatch):
    """A training step, an unlearning step and a sample: the suite runs in float32."""
    d, unet, posterior = toy

    def results():
        net = copy.deepcopy(unet)
        sample = d.sample(net, 20, (1, 4, 4), steps=10, eta=1.0)
        objective = FunctionSpaceObjective(
            d, posterior, toy_images(50, 1), 0.001, 64, (0.3, 1.0), frozen=unet,
            kept=toy_images(50, 0), rho=0.5)
        unlearn(net, posterior, objective, lr=0.1, steps=1)
        moved = torch.cat([(p - posterior.mean[k]).flatten() for k, p in net.named_parameters()])
        torch.manual_seed(0)
        loss = ddpm.training_step(net, d, torch.optim.SGD(net.parameters(), 0.1), toy_images(64, 1))
        return sample, moved, loss

    expected = results()
    bfloat16 = lambda device: torch.autocast("cpu", torch.bfloat16)
    monkeypatch.setattr(ddpm, "autocast", bfloat16)
    monkeypatch.setattr(vdu, "autocast", bfloat16)
    sample, moved, loss = results()

    assert 0 < (sample - expected[0]).abs().mean() < 0.02
    assert torch.cosine_similarity(moved, expected[1], dim=0) > 0.95
    assert loss == pytest.approx(expected[2], rel=0.05) and loss != expected[2]


@pytest.mark.parametrize("method", [[], ["--paper"], ["--paper", "--bound-weights"]])
def test_the_command_line_reaches_the_loop(toy, tmp_path, monkeypatch, method):
    (_, unet, posterior), folder = toy, tmp_path / "left"
    folder.mkdir()
    for i, image in enumerate(toy_images(40, 1)):
        save_image(image / 2 + 0.5, folder / f"{i}.png")
    torch.save({"config": CONFIG, "weights": unet.state_dict(), "step": 500,
                "data": {"name": "toy", "source": "folder", "classes": [], "excluded": []},
                "posterior": {"mean": posterior.mean, "std": posterior.std, "n": 150}},
               tmp_path / "x.pt")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vdu, "unlearn", loop := Mock(side_effect=KeyboardInterrupt))
    flags = (f"--checkpoint {tmp_path}/x.pt --forget-images {folder} --t-range 0.25 0.5 "
             "--batch-size 7 --anchors 40 --gamma 0.3 --share 0.4 --steps 9 --seed 5")
    with pytest.raises(KeyboardInterrupt):
        vdu.main(vdu.parser().parse_args([*flags.split(), "--device", "cpu", *method]))
    call = inspect.signature(unlearn).bind(*loop.call_args.args, **loop.call_args.kwargs).arguments
    defaults = vdu.OURS if (ours := "--paper" not in method) else vdu.PAPER
    objective = call["objective"]
    assert all(torch.equal(call["posterior"].std[k], v) for k, v in posterior.std.items())
    assert (objective.low, objective.high, objective.batch_size) == (25, 50, 7)
    assert objective.forget.shape == (40, 1, 4, 4) and objective.gamma == 0.3
    assert (call["steps"], call["seed"], call["adam"]) == (9, 5, ours)
    assert (objective.C_t == 1).all() == ("--bound-weights" not in method)
    assert call["lr"] == defaults["lr"]
    assert not ours or objective.rho == 0.4


def test_the_files_name_is_made_of_what_was_forgotten():
    args = vdu.parser().parse_args(["--forget-class", "1"])
    ours, theirs = (SimpleNamespace(data={"source": s}) for s in ("folder", "published weights"))
    for path, model, classes, name in (
            ("d/x.pt", ours, ["a cat", "../../x"], r"d/x-forget-a cat-.._.._x\.pt"),
            ("d/x.pt", ours, [f"class {i}" for i in range(99)], r"d/x-forget-.{,99}\.pt"),
            ("d/x.safetensors", theirs, ["1"], r"checkpoints/x-forget-1\.pt")):
        assert re.fullmatch(name, vdu.choose_output(args, path, model, classes))
