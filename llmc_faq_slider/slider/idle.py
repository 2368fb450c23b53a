"""Experts, and other linears, that no calibration token reaches.

They are rounded to the scales that a search finds for their weights alone. That is said
before the first window, with the number of tokens that would reach every expert.
"""

import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import log
from typing import Any

import torch
from torch import Tensor, nn

from llmc_faq_slider.slider.dry_pass import Linears
from llmc_faq_slider.slider.memory import RowLimit
from llmc_faq_slider.slider.stream import DecoderCalls, pass_rows

__all__ = ["Idle", "find_idle", "idle_linears", "reached_tokens", "tokens_for_all"]

SHOWN = 3
#: ``<layer>.<name>`` of a linear inside an expert
EXPERT = re.compile(r"(?P<group>\d+\..*?)\.(?P<number>\d+)\.")


@dataclass(frozen=True)
class Idle:
    """
    :param linears: that no calibration token reaches, ``<layer>.<name>``
    :param experts: of which none of the linears is reached
    :param all_experts: how many there are
    :param share_of_weights: of all weights that are quantised, those of ``linears``
    :param tokens: estimate of how many would reach every expert; None without idle
        experts
    """

    linears: list[str]
    experts: int
    all_experts: int
    share_of_weights: float
    tokens: int | None

    def sentence(self, given: int) -> str:
        """:param given: calibration tokens"""
        share = f"{100 * self.share_of_weights:.2g} % of the quantised weights"
        if not self.experts:
            more = len(self.linears) - SHOWN
            names = ", ".join(self.linears[:SHOWN])
            names += f" and {more} more" if more > 0 else ""
            return (
                f"No calibration token reaches {len(self.linears)} linears ({share}), "
                f"which are rounded without learning: {names} (layer and name). Give "
                "more varied calibration data, or put them in ignore."
            )
        whole = f"{self.experts} of {self.all_experts} experts"
        most = "Most experts idle: " if 2 * self.experts > self.all_experts else ""
        return (
            f"{most}{whole} ({share}) get none of the {given} calibration tokens and "
            f"are rounded without learning. About {self.tokens} tokens of such data "
            "would reach every expert; more varied data needs fewer."
        )


def find_idle(
    calls: DecoderCalls, hidden: list[Tensor], linears: Linears, limit: RowLimit
) -> Idle | None:
    """
    What no calibration token reaches, None if every linear is reached.

    The rows only run where the one of the dry pass has left linears out.

    :param hidden: input of the first layer per row, ``[1, length, hidden]``
    :param linears: what will be quantised, by layer index and name
    """
    if not calls.dry.uncalled:
        return None
    counts = reached_tokens(calls, hidden, linears, limit)
    weights = {
        f"{index}.{name}": _size(module)
        for index, modules in linears.items()
        for name, module in modules.items()
    }
    return idle_linears(counts, weights, sum(row.shape[1] for row in hidden))


def _size(module: nn.Module) -> int:
    assert isinstance(module.weight, Tensor)
    return module.weight.numel()


@torch.no_grad()
def reached_tokens(
    calls: DecoderCalls,
    hidden: list[Tensor],
    linears: Linears,
    limit: RowLimit,
) -> dict[str, int]:
    """
    Calibration tokens that reach each linear, ``<layer>.<name>``.

    :param hidden: input of the first layer per row, ``[1, length, hidden]``
    """
    counts = {f"{index}.{name}": 0 for index in linears for name in linears[index]}

    def count(key: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            counts[key] += args[0].shape[:-1].numel()

        return hook

    for index in range(max(linears) + 1):

        def through(index: int = index) -> list[Tensor]:
            return pass_rows(calls, range(index, index + 1), hidden, limit.rows)

        def forget(index: int = index) -> None:
            counts.update({f"{index}.{name}": 0 for name in linears.get(index, {})})

        with ExitStack() as stack:
            for name, module in linears.get(index, {}).items():
                hook = count(f"{index}.{name}")
                stack.callback(module.register_forward_pre_hook(hook).remove)
            hidden = limit.run(through, forget)
    return counts


def idle_linears(
    counts: Mapping[str, int], weights: Mapping[str, int], tokens: int
) -> Idle | None:
    """
    :param counts: tokens by linear, ``<layer>.<name>``
    :param weights: number of weights of each
    :param tokens: that were given
    :return: None if every linear is reached
    """
    idle = [name for name, count in counts.items() if not count]
    if not idle:
        return None
    groups: dict[str, dict[str, int]] = {}
    for name, count in counts.items():
        if expert := EXPERT.match(name):
            most, number = groups.setdefault(expert["group"], {}), expert["number"]
            most[number] = max(count, most.get(number, 0))
    experts = [list(group.values()) for group in groups.values()]
    needed = [tokens_for_all(group, tokens) for group in experts if 0 in group]
    return Idle(
        idle,
        sum(group.count(0) for group in experts),
        sum(map(len, experts)),
        sum(weights[name] for name in idle) / sum(weights.values()),
        max(needed, default=None),
    )


def tokens_for_all(counts: list[int], tokens: int) -> int:
    """
    Estimate of the tokens that would reach every expert of a layer, two digits of it.

    Good and Turing: what has not been seen is together as frequent as what has been
    seen once. The last of several unseen experts takes about a logarithm longer than
    one of them.

    :param counts: tokens by expert, at least one of them none
    :param tokens: that were given
    """
    unseen, once = counts.count(0), counts.count(1)
    # With none seen once, less than one of the next tokens is expected.
    rate = max(once, 0.5) / tokens / unseen
    needed = tokens + (1 + log(unseen)) / rate
    return int(float(f"{needed:.1e}"))
