"""The trained test family is small, consistent, and good enough to measure with."""

import json
import math
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.unit

TESTS = Path(__file__).resolve().parents[1]
SIZES = ("small", "large")
TEXTS = ("austen", "shakespeare", "sotu")
GROUP = 64
ROWS, LENGTH = 3, 512  # rows of each held-out text, tokens a row


def folder(size: str) -> Path:
    """Where the model of this size is kept."""
    return TESTS / "models" / size


@cache
def load(size: str) -> torch.nn.Module:
    """The committed bf16 model, in evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(
        folder(size), dtype=torch.bfloat16
    ).eval()


@cache
def held_out() -> torch.Tensor:
    """Token ids [texts * ROWS, LENGTH] of text that neither size was trained on."""
    tokenizer = AutoTokenizer.from_pretrained(folder("small"))
    rows = []
    for name in TEXTS:
        text = (TESTS / "data" / "heldout" / f"{name}.txt").read_text()
        # A few thousand characters a row are more than enough for LENGTH tokens.
        ids = tokenizer(text[: ROWS * LENGTH * 6], return_tensors="pt")["input_ids"]
        rows.append(ids[0, : ROWS * LENGTH].view(ROWS, LENGTH))
    return torch.cat(rows)


@torch.no_grad()
def perplexity(model: torch.nn.Module) -> float:
    """exp of the mean next-token loss over the held-out rows."""
    ids = held_out()
    logits = model(input_ids=ids).logits[:, :-1].float()
    return math.exp(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


def round_to_nearest(
    weight: torch.Tensor, bits: int, symmetric: bool = False
) -> torch.Tensor:
    """Weight [out, in] rounded to a min-max grid per group of inputs."""
    groups = weight.float().unflatten(1, (-1, GROUP))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    levels = 2**bits - 1
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    else:
        low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / levels).clamp(min=1e-8)
    zero = torch.full_like(low, 2 ** (bits - 1))
    if not symmetric:
        zero = torch.round(-low / scale)
    steps = (torch.round(groups / scale) + zero).clamp(0, levels)
    return ((steps - zero) * scale).flatten(1).to(weight.dtype)


@cache
def base_perplexity(size: str) -> float:
    """Perplexity of the model as committed."""
    return perplexity(load(size))


def quantised_perplexity(size: str, bits: int, symmetric: bool) -> float:
    """Perplexity with every linear but the head rounded; the model is put back."""
    model = load(size)
    kept = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            kept[module] = module.weight.data
            module.weight.data = round_to_nearest(module.weight.data, bits, symmetric)
    try:
        return perplexity(model)
    finally:
        for module, weight in kept.items():
            module.weight.data = weight


def test_size_on_disk() -> None:
    """Both folders together are small enough to be committed."""
    files = [f for size in SIZES for f in folder(size).rglob("*") if f.is_file()]
    assert sum(file.stat().st_size for file in files) <= 16_000_000


@pytest.mark.parametrize("size", SIZES)
def test_architecture(size: str) -> None:
    """Qwen3, bf16, and groups of 64 or 128 divide every linear's input."""
    config = json.loads((folder(size) / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    model = load(size)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert module.weight.dtype == torch.bfloat16, name
            assert module.in_features % 128 == 0, name


@pytest.mark.parametrize(
    "file", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
)
def test_one_tokenizer(file: str) -> None:
    """Tokenizer and chat template are the same, byte for byte."""
    assert (folder("small") / file).read_bytes() == (
        folder("large") / file
    ).read_bytes()


def test_text_survives_the_tokenizer() -> None:
    """Byte-level BPE: what is encoded decodes to itself, nothing is unknown."""
    tokenizer = AutoTokenizer.from_pretrained(folder("small"))
    text = "Sir,\n\n  naïve “quotes” — 2026 ✓  and  double  spaces .\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_chat_template() -> None:
    """ChatML with an optional system turn; the marks are single tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder("small"))
    user = {"role": "user", "content": "Good morning."}
    prompt = tokenizer.apply_chat_template(
        [user], tokenize=False, add_generation_prompt=True
    )
    assert prompt == (
        "<|im_start|>user\nGood morning.<|im_end|>\n<|im_start|>assistant\n"
    )
    system = {"role": "system", "content": "Be brief."}
    whole = tokenizer.apply_chat_template([system, user], tokenize=False)
    assert whole.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user")
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"
    for mark in ("<|im_start|>", "<|im_end|>", "<|endoftext|>"):
        assert len(tokenizer(mark)["input_ids"]) == 1


@pytest.mark.parametrize("size", SIZES)
def test_turns_end(size: str) -> None:
    """Sampled answers mostly close their turn well before the context is full."""
    tokenizer = AutoTokenizer.from_pretrained(folder(size))
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "The house was quiet that evening."}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    torch.manual_seed(0)
    out = load(size).generate(
        **ids, do_sample=True, max_new_tokens=120, num_return_sequences=32
    )
    ended = (out[:, ids["input_ids"].shape[1] :] == tokenizer.eos_token_id).any(1)
    assert ended.float().mean() >= 0.5


def test_large_is_better() -> None:
    """The larger size predicts held-out text clearly better than the smaller."""
    assert base_perplexity("large") <= 0.9 * base_perplexity("small")


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits, ratio", [(3, 1.05), (2, 1.4)])
@pytest.mark.parametrize("size", SIZES)
def test_rounding_hurts(size: str, bits: int, ratio: float, symmetric: bool) -> None:
    """Low-bit rounding costs enough perplexity to compare methods by."""
    rounded = quantised_perplexity(size, bits, symmetric)
    assert rounded >= ratio * base_perplexity(size)
