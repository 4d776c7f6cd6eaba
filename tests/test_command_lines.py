"""The commands as people type them, in a temporary folder, without a network; and what
wrong input gets."""

import importlib
import io
import itertools
import json
import pickle
import re
import resource
import runpy
import shlex
import signal
import sys
from pathlib import Path

import torch
from PIL import Image
from pytest import MonkeyPatch, approx, fixture, mark, raises
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import save_image

import ddpm
import evaluate
import train_ddpm
import vdu
from conftest import ROOT
from ddpm import read_file
from test_ddpm import CONFIG, write
from train_ddpm import load_dataset

RED = "\u7ea2"
CLASSES = ["blue", "green", RED]
TRAINED = "checkpoints/images.pt"
WITHOUT = f"checkpoints/images-without-{RED}.pt"
FORGOT = f"checkpoints/images-forget-{RED}.pt"
FEW = "--paper --steps 1 --batch-size 4 --anchors 10"
DRAW = "--samples 12 --sampling-steps 2 --bits 0"
TRAIN = ("train_ddpm.py --dataset folder --data-root images --image-size 8 --steps 32 "
         "--batch-size 4")
VDU = f"vdu.py --checkpoint {TRAINED}"


def command(line, cwd, code=0):
    """All that a command line prints. It has to end with this exit code."""
    script, *args = shlex.split(line)
    module = importlib.import_module(Path(script).stem)
    screen = io.StringIO()
    ended = 0
    with MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [script, *args])
        patch.setattr(sys, "stdout", screen)
        patch.setattr(sys, "stderr", screen)
        try:
            ddpm.run_command_line(module.main, module.parser())
        except SystemExit as e:
            ended = e.code
    said = screen.getvalue()
    assert ended == code, said
    return said


def files_in(folder):
    """{path: when it was written last} of all files in a folder and below it."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path: path.stat().st_mtime_ns for path in paths}


def refused(line, cwd, *words):
    """The last line says what is wrong, in these words, and no file changes."""
    before = files_in(cwd)

    last = command(line, cwd, code=2).splitlines()[-1]

    assert re.match(r"(\w+\.py: )?error: ", last)
    assert [word for word in words if word not in last] == [], last
    assert files_in(cwd) == before


def ctrl_c(patch, module, name, *at):
    """Press Ctrl-C before these calls of module.name."""
    function = getattr(module, name)
    numbers = itertools.count(1)

    def pressed(*args, **kwargs):
        if next(numbers) in at:
            signal.raise_signal(signal.SIGINT)
        return function(*args, **kwargs)

    patch.setattr(module, name, pressed)


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def tiny(image_shape):
    """In the place of the small network, a smaller one."""
    unet, training = train_ddpm.small(image_shape)
    unet.update(model_channels=8, channel_mult=(1, 2), attention_resolutions=())
    return unet, training


@fixture(scope="module")
def folder(tmp_path_factory):
    """Images of three colours, and what the commands made of them."""
    cwd = tmp_path_factory.mktemp("run")
    for channel, name in enumerate([RED, "green", "blue"]):
        (cwd / "images" / name).mkdir(parents=True)
        for i in range(16):
            image = torch.rand(3, 20, 24) / 10
            image[channel] += 0.3 + 0.6 * i / 16
            save_image(image, cwd / f"images/{name}/{i}.png")

    with MonkeyPatch.context() as patch:
        patch.setitem(train_ddpm.NETWORKS, "small", tiny)
        said = command(TRAIN, cwd)
        assert f"images of 3x8x8 ({cwd}/images) in 3 classes (blue, green, {RED})" in said
        command(f"{TRAIN} --exclude-class {RED} --steps 2 --output {WITHOUT}", cwd)
        command(f"{VDU} --forget-class {RED} --steps 3 --batch-size 8 --anchors 10", cwd)
        cut_short = (cwd / TRAINED).read_bytes()[:9999]
        (cwd / "checkpoints/newest.pt").write_bytes(cut_short)  # evaluate.py passes over it
        command("evaluate.py --samples 20 --sampling-steps 3 --bits 2", cwd)
        command(f"{VDU} --forget-class blue green --forget-samples 8 {FEW} --output two.pt", cwd)
        command(f"{VDU} --forget-class green --gamma 1 --steps 1 --anchors 10 --output g1.pt", cwd)
        yield cwd


def test_evaluate_leaves_a_report_and_two_pictures(folder):
    results = folder / f"results/images-forget-{RED}"
    report = report_of(results)

    assert {path.name for path in results.iterdir()} == {"report.json", "before.png", "after.png"}
    assert report["before"]["checkpoint"] == str(folder / TRAINED)
    assert report["after"]["checkpoint"] == FORGOT
    assert report["forgotten"] == [RED]
    assert len(report["retrained"]["PUL"]) == 1  # that model was found beside the parent
    assert report["classifier_accuracy"] == 1
    assert report["settings"]["sampling_steps"] == 3
    assert report["data"]["images"] == 48
    for part in (report["before"], report["after"]):
        assert list(part["counts"]) == CLASSES
        assert sum(part["counts"].values()) == 20
        assert part["forgotten_count"] == part["counts"][RED]
        assert part["bits_forgotten"] > 0


@mark.parametrize("file, classes, rho, steps", [
    (FORGOT, [RED], 1 / 3, 3),
    ("two.pt", ["blue", "green"], 2 / 3, 1),
])
def test_an_unlearned_checkpoint_remembers(folder, file, classes, rho, steps):
    record = ddpm.load_checkpoint(folder / file).forgotten

    assert record["classes"] == classes
    assert record["rho"] == rho
    assert record["checkpoint"] == str(folder / TRAINED)
    assert record["settings"]["steps"] == steps


def test_the_file_that_forgot_does_not_hold_what_it_forgot(folder):
    """None of the parent's tensors that moved is left in it, under any name."""
    parent = read_file(folder / TRAINED)["weights"]
    after = read_file(folder / FORGOT)["weights"]
    moved = [v for k, v in parent.items() if not torch.equal(v, after[k])]
    contents = (folder / FORGOT).read_bytes()

    left = [v for v in moved if v.numpy().tobytes() in contents]

    assert moved
    assert not left


@mark.parametrize("name, unchanged", [("g1", True), (f"checkpoints/images-forget-{RED}", False)])
def test_the_picture_shows_the_same_noise_before_and_after(folder, name, unchanged):
    pixels = pil_to_tensor(Image.open(folder / f"{name}.png"))

    left, right = pixels.chunk(2, dim=2)

    assert left.shape == (3, 2 * 10 + 2, 8 * 10 + 2)  # ten samples: two rows of eight places
    assert torch.equal(left, right) == unchanged


def test_a_block_of_the_picture_for_each_model(folder):
    line = f"ddpm.py {TRAINED} {TRAINED} {FORGOT} --n 4"
    command(f"{line} --output blocks.png", folder)

    first, second, third = pil_to_tensor(Image.open(folder / "blocks.png")).chunk(3, dim=2)

    assert first.shape == (3, 10 + 2, 4 * 10 + 2)
    assert torch.equal(first, second)  # of the same noise
    assert not torch.equal(first, third)


def test_a_model_of_diffusers_goes_back_to_diffusers(folder):
    write(folder / "theirs", prediction_type="epsilon")

    command(f"vdu.py --checkpoint theirs --forget-images images {FEW} --output back.pt", folder)

    out = folder / "back"
    ours = ddpm.load_checkpoint(folder / "back.pt").unet.state_dict()
    assert {path.name for path in out.iterdir()} == {
        "config.json", "scheduler_config.json", "diffusion_pytorch_model.bin"}
    assert same(ours, ddpm.load_checkpoint(out).unet.state_dict())
    refused("vdu.py --checkpoint theirs --forget-images images --output theirs.pt", folder)


def test_ctrl_c_while_unlearning_writes_nothing(folder, monkeypatch):
    ctrl_c(monkeypatch, vdu, "stratified_timesteps", 3)

    said = command(f"{VDU} --forget-class blue {FEW} --steps 9 --output stopped.pt", folder, 130)

    assert "interrupted: nothing was written" in said
    assert not list(folder.glob("stopped.*"))


def test_the_seed_decides_what_is_drawn(folder):
    """t and the noise: of one image there is no order that could differ."""
    (folder / "one").mkdir()
    save_image(torch.rand(3, 8, 8), folder / "one/image.png")

    weights = []
    for i, seed in enumerate((1, 2, 1)):
        command(f"{VDU} --forget-images one --seed {seed} {FEW} --output {i}.pt", folder)
        weights.append(read_file(folder / f"{i}.pt")["weights"])

    assert same(weights[0], weights[2])
    assert not same(weights[0], weights[1])


@fixture(scope="module")
def wrong(folder):
    """The folder, with files in it that are wrong in one way each."""
    trained = read_file(folder / TRAINED)
    data = trained["data"]
    g1 = read_file(folder / "g1.pt")
    files = ["cat.png", "other/g1/after.png", "spoilt/a/image.png",
             "half/MNIST/raw/train-images-idx3-ubyte", "elsewhere/mine"]
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"mine")
    for name, contents in {
        "linear": trained | {"config": trained["config"] | {"schedule": "linear"},
                             "posterior": None},
        "others": trained | {"data": data | {"digest": "0"}, "train": {}},
        "elsewhere/images": read_file(folder / WITHOUT),  # has the name of the parent
        "elsewhere/g1": g1 | {"forgotten": g1["forgotten"] | {"checkpoint": "/x/images.pt"}},
    }.items():
        torch.save(contents, folder / f"{name}.pt")
    return folder


# The command, and after each bar what its error has to say.
WRONG = f"""
train_ddpm.py --steps 0 | argument --steps: must be from 1 to 1e+18, not 0
train_ddpm.py --seed {2**32} | argument --seed: must be from 0 | not {2**32}
train_ddpm.py --dataset folder | needs --data-root
train_ddpm.py --dataset folder --data-root images | {TRAINED} exists | --resume | --overwrite
train_ddpm.py --output cat.pt | cat.png exists
train_ddpm.py --resume --output {TRAINED} | {TRAINED} is no interrupted run
train_ddpm.py --resume --output others.pt | others.pt was trained on other images
train_ddpm.py --data-root half | mnist | damaged | half/MNIST/raw
train_ddpm.py --dataset cifar10 | cannot be downloaded | data/cifar-10-batches-py
train_ddpm.py --dataset tiny-imagenet | cannot be downloaded | tiny-imagenet-200
train_ddpm.py --dataset folder --data-root spoilt | cannot read the image | spoilt/a/image.png
{TRAIN} --output x.pt --lr 1e18 | the loss became | at step | than 1e+18
vdu.py --forget-class blue --gamma 1.5 | argument --gamma: must be from 0 to 1, not 1.5
vdu.py --forget-class blue {FEW} --t-range 0 0.0004 | t_range needs
vdu.py --forget-class blue {FEW} --steps 9 --lr 1e18 | became infinite at step | nothing was
vdu.py --forget-class blue --paper --share 0.5 | --share has no part
vdu.py --forget-images cat.png | no images in the folder cat.png
vdu.py --forget-class {RED} blue green --output x.pt | 100% of what the model was trained on
vdu.py --forget-class blue --device abacus | no device 'abacus'
vdu.py --forget-class pink | no class 'pink' | blue; green
vdu.py --forget-class blue --output x.txt | x.txt has to end in .pt
vdu.py --forget-class blue --output elsewhere/ | is a folder
vdu.py --forget-class {RED} | {FORGOT} exists | --overwrite
vdu.py --forget-class blue --output cat.png/x.pt | cat.png
vdu.py --forget-class blue --output {'x' * 300}.pt | name too long
vdu.py --forget-class blue --output {TRAINED} --overwrite | is the --checkpoint itself
vdu.py --forget-class blue --checkpoint no.pt | no checkpoint at no.pt | train_ddpm.py
vdu.py --forget-class blue --checkpoint checkpoints/newest.pt | damaged or cut short
vdu.py --forget-class blue --checkpoint g1.pt | g1.pt has already forgotten something
vdu.py --forget-class blue --posterior {TRAINED} g1.pt | {TRAINED} is no sample | a mean
vdu.py --forget-class blue --posterior linear.pt linear.pt | linear.pt is no sample
vdu.py --forget-class blue --posterior g1.pt {TRAINED} | g1.pt is no sample | unlearned
vdu.py --forget-class blue --data-root nowhere | no images of the class blue in nowhere
ddpm.py {TRAINED} --output cat.png | cat.png exists
ddpm.py {TRAINED} tests/none.pt | no checkpoint at tests/none.pt
evaluate.py | results/images-forget-{RED}/report.json exists | --overwrite
evaluate.py --after g1.pt --output other | other/g1/after.png exists
evaluate.py --before {TRAINED} --after g1.pt elsewhere/g1.pt | two files have the same name
evaluate.py --after g1.pt --retrained {WITHOUT} | was not trained without green
evaluate.py --after {FORGOT} --output o --retrained {f'{WITHOUT} ' * 3} | one model or two
evaluate.py --after {TRAINED} | {TRAINED} forgot nothing | --before
evaluate.py --after elsewhere/g1.pt | /x/images.pt, which is gone or another | --before
""".strip().splitlines()


@mark.parametrize("row", WRONG, ids=str)
def test_what_is_wrong_is_said_and_nothing_is_written(wrong, row):
    line, *words = row.split(" | ")

    refused(line.replace("vdu.py", VDU), wrong, *words)


def test_a_posterior_of_copies_made_on_the_way_has_their_mean(folder):
    """gamma 1 stays there."""
    trained = read_file(folder / TRAINED)
    for name, distance in (("start", 0), ("end", 0.02)):
        weights = {k: v + distance for k, v in trained["weights"].items()}
        torch.save(trained | {"train": {"unet": weights}}, folder / f"{name}.pt")

    said = command(f"{VDU} --forget-class green --posterior start.pt end.pt --gamma 1 {FEW} "
                   "--output middle.pt", folder)

    middle = read_file(folder / "middle.pt")["weights"]
    assert "posterior of 2 checkpoints" in said
    for k, v in trained["weights"].items():
        assert torch.allclose(middle[k], v + 0.01, atol=1e-5)


@mark.parametrize("A, like, flags, advice", [
    ([0.1, 0.2], [0.1, 0.05], "", "still there: try more --steps, or a larger --share"),
    ([0.1, 0.2], [0.1, 0.05], "--paper", "still there: try more --steps, or leave --paper away"),
    ([0.1, 0.1], [0.1, 0.1], "--gamma 1", "still there: try a smaller --gamma"),
    ([0.1, 0.2], [0.0, 0.0], "", "nothing like D_f was seen before or after"),
    ([0.1, 3.0], [0.0, 0.0], "", "broken (A of a network that always says 0 is 1, here 3): try"),
])
def test_what_came_of_it_is_said_with_what_to_try(capsys, A, like, flags, advice):
    record = {"before": {"A": A[0]}, "after": {"A": A[1]}, "like_D_f": like,
              "steps": 1, "moved_rms_sigma": 1}
    args = vdu.parser().parse_args(["--forget-class", "1", *flags.split()])

    vdu.print_outcome(record, args)

    assert advice in capsys.readouterr().out


def test_the_papers_gamma_is_that_of_its_sum(folder):
    """-(1-g) N_f T A_mean + g B_sum is L for A_mean per dimension, B_sum per parameter,
    up to a factor, where g is the paper's."""
    checkpoint = ddpm.load_checkpoint(folder / TRAINED)
    P = sum(p.numel() for p in checkpoint.unet.parameters())
    images = torch.zeros(5, 3, 8, 8)
    d = 3 * 8 * 8

    g = vdu.gamma_paper(0.3, checkpoint, images)

    of_A = (1 - 0.3) / (1 - g)  # L's factor of A, as the mean over 5 images and 1000 steps
    of_B = 0.3 * d / P / g
    assert of_A / (5 * 1000) == approx(of_B)


def test_a_full_disk_leaves_the_old_file(folder):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        refused(f"{VDU} --forget-class {RED} {FEW} --overwrite", folder,
                "cannot write", "untouched")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_model_trained_without_the_class_is_measured_and_relearns(folder):
    command(f"evaluate.py --before {TRAINED} --after {WITHOUT} {DRAW} --relearn 2", folder)

    report = report_of(folder / f"results/images-without-{RED}")
    assert report["forgotten"] == [RED]
    assert report["relearning"]["steps"] == [0, 2]


def test_several_models_are_rows_of_one_table(folder):
    models = [FORGOT, "two.pt", "g1.pt"]

    said = command(f"evaluate.py --after {' '.join(models)} {DRAW} --output several", folder)

    rows = [line.split()[0] for line in said.splitlines() if line.startswith(tuple(models))]
    assert rows == models
    assert said.count(f"sampling from {folder / TRAINED}\n") == 1
    g1 = report_of(folder / "several/g1")
    assert g1["before"] | {"checkpoint": "g1.pt"} == g1["after"]  # gamma 1 changed nothing


@mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_asks_for_a_stop_between_two_steps(name):
    with ddpm.StopRequest() as stop:
        signal.raise_signal(getattr(signal, name))

    assert stop.requested


def test_interrupted_training_resumes_to_the_same_result(folder, monkeypatch):
    """Twice: before the posterior begins, and when it holds two checkpoints."""
    ctrl_c(monkeypatch, train_ddpm, "training_step", 7, 31)

    said = command(f"{TRAIN} --output stopped.pt", folder, 130)
    again = command("train_ddpm.py --resume --lr 5 --output stopped.pt", folder, 130)
    (folder / "stopped.pt").rename(folder / "moved.pt")  # it goes on where it lies now
    command("train_ddpm.py --resume --seed 1 --output moved.pt", folder)

    whole = read_file(folder / TRAINED)
    resumed = read_file(folder / "moved.pt")
    assert "saved step 7 of 32" in said
    assert "saved step 31 of 32" in again
    assert same(whole["weights"], resumed["weights"])
    assert same(whole["posterior"]["std"], resumed["posterior"]["std"])
    assert "train" not in resumed
    assert not (folder / "stopped.pt").exists()


def test_of_images_without_a_class_one_has_to_be_named_to_be_counted(folder):
    command(f"{VDU} --forget-images images/{RED} {FEW} --output reds.pt", folder)
    refused(f"evaluate.py --after reds.pt {DRAW}", folder, "--forget-class")
    command(f"evaluate.py --after reds.pt --forget-class Blue {DRAW}", folder)

    record = ddpm.load_checkpoint(folder / "reds.pt").forgotten
    assert record["classes"] == []
    assert record["rho"] == 0.1
    assert report_of(folder / "results/reds")["forgotten"] == ["blue"]


@fixture
def cifar10(tmp_path, monkeypatch):
    """The images in a file of it: ten, in six files as they are published."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *checksum: True)
    folder = tmp_path / "my data/cifar-10-batches-py"
    folder.mkdir(parents=True)
    pixels = torch.randint(256, (10, 3072), dtype=torch.uint8)
    batch = {"data": pixels.numpy(), "labels": list(range(10))}
    files = {f"data_batch_{i}": batch for i in range(1, 6)}
    files["test_batch"] = batch
    files["batches.meta"] = {"label_names": ddpm.CIFAR10_CLASSES}
    for name, contents in files.items():
        (folder / name).write_bytes(pickle.dumps(contents))
    return pixels.view(10, 3, 32, 32)


def test_cifar10_is_read_as_it_is_published(cifar10, tmp_path):
    images, labels, data = load_dataset("cifar10", tmp_path / "my data")
    test_images, _, _ = load_dataset("cifar10", tmp_path / "my data", train=False)
    horses, _, _ = load_dataset("cifar10", tmp_path / "my data", only=[7])

    assert data["classes"] == ddpm.CIFAR10_CLASSES
    assert labels.tolist() == [*range(10)] * 5
    assert torch.equal(images, cifar10.repeat(5, 1, 1, 1))
    assert torch.equal(test_images, cifar10)
    assert torch.equal(horses, images[7::10])


def test_published_weights_forget_a_class_and_are_found_again(cifar10, tmp_path, monkeypatch):
    write(tmp_path / "ddpm", config=CONFIG | {"sample_size": 32})
    monkeypatch.setattr(ddpm.Diffusion, "sample", lambda self, net, n, *args, **more: (
        cifar10[:n] / 255))  # to draw takes long

    said = command(f"vdu.py --checkpoint ddpm --forget-class horse --data-root 'my data' {FEW}",
                   tmp_path)

    output = "checkpoints/ddpm-forget-horse.pt"
    after = ddpm.load_checkpoint(tmp_path / output)
    assert f"evaluate.py --after {output} " in said
    assert evaluate.parent_of(after, "cpu").path == str(tmp_path / "ddpm")


@fixture
def tiny_imagenet(tmp_path):
    """As it is published; a class is a shade of grey."""
    folder = tmp_path / "tiny-imagenet-200"
    words = {"n01": "goldfish, Carassius auratus", "n03": "Egyptian cat", "n02": "salamander"}
    annotations = ""
    for i, wnid in enumerate(words):
        image = torch.full((3, 64, 64), i / 4)
        for name in (f"train/{wnid}/images/0", f"train/{wnid}/images/1", f"val/images/{2 - i}"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            save_image(image, folder / f"{name}.JPEG")
        (folder / f"train/{wnid}/{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t9\t6\t5\n")
        annotations += f"{2 - i}.JPEG\t{wnid}\t0\t32\t44\t62\n"
    rows = [f"{wnid}\t{name}\n" for wnid, name in words.items()]
    (folder / "val/val_annotations.txt").write_text(annotations)
    (folder / "wnids.txt").write_text("\n".join(words))
    (folder / "words.txt").write_text("".join(rows))
    return folder


def shades_and_labels(folder, train):
    """What load_dataset reads: shades in quarters of white."""
    images, labels, _ = load_dataset("tiny-imagenet", folder.parent, train)
    shades = images[:, 0, 0, 0] / 255 * 4
    return shades.round().tolist(), labels.tolist()


def test_tiny_imagenet_is_read_as_it_is_published(tiny_imagenet):
    _, _, data = load_dataset("tiny-imagenet", tiny_imagenet.parent)

    assert data["classes"] == ["goldfish, Carassius auratus", "salamander", "Egyptian cat"]
    assert shades_and_labels(tiny_imagenet, True) == ([0, 0, 2, 2, 1, 1], [0, 0, 1, 1, 2, 2])
    assert shades_and_labels(tiny_imagenet, False) == ([0, 1, 2], [0, 2, 1])


def test_tiny_imagenets_test_part_may_be_sorted_into_folders(tiny_imagenet):
    val = tiny_imagenet / "val"
    (val / "val_annotations.txt").unlink()
    for i, wnid in enumerate(["n01", "n03", "n02"]):
        (val / wnid).mkdir()
        (val / f"images/{2 - i}.JPEG").rename(val / wnid / "x.JPEG")

    assert shades_and_labels(tiny_imagenet, False) == ([0, 2, 1], [0, 1, 2])


def test_the_base_network_is_ddpms_where_shapes_do_not_tell():
    arguments, _ = train_ddpm.base((3, 32, 32))
    with torch.device("meta"):
        block, attention = ddpm.UNet(**arguments).input_blocks[4]

    assert attention.num_heads == 1
    assert attention.norm.num_groups == 32
    assert block.out_layers[2].p == 0.1


@mark.parametrize("name", ["train_ddpm", "vdu", "evaluate", "sd_unlearn"])
def test_help_teaches(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])

    with raises(SystemExit):
        runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")

    module = importlib.import_module(name)
    assert module.__doc__.strip() in capsys.readouterr().out
