"""Channel scales are learned only where they change nothing that a layer computes."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BitNetConfig,
    DiffLlamaConfig,
    FalconH1Config,
    Gemma3TextConfig,
    LlamaConfig,
    MiniMaxConfig,
    MistralConfig,
    NemotronConfig,
    Olmo2Config,
    OlmoConfig,
    Qwen2Config,
    Qwen3Config,
)

from llmc_faq_slider.slider.folds import exact_places, left_out
from llmc_faq_slider.slider.places import fold_places
from llmc_faq_slider.slider.quantizer import WeightGrid
from llmc_faq_slider.slider.stream import capture_decoder
from llmc_faq_slider.slider.student import LinearGrids

pytestmark = pytest.mark.unit

SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEAD = {"head_dim": 8}
# Where the names of modules propose scales that change the layer, by their sources.
INEXACT = {
    "llama": (LlamaConfig(**SIZES), set()),
    "qwen2": (Qwen2Config(**SIZES), set()),
    "qwen3": (Qwen3Config(**SIZES, **HEAD), set()),
    "mistral": (MistralConfig(**SIZES), set()),
    "gemma3": (Gemma3TextConfig(**SIZES, **HEAD), set()),
    # no gate between up and down, but a square
    "nemotron": (NemotronConfig(**SIZES), {"mlp.up_proj"}),
    # norms behind attention and mlp, not before them
    "olmo2": (Olmo2Config(**SIZES), {"post_attention_layernorm"}),
    # norms before o and down
    "bitnet": (BitNetConfig(**SIZES), {"self_attn.v_proj", "mlp.up_proj"}),
    # a norm over the difference of two attentions
    "diffllama": (DiffLlamaConfig(**SIZES), {"self_attn.v_proj"}),
    # values are clamped
    "olmo": (OlmoConfig(**SIZES, clip_qkv=0.5), {"self_attn.v_proj"}),
    # the norm's output is the residual too
    "minimax": (
        MiniMaxConfig(
            **SIZES,
            **HEAD,
            num_local_experts=2,
            num_experts_per_tok=1,
            layer_types=["full_attention"] * 2,
        ),
        {"input_layernorm"},
    ),
    # a Mamba mixer reads the same norm
    "falcon_h1": (
        FalconH1Config(
            **SIZES,
            **HEAD,
            mamba_d_ssm=64,
            mamba_n_heads=8,
            mamba_d_head=8,
            mamba_d_state=8,
            mamba_n_groups=1,
            mamba_chunk_size=8,
        ),
        {"input_layernorm"},
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", INEXACT)
def test_places_are_accepted_by_computation(name, dtype, said) -> None:
    config, inexact = INEXACT[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 1 and "norm" in key:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif parameter.ndim > 1:
                parameter.mul_(5)
    model.to(dtype)
    layers = list(model.model.layers)
    rows = [torch.randint(3, 128, (24,)) for _ in range(2)]
    _, calls = capture_decoder(model, layers, rows, torch.device("cpu"))
    linears = {
        key: LinearGrids(WeightGrid(4, True, 8, dtype), None)
        for key, module in layers[0].named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    before = {key: value.clone() for key, value in model.state_dict().items()}
    exact, others = exact_places(calls, 0, linears)
    proposed = {place.source for place in fold_places(layers[0], set(linears))}
    assert {place.source for place in others} == inexact & proposed == inexact
    assert {place.source for place in exact} == proposed - inexact
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    said.clear()
    sentences = left_out({0: others, 1: others})
    assert [s.strip() for s in said] == sentences and len(sentences) == len(inexact)
    assert all("in 2 layers" in sentence for sentence in sentences)
