"""The ``sensitivity`` command: from a model's name to figure, numbers and proposal."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from llmc_faq_slider.context import context_length
from llmc_faq_slider.faq.seeds import shipped_seeds
from llmc_faq_slider.host.decoder import decoder_layers
from llmc_faq_slider.processes import refuse_many_processes
from llmc_faq_slider.products import multiplied_in, product_dtype
from llmc_faq_slider.report.loading import (
    Dtype,
    full_precision_config,
    load_model,
    load_tokenizer,
    pick_device,
)
from llmc_faq_slider.report.sensitivity_plot import SUFFIXES, draw_sensitivity
from llmc_faq_slider.report.sensitivity_record import LayerRecord, SensitivityRecord
from llmc_faq_slider.slider.proposal import propose_windows
from llmc_faq_slider.slider.quantizer import ActivationGrid, WeightGrid
from llmc_faq_slider.slider.sensitivity import (
    ROWS,
    TOKENS,
    measure_sensitivity,
    sample_rows,
)
from llmc_faq_slider.slider.student import LinearGrids

__all__ = ["Format", "Sample", "report_sensitivity", "sensitivity_record"]

#: tried in this order where no group size is asked for
GROUP_SIZES = (128, 64, 32, 16)


@dataclass(frozen=True)
class Format:
    """
    Number format of the one quantised layer.

    :param bits: 2 to 8, of an integer weight
    :param symmetric: weights without zero points
    :param group_size: input columns per scale; 0 for one scale per output channel, None
        for the first of 128, 64, 32 and 16 that divides every input size, else 0
    :param input_bits: 4 or 8 for dynamic integer inputs per token, 16 for inputs as
        they are
    """

    bits: int = 4
    symmetric: bool = True
    group_size: int | None = None
    input_bits: int = 16


@dataclass(frozen=True)
class Sample:
    """
    The text that the layers are compared on.

    :param text: file of plain text, None for the prompts that come with the package
    :param rows: rows, evenly spaced over the text
    :param tokens: tokens per row
    """

    text: Path | None = None
    rows: int = ROWS
    tokens: int = TOKENS


def report_sensitivity(
    model: str,
    number_format: Format,
    sample: Sample,
    figure: Path,
    device: str | None,
    dtype: Dtype,
    console: Console,
) -> None:
    """
    Measure, write figure and JSON, print table and proposal.

    :param figure: ends in ``.png`` or ``.svg``; the numbers go beside it as ``.json``
    :raises ValueError: as :func:`sensitivity_record`, or if no figure can be written
    """
    refuse_many_processes()
    _check_writable(figure)
    record = sensitivity_record(model, number_format, sample, device, dtype)
    numbers = figure.with_suffix(".json")
    numbers.write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
    draw_sensitivity(record, figure)
    console.print(record.table())
    console.print(
        f"{record.rows} rows of {record.tokens_per_row} tokens, full-precision loss "
        f"{record.loss:.3f} nats, {record.seconds:.0f} s. Written: {figure}, {numbers}"
    )
    console.print(
        f"Proposal: SliderQuantModifier with shallow_layers: {record.shallow_layers} "
        f"and deep_layers: {record.deep_layers}"
    )


def sensitivity_record(
    model: str,
    number_format: Format,
    sample: Sample,
    device: str | None = None,
    dtype: Dtype = "auto",
) -> SensitivityRecord:
    """
    Load a model and measure what quantising each decoder layer alone does to it.

    :param model: hub id or folder
    :param device: None for an accelerator where there is one, else the CPU
    :param dtype: dtype of the computation and of the stored scales; ``auto`` for the
        model's own
    :raises ValueError: if the model, the text or the format cannot be used; the message
        says what to do
    """
    where = pick_device(device)
    config = full_precision_config(model)
    rows = text_rows(load_tokenizer(model), sample)
    longest = context_length(config)
    if longest is not None and sample.tokens > longest:
        raise ValueError(
            f"Rows of {sample.tokens} tokens are longer than the {longest} that "
            f"{model} can read. Give fewer tokens per row."
        )
    loaded = load_model(model, dtype)
    layers = [layer for _, layer in decoder_layers(loaded)]
    linears = [layer_linears(index, layer) for index, layer in enumerate(layers)]
    group_size = _group_size(number_format.group_size, linears)
    grids = LinearGrids(
        WeightGrid(
            number_format.bits,
            number_format.symmetric,
            group_size or None,
            loaded.dtype,
        ),
        None
        if number_format.input_bits == 16
        else ActivationGrid(number_format.input_bits),
    )
    began = time.monotonic()
    with multiplied_in(product_dtype("auto", where), where):
        measured = measure_sensitivity(
            loaded.to(where).eval(),
            layers,
            rows,
            {i: dict.fromkeys(names, grids) for i, names in enumerate(linears)},
            where,
        )
    proposal = propose_windows([layer.kl for layer in measured.layers])
    return SensitivityRecord(
        model=model,
        bits=number_format.bits,
        symmetric=number_format.symmetric,
        group_size=group_size,
        input_bits=number_format.input_bits,
        text=_text_name(sample.text),
        rows=len(rows),
        tokens_per_row=sample.tokens,
        dtype=str(loaded.dtype).removeprefix("torch."),
        device=str(where),
        seconds=round(time.monotonic() - began, 1),
        loss=measured.loss,
        layers=[
            LayerRecord(layer=i, kl=layer.kl, loss_increase=layer.loss_increase)
            for i, layer in enumerate(measured.layers)
        ],
        typical=proposal.typical,
        threshold=proposal.threshold,
        shallow_layers=proposal.shallow_layers,
        deep_layers=proposal.deep_layers,
    )


def text_rows(tokenizer: PreTrainedTokenizerBase, sample: Sample) -> list[Tensor]:
    """
    Rows of equal length, each behind the tokenizer's start token if it sets one.

    :return: int64 ``[tokens]`` each
    :raises ValueError: if the text is too short, or cannot be read
    """
    start = tokenizer("")["input_ids"][:1]
    start = start if start == [tokenizer.bos_token_id] else []
    text = _text(sample.text)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    step = sample.tokens - len(start)
    found = len(ids) // step
    if found < sample.rows:
        raise ValueError(
            f"The text ({_text_name(sample.text)}) has {len(ids)} tokens, too few for "
            f"{sample.rows} rows of {sample.tokens}. Give a longer text, fewer rows or "
            "fewer tokens per row."
        )
    rows = [torch.tensor(start + ids[i * step : (i + 1) * step]) for i in range(found)]
    return sample_rows(rows, sample.rows, sample.tokens)


def _text(path: Path | None) -> str:
    if path is None:
        return "\n\n".join(seed.text for seed in shipped_seeds())
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as UTF-8 text: {error}.") from error


def _text_name(path: Path | None) -> str:
    return "prompts of the package" if path is None else str(path)


def layer_linears(index: int, layer: nn.Module) -> dict[str, nn.Linear]:
    """
    The linears of a decoder layer by name.

    :raises ValueError: if the layer has other weight matrices, or no linear
    """
    linears = {n: m for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
    known = {f"{name}.weight" for name in linears}
    others = [
        name
        for name, parameter in layer.named_parameters()
        if parameter.ndim > 1 and name not in known
    ]
    if others or not linears:
        found = f"holds {others[0]}, which is not" if others else "holds no weight of"
        raise ValueError(
            f"Decoder layer {index} ({type(layer).__name__}) {found} a "
            "torch.nn.Linear, so its sensitivity cannot be measured; this "
            "architecture is not supported."
        )
    return linears


def _group_size(asked: int | None, linears: list[dict[str, nn.Linear]]) -> int:
    sizes = {
        linear.in_features: f"layer {index}'s {name}"
        for index, names in enumerate(linears)
        for name, linear in names.items()
    }
    fitting = [
        size for size in GROUP_SIZES if not any(inputs % size for inputs in sizes)
    ]
    if asked is None:
        return fitting[0] if fitting else 0
    for inputs, name in sizes.items():
        if asked and inputs % asked:
            raise ValueError(
                f"Groups of {asked} do not divide the {inputs} inputs of {name}. "
                + (f"Groups of {fitting[0]} divide all. " if fitting else "")
                + "A group size of 0 gives one scale per output channel."
            )
    return asked


def _check_writable(figure: Path) -> None:
    if figure.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"The figure {str(figure)!r} does not end in {' or '.join(SUFFIXES)}. "
            "The ending decides its format."
        )
    if not figure.parent.is_dir() or not os.access(figure.parent, os.W_OK):
        raise ValueError(
            f"{str(figure.parent)!r} is no folder that can be written to. Name the "
            "figure in one that is."
        )
