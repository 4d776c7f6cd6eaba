"""The three commands as people type them, in a temporary folder, without a network; and
what bad input gets."""

import contextlib
import io
import json
import pickle
import resource
import runpy
import shutil
import signal
import subprocess
import sys
from functools import partial

import pytest
import torch
from torchvision.utils import save_image

import ddpm
import evaluate
import train_ddpm
from conftest import NO_NETWORK, ROOT


def quick(script, args):
    """evaluate.py with few images for the bound on -log p, unless the test says how
    many."""
    return [*map(str, args), *(["--bits", "2"] if script == "evaluate.py"
                               and not {"--bits", "--help"} & set(args) else [])]


def process(script, *args, cwd, **kwargs):
    return subprocess.run([sys.executable, str(ROOT / script), *quick(script, args)], cwd=cwd,
                          env=NO_NETWORK, text=True,
                          capture_output=True, timeout=200, **kwargs)


def command(script, *args, cwd):
    """The same command line, read and run by the same file as __main__, without the
    seconds that a new process takes to import torch."""
    out, err = io.StringIO(), io.StringIO()
    with (pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out),
          contextlib.redirect_stderr(err)):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [str(ROOT / script), *quick(script, args)])
        for name in ("http_proxy", "https_proxy"):
            patch.setenv(name, NO_NETWORK[name])
        code = 0
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as e:
            code = e.code or 0
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())


def refused(result, *words):
    """One clear line on standard error, exit code 2."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert result.returncode == 2, result.stderr
    assert len(lines) == 1 and "Traceback" not in result.stderr, result.stderr
    for word in words:
        assert word in lines[0], lines[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which the three commands were typed, with small numbers of steps."""
    cwd = tmp_path_factory.mktemp("run")
    r = process("train_ddpm.py", "--dataset", "mnist", "--steps", 40, "--batch-size", 32, cwd=cwd)
    assert r.returncode == 0, r.stderr
    assert "5,000" in r.stdout and r.stdout.count("no network") == 1
    r = command("vdu.py", "--forget-class", 1, "--steps", 3, "--batch-size", 8, "--anchors", 10,
                cwd=cwd)
    assert r.returncode == 0, r.stderr
    r = command("evaluate.py", "--samples", 20, "--sampling-steps", 3, "--save-samples", "s.pt",
                cwd=cwd)
    assert r.returncode == 0, r.stderr
    assert "PUL" in r.stdout
    return cwd


def test_the_three_commands_leave_what_they_say(folder):
    for name in ("checkpoints/mnist.pt", "checkpoints/mnist.png", "checkpoints/mnist-forget-1.pt",
                 "results/mnist-forget-1/report.json", "results/mnist-forget-1/before.png",
                 "results/mnist-forget-1/after.png"):
        assert (folder / name).stat().st_size > 0
    report = json.loads((folder / "results/mnist-forget-1/report.json").read_text())
    assert report["forgotten"] == ["1"]
    assert report["samples"] == 20
    assert report["sampling_steps"] == 3
    assert sum(h["count"] for h in report["after"]["histogram"].values()) == 20
    assert report["classifier_accuracy"] > 0.9
    assert report["u_fid_real_images"] == 4500
    samples = torch.load(folder / "s.pt", weights_only=True)
    for name in ("before", "after"):
        assert samples[name].shape == (20, 1, 28, 28) and samples[name].dtype == torch.uint8


def test_checkpoints_remember(folder):
    trained = ddpm.load_checkpoint(folder / "checkpoints/mnist.pt")
    assert trained.data["name"] == "mnist"
    assert trained.step == 40
    assert trained.forgotten is None
    assert not trained.unet.training
    assert trained.posterior["n"] >= 2
    assert all(torch.equal(p, trained.posterior["mean"][k])
               for k, p in trained.unet.named_parameters())
    assert trained.unet(torch.zeros(2, 1, 28, 28), torch.tensor([0, 999])).shape == (2, 1, 28, 28)
    unlearned = ddpm.load_checkpoint(folder / "checkpoints/mnist-forget-1.pt")
    assert unlearned.forgotten["classes"] == ["1"] and unlearned.forgotten["images"] == 500
    assert unlearned.forgotten["checkpoint"] == str(folder / "checkpoints/mnist.pt")
    assert unlearned.forgotten["settings"]["steps"] == 3
    assert set(unlearned.posterior["mean"]) == set(dict(unlearned.unet.named_parameters()))


def test_gamma_1_leaves_the_model_bit_for_bit(folder):
    """theta*, mu* and what evaluate.py calls "before" are the same tensors."""
    r = command("vdu.py", "--forget-class", 3, "--gamma", 1, "--steps", 2, "--batch-size", 4,
                "--anchors", 10, "--output", "g1.pt", cwd=folder)
    assert r.returncode == 0, r.stderr
    before, after = (torch.load(folder / name, weights_only=True)["weights"]
                     for name in ("checkpoints/mnist.pt", "g1.pt"))
    assert before.keys() == after.keys()
    assert all(torch.equal(v, after[k]) for k, v in before.items())


def test_options_of_unlearning(folder):
    r = command("vdu.py", "--forget-class", 1, 7, "--forget-samples", 20, "--function-space",
                "--anchors", 10, "--steps", 2, "--batch-size", 4,
                "--output", "two.pt", cwd=folder)
    assert r.returncode == 0, r.stderr
    assert ddpm.load_checkpoint(folder / "two.pt").forgotten["images"] == 40
    raw = torch.load(folder / "checkpoints/mnist.pt", weights_only=True)
    for i in range(2):  # two moments of a training, as --save-every saves them
        raw["train"] = {"unet": {k: v + i for k, v in raw["weights"].items()}}
        torch.save(raw, folder / f"moment-{i}.pt")
    few = ["--forget-class", 2, "--steps", 1, "--batch-size", 4, "--anchors", 10]
    for name, option in (("moments", []), ("iso", ["--isotropic"])):
        r = command("vdu.py", *few, "--posterior", "moment-0.pt", "moment-1.pt", *option,
                    "--output", f"{name}.pt", cwd=folder)
        assert r.returncode == 0, r.stderr
    std = {name: ddpm.load_checkpoint(folder / f"{name}.pt").posterior["std"]
           for name in ("moments", "iso")}
    assert all((v - 0.5**0.5).abs().max() < 1e-4 for v in std["moments"].values())
    assert len({v.flatten()[0].item() for v in std["iso"].values()}) == 1
    for files, words in ((["moment-0.pt", "moment-0.pt"], ["differ"]),
                         (["moment-0.pt", "checkpoints/mnist.pt"], ["mean of a whole training"]),
                         (["moment-0.pt", "two.pt"], ["has unlearned something"])):
        refused(command("vdu.py", *few, "--posterior", *files, "--output", "x.pt", cwd=folder),
                *words)


def test_a_broken_network_is_not_called_forgetting(folder):
    """It draws noise, in which nothing looks like D_f: no line may praise that."""
    raw = torch.load(folder / "checkpoints/mnist.pt", weights_only=True)
    for weights in (raw["weights"], raw["posterior"]["mean"]):
        weights["out.2.bias"] += 1000
    torch.save(raw, folder / "loud.pt")
    few = ["--forget-class", 1, "--gamma", 1, "--steps", 1, "--batch-size", 4, "--anchors", 10]
    for path, broken in (("loud.pt", True), ("checkpoints/mnist.pt", False)):
        r = command("vdu.py", "--checkpoint", path, *few, "--output", f"broken-{broken}.pt",
                    cwd=folder)
        assert r.returncode == 0, r.stderr
        assert ("this one is broken" in r.stdout) == broken
        assert ("samples that look like D_f" in r.stdout) != broken


def test_the_seed_is_heard(folder):
    """With one image there is no order that could differ: t and eps must."""
    (folder / "one").mkdir()
    save_image(torch.rand(1, 28, 28), folder / "one" / "image.png")
    weights = []
    for i, seed in enumerate((1, 1, 2)):
        r = command("vdu.py", "--forget-images", "one", "--seed", seed, "--steps", 1,
                    "--batch-size", 4, "--anchors", 10, "--output", f"seed-{i}.pt", cwd=folder)
        assert r.returncode == 0, r.stderr
        weights.append(ddpm.load_checkpoint(folder / f"seed-{i}.pt").unet.out[2].weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_interrupted_unlearning_is_saved(folder):
    args = ["--forget-class", 1, "--steps", 100_000, "--batch-size", 4, "--anchors", 10, "--output",
            "stopped-early.pt"]
    process = subprocess.Popen([sys.executable, "-u", str(ROOT / "vdu.py"), *map(str, args)],
                               cwd=folder, env=NO_NETWORK, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    while "unlearning:" not in process.stderr.readline(60):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted, and saved as it stood" in out
    assert ddpm.load_checkpoint(folder / "stopped-early.pt").forgotten["steps"] >= 1


def test_ctrl_c_while_saving_leaves_the_whole_file(folder, monkeypatch):
    save = torch.save

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        save(*args)

    monkeypatch.setattr(torch, "save", interrupted)
    r = command("vdu.py", "--forget-class", 5, "--steps", 1, "--batch-size", 4, "--anchors", 10,
                "--output", "saved.pt", cwd=folder)
    assert r.returncode == 130, r.stderr
    assert ddpm.load_checkpoint(folder / "saved.pt").forgotten["classes"] == ["5"]


def test_interrupted_training_resumes_to_the_same_result(folder):
    args = ["--dataset", "mnist", "--steps", 40, "--batch-size", 32, "--output", "stopped.pt"]
    process = subprocess.Popen([sys.executable, "-u", str(ROOT / "train_ddpm.py"), *map(str, args)],
                               cwd=folder, env=NO_NETWORK,
                               text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while "step=" not in process.stderr.readline(60):  # wait for the first steps
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume" in out
    assert 0 < torch.load(folder / "stopped.pt", weights_only=True)["step"] < 40
    refused(command("train_ddpm.py", *args, cwd=folder), "--resume", "--overwrite")
    refused(command("train_ddpm.py", *args, "--resume", "--lr", 5, cwd=folder), "--lr")
    saved = torch.load(folder / "stopped.pt", weights_only=True)
    for key, value in (("digest", "0" * 16), ("classes", ["a", "b"])):
        torch.save({**saved, "data": {**saved["data"], key: value}}, folder / "other-images.pt")
        refused(command("train_ddpm.py", *args[:-1], "other-images.pt", "--resume", cwd=folder),
                "other images", key)
    r = command("train_ddpm.py", *args, "--resume", cwd=folder)
    assert r.returncode == 0, r.stderr
    whole = torch.load(folder / "checkpoints/mnist.pt", weights_only=True)
    resumed = torch.load(folder / "stopped.pt", weights_only=True)
    assert all(torch.equal(whole["weights"][k], v) for k, v in resumed["weights"].items())
    assert all(torch.equal(whole["posterior"]["std"][k], v)
               for k, v in resumed["posterior"]["std"].items())
    refused(command("train_ddpm.py", *args, "--resume", cwd=folder), "finished")


def test_bad_settings(folder):
    refused(command("vdu.py", "--forget-class", "eleven", cwd=folder), "eleven", "0, 1, 2, 3")
    refused(command("vdu.py", "--forget-class", 1, "--gamma", 1.5, "--overwrite", cwd=folder),
            "gamma")
    refused(command("vdu.py", "--forget-class", 1, "--steps", 0, "--overwrite", cwd=folder),
            "--steps")
    refused(command("train_ddpm.py", "--steps", 0, "--output", "x.pt", cwd=folder), "--steps")
    refused(command("evaluate.py", "--sampling-steps", 0, "--overwrite", cwd=folder),
            "--sampling-steps")
    refused(command("train_ddpm.py", "--dataset", "nothing", cwd=folder), "mnist")
    for flag, value in (("--seed", 2**32), ("--seed", 10**30), ("--save-every", 0), ("--lr", "inf"),
                        ("--posterior-every", 0), ("--timesteps", 0), ("--timesteps", 24)):
        r = command("train_ddpm.py", flag, value, "--output", "x.pt", cwd=folder)
        refused(r, f"argument {flag}: must be", str(value))
    refused(command("train_ddpm.py", "--exclude-class", *range(10), "--output", "x.pt", cwd=folder),
            "all classes")
    refused(command("vdu.py", "--forget-class", 1, "--device", "meta", "--overwrite", cwd=folder),
            "meta")
    for flag, value in (("--sigma", "inf"), ("--kappa", "nan"), ("--anchors", 1), ("--share", 1)):
        refused(command("vdu.py", "--forget-class", 1, flag, value, cwd=folder), flag)
    refused(command("vdu.py", "--forget-class", 1, "--t-range", 0, 0.0004, cwd=folder), "--t-range")
    refused(command("evaluate.py", "--eta", "nan", cwd=folder), "--eta")
    refused(command("train_ddpm.py", "--data-root", "nowhere", "--output", "x.pt", cwd=folder),
            "nowhere")
    refused(command("vdu.py", "--forget-class", 1, "--device", "abacus", "--overwrite", cwd=folder),
            "abacus")


def test_outputs_are_not_overwritten_unasked(folder):
    before = (folder / "checkpoints/mnist-forget-1.pt").read_bytes()
    refused(command("vdu.py", "--forget-class", 1, cwd=folder), "--overwrite")
    refused(command("evaluate.py", "--after", "checkpoints/mnist-forget-1.pt", cwd=folder),
            "--overwrite")
    refused(command("vdu.py", "--forget-class", 1, "--output", "checkpoints/mnist.pt",
                    "--overwrite", cwd=folder), "--checkpoint")
    assert (folder / "checkpoints/mnist-forget-1.pt").read_bytes() == before


class Bomb:
    def __reduce__(self):
        return (open, ("bomb-went-off", "w"))


def test_bad_checkpoints(folder):
    whole = (folder / "checkpoints/mnist.pt").read_bytes()
    (folder / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.pt").write_bytes(b"")
    torch.save({"weights": torch.zeros(3)}, folder / "foreign.pt")
    torch.save(Bomb(), folder / "bomb.pt")
    (folder / "bomb.pkl").write_bytes(pickle.dumps(Bomb()))
    for name, word in [("missing.pt", "no checkpoint"), ("cut.pt", "cut short"),
                       ("empty.pt", "cut short"), ("foreign.pt", "lacks"),
                       ("bomb.pt", "refused"), ("bomb.pkl", "refused")]:
        refused(command("vdu.py", "--forget-class", 1, "--checkpoint", name, cwd=folder), name,
                word)
    assert not (folder / "bomb-went-off").exists()
    refused(command("evaluate.py", "--after", "cut.pt", cwd=folder), "cut.pt")


def test_other_networks_and_other_datasets(folder):
    raw = torch.load(folder / "checkpoints/mnist.pt", weights_only=True)
    other = {**raw, "data": {**raw["data"], "name": "letters"}}
    torch.save(other, folder / "letters.pt")
    refused(command("evaluate.py", "--before", "letters.pt", "--after",
                    "checkpoints/mnist-forget-1.pt", "--overwrite",
                    cwd=folder), "letters", "mnist")
    config = {**raw["config"], "unet": {**raw["config"]["unet"], "model_channels": 16}}
    unet, _ = ddpm.build(config)
    narrow = {**raw, "config": config, "weights": unet.state_dict(), "posterior": None}
    torch.save(narrow, folder / "narrow.pt")
    shifted = {k: v + 1 for k, v in narrow["weights"].items()}
    torch.save({**narrow, "weights": shifted}, folder / "narrow-2.pt")
    refused(command("vdu.py", "--forget-class", 2, "--posterior", "narrow.pt", "narrow-2.pt",
                    cwd=folder), "do not match")
    refused(command("vdu.py", "--forget-class", 2, "--posterior", "narrow.pt", cwd=folder), "two")
    torch.save({**narrow, "train": {}}, folder / "unfinished.pt")
    refused(command("vdu.py", "--forget-class", 2, "--checkpoint", "unfinished.pt", cwd=folder),
            "train_ddpm.py --resume --output unfinished.pt")
    refused(command("vdu.py", "--forget-class", 2, "--checkpoint", "checkpoints/mnist-forget-1.pt",
                    cwd=folder), "already forgotten")


def test_the_parent_is_known_by_its_weights(folder):
    """Another training of the same name is not what a model was unlearned from."""
    raw = torch.load(folder / "checkpoints/mnist.pt", weights_only=True)
    after = torch.load(folder / "g1.pt", weights_only=True)
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    after["forgotten"]["checkpoint"] = "/nowhere/mnist.pt"
    torch.save(after, elsewhere / "g1.pt")
    raw["weights"]["out.0.bias"] += 1
    torch.save(raw, elsewhere / "mnist.pt")
    few = ["--samples", 4, "--sampling-steps", 1, "--after", "elsewhere/g1.pt"]
    refused(command("evaluate.py", *few, cwd=folder), "is not the model that", "--before")
    (folder / "checkpoints/newest.pt").write_bytes(b"broken")
    r = command("evaluate.py", *few, "g1.pt", "--before", "checkpoints/mnist.pt", cwd=folder)
    assert r.returncode == 0, r.stderr
    for name in ("elsewhere", folder.name):  # two files of one name: two reports
        assert (folder / f"results/{name}-g1/report.json").exists()
    assert evaluate.newest_unlearned(folder / "checkpoints").endswith("mnist-forget-1.pt")
    (folder / "checkpoints/newest.pt").unlink()


def test_a_broken_model_is_not_perfect_forgetting(folder):
    after = torch.load(folder / "g1.pt", weights_only=True)
    generator = torch.Generator().manual_seed(0)
    noise = {k: torch.randn(v.shape, generator=generator) for k, v in after["weights"].items()}
    torch.save({**after, "weights": noise}, folder / "noise.pt")
    r = command("evaluate.py", "--after", "noise.pt", "--samples", 50, "--sampling-steps", 5,
                cwd=folder)
    report = json.loads((folder / "results/noise/report.json").read_text())
    confidence = [report[when]["mean_confidence"] for when in ("before", "after")]
    assert report["recognisable"] == (confidence[1] >= 0.8 * confidence[0])
    assert ("WARNING" in r.stdout) == (not report["recognisable"])
    noise["out.2.bias"][0] = float("nan")
    torch.save({**after, "weights": noise}, folder / "nan.pt")
    refused(command("evaluate.py", "--after", "nan.pt", cwd=folder), "broken", "out.2.bias")


def test_nothing_is_replaced_and_nothing_is_written_where_it_does_not_belong(folder):
    samples = (folder / "s.pt").read_bytes()
    few = ["--after", "g1.pt", "--samples", 4, "--sampling-steps", 1, "--output", "other"]
    refused(command("evaluate.py", *few, "--save-samples", "s.pt", cwd=folder), "s.pt exists")
    assert (folder / "s.pt").read_bytes() == samples and not (folder / "other").exists()
    (folder / "other/g1").mkdir(parents=True)
    (folder / "other/g1/after.png").write_bytes(b"mine")
    refused(command("evaluate.py", *few, cwd=folder), "after.png exists")
    (folder / "cat.png").write_bytes(b"mine")
    refused(command("train_ddpm.py", "--steps", 1, "--output", "cat.pt", cwd=folder), "cat.png")
    assert (folder / "cat.png").read_bytes() == b"mine"
    for name in ("x.safetensors", "x.png", "x.json"):
        refused(command("train_ddpm.py", "--output", name, cwd=folder), name, ".pt")
        refused(command("vdu.py", "--forget-class", 1, "--output", name, cwd=folder), name, ".pt")
    refused(command("train_ddpm.py", "--output", "other", "--overwrite", cwd=folder), "is a folder")


def test_a_full_disk_leaves_the_old_file(folder):
    path = folder / "checkpoints/mnist-forget-1.pt"
    before = path.read_bytes()
    r = process("vdu.py", "--forget-class", 1, "--steps", 1, "--batch-size", 4, "--anchors", 10,
                "--overwrite", cwd=folder, preexec_fn=partial(
                    resource.setrlimit, resource.RLIMIT_FSIZE, (1_000_000, 1_000_000)))
    refused(r, "untouched")
    assert path.read_bytes() == before
    assert not list((folder / "checkpoints").glob("*.tmp"))


def test_infinite_loss_in_training_names_the_step(folder):
    refused(command("train_ddpm.py", "--steps", 60, "--batch-size", 8, "--lr", 1e30, "--output",
                    "inf.pt", "--save-every", 1, cwd=folder),
            "at step", "still holds step")
    assert torch.load(folder / "inf.pt", weights_only=True)["step"] >= 1


def test_a_class_left_out_is_remembered(folder):
    r = command("train_ddpm.py", "--steps", 2, "--batch-size", 8, "--exclude-class", 1, "--output",
                "without.pt", cwd=folder)
    assert r.returncode == 0, r.stderr
    assert ddpm.load_checkpoint(folder / "without.pt").data["excluded"] == ["1"]
    refused(command("vdu.py", "--forget-class", 1, "--checkpoint", "without.pt", cwd=folder),
            "without 1")
    r = command("evaluate.py", "--before", "checkpoints/mnist.pt", "--after", "without.pt",
                "--samples", 4, "--sampling-steps", 2, cwd=folder)
    assert r.returncode == 0, r.stderr


def test_relearning_and_the_summary_of_several(folder):
    """On the first checkpoint: what comes back in how many steps, beside a model
    without the class; and a row per model."""
    r = command("evaluate.py", "--after", "checkpoints/mnist-forget-1.pt", "--samples", 12,
                "--sampling-steps", 2, "--relearn", 4, "--relearn-images", 10,
                "--never-saw", "without.pt", "--overwrite", cwd=folder)
    assert r.returncode == 0, r.stderr
    report = json.loads((folder / "results/mnist-forget-1/report.json").read_text())
    relearning = report["relearning"]
    assert relearning["steps"] == [0, 1, 2, 4] and relearning["images"] == 10
    assert len(relearning["unlearned"]) == len(relearning["never saw it"]) == 4
    assert "never saw it" in r.stdout
    refused(command("evaluate.py", "--after", "checkpoints/mnist-forget-1.pt", "--samples", 4,
                    "--sampling-steps", 1, "--relearn", 1, "--never-saw",
                    "checkpoints/mnist.pt", "--overwrite", cwd=folder), "without 1")
    models = ["checkpoints/mnist-forget-1.pt", "two.pt", "g1.pt"]
    r = command("evaluate.py", "--after", *models, "--samples", 12, "--sampling-steps", 2,
                "--output", "several", cwd=folder)
    assert r.returncode == 0, r.stderr
    rows = json.loads((folder / "several/summary.json").read_text())
    assert [row["checkpoint"] for row in rows] == models
    assert all(model in r.stdout.split("wrote")[-2] for model in models)
    assert [row["forgotten"] for row in rows] == [["1"], ["1", "7"], ["3"]]
    for row, name in zip(rows, ("mnist-forget-1", "two", "g1")):
        report = json.loads((folder / f"several/{name}/report.json").read_text())
        assert all(row[key] == report["after"][key] for key in evaluate.METRICS)
        assert row["PUL"] == report["PUL"]
    assert rows[2]["u_fid_ratio"] == 1 and rows[2]["PUL"] in (0, None)  # gamma 1 changed nothing
    refused(command("evaluate.py", "--after", *models, "--samples", 12, "--output", "several",
                    cwd=folder), "--overwrite")


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """A folder of two classes of colour images, trained on and unlearned from: red and
    blue, brighter and darker."""
    cwd = tmp_path_factory.mktemp("colours")
    torch.manual_seed(0)
    for part, n in (("train", 40), ("test", 10)):
        for channel, name in ((0, "red"), (2, "blue")):
            (cwd / "images" / part / name).mkdir(parents=True)
            for i in range(n):
                image = 0.1 * torch.rand(3, 20, 24)
                image[channel] += 0.3 + 0.6 * torch.rand(1)
                save_image(image, cwd / "images" / part / name / f"{i}.png")
    (cwd / "empty").mkdir()
    (cwd / "reds").symlink_to(cwd / "images" / "train" / "red")
    r = command("train_ddpm.py", "--dataset", "folder", "--data-root", "images", "--image-size", 8,
                "--steps", 44, "--batch-size", 8, cwd=cwd)
    assert r.returncode == 0, r.stderr
    assert "small U-Net" in r.stdout
    return cwd


def test_a_folder_of_images_from_training_to_the_report(colours):
    trained = ddpm.load_checkpoint(colours / "checkpoints/images.pt")
    assert trained.config["image_shape"] == (3, 8, 8)
    assert trained.data["classes"] == ["blue", "red"]
    assert trained.data["images"] == 80
    for option in (["--forget-class", "red"], ["--forget-images", "reds"]):
        r = command("vdu.py", "--checkpoint", "checkpoints/images.pt", *option, "--steps", 1,
                    "--batch-size", 8, "--anchors", 10, cwd=colours)
        assert r.returncode == 0, r.stderr
    paths = [colours / f"checkpoints/images-forget-{name}.pt" for name in ("red", "reds")]
    by_class, by_images = (ddpm.load_checkpoint(path).forgotten for path in paths)
    assert by_class["classes"] == ["red"]
    assert by_images["classes"] == []
    assert by_class["images"] == by_images["images"] == 40
    refused(command("vdu.py", "--checkpoint", "checkpoints/images.pt", "--forget-class", "green",
                    cwd=colours), "green", "blue, red")
    refused(command("vdu.py", "--checkpoint", "checkpoints/images.pt", "--forget-images", "empty",
                    cwd=colours), "no images")
    evaluation = ["evaluate.py", "--after", "checkpoints/images-forget-reds.pt", "--samples", 8,
                  "--sampling-steps", 2]
    refused(command(*evaluation, cwd=colours), "--forget-class")
    r = command(*evaluation, "--forget-class", "red", "--features", "classifier", cwd=colours)
    assert r.returncode == 0, r.stderr
    report = json.loads((colours / "results/images-forget-reds/report.json").read_text())
    assert report["forgotten"] == ["red"]
    assert report["u_fid_real_images"] == 40
    assert report["u_fid_features"].startswith("classifier")
    assert report["classifier_accuracy"] == 1.0


def test_forgetting_reads_no_other_class(colours):
    """The other classes may be gone, as they are where this method is needed."""
    (colours / "images/train/blue").rename(colours / "kept")
    (colours / "images/train/blue").mkdir()
    for image in (colours / "kept").iterdir():
        (colours / "images/train/blue" / image.name).write_bytes(b"not an image")
    try:
        r = command("vdu.py", "--checkpoint", "checkpoints/images.pt", "--forget-class", "red",
                    "--steps", 1, "--batch-size", 4, "--anchors", 10,
                    "--output", "r.pt", cwd=colours)
        assert r.returncode == 0, r.stderr
        refused(command("train_ddpm.py", "--dataset", "folder", "--data-root", "images", "--output",
                        "x.pt", cwd=colours), "cannot read the image")
    finally:
        for image in (colours / "images/train/blue").iterdir():
            image.unlink()
        (colours / "images/train/blue").rmdir()
        (colours / "kept").rename(colours / "images/train/blue")


def test_names_that_the_terminal_cannot_show(colours, tmp_path):
    for name in ("\u732b", "\u72d7"):
        shutil.copytree(colours / "images/test/red", tmp_path / "photos" / name)
    r = subprocess.run([sys.executable, ROOT / "train_ddpm.py", "--dataset", "folder",
                        "--data-root",
                        "photos", "--image-size", "8", "--steps", "2", "--batch-size", "2"],
                       cwd=tmp_path, env={**NO_NETWORK, "PYTHONIOENCODING": "cp1252"},
                       capture_output=True)
    assert r.returncode == 0, r.stderr
    assert rb"\u732b" in r.stdout


def test_a_model_that_others_trained(colours):
    """Published weights: the posterior is guessed from one file, measured over two, or
    measured while training on."""
    published = torch.load(ROOT / "tests/data/ddpm_reference.pt", weights_only=True)["original"]
    torch.save(published["state_dict"], colours / "model-790000.ckpt")
    torch.save({k: v + 1e-3 for k, v in published["state_dict"].items()}, colours / "later.ckpt")
    for i, option in enumerate((["--share", 0.3, "--function-space"],
                                ["--posterior", "model-790000.ckpt", "later.ckpt"],
                                ["--self-train", 12])):
        r = command("vdu.py", "--checkpoint", "model-790000.ckpt", "--forget-images", "reds",
                    "--forget-samples", 6, "--steps", 1, "--batch-size", 2,
                    "--anchors", 10, *option, "--output", f"model-{i}.pt", cwd=colours)
        assert r.returncode == 0, r.stderr
        assert ("guessed" in r.stdout) == (i == 0)
        forgotten = ddpm.load_checkpoint(colours / f"model-{i}.pt").forgotten
        assert forgotten["images"] == 6 and forgotten["rho"] == (0.3, 0.1, 0.1)[i]
    refused(command("vdu.py", "--checkpoint", "model-790000.ckpt", "--forget-images", "reds",
                    "--self-train", 12, "--isotropic", "--output", "x.pt", cwd=colours),
            "--self-train", "--isotropic")
    refused(command("vdu.py", "--checkpoint", "model-790000.ckpt", "--forget-class", "horse",
                    cwd=colours), "CIFAR-10 cannot be downloaded", "--data-root")
    refused(command("evaluate.py", "--after", "model-0.pt", "--forget-class", "horse", cwd=colours),
            "CIFAR-10 cannot be downloaded")


def test_data_that_is_not_there(colours):
    for name, word in (("cifar10", "cifar-10-batches-py"), ("tiny-imagenet", "tiny-imagenet-200")):
        refused(command("train_ddpm.py", "--dataset", name, "--output", "x.pt", cwd=colours),
                "cannot be downloaded", word, "--data-root")
        refused(command("train_ddpm.py", "--dataset", name, "--data-root", "images", "--output",
                        "x.pt", cwd=colours), "images", word)
    refused(command("train_ddpm.py", "--dataset", "folder", "--output", "x.pt", cwd=colours),
            "--data-root")
    refused(command("train_ddpm.py", "--dataset", "folder", "--data-root", "empty", "--output",
                    "x.pt", cwd=colours), "sub-folder")


def test_cifar10_and_tiny_imagenet_in_their_published_layouts(tmp_path):
    """Written here as they are published, a few images of each; read, and CIFAR-10
    trained on from the command line."""
    torch.manual_seed(0)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship",
             "truck"]
    pixels = torch.randint(256, (10, 3072), dtype=torch.uint8)
    with pytest.MonkeyPatch.context() as patch:  # the checksums are those of the real files
        patch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
        for file in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
            (folder / file).write_bytes(pickle.dumps({"data": pixels.numpy(),
                                                      "labels": list(range(10))}))
        (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
        images, labels, data = train_ddpm.load_dataset("cifar10", tmp_path)
        assert images.shape == (50, 3, 32, 32) and data["classes"] == names == ddpm.CIFAR10_CLASSES
        assert torch.equal(images[1], pixels[1].view(3, 32, 32))
        assert labels[:11].tolist() == [*range(10), 0]
        assert train_ddpm.load_dataset("cifar10", tmp_path, train=False)[0].shape == (10, 3, 32, 32)
        r = command("train_ddpm.py", "--dataset", "cifar10", "--data-root", tmp_path, "--steps", 1,
                    "--batch-size", 2, cwd=tmp_path)
        assert r.returncode == 0, r.stderr
        published = torch.load(ROOT / "tests/data/ddpm_reference.pt",
                               weights_only=True)["diffusers"]["state_dict"]
        torch.save(published, tmp_path / "diffusion_pytorch_model.bin")
        for checkpoint, more in (("checkpoints/cifar10.pt", []),
                                 ("diffusion_pytorch_model.bin", ["--data-root", tmp_path])):
            r = command("vdu.py", "--checkpoint", checkpoint, "--forget-class", "horse", "--steps",
                        1, "--batch-size", 2,
                        "--anchors", 10, *more, cwd=tmp_path)
            assert r.returncode == 0, r.stderr
        # what a classifier would learn of noise does not matter
        untrained = evaluate.Classifier((3, 32, 32), 10).state_dict()
        ddpm.save_checkpoint(
            tmp_path / f"checkpoints/classifier-cifar10-{ddpm.digest([images, labels])}.pt",
            {"classifier": untrained, "accuracy": 0.1})
        r = command("evaluate.py", "--data-root", tmp_path, "--samples", 4, "--sampling-steps", 1,
                    "--features", "classifier", cwd=tmp_path)
        assert r.returncode == 0, r.stderr
        folder = tmp_path / "results/diffusion_pytorch_model-forget-horse"
        report = json.loads((folder / "report.json").read_text())
        assert report["forgotten"] == ["horse"]
        parent = tmp_path / "diffusion_pytorch_model.bin"
        assert report["before"]["checkpoint"] == str(parent)

    folder = tmp_path / "tiny-imagenet-200"
    (folder / "val" / "images").mkdir(parents=True)
    words = {"n01443537": "goldfish, Carassius auratus",
             "n01629819": "European fire salamander, Salamandra salamandra",
             "n02124075": "Egyptian cat"}
    (folder / "wnids.txt").write_text("\n".join(reversed(words)) + "\n")
    lines = [f"{wnid}\t{text}\n" for wnid, text in {**words, "n00001740": "entity"}.items()]
    (folder / "words.txt").write_text("".join(lines))
    rows = []
    for i, wnid in enumerate(words):
        (folder / "train" / wnid / "images").mkdir(parents=True)
        boxes = folder / "train" / wnid / f"{wnid}_boxes.txt"
        boxes.write_text(f"{wnid}_0.JPEG\t0\t10\t63\t58\n")
        for j in range(2):
            save_image(torch.full((3, 64, 64), (i + 1) / 4),
                       folder / "train" / wnid / "images" / f"{wnid}_{j}.JPEG")
        save_image(torch.full((3, 64, 64), (i + 1) / 4),
                   folder / "val" / "images" / f"val_{2 - i}.JPEG")
        rows.append(f"val_{2 - i}.JPEG\t{wnid}\t0\t32\t44\t62\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(rows))
    images, labels, data = train_ddpm.load_dataset("tiny-imagenet", tmp_path)
    assert images.shape == (6, 3, 64, 64)
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert data["classes"] == sorted(words)
    val_images, val_labels, _ = train_ddpm.load_dataset("tiny-imagenet", tmp_path, train=False)
    # the annotations, not the files' order, say which class each is
    for image, label in zip(val_images, val_labels):
        assert abs(image.float().mean() / 255 - (label + 1) / 4) < 0.02
    only, only_labels, _ = train_ddpm.load_dataset("tiny-imagenet", tmp_path, only=["n01629819"])
    assert torch.equal(only, images[2:4]) and only_labels.tolist() == [1, 1]
    for name in ("goldfish", "n01443537", "Carassius auratus"):
        assert train_ddpm.class_indices([name], data) == [0]
    with pytest.raises(ddpm.UserError, match="goldfish"):
        train_ddpm.class_indices(["shark"], data)


def test_the_base_network_is_ddpms():
    """35.7M parameters, as the published CIFAR-10 network has; and the size of `small`
    is that of the figures in README."""
    with torch.device("meta"):
        base = ddpm.UNet(**train_ddpm.base_network((3, 32, 32))[0])
    assert sum(p.numel() for p in base.parameters()) == 35_746_307
    # attention at 16x16
    assert base.input_blocks[4][1].num_heads == 1
    assert base.input_blocks[4][0].out_layers[2].p == 0.1


def test_help_teaches():
    for script in ("train_ddpm.py", "vdu.py", "evaluate.py"):
        r = command(script, "--help", cwd=ROOT)
        assert r.returncode == 0
        assert f"python {script}" in r.stdout
        assert "arXiv 2510.04058" in r.stdout
