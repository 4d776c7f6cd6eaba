"""The paper's losses and posterior: against torch.distributions, finite differences,
and a closed-form toy."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.distributions import Normal, kl_divergence

import ddpm
import vdu
from ddpm import Diffusion, UserError
from train_ddpm import RunningPosterior
from unet import UNet
from vdu import (ForgottenCheck, FunctionSpaceObjective, GaussianPosterior, Likeness,
                 PaperObjective, fit_logistic, guessed_posterior, measured_posterior,
                 plasticity_loss, stability_loss, unlearn, vdu_loss)


def random_posterior(shapes=((3, 2), (4,)), seed=0):
    g = torch.Generator().manual_seed(seed)
    mean = {f"p{i}": torch.randn(s, generator=g, dtype=torch.float64) for i, s in enumerate(shapes)}
    std = {k: torch.rand(m.shape, generator=g, dtype=torch.float64) + 0.1 for k, m in mean.items()}
    return GaussianPosterior(mean, std, n=10)


def random_theta(posterior, seed=1):
    g = torch.Generator().manual_seed(seed)
    return {k: m + torch.randn(m.shape, generator=g, dtype=torch.float64)
            for k, m in posterior.mean.items()}


def test_stability_loss_is_zero_at_the_mean_alone():
    posterior = random_posterior()
    assert stability_loss(posterior.mean, posterior) == 0
    assert stability_loss(random_theta(posterior), posterior) > 0


def test_stability_gradient_is_that_of_finite_differences():
    posterior = random_posterior()
    theta = {k: v.requires_grad_() for k, v in random_theta(posterior).items()}
    stability_loss(theta, posterior).backward()
    h = 1e-6
    for k, p in theta.items():
        for i in range(p.numel()):
            up, down = ({n: v.detach().clone() for n, v in theta.items()} for _ in range(2))
            up[k].view(-1)[i] += h
            down[k].view(-1)[i] -= h
            numeric = (stability_loss(up, posterior) - stability_loss(down, posterior)) / (2 * h)
            assert p.grad.view(-1)[i].item() == pytest.approx(numeric.item(), rel=1e-6, abs=1e-6)


def test_objective_is_the_kl_of_gaussians_up_to_its_constants():
    """B = KL(q || p(theta | D)) - KL at theta = mu*, for q = prod N(theta_i, s_i^2)
    with any fixed s."""
    posterior = random_posterior()
    theta = random_theta(posterior)
    s = {k: torch.rand_like(v) + 0.05 for k, v in theta.items()}

    def kl(center):
        return sum(kl_divergence(Normal(center[k], s[k]),
                                 Normal(posterior.mean[k], posterior.std[k])).sum() for k in center)

    B = stability_loss(theta, posterior)
    assert B.item() == pytest.approx((kl(theta) - kl(posterior.mean)).item(), rel=1e-12)
    # The whole objective: KL(q || Z p(theta|D) / p(D_f|theta)) = KL(q || p(theta|D)) +
    # log p(D_f|theta) + const, with
    # log p(D_f|theta) = -A, for a likelihood that is Gaussian in theta, so that A is
    # known.
    def A(t):
        return sum((v - 2).square().sum() for v in t.values())

    gamma = 0.5  # both terms at the weight 1/2
    exact = kl(theta) - A(theta)
    reference = kl(posterior.mean) - A(posterior.mean)
    difference = vdu_loss(A(theta), B, gamma) - vdu_loss(A(posterior.mean), 0.0, gamma)
    assert difference.item() == pytest.approx(0.5 * (exact - reference).item(), rel=1e-12)


def test_gamma_interpolates():
    assert vdu_loss(3.0, 5.0, 0.0) == -3 and vdu_loss(3.0, 5.0, 1.0) == 5
    assert vdu_loss(3.0, 5.0, 0.25) == pytest.approx(-0.75 * 3 + 0.25 * 5)
    assert vdu_loss(3.0, 5.0, 0.25, scale=0.2) == pytest.approx(-0.75 * 3 + 0.25 * 0.2 * 5)


def test_stability_does_not_depend_on_names_or_order():
    posterior = random_posterior()
    theta = random_theta(posterior)
    order = {k: torch.randperm(v.numel()) for k, v in theta.items()}
    relabel = lambda d: {f"new-{k}": d[k].reshape(-1)[order[k]] for k in reversed(list(d))}
    shuffled = GaussianPosterior(relabel(posterior.mean), relabel(posterior.std), posterior.n)
    assert stability_loss(relabel(theta),
                          shuffled).item() == pytest.approx(stability_loss(theta, posterior).item(),
                                                            rel=1e-12)


def test_running_posterior_is_mean_and_std():
    torch.manual_seed(0)
    # a spread small beside the mean, where naive sums of squares fail
    draws = torch.randn(40, 3, 2) * 0.01 + 5
    running = RunningPosterior([("w", draws[0])])
    for w in draws:
        running.update([("w", w)])
    posterior = GaussianPosterior(**running.posterior())
    assert torch.allclose(posterior.mean["w"].double(), draws.double().mean(0), rtol=1e-6)
    assert torch.allclose(posterior.std["w"].double(), draws.double().std(0), rtol=1e-3)
    assert posterior.n == 40


def test_a_parameter_that_never_moved_stays_finite():
    running = RunningPosterior([("w", torch.ones(2))])
    for _ in range(3):
        running.update([("w", torch.ones(2))])
    posterior = GaussianPosterior(**running.posterior())
    assert stability_loss({"w": torch.ones(2)}, posterior) == 0
    assert torch.isfinite(stability_loss({"w": torch.zeros(2)}, posterior))


def test_isotropic_keeps_mean_and_total_variance():
    posterior = random_posterior()
    iso = posterior.isotropic()
    total = lambda p: sum(s.square().sum().item() for s in p.std.values())
    assert iso.mean is posterior.mean and total(iso) == pytest.approx(total(posterior))
    assert len({s for v in iso.std.values() for s in v.flatten().tolist()}) == 1


def test_plasticity_loss_is_the_squared_error_and_its_gradient():
    d = Diffusion("cosine", 100)
    w = torch.tensor(0.3, requires_grad=True)
    unet = lambda x, t: w * x
    torch.manual_seed(0)
    x0, eps, t = torch.randn(4, 1, 5, 5), torch.randn(4, 1, 5, 5), torch.tensor([0, 20, 60, 99])
    a = plasticity_loss(unet, d, x0, t, eps)
    xt = d.alpha_bar[t].sqrt().view(-1, 1, 1, 1) * x0 + (1
                                                         - d.alpha_bar[t]).sqrt().view(-1, 1, 1,
                                                                                       1) * eps
    assert torch.allclose(a, (eps - 0.3 * xt).square().sum((1, 2, 3)), rtol=1e-5)
    a.mean().backward()
    assert w.grad.item() == pytest.approx((-2 * xt * (eps - 0.3 * xt)).sum((1, 2, 3)).mean().item(),
                                          rel=1e-4)


# --- a toy: 4x4 images of two classes, bright left and bright right -------------------


def toy_images(n, left, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.full((n, 1, 4, 4), -0.7)
    x[:, :, :, :2] += 1.4 * left
    x[:, :, :, 2:] += 1.4 * (1 - left)
    return x + 0.1 * torch.randn(x.shape, generator=g)


def share_left(x):
    return (x[..., :2].mean((1, 2, 3)) > x[..., 2:].mean((1, 2, 3))).float().mean().item()


@pytest.fixture(scope="module")
def toy():
    """A small DDPM of both classes and its posterior, trained here in a few seconds."""
    torch.manual_seed(0)
    d = Diffusion("cosine", 100)
    unet = UNet(model_channels=16, channel_mult=(1,), num_heads=1, alpha_bar=d.alpha_bar)
    images = torch.cat([toy_images(500, 1), toy_images(500, 0, seed=1)])
    steps = 500
    optimizer = torch.optim.Adam(unet.parameters(), lr=3e-3)
    running = RunningPosterior(unet.named_parameters())
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * max(0.1, 1 - step / (0.7 * steps))
        x0 = images[torch.randint(len(images), (64,))]
        loss = d.simple_loss(unet, x0, torch.randint(0, 100, (64,)), torch.randn_like(x0)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step >= 0.7 * steps:
            running.update(unet.named_parameters())
    posterior = GaussianPosterior(**running.posterior())
    unet.load_state_dict(posterior.mean)
    return d, unet.eval(), posterior


def paper_unlearn(toy, model, forget, gamma, lr, steps, batch_size=16, t_range=(0.7, 1.0), seed=0):
    d, _, posterior = toy
    objective = PaperObjective(d, posterior, forget, gamma, batch_size, t_range)
    return unlearn(model, posterior, objective, lr, steps, seed=seed)


def draw(d, unet, n=200):
    return d.sample(unet, n, (1, 4, 4), steps=20, eta=1.0)


def test_the_toy_knows_both_classes(toy):
    d, unet, _ = toy
    assert 0.3 < share_left(draw(d, unet)) < 0.7


def test_gamma_1_leaves_the_model_at_the_posterior_mean(toy):
    d, unet, posterior = toy
    model = copy.deepcopy(unet)
    torch.nn.init.normal_(model.out[2].weight)  # wherever it was
    record = paper_unlearn(toy, model, toy_images(64, 1), gamma=1.0, lr=0.01, steps=5)
    assert all(torch.equal(p, posterior.mean[k]) for k, p in model.named_parameters())
    assert record["moved_rms_sigma"] == 0 and record["last"]["B"] == 0 and record["steps"] == 5


def test_the_papers_objective_is_the_sum_of_its_terms(toy):
    """Away from mu*, where B is not 0; at gamma = 1 it is d/P B alone."""
    d, unet, posterior = toy
    model = copy.deepcopy(unet)
    with torch.no_grad():
        for k, p in model.named_parameters():
            p += 2 * posterior.std[k]
    P = sum(p.numel() for p in model.parameters())
    B = stability_loss(dict(model.named_parameters()), posterior).item()
    assert B == pytest.approx(2 * P, rel=1e-2)  # (2 sigma)^2 / (2 sigma^2) each
    for gamma in (0.0, 0.3, 1.0):
        L, numbers = PaperObjective(d, posterior, toy_images(9, 1), gamma, 16, (0, 1))(model)
        assert numbers["B"] == pytest.approx(B / P)
        assert L.item() == pytest.approx(-(1 - gamma) * 16 * numbers["A"] + gamma * 16 * B / P,
                                         rel=1e-4)


def test_unlearning_raises_the_error_on_the_forgotten_class_more(toy):
    """One plain step along the posterior's gradient direction: A of D_f grows, and
    grows more than the other class's."""
    d, unet, posterior = toy
    model = copy.deepcopy(unet)
    paper_unlearn(toy, model, toy_images(500, 1), gamma=0.05, lr=0.004, steps=30, batch_size=64,
                  t_range=(0.3, 1.0))

    @torch.no_grad()
    def error(net, x0):
        torch.manual_seed(5)
        t = torch.arange(30, 100).repeat_interleave(len(x0) // 70)
        return plasticity_loss(net, d, x0[: len(t)], t, torch.randn(len(t), 1, 4, 4)).mean().item()

    growth = [error(model, toy_images(490, left, seed=7))
              - error(unet, toy_images(490, left, seed=7)) for left in (1, 0)]
    assert growth[0] > 0 and growth[0] > 1.5 * growth[1]


def function_space(toy, forget, rho=0.5, kappa=3.0, batch_size=64):
    d, unet, posterior = toy
    generated = draw(d, unet, 300)
    first = Likeness(unet, d, forget, generated, rho)
    kept = generated[first.of_images(generated).argsort()[: round((1 - rho) * 300)]]
    likeness = Likeness(unet, d, forget, kept, rho, levels=range(20))
    objective = FunctionSpaceObjective(d, posterior, forget, None, batch_size, (0.3, 1.0),
                                       frozen=unet, kept=kept,
                                       likeness=likeness, rho=rho, kappa=kappa)
    return objective, likeness, generated


def test_forgets_one_of_two_classes(toy):
    """End to end: `left` goes, and what is drawn instead are still images of the class
    that stays."""
    d, unet, posterior = toy
    torch.manual_seed(0)
    objective, likeness, _ = function_space(toy, toy_images(500, 1), kappa=6.0)
    model = copy.deepcopy(unet)
    before = share_left(draw(d, unet))
    check = ForgottenCheck(lambda: draw(d, model), likeness, 250, until=0)
    unlearn(model, posterior, objective, lr=0.2, steps=250, adam=True, check=check)
    samples = draw(d, model)
    after = share_left(samples)
    assert before > 0.3 and after < 0.1 * before
    right = samples[samples[..., :2].mean((1, 2, 3)) <= samples[..., 2:].mean((1, 2, 3))].mean(0)
    assert (right - toy_images(500, 0).mean(0)).abs().mean() < 0.05
    for step, share in check.history:  # the network's own judgement is the true share's
        assert step in (0, 125, 250)
    assert check.history[0][1] == pytest.approx(before, abs=0.1)
    assert check.history[-1][1] < 0.1 * before


def test_the_regression_has_the_minimum_of_the_exact_form(toy):
    """At one x_t: argmin F - rho A is eps* + w/(1-w) (eps* - eps_f), and so is that of
    the regression on both targets."""
    w, star_r = 0.3, 0.7  # eps_r, what the retained data predict; eps_f, what D_f does
    eps_f = -0.4
    star = (1 - w) * star_r + w * eps_f
    e = torch.linspace(-3, 3, 600_001, dtype=torch.float64)
    exact = (e - star) ** 2 - w * (e - eps_f) ** 2
    regression = (1 - w) * (e - star) ** 2 + w * (e - (star + (star - eps_f) / (1 - w))) ** 2
    assert e[exact.argmin()].item() == pytest.approx(star_r, abs=1e-4)  # the retrained model
    assert e[regression.argmin()].item() == pytest.approx(star_r, abs=1e-4)
    assert star + w / (1 - w) * (star - eps_f) == pytest.approx(star_r)

    d, unet, posterior = toy
    objective, likeness, _ = function_space(toy, toy_images(64, 1), rho=0.2, kappa=1.5,
                                            batch_size=16)
    assert objective.weight.mean().item() == pytest.approx(1, abs=1e-5)
    assert objective.weight.shape == (100,)
    torch.manual_seed(3)
    with torch.no_grad():
        # at theta*: F = 0, and || past (e* - eps) ||^2 of D_f is left
        loss, numbers = objective(unet)
    torch.manual_seed(3)
    x0, t, eps, _ = objective.draw()
    with torch.no_grad():
        a = plasticity_loss(unet, d, x0, t, eps)
    w = likeness(d.q_sample(x0, t, eps), t)
    past = (1 + (1 + 0.5 * w) * w / (1 - w)).clamp(max=objective.FURTHEST)
    expected = 0.2 * (objective.weight[t] * past**2 * a).mean()
    # bfloat16, where the processor has it
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)
    assert numbers["A"] == pytest.approx(a.mean().item() / 16, rel=0.02)
    assert numbers["F"] < 1e-4 * numbers["A"]


def test_exact_form_is_the_loss_on_the_retained_data():
    """F - rho A = (1 - rho) E_D_r || eps - eps_theta ||^2 + const, where eps_theta* is
    the conditional mean: two Gaussians, by numbers."""
    torch.manual_seed(0)
    d, n, rho = Diffusion("linear", 100), 400_000, 0.3
    gone = torch.rand(n) < rho
    x0 = torch.where(gone, 0.5, -0.5) + 0.2 * torch.randn(n)
    eps = torch.randn(n)
    xt = d.alpha_bar[60].sqrt() * x0 + (1 - d.alpha_bar[60]).sqrt() * eps
    edges = torch.quantile(xt[:100_000], torch.linspace(0, 1, 201)[1:-1])
    cell = torch.bucketize(xt, edges)
    # E[eps | x_t], on a grid
    star = torch.zeros(200).index_add(0, cell, eps) / cell.bincount(minlength=200)
    loss = lambda table, where: (eps - table[cell]).square()[where].mean()
    everything = torch.ones(n, dtype=torch.bool)
    differences = []
    for shift in (0.0, 0.3):
        table = star + shift * torch.sin(torch.arange(200) / 20)
        F = (table[cell] - star[cell]).square().mean()
        differences.append((F - rho * loss(table, gone) - (1 - rho) * loss(table, ~gone)).item())
        assert F.item() == pytest.approx((loss(table, everything) - loss(star, everything)).item(),
                                         abs=1e-5)
    # gone.mean() is rho but for chance
    assert differences[0] == pytest.approx(differences[1], abs=2e-3)


def test_check_stops_the_loop_and_tells(toy):
    d, unet, posterior = toy
    shares = iter([0.5, 0.3, 0.004, 0.5, 0.4, 0.3])

    class Told(ForgottenCheck):
        def share(self):
            return next(shares)

    check = Told(None, None, 120, until=0.99)
    objective = PaperObjective(d, posterior, toy_images(64, 1), 0.63, 2, (0.7, 1.0))
    record = unlearn(copy.deepcopy(unet), posterior, objective, lr=0.001, steps=120, check=check)
    assert record["steps"] == 100 and check.history == [(0, 0.5), (50, 0.3), (100, 0.004)]
    assert check.text == {"like D_f": "50.0% -> 0.4%"}
    check = Told(None, None, 5, until=0)
    unlearn(copy.deepcopy(unet), posterior, objective, lr=0.001, steps=5, check=check)
    assert check.history == [(0, 0.5), (3, 0.4), (5, 0.3)]  # the last step, always
    for gamma, advice in ((0.0, "or more --steps"), (0.5, "or a smaller --gamma than 0.5")):
        args = SimpleNamespace(function_space=False, gamma=gamma)
        assert advice in vdu.verdict(check, record, args)


def test_measured_sigma_is_the_spread_of_training_on():
    """The network is as it was; what no gradient reaches has no spread; the standard
    deviation is that of the weights after the steps 10, 15 and 19."""
    torch.manual_seed(0)
    unet, d = UNet(model_channels=8, channel_mult=(1,), num_heads=1), Diffusion("linear", 20)
    unet.unused = torch.nn.Parameter(torch.ones(3))
    before, images = copy.deepcopy(unet.state_dict()), torch.rand(4, 1, 8, 8)
    torch.manual_seed(1)
    posterior = measured_posterior(unet, d, images, 20, batch_size=4)
    assert all(torch.equal(v, before[k]) for k, v in unet.state_dict().items())
    assert all(torch.equal(v, before[k]) for k, v in posterior.mean.items())
    assert posterior.n == 3 and (posterior.std["unused"] == vdu.SIGMA_FLOOR).all()
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(unet.parameters(), 2e-4, betas=(0.9, 0.99), weight_decay=0.0)
    passed = []
    for step in range(20):
        index = torch.randint(4, (4,))
        ddpm.training_step(unet, d, optimizer, images[index])
        passed += [unet.out[2].weight.detach().clone()] * (step in (10, 15, 19))
    assert torch.allclose(posterior.std["out.2.weight"], torch.stack(passed).std(0), rtol=1e-3,
                          atol=1e-9)


def test_a_step_is_the_chain_rule_and_its_minimum_the_closed_form():
    """A quadratic toy whose A = a . theta: SGD in z ends at theta_i - mu*_i =
    ((1-gamma)/gamma) (P/d) sigma*_i^2 dA/dtheta_i, and its first step is lr sigma*^2
    dL/dtheta."""
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 2)
    posterior = GaussianPosterior({k: torch.randn_like(p) for k, p in net.named_parameters()},
                                  {k: torch.rand_like(p) + 0.2
                                   for k, p in net.named_parameters()}, 5)
    slope = {k: torch.randn_like(p) for k, p in net.named_parameters()}
    gamma, scale = 0.3, 4 / 8  # d = 4 dimensions, P = 8 parameters

    def objective(model):
        theta = dict(model.named_parameters())
        A = sum((slope[k] * p).sum() for k, p in theta.items())
        return vdu_loss(A, stability_loss(theta, posterior), gamma, scale), {"A": A.item()}

    objective.scale = scale
    unlearn(net, posterior, objective, lr=0.01, steps=1)
    for k, p in net.named_parameters():  # at mu* the gradient is that of -(1 - gamma) A
        step = 0.01 * posterior.std[k] ** 2 * (1 - gamma) * slope[k] / scale
        assert torch.allclose(p - posterior.mean[k], step, rtol=1e-4, atol=1e-7)
    unlearn(net, posterior, objective, lr=0.1, steps=800)
    for k, p in net.named_parameters():
        minimum = (1 - gamma) / gamma / scale * posterior.std[k] ** 2 * slope[k]
        assert torch.allclose(p - posterior.mean[k], minimum, rtol=1e-3, atol=1e-5)


def test_same_seed_same_result(toy):
    d, unet, posterior = toy
    models = [copy.deepcopy(unet) for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1)):
        paper_unlearn(toy, model, toy_images(64, 1), gamma=0.5, lr=0.01, steps=3, seed=seed)
    flat = [torch.cat([p.flatten() for p in m.parameters()]) for m in models]
    assert torch.equal(flat[0], flat[1]) and not torch.equal(flat[0], flat[2])


def test_infinite_loss_stops_with_the_step_and_leaves_the_mean(toy):
    d, unet, posterior = toy
    model = copy.deepcopy(unet)
    with pytest.raises(UserError, match=r"at step \d+"):
        paper_unlearn(toy, model, toy_images(64, 1), gamma=0.0, lr=1e12, steps=50)
    assert all(torch.equal(p, posterior.mean[k]) for k, p in model.named_parameters())


def test_likeness_is_the_share_of_d_f(toy):
    """w is near 1 for D_f at little noise, near 0 for the other class, and rho where
    nothing can be told."""
    d, unet, _ = toy
    torch.manual_seed(0)
    likeness = Likeness(unet, d, toy_images(100, 1, seed=5), toy_images(140, 0, seed=4), rho=0.3,
                        levels=range(20))
    left, right = toy_images(200, 1, seed=6), toy_images(200, 0, seed=7)
    w = lambda x, t: likeness(d.q_sample(x, t, torch.randn_like(x)), t).mean().item()
    t = torch.full((200,), 20)
    assert w(left, t) > 0.7 and w(right, t) < 0.1
    assert 0.15 < w(left, torch.full((200,), 99)) < 0.5
    assert 0.15 < w(right, torch.full((200,), 99)) < 0.5
    ratio = likeness.of_images(torch.cat([left, right]))
    assert (ratio[:200].min() > ratio[200:].max()).item()


def test_logistic_regression_finds_the_log_odds_of_two_gaussians():
    torch.manual_seed(0)
    y = (torch.arange(8000) < 4000).float()[None]
    x = torch.randn(1, 8000, 2) + y[..., None] * torch.tensor([1.0, -0.5])
    weight, bias = fit_logistic(x, y, decay=0.0)
    assert weight[0].tolist() == pytest.approx([1.0, -0.5], abs=0.1)  # mean_1 - mean_0
    assert bias.item() == pytest.approx(-1.25 / 2, abs=0.1)


def test_posterior_of_another_network_is_refused(toy):
    d, unet, posterior = toy
    with pytest.raises(UserError, match="do not match"):
        paper_unlearn(toy, UNet(model_channels=32, channel_mult=(1,), num_heads=1),
                      toy_images(8, 1), gamma=0.5, lr=0.1, steps=1)


def test_guessed_sigma_is_a_share_of_each_tensors_scale():
    tensors = {"a": torch.tensor([3.0, -4.0]), "b": torch.full((2, 3), 0.1)}
    posterior = guessed_posterior(tensors.items(), share=0.5)
    assert posterior.n == 1 and all(torch.equal(posterior.mean[k], v) for k, v in tensors.items())
    assert posterior.std["a"].item() == pytest.approx(0.5 * 12.5**0.5)
    assert posterior.std["b"].item() == pytest.approx(0.05)


def test_accumulation_is_the_mean_over_batches():
    """Two batches of a known gradient per step, against one of their mean."""
    net = torch.nn.Linear(2, 1)
    posterior = GaussianPosterior({k: p.detach().clone() for k, p in net.named_parameters()},
                                  {k: torch.ones_like(p) for k, p in net.named_parameters()}, 2)

    def objective_of(slopes):
        it = iter(slopes * 3)

        def objective(unet):
            slope = next(it)
            return slope * sum(p.sum() for p in unet.parameters()), {"A": slope}
        objective.scale = 1.0
        return objective

    ends = []
    for slopes, accumulate in (([1.0, 5.0], 2), ([3.0], 1)):
        record = unlearn(net, posterior, objective_of(slopes), 0.1, 3, accumulate=accumulate)
        ends.append([p.detach().clone() for p in net.parameters()])
        assert record["last"]["A"] == 3
    assert all(torch.allclose(a, b) for a, b in zip(*ends))


def test_weights_that_run_away_in_the_last_step_are_not_called_done(toy):
    d, unet, posterior = toy
    with pytest.raises(UserError, match="weights became infinite in the last step; nothing"):
        paper_unlearn(toy, copy.deepcopy(unet), toy_images(8, 1), 0.5, lr=1e38, steps=1)


def settings(*args):
    args = vdu.parser().parse_args(["--forget-class", "1", *args])
    ddpm.fill_in(args, vdu.FUNCTION_SPACE if args.function_space else vdu.PAPER)
    return args


def test_the_command_line_reaches_the_objective(toy, tmp_path):
    d, unet, posterior = toy
    checkpoint = SimpleNamespace(unet=unet, diffusion=d)
    for option in ([], ["--function-space"]):
        args = settings(*option, "--t-range", "0.25", "0.5", "--batch-size", "7", "--anchors", "40",
                        "--gamma", "0.3", "--kappa", "6", "--until", "0.5")
        same, objective, check = vdu.build_objective(args, checkpoint, posterior,
                                                     toy_images(40, 1), 0.4)
        assert same is posterior
        assert (objective.low, objective.high, objective.batch_size) == (25, 50, 7)
        assert check.until == 0.5
        t = objective.draw()[1]
        assert len(t) == 7 and t.min() >= 25 and t.max() < 50
        if option:
            assert objective.kappa == 6 and objective.rho == 0.4
        else:
            assert objective.gamma == 0.3


def test_the_files_name_stays_short(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = {"classes": [f"a rather long name of class number {i}" for i in range(27)],
            "source": "folder"}
    checkpoint = SimpleNamespace(data=data)
    args = settings("--checkpoint", "x.pt")
    assert vdu.choose_output(args, checkpoint, [*range(27)]) == "x-forget-27-classes.pt"
    data["classes"][0] = "../../etc/x"
    assert "/" not in vdu.choose_output(args, checkpoint, [0])
