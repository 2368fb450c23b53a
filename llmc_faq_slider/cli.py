"""The command line: ``llmc-faq-slider COMMAND``. The work is done elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(pretty_exceptions_enable=False, no_args_is_help=True)
console = Console(highlight=False)


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
def check(
    recipe: Annotated[Path, typer.Argument(help="recipe file")],
    model: Annotated[
        str | None,
        typer.Option(help="hub id or folder; only its config.json is read"),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="cpu, cpu-amx, sm90, ...; default: all that are known"),
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
