"""What a model makes of its last decoder layer's output."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmc_faq_slider.slider.forwards import replaced_forwards
from llmc_faq_slider.slider.stream import DecoderCalls

__all__ = [
    "JUDGED_ROWS",
    "OutputHead",
    "divergences",
    "frozen",
    "missing_distribution",
]

# Rows that tell whether what was learned is better than what was there before.
JUDGED_ROWS = 16
# Tokens of a batch whose logits are compared; those of a whole batch can be gigabytes.
JUDGED_TOKENS = 1024
# Nats by which rounding never moves a next-token distribution.
SAME_DISTRIBUTION = 0.05


class OutputHead:
    """
    The model itself, called with its decoder layers passed over, so that final norm,
    logit scaling and capping are its own.
    """

    def __init__(self, model: nn.Module, calls: DecoderCalls):
        self.model = model
        self.calls = calls

    def log_probabilities(self, hidden: Tensor) -> Tensor:
        """
        Log-probabilities of the next token, differentiable in ``hidden``.

        :param hidden: output of the last decoder layer ``[rows, length, hidden]``; the
            head looks at one token at a time, so any tokens may stand in a row
        :return: fp32 ``[rows, length, vocabulary]``
        """

        def passing_over(index: int) -> Callable[..., Any]:
            return lambda *_args, **_kwargs: self.calls.result(index, tokens)

        # Rows of one token each, so that any number fits into the model's context. Only
        # the shape of the ids counts: the layers that would read them are passed over.
        tokens = hidden.flatten(0, 1).unsqueeze(1)
        ids = torch.zeros(tokens.shape[:2], dtype=torch.long, device=hidden.device)
        forwards = {x: passing_over(i) for i, x in enumerate(self.calls.layers)}
        with replaced_forwards(forwards):
            logits = self.model(input_ids=ids, use_cache=False).logits
        return (
            logits.float().log_softmax(dim=-1).unflatten(0, hidden.shape[:2])[:, :, 0]
        )


@torch.no_grad()
def missing_distribution(model: nn.Module, calls: DecoderCalls) -> str | None:
    """
    Why a model's output has no distribution per token that its last layer decides.

    :return: half a sentence, None if it has one
    """
    name, logits, hidden = type(model).__name__, calls.dry.logits, calls.dry.hidden
    if not isinstance(logits, Tensor):
        return f"{name} has no language head"
    if logits.shape[:-1] != hidden.shape[:-1]:
        return f"{name} has one output for a whole row"
    if logits.shape[-1] < 2:
        return f"{name} has a head of one label"
    try:
        with torch.enable_grad():
            start = hidden.flip(1).requires_grad_()
            found = OutputHead(model, calls).log_probabilities(start)
            torch.autograd.grad(found[..., 0].sum(), start)
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        return f"{name}'s head cannot be differentiated ({reason})"
    # In another order, since the head is to look at one token at a time.
    found = found.detach().flip(1)
    expected = logits.float().log_softmax(dim=-1)
    distance = F.kl_div(found, expected, reduction="none", log_target=True).sum(-1)
    if distance.mean() > SAME_DISTRIBUTION:
        return f"{name}'s output follows from more than its last decoder layer"
    return None


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
