"""Numbers of growing and shrinking windows, measured where they are ``auto``."""

from collections.abc import Mapping
from typing import Literal

import torch
from loguru import logger
from torch import Tensor, nn

from llmc_faq_slider.slider.proposal import propose_windows
from llmc_faq_slider.slider.sensitivity import measure_sensitivity, sample_rows
from llmc_faq_slider.slider.student import LinearGrids

__all__ = ["end_windows"]

# L_s and L_d that the paper takes for all its models, which are deep ones.
PAPERS_ENDS = 4


def end_windows(
    shallow: int | Literal["auto"] | None,
    deep: int | Literal["auto"] | None,
    model: nn.Module,
    layers: list[nn.Module],
    rows: list[Tensor],
    grids: Mapping[int, Mapping[str, LinearGrids]],
    device: torch.device,
) -> tuple[int, int]:
    """
    Both numbers as they are, as the layers' sensitivity proposes, or the default.

    The default, where one is None, is the paper's 4. In a model of fewer than 16 layers
    it is a quarter of them, at least 1: with four at each end of eight no fixed window
    but one is left, which costs more time and loses more (docs/experiments.md).

    :param rows: token ids ``[length]``, of which a sample is measured on
    :param grids: number formats by layer index and name of linear
    :raises ValueError: see :func:`measure_sensitivity`
    """
    default = min(PAPERS_ENDS, max(1, len(layers) // 4))
    shallow = default if shallow is None else shallow
    deep = default if deep is None else deep
    if shallow != "auto" and deep != "auto":
        return shallow, deep
    measured = measure_sensitivity(model, layers, sample_rows(rows), grids, device)
    values = [layer.kl for layer in measured.layers]
    proposal = propose_windows(values)
    logger.info(
        f"SliderQuant: sensitivity proposes {proposal.shallow_layers} shallow and "
        f"{proposal.deep_layers} deep layers; KL in nats per token when one layer "
        f"alone is quantised: {', '.join(f'{value:.2g}' for value in values)}"
    )
    return (
        proposal.shallow_layers if shallow == "auto" else shallow,
        proposal.deep_layers if deep == "auto" else deep,
    )
