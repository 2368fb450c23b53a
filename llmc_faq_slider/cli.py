"""The command line: ``llmc-faq-slider COMMAND``. The work is done elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(pretty_exceptions_enable=False, no_args_is_help=True)
console = Console(highlight=False)


class Dtype(StrEnum):
    auto = "auto"
    bfloat16 = "bfloat16"
    float32 = "float32"


class InputBits(StrEnum):
    four = "4"
    eight = "8"
    sixteen = "16"


@app.callback()
def main() -> None:
    """FAQ and SliderQuant beside llm-compressor."""


@contextmanager
def one_sentence() -> Iterator[None]:
    """Turn what is wrong with the input into one sentence and exit code 2."""
    try:
        yield
    except ValueError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error


@app.command()
def sensitivity(
    model: Annotated[str, typer.Argument(help="hub id or folder, not quantised")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="figure, .png or .svg")
    ] = Path("sensitivity.png"),
    bits: Annotated[int, typer.Option(min=2, max=8, help="bits of the weights")] = 4,
    group_size: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="input columns per scale, 0 for one scale per output channel; "
            "default: 128, or the next smaller that divides",
        ),
    ] = None,
    asymmetric: Annotated[
        bool, typer.Option("--asymmetric", help="weights with zero points")
    ] = False,
    input_bits: Annotated[
        InputBits, typer.Option(help="bits of the inputs, 16 leaves them as they are")
    ] = InputBits.sixteen,
    text: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="plain text to compare on; default: prompts of the package",
        ),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="rows of text")] = 8,
    tokens: Annotated[int, typer.Option(min=8, help="tokens per row")] = 128,
    device: Annotated[
        str | None, typer.Option(help="such as cpu or cuda; default: the fastest")
    ] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="float32 keeps bf16's rounding out of small effects")
    ] = Dtype.auto,
) -> None:
    """
    Quantise each decoder layer alone, see what it does to the model's output, and
    propose SliderQuant's shallow_layers and deep_layers.

    Draws a figure, writes the numbers beside it as JSON, and prints them.
    """
    from llmc_faq_slider.report import sensitivity as report

    with one_sentence():
        report.report_sensitivity(
            model,
            report.Format(bits, not asymmetric, group_size, int(input_bits)),
            report.Sample(text, rows, tokens),
            output,
            device,
            dtype.value,
            console,
        )


if __name__ == "__main__":
    app()
