"""What a recipe asks of vLLM beside number formats: rotations and the KV cache."""

from collections.abc import Iterator, Sequence
from typing import Any

from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.quantization.quantization import QuantizationMixin

from llmc_faq_slider.host.findings import Finding
from llmc_faq_slider.report.serving import Target, load_table

__all__ = ["other_findings"]


def other_findings(
    modifiers: Sequence[Modifier], asked: Target | None
) -> Iterator[Finding]:
    """
    Rotations that are computed while serving, and formats of the KV cache.

    :param asked: the target that has to serve the checkpoint, None for any
    """
    for modifier in modifiers:
        name = type(modifier).__name__
        if isinstance(modifier, QuantizationMixin) and modifier.kv_cache_scheme:
            yield from _kv_cache(name, modifier.kv_cache_scheme)
        rotations = set(getattr(modifier, "rotations", ()))
        for row in load_table()["rotations"]:
            online = sorted(rotations & set(row["rotations"]))
            if name != row["modifier"] or not online:
                continue
            on_cpu = asked is not None and asked.platform == "cpu"
            stops = on_cpu and not row["cpu"]
            yield Finding(
                "error" if stops else "warning",
                "rotation",
                f"{name}.rotations",
                f"{name}'s {', '.join(online)}: {row['what']} {row['change']}",
            )


def _kv_cache(name: str, scheme: Any) -> Iterator[Finding]:
    row = load_table()["kv_cache"]
    found = {field: getattr(scheme, field) for field in row["takes"]}
    found = {field: getattr(value, "value", value) for field, value in found.items()}
    wrong = [
        field for field, value in found.items() if value not in row["takes"][field]
    ]
    if wrong:
        shown = ", ".join(f"{field} {str(found[field]).lower()}" for field in wrong)
        yield Finding(
            "error",
            "kv-cache",
            f"{name}.kv_cache_scheme",
            f"{name}'s kv_cache_scheme has {shown}. {row['what']} {row['change']}",
        )
