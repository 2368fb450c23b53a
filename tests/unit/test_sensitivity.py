"""The sensitivity of single layers, against whole forward passes.

Random weights are enough here: the tests prove arithmetic, not quality.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    Gemma4TextConfig,
    Qwen2Config,
)

from llmc_faq_slider.host.decoder import decoder_layers
from llmc_faq_slider.slider.quantizer import ActivationGrid, WeightGrid
from llmc_faq_slider.slider.sensitivity import measure_sensitivity, sample_rows
from llmc_faq_slider.slider.stream import capture_decoder
from llmc_faq_slider.slider.student import LinearGrids

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")
SIZES = dict(
    vocab_size=64,
    hidden_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=64,
)
GROUPED = SIZES | dict(intermediate_size=96, num_key_value_heads=2)
ARCHITECTURES = {
    "qwen2_biases": Qwen2Config(**GROUPED),
    "gemma2_capped_logits": Gemma2Config(
        **GROUPED, head_dim=16, sliding_window=8, final_logit_softcapping=2.0
    ),
    "gemma3_sliding": Gemma3TextConfig(
        **GROUPED, head_dim=16, sliding_window=8, sliding_window_pattern=2
    ),
    "cohere_scaled_logits": CohereConfig(**GROUPED, logit_scale=0.25),
    "falcon_layers_give_tuples": FalconConfig(**SIZES),
}
GRIDS = LinearGrids(
    WeightGrid(3, False, 32, torch.float32), ActivationGrid(8, symmetric=True)
)


def random_model(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


def linears(layer):
    return {n: m for n, m in layer.named_modules() if isinstance(m, nn.Linear)}


def quantize_in_place(layer):
    for module in linears(layer).values():
        grid = GRIDS.weight
        scale, zero_point = grid.qparams(*grid.bounds(module.weight))
        module.weight.data = grid.fake_quantize(module.weight, scale, zero_point).data
        module.register_forward_pre_hook(
            lambda _module, args: (GRIDS.input.fake_quantize(args[0]),)
        )


def kl_and_loss(reference, model, rows):
    """Means over all tokens of the rows, from whole forward passes."""
    kl, losses = [], []
    for row in rows:
        p = reference(input_ids=row[None]).logits[0].double().log_softmax(-1)
        q = model(input_ids=row[None]).logits[0].double().log_softmax(-1)
        kl += ((p.exp() * (p - q)).sum(-1)).tolist()
        losses += F.nll_loss(q[:-1], row[1:], reduction="none").tolist()
    return sum(kl) / len(kl), sum(losses) / len(losses)


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_layer_as_by_whole_forward_passes(name):
    rows = [torch.randint(0, 64, (length,)) for length in (20, 12, 20, 2, 20)]
    model = random_model(ARCHITECTURES[name])
    layers = [layer for _, layer in decoder_layers(model)]
    grids = {i: dict.fromkeys(linears(x), GRIDS) for i, x in enumerate(layers)}
    before = {n: p.clone() for n, p in model.named_parameters()}

    measured = measure_sensitivity(model, layers, rows, grids, CPU)

    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not any("forward" in m.__dict__ for m in model.modules())
    _, full_loss = kl_and_loss(model, model, rows)
    assert measured.loss == pytest.approx(full_loss, rel=1e-5)
    for index, layer in enumerate(measured.layers):
        changed = random_model(ARCHITECTURES[name])
        quantize_in_place(decoder_layers(changed)[index][1])
        kl, loss = kl_and_loss(model, changed, rows)
        assert kl > 1e-5
        assert layer.kl == pytest.approx(kl, rel=1e-3)
        assert layer.loss_increase == pytest.approx(loss - full_loss, abs=1e-5)


def test_layers_without_formats_count_as_zero():
    model = random_model(ARCHITECTURES["qwen2_biases"])
    layers = [layer for _, layer in decoder_layers(model)]
    rows = [torch.arange(10)]
    measured = measure_sensitivity(
        model, layers, rows, {2: {"mlp.down_proj": GRIDS}}, CPU
    )
    assert [layer.kl > 0 for layer in measured.layers] == [False, False, True, False]


def test_a_model_that_overflows_is_refused():
    model = random_model(ARCHITECTURES["qwen2_biases"])
    model.lm_head.weight.data[0, 0] = torch.inf
    layers = [layer for _, layer in decoder_layers(model)]
    with pytest.raises(ValueError, match="full-precision model's loss is"):
        measure_sensitivity(model, layers, [torch.arange(10)], {}, CPU)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            Gemma3nTextConfig(
                **GROUPED,
                head_dim=16,
                sliding_window=8,
                vocab_size_per_layer_input=64,
                hidden_size_per_layer_input=8,
                num_kv_shared_layers=0,
                laurel_rank=8,
                activation_sparsity_pattern=[0.0] * 4,
            ),
            r"hidden states of shape \[4, 1, 10, 64\]",
        ),
        (
            Gemma4TextConfig(
                **GROUPED,
                head_dim=16,
                global_head_dim=16,
                vocab_size_per_layer_input=64,
                hidden_size_per_layer_input=8,
                num_kv_shared_layers=0,
            ),
            "more than hidden states that depends on the tokens",
        ),
    ],
)
def test_layers_that_are_no_plain_chain_are_refused(config, message):
    model = random_model(config)
    layers = [layer for _, layer in decoder_layers(model)]
    rows = [torch.arange(10), torch.arange(10, 20)]
    with pytest.raises(ValueError, match=message):
        capture_decoder(model, layers, rows, CPU)


def test_sampled_rows_are_spread_and_cut():
    rows = [torch.full((length,), i) for i, length in enumerate([9, 3, 9, 9, 9])]
    sampled = sample_rows(rows, count=3, tokens=4)
    assert [row.tolist() for row in sampled] == [[0] * 4, [1] * 3, [3] * 4]
    assert len(sample_rows(rows, count=50)) == 5
