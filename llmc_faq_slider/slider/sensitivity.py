"""How much a model's output suffers when one decoder layer alone is quantised.

SliderQuant's windows rest on an observation: quantising a shallow or a deep layer hurts
more than quantising one in the middle, and the first and the last hurt most. Here that
is measured for one model in one number format. The measure is ours.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from llmc_faq_slider.slider.head import OutputHead, missing_distribution
from llmc_faq_slider.slider.quantizer import WeightGrid
from llmc_faq_slider.slider.stream import (
    capture_decoder,
    replaced_forwards,
    row_batches,
)
from llmc_faq_slider.slider.student import LinearGrids

__all__ = [
    "LayerSensitivity",
    "Sensitivity",
    "measure_sensitivity",
    "rounded_to_nearest",
    "sample_rows",
]

#: rows, and tokens of a row: enough to tell the sensitive layers from the others
ROWS = 8
TOKENS = 128
#: tokens whose hidden states of every layer and log-probabilities are held at a time
BATCH_TOKENS = 1024


@dataclass(frozen=True)
class LayerSensitivity:
    """
    What quantising one decoder layer alone does to the model's output.

    :param kl: Kullback-Leibler divergence from the full-precision next-token
        distribution, mean over tokens, in nats
    :param loss_increase: increase of the next-token loss, mean over tokens, in nats
    """

    kl: float
    loss_increase: float


@dataclass(frozen=True)
class Sensitivity:
    """
    :param loss: full-precision next-token loss, mean over tokens, in nats
    :param layers: one entry per decoder layer; zeros for a layer without formats
    """

    loss: float
    layers: list[LayerSensitivity]


def sample_rows(
    rows: list[Tensor], count: int = ROWS, tokens: int = TOKENS
) -> list[Tensor]:
    """
    At most ``count`` rows, evenly spaced over ``rows``, cut to ``tokens`` tokens.

    :param rows: int64 ``[length]`` each
    """
    count = min(count, len(rows))
    return [rows[i * len(rows) // count][:tokens] for i in range(count)]


@torch.no_grad()
def measure_sensitivity(
    model: nn.Module,
    layers: list[nn.Module],
    rows: list[Tensor],
    grids: Mapping[int, Mapping[str, LinearGrids]],
    device: torch.device,
) -> Sensitivity:
    """
    Round the linears of each decoder layer alone to nearest and compare the outputs.

    The hidden states in front of every layer are computed once, and only the layers
    behind the quantised one again: about L^2 / 2 layer passes for L layers. The model
    is left as it was.

    :param model: causal language model in evaluation mode
    :param layers: its decoder layers in order
    :param rows: token ids ``[length]`` without padding, two or more each
    :param grids: number formats by layer index and name of linear within the layer
    :param device: where the layers compute
    :raises ValueError: if the layers are no plain chain, or outputs are not finite
    """
    hidden, calls = capture_decoder(model, layers, rows, device)
    missing = missing_distribution(model, calls)
    if missing:
        raise ValueError(
            f"Sensitivity is measured on next-token distributions, and {missing}. Give "
            "shallow_layers and deep_layers as numbers."
        )
    head = OutputHead(model, calls)
    lengths = [len(row) for row in rows]
    predicted = sum(lengths) - len(rows)
    size = max(1, BATCH_TOKENS // max(lengths))
    batches = list(row_batches(lengths, size, [*range(len(rows))]))
    full_precision = 0.0
    kl = dict.fromkeys(grids, 0.0)
    loss = dict.fromkeys(grids, 0.0)
    passes = len(batches) * sum(len(layers) - index for index in grids)
    with tqdm(total=passes, unit="layer-pass", desc="sensitivity") as bar:
        for batch in batches:
            ids = [rows[i].to(device) for i in batch]
            states = [torch.cat([hidden[i] for i in batch]).to(device)]
            for index in range(len(layers)):
                states.append(calls.run(index, states[-1]))
            expected = [
                head.log_probabilities(state.unsqueeze(0))[0] for state in states[-1]
            ]
            full_precision += sum(map(_loss, expected, ids))
            for index, formats in grids.items():
                with rounded_to_nearest(layers[index], formats):
                    output = calls.run(index, states[index])
                output = calls.run_span(range(index + 1, len(layers)), output)
                for row, state, reference in zip(ids, output, expected, strict=True):
                    found = head.log_probabilities(state.unsqueeze(0))[0]
                    kl[index] += _divergence(reference, found)
                    loss[index] += _loss(found, row)
                bar.update(len(layers) - index)
    full_precision /= predicted
    measured = [LayerSensitivity(0.0, 0.0)] * len(layers)
    for index in grids:
        measured[index] = LayerSensitivity(
            kl[index] / sum(lengths), loss[index] / predicted - full_precision
        )
    _check_finite(full_precision, measured)
    return Sensitivity(full_precision, measured)


@contextmanager
def rounded_to_nearest(
    layer: nn.Module, grids: Mapping[str, LinearGrids]
) -> Iterator[None]:
    """
    Context in which linears of a layer compute in their formats, without any learning.

    :param grids: number formats by name of linear within the layer
    """
    forwards: dict[nn.Module, Callable[..., Any]] = {}
    for name, formats in grids.items():
        linear = layer.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        forwards[linear] = _rounded_forward(linear, formats)
    with replaced_forwards(forwards):
        yield


def _rounded_forward(linear: nn.Linear, grids: LinearGrids) -> Callable[..., Tensor]:
    weight = _rounded_weight(linear.weight.detach(), grids.weight)
    bias = linear.bias

    def forward(x: Tensor) -> Tensor:
        quantized = x if grids.input is None else grids.input.fake_quantize(x)
        return F.linear(quantized, weight, bias)

    return forward


def _rounded_weight(weight: Tensor, grid: WeightGrid) -> Tensor:
    """Weight ``[out, in]`` as a checkpoint of its dtype would restore it."""
    precise = weight.float()
    scale, zero_point = grid.qparams(*grid.bounds(precise))
    return grid.fake_quantize(precise, scale, zero_point).to(weight.dtype)


def _divergence(reference: Tensor, found: Tensor) -> float:
    """Sum over tokens of KL(reference || found), of log-probabilities."""
    return F.kl_div(found, reference, reduction="sum", log_target=True).item()


def _loss(log_probabilities: Tensor, row: Tensor) -> float:
    """Sum over the tokens behind the first of their negative log-likelihood."""
    return F.nll_loss(log_probabilities[:-1], row[1:], reduction="sum").item()


def _check_finite(loss: float, layers: list[LayerSensitivity]) -> None:
    if not isfinite(loss):
        raise ValueError(
            f"The full-precision model's loss is {loss}, so nothing can be compared "
            "with it. Load the model in bfloat16 or float32."
        )
    for index, layer in enumerate(layers):
        if not isfinite(layer.kl):
            raise ValueError(
                f"The output is not finite when decoder layer {index} is quantised. "
                "Load the model in bfloat16 or float32."
            )
