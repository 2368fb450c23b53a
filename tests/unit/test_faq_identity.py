"""Fingerprints and the family check."""

import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llmc_faq_slider.faq.generators import sibling_source
from llmc_faq_slider.faq.identity import (
    FamilyError,
    folder_fingerprint,
    tokenizer_hash,
    weights_fingerprint,
)

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def config(small_model):
    return AutoConfig.from_pretrained(small_model)


def test_a_copy_of_a_folder_has_its_fingerprint(small_model, tmp_path) -> None:
    copy = shutil.copytree(small_model, tmp_path / "copy")
    assert folder_fingerprint(copy) == folder_fingerprint(small_model)
    weights = copy / "model.safetensors"
    weights.chmod(0o600)
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert folder_fingerprint(copy) != folder_fingerprint(small_model)


def test_weights_fingerprint_sees_any_changed_tensor(small_model) -> None:
    model = AutoModelForCausalLM.from_pretrained(small_model)
    before = weights_fingerprint(model.named_parameters())
    assert before == weights_fingerprint(model.named_parameters())
    with torch.no_grad():
        model.model.norm.weight.mul_(1.01)
    assert before != weights_fingerprint(model.named_parameters())


def test_tokenizer_hash_ignores_use(tokenizer, large_model) -> None:
    before = tokenizer_hash(tokenizer)
    tokenizer(["a", "b c"], padding=True)
    assert tokenizer_hash(tokenizer) == before
    assert tokenizer_hash(AutoTokenizer.from_pretrained(large_model)) == before


def test_a_larger_sibling_is_accepted(large_model, config, tokenizer) -> None:
    source = sibling_source(str(large_model), config, tokenizer, target_size=1000)
    with source.open():
        pass
    assert source.identity["kind"] == "sibling"


def test_a_sibling_must_be_larger(small_model, config, tokenizer) -> None:
    source = sibling_source(str(small_model), config, tokenizer, 2_000_000_000)
    with pytest.raises(FamilyError, match="not more than the target's 2,000,000,000"):
        with source.open():
            pass


def test_another_line_is_refused(large_model, tokenizer, config) -> None:
    other = type(config).from_dict(config.to_dict())
    other.model_type = "llama"
    with pytest.raises(FamilyError, match="model type is 'qwen3', the target's 'llama"):
        sibling_source(str(large_model), other, tokenizer, 1)


def test_another_tokenizer_is_refused(large_model, config, small_model) -> None:
    changed = AutoTokenizer.from_pretrained(small_model)
    changed.add_tokens(["<brand-new>"])
    with pytest.raises(FamilyError, match="tokenizers differ in their vocabulary"):
        sibling_source(str(large_model), config, changed, 1)


def test_a_missing_generator_is_named(config, tokenizer, tmp_path) -> None:
    with pytest.raises(FamilyError, match="cannot be read"):
        sibling_source(str(tmp_path / "gone"), config, tokenizer, 1)
