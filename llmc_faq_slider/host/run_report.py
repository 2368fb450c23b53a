"""The record of a run beside its checkpoint: what each stage of ours came to.

Equal runs write equal records, but for the seconds that windows took.

Private upstream API: ``active_session().lifecycle.recipe.modifiers``, which holds all
stages again when a run is over.
"""

from pathlib import Path

from llmcompressor.core import active_session

from llmc_faq_slider.faq.modifier import FAQModifier
from llmc_faq_slider.files import write_json
from llmc_faq_slider.host.run_identity import versions
from llmc_faq_slider.slider.modifier import SliderQuantModifier

__all__ = ["RUN_REPORT", "write_run_report"]

RUN_REPORT = "llmc_faq_slider.json"


def write_run_report(folder: Path, read_back: list[str]) -> None:
    """
    Write what the stages of the last run report; remove what an earlier run wrote.

    :param folder: that of the checkpoint
    :param read_back: what differs when the checkpoint is read
    """
    recipe = active_session().lifecycle.recipe
    stages = [
        {"stage": type(modifier).__name__} | modifier.report()
        for modifier in (recipe.modifiers if recipe is not None else [])
        if isinstance(modifier, FAQModifier | SliderQuantModifier)
    ]
    if stages:
        write_json(
            folder / RUN_REPORT,
            {"versions": versions(), "stages": stages, "read_back": read_back},
        )
    else:
        (folder / RUN_REPORT).unlink(missing_ok=True)
