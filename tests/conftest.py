"""Make the repository's files importable, whatever folder pytest was started in; keep
all off the network; and start what takes longest early."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# the networks here are tiny: a second thread costs more than it brings
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(
    PYTHONPATH=str(ROOT),  # of the programs that the tests start, too
    http_proxy="http://127.0.0.1:9",
    https_proxy="http://127.0.0.1:9")
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
torch.cpu._is_avx512_bf16_supported = bool  # no autocast: every CPU computes the same

# What a newcomer types, with less of everything: first the model that ships with the
# code forgets a digit; then the three commands, one after the other.
PROGRAMS = """
vdu.py --forget-class 1 --seed 1 --forget-samples 80 --anchors 80 --steps 24 --batch-size 24 \
    --share 0.4 --lr 0.4
vdu.py --forget-class 1 --forget-samples 60 --anchors 60 --steps 6 --batch-size 64 --paper \
    --lr 0.03 --output paper.pt
train_ddpm.py --steps 12 --batch-size 4
vdu.py --forget-class 7 --forget-samples 20 --anchors 10 --steps 2 --batch-size 4
evaluate.py --samples 20 --sampling-steps 3 --bits 2
evaluate.py --after checkpoints/mnist-forget-1.pt --samples 200 --sampling-steps 12 --bits 4
""".strip().splitlines()


def pytest_collection_modifyitems(items):
    """Last what waits for the programs that run beside."""
    items.sort(key=lambda item: "test_shipped" in item.nodeid)


@pytest.fixture(scope="session", autouse=True)
def shipped(request, tmp_path_factory):
    """Run the programs on another core, if a test asks for them. Returns a function:
    their folder, and what each printed, once all have ended."""
    folder = tmp_path_factory.mktemp("shipped")
    log = folder / "log.txt"
    if not any("test_shipped" in item.nodeid for item in request.session.items):
        yield
        return
    with open(log, "w") as file:
        beside = subprocess.Popen(
            [sys.executable, "-u", __file__], cwd=folder, stdout=file, stderr=file)

    def outputs():
        code = beside.wait(timeout=1600)
        printed = log.read_text()
        assert code == 0, printed
        return folder, printed.split("$ ")[1:]

    yield outputs
    beside.kill()


def run_programs():
    """One after the other, each as a file of its own; the first that fails ends it."""
    for line in PROGRAMS:
        print("$", line)
        sys.argv = line.split()
        runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")


if __name__ == "__main__":
    run_programs()
