"""What a check of a recipe found: one clear sentence or two each."""

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

__all__ = ["Finding", "did_you_mean", "errors", "shown"]


@dataclass(frozen=True)
class Finding:
    """
    :param severity: ``error`` if the recipe would not run, or not do what it says
    :param code: stable name of the kind of finding
    :param where: place in the recipe or model, such as ``quant_stage.slider_modifiers``
    :param message: what is wrong, what was found and what to do
    """

    severity: Literal["error", "warning"]
    code: str
    where: str
    message: str


def errors(findings: Iterable[Finding]) -> list[Finding]:
    """The findings that stop a recipe."""
    return [finding for finding in findings if finding.severity == "error"]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A sentence with the nearest of ``known`` and a space before it, or nothing."""
    by_lower = {name.lower(): name for name in known}
    near = get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return f" Did you mean {by_lower[near[0]]}?" if near else ""


def shown(value: Any, length: int = 40) -> str:
    """A value of a recipe as a reader of YAML knows it, cut to ``length``."""
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    text = repr(value)
    return text if len(text) <= length else f"{text[: length - 3]}..."
