"""Hidden states on their way through the decoder layers.

A stream holds one hidden-state tensor per calibration row, always in front of the same
decoder layer. Slider moves two of them through the model: one through full-precision
layers, one through the quantised ones.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from llmc_faq_slider.slider.dry_pass import (
    DRY_TOKENS,
    DryPass,
    Linears,
    dry_pass,
    not_supported,
)
from llmc_faq_slider.slider.forwards import (
    Arguments,
    fresh,
    layer_output,
    replaced_forwards,
    same_arguments,
    same_output,
    split_hidden,
)
from llmc_faq_slider.slider.rows import check_rows

__all__ = [
    "DecoderCalls",
    "capture_decoder",
    "epoch_batches",
    "layer_output",
    "pass_rows",
    "replaced_forwards",
    "row_batches",
]


class _StopForward(Exception):
    """Ends a forward pass whose remaining layers are not needed."""


class DecoderCalls:
    """
    How the model calls its decoder layers, apart from the hidden states.

    Rows are unpadded, so masks, rotary embeddings and positions depend on the length of
    rows and on their number alone. The model itself makes them, with its decoder layers
    passed over.

    :param dry: what one row met in the layers
    """

    def __init__(
        self,
        model: nn.Module,
        layers: list[nn.Module],
        dry: DryPass,
        device: torch.device,
    ):
        self.model = model
        self.layers = layers
        self.dry = dry
        self.device = device
        self._known: dict[tuple[int, int], list[Arguments]] = {}

    def arguments(self, rows: int, length: int) -> list[Arguments]:
        """Arguments of every layer for a batch of this shape."""
        if (rows, length) not in self._known:
            ids = torch.zeros(rows, length, dtype=torch.long, device=self.device)
            self._known[rows, length] = self.enter(ids)[1]
        return self._known[rows, length]

    def run(self, index: int, hidden: Tensor) -> Tensor:
        """
        Output of decoder layer ``index``, whatever is installed in it.

        :param hidden: ``[rows, length, hidden]``
        """
        return layer_output(self.whole_output(index, hidden))

    def whole_output(self, index: int, hidden: Tensor) -> Any:
        """The same with whatever the layer returns beside hidden states."""
        args, kwargs = fresh(self.arguments(*hidden.shape[:2])[index])
        return self.layers[index](hidden, *args, **kwargs)

    def run_span(self, span: range, hidden: Tensor) -> Tensor:
        for index in span:
            hidden = self.run(index, hidden)
        return hidden

    def result(self, index: int, hidden: Tensor) -> Any:
        """What layer ``index`` would return around hidden states of any shape."""
        tail = self.dry.tails[index]
        if tail is None:
            return hidden
        zeros = (torch.zeros_like(x) if isinstance(x, Tensor) else x for x in tail)
        return (hidden, *zeros)

    @torch.no_grad()
    def enter(self, ids: Tensor) -> tuple[Tensor, list[Arguments]]:
        """
        Input of the first layer, and arguments of every layer, none of which runs.

        :param ids: token ids ``[rows, length]``
        """
        arguments: list[Arguments] = []
        first: list[Tensor] = []

        def passed_over(*args: Any, **kwargs: Any) -> Any:
            states, call = split_hidden(args, kwargs)
            first.append(states)
            arguments.append(call)
            if len(arguments) == len(self.layers):
                raise _StopForward
            return self.result(len(arguments) - 1, states)

        with replaced_forwards(dict.fromkeys(self.layers, passed_over)):
            try:
                self.model(input_ids=ids, use_cache=False)
            except _StopForward:
                pass
        return first[0], arguments


@torch.no_grad()
def capture_decoder(
    model: nn.Module,
    layers: list[nn.Module],
    rows: list[Tensor],
    device: torch.device,
    linears: Linears | None = None,
) -> tuple[list[Tensor], DecoderCalls]:
    """
    Input of the first decoder layer for every row, and how the layers are called.

    :param model: causal language model; called with ``input_ids`` and no cache
    :param layers: its decoder layers in order
    :param rows: token ids ``[length]`` without padding
    :param linears: what will be quantised, by layer index and name; None for nothing
    :return: hidden states ``[1, length, hidden]`` per row, in the model's dtype, on the
        CPU, and the calls
    :raises ValueError: if the model cannot read the rows, for what :func:`dry_pass`
        finds, or if a layer is given anything else that depends on the tokens
    """
    check_rows(model, rows)
    short = max(rows, key=len)[:DRY_TOKENS].unsqueeze(0).to(device)
    calls = DecoderCalls(
        model, layers, dry_pass(model, layers, short, linears or {}), device
    )
    _check_chain(calls, short)
    hidden = []
    for row in rows:
        ids = row.unsqueeze(0).to(device)
        states, arguments = calls.enter(ids)
        if not same_arguments(calls.arguments(*ids.shape), arguments):
            raise _depends_on_tokens()
        hidden.append(states.to("cpu", copy=True))
    return hidden, calls


def _check_chain(calls: DecoderCalls, ids: Tensor) -> None:
    """
    Refuse layers that read what depends on tokens, such as what another layer left for
    them: one that was given more than it will be given has to compute the same without.
    """
    expected = calls.arguments(*ids.shape)
    states = calls.dry.states
    for index, given in enumerate(calls.dry.calls):
        if same_arguments(expected[index], given):
            continue
        try:
            alone = calls.run(index, states[index])
        except (LookupError, TypeError, AttributeError, ValueError, RuntimeError):
            raise _depends_on_tokens() from None
        if not same_output(alone, states[index + 1], exactly=True):
            raise _depends_on_tokens()
    calls.dry.states = [state.cpu() for state in states]


def _depends_on_tokens() -> ValueError:
    return not_supported(
        "The decoder layers are given more than hidden states that depends on the "
        "tokens."
    )


@torch.no_grad()
def pass_rows(
    calls: DecoderCalls, layers: range, rows: list[Tensor], size: int
) -> list[Tensor]:
    """
    Rows of hidden states behind some layers, on the CPU.

    :param rows: in front of them, ``[1, length, hidden]`` each
    :param size: rows at a time
    """
    results = list(rows)
    lengths = [row.shape[1] for row in rows]
    for batch in row_batches(lengths, size, [*range(len(rows))]):
        states = torch.cat([rows[i] for i in batch]).to(calls.device)
        output = calls.run_span(layers, states).cpu()
        for place, index in enumerate(batch):
            results[index] = output[place : place + 1]
    return results


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
