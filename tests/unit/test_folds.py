"""Channel scales are learned only where they change nothing that a layer computes."""

import pytest
import torch
import transformers
from llmcompressor.modeling.moe.linearize import linearize_moe
from transformers import AutoModelForCausalLM

from llmc_faq_slider.slider.folds import exact_places, left_out
from llmc_faq_slider.slider.quantizer import WeightGrid
from llmc_faq_slider.slider.stream import capture_decoder
from llmc_faq_slider.slider.student import LinearGrids, StudentLayer

pytestmark = pytest.mark.unit

SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
HEADS = GROUPED | {"head_dim": 8}
LATENT = SIZES | {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SHARED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 0,
    "n_group": 1,
    "topk_group": 1,
}
MAMBA = {
    "mamba_d_ssm": 64,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
V_O, UP_DOWN = "self_attn.v_proj", "mlp.up_proj"
NORMS = ["input_layernorm", "post_attention_layernorm"]
LLAMA = [*NORMS, V_O, UP_DOWN]
GEMMA = ["input_layernorm", "pre_feedforward_layernorm", V_O, UP_DOWN]
MLA = ["self_attn.q_a_layernorm", "self_attn.kv_a_layernorm"]
EXPERTS = "mlp.experts.*.up_proj"
# Config, sources of scales that change nothing, and of others whose names propose them.
LAYERS = {
    "Llama": (GROUPED, LLAMA, []),
    "Mistral": (GROUPED, LLAMA, []),
    "Qwen2": (GROUPED, LLAMA, []),
    "Qwen3": (HEADS, LLAMA, []),
    "Gemma": (HEADS, LLAMA, []),
    "Gemma2": (HEADS, GEMMA, []),
    "Gemma3Text": (HEADS, GEMMA, []),
    "SmolLM3": (GROUPED, LLAMA, []),
    "Granite": (GROUPED, LLAMA, []),
    # one norm for attention and MLP, and it subtracts the mean
    "Cohere": (GROUPED, ["input_layernorm", V_O, UP_DOWN], []),
    # rows of one linear belong to queries, keys and values, or to gate and up
    "Phi3": (GROUPED, [*NORMS, "self_attn.qkv_proj", "mlp.gate_up_proj"], []),
    "Glm4": (HEADS, [*NORMS, V_O, "mlp.gate_up_proj"], []),
    "GPTNeoX": (SIZES, [*NORMS, "attention.query_key_value"], []),
    "Bloom": (
        {"vocab_size": 128, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        [*NORMS, "self_attention.query_key_value"],
        [],
    ),
    "Falcon": (
        {
            "vocab_size": 128,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
            "alibi": False,
        },
        ["ln_attn", "ln_mlp", "self_attention.query_key_value"],
        [],
    ),
    # nothing between up and down but an activation
    "Phi": (SIZES, ["input_layernorm", V_O], []),
    "Starcoder2": (GROUPED, [*NORMS, V_O], []),
    "Nemotron": (GROUPED, [*NORMS, V_O], [UP_DOWN]),
    # norms behind attention and MLP, not before them
    "Olmo2": (GROUPED, [V_O, UP_DOWN], []),
    "Olmo3": (GROUPED, [V_O, UP_DOWN], []),
    # norms before o and down
    "BitNet": (
        GROUPED,
        [*NORMS, "self_attn.attn_sub_norm", "mlp.ffn_sub_norm"],
        [V_O, UP_DOWN],
    ),
    # a norm over the difference of two attentions
    "DiffLlama": (GROUPED, [*NORMS, UP_DOWN], [V_O]),
    # values are clamped, and norms have no gain
    "Olmo": (GROUPED | {"clip_qkv": 0.5}, [UP_DOWN], [V_O]),
    # values are normalised
    "Gemma4Text": (
        HEADS
        | {
            "global_head_dim": 8,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 128,
            "num_kv_shared_layers": 0,
        },
        [g for g in GEMMA if g != V_O],
        [V_O],
    ),
    # a Mamba mixer reads the norm after it was multiplied
    "FalconH1": (
        HEADS | MAMBA,
        ["pre_ff_layernorm", V_O, "feed_forward.up_proj"],
        [],
    ),
    "DeepseekV3": (
        LATENT | SHARED,
        [*NORMS, *MLA, EXPERTS, "mlp.shared_experts.up_proj"],
        [],
    ),
    "MiniCPM3": (LATENT, [*NORMS, *MLA, UP_DOWN], []),
    "Mixtral": (GROUPED | LOCAL, [*NORMS, V_O, EXPERTS], []),
    "Qwen3Moe": (HEADS | ROUTED, [*NORMS, V_O, EXPERTS], []),
    "Qwen2Moe": (
        GROUPED | ROUTED | {"shared_expert_intermediate_size": 32},
        [*NORMS, V_O, EXPERTS, "mlp.shared_expert.up_proj"],
        [],
    ),
    "Afmoe": (
        HEADS | ROUTED | {"num_dense_layers": 0, "num_shared_experts": 1},
        [
            "input_layernorm",
            "pre_mlp_layernorm",
            V_O,
            EXPERTS,
            "mlp.shared_experts.up_proj",
        ],
        [],
    ),
    # clamped between up and down
    "GptOss": (HEADS | LOCAL, [*NORMS, V_O], [EXPERTS]),
    # the norms' output is the residual too
    "MiniMax": (
        HEADS | LOCAL | {"layer_types": ["full_attention"] * 2},
        [V_O, EXPERTS],
        NORMS,
    ),
}
# Left in full precision, as the recipes leave them.
ROUTERS = ("mlp.gate", "router", "router.gate", "shared_expert_gate")


@pytest.fixture(params=LAYERS)
def captured(request):
    """Layer 0 of a random model, what calls it, formats, and the expected places."""
    sizes, exact, inexact = LAYERS[request.param]
    config = getattr(transformers, f"{request.param}Config")(**sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 1 and ("norm" in key or "ln_" in key):
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif parameter.ndim > 1:
                parameter.mul_(5)
    linearize_moe(model)
    decoder = model.get_decoder()
    layers = list(decoder.h if hasattr(decoder, "h") else decoder.layers)
    linears = {
        key: LinearGrids(WeightGrid(4, True, 8, torch.float32), None)
        for key, module in layers[0].named_modules()
        if isinstance(module, torch.nn.Linear) and not key.endswith(ROUTERS)
    }
    return model, layers, linears, set(exact), set(inexact)


def captured_calls(model, layers):
    rows = [torch.randint(3, 128, (24,)) for _ in range(2)]
    return capture_decoder(model, layers, rows, torch.device("cpu"))[1]


def kinds(places):
    return {place.kind[0] for place in places}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_places_are_accepted_by_computation(captured, dtype, said) -> None:
    model, layers, linears, expected, inexact = captured
    model.to(dtype)
    calls = captured_calls(model, layers)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    exact, others = exact_places(calls, 0, linears)
    assert kinds(exact) == expected and kinds(others) == inexact
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    said.clear()
    sentences = left_out({0: others, 1: others})
    assert [s.strip() for s in said] == sentences and len(sentences) == len(inexact)
    assert all("in 2 layers" in sentence for sentence in sentences)


@torch.no_grad()
def test_scales_leave_the_layer_as_it_is_installed_and_folded(captured) -> None:
    model, layers, linears, *_ = captured
    calls, layer = captured_calls(model, layers), layers[0]
    hidden = calls.dry.states[0]
    exact, _ = exact_places(calls, 0, linears)
    importance = {
        name: torch.rand(layer.get_submodule(name).in_features) + 0.1
        for name in linears
    }
    generator = torch.Generator().manual_seed(0)
    student = StudentLayer(layer, linears, importance, 0, False, exact, 0.5, generator)
    scales = [*student.norm_scales.values(), *student.channel_scales]
    assert len(scales) == len(exact)
    for scale in scales:
        scale.factor.copy_(torch.exp(0.5 * torch.randn(scale.factor.shape)))

    def added():
        output = calls.whole_output(0, hidden)
        return (output if torch.is_tensor(output) else output[0]) - hidden

    before = added()
    with student.installed(0.0, torch.float32):
        installed = added()
    folded = student.fold()
    for name, linear in folded.linears.items():
        layer.get_submodule(name).weight.copy_(linear.weight)
        if linear.bias is not None:
            layer.get_submodule(name).bias.copy_(linear.bias)
    for name, tensor in folded.plain.items():
        stored = layer.get_parameter(name)
        assert not stored.any() or not torch.equal(stored, tensor), name
        layer.get_parameter(name).copy_(tensor)
    for found in (installed, added()):
        assert (found - before).norm() < 1e-5 * before.norm()
