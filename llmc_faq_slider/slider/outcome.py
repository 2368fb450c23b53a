"""What a SliderQuant stage came to, and what of it a user should know."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

from loguru import logger

from llmc_faq_slider.slider.closing import ClosingResult
from llmc_faq_slider.slider.idle import Idle
from llmc_faq_slider.slider.learning_state import WindowResult

__all__ = ["Outcome", "foreseen", "remarks"]


@dataclass
class Outcome:
    """
    :param rows: calibration rows that were learned from
    :param tokens: in these rows
    :param windows: in training order
    :param closing: None if there was no closing pass
    :param warnings: sentences
    :param idle: what no calibration token reached, None if every linear was reached
    """

    rows: int
    tokens: int
    windows: list[WindowResult]
    closing: ClosingResult | None
    warnings: list[str]
    idle: Idle | None = None

    def record(self) -> dict[str, Any]:
        """JSON-like. A loss that is not finite is None."""
        return {
            "rows": self.rows,
            "tokens": self.tokens,
            "windows": [_window(result) for result in self.windows],
            "closing": None if self.closing is None else _closing(self.closing),
            "idle": None if self.idle is None else _idle(self.idle),
            "warnings": self.warnings,
        }


def foreseen(missing: str | None, idle: Idle | None, tokens: int) -> list[str]:
    """
    Sentences on what is known before the first window, which are also logged.

    :param missing: why there is no closing pass
    :param tokens: that were given
    """
    said = []
    if missing is not None:
        said.append(
            "SliderQuant leaves out the closing pass, which compares next-token "
            f"distributions: {missing}."
        )
    if idle is not None:
        said.append(idle.sentence(tokens))
    for sentence in said:
        logger.warning(sentence)
    return said


def remarks(windows: list[WindowResult], closing: ClosingResult | None) -> list[str]:
    """Sentences on windows, and a closing pass, that lowered nothing or began anew."""
    said = [
        sentence
        for result in windows
        for sentence in _remarks(f"window over {result.window}", result)
    ]
    if closing is not None:
        said += _remarks("closing pass", closing)
    return said


def _remarks(what: str, result: WindowResult | ClosingResult) -> Iterator[str]:
    if result.kept_start:
        yield (
            f"SliderQuant's {what} did not lower its loss of {result.start_loss:.4e}; "
            "its start was kept."
        )
    if result.retries:
        times = "once" if result.retries == 1 else f"{result.retries} times"
        yield (
            f"SliderQuant's {what} began anew {times} at lower learning "
            "rates, because a loss was not finite."
        )


def _window(result: WindowResult) -> dict[str, Any]:
    window = result.window
    return {
        "first_layer": window.start,
        "last_layer": window.stop - 1,
        "family": window.family,
        "start_loss": _finite(result.start_loss),
        "loss": _finite(result.loss),
        "seconds": round(result.seconds, 3),
        "kept_start": result.kept_start,
        "retries": result.retries,
    }


def _closing(result: ClosingResult) -> dict[str, Any]:
    return asdict(result) | {
        "start_loss": _finite(result.start_loss),
        "loss": _finite(result.loss),
    }


def _idle(idle: Idle) -> dict[str, Any]:
    return {
        "linears": len(idle.linears),
        "experts": idle.experts,
        "all_experts": idle.all_experts,
        "share_of_weights": round(idle.share_of_weights, 6),
        "tokens_for_all": idle.tokens,
    }


def _finite(loss: float) -> float | None:
    return loss if isfinite(loss) else None
