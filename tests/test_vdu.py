"""The paper's losses, posterior and loop: against torch.distributions and toys of known
minimum; and what goes beyond the paper."""

import copy
import itertools
import math
import re
from types import SimpleNamespace
from unittest.mock import Mock

import torch
from pytest import approx, fixture, mark, raises
from torch import allclose, equal, manual_seed, ones, randn, tensor
from torch.distributions import Normal, kl_divergence
from torch.nn.utils import parameters_to_vector

import ddpm
import vdu
from ddpm import Diffusion, UserError, per_image
from train_ddpm import GaussianPosterior
from unet import UNet
from vdu import (FunctionSpaceObjective, Likeness, PaperObjective, features_of_clean,
                 guessed_posterior, middle_features, plasticity_loss, stability_loss, unlearn,
                 vdu_loss)


@fixture(autouse=True)
def seed():
    manual_seed(0)


def same(theta, others):
    """Whether two sets of named tensors are equal, bit for bit."""
    return all(equal(p, others[k]) for k, p in theta.items())


# The posterior

def test_the_posterior_is_mean_and_standard_deviation():
    draws = 5 + 0.01 * randn(40, 3, 2)  # where naive sums of squares fail
    draws[:, 0] = 1 / 3  # what never moves
    posterior = GaussianPosterior()

    for w in draws.double():
        w[0] = 1 / 3  # which float32 rounds up
        posterior.update({"w": w})

    mean = posterior.mean["w"]
    std = posterior.std["w"]
    assert posterior.n == 40
    assert allclose(mean, draws.mean(0), rtol=1e-6)
    assert allclose(std, draws.std(0), rtol=1e-3)
    assert std.min() > 0


def test_a_guessed_sigma_is_a_share_of_the_root_mean_square_and_not_0():
    weights = {"a": tensor([3.0, -4.0]), "zero": torch.zeros(2)}

    guess = guessed_posterior(weights.items(), 0.5)

    assert guess.n == 1
    assert same(guess.mean, weights)
    assert guess.std["a"].item() == approx(0.5 * 12.5**0.5)
    assert guess.std["zero"] > 0


ANYONES = torch.nn.BatchNorm1d(2)  # it has buffers, too
THETA = dict(ANYONES.named_parameters())


def moment(seed):
    """The network's file at some moment of its training."""
    manual_seed(seed)
    return {k: randn(v.shape) for k, v in ANYONES.state_dict().items()}


@fixture
def posterior_of(tmp_path):
    """A function of names of files."""
    files = {
        "a": moment(0),
        "b": moment(1),
        "c": {"state_dict": moment(2), "epoch": 3},
        "less": {"weight": ones(2)},
        "wider": {**moment(1), "weight": ones(3)},
        "nan": {**moment(1), "weight": math.nan * ones(2)}}
    for name, contents in files.items():
        torch.save(contents, tmp_path / name)

    def of(names, net=ANYONES):
        paths = [str(tmp_path / name) for name in names]
        return GaussianPosterior.from_checkpoints(paths, net)

    return of


def net_of(seed):
    """The network, as it was at that moment."""
    net = torch.nn.BatchNorm1d(2)
    net.load_state_dict(moment(seed))
    return net


def test_files_of_one_training_have_a_posterior(posterior_of):
    posterior = posterior_of("abc", net_of(1))

    assert posterior.n == 3
    assert posterior.mean.keys() == THETA.keys()
    for k, mean in posterior.mean.items():
        moments = torch.stack([moment(seed)[k] for seed in range(3)])
        assert allclose(mean, moments.mean(0))
        assert allclose(posterior.std[k], moments.std(0))


def test_the_posterior_is_where_the_parameters_are(posterior_of):
    elsewhere = torch.nn.LayerNorm(2, device="meta")  # stands for an accelerator

    assert posterior_of("ab", elsewhere).std["bias"].is_meta
    assert posterior_of("ab", net_of(0)).to("meta").std["bias"].is_meta


def test_a_weight_with_two_names_moves_under_both(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    net[1].weight = net[0].weight
    for name in "ab":
        net[0].weight.data += 1
        torch.save(net.state_dict(), tmp_path / name)
    net[0].weight.data += 1

    posterior = GaussianPosterior.from_checkpoints([tmp_path / "a", tmp_path / "b"], net)

    assert list(posterior.mean) == ["0.weight", "0.bias", "1.bias"]


@mark.parametrize("name", ["running_mean", "bias"])
def test_what_does_not_move_has_to_be_that_of_one_file(posterior_of, name):
    net = net_of(0)
    net.bias.requires_grad_(False)
    net.state_dict()[name].add_(1)

    with raises(UserError, match=f"{name}.*load one of the checkpoints"):
        posterior_of("ab", net)


def test_a_frozen_network_has_no_posterior(posterior_of):
    with raises(UserError, match="require a gradient"):
        posterior_of("ab", net_of(0).requires_grad_(False))


def test_frozen_layers_have_no_posterior(posterior_of):
    net = net_of(0)
    net.bias.requires_grad_(False)

    assert list(posterior_of("ab", net).mean) == ["weight"]


@mark.parametrize("names, said", [
    ("a", "two"),
    ("aba", "differ"),
    (["a", "less"], "less .*match.*bias"),
    (["a", "nan"], "nan is broken: weight"),
    (["a", "wider"], "wider .*match.*weight")])
def test_files_that_have_no_posterior_are_refused(posterior_of, names, said):
    with raises(UserError, match=said):
        posterior_of(names, net_of(0))


# The loss and the loop

@fixture
def anyone():
    """Not our network, and its posterior."""
    net = torch.nn.Linear(8, 1, dtype=torch.double)
    mean = {}
    std = {}
    for k, p in net.named_parameters():
        mean[k] = torch.randn_like(p)
        std[k] = torch.rand_like(p) + 0.2
    return net, GaussianPosterior(mean, std, 5)


def test_b_is_the_kl_of_gaussians_up_to_its_constants(anyone):
    """B = KL(q || p(theta | D)) less that at mu*, for a q of any deviation."""
    net, posterior = anyone
    theta = dict(net.named_parameters())
    parts = [theta, posterior.mean, posterior.std]
    center, mean, std = [parameters_to_vector(part.values()) for part in parts]

    B = stability_loss(theta, posterior)

    p = Normal(mean, std)
    at_theta = kl_divergence(Normal(center, 0.3), p)
    at_mean = kl_divergence(Normal(mean, 0.3), p)
    exact = (at_theta - at_mean).sum()
    assert allclose(B, exact, rtol=1e-12, atol=0)


def test_a_is_the_squared_error_times_c_t():
    d = Diffusion("cosine", 100)
    x0, eps = randn(2, 4, 1, 5, 5)
    t = 33 * torch.arange(4)
    C_t = randn(4)

    A = plasticity_loss(lambda x, t: 0.3 * x, d, x0, t, eps, C_t)

    error = eps - 0.3 * d.q_sample(x0, t, eps)
    squares = error.square().sum((1, 2, 3))
    assert allclose(A, C_t * squares, rtol=1e-5)


@mark.parametrize("gamma, loss", [(0, -3), (1, 5), (0.25, -1)])
def test_l_weighs_a_and_b_by_gamma(gamma, loss):
    assert vdu_loss(3.0, 5.0, gamma) == loss


GAMMA = 0.3
UNIT = 0.5
SLOPE = torch.linspace(-1, 2, 8, dtype=torch.double)


@fixture
def sloping(anyone):
    """L of A = SLOPE . weight, measured on two batches in turn."""
    _, posterior = anyone
    factors = itertools.cycle([1.5, 0.5])  # of mean 1

    def objective(net):
        A = net.weight @ SLOPE
        if torch.is_grad_enabled():  # before and after it is measured without
            A = A * next(factors)
        B = stability_loss(dict(net.named_parameters()), posterior)
        return vdu_loss(A, UNIT * B, GAMMA), {"A": A.item()}

    objective.unit = UNIT
    return objective


@mark.parametrize("lr, steps, factor", [
    (0.01, 1, 0.01 * (1 - GAMMA) / UNIT),  # the chain rule, and of batches the mean
    (0.1, 400, (1 - GAMMA) / GAMMA / UNIT)])
def test_the_first_step_and_the_minimum_are_in_closed_form(anyone, sloping, lr, steps, factor):
    net, posterior = anyone

    unlearn(net, posterior, sloping, lr, steps, accumulate=2)

    moved = net.weight - posterior.mean["weight"]
    assert allclose(moved, factor * posterior.std["weight"] ** 2 * SLOPE)


def test_the_record_says_how_far_theta_went_and_what_became_of_a(anyone, sloping):
    net, posterior = anyone
    mean = posterior.mean["weight"]

    record = unlearn(net, posterior, sloping, lr=0.1, steps=3)

    z = (net.weight - mean) / posterior.std["weight"]
    moved = z.norm() / 3  # of 9 parameters, of which the bias stayed
    before = mean @ SLOPE
    after = net.weight @ SLOPE
    assert record["moved_rms_sigma"] == approx(moved.item())
    assert record["before"]["A"] == approx(before.item())
    assert record["after"]["A"] == approx(after.item())


def upwards(net):
    """A loss of the weight alone, and a random number."""
    return -net.weight.sum(), {"number": torch.rand(()).item()}


def test_gradients_of_what_came_before_have_no_part(anyone):
    net, posterior = anyone
    unlearn(net, posterior, upwards, lr=0.1, steps=2)
    clean = net.weight.tolist()

    net(ones(1, 8).double()).sum().backward()
    unlearn(net, posterior, upwards, lr=0.1, steps=2)

    assert net.weight.tolist() == clean


@mark.parametrize("steps", [0, 3])
def test_before_and_after_are_of_one_batch(anyone, steps):
    record = unlearn(*anyone, upwards, lr=0.1, steps=steps)

    assert record["before"] == record["after"]


def test_what_the_objective_does_not_use_stays_at_its_mean(anyone):
    net, posterior = anyone

    unlearn(net, posterior, upwards, lr=0.1, steps=3)

    assert equal(net.bias, posterior.mean["bias"])


def test_what_needs_no_gradient_stays_as_it_is(anyone):
    net, posterior = anyone
    net.bias.requires_grad_(False).fill_(7)
    posterior.mean.pop("bias")

    unlearn(net, posterior, upwards, lr=0.1, steps=3)

    assert net.bias.item() == 7


@mark.parametrize("adam, steps, power", [
    (False, 1 + 1.9 + 2.71, 2),  # its momentum is 0.9
    (True, 1 + 4 / 9 + 1 / 9, 1)])
def test_sgds_steps_grow_by_sigma_squared_and_adams_fall(anyone, adam, steps, power):
    net, posterior = anyone

    unlearn(net, posterior, upwards, lr=0.1, steps=3, adam=adam)

    moved = net.weight - posterior.mean["weight"]
    expected = 0.1 * steps * posterior.std["weight"] ** power
    assert allclose(moved, expected)


@mark.parametrize("plus, lr, steps", [(math.inf, 1.0, 5), (0.0, 1e308, 1)])
def test_an_infinite_loss_or_step_leaves_the_network_at_the_mean(anyone, plus, lr, steps):
    net, posterior = anyone

    def objective(net):
        return net.weight.sum() + plus, {}

    with raises(UserError, match="infinite at step 1;"):
        unlearn(net, posterior, objective, lr, steps)

    assert same(posterior.mean, net.state_dict())


def test_a_posterior_of_other_parameters_is_refused(anyone):
    net, posterior = anyone
    posterior.mean.pop("bias")

    with raises(UserError, match="posterior .*match.*bias"):
        unlearn(net, posterior, upwards, 0.1, 1)


# A toy: 4x4 images of two classes, bright left and bright right.
def is_left(x):
    return (x[..., :2] - x[..., 2:]).mean((1, 2, 3)) > 0


def toy_images(n, side=1):
    """Bright left, or with side=-1 bright right."""
    row = side * tensor([0.7, 0.7, -0.7, -0.7])
    return row + 0.1 * randn(n, 1, 4, 4)


@fixture(scope="module")
def trained():
    """A small DDPM of both classes and its posterior, trained here in a few seconds."""
    manual_seed(0)
    d = Diffusion("cosine", 100)
    net = UNet(1, 16, (1,), groups=4, alpha_bar=d.alpha_bar)
    images = torch.cat([toy_images(500), toy_images(500, -1)])
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    posterior = GaussianPosterior()
    for step in range(200):
        batch = images[torch.randint(1000, (64,))]
        ddpm.training_step(net, d, optimizer, batch)
        if step >= 140:
            posterior.update(net.named_parameters())
    return net, d, posterior


@fixture
def toy(trained):
    return copy.deepcopy(trained)


def test_the_papers_objective_is_the_sum_of_its_terms(toy):
    """Two sigma* away from mu*, where B is (2 sigma*)^2 / (2 sigma*^2) a parameter."""
    net, d, posterior = toy
    theta = dict(net.named_parameters())
    posterior.set_weights(dict.fromkeys(theta, tensor(2.0)), theta)
    objective = PaperObjective(d, posterior, toy_images(9), GAMMA)

    L, numbers = objective(net)

    A = numbers["A"]
    B = numbers["B"]
    assert B == approx(2, rel=1e-2)
    assert L.item() == approx(16 * vdu_loss(A, B, GAMMA), rel=1e-4)


def test_the_bounds_weights_are_in_the_loss_and_not_in_what_is_shown(toy):
    net, d, posterior = toy
    objective = PaperObjective(
        d, posterior, toy_images(9), 0.0, t_range=(0.5, 0.51), bound_weights=True)

    L, numbers = objective(net)

    C = d.bound_weight(50).item()
    assert L.item() == approx(-C * 16 * numbers["A"])


def test_t_is_drawn_from_its_range_evenly(toy):
    _, d, posterior = toy
    objective = PaperObjective(d, posterior, toy_images(9), 0.0, 25, (0.25, 0.5))

    _, t, _, _ = objective.draw()

    assert sorted(t.tolist()) == [*range(25, 50)]


def test_an_empty_range_of_t_is_refused(toy):
    _, d, posterior = toy

    with raises(UserError, match="t_range"):
        PaperObjective(d, posterior, toy_images(9), 0.0, t_range=(0.7, 0.7))


@mark.parametrize("paper", [False, True])
def test_gamma_1_goes_to_the_mean_and_stays_there(toy, paper):
    net, _, posterior = toy

    record, before, after = vdu.forget(
        *toy,
        toy_images(9),
        rho=0.5,
        paper=paper,
        gamma=1.0,
        steps=3,
        batch_size=16,
        anchors=20)

    assert same(posterior.mean, net.state_dict())
    assert equal(before, after)
    assert record["before"] == record["after"]


def test_a_setting_that_is_none_is_refused(toy):
    with raises(TypeError, match="batch_size.*not .*'batch'"):
        vdu.forget(*toy, toy_images(9), rho=0.5, batch=16)


@mark.parametrize("rho", [0, 1])
def test_none_and_all_of_the_training_set_are_refused(toy, rho):
    with raises(UserError, match=f"{100 * rho}% of what"):
        vdu.forget(*toy, toy_images(9), rho)


@fixture(scope="module")
def forgotten(trained):
    """What forget returns of the toy that forgets left."""
    return vdu.forget(
        *copy.deepcopy(trained),
        toy_images(500),
        rho=0.5,
        share=0.7,
        steps=100,
        batch_size=32,
        anchors=400)


def test_one_of_two_classes_is_forgotten(forgotten):
    _, before, after = forgotten
    first = is_left(before).float().mean()
    last = is_left(after).float().mean()

    assert 0.3 < first < 0.7
    assert last < 0.1 * first


def test_what_is_drawn_instead_is_as_the_others_are(forgotten):
    _, _, after = forgotten
    right = after[~is_left(after)].mean(0)
    known = toy_images(500, -1).mean(0)

    assert (right - known).abs().mean() < 0.05


def test_the_record_says_how_much_of_it_is_still_drawn(forgotten):
    record, *samples = forgotten
    left = [is_left(x).float().mean().item() for x in samples]

    assert record["like_D_f"] == approx(left, abs=0.1)


# Two Gaussians of one pixel, x_0 ~ N(+-0.5, 0.3^2), of which all is known.
RHO = 0.2
TWO = Diffusion("linear", 100)


def known(mean, xt, t):
    """The density of x_t, and E[eps | x_t], for x_0 ~ N(mean, 0.3^2)."""
    abar = per_image(TWO.alpha_bar, t, xt)
    variance = abar * 0.09 + 1 - abar
    x = Normal(abar.sqrt() * mean, variance.sqrt())
    eps = (1 - abar).sqrt() * (xt - x.mean) / variance
    return x.log_prob(xt).exp(), eps


def both(xt, t):
    """w(x_t), by Bayes' rule; and E[eps | x_t] of D_f, of D_r, and of both together."""
    gone, eps_gone = known(0.5, xt, t)
    rest, eps_rest = known(-0.5, xt, t)
    w = RHO * gone / (RHO * gone + (1 - RHO) * rest)
    return w, eps_gone, eps_rest, w * eps_gone + (1 - w) * eps_rest


def star(xt, t):
    """eps_theta*."""
    return both(xt, t)[3]


def of_rest(xt, t):
    return both(xt, t)[2]


def of_k_5(xt, t):
    """The closed form of (b) in vdu.py, for K = 5."""
    w, eps_gone, _, eps_star = both(xt, t)
    return eps_star + w / (1 - w + w / 5) * (eps_star - eps_gone)


def two_gaussians(batch_size):
    """Their objective, with a B of 3."""
    gone, rest = 0.3 * randn(2, 200_000, 1, 1, 1)
    posterior = SimpleNamespace(mean={"w": ones(8)})
    objective = FunctionSpaceObjective(
        TWO, posterior, gone + 0.5, 0.0, batch_size, (0.3, 0.7),
        frozen=star, kept=rest - 0.5, rho=RHO)
    objective.stability = Mock(return_value=tensor(3.0))
    return objective


@mark.parametrize("K, target", [(1e4, of_rest), (5.0, of_k_5)])
def test_the_loss_is_least_at_the_retrained_model(monkeypatch, K, target):
    """Along eps_theta* + a (target - eps_theta*) it is a parabola, least at a = 1."""
    monkeypatch.setattr(FunctionSpaceObjective, "K", K)
    objective = two_gaussians(200_000)

    def slope(at):
        a = tensor(at, requires_grad=True)

        def net(xt, t):
            pushed = ((t >= 30) & (t < 70)).view(-1, 1, 1, 1)  # D_f has no other t
            step = target(xt, t) - star(xt, t)
            return star(xt, t) + a * step * pushed

        manual_seed(1)
        objective(net)[0].backward()
        return a.grad.item()

    assert abs(slope(1.0)) < 0.01 * abs(slope(0.0))


def test_the_push_at_the_start_is_that_of_minus_a():
    """With the factor for t: of what is kept, half has its t elsewhere."""
    objective = two_gaussians(64)
    shift = tensor(0.0, requires_grad=True)

    def net(xt, t):
        return star(xt, t) + shift

    manual_seed(3)
    L, numbers = objective(net)

    manual_seed(3)
    x0, t, eps, _ = objective.draw()
    A = plasticity_loss(net, TWO, x0, t, eps)
    weighted = (A / TWO.alpha_bar[t]).mean()
    of_L, = torch.autograd.grad(L, shift)
    of_A, = torch.autograd.grad(weighted, shift)
    ratio = 0.5 + 0.5 * 0.4
    assert of_L.item() == approx(-RHO * ratio * of_A.item())
    assert numbers["A"] == approx(A.mean().item())


def test_what_is_kept_and_b_have_their_weights():
    objective = two_gaussians(64)
    objective.weight_of_forget = 0.0
    objective.gamma = 0.3

    def net(xt, t):  # wrong by 0.5 in the velocity
        velocity = TWO.alpha_bar.clamp(min=0.003).sqrt()
        return star(xt, t) + 0.5 * per_image(velocity, t, xt)

    L, numbers = objective(net)

    error = (1 - RHO) * 0.25
    B = 3 / 8
    assert L.item() == approx(0.7 * error + 0.3 * B, rel=1e-4)
    assert numbers["B"] == B
    assert 0 < numbers["F"] < 0.25


def test_likeness_is_the_share_of_d_f_and_rho_on_average():
    """Of D_f ~ N(c, I) among own samples whose rest is N(0, I)."""
    c = tensor([1.0, -0.5])
    images = randn(2000, 2) + c
    own = randn(4000, 2)
    own[:800] += c

    likeness = Likeness(lambda x: x, images, own, RHO)

    x = 2 * randn(2000, 2)
    w = (x @ c - c @ c / 2 + math.log(RHO / (1 - RHO))).sigmoid()
    assert (likeness(x) - w).abs().mean() < 0.03
    assert likeness.of_own.mean().item() == approx(RHO, rel=1e-3)


def test_features_have_the_same_noise_each_time(toy):
    unet, d, _ = toy
    features = features_of_clean(middle_features(unet, unet), d)
    x = toy_images(9)

    assert equal(features(x), features(x))


@mark.parametrize("paper", [False, True])
def test_bfloat16_computes_about_what_float32_does(toy, monkeypatch, paper):
    net, _, posterior = toy
    images = toy_images(50)

    def results():
        _, samples, _ = vdu.forget(
            *toy,
            images,
            rho=0.5,
            paper=paper,
            adam=False,
            lr=0.1,
            steps=1,
            batch_size=32,
            anchors=20)
        moved = [p - posterior.mean[k] for k, p in net.named_parameters()]
        return samples, parameters_to_vector(moved)

    exact = results()
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    for one, other in zip(exact, results()):
        error = (one - other).norm() / one.norm()
        assert 0 < error < 0.05


# The command line

@fixture
def reach(tmp_path, monkeypatch):
    """A function: flags of vdu.py -> the arguments with which its loop is called."""
    monkeypatch.chdir(tmp_path)
    samples = randn(10, 1, 28, 28)
    monkeypatch.setattr(Diffusion, "sample", Mock(return_value=samples))
    seen = {}

    def loop(net, posterior, objective, lr, steps, adam, accumulate, seed):
        seen.update(locals())
        raise KeyboardInterrupt

    monkeypatch.setattr(vdu, "unlearn", loop)

    def reach(flags):
        line = f"--forget-class 1 --forget-samples 40 --anchors 10 --device cpu {flags}"
        args = vdu.parser().parse_args(line.split())
        with raises(KeyboardInterrupt):
            vdu.main(args)
        return SimpleNamespace(**seen)

    return reach


def test_what_is_typed_reaches_the_loop(reach):
    seen = reach("--t-range 0.25 0.5 --batch-size 7 --gamma 0.3 --lr 2 --steps 9 --seed 5")

    objective = seen.objective
    assert objective.images.shape == (40, 1, 28, 28)
    assert (objective.low, objective.high) == (250, 500)
    assert objective.batch_size == 7
    assert objective.gamma == 0.3
    assert (seen.lr, seen.steps, seen.seed) == (2, 9, 5)


@mark.parametrize("flags, kind, defaults, bound_weights", [
    ("", FunctionSpaceObjective, vdu.OURS, False),
    ("--paper", PaperObjective, vdu.PAPER, False),
    ("--paper --bound-weights", PaperObjective, vdu.PAPER, True)])
def test_each_loss_has_its_own_defaults(reach, flags, kind, defaults, bound_weights):
    seen = reach(flags)

    assert type(seen.objective) is kind
    assert seen.objective.bound_weights == bound_weights
    assert seen.objective.gamma == defaults["gamma"]
    for name in ("lr", "steps", "adam", "accumulate"):
        assert getattr(seen, name) == defaults[name]


def test_share_weighs_the_push(reach):
    assert reach("--share 0.4").objective.rho == 0.4


def test_the_files_posterior_is_the_default(reach):
    shipped = ddpm.load_checkpoint(vdu.SHIPPED)
    posterior = GaussianPosterior(**shipped.posterior)

    assert same(reach("").posterior.std, posterior.std)


@mark.parametrize("path, source, classes, name", [
    ("d/x.pt", "folder", ["a cat", "../../x"], r"d/x-forget-a cat-.._.._x\.pt"),
    ("d/x.pt", "folder", ["a" * 300], r"d/x-forget-a{60}\.pt"),
    ("d/x.bin", "published weights", ["1"], r"checkpoints/x-forget-1\.pt")])
def test_the_file_is_named_after_what_was_forgotten(
        tmp_path, monkeypatch, path, source, classes, name):
    monkeypatch.chdir(tmp_path)
    args = SimpleNamespace(output=None, overwrite=False)
    checkpoint = SimpleNamespace(data={"source": source}, raw={})

    output, picture = vdu.choose_output(args, path, checkpoint, classes)

    assert re.fullmatch(name, output)
    assert picture == output.replace(".pt", ".png")
