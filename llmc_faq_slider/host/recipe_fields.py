"""Makes modifiers of a recipe's entries, and words for what is wrong with their fields.

Private upstream API: ``ModifierFactory``'s registries ``_main_registry``,
``_registered_registry``, ``_experimental_registry``, and ``_loaded``.
"""

import copy
import re
import warnings
from collections.abc import Iterator
from typing import Any

from compressed_tensors import quantization
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from llmcompressor.modifiers import Modifier, ModifierFactory
from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError
from pydantic_core import ErrorDetails

from llmc_faq_slider.host.findings import Finding, did_you_mean, shown
from llmc_faq_slider.host.recipe_text import Entry
from llmc_faq_slider.removed import removed_in

__all__ = ["build_modifier", "known_modifiers"]

#: what pydantic asks for, by its name of the error, in our words
EXPECTED = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "float_parsing": "a number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "list_type": "a list",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "none_required": "left out",
    "string_type": "text",
}
BOUNDS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}


def known_modifiers() -> dict[str, type[Modifier]]:
    """Classes that a recipe can name, by name; registered ones come first."""
    if not ModifierFactory._loaded:
        ModifierFactory.refresh()
    known: dict[str, type[Modifier]] = {
        **ModifierFactory._main_registry,
        **ModifierFactory._experimental_registry,
        **ModifierFactory._registered_registry,
    }
    return known


def build_modifier(entry: Entry) -> tuple[Modifier | None, list[Finding]]:
    """The modifier of an entry, or None and why it cannot be made."""
    kind = known_modifiers()[entry.name]
    findings = _removed(entry) + _unknown_fields(kind, entry) + _unknown_scheme(entry)
    if findings:
        return None, findings
    # Validators of llm-compressor change the mappings they are given.
    arguments = copy.deepcopy(entry.arguments)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return kind(group=entry.group, **arguments), []
    except ValidationError as error:
        return None, _field_findings(entry, error)
    except Exception as error:  # validators raise what they like on wrong types
        findings = _wrong_types(entry)
        if findings:
            return None, findings
        detail = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        sentence = (
            f"{entry.name} cannot be made of these arguments: {detail}. Check the "
            "types and spelling of its values."
        )
        return None, [Finding("error", "arguments", entry.where, sentence)]


def _removed(entry: Entry) -> list[Finding]:
    return [
        Finding("error", "removed", f"{entry.where}.{name}", sentence)
        for name, sentence in removed_in(entry.name, entry.arguments).items()
    ]


def _unknown_fields(kind: type[Modifier], entry: Entry) -> list[Finding]:
    fields = [name for name in kind.model_fields if not name.endswith("_")]
    return [
        Finding(
            "error",
            "unknown-field",
            f"{entry.where}.{name}",
            f"{entry.name} has no field {name}.{did_you_mean(name, fields)} Correct or "
            "remove it.",
        )
        for name in entry.arguments
        if name not in kind.model_fields
        and name not in removed_in(entry.name, entry.arguments)
    ]


def _unknown_scheme(entry: Entry) -> list[Finding]:
    scheme = entry.arguments.get("scheme")
    if isinstance(scheme, str):
        names = [scheme]
    elif isinstance(scheme, dict):
        names = [name for name in scheme if isinstance(name, str)]
    else:
        names = []
    return [
        Finding(
            "error",
            "unknown-scheme",
            f"{entry.where}.scheme",
            f"There is no scheme {name!r}.{did_you_mean(name, PRESET_SCHEMES)} Use one "
            "of compressed-tensors' names, such as W4A16, or config_groups.",
        )
        for name in names
        if name.upper() not in PRESET_SCHEMES
    ]


def _wrong_types(entry: Entry) -> list[Finding]:
    """Number formats with a value of the wrong type, on which validators stumble."""
    findings = []
    for place, arguments in _number_formats(entry.arguments):
        for name, value in arguments.items():
            if name not in QuantizationArgs.model_fields:
                continue
            kind: Any = QuantizationArgs.model_fields[name].annotation
            try:
                TypeAdapter(kind).validate_python(value)
            except ValidationError as error:
                findings.append(_finding(entry, (*place, name), error.errors()))
            except PydanticSchemaGenerationError:
                continue  # a torch dtype
    return findings


def _number_formats(
    arguments: dict[str, Any],
) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    groups = arguments.get("config_groups")
    for name, group in groups.items() if isinstance(groups, dict) else ():
        for part in ("weights", "input_activations", "output_activations"):
            if isinstance(group, dict) and isinstance(group.get(part), dict):
                yield ("config_groups", str(name), part), group[part]
    if isinstance(arguments.get("kv_cache_scheme"), dict):
        yield ("kv_cache_scheme",), arguments["kv_cache_scheme"]


def _field_findings(entry: Entry, error: ValidationError) -> list[Finding]:
    """One finding per field; alternatives of a union become one sentence."""
    by_field: dict[tuple[Any, ...], list[ErrorDetails]] = {}
    for detail in error.errors():
        by_field.setdefault(_field(entry.arguments, detail), []).append(detail)
    return [_finding(entry, field, details) for field, details in by_field.items()]


def _field(arguments: Any, detail: ErrorDetails) -> tuple[Any, ...]:
    """The error's place without the type names that pydantic adds for unions."""
    place: list[Any] = []
    value = arguments
    for part in detail["loc"]:
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
        elif detail["type"] == "missing" and part == detail["loc"][-1]:
            pass
        else:
            continue
        place.append(part)
    return tuple(place)


def _finding(
    entry: Entry, field: tuple[Any, ...], details: list[ErrorDetails]
) -> Finding:
    name = ".".join(str(part) for part in field)
    where = f"{entry.where}.{name}" if name else entry.where
    first = details[0]
    if first["type"] == "extra_forbidden":
        sentence = f"{entry.name} has no field {name}."
        sentence += _similar_nested(str(field[-1])) + " Correct or remove it."
        return Finding("error", "unknown-field", where, sentence)
    if first["type"] == "missing":
        sentence = f"{entry.name} needs the field {name}. Add it."
        return Finding("error", "missing-field", where, sentence)
    if all(detail["type"] in ("value_error", "assertion_error") for detail in details):
        reason = " ".join(_reason(first).split()).rstrip(".")
        choice = re.fullmatch(r"'(.*)' is not a valid (\w+)", reason)
        if choice and name:
            sentence = (
                f"{entry.name}'s {name} is {choice[1]!r}; it must be "
                f"{_choices(choice[2])}.{did_you_mean(choice[1], _names(choice[2]))} "
                "Correct it."
            )
            return Finding("error", "unknown-value", where, sentence)
        subject = f"{entry.name}'s {name}" if name else entry.name
        sentence = f"{subject} cannot be used: {reason}. Correct it."
        return Finding("error", "value", where, sentence)
    expected = list(dict.fromkeys(_expectation(detail) for detail in details))
    code = "out-of-range" if first["type"] in BOUNDS else "wrong-type"
    if first["type"] in ("literal_error", "enum"):
        code = "unknown-value"
    sentence = (
        f"{entry.name}'s {name} is {shown(first['input'])}; it must be "
        f"{' or '.join(expected)}. Correct it."
    )
    return Finding("error", code, where, sentence)


def _names(enum: str) -> list[str]:
    """Values of one of compressed-tensors' enums."""
    kind = getattr(quantization, enum, None)
    return [str(member.value) for member in kind] if kind is not None else []


def _choices(enum: str) -> str:
    return " or ".join(_names(enum)) or f"one of {enum}"


def _reason(detail: ErrorDetails) -> str:
    return str(detail.get("ctx", {}).get("error") or detail["msg"])


def _expectation(detail: ErrorDetails) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in BOUNDS:
        limit, word = BOUNDS[kind]
        return f"{word} {context[limit]}"
    if kind in ("literal_error", "enum"):
        return str(context["expected"]).replace("'", "")
    if kind == "string_too_short":
        return f"text of at least {context['min_length']} characters"
    if kind in ("value_error", "assertion_error"):
        return _reason(detail).rstrip(".")
    return EXPECTED.get(kind, detail["msg"].removeprefix("Input should be ").lower())


def _similar_nested(name: str) -> str:
    return did_you_mean(
        name, [*QuantizationArgs.model_fields, *QuantizationScheme.model_fields]
    )
