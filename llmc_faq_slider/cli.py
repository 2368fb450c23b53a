"""The command line: ``llmc-faq-slider COMMAND``. The work is done elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

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


@app.command()
def regenerate(
    model: Annotated[str, typer.Argument(help="hub id or folder, not quantised")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="folder to write the data to")
    ] = Path("calibration"),
    generator: Annotated[
        str, typer.Option(help="self, folder, hub id, or URL of a server")
    ] = "self",
    seeds: Annotated[
        list[str] | None,
        typer.Option(help="file, hub name or shipped; may be given several times"),
    ] = None,
    num_samples: Annotated[int | None, typer.Option(help="rows")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="tokens per row")] = None,
    num_candidates: Annotated[int, typer.Option(help="answers per prompt")] = 1,
    selector: Annotated[str, typer.Option(help="who wins a group")] = "expert_nll",
    seed: Annotated[int, typer.Option(help="seed of all that is random")] = 0,
    field: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="any other field of FAQModifier, such as --set allow_remote=true; "
            "may be given several times",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="only print what it would cost")
    ] = False,
) -> None:
    """
    Regenerate calibration data with a larger sibling of a model, or the model itself.

    Writes Arrow rows, token ids as safetensors, and messages as JSONL, for
    llm-compressor (oneshot's dataset takes the folder) and any other tool.
    """
    from llmc_faq_slider.faq.command import regenerate_to
    from llmc_faq_slider.faq.options import options_of

    fields: dict[str, Any] = {
        "generator": generator,
        "seeds": seeds[0] if seeds and len(seeds) == 1 else seeds or None,
        "num_samples": num_samples,
        "sequence_length": sequence_length,
        "num_candidates": num_candidates,
        "selector": selector,
        "seed": seed,
    }
    with one_sentence():
        try:
            options = options_of(fields, field or [])
            regenerate_to(model, options, output, dry_run, console)
        except (RuntimeError, OSError) as error:
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(1) from error


@app.command()
def check(
    recipe: Annotated[Path, typer.Argument(help="recipe file")],
    model: Annotated[
        str | None,
        typer.Option(help="hub id or folder; only its config.json is read"),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="cpu (this machine's), cpu-avx2, sm90, ...; default: all"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="for machines")] = False,
) -> None:
    """
    Say what is wrong with a recipe, and which vLLM kernel takes its checkpoint.

    Exits with 1 if the recipe would not run, or is not served on the target.
    """
    from llmc_faq_slider.host.quiet import quiet_run
    from llmc_faq_slider.report import check_report as report

    with one_sentence(), quiet_run():
        findings, served = report.check_recipe(recipe, model, target)
    report.print_check(findings, served, as_json, console)
    raise typer.Exit(1 if report.errors(findings) else 0)


if __name__ == "__main__":
    app()
