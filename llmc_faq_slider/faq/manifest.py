"""What decides a data set, and the record of how one was made."""

import hashlib
import importlib.metadata
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch

from llmc_faq_slider.faq.choice import Pick
from llmc_faq_slider.faq.competition import Outcome
from llmc_faq_slider.faq.gates import GATES
from llmc_faq_slider.faq.generators import GeneratorSource
from llmc_faq_slider.faq.grading import Experts
from llmc_faq_slider.faq.identity import tokenizer_hash
from llmc_faq_slider.faq.preparation import Conversation
from llmc_faq_slider.faq.prompts import PROMPT_VERSION, wording_hash
from llmc_faq_slider.faq.rendering import template_hash
from llmc_faq_slider.faq.seeds import Seed, seeds_hash
from llmc_faq_slider.faq.settings import Settings

_COUNTS = (
    "candidates",
    "candidates_retokenized",
    "candidates_truncated",
    "groups_unjudged",
    "prompts_answered",
    "prompts_dropped",
    "prompts_fallback",
    "prompts_retried",
    "prompts_too_long",
    "seeds_overlapping",
    "tokens_generated",
    "tokens_prompted",
)


def candidate_facts(
    seeds: Sequence[Seed],
    source: GeneratorSource,
    settings: Settings,
    talk: Conversation,
) -> dict[str, Any]:
    """What decides the candidates. The number of them, gates and selection do not."""
    identity = {k: v for k, v in source.identity.items() if k != "name"}
    return {
        "generator": identity,
        "tokenizer": tokenizer_hash(source.tokenizer),
        "template": template_hash(talk.speaker) if talk.is_chat else None,
        "target_template": template_hash(talk.target),
        "enable_thinking": talk.enable_thinking,
        "seeds": seeds_hash(seeds),
        "num_seeds": len(seeds),
        "prompts": PROMPT_VERSION,
        "wording": wording_hash(),
        "wrapping": asdict(talk.wrapping),
        "sampling": asdict(settings.sampling),
        "end_ids": sorted(source.end_ids),
        "batch_size": settings.batch_size,
        "seed": settings.seed,
    }


def dataset_facts(
    candidate_key: str,
    seeds: Sequence[Seed],
    talk: Conversation,
    settings: Settings,
    experts: Experts,
    evaluation: Sequence[Seed],
) -> dict[str, Any]:
    """What decides the data set."""
    expert = experts.asked(settings)
    return {
        "candidates": candidate_key,
        "target_tokenizer": tokenizer_hash(talk.target),
        "settings": asdict(settings),
        "expert": None if expert is None else expert.facts,
        "evaluation": seeds_hash(evaluation) if evaluation else None,
        "sources": _sources_hash(seeds),
    }


def manifest(
    source: GeneratorSource,
    facts: dict[str, Any],
    choices: dict[str, Any],
    outcome: Outcome,
    picks: Sequence[Pick],
    input_ids: torch.Tensor,
    loss_mask: torch.Tensor,
) -> dict[str, Any]:
    """The record: hashes, settings, counts, tokens, and who won each group."""
    return {
        "generator": source.identity,
        "candidates": facts,
        "dataset": choices,
        "counts": {name: outcome.counts[name] for name in _COUNTS}
        | {
            "selected": len(picks),
            "selected_not_first": sum(pick.place > 0 for pick in picks),
            "selected_truncated": sum(pick.truncated for pick in picks),
            "tokens_selected": sum(pick.size for pick in picks),
        },
        "gates": {name: outcome.gates[name] for name in GATES},
        "sources": dict(sorted(outcome.asked.items())),
        "winners": [
            {
                "task": pick.group.task.id,
                "candidate": pick.index,
                "place": pick.place,
                "margin": pick.margin,
            }
            for pick in picks
        ],
        "tokens": input_ids.numel(),
        "answer_tokens": int(loss_mask.sum()),
        "versions": dict(_installed(("llmc_faq_slider", "torch", "transformers"))),
    }


def _sources_hash(seeds: Sequence[Seed]) -> str:
    pairs = sorted(f"{seed.id}:{seed.source}" for seed in seeds)
    return hashlib.sha256("\n".join(pairs).encode()).hexdigest()


def _installed(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    for name in names:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield name, "not installed as a package"
