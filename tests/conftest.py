"""Make the repository's files importable, whatever folder pytest was started in; keep
all off the network; and start what takes longest early."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# the networks here are tiny: a second thread costs more than it brings
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ |= {"PYTHONPATH": str(ROOT),  # of the programs that the tests start, too
               "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Last what waits for the programs that run beside."""
    items.sort(key=lambda item: "shipped" in item.fixturenames)


class Beside:
    """Programs that run one after the other on another core, beside the first tests;
    each has a folder and a future of its outputs."""

    def __init__(self):
        self.pool, self.running = ThreadPoolExecutor(1), None

    def start(self, folder, *command_lines):
        return folder, self.pool.submit(self.run, folder, command_lines)

    def run(self, folder, command_lines):
        outputs = []
        for args in command_lines:
            self.running = subprocess.Popen([sys.executable, *map(str, args)], cwd=folder,
                                            text=True, stdout=subprocess.PIPE,
                                            stderr=subprocess.PIPE)
            out, err = self.running.communicate()
            assert self.running.returncode == 0, err
            outputs.append(out)
        return outputs

    def stop(self):
        self.pool.shutdown(wait=False, cancel_futures=True)
        if self.running is not None:
            self.running.kill()


@pytest.fixture(scope="session", autouse=True)
def beside(request, tmp_path_factory):
    """{name: (folder, future)} of the programs that the tests about to run will ask
    for."""
    tiny = ROOT / "tests" / "sd_tiny.py"
    programs = {
        "tiny": [(tiny, "."), *(
            (tiny, "unlearn", "--checkpoint", "tiny.ckpt", "--merges", "merges.txt", "--size", 16,
             "--device", "cpu", "--concept", shape, "--images", f"{shape}s", "--output",
             f"no-{shape}.ckpt", "--function-space") for shape in ("circle", "square"))],
        "shipped": [
            (ROOT / "vdu.py", "--forget-class", 1, "--function-space", "--anchors", 150, "--steps",
             40, "--kappa", 6),
            (ROOT / "vdu.py", "--forget-class", 1, "--anchors", 20, "--steps", 25, "--batch-size",
             64, "--output", "two-terms.pt")],
    }
    asked = {name for item in request.session.items for name in item.fixturenames}
    programs_beside = Beside()
    yield {name: programs_beside.start(tmp_path_factory.mktemp(name), *lines)
           for name, lines in programs.items() if name in asked}
    programs_beside.stop()
