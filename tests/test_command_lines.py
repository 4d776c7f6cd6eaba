"""The three commands as people type them, in a temporary folder, without a network; and
what wrong input gets."""

import contextlib
import io
import json
import pickle
import re
import resource
import runpy
import shlex
import shutil
import signal
import sys

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import save_image

import ddpm
import evaluate
import sd_unlearn
import train_ddpm
import vdu
from conftest import ROOT

FEW = "--paper --steps 1 --batch-size 4 --anchors 10"
DRAW = "--samples 12 --sampling-steps 2 --bits 0"
COLOURS = ("train_ddpm.py --dataset folder --data-root images --image-size 8 --steps 44 "
           "--batch-size 8")


def command(line, cwd, code=0, encoding="utf-8"):
    """All that a command line prints, run by its file as __main__, without the seconds
    that a new process takes to import torch. It has to end with this exit code."""
    script, *args = shlex.split(line)
    streams = [io.TextIOWrapper(io.BytesIO(), encoding, write_through=True) for _ in range(2)]
    with (pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(streams[0]),
          contextlib.redirect_stderr(streams[1])):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [script, *args])
        ended = 0
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as e:
            ended = e.code or 0
    said = "".join(stream.buffer.getvalue().decode(encoding) for stream in streams)
    assert ended == code, said
    return said


def refused(line, cwd, *words):
    """The last line says what is wrong, and no file changes."""
    files = lambda: {p: p.stat().st_mtime_ns for p in cwd.rglob("*") if p.is_file()}
    before, said = files(), command(line, cwd, code=2)
    last = said.splitlines()[-1]
    assert re.match(r"(\w+\.py: )?error: ", last) and "Traceback" not in said, said
    assert all(word in last for word in words) and files() == before, last


load = lambda path: torch.load(path, weights_only=True)
past = lambda path: ddpm.load_checkpoint(path).forgotten
report_of = lambda folder: json.loads((folder / "report.json").read_text())
same = lambda a, b: a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


@pytest.fixture(scope="module")
def folder(tmp_path_factory, classifier):
    """Where the three commands were typed, and four more."""
    cwd = tmp_path_factory.mktemp("run")
    (cwd / "checkpoints").mkdir()
    shutil.copy(classifier, cwd / "checkpoints")
    said = command("train_ddpm.py --steps 40 --batch-size 16", cwd)
    assert "no network" in said and "5,000 images of 1x28x28 (mnist_5k.npz)" in said
    said = command("vdu.py --forget-class 1 --steps 3 --batch-size 8 --anchors 10", cwd)
    assert said.startswith("L = ") and "samples like D_f from" in said and "broken" not in said
    (cwd / "checkpoints/newest.pt").write_bytes(b"cut short")  # is not what evaluate.py takes
    said = command("evaluate.py --samples 20 --sampling-steps 3 --bits 2", cwd)
    assert "PUL" in said and re.search("^checkpoints/mnist-forget-1.pt .*%", said, re.M)
    command(f"vdu.py --forget-class 1 7 --forget-samples 20 {FEW} --output two.pt", cwd)
    command("vdu.py --forget-class 3 --gamma 1 --steps 1 --anchors 10 --output g1.pt", cwd)
    command("train_ddpm.py --steps 2 --batch-size 8 --exclude-class 1 --output without-1.pt", cwd)
    return cwd


def test_the_three_commands_leave_what_they_say(folder):
    results = folder / "results/mnist-forget-1"
    assert {p.name for p in results.iterdir()} == {"report.json", "before.png", "after.png"}
    assert min(Image.open(results / "after.png").size) >= 3 * 28  # a grid
    before, after = (report := report_of(results))["before"], report["after"]
    assert [before["checkpoint"], after["checkpoint"]] == [
        str(folder / "checkpoints/mnist.pt"), "checkpoints/mnist-forget-1.pt"]
    for part in (before, after):
        assert sum(part["counts"].values()) == 20 and list(part["counts"]) == list("0123456789")
        assert part["forgotten_count"] == part["counts"]["1"] and part["bits_forgotten"] > 0
    assert after["u_fid"] > 0 and "relearning" not in report
    assert report["forgotten"] == ["1"] and report["classifier_accuracy"] > 0.9
    assert report["settings"]["sampling_steps"] == 3 and report["data"]["images"] == 5000


def test_checkpoints_remember(folder):
    trained = ddpm.load_checkpoint(folder / "checkpoints/mnist.pt")
    assert trained.posterior["n"] == 3 and trained.step == 40 and "train" not in trained.raw
    theta = dict(trained.unet.named_parameters())
    assert same(theta, trained.posterior["mean"]) and not trained.unet.training
    one, two = past(folder / "checkpoints/mnist-forget-1.pt"), past(folder / "two.pt")
    assert (one["classes"], one["images"], one["rho"], one["steps"]) == (["1"], 500, 0.1, 3)
    assert one["checkpoint"] == str(folder / "checkpoints/mnist.pt")
    assert one["settings"]["gamma"] == vdu.OURS["gamma"] and one["settings"]["steps"] == 3
    assert len(one["like_D_f"]) == 2 and one["steps"] == 3
    assert (two["classes"], two["images"], two["rho"]) == (["1", "7"], 40, 0.2)
    # gamma 1 leaves all at mu*, bit for bit: theta*, mu* and "before" are the same
    assert same(theta, load(folder / "g1.pt")["weights"])
    assert not same(theta, load(folder / "two.pt")["weights"])


def tensors_in(value):
    """Every tensor in a file's nested contents."""
    if isinstance(value, torch.Tensor):
        yield value
    for part in value.values() if isinstance(value, dict) else ():
        yield from tensors_in(part)


def test_the_file_that_forgot_does_not_hold_what_it_forgot(folder):
    """None of the parent's tensors that moved is left in it, under any name."""
    parent = load(folder / "checkpoints/mnist.pt")
    after = load(folder / "checkpoints/mnist-forget-1.pt")
    old = [v for k, v in parent["weights"].items() if not torch.equal(v, after["weights"][k])]
    assert len(old) > 100
    for v in tensors_in(after):
        assert not any(v.shape == w.shape and torch.equal(v.float(), w) for w in old)


def test_the_picture_shows_the_same_noise_before_and_after(folder):
    """8 x 8 each at most, 10 own samples here; gamma 1 changed nothing."""
    for name, same_sides in (("g1", True), ("checkpoints/mnist-forget-1", False)):
        pixels = pil_to_tensor(Image.open(folder / f"{name}.png"))
        left, right = pixels.chunk(2, dim=2)
        assert left.shape == (3, 2 * 30 + 2, 8 * 30 + 2) and torch.equal(left, right) == same_sides


def ctrl_c(patch, module, name, *times):
    """Ctrl-C before these calls of module.name: 3, 3 is twice before its third."""
    function, numbers = getattr(module, name), iter(range(1, 10**6))

    def pressed(*args, **kwargs):
        for _ in range(times.count(next(numbers))):
            signal.raise_signal(signal.SIGINT)
        return function(*args, **kwargs)

    patch.setattr(module, name, pressed)


def test_ctrl_c_while_unlearning_and_the_seed(folder, monkeypatch):
    line = "vdu.py --paper --forget-class 5 --batch-size 4 --anchors 10 --output stopped.pt"
    ctrl_c(monkeypatch, ddpm, "stratified_timesteps", 3)
    said = command(line, folder, 130)
    assert "interrupted: nothing was written" in said and "Traceback" not in said
    assert not list(folder.glob("stopped.*"))
    # of one image there is no order that could differ: t and eps must, with the seed
    (folder / "one").mkdir()
    save_image(torch.rand(1, 28, 28), folder / "one/image.png")
    for i, seed in enumerate((1, 2, 1)):
        command(f"vdu.py --forget-images one --seed {seed} {FEW} --output {i}.pt", folder)
    a, b, c = (load(folder / f"{i}.pt")["weights"] for i in range(3))
    assert same(a, c) and not same(a, b)


@pytest.fixture(scope="module")
def wrong(folder):
    """The folder, with files in it that are wrong in one way each."""
    bomb = type("Bomb", (), {"__reduce__": lambda self: (open, ("bomb-went-off", "w"))})()
    whole, g1 = folder / "checkpoints/mnist.pt", load(folder / "g1.pt")
    raw = load(whole)
    plus = lambda x: {k: v + x for k, v in raw["weights"].items()}
    loud = dict(raw["weights"], **{"out.2.bias": raw["weights"]["out.2.bias"] + 1000})
    for name in ("elsewhere", "other/g1", "spoilt/a", "half/MNIST/raw"):
        (folder / name).mkdir(parents=True)
    for name, contents in {
            "bomb": bomb, "foreign": {"weights": torch.zeros(3)},
            "loud": dict(raw, weights=loud, posterior=dict(raw["posterior"], mean=loud)),
            "nan": dict(g1, weights=plus(torch.nan)),
            "unfinished": dict(raw, posterior=None, train={}),
            "letters": dict(raw, data=dict(raw["data"], classes=list("abcdefghij"))),
            "other-images": dict(raw, data=dict(raw["data"], digest="0" * 16), train={}),
            "moment-0": dict(raw, train={"unet": plus(0)}),  # as --save-every saves them
            "moment-1": dict(raw, train={"unet": plus(0.02)}),
            # another training that has the name of the parent
            "elsewhere/mnist": dict(raw, weights=plus(1)),
            "elsewhere/g1": dict(g1, forgotten=dict(g1["forgotten"], checkpoint="/x/mnist.pt")),
    }.items():
        torch.save(contents, folder / f"{name}.pt")
    for name, contents in {
            "cut.pt": whole.read_bytes()[:9999], "half/MNIST/raw/train-images-idx3-ubyte": b"half",
            "model-00001-of-00002.bin": whole.read_bytes(),
            **dict.fromkeys(["cat.png", "other/g1/after.png", "spoilt/a/image.png"], b"mine"),
    }.items():
        (folder / name).write_bytes(contents)
    return folder


# The command, and after each bar what its error has to say.
WRONG = f"""
train_ddpm.py --output x.pt --steps 0 | argument --steps: must be from 1 to inf, not 0
train_ddpm.py --output x.pt --seed {2**32} | argument --seed: must be from 0 | not {2**32}
vdu.py --forget-class 2 --gamma 1.5 | argument --gamma: must be from 0 to 1, not 1.5
vdu.py --forget-class 2 {FEW} --t-range 0 0.0004 | --t-range
vdu.py --forget-class 2 {FEW} --steps 9 --lr 1e30 | the loss became | at step | nothing was
train_ddpm.py --output x.pt --steps 9 --lr 1e30 | at step 1, after saving step 0 | than 1e+30
vdu.py --forget-class 2 --bound-weights | --bound-weights belongs to --paper
vdu.py --forget-class 2 --device abacus | no device 'abacus'
vdu.py --forget-class eleven | no class 'eleven' | 0; 1; 2; 3
vdu.py --forget-class 0 1 2 3 4 5 6 7 8 9 | names all classes
vdu.py --forget-class 1 --checkpoint without-1.pt | was trained without 1
train_ddpm.py --steps 1 | checkpoints/mnist.pt exists | --resume | --overwrite
train_ddpm.py --output cat.pt --steps 1 | cat.png exists
vdu.py --forget-class 1 --output runs/ | runs/ is a folder
vdu.py --forget-class 1 | checkpoints/mnist-forget-1.pt exists | --overwrite
vdu.py --forget-class 1 --output cat.png/x.pt | cat.png/x.pt cannot be written
vdu.py --forget-class 1 --output {'x' * 300}.pt | cannot be written
vdu.py --forget-class 1 --output checkpoints/mnist.pt --overwrite | is the --checkpoint itself
evaluate.py | results/mnist-forget-1/report.json exists | --overwrite
evaluate.py --after g1.pt --output other | other/g1/after.png exists
evaluate.py --after g1.pt elsewhere/g1.pt | two files have the same name
vdu.py --forget-class 1 --checkpoint missing.pt | no checkpoint at missing.pt | train_ddpm.py
vdu.py --forget-class 1 --checkpoint cut.pt | cut.pt is damaged or cut short
vdu.py --forget-class 1 --checkpoint model-00001-of-00002.bin | one shard of several
vdu.py --forget-class 1 --checkpoint foreign.pt | foreign.pt holds no model
vdu.py --forget-class 1 --checkpoint bomb.pt | bomb.pt was refused
vdu.py --forget-class 2 --checkpoint unfinished.pt | train_ddpm.py --resume --output unfinished.pt
vdu.py --forget-class 2 --checkpoint g1.pt | g1.pt has already forgotten something
vdu.py --forget-class 2 --posterior moment-0.pt checkpoints/mnist.pt | mean of a whole training
vdu.py --forget-class 2 --posterior moment-0.pt two.pt | two.pt | unlearned
evaluate.py --after nan.pt | nan.pt is broken
evaluate.py --after g1.pt --output o --retrained without-1.pt | was not trained without 3
evaluate.py --after g1.pt --output o --retrained letters.pt | not trained on one dataset
evaluate.py --after elsewhere/g1.pt | /x/mnist.pt, which is gone or another | --before
train_ddpm.py --resume | checkpoints/mnist.pt is no interrupted run
train_ddpm.py --resume --output other-images.pt | other-images.pt was trained on other images
train_ddpm.py --output x.pt --data-root half | mnist | damaged | half/MNIST/raw
train_ddpm.py --output x.pt --dataset cifar10 | cannot be downloaded | data/cifar-10-batches-py
train_ddpm.py --output x.pt --dataset tiny-imagenet | cannot be downloaded | tiny-imagenet-200
train_ddpm.py --output x.pt --dataset folder --data-root spoilt | cannot read the image
vdu.py --forget-class 2 --data-root nowhere | not in nowhere any more | --data-root
""".strip().splitlines()


@pytest.mark.parametrize("row", WRONG, ids=lambda row: row.partition(" |")[0][:70])
def test_what_is_wrong_is_said_and_nothing_is_written(wrong, row):
    line, *words = row.split(" | ")
    refused(line, wrong, *words)
    assert not (wrong / "bomb-went-off").exists()


def test_the_posterior_of_moments_and_a_broken_network(wrong):
    said = command("vdu.py --forget-class 2 --posterior moment-0.pt moment-1.pt --gamma 1 "
                   f"{FEW}", wrong)
    assert "posterior of 2 checkpoints" in said
    weights = load(wrong / "checkpoints/mnist-forget-2.pt")["weights"]
    for k, v in load(wrong / "moment-0.pt")["weights"].items():
        assert torch.allclose(weights[k], v + 0.01, atol=1e-5)  # at the mean of the two
    # nothing looks like D_f in the noise that this one draws: no line may praise that
    said = command(f"vdu.py --checkpoint loud.pt --forget-class 1 --gamma 1 {FEW}", wrong)
    assert "it is broken" in said and "still there" not in said


def test_a_full_disk_leaves_the_old_file(folder, request):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    request.addfinalizer(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    refused(f"vdu.py --forget-class 1 {FEW} --overwrite", folder,
            "cannot write checkpoints/mnist-forget-1.pt", "untouched")


def test_a_model_trained_without_the_class_is_measured_and_relearns(folder):
    """And a network that draws no digits is told from one that does."""
    said = command(f"evaluate.py --before {train_ddpm.SHIPPED} --after without-1.pt --samples 12 "
                   "--sampling-steps 5 --bits 0 --relearn 2 --retrained without-1.pt", folder)
    report = report_of(folder / "results/without-1")
    again, count = report["relearning"], report["after"]["forgotten_count"]
    assert report["forgotten"] == ["1"] and again["steps"] == [0, 2]
    assert again["shares"][0] == pytest.approx(count / 12)  # at first of the same noise
    assert "WARNING: u-FID grew" in said and "retrained (without-1.pt): PUL" in said
    assert "the floor is missing" in said


def test_several_models_in_one_table(folder):
    models = ["checkpoints/mnist-forget-1.pt", "two.pt", "g1.pt"]
    said = command(f"evaluate.py --after {' '.join(models)} {DRAW} --relearn 1 --output several",
                   folder)
    rows = [line for line in said.splitlines() if line.split(" ")[0] in models]
    assert [row.split()[0] for row in rows] == models and "u-FID grew" not in said
    assert said.count("sampling from") == 4  # the parent once
    reports = [report_of(folder / "several" / name) for name in ("mnist-forget-1", "two", "g1")]
    for report, row, names in zip(reports, rows, ("1", "17", "3")):
        assert report["forgotten"] == list(names) and f"-> {report['after']['u_fid']:.2f}" in row
    g1 = reports[2]  # gamma 1 changed nothing
    assert g1["drift"] == 0 and len(g1["relearning"]["shares"]) == 2
    assert {**g1["before"], "checkpoint": "g1.pt"} == g1["after"]


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Trained on two classes of images: blue, and red, whose name no terminal shows."""
    cwd = tmp_path_factory.mktemp("colours")
    for part, n in (("train", 40), ("test", 10)):
        for channel, name in ((0, "\u7ea2"), (2, "blue")):
            (cwd / "images" / part / name).mkdir(parents=True)
            for i in range(n):
                image = torch.rand(3, 20, 24) / 10
                image[channel] += 0.3 + 0.6 * i / n
                save_image(image, cwd / "images" / part / name / f"{i}.png")
    (cwd / "reds").symlink_to(cwd / "images/train/\u7ea2")
    said = command(COLOURS, cwd, encoding="cp1252")
    assert r"80 images of 3x8x8 (folder) in 2 classes (blue, \u7ea2), small U-Net" in said
    return cwd


def test_interrupted_training_resumes_to_the_same_result(colours, monkeypatch):
    """Twice: before the posterior begins, and when it holds two checkpoints."""
    for calls, step, line in ((7, 7, COLOURS), (35, 42, "train_ddpm.py --resume --lr 5 --seed 1")):
        ctrl_c(monkeypatch, ddpm, "training_step", calls)
        said = command(f"{line} --output stopped.pt", colours, 130)
        assert f"saved step {step} of 44" in said and load(colours / "stopped.pt")["step"] == step
        refused(f"{COLOURS} --output stopped.pt", colours, "--resume", "--overwrite")
    assert re.search(r"with the settings in stopped.pt, not with --lr 5(.0)? --seed 1\n", said)
    (colours / "stopped.pt").rename(colours / "moved.pt")  # it goes on where it lies now
    assert "not with" not in command("train_ddpm.py --resume --output moved.pt", colours)
    assert not (colours / "stopped.pt").exists()
    whole, resumed = load(colours / "checkpoints/images.pt"), load(colours / "moved.pt")
    assert same(whole["weights"], resumed["weights"]) and whole["losses"] == resumed["losses"]
    assert same(whole["posterior"]["std"], resumed["posterior"]["std"])
    assert "train" not in resumed and (colours / "moved.png").exists()


def test_a_folder_of_images_from_training_to_the_report(colours):
    trained = ddpm.load_checkpoint(colours / "checkpoints/images.pt")
    assert trained.data["classes"] == ["blue", "\u7ea2"] and trained.data["images"] == 80
    # the other classes may be gone, as they are where this method is needed
    (colours / "left/train").mkdir(parents=True)
    (colours / "left/train/\u7ea2").symlink_to(colours / "reds")
    for option in ("--forget-class \u7ea2 --data-root left", "--forget-images reds"):
        command(f"vdu.py --checkpoint checkpoints/images.pt {option} {FEW}", colours)
    a, b = (past(colours / f"checkpoints/images-forget-{name}.pt") for name in ("\u7ea2", "reds"))
    assert (a["classes"], a["images"], a["rho"]) == (["\u7ea2"], 40, 0.5)  # counted in training
    assert (b["classes"], b["images"], b["rho"]) == ([], 40, 0.1)
    refused(f"evaluate.py {DRAW}", colours, "--forget-class")  # the newest was told no class
    command(f"evaluate.py --forget-class Blue {DRAW}", colours)
    report = report_of(colours / "results/images-forget-reds")
    assert report["forgotten"] == ["blue"] and report["classifier_accuracy"] == 1


def test_cifar10_as_it_is_published(tmp_path, monkeypatch):
    """Ten images to a file. And weights of it as diffusers publishes them."""
    folder, names = tmp_path / "my data/cifar-10-batches-py", ddpm.CIFAR10_CLASSES
    folder.mkdir(parents=True)
    pixels = torch.randint(256, (10, 3072), dtype=torch.uint8)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *checksum: True)
    batch = {"data": pixels.numpy(), "labels": list(range(10))}
    files = {"batches.meta": {"label_names": names}, "test_batch": batch}
    for name, contents in (files | {f"data_batch_{i}": batch for i in range(1, 6)}).items():
        (folder / name).write_bytes(pickle.dumps(contents))
    read = lambda **how: train_ddpm.load_dataset("cifar10", folder.parent, **how)
    images, labels, data = read()
    assert data["classes"] == names and labels.tolist() == [*range(10)] * 5
    assert torch.equal(images, pixels.view(10, 3, 32, 32).repeat(5, 1, 1, 1))
    assert len(read(train=False)[0]) == 10 and torch.equal(read(only=["horse"])[0], images[7::10])
    parent = tmp_path / "diffusion_pytorch_model.bin"
    torch.save(load(ROOT / "tests/data/ddpm_reference.pt")["diffusers"]["state_dict"], parent)
    said = command(f"vdu.py --checkpoint {parent.name} --forget-class horse --data-root 'my data' "
                   f"{FEW}", tmp_path)
    output = "checkpoints/diffusion_pytorch_model-forget-horse.pt"
    assert "sigma* is guessed" in said and past(tmp_path / output)["images"] == 5
    assert f"evaluate.py --after {output} --data-root 'my data'\n" in said
    assert evaluate.parent_of(ddpm.load_checkpoint(tmp_path / output), "cpu").path == str(parent)


def test_tiny_imagenet_as_it_is_published(tmp_path):
    """A class is a shade of grey; the val part may be sorted into class folders."""
    folder, shades = tmp_path / "tiny-imagenet-200", {"n01": 1, "n03": 3, "n02": 2}
    words = {"n01": "goldfish, Carassius auratus", "n02": "salamander", "n03": "Egyptian cat"}
    for i, wnid in enumerate(shades):
        for name in (f"train/{wnid}/images/0", f"train/{wnid}/images/1", f"val/images/{2 - i}"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            save_image(torch.full((3, 64, 64), shades[wnid] / 4), folder / f"{name}.JPEG")
        (folder / f"train/{wnid}/{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t9\t6\t5\n")
    (folder / "wnids.txt").write_text("\n".join(shades))
    (folder / "words.txt").write_text("\n".join(map("\t".join, words.items())))
    (folder / "val/val_annotations.txt").write_text(
        "".join(f"{2 - i}.JPEG\t{wnid}\t0\t32\t44\t62\n" for i, wnid in enumerate(shades)))

    def read(**how):  # (shades, labels, classes)
        images, labels, data = train_ddpm.load_dataset("tiny-imagenet", tmp_path, **how)
        return images[:, 0, 0, 0].div(255 / 4).round().tolist(), labels.tolist(), data["classes"]

    classes = [*words.values()]
    assert read() == ([1, 1, 2, 2, 3, 3], [0, 0, 1, 1, 2, 2], classes)
    assert read(only=["salamander"]) == ([2, 2], [1, 1], classes)
    assert read(train=False) == ([1, 3, 2], [0, 2, 1], classes)
    for i, wnid in enumerate(shades):
        (folder / "val" / wnid).mkdir()
        (folder / f"val/images/{2 - i}.JPEG").rename(folder / "val" / wnid / "x.JPEG")
    (folder / "val/val_annotations.txt").unlink()
    assert read(train=False) == ([1, 2, 3], [0, 1, 2], classes)


def test_the_base_network_is_ddpms_and_help_teaches():
    with torch.device("meta"):
        base = ddpm.UNet(**train_ddpm.base((3, 32, 32))[0])
    assert sum(p.numel() for p in base.parameters()) == 35_746_307  # as the published one has
    norms = [m for m in base.modules() if isinstance(m, torch.nn.GroupNorm)]
    assert {m.num_groups for m in norms} == {32}
    assert base.input_blocks[4][1].num_heads == 1 and base.input_blocks[4][0].out_layers[2].p == 0.1
    for module in (train_ddpm, vdu, evaluate, sd_unlearn):
        assert module.__doc__.strip() in command(f"{module.__name__}.py --help", ROOT)
