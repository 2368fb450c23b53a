"""What a model makes of its last decoder layer's output."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmc_faq_slider.slider.stream import DecoderCalls, replaced_forwards

__all__ = ["JUDGED_ROWS", "OutputHead", "divergences", "frozen"]

# Rows that tell whether what was learned is better than what was there before.
JUDGED_ROWS = 16
# Tokens of a batch whose logits are compared; those of a whole batch can be gigabytes.
JUDGED_TOKENS = 1024


class OutputHead:
    """
    The model itself, called with its decoder layers passed over, so that final norm,
    logit scaling and capping are its own.

    :param hidden: an input of the first layer, ``[1, length, hidden]``
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, calls: DecoderCalls, hidden: Tensor):
        self.model = model
        self.layers = calls.layers
        args, kwargs = calls.arguments[hidden.shape[1]][0]
        output = calls.layers[0](hidden, *args, **kwargs)
        # Some models' layers return a tuple and their loops take its first entry.
        self.wrapped = isinstance(output, tuple)

    def log_probabilities(self, hidden: Tensor) -> Tensor:
        """
        Log-probabilities of the next token, differentiable in ``hidden``.

        :param hidden: output of the last decoder layer ``[rows, length, hidden]``; the
            head looks at one token at a time, so any tokens may stand in a row
        :return: fp32 ``[rows, length, vocabulary]``
        """

        def passed_over(*_args: Any, **_kwargs: Any) -> Any:
            return (hidden,) if self.wrapped else hidden

        # Only their shape counts: the layers that would read them are passed over.
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        with replaced_forwards(dict.fromkeys(self.layers, passed_over)):
            logits = self.model(input_ids=ids, use_cache=False).logits
        return logits.float().log_softmax(dim=-1)


def divergences(
    head: OutputHead, output: Tensor, target: Tensor, mask: Tensor | None = None
) -> Tensor:
    """
    KL divergence of the next-token distribution from full precision, in nats.

    Departure from eq. (1): nothing follows the last layer that could make good what
    its hidden state lacks, and its directions do not count alike for the logits.

    :param output: last hidden states ``[rows, length, hidden]``
    :param mask: bool ``[rows, length]``, which tokens count; None for all
    :return: fp32 ``[1, tokens]`` of at most :data:`JUDGED_TOKENS` tokens that count,
        evenly spaced
    """
    tokens = output.shape[0] * output.shape[1]
    if mask is None:
        counted = torch.arange(tokens, device=output.device)
    else:
        counted = mask.flatten().nonzero().squeeze(-1)
    chosen = counted[:: max(1, -(-len(counted) // JUDGED_TOKENS))]
    with torch.no_grad():
        expected = head.log_probabilities(target.flatten(0, 1)[chosen].unsqueeze(0))
    found = head.log_probabilities(output.flatten(0, 1)[chosen].unsqueeze(0))
    return F.kl_div(found, expected, reduction="none", log_target=True).sum(-1)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Context in which no parameter of the model itself collects gradients."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
