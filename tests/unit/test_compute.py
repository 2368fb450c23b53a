"""How a device computes: the dtype of matrix products, and the same bits."""

import pytest
import torch

from llmc_faq_slider.slider.compute import deterministic, product_dtype

pytestmark = pytest.mark.unit

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


@pytest.mark.parametrize(
    "able, expected",
    [
        ({"amx_bf16": True}, torch.bfloat16),
        ({"amx_bf16": False, "avx512_bf16": True}, torch.float32),
        ({"architecture": "aarch64"}, torch.float32),
    ],
)
def test_bf16_where_the_cpu_multiplies_it_faster(monkeypatch, able, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert product_dtype("auto", CPU) == expected
    assert product_dtype("auto", GPU) == torch.bfloat16


@pytest.mark.parametrize("device", [CPU, GPU])
def test_what_the_recipe_says_counts(device):
    assert product_dtype("bfloat16", device) == torch.bfloat16
    assert product_dtype("float32", device) == torch.float32


def test_this_machine_is_known():
    assert "architecture" in torch.cpu.get_capabilities()


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
