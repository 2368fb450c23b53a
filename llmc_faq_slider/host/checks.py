"""Refuses, before any work, what llm-compressor would accept silently.

Private upstream API: ``active_session().lifecycle.recipe.modifiers`` (the recipe's
modifiers; in the default pipeline only the running one while it runs).
"""

import difflib
import re
from collections.abc import Iterator, Sequence
from itertools import combinations, takewhile
from typing import NamedTuple

from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.utils import match_named_modules
from llmcompressor.core import State, active_session
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.quantization.quantization import QuantizationMixin
from torch import nn

from llmc_faq_slider.host.grids import check_learnable
from llmc_faq_slider.slider.windows import window_schedule

__all__ = [
    "Conflict",
    "check_data",
    "check_learning_stage",
    "check_other_stages",
    "check_patterns",
    "check_turn",
    "outside_layers",
    "stage_conflicts",
    "targeted_linears",
]

SMOOTHING_STAGES = ("SmoothQuantModifier", "AWQModifier", "SpinQuantModifier")


class Conflict(NamedTuple):
    """Stages that do not go together, in recipe order, and why."""

    code: str
    stages: tuple[Modifier, Modifier]
    message: str


def check_learning_stage(
    stage: QuantizationMixin, window_size: int, window_stride: int
) -> None:
    """
    Check what a SliderQuant stage says by itself.

    :raises ValueError: for windows that leave layers out, and for number formats that
        are missing or cannot be learned
    """
    if not stage.has_config():
        raise ValueError(
            "SliderQuantModifier has no number format. Set scheme (such as W4A16) "
            "or config_groups."
        )
    window_schedule(1, window_size=window_size, window_stride=window_stride)
    for scheme in stage.resolved_config.config_groups.values():
        assert isinstance(scheme, QuantizationScheme)
        check_learnable(scheme)


def targeted_linears(
    model: nn.Module, stage: QuantizationMixin
) -> dict[str, nn.Module]:
    """
    Linears that a stage's ``targets`` and ``ignore`` select, by name.

    :raises ValueError: if there are none; similar names are suggested
    """
    check_patterns(stage)
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


def check_patterns(stage: QuantizationMixin) -> None:
    """
    :raises ValueError: if a pattern of ``targets`` or ``ignore`` is none
    """
    for pattern in [*sorted(stage.resolved_targets), *stage.ignore]:
        if pattern.startswith("re:"):
            try:
                re.compile(pattern.removeprefix("re:"))
            except re.error as error:
                raise ValueError(
                    f"The pattern {pattern!r} is no regular expression: {error}. Write "
                    'it as in "re:.*self_attn.*".'
                ) from error


def outside_layers(outside: Sequence[str], layers: Sequence[str]) -> str | None:
    """
    A sentence on targeted linears that lie outside the decoder layers, if any.

    :param layers: names of the decoder layers
    """
    if not outside:
        return None
    paths = {tuple(name.split(".")) for name in layers}
    within: dict[str, list[str]] = {}
    for name in outside:
        parts = name.split(".")
        shared = max(_shared(parts, path) for path in paths)
        within.setdefault(".".join(parts[: shared + 1]), []).append(name)
    found = [
        one if one == names[0] else f"{one} ({len(names)} linears)"
        for one, names in within.items()
    ]
    patterns = [
        one if one == names[0] else f"re:.*{one.rpartition('.')[2]}.*"
        for one, names in within.items()
    ]
    listed = ", ".join(f'"{pattern}"' for pattern in patterns)
    if patterns == list(outside):
        listed = "it" if len(outside) == 1 else "them"
    return (
        "SliderQuant quantises linears inside the decoder layers; the targets "
        f"also match {', '.join(found)}. Add {listed} to ignore."
    )


def _shared(parts: Sequence[str], path: Sequence[str]) -> int:
    """Leading parts that two names have in common."""
    pairs = zip(parts, path, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def check_other_stages(model: nn.Module, stage: Modifier) -> None:
    """
    Check the recipe around ``stage``.

    :raises ValueError: if another stage quantises the same layers, or a stage that
        moves outliers between layers comes after this one
    """
    modifiers = active_session().lifecycle.recipe.modifiers
    assert isinstance(stage, QuantizationMixin)
    targeted_linears(model, stage)
    for conflict in stage_conflicts(modifiers, model):
        if any(one is stage for one in conflict.stages):
            raise ValueError(conflict.message)


def stage_conflicts(
    modifiers: Sequence[Modifier], model: nn.Module | None = None
) -> Iterator[Conflict]:
    """
    Pairs of stages of which one would undo the other, or that cannot be told apart.

    :param model: shows which layers targets match; without it only targets that are
        the same text are known to overlap
    """
    position = {id(modifier): i for i, modifier in enumerate(modifiers)}
    quantising = [
        m for m in modifiers if isinstance(m, QuantizationMixin) and _weight_targets(m)
    ]
    for earlier, later in combinations(quantising, 2):
        names = f"{type(earlier).__name__} and {type(later).__name__}"
        common = _common_layers(earlier, later, model)
        same = _weight_targets(earlier) & _weight_targets(later)
        if common or (model is None and same and earlier.ignore == later.ignore):
            which = (
                f"{len(common)} layers, the first is {min(common)}"
                if common
                else ", ".join(sorted(same))
            )
            yield Conflict(
                "overlap",
                (earlier, later),
                f"{names} both target {which}. The later stage "
                "would overwrite the earlier one. Give the stages targets that do "
                'not overlap, such as "re:.*self_attn.*" and "re:.*mlp.*".',
            )
        elif same:
            yield Conflict(
                "complementary-ignore",
                (earlier, later),
                f"{names} have the same "
                f"targets {sorted(same)} and differ in ignore only. The saved "
                "checkpoint cannot tell them apart and would reload wrong. Give the "
                'stages different targets, such as "re:.*self_attn.*" and '
                '"re:.*mlp.*".',
            )
    for earlier in quantising:
        for later in modifiers[position[id(earlier)] + 1 :]:
            if type(later).__name__ in SMOOTHING_STAGES:
                yield Conflict(
                    "smoothing-late",
                    (earlier, later),
                    f"{type(later).__name__} stands after {type(earlier).__name__} and "
                    "would change weights that are already quantised. Put it before.",
                )


def _weight_targets(stage: QuantizationMixin) -> set[str]:
    """Targets of the groups that quantise weights."""
    if not stage.has_config():
        return set()
    return {
        target
        for scheme in stage.resolved_config.config_groups.values()
        if scheme.weights is not None
        for target in scheme.targets
    }


def _common_layers(
    one: QuantizationMixin, other: QuantizationMixin, model: nn.Module | None
) -> set[str]:
    if model is None:
        return set()
    first, second = (
        {
            name
            for name, _ in match_named_modules(
                model, _weight_targets(stage), stage.ignore
            )
        }
        for stage in (one, other)
    )
    return first & second


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


def check_data(state: State) -> None:
    """
    Check that there is calibration data.

    :raises ValueError: if there is none
    """
    if state.data is None or state.data.calib is None:
        raise ValueError(
            "SliderQuantModifier needs calibration data and found none. Give "
            "oneshot a data set, or put a FAQModifier before it."
        )
