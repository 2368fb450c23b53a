"""Regenerated rows reach the later stages, ours and the built-in ones."""

import json
from collections import defaultdict

import pytest
import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.core import active_session
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from llmcompressor.pipelines.registry import CalibrationPipeline
from llmcompressor.recipe import Recipe
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmc_faq_slider
from llmc_faq_slider.faq.modifier import FAQModifier
from llmc_faq_slider.faq.options import FAQOptions
from llmc_faq_slider.faq.sampling import sample_batch

pytestmark = pytest.mark.integration

ROWS, LENGTH = 3, 64
PASSAGES = [f"Passage {i} tells of a river, a mill and {i} boats." for i in range(6)]


@pytest.fixture
def model(small_model):
    return AutoModelForCausalLM.from_pretrained(small_model, dtype="auto")


@pytest.fixture
def dataset():
    return Dataset.from_dict({"text": PASSAGES})


@pytest.fixture
def faq(tmp_path, large_model):
    """Makes the stage with gates that the tiny family's babble passes."""

    def make(**changes) -> FAQModifier:
        fields = {
            "generator": str(large_model),
            "num_candidates": 2,
            "num_samples": ROWS,
            "sequence_length": LENGTH,
            "max_new_tokens": 16,
            "batch_size": 4,
            "min_response_tokens": 1,
            "max_repeated_share": 1.0,
            "max_zlib_ratio": 1000.0,
            "max_fallback_fraction": 1.0,
            "cache_dir": str(tmp_path / "faq"),
        }
        return FAQModifier(**{**fields, **changes})

    return make


def gptq() -> GPTQModifier:
    return GPTQModifier(
        targets="Linear",
        ignore=["lm_head"],
        scheme="W4A16",
        actorder="weight",
    )


def smooth() -> SmoothQuantModifier:
    return SmoothQuantModifier(smoothing_strength=0.5)


def regenerated(tmp_path) -> list[list[int]]:
    (path,) = tmp_path.glob("faq/datasets/*/calibration.safetensors")
    return load_file(path)["input_ids"].tolist()


def seen_by_stage(model, recipe, **arguments) -> dict[str, list[list[int]]]:
    """Run the recipe; the distinct token rows the embedding saw, by stage, in order."""
    seen: dict[str, list[list[int]]] = defaultdict(list)

    def watch(module, inputs) -> None:
        ids = inputs[0]
        if type(ids) is torch.Tensor and not ids.is_meta:
            stage = type(active_session().lifecycle.recipe.modifiers[0]).__name__
            seen[stage] += [row for row in ids.tolist() if row not in seen[stage]]

    hook = model.get_input_embeddings().register_forward_pre_hook(watch)
    try:
        oneshot(model=model, recipe=recipe, **arguments)
    finally:
        hook.remove()
    return seen


@pytest.mark.parametrize("given", [False, True], ids=["dataset=None", "dataset"])
@pytest.mark.parametrize("generator", ["sibling", "self"])
def test_gptq_and_smoothquant_see_exactly_the_regenerated_rows(
    model, faq, tmp_path, dataset, given, generator
) -> None:
    stage = faq() if generator == "sibling" else faq(generator="self")
    arguments = {"dataset": dataset} if given else {}
    seen = seen_by_stage(model, [stage, smooth(), gptq()], **arguments)
    rows = regenerated(tmp_path)
    assert [len(row) for row in rows] == [LENGTH] * ROWS
    assert seen["SmoothQuantModifier"] == rows
    assert seen["GPTQModifier"] == rows


@pytest.mark.parametrize("given", [False, True], ids=["dataset=None", "dataset"])
def test_awq_sees_exactly_the_regenerated_rows(
    model, faq, tmp_path, dataset, given, monkeypatch
) -> None:
    if not torch.accelerator.is_available():
        # upstream pins memory even without an accelerator, which raises; the pin has
        # no influence on what AWQ sees
        monkeypatch.setattr(IntermediatesCache, "pin_memory", lambda self, index: None)
    recipe = [
        faq(),
        AWQModifier(n_grid=4),
        QuantizationModifier(targets="Linear", ignore=["lm_head"], scheme="W4A16"),
    ]
    arguments = {"dataset": dataset} if given else {}
    seen = seen_by_stage(model, recipe, **arguments)
    assert seen["AWQModifier"] == regenerated(tmp_path)


def test_awq_uses_the_mask_when_it_is_told_to(
    model, faq, tmp_path, monkeypatch
) -> None:
    if not torch.accelerator.is_available():
        monkeypatch.setattr(IntermediatesCache, "pin_memory", lambda self, index: None)
    used = []
    original = AWQModifier.on_sequential_epoch_end

    def look(self, state, *args, **kwargs):
        used.append([mask[0].tolist() for mask in state.loss_masks])
        return original(self, state, *args, **kwargs)

    monkeypatch.setattr(AWQModifier, "on_sequential_epoch_end", look)
    recipe = [
        faq(),
        AWQModifier(n_grid=4),
        QuantizationModifier(targets="Linear", ignore=["lm_head"], scheme="W4A16"),
    ]
    oneshot(model=model, recipe=recipe, use_loss_mask=True)
    (path,) = tmp_path.glob("faq/datasets/*/calibration.safetensors")
    assert used and used[0] == load_file(path)["loss_mask"].tolist()


def test_a_stage_before_sees_the_original_data(
    model, faq, tmp_path, dataset, small_model
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(small_model)
    given = [tokenizer(text)["input_ids"] for text in PASSAGES]
    seen = seen_by_stage(
        model,
        [smooth(), faq(), gptq()],
        dataset=dataset,
        shuffle_calibration_samples=False,
    )
    assert sorted(seen["SmoothQuantModifier"]) == sorted(given)
    assert seen["GPTQModifier"] == regenerated(tmp_path)


def test_state_holds_the_loader_with_the_new_rows(
    model, faq, tmp_path, monkeypatch
) -> None:
    held = {}

    def look(self, state, **kwargs) -> bool:
        held["rows"] = [batch["input_ids"][0].tolist() for batch in state.data.calib]
        held["batch"] = next(iter(state.data.calib))
        held["masks"] = torch.cat([batch["loss_mask"] for batch in state.data.calib])
        return release(self, state, **kwargs)

    release = FAQModifier.on_finalize
    monkeypatch.setattr(FAQModifier, "on_finalize", look)
    oneshot(model=model, recipe=[faq()])
    assert held["rows"] == regenerated(tmp_path)
    assert set(held["batch"]) == {"input_ids", "attention_mask", "loss_mask"}
    (path,) = tmp_path.glob("faq/datasets/*/calibration.safetensors")
    masks = held["masks"]
    assert masks.dtype == torch.int64
    assert masks.tolist() == load_file(path)["loss_mask"].tolist()
    assert 0 < masks.sum() < masks.numel()
    assert held["batch"]["input_ids"].dtype == torch.int64
    assert held["batch"]["attention_mask"].shape == (1, LENGTH)


def test_a_loader_given_by_the_caller_is_put_back(model, faq, small_model) -> None:
    tokenizer = AutoTokenizer.from_pretrained(small_model)
    rows = [tokenizer(text, return_tensors="pt") for text in PASSAGES]
    items = [{key: value[0] for key, value in row.items()} for row in rows]
    loader = DataLoader(items, batch_size=1)
    oneshot(model=model, recipe=[faq()], dataset=loader)
    assert loader.dataset is items
    assert next(iter(loader))["input_ids"][0].tolist() == items[0]["input_ids"].tolist()


def test_a_second_run_reuses_and_nothing_leaks(
    small_model, faq, monkeypatch, tmp_path
) -> None:
    original = CalibrationPipeline.__dict__["from_modifiers"]
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return sample_batch(*args, **kwargs)

    monkeypatch.setattr("llmc_faq_slider.faq.generators.sample_batch", counted)
    oneshot(model=str(small_model), recipe=[faq(generator="self")])
    assert CalibrationPipeline.__dict__["from_modifiers"] is original
    first, generations = regenerated(tmp_path), len(calls)
    oneshot(model=str(small_model), recipe=[faq(generator="self")])
    assert CalibrationPipeline.__dict__["from_modifiers"] is original
    assert generations > 0 and len(calls) == generations
    assert regenerated(tmp_path) == first
    with pytest.raises(TypeError, match="not iterable"):
        oneshot(model=str(small_model), recipe=[gptq()])


def test_two_stages_share_the_missing_loader(model, faq, tmp_path) -> None:
    original = CalibrationPipeline.__dict__["from_modifiers"]
    second = faq(cache_dir=str(tmp_path / "second"), seed=1)
    seen = seen_by_stage(model, [faq(), second, gptq()])
    (path,) = tmp_path.glob("second/datasets/*/calibration.safetensors")
    assert seen["GPTQModifier"] == load_file(path)["input_ids"].tolist()
    assert CalibrationPipeline.__dict__["from_modifiers"] is original


def test_a_failed_run_is_undone_by_the_next(model, small_model, faq) -> None:
    original = CalibrationPipeline.__dict__["from_modifiers"]
    with pytest.raises(RuntimeError, match="have a valid answer .* too_short"):
        oneshot(
            model=model,
            recipe=[faq(min_response_tokens=17, retries=0, max_fallback_fraction=0.0)],
        )
    oneshot(model=str(small_model), recipe=[faq()])
    assert CalibrationPipeline.__dict__["from_modifiers"] is original


def test_a_calibrating_stage_listed_first_is_told_so(model, faq) -> None:
    with pytest.raises(RuntimeError, match="before FAQModifier has made any"):
        oneshot(model=model, recipe=[gptq(), faq()])


def test_self_generation_is_that_of_the_plain_weights(model, faq, tmp_path) -> None:
    oneshot(model=model, recipe=[faq(generator="self")])
    alone = regenerated(tmp_path)
    fresh = AutoModelForCausalLM.from_pretrained(
        model.config.name_or_path, dtype="auto"
    )
    # when the first stage ends, upstream lets every module quantise, those of the last
    # stage too, whose scales are not initialised yet
    attention = QuantizationModifier(targets="re:.*q_proj", scheme="W4A16")
    rest = QuantizationModifier(targets="re:.*mlp.*_proj", scheme="W4A16")
    stage = faq(generator="self", cache_dir=str(tmp_path / "b"))
    oneshot(model=fresh, recipe=[attention, stage, rest])
    (path,) = tmp_path.glob("b/datasets/*/calibration.safetensors")
    assert load_file(path)["input_ids"].tolist() == alone
    assert fresh.model.layers[0].mlp.up_proj.quantization_enabled


def test_a_generator_that_is_not_larger_is_refused(model, faq, large_model) -> None:
    big = AutoModelForCausalLM.from_pretrained(large_model, dtype="auto")
    size = big.num_parameters()
    with pytest.raises(ValueError, match=f"not more than the target's {size:,}"):
        oneshot(model=big, recipe=[faq(), gptq()])


def test_the_saved_recipe_loads_again(model, faq, tmp_path) -> None:
    stage = faq()
    oneshot(model=model, recipe=[stage, gptq()], output_dir=str(tmp_path / "out"))
    saved = Recipe.create_instance(str(tmp_path / "out" / "recipe.yaml"))
    loaded = next(m for m in saved.modifiers if isinstance(m, FAQModifier))
    own = set(FAQOptions.model_fields)
    assert {f: getattr(loaded, f) for f in own} == {f: getattr(stage, f) for f in own}


@pytest.mark.parametrize("form", ["tokenizer", "folder"])
def test_the_tokenizer_given_to_oneshot_writes_the_data(
    form, model, small_model, faq, tmp_path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(small_model)
    tokenizer.chat_template = (
        "{% for m in messages %}### {{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}### assistant: {% endif %}"
    )
    given = tokenizer
    if form == "folder":
        given = str(tmp_path / "tokenizer")
        tokenizer.save_pretrained(given)
    llmc_faq_slider.oneshot(
        model=model,
        tokenizer=given,
        recipe=[faq(generator="self"), smooth()],
    )
    (path,) = tmp_path.glob("faq/datasets/*/messages.jsonl")
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    assert texts and all("### user: " in text for text in texts)
