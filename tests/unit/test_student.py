"""Folding: what a layer computes while it learns is what its folded tensors compute.

Random weights are enough here: the tests prove arithmetic, not quality.
"""

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from llmc_faq_slider.slider.learnables import smoothing_start
from llmc_faq_slider.slider.places import fold_places, norm_offset
from llmc_faq_slider.slider.quantizer import ActivationGrid, WeightGrid
from llmc_faq_slider.slider.stream import capture_decoder
from llmc_faq_slider.slider.student import LinearGrids, StudentLayer

pytestmark = pytest.mark.unit

LINEARS = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
]
SIZES = dict(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    head_dim=16,
    max_position_embeddings=64,
)
ARCHITECTURES = {
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2),
    "llama_mha": LlamaConfig(**SIZES, num_key_value_heads=4, attention_bias=True),
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=2),
    "qwen3": Qwen3Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES, num_key_value_heads=1, sliding_window=8),
    "gemma3": Gemma3TextConfig(
        **SIZES, num_key_value_heads=1, sliding_window=8, sliding_window_pattern=2
    ),
}


def random_model(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[name]).eval()
    with torch.no_grad():
        for module_name, parameter in model.named_parameters():
            if "norm" in module_name or module_name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def places_of(layer, linears):
    """Where scales fold: what a test of its own shows to be read is given here."""
    before_mlp = "pre_feedforward_layernorm"
    if not hasattr(layer, before_mlp):
        before_mlp = "post_attention_layernorm"
    readers = {
        "input_layernorm": [f"self_attn.{name}_proj" for name in "qkv"],
        before_mlp: ["mlp.gate_proj", "mlp.up_proj"],
    }
    return [ways[0] for ways in fold_places(layer, linears, readers)]


def student_of(
    layer, weight_grid, input_grid=None, rank=4, rounding=True, strength=0.5
):
    grids = {name: LinearGrids(weight_grid, input_grid) for name in LINEARS}
    importance = {
        name: torch.rand(layer.get_submodule(name).in_features) + 0.1
        for name in LINEARS
    }
    generator = torch.Generator().manual_seed(1)
    places = places_of(layer, set(LINEARS))
    return StudentLayer(
        layer, grids, importance, rank, rounding, places, strength, generator
    )


@torch.no_grad()
def randomise(student, kinds):
    for learnable in student.learnables():
        if learnable.kind not in kinds:
            continue
        for parameter in learnable.parameters():
            noise = torch.randn_like(parameter)
            if learnable.kind == "channel_scale":
                parameter.copy_(torch.exp(0.5 * noise))
            elif learnable.kind == "clipping":
                parameter.copy_(1.5 + noise)
            elif learnable.kind == "rounding":
                parameter.copy_(torch.rand_like(parameter) - 0.5)
            else:
                parameter.add_(0.05 * noise)


@torch.no_grad()
def write_folded(layer, folded, grids):
    """Store folded tensors the plainest way there is, as the kernel multiplies them."""
    for name, linear in folded.linears.items():
        module, grid = layer.get_submodule(name), grids[name].weight
        stored = grid.fake_quantize(linear.weight, linear.scale, linear.zero_point)
        module.weight.copy_(grid.multiplied(stored, linear.scale))
        if linear.bias is not None:
            module.bias.copy_(linear.bias)
    for name, tensor in folded.plain.items():
        layer.get_parameter(name).copy_(tensor)


def with_quantized_inputs(layer, grids):
    def hook_for(grid):
        return lambda _module, args: (grid.fake_quantize(args[0]),)

    for name, grid in grids.items():
        if grid.input is not None:
            layer.get_submodule(name).register_forward_pre_hook(hook_for(grid.input))


def inputs_of_first_layer(model):
    rows = [torch.randint(0, 64, (20,)) for _ in range(3)]
    layers = list(model.model.layers)
    hidden, calls = capture_decoder(model, layers, rows, torch.device("cpu"))
    return torch.cat(hidden), calls


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(
    ("weight_grid", "input_grid"),
    [
        (WeightGrid(4, True, 16, torch.float32), ActivationGrid(8)),
        (WeightGrid(2, False, None, torch.float32), None),
        (WeightGrid(4, True, 32, torch.float32, True), ActivationGrid(8, True, True)),
    ],
)
def test_folded_layer_computes_what_training_saw(name, weight_grid, input_grid):
    model = random_model(name)
    hidden, calls = inputs_of_first_layer(model)
    layer = model.model.layers[0]
    student = student_of(layer, weight_grid, input_grid)
    randomise(student, {"rounding", "low_rank", "clipping", "channel_scale"})
    with torch.no_grad(), student.installed(1.0, torch.float32):
        trained = calls.run(0, hidden)
    grids = {n: linear.grids for n, linear in student.linears.items()}
    write_folded(layer, student.fold(), grids)
    with_quantized_inputs(layer, grids)
    with torch.no_grad():
        folded = calls.run(0, hidden)
    same = torch.isclose(folded, trained, rtol=1e-4, atol=1e-5)
    # An input on the edge between two codes may fall to either side by fp32 rounding.
    assert same.all() if input_grid is None else same.float().mean() > 0.95


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_channel_scales_alone_leave_full_precision_logits_unchanged(name):
    model = random_model(name)
    ids = torch.randint(0, 64, (2, 24))
    with torch.no_grad():
        before = model(ids).logits
    for layer in model.model.layers:
        student = student_of(
            layer, WeightGrid(4, True, 16, torch.float32), rank=0, rounding=False
        )
        assert len(student.norm_scales) == 2 and len(student.channel_scales) == 2
        randomise(student, {"channel_scale"})
        folded = student.fold()
        with torch.no_grad():
            for linear_name, linear in folded.linears.items():
                module = layer.get_submodule(linear_name)
                assert not torch.equal(module.weight, linear.weight)
                module.weight.copy_(linear.weight)
                if linear.bias is not None:
                    module.bias.copy_(linear.bias)
            for name, tensor in folded.plain.items():
                layer.get_parameter(name).copy_(tensor)
    with torch.no_grad():
        after = model(ids).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_norm_scales_are_exact_in_the_stored_dtype():
    model = random_model("qwen3").to(torch.bfloat16)
    student = student_of(model.model.layers[0], WeightGrid(4, True, 16, torch.bfloat16))
    randomise(student, {"channel_scale"})
    for scale in student.norm_scales.values():
        stored = scale.folded().detach()
        assert torch.equal(stored, stored.to(torch.bfloat16).float())
        gain = stored + scale.offset
        torch.testing.assert_close(gain * scale.multiplier(), scale.gain)


def test_every_learnable_gets_a_gradient_and_the_modules_are_left_alone():
    model = random_model("qwen2")
    hidden, calls = inputs_of_first_layer(model)
    layer = model.model.layers[0]
    before = {n: p.clone() for n, p in layer.named_parameters()}
    student = student_of(
        layer, WeightGrid(3, False, 16, torch.float32), ActivationGrid(8)
    )
    randomise(student, {"rounding", "low_rank", "clipping", "channel_scale"})
    with student.installed(0.5, torch.float32):
        calls.run(0, hidden).square().mean().backward()
    for learnable in student.learnables():
        for parameter in learnable.parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0
    assert all("forward" not in m.__dict__ for m in layer.modules())
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter, before[name])


def test_start_is_the_full_precision_layer_at_ratio_zero():
    model = random_model("gemma3")
    hidden, calls = inputs_of_first_layer(model)
    student = student_of(model.model.layers[0], WeightGrid(4, True, 16, torch.float32))
    with torch.no_grad():
        teacher = calls.run(0, hidden)
        with student.installed(0.0, torch.float32):
            learner = calls.run(0, hidden)
    torch.testing.assert_close(learner, teacher)


def test_places_need_a_linear_of_this_stage_and_none_of_another():
    layer = random_model("llama").model.layers[0]
    assert len(places_of(layer, set(LINEARS))) == 4
    attention = {name for name in LINEARS if name.startswith("self_attn")}
    sources = {"input_layernorm", "self_attn.v_proj"}
    assert {p.source for p in places_of(layer, attention)} == sources
    assert places_of(layer, {"mlp.down_proj"}) == []
    layer.self_attn.q_proj.quantization_scheme = "of another stage"
    assert {p.source for p in places_of(layer, attention)} == sources
    left = attention - {"self_attn.q_proj"}
    assert {p.source for p in places_of(layer, left)} == {"self_attn.v_proj"}


def test_norms_that_hold_no_plain_gain_get_no_scale():
    assert norm_offset(nn.GroupNorm(2, 8)) is None
    assert norm_offset(nn.BatchNorm1d(8)) is None
    assert norm_offset(nn.Identity()) is None
    shifted = nn.LayerNorm(8)
    nn.init.normal_(shifted.weight), nn.init.normal_(shifted.bias)
    assert norm_offset(shifted) == 0.0
    assert norm_offset(random_model("llama").model.layers[0].input_layernorm) == 0.0
    assert norm_offset(random_model("gemma3").model.layers[0].input_layernorm) == 1.0


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_smoothing_shares_the_spread_of_the_inputs(strength):
    spread = torch.linspace(-3, 3, 32).exp()
    weight = torch.full((8, 32), 0.1)
    start = smoothing_start(spread.square(), [weight], strength)
    assert start.log().mean().abs() < 1e-5
    torch.testing.assert_close(start, spread.pow(strength))


def test_silent_channels_start_at_one():
    importance = torch.tensor([0.0, 1.0, 4.0])
    weight = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    start = smoothing_start(importance, [weight], 0.5)
    assert torch.isfinite(start).all() and start[0] == 1 and start[2] == 1


def test_clipping_starts_on_the_smoothed_weights():
    layer = random_model("qwen3").model.layers[0]
    grid = WeightGrid(4, True, 16, torch.float32)
    for name, linear in student_of(layer, grid).linears.items():
        with torch.no_grad():
            weight, _ = linear.folded()
            scale, _ = linear.clipping.apply(weight)
        largest = grid.grouped(weight).abs().amax(-1)
        assert (scale.abs() <= largest / 7.5 * 1.001).all(), name
        assert (scale.abs() >= largest / 7.5 * 0.39).all(), name


@pytest.mark.parametrize(("bits", "smoothed"), [(4, True), (8, False)])
def test_only_inputs_of_few_bits_are_smoothed_by_themselves(bits, smoothed):
    layer = random_model("qwen3").model.layers[0]
    grid = WeightGrid(4, True, 16, torch.float32)
    student = student_of(layer, grid, ActivationGrid(bits), strength="auto")
    scales = [*student.norm_scales.values(), *student.channel_scales]
    assert len(scales) == 4
    assert all((scale.start != 1).any() == smoothed for scale in scales)
