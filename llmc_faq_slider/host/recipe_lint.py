"""Everything about a recipe that can be found without running it."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.quantization.quantization import QuantizationMixin
from llmcompressor.recipe import Recipe
from pydantic import ValidationError
from torch import nn

from llmc_faq_slider.faq.modifier import FAQModifier
from llmc_faq_slider.host.checks import (
    check_learning_stage,
    check_patterns,
    stage_conflicts,
)
from llmc_faq_slider.host.declared import declared_groups
from llmc_faq_slider.host.findings import Finding, errors, shown
from llmc_faq_slider.host.recipe_fields import build_modifier, known_modifiers
from llmc_faq_slider.host.recipe_text import read_entries, read_recipe
from llmc_faq_slider.host.serving_check import serving_findings, servings
from llmc_faq_slider.report.serving import find_target
from llmc_faq_slider.slider.modifier import SliderQuantModifier

__all__ = ["lint_modifiers", "lint_recipe"]

SEED_SUFFIXES = (".json", ".jsonl", ".txt", ".parquet")


def lint_recipe(
    recipe: Any, stage: str | None = None
) -> tuple[list[Modifier], list[Finding]]:
    """
    The modifiers of a recipe, and what is wrong with it.

    :param recipe: what ``oneshot(recipe=...)`` takes: a path, YAML text, a modifier or
        a list of them, or a Recipe
    :param stage: as in ``oneshot(stage=...)``: only stages whose name starts so
    :return: the modifiers that could be made, in order, and the findings
    """
    if isinstance(recipe, Recipe):
        modifiers: list[Modifier] = list(recipe.modifiers)
        findings: list[Finding] = []
    elif isinstance(recipe, Modifier | list | tuple):
        modifiers, findings = _given_modifiers(recipe)
    elif isinstance(recipe, str | os.PathLike):
        modifiers, findings = _written_modifiers(recipe, stage)
    else:
        sentence = (
            f"The recipe is {type(recipe).__name__}. Give the path of a recipe file, "
            "recipe text, or modifiers."
        )
        return [], [Finding("error", "recipe-type", "recipe", sentence)]
    return modifiers, findings + list(lint_modifiers(modifiers))


def _given_modifiers(recipe: Any) -> tuple[list[Modifier], list[Finding]]:
    flat: list[Any] = []
    for item in recipe if isinstance(recipe, list | tuple) else [recipe]:
        flat.extend(item if isinstance(item, list | tuple) else [item])
    wrong = next((item for item in flat if not isinstance(item, Modifier)), None)
    if wrong is not None:
        sentence = (
            f"The list of modifiers holds {shown(wrong)}. llm-compressor takes a list "
            "of modifiers, or one recipe file as a string, but no list of files."
        )
        return [], [Finding("error", "recipe-type", "recipe", sentence)]
    if not flat:
        sentence = "The list of modifiers is empty, so nothing would be quantised."
        return [], [Finding("error", "no-modifier", "recipe", sentence)]
    return flat, []


def _written_modifiers(
    recipe: str | os.PathLike[str], stage: str | None
) -> tuple[list[Modifier], list[Finding]]:
    document, findings = read_recipe(recipe)
    if document is None:
        return [], findings
    if stage is not None:
        chosen = {k: v for k, v in document.items() if str(k).startswith(stage)}
        if not chosen:
            sentence = (
                f"No stage of the recipe starts with {stage!r}; it has "
                f"{', '.join(map(str, document))}. Correct oneshot's stage."
            )
            return [], [*findings, Finding("error", "no-stage", "recipe", sentence)]
        document = chosen
    entries, skipped = read_entries(document, known_modifiers())
    findings = findings + skipped
    modifiers = []
    for entry in entries:
        modifier, wrong = build_modifier(entry)
        findings += wrong
        if modifier is not None:
            modifiers.append(modifier)
    return modifiers, findings


def lint_modifiers(
    modifiers: Sequence[Modifier], model: nn.Module | None = None
) -> Iterator[Finding]:
    """What is wrong with stages, each by itself and together.

    :param model: shows which layers the stages' targets match
    """
    broken = False
    for modifier in modifiers:
        yield from _alone(modifier)
        for finding in _patterns(modifier):
            broken = True
            yield finding
    yield from _together(modifiers)
    if broken:
        return
    for conflict in stage_conflicts(modifiers, model):
        where = " and ".join(type(stage).__name__ for stage in conflict.stages)
        yield Finding("error", conflict.code, where, conflict.message)


def _alone(modifier: Modifier) -> Iterator[Finding]:
    name = type(modifier).__name__
    if isinstance(modifier, SliderQuantModifier):
        try:
            check_learning_stage(modifier, modifier.window_size, modifier.window_stride)
            yield from _own_target(modifier)
        except ValueError as error:
            yield Finding("error", "slider", name, str(error))
    elif isinstance(modifier, QuantizationMixin) and not modifier.has_config():
        yield Finding(
            "error",
            "no-number-format",
            name,
            f"{name} has no number format and would quantise nothing. Set scheme (such "
            "as W4A16) or config_groups.",
        )
    if isinstance(modifier, FAQModifier):
        yield from _faq_paths(modifier)


def _patterns(modifier: Modifier) -> Iterator[Finding]:
    if isinstance(modifier, QuantizationMixin):
        try:
            check_patterns(modifier)
        except ValueError as error:
            yield Finding("error", "pattern", type(modifier).__name__, str(error))


def _own_target(modifier: SliderQuantModifier) -> list[Finding]:
    """
    What the stage's field ``target`` asks for and vLLM does not serve.

    :raises ValueError: if there is no such target
    """
    if modifier.target is None:
        return []
    asked = find_target(modifier.target)
    found = servings(declared_groups([modifier]), [asked])
    return errors(serving_findings(found, asked))


def _faq_paths(modifier: FAQModifier) -> Iterator[Finding]:
    generator, seeds = modifier.generator, modifier.seeds
    if generator.startswith((".", "/", "~")):
        if not Path(generator).expanduser().is_dir():
            yield Finding(
                "error",
                "no-generator",
                "FAQModifier.generator",
                f"FAQModifier's generator {generator} is no folder. Give the folder or "
                "hub id of a larger model of the same family, or self.",
            )
    named = [seeds] if isinstance(seeds, str) else seeds or []
    for path in named:
        if path.endswith(SEED_SUFFIXES) and not Path(path).expanduser().is_file():
            yield Finding(
                "error",
                "no-seeds",
                "FAQModifier.seeds",
                f"FAQModifier's seeds name the file {path}, which does not exist. "
                "Correct the path, or leave seeds out for the package's own prompts.",
            )


def _together(modifiers: Sequence[Modifier]) -> Iterator[Finding]:
    try:
        Recipe.from_modifiers(list(modifiers))
    except ValidationError as error:
        reason = str(error.errors()[0].get("ctx", {}).get("error", error))
        yield Finding(
            "error",
            "upstream-order",
            "recipe",
            f"llm-compressor refuses the order of the stages: {reason}.",
        )
    seen: set[tuple[str | None, str]] = set()
    for index, modifier in enumerate(modifiers):
        name = type(modifier).__name__
        key = (modifier.group, name)
        if key in seen and modifier.group is not None:
            yield Finding(
                "warning",
                "same-group",
                f"{modifier.group}_modifiers.{name}",
                f"Two {name} stand in groups of one name, {modifier.group}_modifiers. "
                "llm-compressor writes only the last of them to recipe.yaml. Give the "
                "groups different names.",
            )
        seen.add(key)
        if isinstance(modifier, FAQModifier):
            yield from _faq_turn(modifiers, index)


def _faq_turn(modifiers: Sequence[Modifier], index: int) -> Iterator[Finding]:
    for earlier in filter(_calibrates, modifiers[:index]):
        yield Finding(
            "warning",
            "faq-late",
            "FAQModifier",
            f"{type(earlier).__name__} calibrates before FAQModifier has made data, so "
            "it uses oneshot's own data set and fails without one. Put FAQModifier "
            "first.",
        )
    if not any(map(_calibrates, modifiers[index + 1 :])):
        yield Finding(
            "warning",
            "faq-unused",
            "FAQModifier",
            "No stage after FAQModifier calibrates, so the data it makes is used by "
            "none. Put a stage such as SliderQuantModifier or GPTQModifier after it.",
        )


def _calibrates(modifier: Modifier) -> bool:
    return modifier.requires_calibration_data or isinstance(
        modifier, SliderQuantModifier
    )
