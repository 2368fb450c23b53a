"""``regenerate`` outside a recipe: a folder of calibration data for any tool."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from llmc_faq_slider.faq.assembly import assemble, produce, stored_target
from llmc_faq_slider.faq.export import export
from llmc_faq_slider.faq.options import FAQOptions
from llmc_faq_slider.faq.plan import PILOT, Plan, plan
from llmc_faq_slider.faq.store import CalibrationSet
from llmc_faq_slider.processes import refuse_many_processes


def regenerate_to(
    model: str, options: FAQOptions, output: Path, dry_run: bool, console: Console
) -> CalibrationSet | None:
    """Regenerate calibration data for a model and write it to a folder.

    :param model: folder or hub id of the model to be quantised
    :param output: folder to write to
    :param dry_run: only answer a few prompts and print what the run would cost
    :raises ValueError: for options that cannot be followed
    :raises RuntimeError: when the generator yields too little or cannot be used
    """
    refuse_many_processes()
    target = stored_target(model)
    if dry_run:
        seeds, source, settings, _ = assemble(options, target)
        console.print(_table(plan(seeds, target.tokenizer, source, settings)))
        return None
    found = produce(options, target)
    export(found, output)
    rows, length = found.input_ids.shape
    counts = found.manifest["counts"]
    console.print(
        f"{rows} rows of {length} tokens from {counts['prompts_answered']} prompts "
        f"and {counts['candidates']} answers, {counts['prompts_fallback']} of them "
        f"given back as they were, in {output}"
    )
    return found


def _table(found: Plan) -> Table:
    table = Table("", f"estimated from {PILOT} prompts", title="Nothing was written")
    table.add_row("prompts", f"{found.prompts:,}")
    table.add_row("requests", f"{found.requests:,}")
    table.add_row("tokens read by the generator", f"{found.prompt_tokens:,}")
    table.add_row("tokens written by it", f"{found.answer_tokens:,}")
    table.add_row("time", _duration(found.seconds))
    table.add_row("answers that pass the gates", f"{found.valid:.0%}")
    table.add_row("answers cut off", f"{found.truncated:.0%}")
    return table


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
