"""What vLLM computes from a checkpoint is what the recipe made, number by number.

`make prove-serving` does the same for every recipe, over HTTP and on larger models.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import yaml
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM

from benchmarks.prove_serving import (
    RECIPES,
    compare,
    compare_reloaded,
    local_target,
    prompts_of,
)
from benchmarks.served import exact_weights, quantised_linears, tolerance
from llmc_faq_slider import oneshot
from llmc_faq_slider.host.declared import declared_groups
from llmc_faq_slider.host.recipe_lint import lint_recipe
from llmc_faq_slider.report.serving import serve

pytestmark = pytest.mark.e2e

SERVED = (
    "slider_w4a16_asym",
    "faq_slider_w4a8",
    "faq_slider_w4a8_cpu",
    "slider_w4a4",
    "slider_w8a8",
)
NOT_SERVED = ("faq_slider_w4afp8", "slider_w2a16")


@pytest.mark.parametrize("recipe", SERVED)
def test_vllm_equals_model_in_memory(recipe: str, proven) -> None:
    """Log-probabilities, perplexity, every linear, and greedy tokens."""
    trained, answer = proven.trained(recipe), proven.answer(recipe)
    proof = compare(trained, answer, prompts_of(proven.rows))
    print(proof.figures)
    assert not proof.failures
    # The tolerance is no wider than what bf16 itself does to such a model.
    assert tolerance(proof.computes).mean < 4 * trained.rounding.abs().mean()


def test_recipe_learned(proven, small_model) -> None:
    """The compared model is not the one that rounding to nearest makes."""
    trained = proven.trained("slider_w4a16_asym")
    groups = yaml.safe_load((RECIPES / f"{trained.recipe}.yaml").read_text())
    fields = groups["quant_stage"]["slider_modifiers"]["SliderQuantModifier"]
    nearest = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32)
    oneshot(model=nearest, recipe=[QuantizationModifier(**fields)])
    linears = quantised_linears(nearest)
    moved = [
        (exact_weights(trained.linears[name]) - exact_weights(modules)).abs().mean()
        / exact_weights(modules).abs().mean()
        for name, modules in linears.items()
    ]
    assert min(moved) > 0.01


def test_cpu_kernels_are_all_there() -> None:
    """The recipes above reach each kernel that vLLM has for recipes on this CPU."""
    every = {path.stem: _kernels(path.stem) for path in RECIPES.glob("*.yaml")}
    assert set.union(*(every[name] for name in SERVED)) == set.union(*every.values())


def _kernels(recipe: str) -> set[str | None]:
    modifiers, _ = lint_recipe(RECIPES / f"{recipe}.yaml")
    groups = [declared.group for declared in declared_groups(modifiers)]
    servings = [serve(group, local_target()) for group in groups]
    return {serving.kernel for serving in servings if serving.served}


@pytest.mark.parametrize("recipe", NOT_SERVED)
def test_transformers_equals_model_in_memory(recipe: str, proven) -> None:
    """Where the table says that vLLM has no kernel on a CPU."""
    trained = proven.trained(recipe)
    assert not any(serving.served for serving in trained.servings)
    proof = compare_reloaded(trained, proven.rows)
    print(proof.figures)
    assert not proof.failures


def test_another_models_answer_is_told_apart(proven) -> None:
    """A control: what another checkpoint answers is not taken for equal."""
    trained, other = proven.trained("faq_slider_w4a8_cpu"), proven.answer("slider_w8a8")
    proof = compare(trained, other, prompts_of(proven.rows))
    found = " ".join(proof.failures)
    assert "log-probabilities differ" in found
    assert "a layer's output is off" in found
    assert "the table says" in found


def test_one_wrong_channel_is_told_apart(proven) -> None:
    """A control: one output channel of one layer off by a quarter."""
    recipe = "faq_slider_w4a8_cpu"
    trained, answer = proven.trained(recipe), proven.answer(recipe)
    name = "model.layers.3.mlp.down_proj"
    outputs = dict(answer.outputs)
    outputs[name] = torch.cat([outputs[name][:, :-1], outputs[name][:, -1:] * 1.25], 1)
    wrong = dataclasses.replace(answer, outputs=outputs)
    failures = compare(trained, wrong, prompts_of(proven.rows)).failures
    assert any("a layer's output is off" in failure for failure in failures)
