"""Which linears a config group holds, and whether its groups divide their inputs."""

import re
from collections.abc import Iterator, Sequence
from math import gcd

from compressed_tensors.utils import match_named_modules, match_targets
from llmcompressor.modifiers import Modifier
from torch import nn

from llmc_faq_slider.host.declared import (
    DeclaredGroup,
    declared_groups,
    quantising_stages,
)
from llmc_faq_slider.host.findings import Finding

__all__ = ["Members", "check_group_sizes", "group_members", "indivisible"]

Members = dict[str, nn.Linear]


def check_group_sizes(stage: Modifier, model: nn.Module) -> None:
    """
    :raises ValueError: naming all linears whose inputs are no whole number of groups
    """
    wrong = [
        finding.message
        for declared, linears in group_members([stage], model)
        for finding in indivisible(declared, linears)
    ]
    if wrong:
        raise ValueError("\n".join(wrong))


def group_members(
    modifiers: Sequence[Modifier], model: nn.Module
) -> list[tuple[DeclaredGroup, Members]]:
    """Linears of every config group; the most specific target decides, as upstream."""
    groups = list(declared_groups(modifiers))
    members: list[tuple[DeclaredGroup, Members]] = [(group, {}) for group in groups]
    for stage in quantising_stages(modifiers):
        own = [(i, group) for i, group in enumerate(groups) if group.stage is stage]
        owner = {target: i for i, group in own for target in group.targets}
        try:
            matched = list(match_named_modules(model, owner, stage.ignore))
        except re.error:
            continue  # lint_modifiers says so
        for name, module in matched:
            if isinstance(module, nn.Linear):
                best = match_targets(name, module, owner)[0]
                members[owner[best]][1][name] = module
    return members


def indivisible(declared: DeclaredGroup, linears: Members) -> Iterator[Finding]:
    """Linears whose inputs its groups do not divide, and sizes that would."""
    size = declared.group["weights"]["group_size"]
    if size is None or size < 1:
        return
    wrong = {
        name: linear.in_features
        for name, linear in linears.items()
        if linear.in_features % size
    }
    if not wrong:
        return
    common = gcd(*(linear.in_features for linear in linears.values()))
    fitting = [str(n) for n in (128, 64, 32, 16) if common % n == 0]
    advice = (
        f"Groups of {', '.join(fitting)} divide all of its inputs; set "
        f"weights.group_size: {fitting[0]}."
        if fitting
        else "Set weights.strategy: channel."
    )
    yield Finding(
        "error",
        "group-size",
        declared.label,
        f"Groups of {size} do not divide the inputs of {len(wrong)} layers of "
        f"{declared.label}: {_listed(wrong)}. {advice}",
    )


def _listed(sizes: dict[str, int]) -> str:
    """All layers, those that differ only in their number together."""
    alike: dict[tuple[str, int], list[str]] = {}
    for name, size in sizes.items():
        parts = name.split(".")
        numbers = [part for part in parts if part.isdigit()]
        pattern = ".".join("*" if part.isdigit() else part for part in parts)
        alike.setdefault((pattern, size), []).append(numbers[0] if numbers else "")
    return ", ".join(
        f"{pattern} ({size}"
        + (f", layers {numbers[0]} to {numbers[-1]})" if len(numbers) > 1 else ")")
        for (pattern, size), numbers in alike.items()
    )
