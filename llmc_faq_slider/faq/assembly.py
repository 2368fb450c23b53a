"""From options to what :func:`regenerate` is called with, and the call."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llmc_faq_slider.faq.endpoint import check_privacy, is_url
from llmc_faq_slider.faq.endpoint_generator import endpoint_source
from llmc_faq_slider.faq.experts import (
    endpoint_expert,
    loaded_expert,
    local_expert,
)
from llmc_faq_slider.faq.generators import (
    GeneratorSource,
    generation_config,
    self_source,
    sibling_source,
)
from llmc_faq_slider.faq.grading import Experts
from llmc_faq_slider.faq.identity import model_fingerprint
from llmc_faq_slider.faq.loading import open_model
from llmc_faq_slider.faq.options import FAQOptions
from llmc_faq_slider.faq.regenerate import regenerate
from llmc_faq_slider.faq.rendering import template_text
from llmc_faq_slider.faq.seeds import (
    Seed,
    load_mixture,
    load_seeds,
    seeds_from_rows,
    shipped_seeds,
)
from llmc_faq_slider.faq.settings import Settings
from llmc_faq_slider.faq.store import CalibrationSet, Store

SHIPPED = "shipped"


@dataclass(frozen=True)
class Target:
    """The model to be quantised.

    :param name: folder or hub id, for messages
    :param size: number of parameters
    :param fingerprint: hash of the weights
    :param open: context with the model in eval mode and in full precision
    """

    name: str
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    defaults: GenerationConfig
    size: Callable[[], int]
    fingerprint: Callable[[], str]
    open: Callable[[], AbstractContextManager[PreTrainedModel]]


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The target's tokenizer.

    :raises ValueError: when there is none
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"FAQModifier needs the model's tokenizer and finds none at {name!r} "
            f"({error}). Load the model from a folder or hub id that has one."
        ) from error
    warn_without_template(tokenizer, name)
    return tokenizer


def warn_without_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Say that without a chat template there are no chats."""
    if template_text(tokenizer) is None:
        logger.warning(
            f"FAQ: {name} has no chat template; seeds are continued as plain text"
        )


def stored_target(name: str) -> Target:
    """A model in a folder or on a hub, loaded when it is opened.

    :raises ValueError: when it cannot be read
    """
    tokenizer = load_tokenizer(name)
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"model {name!r} cannot be read: {error}") from error

    def size() -> int:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config).num_parameters()

    @contextmanager
    def opened() -> Iterator[PreTrainedModel]:
        model = open_model(name)
        if torch.accelerator.is_available():
            model.to(torch.accelerator.current_accelerator())
        yield model

    return Target(
        name=name,
        config=config,
        tokenizer=tokenizer,
        defaults=generation_config(name),
        size=size,
        fingerprint=lambda: model_fingerprint(name),
        open=opened,
    )


def assemble(
    options: FAQOptions, target: Target, rows: Any = None
) -> tuple[list[Seed], GeneratorSource, Settings, bool]:
    """Seeds, generator, settings, and whether the seeds are the user's own.

    :param rows: loader of the data set given to oneshot, the seeds if the options name
        none
    :raises ValueError: for unusable seeds or options that cannot be followed
    """
    given = rows is not None and options.seeds is None
    private = given or options.seeds not in (None, SHIPPED)
    source = generator_source(options, target, private)
    settings = options.settings(target.config, source)
    if given:
        return seeds_from_rows(rows, target.tokenizer), source, settings, private
    return read_seeds(options), source, settings, private


def produce(options: FAQOptions, target: Target, rows: Any = None) -> CalibrationSet:
    """Regenerate the data that the options describe; see :func:`assemble`.

    :raises RegenerationError: when too few answers are valid
    :raises FolderBusyError: while another process makes the same candidates
    """
    seeds, source, settings, private = assemble(options, target, rows)
    return regenerate(
        seeds,
        target.tokenizer,
        source,
        settings,
        Store(options.store_folder()),
        experts(options, target, source, private),
        read_evaluation(options),
    )


def read_seeds(options: FAQOptions) -> list[Seed]:
    """The seeds the options name; the shipped ones if they name none."""
    if options.seeds in (None, SHIPPED):
        return shipped_seeds()
    if isinstance(options.seeds, list):
        return load_mixture(options.seeds, options.seeds_split)
    return load_seeds(str(options.seeds), options.seeds_split)


def read_evaluation(options: FAQOptions) -> list[Seed]:
    """Texts the data must not repeat."""
    return [s for source in options.evaluation_sets for s in load_seeds(source)]


def generator_source(
    options: FAQOptions, target: Target, private: bool
) -> GeneratorSource:
    """The generator the options name.

    :param private: the seeds are the user's own
    :raises ValueError: for a server the seeds may not be sent to
    :raises FamilyError: when it is no larger sibling
    :raises EndpointError: when a server cannot be used
    """
    if options.generator == "self":
        return self_source(
            target.open,
            target.config,
            target.tokenizer,
            target.defaults,
            target.fingerprint(),
        )
    if not is_url(options.generator):
        return sibling_source(
            options.generator,
            target.config,
            target.tokenizer,
            target.size(),
            options.allow_retokenize,
        )
    address = options.address(options.generator)
    check_privacy(address, private, options.allow_remote)
    return endpoint_source(
        address,
        target.tokenizer,
        _servers(options),
        options.generator_model,
        options.generator_tokenizer,
        options.allow_retokenize,
        options.api,
        options.concurrency,
    )


def experts(
    options: FAQOptions, target: Target, source: GeneratorSource, private: bool
) -> Experts:
    """Those the selector may ask.

    :raises ValueError: for an expert that cannot be used
    :raises EndpointError: when a server cannot be reached
    """
    name = options.expert
    is_generator = name == "generator" or (name == "target" == options.generator)
    if options.selector == "random":
        return Experts(None, is_generator)
    if name == "generator":
        name = options.generator
    if name in ("self", "target"):
        own = loaded_expert(target.open, target.tokenizer, target.fingerprint())
        return Experts(own, is_generator)
    if not is_url(name):
        judges = options.selector == "expert_judge"
        if is_generator and not judges:
            # its scores came with its answers
            return Experts(None, True)
        return Experts(local_expert(name, target.tokenizer, judges), is_generator)
    address = options.address(name)
    check_privacy(address, private, options.allow_remote)
    model = options.generator_model if is_generator else options.expert_model
    same = is_generator and source.shares_tokens
    found = endpoint_expert(
        address, target.tokenizer, _servers(options), model, same, options.concurrency
    )
    return Experts(found, is_generator)


def _servers(options: FAQOptions) -> Path:
    return Path(options.store_folder()).expanduser() / "servers"
