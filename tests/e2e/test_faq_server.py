"""FAQ with the larger sibling behind a real vLLM server on the CPU."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmc_faq_slider import FAQModifier, oneshot
from llmc_faq_slider.faq.endpoint import Address
from llmc_faq_slider.faq.experts import endpoint_expert, mean_logprobs
from llmc_faq_slider.report.server import MODEL_NAME, Server

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]
ROWS, LENGTH = 8, 128
#: bf16 rounds in other places in vLLM than in transformers
TOLERANCE = 0.05


@dataclass(frozen=True)
class Run:
    """What one regeneration left in its folder."""

    folder: Path
    server: Server
    asked_before: int

    @property
    def url(self) -> str:
        return f"{self.server.url}/v1"

    def fields(self, **changes: Any) -> dict[str, Any]:
        return {
            "generator": self.url,
            "generator_model": MODEL_NAME,
            "num_candidates": 2,
            "num_samples": ROWS,
            "sequence_length": LENGTH,
            "max_new_tokens": 48,
            "min_response_tokens": 4,
            "batch_size": 16,
            "cache_dir": str(self.folder),
        } | changes

    @property
    def candidates(self) -> list[dict[str, Any]]:
        (path,) = self.folder.glob("candidates/*/candidates.jsonl")
        return [json.loads(line) for line in path.read_text().splitlines()]

    @property
    def requests(self) -> int:
        return _completions(self.server) - self.asked_before

    @property
    def log(self) -> Path:
        return self.server.log


def _completions(server: Server) -> int:
    return server.log.read_text().count('POST /v1/completions HTTP/1.1" 200')


@pytest.fixture(scope="module")
def served(sibling_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("served")
    return Run(folder / "faq", sibling_server, _completions(sibling_server))


@pytest.fixture(scope="module")
def regenerated(served: Run, small_model: Path) -> Run:
    """The small model quantised on what the large one wrote behind the server."""
    model = AutoModelForCausalLM.from_pretrained(small_model, dtype="auto")
    gptq = GPTQModifier(targets="Linear", ignore=["lm_head"], scheme="W4A16")
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    oneshot(model=model, recipe=[FAQModifier(**served.fields()), gptq])
    assert not torch.equal(before, model.model.layers[0].mlp.up_proj.weight)
    return served


def test_answers_are_token_exact_and_scored(regenerated: Run) -> None:
    (manifest_path,) = regenerated.folder.glob("datasets/*/manifest.json")
    manifest = json.loads(manifest_path.read_text())
    assert manifest["generator"]["kind"] == "endpoint"
    assert manifest["counts"]["candidates_retokenized"] == 0
    assert manifest["gates"]["invalid_reply"] == manifest["gates"]["refused"] == 0
    data = load_file(manifest_path.with_name("calibration.safetensors"))
    assert data["input_ids"].shape == (ROWS, LENGTH)
    assert all(c["score"] is not None and c["exact"] for c in regenerated.candidates)
    # every candidate was asked for once, whatever probing took
    assert len(regenerated.candidates) <= regenerated.requests
    assert regenerated.requests <= len(regenerated.candidates) + 3


def test_nothing_stored_is_asked_for_again(regenerated: Run, small_model: Path) -> None:
    asked, known = regenerated.requests, len(regenerated.candidates)
    for changes in ({}, {"selector": "random"}):
        stage = FAQModifier(**regenerated.fields(**changes))
        oneshot(model=str(small_model), recipe=[stage])
    assert regenerated.requests == asked
    more = FAQModifier(**regenerated.fields(num_candidates=3))
    oneshot(model=str(small_model), recipe=[more])
    added = regenerated.candidates[known:]
    assert {c["index"] for c in added} == {2}
    assert regenerated.requests <= asked + len(added) + 3


def test_three_ways_to_a_log_probability_agree(
    regenerated: Run, large_model: Path, tmp_path: Path
) -> None:
    """Told with the answer, told for a prompt, and computed here."""
    tokenizer = AutoTokenizer.from_pretrained(large_model)
    prompts = _prompts(regenerated, tokenizer)
    picked = [c for c in regenerated.candidates if len(c["ids"]) > 8][:12]
    asked = [prompts[c["prompt_id"]] for c in picked]
    answers = [c["ids"] for c in picked]
    told = torch.tensor([c["score"] for c in picked])
    source = endpoint_expert(Address.parse(regenerated.url), tokenizer, tmp_path)
    with source.open() as expert:
        scored = torch.tensor(expert.mean_logprobs(asked, answers))
    model = AutoModelForCausalLM.from_pretrained(large_model, dtype="auto").eval()
    here = torch.tensor(mean_logprobs(model, asked, answers, chunk=7))
    print(f"told-scored {(told - scored).abs().max():.4f}", end=", ")
    print(f"told-here {(told - here).abs().max():.4f}")
    assert (told - scored).abs().max() < TOLERANCE
    assert (told - here).abs().max() < TOLERANCE
    # a control: the answers of others are less likely by far more than that
    wrong = mean_logprobs(model, asked, [*answers[1:], answers[0]])
    assert (here - torch.tensor(wrong)).abs().mean() > 4 * TOLERANCE


def test_a_judge_behind_the_server_is_held_to_its_form(
    served: Run, small_model: Path, tmp_path: Path
) -> None:
    """The family cannot judge, but decoding guided by the schema makes it grade."""
    stage = FAQModifier(
        **served.fields(selector="expert_judge", num_samples=2, expert="generator")
    )
    oneshot(model=str(small_model), recipe=[stage])
    asked = served.log.read_text().count('POST /v1/chat/completions HTTP/1.1" 200')
    assert asked > 0
    (path,) = served.folder.glob("candidates/*/scores-*.jsonl")
    grades = [json.loads(line)["scores"] for line in path.read_text().splitlines()]
    print(f"{sum(map(bool, grades))} of {len(grades)} groups judged")
    assert any(grades)
    assert all(0 <= grade <= 40 for group in grades for grade in group)
    again = FAQModifier(**served.fields(selector="expert_judge", num_samples=1))
    oneshot(model=str(small_model), recipe=[again])
    now = served.log.read_text().count('POST /v1/chat/completions HTTP/1.1" 200')
    assert now == asked


def test_messages_give_the_same_kind_of_data(
    served: Run, small_model: Path, tmp_path: Path
) -> None:
    stage = FAQModifier(
        **served.fields(api="chat", cache_dir=str(tmp_path), selector="random"),
    )
    oneshot(model=str(small_model), recipe=[stage])
    (manifest_path,) = tmp_path.glob("datasets/*/manifest.json")
    counts = json.loads(manifest_path.read_text())["counts"]
    assert counts["candidates"] > 0 and counts["candidates_retokenized"] == 0
    assert 'POST /v1/chat/completions HTTP/1.1" 200' in served.log.read_text()


def _prompts(run: Run, tokenizer: Any) -> dict[str, list[int]]:
    from llmc_faq_slider.faq.preparation import Conversation, Task, prepare
    from llmc_faq_slider.faq.prompts import Wrapping
    from llmc_faq_slider.faq.seeds import shipped_seeds

    wrapping = Wrapping(32, False)
    talk = Conversation(tokenizer, tokenizer, True, None, wrapping)
    prompts = {}
    for seed in shipped_seeds():
        prompt = prepare(Task(seed), [], talk)
        assert prompt is not None
        prompts[prompt.id] = prompt.generator_ids
    return prompts
