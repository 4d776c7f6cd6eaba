"""The three commands as people type them, in a temporary folder, without a network; and what bad input gets."""

import json
import os
import pickle
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ddpm

ROOT = Path(__file__).resolve().parent.parent
NO_NETWORK = {**os.environ, **{f"{p}_proxy": "http://127.0.0.1:9" for p in ("http", "https")}}


def command(script, *args, cwd, **kwargs):
    return subprocess.run([sys.executable, str(ROOT / script), *map(str, args)], cwd=cwd, env=NO_NETWORK, text=True,
                          capture_output=True, timeout=200, **kwargs)


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
    r = command("train_ddpm.py", "--dataset", "mnist", "--steps", 40, "--batch-size", 32, cwd=cwd)
    assert r.returncode == 0, r.stderr
    assert "5,000" in r.stdout and r.stdout.count("no network") == 1
    r = command("vdu.py", "--forget-class", 1, "--steps", 3, "--batch-size", 8, cwd=cwd)
    assert r.returncode == 0, r.stderr
    r = command("evaluate.py", "--samples", 20, "--sampling-steps", 3, "--save-samples", "s.pt", cwd=cwd)
    assert r.returncode == 0, r.stderr
    assert "PUL" in r.stdout
    return cwd


def test_the_three_commands_leave_what_they_say(folder):
    for name in ("checkpoints/mnist.pt", "checkpoints/mnist.png", "checkpoints/mnist-forget-1.pt",
                 "results/mnist-forget-1/report.json", "results/mnist-forget-1/before.png", "results/mnist-forget-1/after.png"):
        assert (folder / name).stat().st_size > 0
    report = json.loads((folder / "results/mnist-forget-1/report.json").read_text())
    assert report["forgotten"] == ["1"] and report["samples"] == 20 and report["sampling_steps"] == 3
    assert sum(h["count"] for h in report["after"]["histogram"].values()) == 20
    assert report["classifier_accuracy"] > 0.9
    assert report["u_fid_real_images"] == 4500
    samples = torch.load(folder / "s.pt", weights_only=True)
    for name in ("before", "after"):
        assert samples[name].shape == (20, 1, 28, 28) and samples[name].dtype == torch.uint8


def test_checkpoints_remember(folder):
    trained = ddpm.load_checkpoint(folder / "checkpoints/mnist.pt")
    assert trained.dataset == "mnist" and trained.step == 40 and trained.forgotten is None and not trained.unet.training
    assert trained.posterior.n >= 2
    assert trained.unet(torch.zeros(2, 1, 28, 28), torch.tensor([0, 999])).shape == (2, 1, 28, 28)
    unlearned = ddpm.load_checkpoint(folder / "checkpoints/mnist-forget-1.pt")
    assert unlearned.forgotten["classes"] == ["1"] and unlearned.forgotten["images"] == 500
    assert unlearned.forgotten["checkpoint"] == "checkpoints/mnist.pt" and unlearned.forgotten["settings"]["steps"] == 3
    assert set(unlearned.posterior.mean) == set(dict(unlearned.unet.named_parameters()))


def test_gamma_1_writes_the_posterior_mean(folder):
    r = command("vdu.py", "--forget-class", 3, "--gamma", 1, "--steps", 2, "--batch-size", 4, "--output", "g1.pt", cwd=folder)
    assert r.returncode == 0, r.stderr
    c = ddpm.load_checkpoint(folder / "g1.pt")
    assert all(torch.equal(p, c.posterior.mean[k]) for k, p in c.unet.named_parameters())


def test_options_of_unlearning(folder):
    r = command("vdu.py", "--forget-class", 1, 7, "--forget-samples", 20, "--function-space", 2, "--anchors", 100, "--steps", 2, "--batch-size", 4,
                "--output", "two.pt", cwd=folder)
    assert r.returncode == 0, r.stderr
    assert ddpm.load_checkpoint(folder / "two.pt").forgotten["images"] == 40
    r = command("vdu.py", "--forget-class", 2, "--posterior", "checkpoints/mnist.pt", "g1.pt", "--isotropic", "--steps", 1,
                "--batch-size", 4, "--output", "iso.pt", cwd=folder)
    assert r.returncode == 0, r.stderr


def test_interrupted_training_resumes_to_the_same_result(folder):
    args = ["--dataset", "mnist", "--steps", 40, "--batch-size", 32, "--output", "stopped.pt"]
    process = subprocess.Popen([sys.executable, "-u", str(ROOT / "train_ddpm.py"), *map(str, args)], cwd=folder, env=NO_NETWORK,
                               text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while "step=" not in process.stderr.readline(60):  # wait for the first steps
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume" in out
    assert 0 < torch.load(folder / "stopped.pt", weights_only=True)["step"] < 40
    refused(command("train_ddpm.py", *args, cwd=folder), "--resume", "--overwrite")
    refused(command("train_ddpm.py", *args, "--resume", "--lr", 5, cwd=folder), "--lr")
    r = command("train_ddpm.py", *args, "--resume", cwd=folder)
    assert r.returncode == 0, r.stderr
    whole = torch.load(folder / "checkpoints/mnist.pt", weights_only=True)
    resumed = torch.load(folder / "stopped.pt", weights_only=True)
    assert all(torch.equal(whole["weights"][k], v) for k, v in resumed["weights"].items())
    assert all(torch.equal(whole["posterior"]["std"][k], v) for k, v in resumed["posterior"]["std"].items())
    refused(command("train_ddpm.py", *args, "--resume", cwd=folder), "finished")


def test_bad_settings(folder):
    refused(command("vdu.py", "--forget-class", "eleven", cwd=folder), "eleven", "0, 1, 2, 3")
    refused(command("vdu.py", "--forget-class", 1, "--gamma", 1.5, "--overwrite", cwd=folder), "gamma")
    refused(command("vdu.py", "--forget-class", 1, "--steps", 0, "--overwrite", cwd=folder), "--steps")
    refused(command("train_ddpm.py", "--steps", 0, "--output", "x.pt", cwd=folder), "--steps")
    refused(command("evaluate.py", "--sampling-steps", 0, "--overwrite", cwd=folder), "--sampling-steps")
    refused(command("train_ddpm.py", "--dataset", "nothing", cwd=folder), "mnist")
    refused(command("train_ddpm.py", "--data-root", "nowhere", "--output", "x.pt", cwd=folder), "nowhere")
    refused(command("vdu.py", "--forget-class", 1, "--device", "abacus", "--overwrite", cwd=folder), "abacus")


def test_outputs_are_not_overwritten_unasked(folder):
    before = (folder / "checkpoints/mnist-forget-1.pt").read_bytes()
    refused(command("vdu.py", "--forget-class", 1, cwd=folder), "--overwrite")
    refused(command("evaluate.py", "--after", "checkpoints/mnist-forget-1.pt", cwd=folder), "--overwrite")
    refused(command("vdu.py", "--forget-class", 1, "--output", "checkpoints/mnist.pt", "--overwrite", cwd=folder), "--checkpoint")
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
    for name, word in [("missing.pt", "no checkpoint"), ("cut.pt", "cut short"), ("empty.pt", "cut short"), ("foreign.pt", "lacks"),
                       ("bomb.pt", "refused"), ("bomb.pkl", "refused")]:
        refused(command("vdu.py", "--forget-class", 1, "--checkpoint", name, cwd=folder), name, word)
    assert not (folder / "bomb-went-off").exists()
    refused(command("evaluate.py", "--after", "cut.pt", cwd=folder), "cut.pt")


def test_other_networks_and_other_datasets(folder):
    raw = torch.load(folder / "checkpoints/mnist.pt", weights_only=True)
    other = {**raw, "data": {**raw["data"], "name": "letters"}}
    torch.save(other, folder / "letters.pt")
    refused(command("evaluate.py", "--before", "letters.pt", "--after", "checkpoints/mnist-forget-1.pt", "--overwrite",
                    cwd=folder), "letters", "mnist")
    unet, _ = ddpm.build({**raw["config"], "unet": {**raw["config"]["unet"], "model_channels": 16}})
    narrow = {**raw, "config": {**raw["config"], "unet": {**raw["config"]["unet"], "model_channels": 16}}, "weights": unet.state_dict(), "posterior": None}
    torch.save(narrow, folder / "narrow.pt")
    refused(command("vdu.py", "--forget-class", 2, "--posterior", "narrow.pt", "narrow.pt", cwd=folder), "do not match")
    refused(command("vdu.py", "--forget-class", 2, "--posterior", "narrow.pt", cwd=folder), "two")
    refused(command("vdu.py", "--forget-class", 2, "--checkpoint", "narrow.pt", cwd=folder), "--resume")
    refused(command("vdu.py", "--forget-class", 2, "--checkpoint", "checkpoints/mnist-forget-1.pt", cwd=folder), "already forgotten")


def test_a_full_disk_leaves_the_old_file(folder):
    path = folder / "checkpoints/mnist-forget-1.pt"
    before = path.read_bytes()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
    r = command("vdu.py", "--forget-class", 1, "--steps", 1, "--batch-size", 4, "--overwrite", cwd=folder, preexec_fn=limit)
    refused(r, "untouched")
    assert path.read_bytes() == before
    assert not list((folder / "checkpoints").glob("*.tmp"))


def test_infinite_loss_in_training_names_the_step(folder):
    refused(command("train_ddpm.py", "--steps", 60, "--batch-size", 8, "--lr", 1e30, "--output", "inf.pt", "--save-every", 1, cwd=folder),
            "at step", "still holds step")
    assert torch.load(folder / "inf.pt", weights_only=True)["step"] >= 1


def test_a_class_left_out_is_remembered(folder):
    r = command("train_ddpm.py", "--steps", 2, "--batch-size", 8, "--exclude-class", 1, "--output", "without.pt", cwd=folder)
    assert r.returncode == 0, r.stderr
    assert ddpm.load_checkpoint(folder / "without.pt").data["excluded"] == ["1"]
    refused(command("vdu.py", "--forget-class", 1, "--checkpoint", "without.pt", cwd=folder), "without 1")
    r = command("evaluate.py", "--before", "checkpoints/mnist.pt", "--after", "without.pt", "--samples", 4, "--sampling-steps", 2, cwd=folder)
    assert r.returncode == 0, r.stderr


def test_help_teaches():
    for script in ("train_ddpm.py", "vdu.py", "evaluate.py"):
        r = command(script, "--help", cwd=ROOT)
        assert r.returncode == 0 and f"python {script}" in r.stdout and "arXiv 2510.04058" in r.stdout
