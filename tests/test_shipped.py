"""The model that ships with the code: a newcomer without a checkpoint or a network sees
a digit go, and the others stay as they were."""

import shutil

import pytest
import torch
from torchvision.utils import save_image

from conftest import ROOT
from test_command_lines import command, past, report_of


def test_the_shipped_model_forgets_a_digit(shipped):
    folder, (function_space, two_terms) = shipped()  # conftest.py types these two commands
    assert "ships with the code" in function_space and "still there" not in function_space
    assert "still there" in two_terms
    record = past(folder / "checkpoints/mnist-forget-1.pt")
    assert record["rho"] == pytest.approx(6742 / 60000) and record["images"] == 500
    assert record["like_D_f"][0][1] > 0.05 > 0.01 > record["like_D_f"][-1][1]
    for classifier in folder.parent.glob("run*/checkpoints/classifier-mnist-*"):
        shutil.copy(classifier, folder / "checkpoints")  # trained on the same images
    command("evaluate.py --after checkpoints/mnist-forget-1.pt two.pt --samples 300 "
            "--sampling-steps 10 --bits 10", folder)
    space, terms = (report_of(folder / f"results/{name}")
                    for name in ("mnist-forget-1", "two"))
    assert space["PUL"] >= 90 and space["drift"] <= 0.15 and space["recognisable"]
    assert terms["after"]["forgotten_count"] < terms["before"]["forgotten_count"]
    assert space["after"]["bits_forgotten"] > space["before"]["bits_forgotten"]


def test_readmes_python_runs_as_printed(tmp_path, monkeypatch):
    """A network of one's own, three of its checkpoints, and a folder of images."""
    code = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    (tmp_path / "my_network.py").write_text(
        "import torch\n\n\nclass MyNetwork(torch.nn.Module):\n    def __init__(self):\n"
        "        super().__init__()\n        self.layer = torch.nn.Conv2d(3, 3, 1)\n"
        "        self.register_buffer('seen', torch.zeros(()))\n\n"
        "    def forward(self, x, t):\n        return self.layer(x)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 3, 1) for _ in range(3)]
    for name, layer in zip("abc", layers):
        state = {f"module.layer.{k}": v for k, v in layer.state_dict().items()}
        torch.save({"state_dict": {**state, "module.seen": torch.ones(())}}, f"{name}.pt")
    (tmp_path / "to_forget").mkdir()
    save_image(torch.rand(3, 40, 50), tmp_path / "to_forget" / "1.png")
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["record"]["steps"] == 85 and names["record"]["moved_rms_sigma"] > 0
    weights = torch.stack([layer.weight for layer in layers])
    assert torch.allclose(names["posterior"].mean["layer.weight"], weights.mean(0), atol=1e-6)
    assert (torch.load("unlearned.pt")["layer.weight"] - weights.mean(0)).abs().max() > 0
