"""What of an architecture would end a run late is found, or works, at the start."""

import pytest
import torch
import transformers
from learning import rows_of
from torch import nn

from llmc_faq_slider.host.decoder import decoder_layers
from llmc_faq_slider.slider.head import OutputHead, frozen, missing_distribution
from llmc_faq_slider.slider.stream import capture_decoder

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")
SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
    pad_token_id=0,
)
MAMBA = dict(
    mamba_n_heads=4,
    mamba_d_head=16,
    mamba_d_state=8,
    mamba_n_groups=1,
    mamba_chunk_size=8,
)
MAMBA2 = dict(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    num_heads=4,
    head_dim=16,
    expand=2,
    state_size=8,
    n_groups=1,
    chunk_size=8,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
VISION = dict(hidden_size=32, intermediate_size=64, image_size=28, patch_size=14)
TEXT = transformers.LlamaConfig(**SIZES)
MODELS = {
    "alibi of every row": transformers.BloomConfig(
        vocab_size=64, hidden_size=32, n_layer=2, n_head=2
    ),
    "layers that return tuples": transformers.BambaConfig(
        **SIZES, **MAMBA, attn_layer_indices=[1]
    ),
    "fp32 residuals": transformers.Mamba2Config(**MAMBA2),
    "learned positions": transformers.OPTConfig(
        vocab_size=64,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        word_embed_proj_dim=32,
        max_position_embeddings=16,
    ),
    "a vision tower": transformers.LlavaConfig(
        text_config=TEXT,
        vision_config=transformers.CLIPVisionConfig(
            **VISION, num_hidden_layers=2, num_attention_heads=2
        ),
        image_token_index=60,
    ),
    "vision blocks before the text": transformers.Qwen2_5_VLConfig(
        text_config=SIZES
        | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
        vision_config=dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=2)
        | dict(out_hidden_size=32, fullatt_block_indexes=[1]),
        image_token_id=60,
        video_token_id=61,
        vision_start_token_id=62,
        vision_end_token_id=63,
    ),
}


def built(config):
    torch.manual_seed(0)
    wrapper = hasattr(config, "vision_config")
    kind = (
        transformers.AutoModelForImageTextToText
        if wrapper
        else transformers.AutoModelForCausalLM
    )
    return kind.from_config(config).eval()


def modules(model):
    return [layer for _, layer in decoder_layers(model)]


def linears_of(layers):
    return {
        index: {n: m for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
        for index, layer in enumerate(layers)
    }


@pytest.mark.parametrize("name", MODELS)
def test_stream_and_head_are_the_models_own_at_any_batch_size(name):
    model = built(MODELS[name])
    layers = modules(model)
    rows = rows_of([9, 16, 16, 16])
    with frozen(model):
        hidden, calls = capture_decoder(model, layers, rows, CPU, linears_of(layers))
    assert missing_distribution(model, calls) is None
    head = OutputHead(model, calls)
    for chosen in ([0], [1, 2, 3]):
        batch = torch.cat([hidden[i] for i in chosen])
        with torch.no_grad():
            output = calls.run_span(range(len(layers)), batch)
            found = head.log_probabilities(output)
            ids = torch.stack([rows[i] for i in chosen])
            expected = model(input_ids=ids).logits.float().log_softmax(-1)
        torch.testing.assert_close(found, expected)
    start = hidden[1].requires_grad_()
    loss = head.log_probabilities(calls.run_span(range(len(layers)), start))[..., 0]
    assert torch.autograd.grad(loss.sum(), start)[0].abs().sum() > 0


def test_layers_of_the_language_model_only():
    names = [name for name, _ in decoder_layers(built(MODELS["a vision tower"]))]
    assert names == [f"model.language_model.layers.{i}" for i in range(2)]


def test_layers_inside_layers_are_none():
    config = transformers.MambaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2
    )
    names = [name for name, _ in decoder_layers(built(config))]
    assert names == [f"backbone.layers.{i}" for i in range(2)]


def test_layers_that_text_does_not_reach_are_refused():
    model = built(MODELS["a vision tower"])
    blocks = list(model.model.vision_tower.modules())
    blocks = [m for m in blocks if type(m).__name__ == "CLIPEncoderLayer"]
    with pytest.raises(ValueError, match=r"not reach decoder layer 0 \(CLIPEncoder"):
        capture_decoder(model, blocks + modules(model), rows_of([8]), CPU)


def test_weights_that_are_read_without_a_call_are_named():
    config = transformers.JambaConfig(
        **SIZES,
        num_experts=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        use_mamba_kernels=False,
        mamba_dt_rank=8,
        mamba_d_state=8,
    )
    model = built(config)
    layers = modules(model)
    linears = linears_of(layers)
    sentence = r'mamba.dt_proj of layer 0 has .*Add "re:.\*mamba\\.dt_proj\$" to ignore'
    with pytest.raises(ValueError, match=sentence):
        capture_decoder(model, layers, rows_of([8]), CPU, linears)
    assert "weight" not in linears[0]["mamba.dt_proj"].__dict__
    del linears[0]["mamba.dt_proj"]
    capture_decoder(model, layers, rows_of([8]), CPU, linears)


def test_linears_that_do_more_than_multiply_are_named(model):
    class Doubling(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layers = list(model.model.layers)
    layers[3].mlp.up_proj = Doubling(32, 64)
    linears = linears_of(layers)
    with pytest.raises(ValueError, match="mlp.up_proj of layer 3 is a Doubling, which"):
        capture_decoder(model, layers, rows_of([8]), CPU, linears)
    capture_decoder(model, layers, rows_of([8]), CPU)


def test_linears_that_are_called_by_keyword_are_named(model):
    layers = list(model.model.layers)
    mlp = layers[1].mlp
    mlp.forward = lambda x: mlp.down_proj(input=mlp.up_proj(x))
    with pytest.raises(
        ValueError, match="down_proj of layer 1 is called with more tha"
    ):
        capture_decoder(model, layers, rows_of([8]), CPU, linears_of(layers))


def test_layers_that_cannot_be_differentiated_are_refused(model):
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

    layers = list(model.model.layers)
    forward = layers[2].mlp.forward
    layers[2].mlp.forward = lambda x: Opaque.apply(forward(x))
    with pytest.raises(ValueError, match="layer 2 .*cannot be differentiated"):
        capture_decoder(model, layers, rows_of([8]), CPU, linears_of(layers))


@pytest.mark.parametrize("shared", [0, 1])
def test_what_layers_leave_for_others_is_refused_only_if_they_read_it(shared):
    config = transformers.Gemma4TextConfig(
        **SIZES,
        head_dim=16,
        global_head_dim=16,
        layer_types=["full_attention"] * 2,
        hidden_size_per_layer_input=0,
        num_kv_shared_layers=shared,
    )
    model = built(config)
    if shared:
        with pytest.raises(ValueError, match="more than hidden states that depends"):
            capture_decoder(model, modules(model), rows_of([8]), CPU)
        return
    hidden, calls = capture_decoder(model, modules(model), rows_of([8]), CPU)
    calls.run_span(range(2), hidden[0])
    assert not any(call[1]["shared_kv_states"] for call in calls.arguments(1, 8))


def test_arguments_that_depend_on_tokens_are_refused_for_rows_of_any_lengths(model):
    layers = list(model.model.layers)
    embed = model.model.embed_tokens

    def keep(_module, args, _output):
        embed.latest = args[0].float()

    embed.register_forward_hook(keep)
    layers[2].register_forward_pre_hook(
        lambda _layer, args, kwargs: (args, kwargs | {"tokens": embed.latest}),
        with_kwargs=True,
    )
    with pytest.raises(ValueError, match="more than hidden states that depends"):
        capture_decoder(model, layers, rows_of([8]), CPU)


@pytest.mark.parametrize(
    ("kind", "labels", "reason"),
    [
        ("AutoModel", 2, "Qwen3Model has no language head"),
        ("AutoModelForSequenceClassification", 3, "one output for a whole row"),
        ("AutoModelForTokenClassification", 1, "a head of one label"),
        ("AutoModelForTokenClassification", 3, None),
    ],
)
def test_heads_without_a_distribution_are_told(kind, labels, reason):
    config = transformers.Qwen3Config(**SIZES, head_dim=16, num_labels=labels)
    model = getattr(transformers, kind).from_config(config).eval()
    _, calls = capture_decoder(model, modules(model), rows_of([8]), CPU)
    missing = missing_distribution(model, calls)
    assert missing is None if reason is None else reason in missing
