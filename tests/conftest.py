"""Make the repository's files importable, whatever folder pytest was started in."""

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # the networks here are tiny: a second thread costs more than it brings
