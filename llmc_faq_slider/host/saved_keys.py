"""Has a model save its experts under the names that are read.

llm-compressor takes fused experts apart into ``experts.0.gate_proj`` and so on. Where a
family's checkpoints say ``w1``, transformers does not know those names, starts the
experts at random, and only says so in its log. vLLM reads the family's names too.

Private upstream API: ``PreTrainedModel._weight_conversions``, which saving reverts.
"""

import re

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    get_model_conversion_mapping,
)
from transformers.core_model_loading import WeightConverter, WeightRenaming

__all__ = ["save_experts_as_read"]

#: linears of an expert, by the fused parameter that holds them
_PARTS = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "up_proj": ("up_proj",),
    "down_proj": ("down_proj",),
}
_PER_EXPERT = re.compile(r"experts\.\*\.(\w+)\.weight$")


def save_experts_as_read(model: nn.Module) -> None:
    """Rename the linears of experts in what ``save_pretrained`` will write."""
    if not isinstance(model, PreTrainedModel):
        return
    names = _family_names(model)
    if not names:
        return
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
    kept = [one for one in conversions if not _fuses_experts(one)]
    model._weight_conversions = kept + [
        WeightRenaming(
            source_patterns=rf"\.experts\.(\d+)\.{theirs}\.",
            target_patterns=rf".experts.\1.{ours}.",
        )
        for ours, theirs in names.items()
    ]


def _family_names(model: PreTrainedModel) -> dict[str, str]:
    """What the family's checkpoints call linears of experts, where that differs."""
    if not any(
        re.search(r"\.experts\.\d+\.", name) for name, _ in model.named_modules()
    ):
        return {}
    configs = {model.config.model_type, model.config.get_text_config().model_type}
    names: dict[str, str] = {}
    for model_type in sorted(configs):
        for one in get_checkpoint_conversion_mapping(model_type) or []:
            if not _fuses_experts(one):
                continue
            theirs = [_PER_EXPERT.search(s) for s in one.source_patterns]
            ours = _PARTS.get(one.target_patterns[0].rsplit(".", 1)[-1], ())
            if all(theirs) and len(theirs) == len(ours):
                found = (match[1] for match in theirs if match)
                names.update(zip(ours, found, strict=True))
    return {ours: theirs for ours, theirs in names.items() if ours != theirs}


def _fuses_experts(conversion: object) -> bool:
    return isinstance(conversion, WeightConverter) and any(
        _PER_EXPERT.search(source) for source in conversion.source_patterns
    )
