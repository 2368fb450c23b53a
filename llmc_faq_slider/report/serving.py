"""Which vLLM kernel takes a config group, and what it computes: a table and its rules.

The table is ``vllm_kernels.yaml``. Nothing here imports vLLM. A config group is a plain
mapping of ``weights``, ``inputs``, ``outputs`` and ``format``, with the field names of
compressed-tensors; ``host.declared`` makes it from a recipe.
"""

import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import torch
import yaml

__all__ = [
    "Layer",
    "Serving",
    "Target",
    "describe",
    "find_target",
    "input_precision",
    "known_targets",
    "load_table",
    "serve",
    "serve_experts",
    "this_cpu",
]

Group = Mapping[str, Any]
Verdict = Literal[
    "as declared", "otherwise", "needs a flag", "not served", "not in the table"
]

OLDEST_CAPABILITY = 80


@dataclass(frozen=True)
class Target:
    """
    Hardware for vLLM.

    :param capability: 10 times NVIDIA's, None on a CPU
    :param isa: what decides on a CPU, ``avx2``, ``avx512`` or ``amx``
    """

    name: str
    platform: str
    hardware: str
    capability: int | None = None
    isa: str | None = None


@dataclass(frozen=True)
class Layer:
    """Input and output size of a linear as vLLM holds it, q, k, v being one."""

    name: str
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Serving:
    """What becomes of a config group on one target.

    :param computes: precision of the inputs in the matrix product
    :param why: why it is not served, or not in the table
    :param flag: option of ``vllm serve``, or environment variable, with which vLLM
        computes what was declared
    :param since: oldest vLLM release known to do this
    :param evidence: ``asked``, ``run`` or ``source``, as in the table
    """

    target: Target
    verdict: Verdict
    scheme: str | None = None
    kernel: str | None = None
    computes: str | None = None
    why: str | None = None
    flag: str | None = None
    note: str | None = None
    since: str | None = None
    evidence: str | None = None
    source: str | None = None

    @property
    def served(self) -> bool:
        return self.verdict in ("as declared", "otherwise", "needs a flag")


@cache
def load_table() -> dict[str, Any]:
    """The table as read from ``vllm_kernels.yaml``."""
    text = files(__package__).joinpath("vllm_kernels.yaml").read_text("utf-8")
    table: dict[str, Any] = yaml.safe_load(text)
    return table


def known_targets() -> list[Target]:
    """The targets that stand in the table, in its order."""
    return [Target(name, **row) for name, row in load_table()["targets"].items()]


def find_target(name: str) -> Target:
    """
    :param name: a target of the table, ``cpu`` for the CPU of this machine, or smNN for
        an NVIDIA compute capability
    :raises ValueError: if there is no such target
    """
    if name == "cpu":
        return this_cpu()
    known = {target.name: target for target in known_targets()}
    if name in known:
        return known[name]
    number = re.fullmatch(r"sm_?(\d{2,3})a?", name.lower())
    if number and int(number[1]) >= OLDEST_CAPABILITY:
        capability = int(number[1])
        hardware = f"compute capability {capability // 10}.{capability % 10}"
        return known.get(f"sm{capability}") or Target(
            f"sm{capability}", "cuda", hardware, capability
        )
    near = get_close_matches(name.lower(), known, n=1)
    raise ValueError(
        f"The target {name!r} is not known."
        + (f" Did you mean {near[0]}?" if near else "")
        + f" Give one of cpu, {', '.join(known)}, or sm and the compute capability of "
        f"another NVIDIA GPU, sm{OLDEST_CAPABILITY} or later."
    )


def this_cpu() -> Target:
    """
    This machine's CPU, by the questions with which vLLM chooses its library.

    :raises ValueError: if the table has no rows for it
    """
    for name, question in (
        ("cpu-amx", "_is_amx_tile_supported"),
        ("cpu-avx512", "_is_avx512_supported"),
        ("cpu-avx2", "_is_avx2_supported"),
    ):
        supported = getattr(torch.cpu, question, None)
        if supported is not None and supported():
            return find_target(name)
    raise ValueError(
        "The target cpu is the CPU of this machine, and PyTorch finds none of AMX, "
        f"AVX-512 and AVX2 in it ({platform.machine()}). Name the CPU that will serve: "
        "cpu-avx2, cpu-avx512 or cpu-amx."
    )


def serve(group: Group, target: Target, layer: Layer | None = None) -> Serving:
    """
    What vLLM does with a config group on a target.

    :param layer: sizes to look at; without them every size is taken to fit
    """
    scheme = next(
        (
            row
            for row in load_table()["schemes"]
            if _where(row, target) and unmet(_conditions(row), group) is None
        ),
        None,
    )
    if scheme is None:
        why = f"vLLM has no scheme for {describe(group)} there."
        return Serving(target, "not served", why=why)
    name = scheme["scheme"]
    if name == "outside":
        return Serving(target, "not in the table", why=scheme["why"])
    for need in scheme.get("needs", ()):
        if unmet(_conditions(need), group):
            return Serving(target, "not served", name, why=need["why"])

    usable: dict[str, dict[str, Any]] = {}
    reasons = []
    for row in _kernels(name, target):
        reason = unmet(_conditions(row), group) or _misfit(row, layer)
        if reason is None:
            usable.setdefault(row["kernel"], row)
        else:
            reasons.append(f"{row['kernel']}: {reason}")
    if not usable:
        detail = f" ({'; '.join(dict.fromkeys(reasons))})" if reasons else ""
        why = f"vLLM has no kernel of {name} there{detail}."
        return Serving(target, "not served", name, why=why)
    return _verdict(group, target, scheme, list(usable.values()))


def _verdict(
    group: Group, target: Target, scheme: dict[str, Any], usable: list[dict[str, Any]]
) -> Serving:
    """The first usable kernel, and a flag for one that computes what was declared."""
    declared = input_precision(group["inputs"])
    first = usable[0]
    works = [row for row in usable if "broken" not in row]
    exact = next((row for row in works if _computes(row, group) == declared), None)
    flag = exact.get("flag") if exact is not None and exact is not first else None
    facts = Serving(
        target,
        "not served",
        scheme["scheme"],
        first["kernel"],
        flag=flag,
        note=" ".join(n for n in (scheme.get("note"), first.get("note")) if n) or None,
        since=max(scheme["since"], first["since"], key=_release),
        evidence=first["evidence"],
        source=first["source"],
    )
    if "broken" in first:
        verdict: Verdict = "needs a flag" if flag else "not served"
        return replace(facts, verdict=verdict, why=first["broken"])
    computes = _computes(first, group)
    verdict = "as declared" if computes == declared else "otherwise"
    return replace(facts, verdict=verdict, computes=computes)


def serve_experts(group: Group, target: Target, layer: Layer | None = None) -> Serving:
    """The same for the linears inside the experts of a mixture of experts."""
    for row in load_table()["moe"]:
        if not _where(row, target) or unmet(_conditions(row), group):
            continue
        found = Serving(
            target,
            "not served",
            kernel=row.get("kernel"),
            why=row.get("unserved"),
            evidence=row["evidence"],
            source=row["source"],
        )
        if found.why:
            return found
        misfit = _misfit(row, layer)
        if misfit is not None:
            return replace(found, why=f"{row['kernel']}: {misfit}.")
        computes = _computes(row, group)
        exact = computes == input_precision(group["inputs"])
        return replace(
            found, verdict="as declared" if exact else "otherwise", computes=computes
        )
    why = f"vLLM has no method for experts with {describe(group)} there."
    return Serving(target, "not served", why=why)


def describe(group: Group) -> str:
    """Such as ``int4 weights per channel, int8 inputs per token, pack-quantized``."""
    weights = group["weights"]
    if weights is None:
        text = "16-bit weights"
    else:
        kind = "FP" if weights["type"] == "float" else "int"
        spread = (
            f"in groups of {weights['group_size']}"
            if weights["strategy"] == "group"
            else f"per {weights['strategy']}"
        )
        points = "" if weights["symmetric"] else " with zero points"
        text = f"{kind}{weights['num_bits']} weights{points} {spread}"
    inputs = input_precision(group["inputs"])
    head, _, tail = inputs.partition(" per ")
    inputs = f"{head} inputs per {tail}" if tail else "16-bit inputs"
    return f"{text}, {inputs}, {group['format']}"


def input_precision(inputs: Mapping[str, Any] | None) -> str:
    """Such as ``16 bit``, ``int8 per token`` or ``int8 per token with zero point``."""
    if inputs is None:
        return "16 bit"
    kind = "FP" if inputs["type"] == "float" else "int"
    text = f"{kind}{inputs['num_bits']} per {inputs['strategy']}"
    if not inputs["symmetric"]:
        text += " with zero point"
    return text if inputs["dynamic"] else f"{text}, static"


def unmet(condition: Any, value: Any, name: str = "") -> str | None:
    """
    What of a condition of the table a value does not meet, in words, or None.

    :param condition: a value; a list of which one must hold; a mapping of conditions
        on the fields of ``value``; ``{min, max}`` or ``{multiple}`` for a number
    """
    if isinstance(condition, list):
        reasons = [unmet(choice, value, name) for choice in condition]
        if None in reasons:
            return None
        if any(isinstance(choice, Mapping) for choice in condition):
            return reasons[0]
        choices = " or ".join(_word(choice) for choice in condition)
        return f"{name} is {_word(value)}, it takes {choices}"
    if isinstance(condition, Mapping):
        if condition and condition.keys() <= {"min", "max"}:
            low, high = condition.get("min", value), condition.get("max", value)
            in_range = value is not None and low <= value <= high
            return None if in_range else f"{name} is {value}"
        if condition.keys() == {"multiple"}:
            multiple = condition["multiple"]
            fits = value is not None and value % multiple == 0
            found = f"{name} is {_word(value)}, it takes multiples of {multiple}"
            return None if fits else found
        if value is None:
            return f"{name} are not quantised"
        for key, part in condition.items():
            reason = unmet(part, value.get(key), f"{name}.{key}" if name else key)
            if reason is not None:
                return reason
        return None
    if condition == value:
        return None
    if condition is None and name in ("inputs", "outputs"):
        return f"{name} are quantised"
    return f"{name} is {_word(value)}, it takes {_word(condition)}"


def _word(value: Any) -> str:
    if value is None:
        return "per channel"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _conditions(row: Mapping[str, Any]) -> dict[str, Any]:
    parts = ("weights", "inputs", "outputs", "format")
    return {part: row[part] for part in parts if part in row}


def _where(row: Mapping[str, Any], target: Target) -> bool:
    condition = row.get("where")
    facts = {
        "platform": target.platform,
        "capability": target.capability,
        "isa": target.isa,
    }
    return condition is None or unmet(condition, facts) is None


def _kernels(scheme: str, target: Target) -> Iterator[dict[str, Any]]:
    for row in load_table()["kernels"]:
        if scheme in row["schemes"] and _where(row, target):
            yield row


def _misfit(row: Mapping[str, Any], layer: Layer | None) -> str | None:
    if layer is None:
        return None
    sizes = {"inputs": layer.inputs, "outputs": layer.outputs}
    for side, multiple in row.get("multiples", {}).items():
        if sizes[side] % multiple:
            return (
                f"{side[:-1]} size is {sizes[side]}, it takes multiples of {multiple}"
            )
    return None


def _computes(row: Mapping[str, Any], group: Group) -> str:
    computes: str = row["computes"]
    return input_precision(group["inputs"]) if computes == "declared" else computes


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))
