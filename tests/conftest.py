"""Make the repository's files importable, whatever folder pytest was started in; and start the longest training early."""

import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the networks here are tiny: a second thread costs more than it brings

import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def tiny_stable_diffusion(request, tmp_path_factory):
    """(process, folder): sd_tiny.py at work beside the first tests, on another core, where a test will ask for its model."""
    if not any("tiny" in item.fixturenames for item in request.session.items):
        yield None
        return
    folder = tmp_path_factory.mktemp("sd")
    process = subprocess.Popen([sys.executable, str(ROOT / "tests" / "sd_tiny.py"), str(folder)], env={**os.environ, "PYTHONPATH": str(ROOT)},
                               text=True, stderr=subprocess.PIPE)
    yield process, folder
    process.kill()
    process.wait()
