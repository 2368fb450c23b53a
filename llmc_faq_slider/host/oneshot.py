"""llm-compressor's ``oneshot`` behind a check of the recipe."""

import inspect
from functools import wraps
from pathlib import Path
from typing import Any

import llmcompressor
from llmcompressor.modifiers import Modifier
from loguru import logger

from llmc_faq_slider.faq.export import is_export, load_export
from llmc_faq_slider.faq.modifier import FAQModifier
from llmc_faq_slider.host.findings import errors
from llmc_faq_slider.host.recipe_lint import lint_recipe

__all__ = ["oneshot"]

_SIGNATURE = inspect.signature(llmcompressor.oneshot)


@wraps(llmcompressor.oneshot)
def oneshot(*args: Any, **kwargs: Any) -> Any:
    """
    llm-compressor's ``oneshot``, with the recipe checked before the model is loaded.

    Same arguments and result. A recipe that llm-compressor would ignore in part or as a
    whole, that cannot be read, or whose stages contradict each other is refused.
    ``dataset`` may also be a folder that ``llmc-faq-slider regenerate`` wrote.

    :raises ValueError: with one sentence or two per finding, or when the folder's rows
        are missing
    """
    dataset = kwargs.get("dataset")
    if isinstance(dataset, (str, Path)) and is_export(dataset):
        kwargs["dataset"] = load_export(dataset)
    given = _SIGNATURE.bind_partial(*args, **kwargs).arguments
    if given.get("recipe") is not None:
        modifiers, findings = lint_recipe(given["recipe"], given.get("stage"))
        for finding in findings:
            if finding.severity == "warning":
                logger.warning(finding.message)
        messages = [finding.message for finding in errors(findings)]
        if given.get("dataset") is None and given.get("dataset_path") is None:
            messages += _needs_data(modifiers)
        if messages:
            raise ValueError("\n".join(messages))
    return llmcompressor.oneshot(*args, **kwargs)


def _needs_data(modifiers: list[Modifier]) -> list[str]:
    """A sentence on the first stage that calibrates on data there is none of."""
    for modifier in modifiers:
        if isinstance(modifier, FAQModifier):
            return []
        if modifier.requires_calibration_data:
            return [
                f"{type(modifier).__name__} needs calibration data and oneshot was "
                "given none. Give oneshot a dataset, or put a FAQModifier before it."
            ]
    return []
