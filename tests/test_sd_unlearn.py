"""Stable Diffusion: its parts against the original ones, the loss on a toy that takes
prompts, the commands on tiny networks of random weights."""

import gzip
import json
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.utils import save_image

import sd_unlearn
from ddpm import Diffusion, UserError, per_image, run_command_line, to_uint8
from sd_unlearn import (KINDS, NEUTRAL_PROMPTS, PREFIX, SIZES, TEMPLATES, PromptedObjective,
                        Tokenizer, guided, sample_latents)
from vdu import guessed_posterior, unlearn

DATA = Path(__file__).parent / "data"
REFERENCE = torch.load(DATA / "sd_reference.pt")
SMALL = {
    "unet": dict(
        in_channels=4,
        model_channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(1, 2),
        num_heads=4,
        context_dim=32),
    "autoencoder": dict(
        ch=32,
        ch_mult=(1, 2),
        num_res_blocks=1),
    "text_encoder": dict(
        vocab_size=515,
        width=32,
        layers=2,
        num_heads=4,
        mlp_width=128)}


def build(sizes):
    return {name: kind(**sizes[name]) for name, kind in KINDS.items()}


def state_of(networks):
    """All their tensors, by the names in a published file."""
    state = {}
    for name, network in networks.items():
        state.update(network.state_dict(prefix=PREFIX[name]))
    return state


# --------------------------------------------------------------------------------------
# The parts

UNET = REFERENCE["unet"]
VAE = REFERENCE["vae"]
CLIP = REFERENCE["clip"]


def original(name, reference, **sizes):
    """One of the three networks, with the reference's weights."""
    network = KINDS[name](**{**SMALL[name], **sizes})
    network.load_state_dict(reference["state_dict"])
    return network


@pytest.fixture
def autoencoder():
    return original("autoencoder", VAE)


def is_close(ours, theirs):
    return (ours - theirs).abs().max() < 1e-4


def test_the_unet_gives_the_originals_output():
    unet = original("unet", UNET, context_dim=24)

    assert is_close(unet(UNET["x"], UNET["timesteps"], UNET["context"]), UNET["output"])


def test_the_text_encoder_gives_the_originals_output():
    text_encoder = original("text_encoder", CLIP, vocab_size=1000)

    assert is_close(text_encoder(CLIP["input_ids"]), CLIP["last_hidden_state"])


def test_the_autoencoder_gives_the_originals_outputs(autoencoder):
    assert is_close(autoencoder.encode(VAE["image"]), VAE["moments"])
    assert is_close(autoencoder.decode(VAE["z"]), VAE["decoded"])


def test_latents_are_drawn_and_scaled(autoencoder, monkeypatch):
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    mean, logvar = VAE["moments"].chunk(2, dim=1)

    latents = autoencoder.to_latents(VAE["image"])

    assert is_close(latents, 0.18215 * (mean + (logvar / 2).exp()))


def test_images_are_decoded_from_scaled_latents(autoencoder):
    images = autoencoder.to_images(0.18215 * VAE["z"])

    decoded = to_uint8(VAE["decoded"])
    assert (images.int() - decoded).abs().max() <= 1


def test_the_published_tensors_are_ours_by_name_and_shape():
    lines = gzip.open(DATA / "sd_v1_state_dict.tsv.gz", "rt").read().splitlines()
    with torch.device("meta"):  # without memory
        published = build(SIZES)
    ours = []
    for name, v in state_of(published).items():
        shape = ",".join(map(str, v.shape))
        ours.append(f"{name}\t{shape}")

    assert set(ours) == {line for line in lines if line[0] != "#"}


def test_the_published_numbers_of_heads():
    """Which no shape tells."""
    assert SIZES["unet"]["num_heads"] == 8
    assert SIZES["text_encoder"]["num_heads"] == 12


def test_images_of_any_size_have_whole_latents(autoencoder):
    latents = autoencoder.to_latents(torch.zeros(1, 3, 17, 17))

    assert latents.shape == (1, 4, 8, 8)


@pytest.mark.parametrize("scale, factor", [(0, 0.5), (1, 2.0), (7.5, 11.75)])
def test_guidance_leads_from_the_negative_prompt_past_the_other(scale, factor):
    def unet(x, t, context):
        return context * x

    contexts = torch.tensor([0.5, 2.0]).view(2, 1, 1)
    eps_theta = guided(unet, contexts, scale)

    eps = eps_theta(torch.ones(3, 1, 1), torch.zeros(3))

    assert (eps == factor).all()


# --------------------------------------------------------------------------------------
# The tokenizer

@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "merges.txt"
    packed = (DATA / "clip_merges.txt.gz").read_bytes()
    path.write_bytes(gzip.decompress(packed))
    return Tokenizer(path)


VECTORS = json.loads((DATA / "clip_bpe_vectors.json").read_text())


@pytest.mark.parametrize("entry", VECTORS)
def test_the_tokenizer_gives_clips_ids(tokenizer, entry):
    ids = tokenizer([entry["text"]])

    padding = [49407] * (77 - len(entry["ids"]))
    assert ids.tolist() == [entry["ids"] + padding]


def test_what_is_cut_off_a_prompt_is_said(tokenizer, capsys):
    ids = tokenizer(["ball " * 80])

    assert ids[0, 76] == 49407
    assert "not the last 5: ball ball" in capsys.readouterr().out


# --------------------------------------------------------------------------------------
# The loss: a toy that draws points on a line, N(mean of the prompt, 0.3^2)

D = Diffusion("cosine", 100)
PROMPTS = torch.eye(3)[:, None]  # left, right, none: (3, 1, 3)


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.means = nn.Parameter(torch.tensor([-0.7, 0.7, 0.1]))

    def forward(self, x, t, context):
        abar = per_image(D.alpha_bar, t, x)
        noise = x - abar.sqrt() * (context @ self.means)
        return (1 - abar).sqrt() * noise / (0.09 * abar + 1 - abar)


def test_left_is_forgotten_and_right_is_kept():
    """Left goes K = 3 times as far past the mean of no prompt as it was before it."""
    net = Toy()
    posterior = guessed_posterior(net.named_parameters())
    points = net.means.detach().view(3, 1, 1) + 0.3 * torch.randn(3, 500, 1)
    objective = PromptedObjective(
        D, posterior, points[0], 0.0, 32, (0.2, 1.0), PROMPTS[:1],
        frozen=Toy(),
        kept=points[1:].flatten(0, 1),
        kept_context=PROMPTS[1:].repeat_interleave(500, 0),
        empty=PROMPTS[2:],
        rho=0.5)

    assert objective.weight_of_forget == 0.5  # rho, not rho/K
    unlearn(net, posterior, objective, lr=10.0, steps=150, adam=True)

    assert net.means.tolist() == pytest.approx([0.1 + 3 * 0.8, 0.7, 0.1], abs=0.02)


# --------------------------------------------------------------------------------------
# The file and the commands

@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Go to a folder of a checkpoint, tiny.ckpt, merges, and images in circles/.
    Returns the weights, which are random."""
    monkeypatch.setattr(sd_unlearn, "SIZES", SMALL)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    networks = build(SMALL)
    for p in networks["unet"].parameters():  # some are 0 at first
        p.data += 0.05 * torch.randn_like(p)
    state = state_of(networks)
    state[PREFIX["text_encoder"] + "text_model.embeddings.position_ids"] = torch.arange(77)
    torch.save(state, "tiny.ckpt")
    Path("merges.txt").write_text("#version: 0.2\nc i\n")
    Path("circles").mkdir()
    for i in range(6):
        save_image(torch.rand(3, 20, 20), f"circles/{i}.png")
    return state


def load(state):
    torch.save(state, "tiny.ckpt")
    return sd_unlearn.load("tiny.ckpt", "merges.txt")


def test_a_weight_that_is_not_finite_is_named(tiny):
    tiny[PREFIX["unet"] + "out.2.bias"][0] = torch.nan

    with pytest.raises(UserError, match="broken: out.2.bias"):
        load(tiny)


@pytest.mark.parametrize("others", [{}, {PREFIX["unet"] + "out.2.weight": torch.zeros(1)}])
def test_a_weight_that_is_missing_or_of_another_shape_is_named(tiny, others):
    name = PREFIX["unet"] + "out.2.weight"
    del tiny[name]

    with pytest.raises(UserError, match=f"tiny.ckpt is not .* {name}"):
        load({**tiny, **others})


STARTS = {
    "sample": "sample --prompt x --sampling-steps 2 --n 1 --output o.png",
    "unlearn": "unlearn --concept circle --images circles --steps 1 --accumulate 1 "
               "--anchors 12 --output o.ckpt"}
SHARED = "--checkpoint tiny.ckpt --merges merges.txt --size 16 --device cpu"


@pytest.fixture
def command(tiny, monkeypatch):
    """The command line: (name of a command, more flags)."""
    def run(name, flags):
        line = f"{STARTS[name]} {SHARED} {flags}"
        monkeypatch.setattr(sys, "argv", ["sd_unlearn.py", *shlex.split(line)])
        run_command_line(sd_unlearn.main, sd_unlearn.parser())

    return run


def sampled(command, flags):
    """The pixels that `sample` writes: (H, W, 3)."""
    command("sample", f"--overwrite {flags}")
    return np.asarray(Image.open("o.png"), int)


def test_samples_are_a_row_per_prompt_and_a_block_per_checkpoint(command, tiny):
    torch.save(tiny, "same.pt")

    pixels = sampled(command, "--checkpoint tiny.ckpt same.pt --n 3 --prompt a b a")

    block, other_block = np.split(pixels, 2, axis=1)
    assert block.shape == (2 + 3 * 18, 2 + 3 * 18, 3)
    a, b, again = np.split(block[2:, 2:], 3)
    first, second, _ = np.split(a, 3, axis=1)
    assert (block == other_block).all()
    assert (a == again).all()
    assert (a != b).any()
    assert (first != second).any()


@pytest.mark.parametrize("flags", ["--seed 1", "--guidance 0", "--sampling-steps 3"])
def test_each_flag_of_sampling_changes_the_image(command, flags):
    assert (sampled(command, flags) != sampled(command, "")).any()


def test_drawn_latents_are_whole_and_not_clipped(tiny):
    latents = sample_latents(load(tiny), "x", 2, 17, seed=0, batch_size=2)

    assert latents.shape == (2, 4, 8, 8)
    assert latents.abs().max() > 1


@pytest.fixture
def drawn(monkeypatch):
    """Quick: noise in place of samples. The list of (prompt, n)."""
    calls = []

    def noise(model, prompt, n, *args):
        calls.append((prompt, n))
        return torch.randn(n, 4, 8, 8)

    monkeypatch.setattr(sd_unlearn, "sample_latents", noise)
    return calls


def unlearned(command, flags):
    """The file that `unlearn` writes."""
    command("unlearn", f"--overwrite {flags}")
    return torch.load("o.ckpt")


@pytest.mark.parametrize("method, moves, terms", [
    ("--paper", ".attn2.", {"A", "B"}),
    ("--parameters all", PREFIX["unet"], {"A", "F", "B"})])
def test_each_loss_moves_what_is_asked_for_and_nothing_else(
        command, tiny, drawn, method, moves, terms):
    """In float32: the file is in half precision, which would round moves away."""
    state = {k: v.half() for k, v in tiny.items()}
    torch.save({"state_dict": state}, "tiny.ckpt")

    after = unlearned(command, method)

    assert after["vdu"]["after"].keys() == terms
    for k, v in after["state_dict"].items():
        if moves in k:
            assert (v != v.half()).any()
        else:
            assert v.dtype == torch.float16
            assert torch.equal(v, state[k])


def test_the_file_holds_no_copy_of_what_was_to_go(command, tiny, drawn):
    contents = {
        "state_dict": {**tiny, "model_ema.average": torch.ones(1)},
        "optimizer_states": [tiny]}
    torch.save(contents, "tiny.ckpt")

    after = unlearned(command, "")

    assert after.keys() == {"state_dict", "vdu"}
    assert after["state_dict"].keys() == tiny.keys()
    assert "circle" in json.dumps(after["vdu"])  # which takes no tensor


def test_anchors_are_of_neighbours_and_of_prompts_without_the_concept(command, drawn):
    unlearned(command, "--concept street --keep square --anchors 30")

    neutral = [prompt for prompt in NEUTRAL_PROMPTS if prompt != "a street"]
    squares = [template.format("square") for template in TEMPLATES]
    kept = [(prompt, 2) for prompt in neutral + squares]
    judged = ("a photo of a street", 16)
    assert drawn == [*kept, judged, judged]


@pytest.mark.parametrize("flags", ["--accumulate 2", "--share 0.9", "--gamma 1"])
def test_each_flag_of_unlearning_changes_the_weights(command, drawn, flags):
    weights = unlearned(command, "")["state_dict"]

    others = unlearned(command, flags)["state_dict"]

    assert any((v != others[k]).any() for k, v in weights.items())


def test_what_is_drawn_first_is_drawn_by_the_mean_of_several_checkpoints(tiny):
    unet = load(tiny).unet
    for i in range(3):  # tiny, and 0.01 and 0.02 away from it
        moment = {k: v + 0.01 * i for k, v in tiny.items()}
        torch.save(moment, f"{i}.pt")
    args = SimpleNamespace(parameters="all", posterior=["0.pt", "1.pt", "2.pt"])

    sd_unlearn.choose_moving(unet, args)

    for k, p in unet.named_parameters():
        assert torch.allclose(p, tiny[PREFIX["unet"] + k] + 0.01, atol=1e-5)


@pytest.mark.parametrize("name, flags, message", [
    ("unlearn", "--concept ' '", "--concept must say"),
    ("unlearn", "--concept circle --keep Circle", "--keep something else"),
    ("unlearn", "--output tiny.ckpt", "exists already: choose another"),
    ("unlearn", "--output o.safetensors", "o.safetensors has to end in .pt"),
    ("unlearn", "--posterior tiny.ckpt tiny.ckpt", "two checkpoints"),
    ("sample", "--merges circles/0.png", "0.png makes"),
    ("sample", "--checkpoint tiny.ckpt none.ckpt", "no checkpoint at none.ckpt"),
    ("sample", "--output o.jpg", "o.jpg has to end in .png")])
def test_bad_input_is_one_line_and_exit_code_2(command, tmp_path, capsys, name, flags, message):
    there = set(tmp_path.iterdir())

    with pytest.raises(SystemExit, match="^2$"):
        command(name, flags)

    *_, line = capsys.readouterr().err.splitlines()
    assert message in line
    assert set(tmp_path.iterdir()) == there
