"""Every number and switch of the stage, and their defaults by device.

The method's public description names none of these values: all are our choices.
"""

from dataclasses import dataclass, field
from typing import Literal

Selector = Literal["expert_nll", "expert_judge", "random"]

#: rows x tokens of the calibration set, new tokens per answer, prompts per batch
ACCELERATOR_SIZES = {"rows": 128, "length": 2048, "new": 1024, "batch": 64}
CPU_SIZES = {"rows": 32, "length": 512, "new": 256, "batch": 32}

#: passage tokens shown to the generator when a seed is raw text
MAX_PASSAGE_TOKENS = 512
MIN_PASSAGE_TOKENS = 16
#: prefix tokens that a model without a chat template continues
CONTINUATION_TOKENS = 64

#: prompts after which a generator that mostly fails is given up
TRIAL_PROMPTS = 32


@dataclass(frozen=True)
class GateLimits:
    """Limits a candidate must keep to take part in the competition.

    :param min_response_tokens: shortest answer, in tokens without the end of turn
    :param max_zlib_ratio: raw bytes over compressed bytes, for texts of 1 kB and more
    :param max_repeated_share: share of 8-token runs that occurred before in the answer
    :param accept_truncated: let answers cut off at the token limit compete, below all
        finished ones
    :param max_similarity: share of common 5-token runs (Jaccard) up to which an answer
        may resemble one to another prompt
    :param allow_refusals: let answers compete that decline to answer
    """

    min_response_tokens: int = 32
    max_zlib_ratio: float = 4.0
    max_repeated_share: float = 0.2
    accept_truncated: bool = True
    max_similarity: float = 0.8
    allow_refusals: bool = False


@dataclass(frozen=True)
class Sampling:
    """How one answer is drawn; ``top_k`` 0 means the whole vocabulary.

    None leaves a value to the server that draws.
    """

    temperature: float | None
    top_p: float | None
    top_k: int | None
    max_new_tokens: int


@dataclass(frozen=True)
class Settings:
    """All that decides the regenerated set besides seeds and models.

    :param num_candidates: answers per prompt (G)
    :param num_samples: rows of the calibration set (N)
    :param sequence_length: tokens of each row (L)
    :param sampling: how answers are drawn
    :param batch_size: prompts in one generation batch
    :param selector: what decides the competition inside a group
    :param gates: limits for taking part
    :param retries: further tries, with new random numbers and twice the tokens, for
        prompts without any valid answer
    :param max_fallback_fraction: largest share of prompts whose seed stands in for a
        valid answer as it is
    :param chain_of_thought: have the reasoning written before the answer; None for the
        template's thinking mode only
    :param enable_thinking: thinking switch of the chat template, None for automatic
    :param seed: seeds sampling, prompt order, tie-free random choice and row order
    """

    num_candidates: int
    num_samples: int
    sequence_length: int
    sampling: Sampling
    batch_size: int
    selector: Selector = "expert_nll"
    gates: GateLimits = field(default_factory=GateLimits)
    retries: int = 0
    max_fallback_fraction: float = 0.1
    chain_of_thought: bool | None = None
    enable_thinking: bool | None = None
    seed: int = 0

    @property
    def token_budget(self) -> int:
        return self.num_samples * self.sequence_length

    @property
    def passage_tokens(self) -> int:
        """Tokens of a raw text shown to the generator: a quarter row at most."""
        quarter = self.sequence_length // 4
        return max(MIN_PASSAGE_TOKENS, min(MAX_PASSAGE_TOKENS, quarter))
