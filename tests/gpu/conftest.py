"""Tests that need an NVIDIA GPU: ``make test-gpu``."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))


@pytest.fixture(autouse=True)
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("PyTorch finds no NVIDIA GPU here")
    return torch.device("cuda")
