"""The model that ships with the code: a newcomer without a checkpoint or a network sees
a digit go, and the others stay as they were."""

import shutil

import pytest
import torch
from torchvision.utils import save_image

from conftest import ROOT
from test_command_lines import command, past, report_of


def test_the_shipped_model_forgets_a_digit(shipped, classifier):
    folder, (ours_said, paper_said) = shipped()  # conftest.py types these two commands
    assert "ships with the code" in ours_said and "still there" not in ours_said
    assert "still there" in paper_said
    record = past(folder / "checkpoints/mnist-forget-1.pt")
    assert record["rho"] == pytest.approx(6742 / 60000) and record["images"] == 500
    before, after = record["like_D_f"]
    assert before > 0.05 and after < 0.2 * before  # else "still there" would be said
    shutil.copy(classifier, folder / "checkpoints")
    command("evaluate.py --after checkpoints/mnist-forget-1.pt two.pt --samples 300 "
            "--sampling-steps 10 --bits 10", folder)
    ours, paper = (report_of(folder / f"results/{name}") for name in ("mnist-forget-1", "two"))
    assert ours["PUL"] >= 90 and ours["drift"] <= 0.15
    assert not any("u-FID" in warning or "nothing like" in warning for warning in ours["warnings"])
    assert paper["after"]["forgotten_count"] < paper["before"]["forgotten_count"]
    assert ours["after"]["bits_forgotten"] > ours["before"]["bits_forgotten"]


def test_readmes_python_runs_as_printed(tmp_path, monkeypatch):
    """A network of one's own, three of its checkpoints, and a folder of images."""
    code = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    (tmp_path / "my_network.py").write_text(
        "from torch.nn import Conv2d\n\n\nclass MyNetwork(Conv2d):\n    def __init__(self):\n"
        "        super().__init__(3, 3, 1)\n\n    def forward(self, x, t):\n"
        "        return super().forward(x)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    layers = [torch.nn.Conv2d(3, 3, 1) for _ in range(3)]
    for name, layer in zip("abc", layers):
        torch.save({"state_dict": layer.state_dict(prefix="module.")}, f"{name}.pt")
    (tmp_path / "to_forget").mkdir()
    save_image(torch.rand(3, 40, 50), tmp_path / "to_forget" / "1.png")
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["record"]["steps"] == 30 and names["record"]["moved_rms_sigma"] > 0
    weights = torch.stack([layer.weight for layer in layers])
    assert torch.allclose(names["posterior"].mean["weight"], weights.mean(0), atol=1e-6)
    assert (torch.load("unlearned.pt")["weight"] - weights.mean(0)).abs().max() > 0
