"""``oneshot`` where an architecture used to end a run late, or at its first layer.

Random weights: this proves plumbing, not quality.
"""

import pytest
import torch
import transformers
from datasets import Dataset
from family import quantize

from llmc_faq_slider import SliderQuantModifier

pytestmark = pytest.mark.integration

SIZES = dict(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
)
LLAMA = transformers.LlamaConfig(**SIZES, num_labels=1)
BAMBA = transformers.BambaConfig(
    **SIZES,
    attn_layer_indices=[1],
    mamba_n_heads=8,
    mamba_d_head=16,
    mamba_d_state=16,
    mamba_n_groups=1,
    mamba_chunk_size=16,
)
MAMBA2 = transformers.Mamba2Config(
    vocab_size=256,
    hidden_size=64,
    num_hidden_layers=2,
    num_heads=8,
    head_dim=16,
    expand=2,
    state_size=16,
    n_groups=1,
    chunk_size=16,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
LLAVA = transformers.LlavaConfig(
    text_config=LLAMA,
    vision_config=transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    ),
    image_token_index=250,
)
WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}


def learned(kind, config, small_model, tmp_path, dtype=torch.float32, **fields):
    torch.manual_seed(0)
    model_class = getattr(transformers, kind)
    model_class.from_config(config).to(dtype).save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(small_model)
    model = model_class.from_pretrained(tmp_path, dtype=dtype)
    groups = {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}}
    stage = SliderQuantModifier(config_groups=groups, **fields)
    rows = torch.randint(1, 240, (6, 24)).tolist()
    data = Dataset.from_dict({"input_ids": rows})
    quantize(model, stage, dataset=data, tokenizer=tokenizer)
    return model, stage


@pytest.mark.parametrize(
    ("kind", "config", "dtype"),
    [
        (
            "AutoModelForCausalLM",
            transformers.BloomConfig(
                vocab_size=256, hidden_size=64, n_layer=2, n_head=4
            ),
            torch.float32,
        ),
        ("AutoModelForCausalLM", BAMBA, torch.float32),
        ("AutoModelForCausalLM", MAMBA2, torch.bfloat16),
        ("AutoModelForImageTextToText", LLAVA, torch.float32),
    ],
)
def test_windows_and_closing_pass(kind, config, dtype, small_model, tmp_path):
    ignore = ["lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*"]
    model, stage = learned(kind, config, small_model, tmp_path, dtype, ignore=ignore)
    assert stage.report()["closing"] is not None
    quantized = [n for n, m in model.named_modules() if hasattr(m, "weight_scale")]
    assert quantized and all(".layers." in n or ".h." in n for n in quantized)
    assert not any("vision" in name for name in quantized)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("AutoModel", "LlamaModel has no language head"),
        (
            "AutoModelForSequenceClassification",
            "LlamaForSequenceClassification has one output for a whole row",
        ),
        ("AutoModelForTokenClassification", "a head of one label"),
    ],
)
def test_the_closing_pass_is_left_out_without_a_distribution(
    kind, reason, small_model, tmp_path
):
    ignore = ["score"] if "For" in kind else []
    _, stage = learned(kind, LLAMA, small_model, tmp_path, ignore=ignore)
    report = stage.report()
    assert report["closing"] is None and report["windows"]
    (sentence,) = [one for one in report["warnings"] if "closing pass" in one]
    assert reason in sentence


def test_measured_ends_need_a_distribution(small_model, tmp_path):
    with pytest.raises(ValueError, match="Give shallow_layers and deep_layers as num"):
        learned("AutoModel", LLAMA, small_model, tmp_path, shallow_layers="auto")


def test_what_lies_outside_the_language_model_is_named_by_part(small_model, tmp_path):
    outside = (
        r"match model.vision_tower \(\d+ linears\), model.multi_modal_projector "
        r'.*, lm_head. Add "re:.\*vision_tower.\*", .*"lm_head" to ignore'
    )
    with pytest.raises(ValueError, match=outside):
        learned("AutoModelForImageTextToText", LLAVA, small_model, tmp_path)
