"""In which dtype products are made, and what comes out of them."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import checkpoint

from llmc_faq_slider.products import multiplied_in, product_dtype

pytestmark = pytest.mark.unit

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


@pytest.mark.parametrize(
    "able, used, expected",
    [
        ({"amx_bf16": True}, "AVX512", torch.bfloat16),
        ({"amx_bf16": False, "avx512_bf16": True}, "AVX512", torch.float32),
        ({"avx512_bf16": True, "cpu_name": "AMD EPYC"}, "AVX512", torch.bfloat16),
        ({"avx512_bf16": True, "cpu_name": "AMD EPYC"}, "AVX2", torch.float32),
        ({"cpu_name": "AMD EPYC"}, "AVX2", torch.float32),
        ({"architecture": "aarch64"}, "DEFAULT", torch.float32),
    ],
)
def test_bf16_where_the_cpu_multiplies_it_faster(monkeypatch, able, used, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: used)
    assert product_dtype("auto", CPU) == expected
    assert product_dtype("auto", GPU) == torch.bfloat16


@pytest.mark.parametrize("device", [CPU, GPU])
def test_what_the_recipe_says_counts(device):
    assert product_dtype("bfloat16", device) == torch.bfloat16
    assert product_dtype("float32", device) == torch.float32


def test_this_machine_is_known():
    able = torch.cpu.get_capabilities()
    assert "architecture" in able
    assert isinstance(torch.backends.cpu.get_cpu_capability(), str)
    if able["architecture"] == "x86_64":
        assert "cpu_name" in able


def random(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape).to(dtype)


OFFSETS = torch.tensor([8, 16, 24], dtype=torch.int32)
PRODUCTS = {
    "linear": (F.linear, [(3, 5, 32), (64, 32), (64,)]),
    "linear without bias": (F.linear, [(5, 32), (64, 32)]),
    "matmul": (torch.matmul, [(2, 3, 8, 32), (2, 3, 32, 8)]),
    "matrix times vector": (torch.matmul, [(8, 32), (32,)]),
    "baddbmm": (torch.baddbmm, [(2, 8, 8), (2, 8, 32), (2, 32, 8)]),
    "einsum": (lambda a, b: torch.einsum("bik,bjk->bij", a, b), [(2, 8, 32)] * 2),
    "attention": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        [(1, 2, 16, 32)] * 3,
    ),
    "masked attention": (F.scaled_dot_product_attention, [(1, 2, 16, 32)] * 3),
    "convolution": (
        lambda x, w: F.conv1d(x, w, padding=3, groups=16),
        [(2, 16, 20), (16, 1, 4)],
    ),
    "experts": (
        lambda x, w: F.grouped_mm(x, w, offs=OFFSETS),
        [(24, 32), (3, 32, 16)],
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inference", [False, True])
def test_products_are_those_of_float32_rounded_once(name, dtype, inference):
    function, shapes = PRODUCTS[name]
    operands = [random(*shape, dtype=dtype) for shape in shapes]
    with torch.inference_mode(inference), multiplied_in(torch.float32, CPU):
        found = function(*operands)
    assert found.dtype == dtype
    assert torch.equal(found, function(*(x.float() for x in operands)).to(dtype))


@pytest.mark.parametrize("name", PRODUCTS)
def test_gradients_are_products_too(name):
    function, shapes = PRODUCTS[name]
    operands = [random(*shape).requires_grad_() for shape in shapes]
    exact = [x.detach().float().requires_grad_() for x in operands]
    with multiplied_in(torch.float32, CPU):
        found = checkpoint(function, *operands, use_reentrant=False)
        upstream = random(*found.shape)
        gradients = torch.autograd.grad(found, operands, upstream)
    expected = torch.autograd.grad(function(*exact), exact, upstream.float())
    for gradient, other in zip(gradients, expected, strict=True):
        assert gradient.dtype == torch.bfloat16
        if "attention" in name:
            # its backward pass reads its output, which is rounded between them
            error = (gradient.float() - other).norm() / other.norm()
            assert error < 0.02
        else:
            assert torch.equal(gradient, other.bfloat16())


def test_no_product_is_made_narrower():
    x, weight = (random(4, 8, dtype=torch.float32) for _ in range(2))
    for dtype in (torch.bfloat16, torch.float32):
        with multiplied_in(dtype, CPU):
            assert torch.equal(F.linear(x, weight), x @ weight.T)


@pytest.mark.parametrize("dtype, device", [(torch.bfloat16, CPU), (torch.float32, GPU)])
def test_nothing_is_intercepted_where_nothing_is_widened(dtype, device):
    x, weight = random(64, 64), random(64, 64)
    plain = F.linear(x, weight)
    with multiplied_in(dtype, device):
        assert torch.equal(F.linear(x, weight), plain)
        assert not _get_current_dispatch_mode_stack()
