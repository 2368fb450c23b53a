"""Refuses, before any work, what llm-compressor would accept silently.

Private upstream API: ``active_session().lifecycle.recipe.modifiers`` (the recipe's
modifiers; in the default pipeline only the running one while it runs).
"""

import difflib

from compressed_tensors.utils import match_named_modules
from llmcompressor.core import active_session
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.quantization.quantization import QuantizationMixin
from torch import nn

__all__ = ["check_other_stages", "check_turn", "targeted_linears"]

SMOOTHING_STAGES = ("SmoothQuantModifier", "AWQModifier", "SpinQuantModifier")


def targeted_linears(
    model: nn.Module, stage: QuantizationMixin
) -> dict[str, nn.Module]:
    """
    Linears that a stage's ``targets`` and ``ignore`` select, by name.

    :raises ValueError: if there are none; similar names are suggested
    """
    selected: dict[str, nn.Module] = {
        name: module
        for name, module in match_named_modules(
            model, stage.resolved_targets, stage.ignore
        )
        if isinstance(module, nn.Linear)
    }
    if selected:
        return selected
    known = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    known |= {name.rpartition(".")[2] for name in known} | {"Linear"}
    near = sorted(
        {
            suggestion
            for target in stage.resolved_targets
            for suggestion in difflib.get_close_matches(
                target.removeprefix("re:").strip(".*$^"), known, n=3, cutoff=0.4
            )
        }
    )
    raise ValueError(
        f"No linear layer of {type(model).__name__} matches targets "
        f"{sorted(stage.resolved_targets)} without ignore {stage.ignore}."
        + (f" Similar names: {', '.join(near)}." if near else "")
        + ' Use targets: ["Linear"] for all, or "re:.*name" for some.'
    )


def check_other_stages(model: nn.Module, stage: Modifier) -> None:
    """
    Check the recipe around ``stage``.

    :raises ValueError: if another stage quantises the same layers, or a stage that
        moves outliers between layers comes after this one
    """
    modifiers = active_session().lifecycle.recipe.modifiers
    position = next((i for i, m in enumerate(modifiers) if m is stage), None)
    if position is None:
        return
    assert isinstance(stage, QuantizationMixin)
    ours = set(targeted_linears(model, stage))
    for other in modifiers:
        if other is stage or not isinstance(other, QuantizationMixin):
            continue
        if not other.has_config():
            continue
        shared = ours & {
            name
            for name, _ in match_named_modules(
                model, other.resolved_targets, other.ignore
            )
        }
        if shared:
            raise ValueError(
                f"{type(stage).__name__} and {type(other).__name__} both target "
                f"{len(shared)} layers, the first is {min(shared)}. The later stage "
                "would overwrite the earlier one. Give the stages targets that do "
                'not overlap, such as "re:.*self_attn.*" and "re:.*mlp.*".'
            )
        if stage.ignore and other.ignore and stage.targets == other.targets:
            raise ValueError(
                f"{type(stage).__name__} and {type(other).__name__} have the same "
                f"targets {stage.targets} and differ in ignore only. The saved "
                "checkpoint cannot tell them apart and would reload wrong. Give the "
                'stages different targets, such as "re:.*self_attn.*" and '
                '"re:.*mlp.*".'
            )
    for later in modifiers[position + 1 :]:
        if type(later).__name__ in SMOOTHING_STAGES:
            raise ValueError(
                f"{type(later).__name__} stands after {type(stage).__name__} and "
                "would change weights that are already quantised. Put it before."
            )


def check_turn(stage: Modifier) -> None:
    """
    Check that every earlier stage has done its work when ``stage`` starts.

    :raises ValueError: under ``oneshot(pipeline="sequential")`` behind a stage that
        calibrates, which upstream starts only after this one
    """
    modifiers = active_session().lifecycle.recipe.modifiers
    for earlier in modifiers:
        if earlier is stage:
            return
        if earlier.requires_calibration_data:
            raise ValueError(
                f"{type(stage).__name__} would run before {type(earlier).__name__}, "
                "which the recipe lists first, because both share one pipeline. "
                'Leave pipeline at its default, "independent".'
            )
