"""How many rows a device takes at a time: estimated first, halved when it runs out."""

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TypeVar

import torch
from loguru import logger
from torch import nn

from llmc_faq_slider.slider.compute import deterministic
from llmc_faq_slider.slider.head import JUDGED_TOKENS

__all__ = [
    "RowLimit",
    "free_bytes",
    "out_of_memory",
    "row_limit",
    "rows_that_fit",
    "step_bytes",
]

T = TypeVar("T")

#: fp32 copies of a weight in a training step: weight, offset, its gradient and mean
#: square, scaled, divided, quantised and its gradient
WEIGHT_COPIES = 8
#: bytes per input and output of a linear that the backward pass keeps
ACTIVATION_BYTES = 12
#: fp32 logits and log-probabilities of student and teacher, and their gradient
LOGIT_COPIES = 5
USABLE_SHARE = 0.9


class RowLimit:
    """
    Rows per forward pass. Larger batches are cut into pieces whose gradients add up.

    :param rows: at most, at first
    :param advice: what to change when one row is too much
    """

    def __init__(self, rows: int, advice: str = "Take a larger device."):
        self.rows = rows
        self.advice = advice
        self.reproducible = True

    def pieces(self, batch: list[int]) -> Iterator[list[int]]:
        for start in range(0, len(batch), self.rows):
            yield batch[start : start + self.rows]

    def run(self, work: Callable[[], T], undo: Callable[[], None] = lambda: None) -> T:
        """
        Result of ``work``, tried again with half the rows when memory runs out. It is
        deterministic unless the model has an operation that cannot be.

        :param undo: puts back what an attempt that failed has changed
        :raises MemoryError: if one row is too much
        """
        while True:
            try:
                with deterministic() if self.reproducible else nullcontext():
                    return work()
            except (MemoryError, RuntimeError) as error:
                reason = str(error).partition("\n")[0]
                unordered = self.reproducible and "deterministic" in reason
                if not unordered and not out_of_memory(error):
                    raise
            undo()
            if unordered:
                self.reproducible = False
                logger.warning(f"Two runs on this GPU may differ in bits: {reason}")
                continue
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if self.rows == 1:
                raise MemoryError(
                    f"One calibration row at a time does not fit in memory ({reason}). "
                    f"{self.advice}"
                )
            self.rows //= 2
            logger.warning(
                f"Out of memory: {self.rows} rows at a time from now on, with the "
                "same batch_size."
            )


def out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine had no memory left."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return "out of memory" in text or "can't allocate memory" in text


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be had on a device, None if that cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    found = [_available(), _left_of_group()]
    return min((number for number in found if number is not None), default=None)


def _available() -> int | None:
    """MemAvailable of Linux."""
    path = Path("/proc/meminfo")
    if not path.is_file():
        return None
    for line in path.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _left_of_group() -> int | None:
    """What the container's limit leaves; page cache counts as used, but is not."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        counts = (folder / "memory.stat").read_text().split()
    except (OSError, ValueError):
        return None
    if limit == "max":
        return None
    cache = dict(zip(counts[::2], counts[1::2], strict=False)).get("inactive_file", "0")
    return int(limit) - used + int(cache)


def row_limit(
    model: nn.Module,
    windows: Iterable[Iterable[tuple[nn.Module, Iterable[str]]]],
    longest: int,
    batch_size: int,
    compares_logits: bool,
    device: torch.device,
) -> RowLimit:
    """
    As many rows at a time as a training step is estimated to have room for.

    :param windows: layers that learn together, each with the names of its linears
    :param longest: tokens of the longest row
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    logits = JUDGED_TOKENS * len(head.weight) if compares_logits and head else 0
    spans = [list(window) for window in windows]
    linears: list[list[nn.Linear]] = [
        [layer.get_submodule(name) for layer, names in window for name in names]  # type: ignore[misc]
        for window in spans
    ]
    fixed, each = step_bytes(linears, longest, logits)
    rows = rows_that_fit(batch_size, fixed, each, free_bytes(device))
    logits *= 4 * LOGIT_COPIES
    every = {linear for window in linears for linear in window}
    codes = sum(linear.weight.numel() for linear in every) if compares_logits else 0
    said = advice(max(map(len, spans), default=0), fixed - logits, each, logits + codes)
    return RowLimit(rows, said)


def advice(layers: int, weights: int, row: int, closing: int) -> str:
    """
    What to change when a step with one row does not fit, the largest part first.

    :param layers: of the widest window
    :param weights: bytes of what is learned in it
    :param row: bytes of a row's activations
    :param closing: bytes of all codes and of the logits that the closing pass compares
    """
    if layers > 2:
        narrower = f"{layers} layers: lower shallow_layers and deep_layers"
    else:
        narrower = f"{layers} layers: window_size: 1, or rounding_travel: 0"
    parts = [
        (weights, f"weights that learn together in a window of {narrower}"),
        (row, "activations of one row: give shorter rows"),
        (closing, "codes and logits in the closing pass: closing_epochs: 0"),
    ]
    large = sorted((part for part in parts if part[0]), reverse=True)
    total = sum(size for size, _ in large)
    said = [f"{_gib(size)} of {what}" for size, what in large if size >= total / 8]
    return f"A step is estimated to take {'; '.join(said)}. Or take a larger device."


def step_bytes(
    windows: Iterable[Iterable[nn.Linear]], tokens: int, logits: int
) -> tuple[int, int]:
    """
    Estimate of a training step's memory: fixed bytes, and bytes per row.

    Scores of attention are left out: fused kernels do not keep them.

    :param windows: linears that learn together
    :param tokens: of the longest row
    :param logits: compared at a time, 0 for none
    """
    fixed = each = 0
    for linears in windows:
        weights = channels = 0
        for linear in linears:
            weights += linear.weight.numel()
            channels += linear.in_features + linear.out_features
        fixed = max(fixed, weights * 4 * WEIGHT_COPIES)
        each = max(each, channels * tokens * ACTIVATION_BYTES)
    return fixed + logits * 4 * LOGIT_COPIES, each


def rows_that_fit(batch_size: int, fixed: int, each: int, free: int | None) -> int:
    """``batch_size``, halved until a step fits in ``free`` bytes; at least one row."""
    if free is None:
        return batch_size
    rows = batch_size
    while rows > 1 and fixed + rows * each > USABLE_SHARE * free:
        rows //= 2
    if fixed + rows * each > USABLE_SHARE * free:
        logger.warning(
            f"A step with one row is estimated to take {_gib(fixed + each)}, and "
            f"{_gib(free)} are free; it may run out of memory."
        )
    elif rows < batch_size:
        logger.info(
            f"A step of {batch_size} rows is estimated to take "
            f"{_gib(fixed + batch_size * each)}, and {_gib(free)} are free: "
            f"{rows} rows at a time, with the same batch_size."
        )
    return rows


def _gib(number: float) -> str:
    return f"{number / 2**30:.1f} GiB"
