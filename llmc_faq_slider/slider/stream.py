"""Hidden states on their way through the decoder layers.

A stream holds one hidden-state tensor per calibration row, always in front of the same
decoder layer. Slider moves two of them through the model: one through full-precision
layers, one through the quantised ones.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmc_faq_slider.slider.rows import check_rows, warn_of_idle_experts

__all__ = [
    "DecoderCalls",
    "capture_decoder",
    "epoch_batches",
    "layer_output",
    "replaced_forwards",
    "row_batches",
]


@dataclass
class DecoderCalls:
    """
    How the model calls its decoder layers, apart from the hidden states.

    Rows are unpadded, so masks, rotary embeddings and positions depend on the row
    length alone.

    :param arguments: positional and keyword arguments by row length, then by layer
    """

    layers: list[nn.Module]
    arguments: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]]

    def run(self, index: int, hidden: Tensor) -> Tensor:
        """
        Output of decoder layer ``index``, whatever is installed in it.

        :param hidden: ``[rows, length, hidden]``
        """
        args, kwargs = self.arguments[hidden.shape[1]][index]
        return layer_output(self.layers[index](hidden, *args, **kwargs))

    def run_span(self, span: range, hidden: Tensor) -> Tensor:
        for index in span:
            hidden = self.run(index, hidden)
        return hidden


class _StopForward(Exception):
    """Ends a forward pass whose remaining layers are not needed."""


def layer_output(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def capture_decoder(
    model: nn.Module, layers: list[nn.Module], rows: list[Tensor], device: torch.device
) -> tuple[list[Tensor], DecoderCalls]:
    """
    Input of the first decoder layer for every row, and how the layers are called.

    :param model: causal language model; called with ``input_ids`` and no cache
    :param layers: its decoder layers in order
    :param rows: token ids ``[length]`` without padding
    :return: hidden states ``[1, length, hidden]`` per row, in the model's dtype, on the
        CPU, and the calls
    :raises ValueError: if the model cannot read the rows; if a layer's input is not
        finite, not the output of the layer before it, has another shape, or a layer is
        given anything else that depends on the tokens
    """
    check_rows(model, rows)
    warn_of_idle_experts(model, rows, device)
    arguments: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
    hidden: list[Tensor] = []
    previous: list[Tensor] = []

    def first_layer(_module: nn.Module, args: Any, kwargs: Any) -> None:
        kwargs = dict(kwargs)
        states = args[0] if args else kwargs.pop("hidden_states")
        if states.ndim != 3:
            raise ValueError(
                "The decoder layers take hidden states of shape "
                f"{list(states.shape)}, not [rows, tokens, hidden]. SliderQuant needs "
                "a plain chain of decoder layers; this architecture is not supported."
            )
        hidden.append(states.detach().to("cpu", copy=True))
        known = arguments.setdefault(states.shape[1], [])
        if known and not _same(known[0], (args[1:], kwargs)):
            raise ValueError(
                "The decoder layers are given more than hidden states that depends on "
                "the tokens. SliderQuant needs a plain chain of decoder layers; this "
                "architecture is not supported."
            )
        if known:
            raise _StopForward

    def every_layer(_module: nn.Module, args: Any, kwargs: Any) -> None:
        kwargs = dict(kwargs)
        states = args[0] if args else kwargs.pop("hidden_states")
        calls = arguments[states.shape[1]]
        if calls and not torch.isfinite(states).all():
            raise ValueError(
                f"The output of decoder layer {len(calls) - 1} is not finite in "
                f"{states.dtype}. Load the model in bfloat16 or float32; if it is, its "
                "weights are broken."
            )
        if calls and not torch.equal(states, previous[-1]):
            raise ValueError(
                f"Decoder layer {len(calls)} does not take the output of layer "
                f"{len(calls) - 1} as it is. SliderQuant needs a plain chain of "
                "decoder layers; this architecture is not supported."
            )
        calls.append((args[1:], kwargs))

    def keep_output(_module: nn.Module, _args: Any, output: Any) -> None:
        previous[:] = [layer_output(output)]

    def last_layer(_module: nn.Module, _args: Any, _output: Any) -> None:
        raise _StopForward

    handles = [layers[0].register_forward_pre_hook(first_layer, with_kwargs=True)]
    for layer in layers:
        handles.append(layer.register_forward_pre_hook(every_layer, with_kwargs=True))
        handles.append(layer.register_forward_hook(keep_output))
    handles.append(layers[-1].register_forward_hook(last_layer))
    try:
        for row in rows:
            try:
                model(input_ids=row.unsqueeze(0).to(device), use_cache=False)
            except _StopForward:
                continue
    finally:
        for handle in handles:
            handle.remove()
    return hidden, DecoderCalls(layers, arguments)


def _same(before: Any, now: Any) -> bool:
    """Whether all tensors in two nested arguments are equal."""
    if isinstance(before, Tensor):
        return isinstance(now, Tensor) and torch.equal(before, now)
    if isinstance(before, dict):
        return before.keys() == now.keys() and all(
            _same(value, now[key]) for key, value in before.items()
        )
    if isinstance(before, list | tuple):
        return len(before) == len(now) and all(map(_same, before, now))
    return True


def row_batches(
    lengths: list[int], batch_size: int, order: list[int]
) -> Iterator[list[int]]:
    """
    Row indices in batches of at most ``batch_size`` rows of one length.

    :param order: the rows in the order in which they are to be seen
    """
    by_length: dict[int, list[int]] = {}
    for index in order:
        batch = by_length.setdefault(lengths[index], [])
        batch.append(index)
        if len(batch) == batch_size:
            yield by_length.pop(lengths[index])
    yield from by_length.values()


def epoch_batches(
    lengths: list[int], batch_size: int, epochs: int, seed: int
) -> list[list[int]]:
    """:func:`row_batches` of all rows, shuffled anew for every epoch."""
    generator = torch.Generator().manual_seed(seed)
    return [
        batch
        for _ in range(epochs)
        for batch in row_batches(
            lengths,
            batch_size,
            torch.randperm(len(lengths), generator=generator).tolist(),
        )
    ]


@contextmanager
def replaced_forwards(
    forwards: Mapping[nn.Module, Callable[..., Any]],
) -> Iterator[None]:
    before = {module: module.__dict__.get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, original in before.items():
            if original is None:
                del module.__dict__["forward"]
            else:
                module.forward = original
