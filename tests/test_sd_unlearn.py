"""Stable Diffusion: the parts against the original ones, the loss on a toy that takes
prompts, the commands on tiny networks of random weights."""

import contextlib
import copy
import gzip
import io
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.utils import save_image

import sd_unlearn
from ddpm import Diffusion, UserError, read_file, run_command_line
from sd_unlearn import (KINDS, NEUTRAL_PROMPTS, PREFIX, SIZES, TEMPLATES, PromptedObjective,
                        Tokenizer, guided)
from test_files import safetensors
from test_vdu import is_left, toy_images
from unet import UNet
from vdu import PaperObjective, guessed_posterior, unlearn

DATA, UNET = Path(__file__).parent / "data", PREFIX["unet"]
MERGES, REFERENCE = DATA / "clip_merges.txt.gz", torch.load(DATA / "sd_reference.pt")
PARTS = {"unet": "unet", "autoencoder": "vae", "text_encoder": "clip"}  # there
TINY = {"unet": dict(in_channels=4, model_channels=32, channel_mult=(1, 2), num_res_blocks=1,
                     attention_resolutions=(2,), num_heads=4, context_dim=32),
        "autoencoder": dict(ch=16, ch_mult=(1, 2), num_res_blocks=1, z_channels=4),
        "text_encoder": dict(vocab_size=515, width=32, layers=2, num_heads=4, mlp_width=128)}
UNLEARN = "unlearn --concept circle --images circles --checkpoint"


def reference_state(dtype=torch.float32):
    """The weights of the reference networks, by the names of published files."""
    return {PREFIX[name] + k: v.to(dtype) for name, there in PARTS.items()
            for k, v in REFERENCE[there]["state_dict"].items()}


@pytest.fixture
def load(monkeypatch, tmp_path):
    """sd_unlearn.load for what a file holds, and networks of the reference's sizes."""
    u, a, c = (REFERENCE[name]["config"] for name in PARTS.values())
    monkeypatch.setattr(sd_unlearn, "SIZES", {
        "unet": {k: u[k] for k in SIZES["unet"]},
        "autoencoder": {k: a[k] for k in SIZES["autoencoder"]},
        "text_encoder": dict(vocab_size=c["vocab_size"], width=c["hidden_size"],
                             layers=c["num_hidden_layers"], mlp_width=4 * c["hidden_size"],
                             num_heads=c["num_attention_heads"])})
    merges = gzip.open(MERGES, "rt").readlines()[: 1 + c["vocab_size"] - 2 * 256 - 2]
    (tmp_path / "merges.txt").write_text("".join(merges))

    def load(contents, merges=tmp_path / "merges.txt"):
        torch.save(contents, tmp_path / "sd.ckpt")
        return sd_unlearn.load(tmp_path / "sd.ckpt", merges)

    return load


@pytest.mark.parametrize("wrapped, dtype", [(True, torch.float16), (False, torch.float32)])
@torch.no_grad()
def test_the_networks_give_the_originals_outputs(load, capsys, wrapped, dtype):
    positions = PREFIX["text_encoder"] + "text_model.embeddings.position_ids"
    state = {**reference_state(dtype), "betas": torch.zeros(9), positions: torch.arange(77)}
    model = load({"state_dict": state, "epoch": 1} if wrapped else state)
    u, a, c = (REFERENCE[name] for name in PARTS.values())
    for ours, theirs in ((model.unet(u["x"], u["timesteps"], u["context"]), u["output"]),
                         (model.autoencoder.encode(a["image"]), a["moments"]),
                         (model.autoencoder.decode(a["z"]), a["decoded"]),
                         (model.text_encoder(c["input_ids"]), c["last_hidden_state"])):
        assert ours.dtype == torch.float32 and (ours - theirs).abs().max() < 1e-4
    assert "not reading" not in capsys.readouterr().out


def test_the_published_tensors_heads_and_guidance():
    with torch.device("meta"):
        networks = {name: kind(**SIZES[name]) for name, kind in KINDS.items()}
    shapes = {PREFIX[name] + k: ",".join(map(str, v.shape)) for name, network in networks.items()
              for k, v in network.state_dict().items()}
    published = dict(line.rstrip().split("\t") for line in gzip.open(
        DATA / "sd_v1_state_dict.tsv.gz", "rt") if not line.startswith("#"))
    assert len(shapes) == 1130 and shapes == published
    assert networks["unet"].input_blocks[1][1].transformer_blocks[0].attn1.num_heads == 8
    assert networks["text_encoder"].text_model["encoder"].layers[0].self_attn.num_heads == 12
    unet = lambda x, t, context: context.mean((1, 2)).view(-1, 1, 1, 1) * x
    x, t, prompts = torch.randn(3, 4, 2, 2), torch.zeros(3), torch.tensor([[[2.0]], [[0.5]]])
    assert torch.allclose(guided(unet, *prompts[:, None], 7.5)(x, t), (0.5 + 7.5 * 1.5) * x)
    assert torch.allclose(guided(unet, *prompts[:, None], 1)(x, t), 2 * x)


def test_what_does_not_fit_or_is_not_a_number_is_named(load, capsys):
    state, extra = reference_state(), PREFIX["autoencoder"] + "loss.logvar"
    load(state | {extra: torch.zeros(1)})
    assert f"not reading 1 tensors that v1 does not have: {extra}" in capsys.readouterr().out
    with pytest.raises(UserError, match="49408 tokens, not 1000"):
        load(state, MERGES)
    for prefix in PREFIX.values():
        name = [k for k in sorted(state) if k.startswith(prefix)][5]
        broken = state[name].clone()
        broken.view(-1)[-1] = math.nan
        with pytest.raises(UserError, match=f"broken: {name}"):
            load({**state, name: broken})
    state[UNET + "out.2.weight"] = torch.zeros(4, 32, 1, 1)
    state.pop(UNET + "out.2.bias")
    with pytest.raises(UserError, match=r" 2 tensors are missing .*out.2.weight, .*out.2.bias\)"):
        load(state)
    with pytest.raises(UserError, match="286 tensors are missing"):
        load({"some": torch.zeros(1)})


@pytest.mark.parametrize("entry", json.loads((DATA / "clip_bpe_vectors.json").read_text()),
                         ids=lambda e: e["text"][:20])
def test_tokenizer_gives_clips_ids(entry, tokenizer=Tokenizer(MERGES)):
    ids = tokenizer([entry["text"]])
    assert ids.shape == (1, 77) and ids.dtype == torch.int64
    assert ids[0].tolist() == entry["ids"] + [49407] * (77 - len(entry["ids"]))


def test_files_of_merges_and_others(tmp_path, capsys):
    text, tokenizer = gzip.decompress(MERGES.read_bytes()).decode(), Tokenizer(MERGES)
    header, lines = text.split("\n", 1)
    for content in (text, lines, text.rstrip() + "\nq q\n"):  # with more than are used, at last
        (tmp_path / "merges.txt").write_text(content, encoding="utf-8")
        assert Tokenizer(tmp_path / "merges.txt").id == tokenizer.id
    for name, content in {"empty": b"", "header": header.encode(),
                          "vocab.json": json.dumps(tokenizer.id).encode(),
                          "damaged.gz": MERGES.read_bytes()[:50_000] + b"0" * 99}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name} is not a file of merges"):
            Tokenizer(tmp_path / name)
    assert tokenizer(["ball " * 80, "ball " * 90])[:, -1].tolist() == [49407] * 2  # cut
    said = capsys.readouterr().out  # once
    assert said.count("tokens of a prompt") == 1 and "not the last 5: ball ball" in said


def command(folder, args, *more):
    """The command line, in this process, for the tiny model: (exit code, out, err)."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    name, *args = args.replace(" ", " --merges merges.txt --size 16 --device cpu ", 1).split()
    with (pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out),
          contextlib.redirect_stderr(err)):
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["sd_unlearn.py", name, *args, *map(str, more)])
        patch.setattr(sd_unlearn, "SIZES", TINY)
        try:
            run_command_line(sd_unlearn.main)
        except SystemExit as e:
            code = e.code or 0
    return code, out.getvalue(), err.getvalue()


def test_one_prompt_is_forgotten_and_the_other_stays():
    """A small DDPM of images bright left or right, as the prompt says, or either."""
    torch.manual_seed(0)
    d, context = Diffusion("cosine", 100), torch.eye(4)[:3, None]  # left, right, no prompt
    unet = UNet(model_channels=16, channel_mult=(1,), num_heads=1, attention_resolutions=(1,),
                context_dim=4)
    images = torch.stack([toy_images(500, 1), toy_images(500, 0)])
    optimizer = torch.optim.Adam(unet.parameters(), 6e-3)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 6e-3 * (1 - step / 320)
        side, t = torch.randint(2, (64,)), torch.randint(100, (64,))
        x0, prompt = images[side, torch.randint(500, (64,))], side.where(torch.rand(64) > 0.2, 2)
        d.simple_loss(lambda x, t: unet(x, t, context[prompt]), x0, t,
                      torch.randn_like(x0)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    draw = lambda i: d.sample(guided(unet, context[[i]], None, 1), 100, (1, 4, 4), 20, 1.0)
    left = lambda: [is_left(draw(i)).sum().item() for i in range(3)]
    before, kept = left(), torch.cat([draw(i) for i in (1, 2)])
    objective = PromptedObjective(
        d, posterior := guessed_posterior(unet.named_parameters()), images[0], 0.0, 32, (0.2, 1.0),
        context[:1], frozen=copy.deepcopy(unet), kept=kept, rho=0.5,
        kept_context=context[1:].repeat_interleave(100, 0), empty=context[2:])
    unlearn(unet, posterior, objective, lr=0.5, steps=60, adam=True)
    after = left()  # of 100
    assert before[0] >= 85 and before[1] <= 10 and after[0] <= 10 and after[1] <= 10


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a checkpoint of random weights, merges, and images in circles/."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    networks = {name: KINDS[name](**TINY[name]) for name in TINY}
    for p in networks["unet"].parameters():  # some are 0 at first
        p.data += 0.05 * torch.randn_like(p)
    state = {PREFIX[k] + name: v for k, m in networks.items() for name, v in m.state_dict().items()}
    torch.save({"epoch": 1, "global_step": 7, "state_dict": state}, folder / "tiny.ckpt")
    (folder / "merges.txt").write_text("#version: 0.2\nc i\n")
    (folder / "circles").mkdir()
    for i in range(6):
        save_image(torch.rand(3, 20, 20), folder / f"circles/{i}.png")
    return folder


def test_samples_are_a_row_per_prompt_and_a_block_per_checkpoint(tiny, tmp_path):
    """With the same noise for each, here a copy of the other as a .safetensors file."""
    state, path = read_file(tiny / "tiny.ckpt")["state_dict"], tiny / "sample.png"
    (tiny / "tiny.safetensors").write_bytes(safetensors({
        k: ("F32", list(v.shape), v.contiguous().numpy().tobytes()) for k, v in state.items()}))
    pixels = lambda: torch.from_numpy(np.array(Image.open(path)))
    few = "sample --sampling-steps 2 --batch-size 2 --overwrite --checkpoint tiny.ckpt"
    code, _, err = command(tiny, f"{few} tiny.safetensors --n 3 --prompt a b a")
    assert code == 0, err
    grid = pixels()[2:, 2:].unfold(0, 16, 18).unfold(1, 16, 18)  # (rows, columns, 3, 16, 16)
    assert grid.shape[:2] == (3, 6) and torch.equal(grid[:, :3], grid[:, 3:])
    assert torch.equal(grid[0], grid[2]) and not torch.equal(grid[0], grid[1])
    images = [*grid[0, 1:3]]
    for flags in ("", "--seed 1", "--guidance 0", "--sampling-steps 3"):
        assert command(tiny, f"{few} --n 1 {flags} --prompt a")[0] == 0
        images.append(pixels().permute(2, 0, 1))  # alone, without a border
    assert (images[2].int() - grid[0, 0].int()).abs().max() <= 2  # whatever n is
    assert len({tuple(image.flatten().tolist()) for image in images}) == 6
    bias = {"out.2.bias": torch.ones(4)}
    sd_unlearn.save(tmp_path / "o.ckpt", tiny / "tiny.safetensors", bias, {})
    written = torch.load(tmp_path / "o.ckpt")
    assert list(written) == list(state) and (written[UNET + "out.2.bias"] == 1).all()


@pytest.mark.parametrize("method, moves", [("--paper", ".attn2."), ("--parameters all", UNET)])
def test_the_command_moves_what_it_says_and_saves_what_was_judged(tiny, monkeypatch, method, moves):
    """Of a file in half precision, in which these moves would be rounded away; its
    averages, a second copy of what was forgotten, are left out."""
    state = {k: v.half() for k, v in read_file(tiny / "tiny.ckpt")["state_dict"].items()}
    average = {"model_ema." + k.replace(".", ""): v for k, v in state.items() if UNET in k}
    torch.save({"global_step": 7, "state_dict": state | average}, tiny / "half.ckpt")
    prompts, judged, batches = [], {}, []
    draw, batch = sd_unlearn.sample_latents, PaperObjective.draw

    def drawing(model, prompt, n, *args):
        prompts.append((prompt, n))
        judged.update({k: v.clone() for k, v in model.unet.state_dict().items()})
        return draw(model, prompt, n, *args) if n == 16 else torch.randn(n, 4, 8, 8)

    monkeypatch.setattr(sd_unlearn, "sample_latents", drawing)
    monkeypatch.setattr(PaperObjective, "draw", lambda self: (batches.append(self), batch(self))[1])
    code, _, err = command(tiny, f"{UNLEARN} half.ckpt --output one.ckpt --overwrite --steps 3 "
                           "--lr 0.001 --batch-size 8 --accumulate 2 --anchors 30 --keep square "
                           f"{method}")
    assert code == 0, err
    kept = [*NEUTRAL_PROMPTS, *(template.format("square") for template in TEMPLATES)]
    assert prompts == [(prompt, 2) for prompt in kept] + [("a photo of a circle", 16)] * 2
    assert [objective.batch_size for objective in batches] == [8] * (1 + 3 * 2 + 1)  # measured, too
    after = torch.load(tiny / "one.ckpt")
    assert set(after["state_dict"]) == set(state) and after["global_step"] == 7
    assert after["vdu"]["concept"] == "circle" and after["vdu"]["settings"]["accumulate"] == 2
    for name, v in after["state_dict"].items():
        assert v.dtype == (torch.float32 if moves in name else torch.float16)
        assert moves in name or torch.equal(v, state[name])
        assert moves not in name or torch.equal(v, judged[name.removeprefix(UNET)])
        if name.endswith((".attn2.to_k.weight", "out.2.bias")):
            assert torch.equal(v, state[name].float()) != (moves in name)


def test_gamma_1_leaves_what_moves_at_the_mean_of_several_checkpoints(tiny, monkeypatch):
    state = read_file(tiny / "tiny.ckpt")["state_dict"]
    for i in range(3):
        torch.save({"state_dict": {k: v + 0.01 * i for k, v in state.items()}}, tiny / f"{i}.pt")
    monkeypatch.setattr(sd_unlearn, "sample_latents", lambda *args: torch.randn(args[2], 4, 8, 8))
    code, out, err = command(tiny, f"{UNLEARN} tiny.ckpt --output mean.ckpt --posterior 0.pt 1.pt "
                             "2.pt --gamma 1 --steps 1 --overwrite")
    assert code == 0 and "posterior of 3 checkpoints" in out, err
    for name, v in torch.load(tiny / "mean.ckpt")["state_dict"].items():
        assert torch.allclose(v, state[name] + 0.01 * (".attn2." in name), atol=1e-5)


BAD_INPUT = """
unlearn --checkpoint none.ckpt              | no checkpoint at none.ckpt
unlearn --images nowhere                    | nowhere
unlearn --output tiny.ckpt                  | exists already: choose another
unlearn --posterior tiny.ckpt tiny.ckpt     | two checkpoints
unlearn --size 17                           | --size must be a multiple of 2
unlearn --merges none.txt                   | none.txt is not a file of merges
sample --size 17                            | --size must be a multiple of 2
sample --checkpoint tiny.ckpt none.ckpt     | no checkpoint at none.ckpt
sample --output o.jpg                       | o.jpg has to end in .png
sample --sampling-steps 1001                | sampling steps must be from 1 to 1000
"""


@pytest.mark.parametrize("line", BAD_INPUT.strip().splitlines())
def test_bad_input_is_one_line_and_exit_code_2(tiny, line):
    given, message = line.split(" | ")
    (name, *flags), there = given.split(), sorted(os.listdir(tiny))
    start = {"unlearn": f"{UNLEARN} tiny.ckpt --output o.ckpt",
             "sample": "sample --checkpoint tiny.ckpt --prompt x --output o.png"}[name]
    code, _, err = command(tiny, start, *flags)
    assert code == 2 and message in err.strip().splitlines()[-1], err
    assert sorted(os.listdir(tiny)) == there
