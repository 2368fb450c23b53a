"""Whether the quickstart's data stage ends well with any random numbers.

    make bench-data
    python -m benchmarks.data_stage --seeds 2 --rows 4

Runs FAQ with the fields of the quickstart's recipe on SmolLM2-135M-Instruct, which
answers for itself, once for every seed of sampling and prompt order. Answers are kept,
so a run that was ended goes on. Exits with 1 unless every seed gives a whole data set.
Writes ``data_stage.md`` to the folder of the answers.
"""

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from benchmarks.markdown import markdown_table
from benchmarks.quality import small_or_real
from benchmarks.texts import CACHE, ROOT
from llmc_faq_slider.faq.assembly import produce, stored_target
from llmc_faq_slider.faq.competition import RegenerationError
from llmc_faq_slider.faq.options import FAQOptions

RECIPE = ROOT / "recipes" / "faq_slider_w4a8_g64.yaml"
COLUMNS = ["seed", "seconds", "prompts", "valid", "replaced", "seeds as they are"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(highlight=False)


@app.command()
def main(
    model: Annotated[str, typer.Option(help="smollm2, folder, hub id")] = "smollm2",
    seeds: Annotated[int, typer.Option(min=1, help="seeds from 0 on")] = 10,
    rows: Annotated[int | None, typer.Option(help="rows of each data set")] = None,
    output: Annotated[Path, typer.Option()] = CACHE / "bench-data",
) -> None:
    """Runs the data stage with several seeds and says what became of each."""
    source = small_or_real(model)
    lines, failed, began = [], 0, time.monotonic()
    for seed in range(seeds):
        cells = _run(source, seed, rows, output)
        failed += len(cells) < len(COLUMNS)
        lines.append(cells + [""] * (len(COLUMNS) - len(cells)))
        table = markdown_table(COLUMNS, lines)
        (output / "data_stage.md").write_text(table, "utf-8")
    console.print(table)
    console.print(
        f"{seeds - failed} of {seeds} seeds gave a whole data set, "
        f"{time.monotonic() - began:.0f} s in all."
    )
    sys.exit(1 if failed else 0)


def _run(source: str, seed: int, rows: int | None, output: Path) -> list[str]:
    """A line of the table; one that ends early holds the reason."""
    stages = yaml.safe_load(RECIPE.read_text("utf-8"))
    fields: dict[str, Any] = stages["calibration_stage"]["faq_modifiers"]["FAQModifier"]
    options = FAQOptions(
        **fields, seed=seed, num_samples=rows, cache_dir=str(output / str(seed))
    )
    output.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    try:
        found = produce(options, stored_target(source))
    except RegenerationError as error:
        return [str(seed), str(error)]
    seconds = time.monotonic() - began
    counts = found.manifest["counts"]
    answered, replaced = counts["prompts_answered"], counts["prompts_dropped"]
    lost = replaced + counts["prompts_fallback"]
    return [
        str(seed),
        "stored" if found.reused else f"{seconds:.0f}",
        str(answered),
        f"{1 - lost / answered:.0%}",
        str(replaced),
        str(counts["prompts_fallback"]),
    ]


if __name__ == "__main__":
    app()
