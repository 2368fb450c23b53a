"""The dtype of matrix products, by what the device is good at."""

import pytest
import torch

from llmc_faq_slider.slider.compute import product_dtype

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
