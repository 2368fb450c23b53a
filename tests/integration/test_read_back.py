"""What oneshot wrote is what a process reads that knows nothing of the run."""

import json
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from family import FALCON, quantize
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPVisionConfig,
    GptOssConfig,
    LlamaConfig,
    LlavaConfig,
    MiniMaxConfig,
    MixtralConfig,
    Qwen3MoeConfig,
)
from transformers.conversion_mapping import register_checkpoint_conversion_mapping

from llmc_faq_slider import SliderQuantModifier
from llmc_faq_slider.host.read_back import read_back

pytestmark = pytest.mark.integration

ROWS = torch.randint(3, 200, (4, 32), generator=torch.Generator().manual_seed(0))
DATA = Dataset.from_dict({"input_ids": ROWS.tolist()})
SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
READABLE = {
    "mixtral": MixtralConfig(**SIZES, **EXPERTS),
    "minimax": MiniMaxConfig(**SIZES, **EXPERTS, head_dim=16, block_size=16),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, **ROUTED, head_dim=16),
}
READS = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
auto = AutoModelForImageTextToText if sys.argv[3] == "llava" else AutoModelForCausalLM
model = auto.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
rows = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save(model(input_ids=rows).logits, sys.argv[2])
"""


def stage(input_bits=None):
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    group = {"targets": ["Linear"], "weights": weights | {"group_size": 32}}
    if input_bits is not None:
        group["input_activations"] = {
            "num_bits": input_bits,
            "type": "int",
            "symmetric": True,
            "strategy": "token",
            "dynamic": True,
        }
    return SliderQuantModifier(
        ignore=[
            "re:.*lm_head",
            "re:.*gate$",
            "re:.*output_gate",
            "re:.*router.*",
            "re:.*vision_tower.*",
            "re:.*multi_modal_projector.*",
        ],
        preset="fast",
        epochs=1,
        closing_epochs=0,
        config_groups={"group_0": group},
    )


def quantized(model, tokenizer, folder, input_bits=None):
    """The model, what its run reports on reading back, and the folder."""
    model.save_pretrained(folder / "source")
    model = type(model).from_pretrained(folder / "source", dtype=torch.float32).eval()
    quantize(
        model,
        stage(input_bits),
        dataset=DATA,
        tokenizer=AutoTokenizer.from_pretrained(tokenizer),
        output_dir=str(folder / "out"),
    )
    report = json.loads((folder / "out" / "llmc_faq_slider.json").read_text())
    return model, report["read_back"]


def read_elsewhere(folder, kind):
    torch.save(ROWS, folder / "rows.pt")
    subprocess.run(
        [sys.executable, "-c", READS, folder / "out", folder / "rows.pt", kind],
        check=True,
    )
    return torch.load(folder / "rows.pt")


@pytest.mark.parametrize("kind", sorted(READABLE))
def test_experts_are_saved_under_the_names_that_are_read(kind, small_model, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(READABLE[kind])
    model, said = quantized(model, small_model, tmp_path)
    assert said == []
    with torch.no_grad():
        logits = model(input_ids=ROWS).logits
    # Fused experts are summed in another order; random ones are off by one and more.
    torch.testing.assert_close(
        read_elsewhere(tmp_path, kind), logits, atol=1e-3, rtol=1e-3
    )


def test_wrappers_are_read_with_their_towers_unquantised(small_model, tmp_path):
    text = LlamaConfig(**SIZES)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=250)
    model = AutoModelForImageTextToText.from_config(config)
    model, said = quantized(model, small_model, tmp_path)
    assert said == []
    with torch.no_grad():
        logits = model(input_ids=ROWS).logits
    torch.testing.assert_close(read_elsewhere(tmp_path, "llava"), logits)


def test_who_reads_experts_only_fused_is_named(small_model, tmp_path):
    config = GptOssConfig(**SIZES, **EXPERTS, head_dim=16)
    _, said = quantized(AutoModelForCausalLM.from_config(config), small_model, tmp_path)
    assert any("transformers" in one and "does not find" in one for one in said)
    assert any("experts.0.down_proj" in one and "leaves out" in one for one in said)


def test_inputs_of_experts_that_a_reader_leaves_out_are_named(small_model, tmp_path):
    model = AutoModelForCausalLM.from_config(READABLE["qwen3_moe"])
    _, said = quantized(model, small_model, tmp_path, input_bits=8)
    assert len(said) == 1 and "leaves their inputs unquantised" in said[0]


def test_a_reader_that_fails_is_named(small_model, tmp_path):
    _, said = quantized(AutoModelForCausalLM.from_config(FALCON), small_model, tmp_path)
    assert len(said) == 1 and "cannot read" in said[0] and "FalconLinear" in said[0]


@pytest.fixture(scope="module")
def dense(small_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    return quantized(model, small_model, folder), folder / "out"


def test_a_sound_checkpoint_is_read_as_it_is(dense):
    (model, said), folder = dense
    assert said == [] == read_back(folder, model)


def test_renamings_of_this_process_do_not_hide_what_others_read(dense):
    (model, _), folder = dense
    register_checkpoint_conversion_mapping("llama", None, overwrite=True)
    assert read_back(folder, model) == []


@pytest.mark.parametrize("change", ["lost", "added"])
def test_a_damaged_checkpoint_is_noticed(dense, change):
    (model, _), folder = dense
    path = folder / "model.safetensors"
    sound = path.read_bytes()
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight_packed"
    if change == "lost":
        del tensors[name]
    else:
        tensors["model.layers.1.mlp.side_proj.weight"] = torch.zeros(2)
    try:
        save_file(tensors, path, metadata={"format": "pt"})
        said = read_back(folder, model)
    finally:
        path.write_bytes(sound)
    assert said and "model.layers.1.mlp." in said[0]


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [("ignore", [], "lm_head"), ("ignore", ["lm_head", "re:.*up_proj"], "up_proj")],
)
def test_other_modules_taken_for_quantised_are_noticed(dense, field, value, named):
    (model, _), folder = dense
    path = folder / "config.json"
    sound = path.read_text()
    config = json.loads(sound)
    config["quantization_config"][field] = value
    try:
        path.write_text(json.dumps(config))
        said = read_back(folder, model)
    finally:
        path.write_text(sound)
    assert any(named in one for one in said)


def test_a_config_that_differs_is_noticed(dense):
    (model, _), folder = dense
    model.config.rms_norm_eps *= 2
    try:
        said = read_back(folder, model)
    finally:
        model.config.rms_norm_eps /= 2
    assert len(said) == 1 and "rms_norm_eps" in said[0]
