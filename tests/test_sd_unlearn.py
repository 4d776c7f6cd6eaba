"""Stable Diffusion: the parts against reference numbers and the published list of
tensors, and the whole on a tiny model."""

import contextlib
import gzip
import io
import json
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import ddpm
import sd_tiny
import sd_unlearn
from ddpm import UserError
from unet import UNet
from vdu import unlearn

DATA = Path(__file__).parent / "data"
MERGES = DATA / "clip_merges.txt.gz"


@pytest.fixture(scope="module")
def reference():
    return torch.load(DATA / "sd_reference.pt", weights_only=True)


def published_shapes():
    lines = gzip.open(DATA / "sd_v1_state_dict.tsv.gz", "rt").read().splitlines()
    return {k: tuple(map(int, shape.split(",")))
            for k, shape in (line.split("\t") for line in lines if not line.startswith("#"))}


def use_sizes_of(reference, patch):
    """The tiny reference networks' sizes in place of Stable Diffusion's."""
    u, a, c = (reference[name]["config"] for name in ("unet", "vae", "clip"))
    keys = ("in_channels", "model_channels", "channel_mult", "num_res_blocks",
            "attention_resolutions", "num_heads", "context_dim")
    patch.setattr(sd_unlearn, "SIZES", {
        "unet": {k: u[k] for k in keys},
        "autoencoder": {k: a[k] for k in ("ch", "ch_mult", "num_res_blocks", "z_channels")},
        "text_encoder": dict(vocab_size=c["vocab_size"], width=c["hidden_size"],
                             layers=c["num_hidden_layers"],
                             num_heads=c["num_attention_heads"], mlp_width=4 * c["hidden_size"])})


@pytest.fixture
def reference_sizes(reference, monkeypatch):
    use_sizes_of(reference, monkeypatch)


def load_floats(module, state):
    module.load_state_dict({k: v.float() for k, v in state.items()}, strict=True)
    return module.eval()


# --- the parts, against the original implementations ----------------------------------


@torch.no_grad()
def test_unet_reproduces_the_original(reference):
    r, c = reference["unet"], reference["unet"]["config"]
    unet = UNet(c["in_channels"], c["model_channels"], c["channel_mult"], c["num_res_blocks"],
                c["attention_resolutions"], c["num_heads"],
                context_dim=c["context_dim"])
    assert (load_floats(unet, r["state_dict"])(r["x"], r["timesteps"], r["context"])
            - r["output"]).abs().max() < 1e-4


@torch.no_grad()
def test_autoencoder_reproduces_the_original(reference):
    r, c = reference["vae"], reference["vae"]["config"]
    autoencoder = load_floats(sd_unlearn.Autoencoder(c["ch"], c["ch_mult"], c["num_res_blocks"],
                                                     c["z_channels"]), r["state_dict"])
    assert (autoencoder.encode(r["image"]) - r["moments"]).abs().max() < 1e-4
    assert (autoencoder.decode(r["z"]) - r["decoded"]).abs().max() < 1e-4


@torch.no_grad()
def test_text_encoder_reproduces_the_original(reference):
    r, c = reference["clip"], reference["clip"]["config"]
    encoder = sd_unlearn.TextEncoder(c["vocab_size"], c["hidden_size"], c["num_hidden_layers"],
                                     c["num_attention_heads"], 4 * c["hidden_size"])
    assert (load_floats(encoder, r["state_dict"])(r["input_ids"])
            - r["last_hidden_state"]).abs().max() < 1e-4


@pytest.mark.parametrize("entry", json.loads((DATA / "clip_bpe_vectors.json").read_text()),
                         ids=lambda e: e["text"][:20])
def test_tokenizer_gives_clips_ids(entry, tokenizer=sd_unlearn.Tokenizer(MERGES)):
    ids = tokenizer([entry["text"]])
    assert ids.shape == (1, 77) and ids.dtype == torch.int64
    assert ids[0].tolist() == entry["ids"] + [49407] * (77 - len(entry["ids"]))


def test_tokenizer_reads_plain_merges_as_well(tmp_path):
    (tmp_path / "merges.txt").write_bytes(gzip.decompress(MERGES.read_bytes()))
    texts = ["a photo of a golf ball", "two"]
    assert torch.equal(sd_unlearn.Tokenizer(tmp_path / "merges.txt")(texts),
                       sd_unlearn.Tokenizer(MERGES)(texts))


def test_the_full_size_model_has_the_published_tensors():
    networks = sd_unlearn.build()
    shapes = {sd_unlearn.PREFIX[n] + k: tuple(v.shape) for n, m in networks.items()
              for k, v in m.state_dict().items()}
    assert len(shapes) == 1130 and shapes == published_shapes()


def test_the_published_heads():
    networks = sd_unlearn.build()
    assert networks["unet"].input_blocks[1][1].transformer_blocks[0].attn1.num_heads == 8
    assert networks["text_encoder"].text_model["encoder"]["layers"][0].self_attn.num_heads == 12


def test_guidance():
    unet = lambda x, t, context: context.mean((1, 2)).view(-1, 1, 1, 1) * x
    x, t = torch.randn(3, 4, 2, 2), torch.zeros(3)
    context, negative = torch.full((1, 7, 5), 2.0), torch.full((1, 7, 5), 0.5)
    assert torch.allclose(sd_unlearn.guided(unet, context, negative, 7.5)(x, t),
                          (0.5 + 7.5 * 1.5) * x)
    assert torch.allclose(sd_unlearn.guided(unet, context, negative, 1)(x, t), 2 * x)


# --- files ----------------------------------------------------------------------------


def tiny_state(reference, dtype=torch.float16):
    names = {"unet": "unet", "autoencoder": "vae", "text_encoder": "clip"}
    return {sd_unlearn.PREFIX[n] + k: v.to(dtype) for n, r in names.items()
            for k, v in reference[r]["state_dict"].items()}


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@torch.no_grad()
def test_loads_either_layout_in_either_precision(reference, reference_sizes, tmp_path, wrapped,
                                                 dtype):
    positions = sd_unlearn.PREFIX["text_encoder"] + "text_model.embeddings.position_ids"
    state = tiny_state(reference, dtype)
    state |= {"betas": torch.zeros(1000), positions: torch.arange(77)[None]}
    if wrapped:
        sd_tiny.write_published(tmp_path / "sd.ckpt", state)
    else:
        torch.save(state, tmp_path / "sd.ckpt")
    model = sd_unlearn.load(tmp_path / "sd.ckpt", MERGES)
    r = reference["unet"]
    assert (model.unet(r["x"], r["timesteps"], r["context"]) - r["output"]).abs().max() < 1e-4
    assert (model.text_encoder(reference["clip"]["input_ids"])
            - reference["clip"]["last_hidden_state"]).abs().max() < 1e-4
    assert (model.autoencoder.decode(reference["vae"]["z"])
            - reference["vae"]["decoded"]).abs().max() < 1e-4


def test_ema_weights_on_request(reference, reference_sizes, tmp_path):
    state = tiny_state(reference)
    prefix = sd_unlearn.PREFIX["unet"]
    ema = {"model_ema." + k.removeprefix("model.").replace(".", ""): v + 1 for k, v in state.items()
           if k.startswith(prefix)}
    torch.save({"state_dict": state | ema}, tmp_path / "sd.ckpt")
    plain, averaged = (sd_unlearn.load(tmp_path / "sd.ckpt", MERGES, ema=ema).unet.out[2].weight
                       for ema in (False, True))
    assert torch.allclose(averaged, plain + 1, atol=1e-2)
    torch.save({"state_dict": state}, tmp_path / "without.ckpt")
    with pytest.raises(UserError, match="no EMA weights for 286"):
        sd_unlearn.load(tmp_path / "without.ckpt", MERGES, ema=True)


def test_what_does_not_fit_is_named(reference, reference_sizes, tmp_path):
    state = tiny_state(reference)
    prefix = sd_unlearn.PREFIX["unet"]
    state.pop(prefix + "out.2.bias")
    state[prefix + "out.2.weight"] = torch.zeros(4, 32, 1, 1)
    torch.save(state, tmp_path / "sd.ckpt")
    message = (r"1 missing \(.*out.2.bias\); "
               r"1 of another shape \(.*out.2.weight is \(4, 32, 1, 1\)")
    with pytest.raises(UserError, match=message):
        sd_unlearn.load(tmp_path / "sd.ckpt", MERGES)
    torch.save({"some": torch.zeros(1)}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="446 missing"):
        sd_unlearn.load(tmp_path / "other.ckpt", MERGES)


def test_what_the_networks_do_not_need_is_said_and_not_read(reference, reference_sizes, tmp_path,
                                                            capsys):
    extra = sd_unlearn.PREFIX["autoencoder"] + "loss.logvar"
    torch.save(tiny_state(reference) | {extra: torch.zeros(1)}, tmp_path / "sd.ckpt")
    sd_unlearn.load(tmp_path / "sd.ckpt", MERGES)
    assert f"not reading 1 tensors that Stable Diffusion v1 does not have ({extra})" in (
        capsys.readouterr().out)


@pytest.mark.parametrize("network", sd_unlearn.PREFIX)
def test_one_nan_in_any_network_is_named(reference, reference_sizes, tmp_path, network):
    state = tiny_state(reference, torch.float32)
    name = [k for k in sorted(state) if k.startswith(sd_unlearn.PREFIX[network])][5]
    state[name].view(-1)[0] = float("nan")
    torch.save(state, tmp_path / "sd.ckpt")
    with pytest.raises(UserError, match=f"broken: {name}"):
        sd_unlearn.load(tmp_path / "sd.ckpt", MERGES)


def test_files_that_are_not_merges(tmp_path):
    lines = gzip.decompress(MERGES.read_bytes()).decode().split("\n")
    with_header = sd_unlearn.Tokenizer(MERGES)
    (tmp_path / "bare.txt").write_text("\n".join(lines[1:]), encoding="utf-8")
    assert sd_unlearn.Tokenizer(tmp_path / "bare.txt").id == with_header.id
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "header.txt").write_text(lines[0])
    (tmp_path / "vocab.json").write_text(json.dumps(with_header.id))
    (tmp_path / "damaged.gz").write_bytes(MERGES.read_bytes()[:50_000] + b"0" * 99)
    for name, words in (("empty.txt", "not a file of merges"), ("damaged.gz", "cannot read"),
                        ("header.txt", "not a file of merges"),
                        ("vocab.json", "not a file of merges")):
        with pytest.raises(UserError, match=words):
            sd_unlearn.Tokenizer(tmp_path / name)


def test_a_prompt_that_is_too_long_is_said_once(capsys):
    tokenizer = sd_unlearn.Tokenizer(MERGES)
    tokenizer(["ball " * 80, "ball " * 90])
    said = capsys.readouterr().out
    assert said.count("tokens of a prompt") == 1 and "not the last 5: ball ball" in said


def test_a_byte_order_mark_is_not_of_the_first_prompt(tmp_path):
    (tmp_path / "p.txt").write_bytes("\ufeffa ball\n\n a cat \n".encode())
    assert sd_unlearn.read_prompts(tmp_path / "p.txt") == ["a ball", "a cat"]
    (tmp_path / "q.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match="cannot read prompts"):
        sd_unlearn.read_prompts(tmp_path / "q.txt")


def test_merges_of_another_model_are_told(reference, reference_sizes, tmp_path):
    # its text encoder knows 1,000 tokens
    torch.save({"state_dict": tiny_state(reference)}, tmp_path / "sd.ckpt")
    with pytest.raises(UserError,
                       match="49408 tokens and the checkpoint's text encoder knows 1000"):
        sd_unlearn.load(tmp_path / "sd.ckpt", MERGES).context(["a golf ball"])


class Creates:
    """Unpickled, it would create a file."""

    def __init__(self, path, how):
        self.path, self.how = path, how

    def __reduce__(self):
        if self.how == "open":
            return open, (self.path, "w")
        return exec, (f"open({self.path!r}, 'w')",)


@pytest.mark.parametrize("how", ["open", "exec"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_refused_and_not_executed(reference, tmp_path, how, zipped):
    victim = tmp_path / "created"
    torch.save({"state_dict": tiny_state(reference), "callbacks": Creates(str(victim), how)},
               tmp_path / "bad.ckpt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="refused"):
        sd_unlearn.load(tmp_path / "bad.ckpt", MERGES)
    assert not victim.exists()


def test_posterior_from_several_checkpoints_and_from_one(reference, reference_sizes, tmp_path):
    state = tiny_state(reference, torch.float32)
    name = "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    paths = [tmp_path / f"{i}.ckpt" for i in range(3)]
    for i, path in enumerate(paths):
        torch.save({"state_dict": {k: v + i for k, v in state.items()}}, path)
    unet = sd_unlearn.load(paths[0], MERGES).unet
    names = sd_unlearn.parameters_to_move(unet, "cross-attention")
    assert name in names and all(".attn2." in k for k in names)
    weight = state[sd_unlearn.PREFIX["unet"] + name]
    several = sd_unlearn.posterior_of(unet, names, paths, False, 0.02)
    assert torch.allclose(several.mean[name], weight + 1, atol=1e-5)
    assert torch.allclose(several.std[name], torch.ones_like(weight), atol=1e-4)
    one = sd_unlearn.posterior_of(unet, names, None, False, 0.02)
    assert torch.equal(one.mean[name], weight)
    assert one.std[name].item() == pytest.approx(0.02 * weight.square().mean().sqrt().item(),
                                                 rel=1e-5)
    everything = sorted(k for k, _ in unet.named_parameters())
    assert sorted(sd_unlearn.parameters_to_move(unet, "all")) == everything


# --- the whole, through the command line ----------------------------------------------


def command(folder, *args):
    """The command line, in this process, for the tiny model's sizes, offline."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out),
          contextlib.redirect_stderr(err)):
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["sd_unlearn.py", *map(str, args)])
        patch.setattr(sd_unlearn, "SIZES", sd_tiny.SIZES)
        patch.setattr(ddpm, "precision", "auto")
        patch.setenv("TORCH_HOME", str(folder / "torch"))
        for name in ("http_proxy", "https_proxy"):
            patch.setenv(name, "http://127.0.0.1:9")
        try:
            ddpm.run_command_line(sd_unlearn.main)
        except SystemExit as e:
            code = e.code or 0
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def tiny(beside):
    """The folder of the trained tiny model, with the prompts that the tests use."""
    folder, outputs = beside["tiny"]
    outputs.result(timeout=400)
    (folder / "prompts.txt").write_text("a photo of a circle\na photo of a square\n")
    return folder


COMMON = ("--merges", "merges.txt", "--size", 16, "--device", "cpu")


def seen(folder, prompt):
    images = [sd_tiny.read_image(p) for p in sorted(folder.glob(f"{prompt:03d}-*.png"))]
    return Counter(sd_tiny.recognise(torch.stack(images)))


def test_sample(tiny):
    r = command(tiny, "sample", "--checkpoint", "tiny.ckpt", *COMMON, "--prompt",
                "a photo of a circle", "a photo of a square", "--n", 2,
                "--sampling-steps", 20, "--guidance", 3, "--output", "row.png")
    assert r.returncode == 0, r.stderr
    assert sd_tiny.read_image(tiny / "row.png").shape == (3, 2 * 18 + 2, 2 * 18 + 2)


@pytest.mark.parametrize("concept", sd_tiny.SHAPES)
def test_unlearn_and_compare(tiny, beside, concept):
    """A published-looking checkpoint draws circles and squares; told to forget one
    (conftest.py types the command), and nothing of the other, it draws the other as
    before, and says so itself."""
    said = beside["tiny"][1].result()[1 + sd_tiny.SHAPES.index(concept)]
    assert "peak memory" in said and "samples that look like D_f" in said

    r = command(tiny, "compare", "--before", "tiny.ckpt", "--after", f"no-{concept}.ckpt", *COMMON,
                "--prompts", "prompts.txt", "--n", 50, "--sampling-steps", 20, "--guidance", 3,
                "--batch-size", 50, "--output", concept, "--reference-images", "circles")
    assert r.returncode == 0, r.stderr
    assert "no FID: Inception v3's weights cannot be downloaded" in r.stdout
    for i, shape in enumerate(sd_tiny.SHAPES):
        before, after = (seen(tiny / concept / when, i)[shape] for when in ("before", "after"))
        assert before >= 40  # of 50: the model can draw
        assert after <= 0.1 * before if shape == concept else after >= 0.9 * before
    assert sd_tiny.read_image(tiny / concept / "grid.png").shape == (3, 2 * 18 + 2, 100 * 18 + 2)

    before, after = ddpm.read_file(tiny / "tiny.ckpt"), torch.load(tiny / f"no-{concept}.ckpt",
                                                                   weights_only=True)
    assert {k: v.shape
            for k, v in after["state_dict"].items()} == {k: v.shape
                                                         for k, v in before["state_dict"].items()}
    changed = {k for k, v in after["state_dict"].items()
               if not torch.equal(v, before["state_dict"][k])}
    assert changed and all(k.startswith(sd_unlearn.PREFIX["unet"]) for k in changed)
    assert after["vdu"]["concept"] == concept and after["global_step"] == before["global_step"]


def test_paper_terms_move_the_cross_attention_alone_and_accumulate(tiny, monkeypatch):
    calls = []

    def recorded(unet, posterior, objective, lr, steps, adam, accumulate, *args, **kwargs):
        calls.append((accumulate, unet.gradient_checkpointing, ddpm.precision))
        return unlearn(unet, posterior, objective, lr, steps, adam, accumulate, *args, **kwargs)

    def anchors_recorded(model, prompts, args):
        kept.append(prompts)
        return anchors_for(model, prompts, args)

    kept, anchors_for = [], sd_unlearn.anchors_for
    monkeypatch.setattr(sd_unlearn, "unlearn", recorded)
    monkeypatch.setattr(sd_unlearn, "anchors_for", anchors_recorded)
    for name, extra in (("one", ("--batch-size", 8, "--keep", "square")),
                        ("two", ("--batch-size", 4, "--accumulate", 2))):
        r = command(tiny, "unlearn", "--checkpoint", "tiny.ckpt", *COMMON, "--concept", "circle",
                    "--images", "circles", "--output", f"{name}.ckpt",
                    "--steps", 3, "--precision", "bf16", "--gradient-checkpointing", *extra)
        assert r.returncode == 0, r.stderr
        # three steps forget nothing, and it says so
        assert "It is still there: try --function-space" in r.stdout
    assert calls == [(1, True, "bf16"), (2, True, "bf16")]
    assert all("" in prompts and "a street" in prompts for prompts in kept)
    assert ["a photo of a square" in prompts for prompts in kept] == [True, False]
    before = ddpm.read_file(tiny / "tiny.ckpt")["state_dict"]
    after = torch.load(tiny / "one.ckpt", weights_only=True)["state_dict"]
    changed = {k for k in after if not torch.equal(after[k], before[k])}
    assert changed and all(".attn2." in k for k in changed)


def test_safetensors_in_and_out(tiny):
    """What other tools write is read, and what is written other tools can read."""
    state = ddpm.read_file(tiny / "tiny.ckpt")["state_dict"]
    header, data = {}, b""
    for name, v in state.items():
        numbers = v.float().contiguous().numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": list(v.shape),
                        "data_offsets": [len(data), len(data) + len(numbers)]}
        data += numbers
    text = json.dumps(header).encode()
    (tiny / "tiny.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    few = ("--sampling-steps", 2, "--n", 1)
    for name in ("tiny.ckpt", "tiny.safetensors"):
        r = command(tiny, "sample", "--checkpoint", name, *COMMON, "--prompt", "a circle", *few,
                    "--output", f"{name}.png")
        assert r.returncode == 0, r.stderr
    pixels = [sd_tiny.read_image(tiny / f"tiny.{ending}.png") for ending in ("ckpt", "safetensors")]
    assert torch.equal(*pixels)
    r = command(tiny, "unlearn", "--checkpoint", "tiny.safetensors", *COMMON, "--concept", "circle",
                "--images", "circles", "--steps", 1, "--anchors", 12, "--output",
                "gone.safetensors")
    assert r.returncode == 0, r.stderr
    content = (tiny / "gone.safetensors").read_bytes()
    n = struct.unpack("<Q", content[:8])[0]
    written = json.loads(content[8 : 8 + n])
    assert json.loads(written.pop("__metadata__")["vdu"])["concept"] == "circle"
    assert set(written) == set(state)
    for name, entry in written.items():
        first, last = entry["data_offsets"]
        v = torch.frombuffer(bytearray(content[8 + n + first : 8 + n + last]), dtype=torch.float32)
        v = v.view(entry["shape"])
        moved = ".attn2." in name
        assert moved or torch.equal(v, state[name])
    r = command(tiny, "compare", "--before", "tiny.ckpt", "--after", "gone.safetensors", *COMMON,
                "--prompts", "prompts.txt", *few, "--output", "gone")
    assert r.returncode == 0, r.stderr
    again = command(tiny, "compare", "--before", "tiny.ckpt", "--after", "tiny.ckpt", *COMMON,
                    "--prompts", "prompts.txt", *few, "--output", "gone")
    assert again.returncode == 2 and "exists already" in again.stderr


def test_the_old_average_does_not_survive(tiny, tmp_path):
    """A file's EMA is a second copy of what was forgotten."""
    state = dict(ddpm.read_file(tiny / "tiny.ckpt")["state_dict"])
    ema = {"model_ema." + k.removeprefix("model.").replace(".", ""): v for k, v in state.items()
           if k.startswith("model.")}
    torch.save({"state_dict": state | ema}, tiny / "with-ema.ckpt")
    sd_unlearn.save(tmp_path / "out.ckpt", tiny / "with-ema.ckpt", {}, ema=False, record={})
    assert set(torch.load(tmp_path / "out.ckpt", weights_only=True)["state_dict"]) == set(state)


@pytest.mark.parametrize("args, message", [
    (("unlearn", "--checkpoint", "none.ckpt", "--concept", "x", "--images", "circles", "--output",
      "o.ckpt"), "no checkpoint at none.ckpt"),
    (("unlearn", "--checkpoint", "tiny.ckpt", "--concept", " ", "--images", "circles", "--output",
      "o.ckpt"), "--concept"),
    (("unlearn", "--checkpoint", "tiny.ckpt", "--concept", "x", "--images", "nowhere", "--output",
      "o.ckpt"), "no images in nowhere"),
    (("unlearn", "--checkpoint", "tiny.ckpt", "--concept", "x", "--images", "circles", "--output",
      "tiny.ckpt"), "choose another"),
    (("unlearn", "--checkpoint", "tiny.ckpt", "--concept", "x", "--images", "circles", "--output",
      "prompts.txt"), "exists already"),
    (("unlearn", "--checkpoint", "tiny.ckpt", "--concept", "x", "--images", "circles", "--output",
      "o.ckpt", "--gamma", 2), "--gamma"),
    (("unlearn", "--checkpoint", "tiny.ckpt", "--concept", "x", "--images", "circles", "--output",
      "o.ckpt", "--posterior", "tiny.ckpt"), "two checkpoints"),
    (("sample", "--checkpoint", "tiny.ckpt", "--prompt", "x", "--size", 17), "multiple of 2"),
    (("sample", "--checkpoint", "prompts.txt", "--prompt", "x"), "prompts.txt"),
    (("unlearn", "--checkpoint", "tiny.ckpt", "--concept", "x", "--images", "circles", "--output",
      "o.ckpt", "--size", 17), "multiple of 2"),
    (("unlearn", "--checkpoint", "tiny.ckpt", "--concept", "x", "--images", "circles", "--output",
      "o.ckpt", "--t-range", 0.5, 0.5), "--t-range"),
    (("compare", "--before", "tiny.ckpt", "--after", "tiny.ckpt", "--prompts", "prompts.txt",
      "--output", "other", "--n", 0), "--n: must be"),
    (("compare", "--before", "tiny.ckpt", "--after", "tiny.ckpt", "--prompts", "none.txt",
      "--output", "other"), "cannot read prompts"),
])
def test_bad_input_is_one_line_and_exit_code_2(tiny, args, message):
    r = command(tiny, args[0], *COMMON, *args[1:])
    assert r.returncode == 2 and message in r.stderr, r.stderr
    assert len(r.stderr.strip().splitlines()) == 1, r.stderr
    assert not (tiny / "o.ckpt").exists()
