"""The parts of the proof that vLLM serves what was trained."""

import sys
from pathlib import Path

import pytest
import torch
import yaml
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.prove_serving import RECIPES, own_stages
from benchmarks.served import (
    Answer,
    computing,
    exact_weights,
    input_errors,
    make_probes,
    multiply_as_served,
    quantised_linears,
    run_vllm,
    token_logprobs,
    tolerance,
)
from llmc_faq_slider import oneshot

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def quantised(small_model: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32)
    stage = QuantizationModifier(targets="Linear", ignore=["lm_head"], scheme="W4A8")
    oneshot(model=model, recipe=[stage])
    return model.eval()


def test_linears_that_vllm_fuses_are_together(quantised: PreTrainedModel) -> None:
    linears = quantised_linears(quantised)
    assert len(linears) == 4 * quantised.config.num_hidden_layers
    assert len(linears["model.layers.0.self_attn.qkv_proj"]) == 3
    weight = exact_weights(linears["model.layers.0.mlp.gate_up_proj"])
    assert weight.shape == (2 * quantised.config.intermediate_size, 128)


def test_inputs_can_be_those_of_a_kernel(quantised: PreTrainedModel) -> None:
    rows = torch.arange(64).view(2, 32)
    declared = token_logprobs(quantised, rows)
    with computing(quantised, "16 bit"):
        plain = token_logprobs(quantised, rows)
    with computing(quantised, "int8 per token"):
        same = token_logprobs(quantised, rows)
    assert torch.equal(declared, same)
    assert not torch.equal(declared, plain)
    assert torch.equal(declared, token_logprobs(quantised, rows))


@pytest.mark.parametrize("computes", ["16 bit", "int8 per token", "int4 per token"])
def test_an_output_tells_its_inputs(quantised: PreTrainedModel, computes: str) -> None:
    """compressed-tensors' own quantisation of the inputs is recognised."""
    linears = quantised_linears(quantised)
    name = "model.layers.5.mlp.down_proj"
    inputs = make_probes(linears)[name].float()
    with computing(quantised, computes), torch.inference_mode():
        output = linears[name][0](inputs)
    errors = input_errors(exact_weights(linears[name]), inputs, output)
    assert min(errors, key=lambda key: errors[key]) == computes


@pytest.mark.parametrize(
    ("scheme", "least", "most"), [("W4A8", 0.0, 1e-6), ("W4AFP8", 0.015, 0.04)]
)
def test_weights_can_be_those_of_a_kernel(
    small_model: Path, scheme: str, least: float, most: float
) -> None:
    """Only the kernel of W4AFP8 rounds products of code and scale: 3 % on an H200."""
    model = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32)
    stage = QuantizationModifier(targets="Linear", ignore=["lm_head"], scheme=scheme)
    oneshot(model=model, recipe=[stage])
    linear = model.eval().model.layers[3].mlp.down_proj
    inputs = torch.randn(64, linear.in_features)
    with torch.inference_mode():
        stored = linear(inputs)
        multiply_as_served(model)
        served = linear(inputs)
        again = exact_weights([linear])
    assert least <= (served - stored).norm() / stored.norm() <= most
    assert torch.equal(again, linear.weight)


def test_recipes_fit_the_model() -> None:
    text = own_stages(RECIPES / "faq_slider_w4a8.yaml", 8, 64, epochs=3)
    stages = yaml.safe_load(text)
    assert list(stages) == ["quant_stage"]
    fields = stages["quant_stage"]["slider_modifiers"]["SliderQuantModifier"]
    assert fields["epochs"] == 3
    assert fields["config_groups"]["group_0"]["weights"]["group_size"] == 64
    ends = own_stages(RECIPES / "slider_w2a16_ends_w4.yaml", 8, 128, None)
    assert "(0|1|6|7)" in ends


def test_every_precision_of_the_table_has_a_tolerance() -> None:
    for computes in ("16 bit", "int8 per token with zero point", "FP8 per token"):
        assert 0 < tolerance(computes).mean < tolerance(computes).largest


def test_a_model_that_amplifies_roundings_gets_a_wider_tolerance() -> None:
    known = tolerance("int8 per token")
    assert tolerance("int8 per token", torch.full((4, 5), 0.01)) == known
    wide = tolerance("int8 per token", torch.tensor([0.0, -0.4, 1.0]))
    assert wide.mean == pytest.approx(1.25 * 1.4 / 3)
    assert wide.largest == pytest.approx(3.0)


# A stand-in for vLLM: it ends at checkpoints that are called "bad".
STAND_IN = """#!{python}
import json, os, sys
from pathlib import Path
import numpy
from safetensors.numpy import save_file
asked = json.load(sys.stdin)
print("started")
for index in range(asked["first"], len(asked["checkpoints"])):
    if "bad" in asked["checkpoints"][index]:
        print("this one has no kernel", flush=True)
        os.abort()
    stem = Path(asked["output"]) / str(index)
    save_file({{"linear": numpy.array([index])}}, stem.with_suffix(".safetensors"))
    answer = {{"logprobs": [], "greedy": [], "kernels": {{}}, "seconds": index}}
    stem.with_suffix(".json").write_text(json.dumps(answer))
"""


def test_a_checkpoint_that_ends_vllm_costs_no_other_its_answer(tmp_path) -> None:
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(STAND_IN.format(python=sys.executable))
    python.chmod(0o755)
    names = ["first", "bad", "second", "third", "bad-last"]
    rows, folder = torch.zeros(1, 4, dtype=torch.long), tmp_path / "answers"
    for _ in range(2):  # what an earlier run left is not taken for an answer
        answers = run_vllm(
            [tmp_path / name for name in names], rows, rows, 1, {}, folder, tmp_path
        )
        assert [isinstance(one, Answer) for one in answers] == [1, 0, 1, 1, 0]
        assert [one.seconds for one in answers if isinstance(one, Answer)] == [0, 2, 3]
        assert "vLLM failed at bad, " in str(answers[1])
        assert "this one has no kernel" in str(answers[1])
    assert len(list(folder.glob("*.log"))) == 2  # one start, and one after a failure
