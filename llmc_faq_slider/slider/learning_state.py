"""What learning is told, what it reaches, and how far it is."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from llmc_faq_slider.slider.learnables import Kind
from llmc_faq_slider.slider.windows import Window

__all__ = [
    "UNFINISHED",
    "Learned",
    "LearningSettings",
    "Progress",
    "Stopped",
    "Unfinished",
    "WindowResult",
    "layer_role",
]

UNFINISHED = "window"


@dataclass(frozen=True)
class LearningSettings:
    """
    :param ratio: intra-layer ratio γ; ``1 / γ`` stages, 1.0 for a single one
    :param epochs: passes over the calibration rows per window, shared by its stages
    :param batch_size: rows per optimiser step
    :param low_rank: rank of the low-rank update, 0 for none
    :param rounding_travel: how far a rounding offset can travel in a layer's
        first window, per stage, in steps of the weight grid; 0 learns no offsets
    :param channel_scales: learn channel scales where they fold; ``auto`` does so in
        layers with quantised inputs
    :param smoothing_strength: share of the spread of a linear's inputs that its channel
        scales move into its weights at the start
    :param learning_rates: AdamW's first learning rate per kind of learnable; it decays
        linearly to zero within each window and stage
    :param visit_decay: at the k-th visit of a layer, ``k^-visit_decay`` of its rates
    :param compute_dtype: dtype of the student's matrix products
    :param seed: seeds low-rank starts and the order of rows
    """

    ratio: float
    epochs: int
    batch_size: int
    low_rank: int
    rounding_travel: float
    channel_scales: bool | Literal["auto"]
    smoothing_strength: float | Literal["auto"]
    learning_rates: dict[Kind, float]
    visit_decay: float
    compute_dtype: torch.dtype
    seed: int


@dataclass
class WindowResult:
    """
    What one window reached.

    :param loss: what it lowered, see :func:`output_loss`
    :param kept_start: its end was no better, so the start was kept
    :param retries: times it began anew at a lower rate after a loss that was not finite
    """

    window: Window
    start_loss: float
    loss: float
    seconds: float
    kept_start: bool = False
    retries: int = 0


@dataclass
class Unfinished:
    """
    A window between two optimiser steps.

    :param attempt: times it began anew before
    :param stage: number of the intra-layer stage
    :param step: optimiser steps done in that stage
    :param seconds: spent on it
    :param scaler: state of the gradient scaler
    :param tensors: learned tensors and optimiser states
    """

    attempt: int
    stage: int
    step: int
    seconds: float
    scaler: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)


class Stopped(Exception):
    """Training stopped between two steps, as it was asked to."""

    def __init__(self, unfinished: Unfinished):
        super().__init__("stopped between two steps")
        self.unfinished = unfinished


@dataclass
class Learned:
    """
    :param windows: one result per window, of its last stage
    :param outputs: full-precision output of the last layer per row
    :param fold_errors: how far each committed layer's output is from the student's,
        relative to its square
    :param left_out: sentences on places that channel scales do not fold at
    """

    windows: list[WindowResult]
    outputs: list[Tensor]
    fold_errors: dict[int, float] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


@dataclass
class Progress:
    """
    How far a walk is.

    :param windows: finished
    :param rows: per forward pass
    """

    windows: int
    rows: int
    results: list[WindowResult]

    def record(self, unfinished: Unfinished | None = None) -> dict[str, Any]:
        """JSON-like; tensors are saved apart from it."""
        record = asdict(self)
        if unfinished is not None:
            record[UNFINISHED] = asdict(unfinished) | {"tensors": {}}
        return record

    @classmethod
    def read(cls, record: dict[str, Any]) -> "Progress":
        results = [
            WindowResult(**(result | {"window": Window(**result["window"])}))
            for result in record["results"]
        ]
        return cls(record["windows"], record["rows"], results)


def layer_role(index: int) -> str:
    return f"layer-{index:04d}"
