"""What ships with the code: a model that a newcomer, without a network, sees forget a
digit; the defaults of the three commands; README's Python."""

from unittest.mock import Mock

import torch
from pytest import approx
from torchvision.utils import save_image

import ddpm
import vdu
from conftest import ROOT
from test_command_lines import report_of


def test_the_shipped_model_forgets_a_digit_by_its_own_judgement(shipped):
    folder, said = shipped()

    record = ddpm.load_checkpoint(folder / "checkpoints/mnist-forget-1.pt").forgotten
    before, after = record["like_D_f"]
    assert "ships with the code" in said[0]
    assert "downloaded" not in said[0]  # nor tried: its own images are there
    assert "still there" not in said[0]
    assert record["rho"] == approx(6742 / 60000)  # counted in training
    assert before > 0.05
    assert after < 0.2 * before


def test_the_digit_goes_and_the_others_stay(shipped):
    folder, _ = shipped()

    report = report_of(folder / "results/mnist-forget-1")
    warnings = " ".join(report["warnings"])
    assert report["PUL"] >= 90
    assert report["drift"] <= 0.15
    assert report["after"]["bits_forgotten"] > report["before"]["bits_forgotten"]
    assert "u-FID" not in warnings
    assert "nothing like" not in warnings


def test_the_papers_loss_pushes_the_digit_away_too(shipped):
    folder, _ = shipped()

    record = ddpm.load_checkpoint(folder / "paper.pt").forgotten
    before, after = record["like_D_f"]
    assert after < before
    assert record["after"]["A"] > record["before"]["A"]


def test_the_three_commands_work_one_after_the_other(shipped):
    folder, said = shipped()

    trained, unlearned, measured = said[2:5]
    report = report_of(folder / "results/mnist-forget-7")
    assert "cannot be read or downloaded" in trained
    assert "5,000 images of 1x28x28 (mnist_5k.npz)" in trained
    assert "posterior of 2 checkpoints" in unlearned
    assert "\ncheckpoints/mnist-forget-7.pt " in measured
    assert report["forgotten"] == ["7"]
    assert report["classifier_accuracy"] > 0.95


MY_NETWORK = """
from torch.nn import Conv2d

class MyNetwork(Conv2d):
    def __init__(self):
        super().__init__(3, 3, 1)

    def forward(self, x, t):
        return super().forward(x)
"""


def test_readmes_python_runs_as_printed(tmp_path, monkeypatch):
    """A network of one's own, three of its checkpoints, and a folder of images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(vdu.OURS, "anchors", 50)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_network.py").write_text(MY_NETWORK)
    (tmp_path / "to_forget").mkdir()
    save_image(torch.rand(3, 40, 50), tmp_path / "to_forget/1.png")
    layers = [torch.nn.Conv2d(3, 3, 1) for _ in range(3)]
    for name, layer in zip("abc", layers):
        torch.save(layer.state_dict(prefix="module."), f"{name}.pt")
    readme = (ROOT / "README.md").read_text()
    ours, papers, epsilon = [part.split("```")[0] for part in readme.split("```python\n")[1:]]
    names = {}

    exec(ours, names)

    mean = torch.stack([layer.weight for layer in layers]).mean(0)
    moved = torch.load("unlearned.pt")["weight"] - mean
    assert torch.allclose(names["posterior"].mean["weight"], mean, atol=1e-6)
    assert names["record"]["steps"] == vdu.OURS["steps"]
    assert moved.abs().max() > 1e-4

    exec(papers, names)
    assert names["record"]["steps"] == vdu.PAPER["steps"]

    exec(epsilon, names)
    unet = Mock(torch.nn.Module, return_value=Mock(sample=7))
    assert names["Epsilon"](unet)(1, 2) == 7
    unet.assert_called_once_with(1, 2)
