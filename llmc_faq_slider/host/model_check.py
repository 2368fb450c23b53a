"""What of a recipe does not fit a model: names, sizes, fused linears, chat template."""

import re
from collections.abc import Iterator, Sequence

from llmcompressor.modifiers import Modifier
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from llmc_faq_slider.faq.modifier import FAQModifier
from llmc_faq_slider.faq.rendering import template_text
from llmc_faq_slider.host.checks import outside_layers, targeted_linears
from llmc_faq_slider.host.declared import (
    DeclaredGroup,
    quantising_stages,
)
from llmc_faq_slider.host.decoder import decoder_layers, split_targets
from llmc_faq_slider.host.findings import Finding
from llmc_faq_slider.host.group_sizes import Members, group_members, indivisible
from llmc_faq_slider.host.serving_check import Served
from llmc_faq_slider.report.serving import (
    Layer,
    Serving,
    Target,
    describe,
    load_table,
    serve,
    serve_experts,
)
from llmc_faq_slider.slider.modifier import SliderQuantModifier

__all__ = ["check_model", "model_servings"]


def check_model(
    modifiers: Sequence[Modifier], model: PreTrainedModel, name: str
) -> Iterator[Finding]:
    """
    Findings of stages on a model without weights.

    :param name: folder or hub id of the model
    """
    for stage in quantising_stages(modifiers):
        try:
            targeted = targeted_linears(model, stage)
            if isinstance(stage, SliderQuantModifier):
                layers = decoder_layers(model)
                _, outside = split_targets(layers, targeted)
                sentence = outside_layers(outside, [name for name, _ in layers])
                if sentence:
                    raise ValueError(sentence)
        except ValueError as error:
            yield Finding("error", "targets", type(stage).__name__, str(error))
    members = group_members(modifiers, model)
    for declared, linears in members:
        yield from indivisible(declared, linears)
    yield from _torn_apart(members, model)
    yield from _never_quantized(members)
    if any(isinstance(modifier, FAQModifier) for modifier in modifiers):
        yield from _chat_template(name, model.config.get_text_config().vocab_size)


def _torn_apart(
    members: list[tuple[DeclaredGroup, Members]], model: nn.Module
) -> Iterator[Finding]:
    """Linears that vLLM loads as one layer but that have different formats."""
    format_of = {name: declared for declared, linears in members for name in linears}
    linears = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    torn: dict[str, list[str]] = {}
    for name in sorted(linears):
        parent, _, last = name.rpartition(".")
        for fused, parts in load_table()["fused"].items():
            if last != parts[0]:
                continue
            shards = [f"{parent}.{part}" for part in parts]
            present = [shard for shard in shards if shard in linears]
            formats = {
                describe(format_of[shard].group) if shard in format_of else "16 bit"
                for shard in present
            }
            if len(formats) > 1:
                torn.setdefault(fused, []).append(parent)
    for fused, parents in torn.items():
        parts = ", ".join(load_table()["fused"][fused])
        yield Finding(
            "error",
            "fused",
            parents[0],
            f"{parts} have different formats in {len(parents)} places, the first is "
            f"{parents[0]}. vLLM loads them as one {fused}, which has one format. Give "
            "all of them the same targets, or put all of them into ignore.",
        )


def _never_quantized(members: list[tuple[DeclaredGroup, Members]]) -> Iterator[Finding]:
    """Linears that vLLM builds without a scheme, and so cannot load quantised."""
    for declared, linears in members:
        for row in load_table()["unquantized"]:
            names = [name for name in linears if re.search(row["name"], name)]
            if not names:
                continue
            yield Finding(
                "error",
                "unquantized",
                declared.label,
                f"{declared.label} quantises {len(names)} {row['what']}, the first is "
                f"{names[0]}. vLLM builds them unquantised and cannot load the "
                f"checkpoint. Add 're:.*{row['name']}' to ignore.",
            )


def _scheme_free(name: str) -> bool:
    return any(re.search(row["name"], name) for row in load_table()["unquantized"])


def _chat_template(name: str, vocabulary: int) -> Iterator[Finding]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception:  # hub, network, files: one place, many kinds
        tokenizer = None
    # Without its files, transformers makes a tokenizer that knows no words.
    if tokenizer is None or len(tokenizer) < vocabulary // 2:
        yield Finding(
            "error",
            "no-tokenizer",
            name,
            f"FAQModifier needs the model's tokenizer and finds none at {name}. Give a "
            "folder or hub id that has one.",
        )
    elif template_text(tokenizer) is None:
        yield Finding(
            "warning",
            "no-chat-template",
            name,
            f"{name} has no chat template, so FAQModifier continues the seeds as plain "
            "text. Use the instruction-tuned model of the family for chat data.",
        )


def model_servings(
    modifiers: Sequence[Modifier], model: nn.Module, targets: Sequence[Target]
) -> Iterator[Served]:
    """Every config group on every target, split by what becomes of its layers."""
    for declared, linears in group_members(modifiers, model):
        experts = {n: m for n, m in linears.items() if ".experts." in n}
        plain = {
            name: linear
            for name, linear in linears.items()
            if name not in experts and not _scheme_free(name)
        }
        for target in targets:
            outcomes: dict[tuple[Serving, bool], list[Layer]] = {}
            for layer in _fused_layers(plain):
                key = (serve(declared.group, target, layer), False)
                outcomes.setdefault(key, []).append(layer)
            for layer in _fused_layers(experts):
                key = (serve_experts(declared.group, target, layer), True)
                outcomes.setdefault(key, []).append(layer)
            for (serving, inside), layers in outcomes.items():
                yield Served(declared, serving, tuple(layers), inside)


def _fused_layers(linears: Members) -> list[Layer]:
    """Sizes of linears as vLLM holds them; layers that differ by number count once."""
    fused = load_table()["fused"]
    shard_of = {part: whole for whole, parts in fused.items() for part in parts}
    sizes: dict[str, tuple[int, int]] = {}
    for name, linear in linears.items():
        parent, _, last = name.rpartition(".")
        whole = f"{parent}.{shard_of.get(last, last)}"
        _, outputs = sizes.get(whole, (0, 0))
        sizes[whole] = (linear.in_features, outputs + linear.out_features)
    layers: dict[tuple[str, int, int], Layer] = {}
    for name, (inputs, outputs) in sizes.items():
        short = name.rpartition(".")[2]
        layers.setdefault((short, inputs, outputs), Layer(short, inputs, outputs))
    return list(layers.values())
