"""Keeps llm-compressor's log, which goes to standard output, out of other output.

Upstream interface: the environment variable ``LLM_COMPRESSOR_LOG_DISABLED``, read while
it is imported, and in ``llmcompressor.logger`` both ``configure_logger``, which it
calls then, and ``LOGGER_CONFIG``, in which that leaves its mark.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from loguru import logger

__all__ = ["quiet_import", "quiet_run"]

_SWITCH = "LLM_COMPRESSOR_LOG_DISABLED"


@contextmanager
def quiet_import() -> Iterator[None]:
    """Imports of llm-compressor log nothing; afterwards its log is as ever."""
    if "llmcompressor" in sys.modules or _SWITCH in os.environ:
        yield
        return
    os.environ[_SWITCH] = "true"
    try:
        yield
    finally:
        del os.environ[_SWITCH]
    from llmcompressor.logger import LOGGER_CONFIG, configure_logger

    LOGGER_CONFIG.disabled = False
    configure_logger()


@contextmanager
def quiet_run() -> Iterator[None]:
    """llm-compressor logs nothing."""
    logger.disable("llmcompressor")
    try:
        yield
    finally:
        if os.environ.get(_SWITCH, "").lower() != "true":
            logger.enable("llmcompressor")
