"""Every product that the SliderQuant stage makes is made in ``compute_dtype``."""

from collections import Counter

import pytest
import torch
from datasets import Dataset
from family import load, quantize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Lfm2Config,
    LlamaConfig,
    Qwen3MoeConfig,
)

from llmc_faq_slider import SliderQuantModifier
from llmc_faq_slider.faq.experts import mean_logprobs
from llmc_faq_slider.faq.sampling import sample_batch
from llmc_faq_slider.faq.settings import Sampling
from llmc_faq_slider.report.sensitivity import Format, Sample, sensitivity_record

pytestmark = pytest.mark.integration

SIZES = dict(
    vocab_size=3072,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
ARCHITECTURES = {
    "attention": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "eager": LlamaConfig(**SIZES, attn_implementation="eager"),
    "experts": Qwen3MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64
    ),
    "convolutions": Lfm2Config(**SIZES, full_attn_idxs=[1]),
}


class Products(TorchDispatchMode):
    """Counts what multiplies, by the dtype of its factors."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._overloadpacket in flop_registry or "_grouped_mm" in func.name():
            tensors = [x for x in args if isinstance(x, torch.Tensor)]
            self.found |= {(func.name(), x.dtype): 1 for x in tensors}
        return func(*args, **(kwargs or {}))

    def of(self, dtype):
        return {name for name, found in self.found if found == dtype}


@pytest.fixture(params=ARCHITECTURES)
def source(request, small_model, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[request.param])
    model.bfloat16().save_pretrained(tmp_path / "source")
    AutoTokenizer.from_pretrained(small_model).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def products_of_a_run(source, compute_dtype):
    rows = torch.randint(0, 3072, (4, 32))
    stage = SliderQuantModifier(
        ignore=["lm_head", "re:.*gate$"],
        config_groups={
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "strategy": "group", "group_size": 32},
            }
        },
        shallow_layers="auto",
        batch_size=2,
        compute_dtype=compute_dtype,
    )
    with Products() as products:
        quantize(
            load(source), stage, dataset=Dataset.from_dict({"input_ids": rows.tolist()})
        )
    return products


def test_no_product_has_16_bits(source):
    products = products_of_a_run(source, "float32")
    assert products.of(torch.float32)
    assert not products.of(torch.bfloat16)


@pytest.mark.parametrize("source", ["attention"], indirect=True)
def test_products_of_16_bits_are_seen(source):
    assert products_of_a_run(source, "bfloat16").of(torch.bfloat16)


@pytest.mark.parametrize("source", ["attention"], indirect=True)
def test_the_sensitivity_command_multiplies_as_the_stage(source, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    with Products() as products:
        sensitivity_record(str(source), Format(group_size=32), Sample(None, 2, 16))
    assert products.of(torch.float32)
    assert not products.of(torch.bfloat16)


@pytest.mark.parametrize("source", ["attention"], indirect=True)
def test_answers_and_scores_multiply_as_the_stage(source, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    model = load(source)
    with Products() as products:
        (draw,) = sample_batch(model, [[5, 6]], [0], Sampling(1.0, 1.0, 5, 4), [])
        mean_logprobs(model, [[5, 6]], [draw.ids])
    assert products.of(torch.float32)
    assert not products.of(torch.bfloat16)
