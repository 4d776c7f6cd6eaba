"""Make the repository's files importable, whatever folder pytest was started in; keep
all off the network; and start what takes longest early."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
# the networks here are tiny: a second thread costs more than it brings
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ |= {"PYTHONPATH": str(ROOT),  # of the programs that the tests start, too
               "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402

import evaluate  # noqa: E402
import train_ddpm  # noqa: E402

torch.set_num_threads(1)
torch.cpu._is_avx512_bf16_supported = bool  # no autocast: every CPU computes the same
PROGRAMS = ["vdu.py --forget-class 1 --anchors 200 --steps 60 --share 0.35",
            "vdu.py --paper --forget-class 1 --anchors 20 --steps 25 --output two.pt"]


def pytest_collection_modifyitems(items):
    """Last what waits for the programs that run beside."""
    items.sort(key=lambda item: "shipped_model" in item.name)


@pytest.fixture(scope="session")
def classifier(tmp_path_factory):
    """The file of evaluate.py's classifier of the 5,000 images, of four epochs in place
    of eight. Copied into a checkpoints/ folder, it is what evaluate.py finds there."""
    cwd = tmp_path_factory.mktemp("classifier")
    images, labels, data = train_ddpm.load_dataset("mnist", train_ddpm.MNIST_5K)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        train = evaluate.train_classifier
        patch.setattr(evaluate, "train_classifier", lambda *args: train(*args, epochs=4))
        checkpoint = SimpleNamespace(data=data)
        evaluate.get_classifier(checkpoint, images, labels, None, None, torch.device("cpu"))
    return next(cwd.glob("checkpoints/*"))


@pytest.fixture(scope="session", autouse=True)
def shipped(request, tmp_path_factory):
    """Run the programs, if they are asked for, one after the other on another core.
    Returns a function: their folder and what each printed, once all have ended."""
    folder = tmp_path_factory.mktemp("shipped")
    code = ("import runpy, sys, torch; torch.cpu._is_avx512_bf16_supported = bool; "
            f"sys.argv.pop(0); runpy.run_path('{ROOT}/' + sys.argv[0], run_name='__main__')")
    start = shlex.join([sys.executable, "-c", code])
    script = "".join(f"{start} {line} > {i}.txt 2>&1 || exit\n"
                     for i, line in enumerate(PROGRAMS))
    asked = any("shipped_model" in item.name for item in request.session.items)
    shell = subprocess.Popen(["sh", "-c", script * asked], cwd=folder, start_new_session=True)

    def outputs():
        code = shell.wait(timeout=1600)
        printed = [path.read_text() for path in sorted(folder.glob("*.txt"))]
        assert code == 0, printed[-1]
        return folder, printed

    yield outputs
    if shell.poll() is None:
        os.killpg(shell.pid, signal.SIGKILL)
