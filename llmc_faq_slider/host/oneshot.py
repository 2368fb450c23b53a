"""llm-compressor's ``oneshot`` behind a check of the recipe and its other arguments."""

import inspect
from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from typing import Any

import llmcompressor
from llmcompressor.core import reset_session
from loguru import logger

from llmc_faq_slider.faq.modifier import tokenizer_given
from llmc_faq_slider.files import exclusive, room_error
from llmc_faq_slider.host.datasets import keep_short_rows, resolve_dataset
from llmc_faq_slider.host.findings import errors
from llmc_faq_slider.host.inputs import OUTPUT_REMEDY, check_output, wrong_inputs
from llmc_faq_slider.host.read_back import read_back
from llmc_faq_slider.host.recipe_lint import lint_recipe
from llmc_faq_slider.host.run_report import write_run_report
from llmc_faq_slider.host.saved_config import mend_saved_config
from llmc_faq_slider.processes import refuse_many_processes

__all__ = ["oneshot"]

_SIGNATURE = inspect.signature(llmcompressor.oneshot)


@wraps(llmcompressor.oneshot)
def oneshot(*args: Any, **kwargs: Any) -> Any:
    """
    llm-compressor's ``oneshot``, with its arguments checked before the model is loaded.

    Same arguments and result. A recipe that llm-compressor would ignore in part or as a
    whole, that cannot be read, or whose stages contradict each other is refused; so are
    data, models and output folders that cannot work, an output folder that another run
    is about to write, and a start as one of several processes. ``dataset`` may also be
    a local file or folder, and a folder that ``llmc-faq-slider regenerate`` wrote;
    ``splits`` cuts what is already loaded, too. Beside the checkpoint in ``output_dir``
    lies the run's report, ``llmc_faq_slider.json``. What was written is read back
    without its weights; who cannot read it is named in the log and in the report.

    :raises ValueError: with one sentence or two per finding, or when the folder's rows
        are missing or damaged
    :raises FolderError: when ``output_dir`` cannot be written, or is full in the end
    :raises FolderBusyError: when another process writes to ``output_dir``
    """
    refuse_many_processes()
    bound = _SIGNATURE.bind_partial(*args, **kwargs)
    given = bound.arguments
    if isinstance(given.get("recipe"), Path):
        given["recipe"] = str(given["recipe"])
    resolve_dataset(given)
    output = given.get("output_dir")
    with ExitStack() as stack:
        if given.get("recipe") is not None:
            modifiers, findings = lint_recipe(given["recipe"], given.get("stage"))
            for finding in findings:
                if finding.severity == "warning":
                    logger.warning(finding.message)
            messages = [finding.message for finding in errors(findings)]
            messages += wrong_inputs(given, modifiers)
            if messages:
                raise ValueError("\n".join(messages))
            keep_short_rows(given, modifiers)
            if output is not None:
                check_output(given, modifiers)
                stack.enter_context(exclusive(Path(output), OUTPUT_REMEDY))
        try:
            # The report is read from the session, so that is cleared after it.
            clear = given.pop("clear_sparse_session", False)
            tokenizer = given.get("tokenizer") or given.get("processor")
            with tokenizer_given(tokenizer):
                model = llmcompressor.oneshot(*bound.args, **bound.kwargs)
            if output is not None:
                folder = Path(output, given.get("stage") or "")
                mend_saved_config(folder, model)
                write_run_report(folder, read_back(folder, model))
            if clear:
                reset_session()
            return model
        except Exception as error:
            full = None if output is None else room_error(error, Path(output))
            if full is None:
                raise
            raise full from error
