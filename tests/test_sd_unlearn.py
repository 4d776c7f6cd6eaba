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
                        Tokenizer, guided)
from vdu import guessed_posterior, unlearn

DATA = Path(__file__).parent / "data"
MERGES = DATA / "clip_merges.txt.gz"
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
        num_res_blocks=1,
        z_channels=4),
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
    return network.requires_grad_(False)


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


@pytest.fixture
def published():
    """The three networks in full size, without memory."""
    with torch.device("meta"):
        return build(SIZES)


def test_the_published_tensors_are_ours_by_name_and_shape(published):
    lines = gzip.open(DATA / "sd_v1_state_dict.tsv.gz", "rt").read().splitlines()
    ours = []
    for name, v in state_of(published).items():
        shape = ",".join(map(str, v.shape))
        ours.append(f"{name}\t{shape}")

    assert len(ours) == 1130
    assert set(ours) == {line for line in lines if line[0] != "#"}


def test_the_published_numbers_of_heads(published):
    transformer = published["unet"].input_blocks[1][1].transformer_blocks[0]
    layer = published["text_encoder"].text_model["encoder"].layers[0]

    assert transformer.attn2.num_heads == 8
    assert layer.self_attn.num_heads == 12


@pytest.mark.parametrize("scale, factor", [(0, 0.5), (1, 2.0), (7.5, 11.75)])
def test_guidance_leads_from_the_negative_prompt_past_the_other(scale, factor):
    def unet(x, t, context):
        return context * x

    prompt = torch.full((1, 1, 1), 2.0)
    eps_theta = guided(unet, prompt, prompt / 4, scale)

    eps = eps_theta(torch.ones(3, 1, 1), torch.zeros(3))

    assert (eps == factor).all()


# --------------------------------------------------------------------------------------
# The tokenizer

@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(MERGES)


VECTORS = json.loads((DATA / "clip_bpe_vectors.json").read_text())


@pytest.mark.parametrize("entry", VECTORS, ids=lambda entry: entry["text"][:20])
def test_the_tokenizer_gives_clips_ids(tokenizer, entry):
    ids = tokenizer([entry["text"]])

    padding = [49407] * (77 - len(entry["ids"]))
    assert ids.tolist() == [entry["ids"] + padding]


def test_what_is_cut_off_a_prompt_is_said_once(capsys):
    ids = Tokenizer(MERGES)(["ball " * 80, "ball " * 90])

    assert (ids[:, 76] == 49407).all()
    said = capsys.readouterr().out
    assert said.count("tokens of a prompt") == 1
    assert "not the last 5: ball ball" in said


def test_merges_may_lack_the_header_and_hold_more_than_are_used(tmp_path, tokenizer):
    _, *lines = gzip.open(MERGES, "rt", encoding="utf-8").readlines()
    path = tmp_path / "merges.txt"
    path.write_text("".join(lines) + "q q\n", encoding="utf-8")

    assert Tokenizer(path).id == tokenizer.id


@pytest.mark.parametrize("name, content", [
    ("empty", b""),
    ("header", b"#version: 0.2\n"),
    ("vocab.json", b'{"a": 0, "b": 1}'),
    ("damaged.gz", b"\x1f\x8b damaged")])
def test_other_files_are_no_merges(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)

    with pytest.raises(UserError, match=f"{name} is not a file of merges"):
        Tokenizer(tmp_path / name)


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
    torch.save({"global_step": 7, "state_dict": state}, "tiny.ckpt")
    Path("merges.txt").write_text("#version: 0.2\nc i\n")
    Path("circles").mkdir()
    for i in range(6):
        save_image(torch.rand(3, 20, 20), f"circles/{i}.png")
    return state


def load(state):
    torch.save(state, "tiny.ckpt")
    return sd_unlearn.load("tiny.ckpt", "merges.txt")


def test_tensors_that_v1_does_not_have_are_named_and_not_read(tiny, capsys):
    extra = PREFIX["autoencoder"] + "loss.logvar"

    load({**tiny, extra: torch.zeros(1)})

    said = f"not reading 1 tensors that v1 does not have: {extra}\n"
    assert capsys.readouterr().out == said


def test_a_weight_that_is_not_finite_is_named(tiny):
    tiny[PREFIX["unet"] + "out.2.bias"][0] = torch.nan

    with pytest.raises(UserError, match="broken: out.2.bias"):
        load(tiny)


def test_weights_that_are_missing_or_of_another_shape_are_named(tiny):
    out = PREFIX["unet"] + "out.2."
    tiny[out + "weight"] = torch.zeros(1)
    del tiny[out + "bias"]

    with pytest.raises(UserError, match=f" 2 tensors .*{out}weight, {out}bias"):
        load(tiny)


STARTS = {
    "sample": "sample --prompt x --sampling-steps 2 --n 1 --output o.png",
    "unlearn": "unlearn --concept circle --images circles --steps 1 --accumulate 1 "
               "--anchors 12 --output o.ckpt"}
SHARED = "--checkpoint tiny.ckpt --merges merges.txt --size 16 --device cpu"


@pytest.fixture
def command(tiny, monkeypatch, capsys):
    """The command line: (name of a command, more flags) -> (exit code, out, err)."""
    def run(name, flags):
        line = f"{STARTS[name]} {SHARED} {flags}"
        monkeypatch.setattr(sys, "argv", ["sd_unlearn.py", *shlex.split(line)])
        code = 0
        try:
            run_command_line(sd_unlearn.main)
        except SystemExit as e:
            code = e.code
        return code, *capsys.readouterr()

    return run


def sampled(command, flags):
    """The pixels that `sample` writes: (H, W, 3)."""
    code, _, err = command("sample", f"--overwrite {flags}")
    assert code == 0, err
    return np.asarray(Image.open("o.png"), int)


def test_samples_are_a_row_per_prompt_and_a_block_per_checkpoint(command, tiny):
    torch.save(tiny, "same.pt")

    pixels = sampled(command, "--checkpoint tiny.ckpt same.pt --n 3 --prompt a b a")[2:, 2:]

    assert pixels.shape == (3 * 18, 2 * 3 * 18, 3)
    block, other_block = np.split(pixels, 2, axis=1)
    a, b, again = np.split(block, 3)
    first, second, _ = np.split(a, 3, axis=1)
    assert (block == other_block).all()
    assert (a == again).all()
    assert (a != b).any()
    assert (first != second).any()


@pytest.mark.parametrize("flags", ["--seed 1", "--guidance 0", "--sampling-steps 3"])
def test_each_flag_of_sampling_changes_the_image(command, flags):
    assert (sampled(command, flags) != sampled(command, "")).any()


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
    code, _, err = command("unlearn", f"--overwrite {flags}")
    assert code == 0, err
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
        "global_step": 7,
        "state_dict": {**tiny, "model_ema.average": torch.ones(1)},
        "optimizer_states": [tiny]}
    torch.save(contents, "tiny.ckpt")

    after = unlearned(command, "")

    assert after.keys() == {"global_step", "state_dict", "vdu"}
    assert after["state_dict"].keys() == tiny.keys()
    assert after["global_step"] == 7
    assert "circle" in json.dumps(after["vdu"])  # which takes no tensor


def test_a_file_of_tensors_alone_stays_one(command, tiny, drawn):
    torch.save(tiny, "tiny.ckpt")

    assert unlearned(command, "").keys() == tiny.keys()


def test_anchors_are_of_neutral_prompts_and_of_neighbours_that_must_stay(command, drawn):
    unlearned(command, "--keep square --anchors 30")

    squares = [template.format("square") for template in TEMPLATES]
    kept = [(prompt, 2) for prompt in [*NEUTRAL_PROMPTS, *squares]]
    judged = ("a photo of a circle", 16)
    assert drawn == [*kept, judged, judged]


def test_prompts_that_name_the_concept_are_no_anchors(command, drawn):
    unlearned(command, "--anchors 30 --concept street")

    prompts = {prompt for prompt, _ in drawn}
    assert "a street" not in prompts
    assert "a room" in prompts


def test_a_step_takes_the_batches_asked_for(command, drawn):
    once = unlearned(command, "--paper --batch-size 8")["vdu"]

    twice = unlearned(command, "--paper --batch-size 8 --accumulate 2")["vdu"]

    with_gradient = 3
    more = twice["evaluations"] - once["evaluations"]
    assert more == 8 * with_gradient


@pytest.fixture
def moments(tiny):
    """Three checkpoints, 0.pt, 1.pt and 2.pt: tiny, and 0.01 and 0.02 away from it."""
    for i in range(3):
        moment = {k: v + 0.01 * i for k, v in tiny.items()}
        torch.save(moment, f"{i}.pt")


def test_what_is_drawn_first_is_drawn_by_the_mean_of_several_checkpoints(moments, tiny):
    unet = load(tiny).unet
    args = SimpleNamespace(parameters="all", posterior=["0.pt", "1.pt", "2.pt"])

    sd_unlearn.choose_moving(unet, args)

    for k, p in unet.named_parameters():
        assert torch.allclose(p, tiny[PREFIX["unet"] + k] + 0.01, atol=1e-5)


def test_at_gamma_1_what_moves_is_at_the_mean_of_several_checkpoints(
        command, tiny, moments, drawn):
    after = unlearned(command, "--posterior 0.pt 1.pt 2.pt --gamma 1")

    for k, v in after["state_dict"].items():
        shift = 0.01 if ".attn2." in k else 0
        assert torch.allclose(v, tiny[k] + shift, atol=1e-5)


@pytest.mark.parametrize("name, flags, message", [
    ("unlearn", "--concept ' '", "--concept must say"),
    ("unlearn", "--images nowhere", "nowhere"),
    ("unlearn", "--output tiny.ckpt", "exists already: choose another"),
    ("unlearn", "--output o.safetensors", "o.safetensors has to end in .pt"),
    ("unlearn", "--posterior tiny.ckpt tiny.ckpt", "two checkpoints"),
    ("unlearn", "--size 17", "--size must be a multiple of 2"),
    ("sample", "--size 17", "--size must be a multiple of 2"),
    ("sample", "--merges none.txt", "none.txt is not a file of merges"),
    ("sample", f"--merges {MERGES}", "49408 tokens, not 515"),
    ("sample", "--checkpoint tiny.ckpt none.ckpt", "no checkpoint at none.ckpt"),
    ("sample", "--output o.jpg", "o.jpg has to end in .png"),
    ("sample", "--sampling-steps 1001", "sampling steps must be from 1 to 1000")])
def test_bad_input_is_one_line_and_exit_code_2(command, tmp_path, name, flags, message):
    there = set(tmp_path.iterdir())

    code, _, err = command(name, flags)

    assert code == 2
    assert message in err.strip().splitlines()[-1]
    assert set(tmp_path.iterdir()) == there
