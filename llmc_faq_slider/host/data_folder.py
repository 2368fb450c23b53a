"""``oneshot`` that takes a folder of regenerated calibration data as its data set."""

from functools import wraps
from pathlib import Path
from typing import Any

import llmcompressor

from llmc_faq_slider.faq.export import is_export, load_export

__all__ = ["oneshot"]


@wraps(llmcompressor.oneshot)
def oneshot(*args: Any, **kwargs: Any) -> Any:
    """llm-compressor's ``oneshot``; ``dataset`` may also be a folder that
    ``llmc-faq-slider regenerate`` wrote.

    :raises ValueError: when the folder's rows are missing
    """
    dataset = kwargs.get("dataset")
    if isinstance(dataset, (str, Path)) and is_export(dataset):
        kwargs["dataset"] = load_export(dataset)
    return llmcompressor.oneshot(*args, **kwargs)
