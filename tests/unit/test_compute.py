"""How a device computes: the same bits every time."""

import pytest
import torch

from llmc_faq_slider.slider.compute import deterministic

pytestmark = pytest.mark.unit


def test_gpus_are_told_to_be_deterministic_and_set_back(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(ArithmeticError), deterministic():
        assert torch.get_deterministic_debug_mode() == 2
        assert not torch.utils.deterministic.fill_uninitialized_memory
        raise ArithmeticError
    assert torch.get_deterministic_debug_mode() == 0
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_cpus_are_left_alone():
    with deterministic():
        assert torch.get_deterministic_debug_mode() == 0
