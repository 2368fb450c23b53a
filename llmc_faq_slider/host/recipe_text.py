"""Reads a recipe's YAML or JSON the way llm-compressor does, and says what it skips.

llm-compressor takes modifiers from mappings ``<name>_stage`` > ``<name>_modifiers`` >
``<Modifier>`` and silently ignores everything else.
"""

import json
import os
import re
from collections.abc import Collection, Hashable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from llmc_faq_slider.host.findings import Finding, did_you_mean, errors, shown

__all__ = ["Entry", "read_entries", "read_recipe"]

SUFFIXES = (".yaml", ".yml", ".json", ".md")
# Keys that recipes have had beside stages, and that hold no modifiers.
PLAIN_KEYS = ("args", "metadata", "version")


@dataclass(frozen=True)
class Entry:
    """One modifier as written: its name, its arguments and where it stands."""

    where: str
    group: str
    name: str
    arguments: dict[str, Any]


class _Loader(yaml.SafeLoader):
    """Safe loader that remembers keys written twice, of which YAML keeps the last."""

    def __init__(self, text: str):
        super().__init__(text)
        self.repeated: list[tuple[str, int]] = []

    def construct_mapping(
        self, node: yaml.MappingNode, deep: bool = False
    ) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen and key.value != "<<":
                    self.repeated.append((key.value, key.start_mark.line + 1))
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_recipe(recipe: str | os.PathLike[str]) -> tuple[Any, list[Finding]]:
    """
    The document of a recipe file, or of recipe text.

    :return: the parsed document, None if there is none, and what is wrong with it
    """
    text, where, findings = _text_of(recipe)
    if text is None:
        return None, findings
    document, findings = _parse(text, where)
    if findings and document is None:
        return None, findings
    if document is None:
        return None, [Finding("error", "empty", where, _empty_sentence(where))]
    if not isinstance(document, dict):
        if where == "recipe":
            sentence = (
                f"{shown(os.fspath(recipe))} is neither a recipe file that exists nor "
                "recipe text. Check the path."
            )
            return None, [Finding("error", "no-file", where, sentence)]
        sentence = (
            f"The recipe is {shown(document)}, not a mapping. Write stages as keys: "
            "quant_stage > quant_modifiers > the modifier's name."
        )
        return None, [Finding("error", "not-a-mapping", where, sentence)]
    return document, findings


def _text_of(recipe: str | os.PathLike[str]) -> tuple[str | None, str, list[Finding]]:
    name = os.fspath(recipe)
    try:
        is_file = os.path.isfile(name)
    except ValueError:
        # a null character
        is_file = False
    if is_file:
        try:
            text = Path(name).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            sentence = f"The recipe file {name} cannot be read as text: {error}."
            return None, name, [Finding("error", "unreadable", name, sentence)]
        if name.lower().endswith(".md"):
            front = re.search(r"^\s*(?:---|\+\+\+)(.*?)(?:---|\+\+\+)", text, re.S)
            text = front[1] if front else ""
        return text, name, []
    one_line = "\n" not in name
    if isinstance(recipe, Path) or (one_line and name.lower().endswith(SUFFIXES)):
        kind = "is a folder" if os.path.isdir(name) else "does not exist"
        sentence = f"The recipe file {name} {kind}.{_near_file(Path(name))}"
        return None, name, [Finding("error", "no-file", name, sentence)]
    return name, "recipe", []


def _near_file(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f" There is no folder {folder} either."
    names = [entry.name for entry in folder.iterdir() if entry.suffix in SUFFIXES]
    near = get_close_matches(path.name, names, n=1)
    return f" Did you mean {folder / near[0]}?" if near else " Check the path."


def _parse(text: str, where: str) -> tuple[Any, list[Finding]]:
    try:
        if where.lower().endswith(".json"):
            return json.loads(text), []
        loader = _Loader(text)
        document = loader.get_single_data()
    except Exception as error:  # whatever the parsers raise is about the text
        return None, [Finding("error", "not-yaml", where, _parse_sentence(error))]
    repeated = [
        Finding(
            "error",
            "repeated-key",
            where,
            f"The key {key!r} on line {line} stands twice in one mapping; only the "
            "last counts. Rename or remove one; two modifiers of one kind go into two "
            "groups.",
        )
        for key, line in loader.repeated
    ]
    return document, repeated


def _parse_sentence(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return (
            f"The recipe is not JSON: {error.msg} on line {error.lineno}, column "
            f"{error.colno}. Correct it there."
        )
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark, problem = error.problem_mark, error.problem or "the text breaks off"
        if "tag:yaml.org,2002:python" in problem:
            problem = "it holds a Python object, and recipes hold plain values only"
        return (
            f"The recipe is not YAML that loads: {problem}, on line {mark.line + 1}, "
            f"column {mark.column + 1}. Correct it there."
        )
    detail = " ".join(str(error).split()) or type(error).__name__
    return f"The recipe is not YAML that loads: {detail}. Correct the text."


def _empty_sentence(where: str) -> str:
    return (
        f"The recipe {'file ' if where != 'recipe' else ''}is empty. Write stages as "
        "keys: quant_stage > quant_modifiers > the modifier's name."
    )


def read_entries(
    document: dict[Any, Any], known: Collection[str]
) -> tuple[list[Entry], list[Finding]]:
    """
    The modifiers that llm-compressor would take from a recipe, and what it would skip.

    :param known: names of the modifiers there are
    """
    entries: list[Entry] = []
    findings: list[Finding] = []
    for key, value in document.items():
        if not isinstance(key, str):
            findings.append(_not_text(key, "recipe"))
        elif not key.endswith("_stage"):
            findings.append(_no_stage(key, value, known))
        elif not isinstance(value, dict) or not value:
            sentence = (
                f"The stage {key} is {shown(value) if value != {} else 'empty'}, and "
                "llm-compressor skips it silently. Put a group such as quant_modifiers "
                "under it."
            )
            findings.append(Finding("error", "empty-stage", key, sentence))
        else:
            for found in _groups(key, value, known):
                (entries if isinstance(found, Entry) else findings).append(found)  # type: ignore[arg-type]
    if not entries and not errors(findings):
        sentence = (
            "The recipe has no modifier, so nothing would be quantised. Write "
            "quant_stage > quant_modifiers > SliderQuantModifier."
        )
        findings.append(Finding("error", "no-modifier", "recipe", sentence))
    return entries, findings


def _no_stage(key: str, value: Any, known: Collection[str]) -> Finding:
    if key in PLAIN_KEYS or not isinstance(value, dict | list):
        sentence = (
            f"The key {key} is {shown(value)} and has no effect: llm-compressor reads "
            "keys that end in _stage. Remove it."
        )
        return Finding("warning", "ignored-key", key, sentence)
    if key in known:
        advice = f"Put it under quant_stage > quant_modifiers > {key}."
    elif key == "modifiers" or key.endswith("_modifiers"):
        name = key if key.endswith("_modifiers") else "quant_modifiers"
        advice = f"Put it under a stage: quant_stage > {name}."
    elif key == "stages":
        advice = "Make each stage a key of its own that ends in _stage."
    else:
        advice = f"Rename it {_renamed(key, 'stage')}."
    sentence = (
        f"The key {key} does not end in _stage, and llm-compressor skips it silently. "
        f"{advice}"
    )
    return Finding("error", "stage-key", key, sentence)


def _renamed(key: str, ending: str) -> str:
    """``quant_stgae`` and ``quant`` become ``quant_stage``."""
    number = re.fullmatch(rf"(.*)_{ending}_(\d+)", key)
    if number:
        return f"{number[1]}_{number[2]}_{ending}"
    head, _, tail = key.rpartition("_")
    if not head:
        head, tail = key, ""
    misspelt = get_close_matches(tail.lower(), [ending], n=1, cutoff=0.5)
    return f"{head if misspelt else key.rstrip('_')}_{ending}"


def _not_text(key: Any, where: str) -> Finding:
    sentence = (
        f"The key {key!r} is not text, and llm-compressor stops on it. Use a name that "
        "starts with a letter."
    )
    return Finding("error", "key-type", where, sentence)


def _groups(
    stage: str, groups: dict[Any, Any], known: Collection[str]
) -> Iterator[Entry | Finding]:
    for key, value in groups.items():
        where = f"{stage}.{key}"
        if not isinstance(key, str):
            yield _not_text(key, stage)
        elif not key.endswith("_modifiers"):
            advice = f"Rename it {_renamed(key, 'modifiers')}."
            if key in known:
                advice = f"Put it under a group: {stage} > quant_modifiers > {key}."
            elif key == "modifiers":
                advice = "Rename it quant_modifiers."
            yield Finding(
                "error",
                "group-key",
                where,
                f"The key {key} in {stage} does not end in _modifiers, and "
                f"llm-compressor skips it silently. {advice}",
            )
        elif not isinstance(value, dict) or not value:
            yield Finding(
                "error",
                "empty-group",
                where,
                f"The group {where} is {shown(value) if value != {} else 'empty'}, and "
                "llm-compressor skips it silently. Put modifiers under it as a "
                "mapping: SliderQuantModifier: {scheme: W4A16}.",
            )
        else:
            yield from _modifiers(where, key, value, known)


def _modifiers(
    where: str, group: str, modifiers: dict[Any, Any], known: Collection[str]
) -> Iterator[Entry | Finding]:
    for name, arguments in modifiers.items():
        place = f"{where}.{name}"
        if not isinstance(name, str):
            yield _not_text(name, where)
        elif name not in known:
            yield Finding(
                "error",
                "unknown-modifier",
                place,
                f"There is no modifier {name}.{did_you_mean(name, known)} Check its "
                "spelling; a modifier of another package needs that package imported.",
            )
        elif arguments is None:
            yield Finding(
                "error",
                "null-arguments",
                place,
                f"{name} has nothing after its colon. Write {{}} for no arguments: "
                f"{name}: {{}}.",
            )
        elif not isinstance(arguments, dict):
            yield Finding(
                "error",
                "arguments-type",
                place,
                f"The arguments of {name} are {shown(arguments)}, not a mapping. Write "
                "them as field: value.",
            )
        elif not all(isinstance(field, str) for field in arguments):
            field = next(f for f in arguments if not isinstance(f, str))
            yield _not_text(field, place)
        elif "group" in arguments:
            yield Finding(
                "error",
                "group-argument",
                f"{place}.group",
                f"{name} has the argument group, which llm-compressor sets itself, "
                f"from {group}. Remove it.",
            )
        else:
            yield Entry(place, group.removesuffix("_modifiers"), name, arguments)
