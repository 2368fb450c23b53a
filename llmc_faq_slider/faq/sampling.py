"""Batched sampling from a causal language model, reproducible row by row.

Each row draws its random numbers from its own seed, so what a row samples does not
hang on which other rows share its batch (up to the rounding of batched matmuls).
"""

import zlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from llmc_faq_slider.context import context_length
from llmc_faq_slider.faq.decoding import grouped_queries, in_place
from llmc_faq_slider.faq.settings import Sampling
from llmc_faq_slider.products import multiplied_in, product_dtype


@dataclass(frozen=True)
class Draw:
    """One sampled answer.

    :param ids: answer ids, with the end id if one was drawn
    :param finished: an end id was drawn before the limit
    :param logprobs: natural log-probability of each id under the unscaled model; empty
        if the generator does not tell
    :param exact: the ids are those that were drawn, not text tokenised again
    :param failure: why there is no usable answer, named like a gate; None if there is
    """

    ids: list[int]
    finished: bool
    logprobs: list[float]
    exact: bool = True
    failure: str | None = None

    @property
    def score(self) -> float | None:
        """Mean log-probability per token, in nats."""
        if not self.logprobs:
            return None
        return sum(self.logprobs) / len(self.logprobs)


def row_seed(*parts: object) -> int:
    """32-bit seed of a row from whatever names it."""
    return zlib.crc32(":".join(str(part) for part in parts).encode())


@torch.inference_mode()
def sample_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    sampling: Sampling,
    end_ids: Collection[int],
    on_step: Callable[[int], None] = lambda rows: None,
) -> list[Draw]:
    """Sample one answer to each prompt.

    :param model: causal language model in eval mode
    :param prompts: prompt ids per row, not empty
    :param seeds: one 32-bit seed per row
    :param end_ids: ids that end an answer
    :param on_step: told the number of rows still sampled at each step
    :return: one draw per prompt, in order
    """
    device = model.device
    limits = [_room(model, prompt, sampling.max_new_tokens) for prompt in prompts]
    steps = max(limits)
    uniforms = torch.stack([_uniforms(seed, steps) for seed in seeds]).to(device)
    ids, mask = left_pad(prompts, device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    rows = list(range(len(prompts)))
    answers: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    finished = [False] * len(prompts)
    cache: Cache | None = None
    dtype = product_dtype("auto", device)

    for step in range(steps):
        with multiplied_in(dtype, device), grouped_queries(device):
            output = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        if cache is None:
            cache = output.past_key_values
            in_place(cache, device)
        picked, logprob = pick(output.logits[:, -1], uniforms[rows, step], sampling)
        for row, index, value in zip(
            rows, picked.tolist(), logprob.tolist(), strict=True
        ):
            if finished[row] or len(answers[row]) >= limits[row]:
                continue
            answers[row].append(index)
            logprobs[row].append(value)
            finished[row] = index in end_ids
        live = [
            i
            for i, row in enumerate(rows)
            if not finished[row] and len(answers[row]) < limits[row]
        ]
        if not live:
            break
        on_step(len(live))
        ids = picked[:, None]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=-1)
        positions = positions[:, -1:] + 1
        if 4 * len(live) <= 3 * len(rows) and _selectable(cache):
            keep = torch.tensor(live, device=device)
            cache.batch_select_indices(keep)
            ids, mask, positions = ids[keep], mask[keep], positions[keep]
            rows = [rows[i] for i in live]
    return [Draw(answers[i], finished[i], logprobs[i]) for i in range(len(prompts))]


def pick(
    logits: torch.Tensor, uniforms: torch.Tensor, sampling: Sampling
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one id per row by inverting the cut-down distribution at ``uniforms``.

    The order of the cuts is temperature, top-k, top-p.

    :param logits: [rows, vocabulary], any float type
    :param uniforms: [rows], float in [0, 1)
    :return: ids int64 [rows] and their log-probability without any cut, fp32 [rows]
    """
    logits = logits.float()
    k = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
    top, ids = logits.topk(k, dim=-1)
    probs = torch.softmax(top / (sampling.temperature or 1.0), dim=-1)
    before = probs.cumsum(-1) - probs
    probs = probs.masked_fill(before >= (sampling.top_p or 1.0), 0.0)
    cumulative = probs.cumsum(-1)
    point = uniforms[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, point, right=True)
    index = torch.minimum(index, (probs > 0).sum(-1, keepdim=True) - 1)
    logprob = top.gather(-1, index) - logits.logsumexp(-1, keepdim=True)
    return ids.gather(-1, index)[:, 0], logprob[:, 0]


def left_pad(
    rows: Sequence[Sequence[int]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-align rows: ids (padded with 0) and mask, both int64 [rows, longest]."""
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = torch.tensor(row)
        mask[index, width - len(row) :] = 1
    return ids.to(device), mask.to(device)


def _room(model: PreTrainedModel, prompt: Sequence[int], wanted: int) -> int:
    limit = context_length(model.config)
    return wanted if limit is None else max(1, min(wanted, limit - len(prompt)))


def _uniforms(seed: int, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, generator=generator)


def _selectable(cache: Cache) -> bool:
    return isinstance(cache, DynamicCache) and all(
        isinstance(layer, DynamicLayer) for layer in cache.layers
    )
