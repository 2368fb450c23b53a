"""Looks a recipe's config groups up in the table of what vLLM serves."""

from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from itertools import combinations
from typing import Any, NamedTuple

from llmcompressor.modifiers.quantization.quantization import QuantizationMixin
from loguru import logger

from llmc_faq_slider.host.declared import DeclaredGroup, declared_groups
from llmc_faq_slider.host.findings import Finding
from llmc_faq_slider.report.serving import (
    Layer,
    Serving,
    Target,
    describe,
    find_target,
    input_precision,
    known_targets,
    serve,
    serve_experts,
)

__all__ = ["Served", "check_serving", "remedy", "serving_findings", "servings"]


class Served(NamedTuple):
    """
    What becomes of a config group on one target, and of which of its layers.

    :param layers: the layers that this holds for, empty without a model
    :param experts: they are inside a mixture of experts
    """

    declared: DeclaredGroup
    serving: Serving
    layers: tuple[Layer, ...] = ()
    experts: bool = False


class Edit(NamedTuple):
    """A change to a config group, in the words of a recipe."""

    text: str
    fields: Mapping[str, Any]


def _set(path: str, value: Any) -> Edit:
    part, _, field = path.rpartition(".")
    name = f"input_activations.{field}" if part == "inputs" else path
    shown = str(value).lower() if isinstance(value, bool) else value
    return Edit(f"set {name}: {shown}", {path: value})


INT8_INPUTS: dict[str, Any] = {
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "strategy": "token",
    "dynamic": True,
    "group_size": None,
}
EDITS = (
    _set("format", "pack-quantized"),
    _set("format", "int-quantized"),
    _set("weights.symmetric", True),
    *(
        Edit(
            f"set weights.group_size: {size}",
            {"weights.strategy": "group", "weights.group_size": size},
        )
        for size in (128, 64, 32)
    ),
    Edit(
        "set weights.strategy: channel",
        {"weights.strategy": "channel", "weights.group_size": None},
    ),
    Edit(
        "set input_activations.strategy: token and dynamic: true",
        {"inputs.strategy": "token", "inputs.dynamic": True},
    ),
    _set("inputs.symmetric", True),
    _set("inputs.symmetric", False),
    _set("inputs.type", "float"),
    _set("inputs.type", "int"),
    _set("inputs.num_bits", 8),
    Edit("leave input_activations out", {"inputs": None}),
    _set("weights.num_bits", 4),
    _set("weights.num_bits", 8),
    Edit(
        "set input_activations: {num_bits: 8, type: int, symmetric: false, "
        "strategy: token, dynamic: true}",
        {"inputs": INT8_INPUTS | {"symmetric": False}},
    ),
)
#: tried last: served on every CPU
W8A8 = Edit(
    "set scheme: W8A8",
    {
        "weights.type": "int",
        "weights.num_bits": 8,
        "weights.strategy": "channel",
        "weights.group_size": None,
        "weights.symmetric": True,
        "inputs": INT8_INPUTS,
        "format": "int-quantized",
    },
)


def servings(
    groups: Iterable[DeclaredGroup], targets: Iterable[Target]
) -> Iterator[Served]:
    """Every group on every target, without a model: all sizes are taken to fit."""
    targets = list(targets)
    for declared in groups:
        for target in targets:
            yield Served(declared, serve(declared.group, target))


def remedy(one: Served, keep_inputs: bool = False) -> str | None:
    """
    The smallest change to a group with which its target serves it as declared.

    :param keep_inputs: leave quantised inputs quantised
    """
    group, target = one.declared.group, one.serving.target
    look = serve_experts if one.experts else serve
    looked_at: list[Layer | None] = [*one.layers] or [None]
    edits = [edit for edit in EDITS if not (keep_inputs and "inputs" in edit.fields)]
    changes = [(edit, _edited(group, edit)) for edit in edits]
    singles = [(edit.text, new) for edit, new in changes if new is not None]
    pairs = [
        (f"{one.text} and {other.text}", after_both)
        for (one, after_one), (other, _) in combinations(changes, 2)
        if after_one is not None
        and not one.fields.keys() & other.fields.keys()
        and (after_both := _edited(after_one, other)) is not None
    ]
    last = None if keep_inputs else _edited(group, W8A8)
    recast = [] if last is None else [(W8A8.text, last)]
    for text, changed in [*singles, *pairs, *recast]:
        if all(
            look(changed, target, layer).verdict == "as declared" for layer in looked_at
        ) and _divides(changed, one.layers):
            return text
    return None


def _edited(group: Mapping[str, Any], edit: Edit) -> dict[str, Any] | None:
    """The group after an edit, None if that changes nothing or cannot be made."""
    changed = deepcopy(dict(group))
    for path, value in edit.fields.items():
        part, _, field = path.partition(".")
        if not field:
            changed[part] = value
        elif changed[part] is None:
            return None
        else:
            changed[part][field] = value
    return changed if changed != group else None


def _divides(group: Mapping[str, Any], layers: Iterable[Layer]) -> bool:
    size = group["weights"]["group_size"]
    return size is None or all(layer.inputs % size == 0 for layer in layers)


def serving_findings(
    served: Iterable[Served], asked: Target | None
) -> Iterator[Finding]:
    """
    One finding per group and way of being served.

    :param asked: the target that has to serve every group; None if any may
    """
    by_group: dict[int, list[Served]] = {}
    for one in served:
        by_group.setdefault(id(one.declared), []).append(one)
    for group in by_group.values():
        yield from _group_findings(group, asked)


def _group_findings(group: list[Served], asked: Target | None) -> Iterator[Finding]:
    declared = group[0].declared
    label = declared.label
    names = list(dict.fromkeys(one.serving.target.name for one in group))
    unserved = [one for one in group if one.serving.verdict == "not served"]
    lost = list(dict.fromkeys(one.serving.target.name for one in unserved))
    if asked is not None or lost == names:
        for why, some in _by_reason(unserved).items():
            yield Finding("error", "not-served", label, _unserved_sentence(why, some))
    elif lost:
        yield Finding(
            "warning",
            "not-served-somewhere",
            label,
            f"{label} ({describe(declared.group)}) is not served on "
            f"{', '.join(lost)}; --target shows why and what to change.",
        )
    for verdict, code in (("needs a flag", "needs-flag"), ("otherwise", "otherwise")):
        some = [one for one in group if one.serving.verdict == verdict]
        for alike in _alike(some):
            yield Finding("warning", code, label, _otherwise_sentence(alike))
    outside = [one for one in group if one.serving.verdict == "not in the table"]
    if outside:
        yield Finding(
            "warning",
            "not-in-table",
            label,
            f"Whether vLLM serves {label} ({describe(declared.group)}) is not known "
            f"here. {outside[0].serving.why} Try a small model first.",
        )


def _by_reason(unserved: list[Served]) -> dict[str, list[Served]]:
    reasons: dict[str, list[Served]] = {}
    for one in unserved:
        assert one.serving.why is not None
        reasons.setdefault(one.serving.why, []).append(one)
    return reasons


def _unserved_sentence(why: str, group: list[Served]) -> str:
    declared = group[0].declared
    targets = ", ".join(dict.fromkeys(one.serving.target.name for one in group))
    change = remedy(group[0])
    layers = ", ".join(layer.name for layer in group[0].layers)
    targets += f" ({layers})" if layers else ""
    advice = f"To have it served, {change}." if change else "Use another scheme."
    return f"{declared.label} is not served on {targets}: {why} {advice}"


def _alike(group: list[Served]) -> Iterator[list[Served]]:
    """Targets about which the same is to be said."""
    alike: dict[tuple[Any, ...], list[Served]] = {}
    for one in group:
        serving = one.serving
        key = (serving.verdict, serving.computes, serving.flag, serving.note)
        alike.setdefault((*key, _advice(one)), []).append(one)
    yield from alike.values()


def _otherwise_sentence(alike: list[Served]) -> str:
    declared, serving = alike[0].declared, alike[0].serving
    targets = ", ".join(dict.fromkeys(one.serving.target.name for one in alike))
    kernels = " or ".join(dict.fromkeys(str(one.serving.kernel) for one in alike))
    if serving.verdict == "needs a flag":
        text = f"{declared.label} on {targets}: {serving.why}"
    else:
        asked = input_precision(declared.group["inputs"])
        text = (
            f"{declared.label} on {targets}: {kernels} computes with inputs of "
            f"{serving.computes}, not of {asked} as declared."
        )
    return " ".join(part for part in (text, serving.note, _advice(alike[0])) if part)


def _advice(one: Served) -> str:
    """What to do about a group that is served, but not as declared."""
    serving = one.serving
    if serving.flag:
        return f"Serve with {serving.flag} for what is declared."
    change = remedy(one, keep_inputs=True)
    if change:
        return f"For quantised inputs, {change}."
    if serving.computes == "16 bit":
        return "Without input_activations the recipe says what is computed."
    return ""


def check_serving(stage: QuantizationMixin, target: str | None) -> None:
    """
    Look a stage's config groups up before it starts.

    A group that no known kernel serves as declared is worth a warning.

    :param target: hardware that has to serve every group, None for any
    :raises ValueError: if ``target`` is not known or does not serve a group
    """
    asked = None if target is None else find_target(target)
    targets = known_targets() if asked is None else [asked]
    for declared in declared_groups([stage]):
        found = list(servings([declared], targets))
        if asked is not None:
            for finding in serving_findings(found, asked):
                if finding.severity == "error":
                    raise ValueError(finding.message)
                logger.warning(finding.message)
        elif not any(
            one.serving.verdict in ("as declared", "not in the table")
            or one.serving.flag
            for one in found
        ):
            logger.warning(
                f"{declared.label} ({describe(declared.group)}): no vLLM kernel that "
                "is known here serves it as declared. llmc-faq-slider check shows what "
                "becomes of it and what to change."
            )
