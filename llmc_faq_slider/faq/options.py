"""What a user can set, in a recipe or on the command line, and how it is checked."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
import yaml
from loguru import logger
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from transformers import PretrainedConfig

from llmc_faq_slider.context import context_length
from llmc_faq_slider.faq.endpoint import KEY_VARIABLE, Address, is_url
from llmc_faq_slider.faq.generators import GeneratorSource, resolve_sampling
from llmc_faq_slider.faq.serving import Api
from llmc_faq_slider.faq.settings import (
    ACCELERATOR_SIZES,
    CPU_SIZES,
    GateLimits,
    Selector,
    Settings,
)
from llmc_faq_slider.files import CACHE_VARIABLE
from llmc_faq_slider.removed import REMOVED, refuse_removed


class FAQOptions(BaseModel):
    """
    Fields of the stage.

    :param generator: who writes the candidates: ``self``, folder or hub id of a larger
        model with the same tokenizer, or base URL of an OpenAI-compatible server that
        has one (``http://127.0.0.1:8000/v1``). Default ``self``
    :param generator_model: name the server knows the model by. None: the only one
    :param generator_tokenizer: folder or hub id of the server's tokenizer, for the
        family check, its chat template and its generation config. None: compared with
        the server's own by encoding texts there
    :param api: way to ask a server: ``completions`` sends token ids, ``chat`` messages.
        Default ``auto``: the former where possible
    :param api_key_variable: environment variable that holds the server's key. Default
        LLMC_FAQ_SLIDER_API_KEY
    :param concurrency: requests to a server at once. Default 8
    :param request_timeout: seconds to wait for one answer of a server. Default 600
    :param request_attempts: tries of one request while the server is busy, fails or
        drops the connection. Default 6
    :param allow_remote: let seeds of your own be sent to another machine. Default False
    :param allow_retokenize: take a generator with another or an unknown tokenizer; its
        answers are tokenised again. Default False
    :param seeds: what to regenerate: a json, jsonl, txt or parquet file, the name of a
        data set on a hub, several of these, or ``shipped`` for the package's own
        prompts. None, the default, means the data set given to oneshot if any, else
        ``shipped``
    :param seeds_split: split of a hub data set. Default "train"
    :param evaluation_sets: files or hub names of texts the data must not share a run of
        13 words with. Default none
    :param num_candidates: candidates per prompt (G), which compete if there are
        several. Default 1: choosing among several gains little (docs/faq.md)
    :param num_samples: rows of the calibration set (N). None: 128 with an
        accelerator, 32 without
    :param sequence_length: tokens of each row (L). None: 2048 with an accelerator, 512
        without; never more than the model's context
    :param max_new_tokens: longest answer in tokens. None: 1024 with an accelerator,
        256 without
    :param temperature: sampling temperature, above 0. None: the generator's own, else
        0.7 (0.6 if its template has a thinking mode), else what a server does
    :param top_p: nucleus share in (0, 1]. None: the generator's own, else 0.8 (0.95)
    :param top_k: most likely ids to draw from, 0 for all. None: the generator's own,
        else 20
    :param batch_size: prompts per generation batch. None: 64 with an accelerator, 32
        without
    :param selector: who wins a group: ``expert_nll`` (highest mean log-probability
        under the expert), ``expert_judge`` (best graded by the expert in words) or
        ``random``
    :param expert: who scores: ``generator``, ``target``, a folder, a hub id or the URL
        of a server. Default ``generator``
    :param expert_model: name the expert's server knows the model by. None: the only one
    :param chain_of_thought: have the reasoning written before the answer: True, by the
        template's thinking mode or asked for in words; False, neither. Default None,
        the thinking mode if there is one: asking in words loses in docs/faq.md
    :param enable_thinking: thinking switch of the chat template. None: on if the
        template has the switch, unless ``chain_of_thought`` is False
    :param min_response_tokens: gate, shortest valid answer. Default 32
    :param max_zlib_ratio: gate, raw over compressed size of texts from 1 kB. Default 4
    :param max_repeated_share: gate, share of repeated 8-token runs. Default 0.2
    :param max_similarity: gate, share of 5-token runs (Jaccard) an answer may have in
        common with an answer to another prompt. Default 0.8
    :param allow_refusals: let answers compete that decline to answer. Default False
    :param accept_truncated: let cut-off answers compete, below all finished ones.
        Default True
    :param retries: further tries, with new random numbers and twice the tokens, for
        prompts without valid answer, before another prompt takes their place. Default
        0: another prompt is cheaper
    :param max_fallback_fraction: largest share of prompts whose seed (a passage, or a
        chat with its answer) stands in as it is where no answer is valid; beyond it
        another prompt takes the place. Default 0.1
    :param cache_dir: folder for candidates, data sets and manifests. None: folder
        ``faq`` in the folder the environment variable LLMC_FAQ_SLIDER_CACHE names, else
        in ~/.cache/llmc_faq_slider
    :param seed: seed of sampling, prompt order and row order. Default 0
    """

    model_config = ConfigDict(extra="forbid")

    generator: str = Field(default="self", min_length=1)
    generator_model: str | None = None
    generator_tokenizer: str | None = None
    api: Api = "auto"
    api_key_variable: str = Field(default=KEY_VARIABLE, min_length=1)
    concurrency: int = Field(default=8, ge=1, le=1024)
    request_timeout: float = Field(default=600.0, gt=0)
    request_attempts: int = Field(default=6, ge=1)
    allow_remote: bool = False
    allow_retokenize: bool = False
    seeds: str | list[str] | None = None
    seeds_split: str | None = None
    evaluation_sets: list[str] = Field(default_factory=list)
    num_candidates: int = Field(default=1, ge=1, le=64)
    num_samples: int | None = Field(default=None, ge=1)
    sequence_length: int | None = Field(default=None, ge=8)
    max_new_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, gt=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    batch_size: int | None = Field(default=None, ge=1)
    selector: Selector = "expert_nll"
    expert: str = Field(default="generator", min_length=1)
    expert_model: str | None = None
    chain_of_thought: bool | None = None
    enable_thinking: bool | None = None
    min_response_tokens: int = Field(default=32, ge=1)
    max_zlib_ratio: float = Field(default=4.0, gt=1)
    max_repeated_share: float = Field(default=0.2, ge=0, le=1)
    max_similarity: float = Field(default=0.8, ge=0, le=1)
    allow_refusals: bool = False
    accept_truncated: bool = True
    retries: int = Field(default=0, ge=0, le=8)
    max_fallback_fraction: float = Field(default=0.1, ge=0, le=1)
    cache_dir: str | None = None
    seed: int = 0

    @model_validator(mode="before")
    @classmethod
    def _names_nothing_removed(cls, fields: Any) -> Any:
        refuse_removed("FAQModifier", fields)
        return fields

    @field_validator("generator", "expert")
    @classmethod
    def _url_is_sound(cls, name: str) -> str:
        if is_url(name):
            Address.parse(name)
        return name

    @model_validator(mode="after")
    def _candidates_suit_the_selector(self) -> Self:
        chooses = (self.selector, self.expert) != ("expert_nll", "generator")
        if self.num_candidates == 1 and chooses:
            raise ValueError(
                f"num_candidates is 1, which leaves the selector {self.selector} and "
                f"the expert {self.expert} nothing to choose from; set it to 4, say"
            )
        if self.selector == "expert_judge" and self.num_candidates > 26:
            raise ValueError(
                f"num_candidates is {self.num_candidates}; the selector expert_judge "
                "names candidates by letters and takes at most 26"
            )
        return self

    def address(self, url: str) -> Address:
        """How a server is reached."""
        return Address.parse(
            url,
            key_variable=self.api_key_variable,
            timeout=self.request_timeout,
            attempts=self.request_attempts,
        )

    def store_folder(self) -> str:
        """Folder of candidates and data sets."""
        if self.cache_dir is not None:
            return self.cache_dir
        base = os.environ.get(CACHE_VARIABLE) or "~/.cache/llmc_faq_slider"
        return os.path.join(base, "faq")

    def settings(self, config: PretrainedConfig, source: GeneratorSource) -> Settings:
        """Fill in what was left open, and say so.

        :param config: the target's
        """
        accelerated = torch.accelerator.is_available()
        sizes = ACCELERATOR_SIZES if accelerated else CPU_SIZES
        length = self.sequence_length or sizes["length"]
        context = context_length(config)
        settings = Settings(
            num_candidates=self.num_candidates,
            num_samples=self.num_samples or sizes["rows"],
            sequence_length=min(length, context or length),
            sampling=resolve_sampling(
                source,
                self.max_new_tokens or sizes["new"],
                self.temperature,
                self.top_p,
                self.top_k,
            ),
            batch_size=self.batch_size or sizes["batch"],
            selector=self.selector,
            gates=GateLimits(
                self.min_response_tokens,
                self.max_zlib_ratio,
                self.max_repeated_share,
                self.accept_truncated,
                self.max_similarity,
                self.allow_refusals,
            ),
            retries=self.retries,
            max_fallback_fraction=self.max_fallback_fraction,
            chain_of_thought=self.chain_of_thought,
            enable_thinking=self.enable_thinking,
            seed=self.seed,
        )
        logger.info(
            f"FAQ: {settings.num_samples} rows x {settings.sequence_length} tokens, "
            f"{settings.num_candidates} candidates of at most "
            f"{settings.sampling.max_new_tokens} tokens per prompt, generator "
            f"{self.generator} ({'accelerator' if accelerated else 'CPU'})"
        )
        return settings


def options_of(fields: Mapping[str, Any], assignments: Sequence[str]) -> FAQOptions:
    """Options from fields and ``NAME=VALUE`` texts, whose values are YAML.

    :raises ValueError: for an unknown name or a value that does not fit
    """
    given = dict(fields)
    known = {*FAQOptions.model_fields, *REMOVED["FAQModifier"]}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or name.strip() not in known:
            raise ValueError(
                f"{assignment!r} sets no field. Give NAME=VALUE with one of "
                f"{', '.join(FAQOptions.model_fields)}."
            )
        given[name.strip()] = yaml.safe_load(value)
    try:
        return FAQOptions(**given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "value_error":
            # names what it found itself, and leaves keys in URLs out
            raise ValueError(f"{name}: {first['ctx']['error']}".lstrip(": ")) from None
        raise ValueError(f"{name}: {first['msg']}, found {first['input']!r}") from None
