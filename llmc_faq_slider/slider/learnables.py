"""What a window learns: low-rank update, weight clipping and channel scales.

Each kind is one small class with the same three steps: it *starts* from the model as it
is, *applies* itself to the weights with gradients while a window trains, and *folds*
into plain tensors when its layer is committed (folding is applying without gradients).

Source: SliderQuant §3.3 and eq. (2) for the low-rank update and the channel scales;
the clipping comes from the released code (it follows OmniQuant).
"""

import math
from itertools import product
from typing import Literal

import torch
from torch import Tensor

from llmc_faq_slider.slider.quantizer import WeightGrid

__all__ = [
    "ChannelScale",
    "Clipping",
    "Kind",
    "LowRank",
    "NormChannelScale",
    "RoundingOffset",
]

Kind = Literal["rounding", "low_rank", "clipping", "channel_scale"]

MIN_CHANNEL_SCALE = 1e-2
# sigmoid(6) keeps 99.75 % of the range: less than half a step of an 8-bit grid.
MAX_CLIP_LOGIT = 6.0
SEARCHED_SHARES = torch.linspace(0.40, 1.0, 16)


class LowRank:
    """
    ``weight + (1 / rank) B A``, B starts at zero (eq. 2; the factor is the code's).

    :param weight: fp32 ``[out, in]``
    """

    kind: Kind = "low_rank"

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator):
        out_features, in_features = weight.shape
        bound = 1 / math.sqrt(in_features)
        start = torch.rand(rank, in_features, generator=generator) * 2 * bound - bound
        self.down = start.to(weight.device).requires_grad_()
        self.up = weight.new_zeros(out_features, rank).requires_grad_()
        self.rank = rank

    def parameters(self) -> list[Tensor]:
        return [self.down, self.up]

    def apply(self, weight: Tensor) -> Tensor:
        return torch.addmm(weight, self.up, self.down, alpha=1 / self.rank)


class RoundingOffset:
    """
    Offset of every weight before rounding, in steps of its grid, within one half.

    Departure: eq. (2) has no such term. The low-rank update moves whole rows and
    columns; this lets each weight round the other way, as AutoRound does.

    :param weight: fp32 ``[out, in]``
    """

    kind: Kind = "rounding"

    def __init__(self, weight: Tensor):
        self.offset = torch.zeros_like(weight).requires_grad_()

    def parameters(self) -> list[Tensor]:
        return [self.offset]


class Clipping:
    """
    Shares ``sigmoid(logit)`` of a group's range that its quantisation grid spans.

    Departure: the released code starts all logits at 4.0 (98.2 %); here the start is
    the share with the least error, weighted by how strongly each input is excited, as
    in AutoRound's optimised round-to-nearest.

    :param weight: fp32 ``[out, in]``
    :param importance: fp32 ``[in]``, mean square of each input channel
    """

    kind: Kind = "clipping"

    def __init__(self, weight: Tensor, grid: WeightGrid, importance: Tensor):
        self.grid = grid
        share, self.sign = searched_start(weight, grid, importance)
        logit = torch.logit(share).clamp(max=MAX_CLIP_LOGIT)
        self.upper = logit.clone().requires_grad_()
        self.lower = None if grid.symmetric else logit.clone().requires_grad_()

    def parameters(self) -> list[Tensor]:
        return [p for p in (self.upper, self.lower) if p is not None]

    def apply(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """
        :return: scale and zero point ``[out, groups]`` for the clipped range
        """
        lower, upper = self.grid.bounds(weight)
        lower_logit = self.upper if self.lower is None else self.lower
        scale, zero_point = self.grid.qparams(
            torch.sigmoid(lower_logit) * lower, torch.sigmoid(self.upper) * upper
        )
        return scale * self.sign, zero_point


@torch.no_grad()
def searched_start(
    weight: Tensor, grid: WeightGrid, importance: Tensor
) -> tuple[Tensor, Tensor]:
    """
    Share of each group's range, and sign of its scale, with the least input-weighted
    rounding error.

    :return: two fp32 tensors ``[out, groups]``, in (0, 1) and 1 or -1
    """
    lower, upper = grid.bounds(weight)
    best_error = torch.full_like(lower, torch.inf)
    best_share = torch.ones_like(lower)
    best_sign = torch.ones_like(lower)
    for share, sign in product(SEARCHED_SHARES.tolist(), grid.scale_signs):
        scale, zero_point = grid.qparams(share * lower, share * upper)
        quantized = grid.fake_quantize(weight, sign * scale, zero_point)
        error = (quantized - weight).square_().mul_(importance)
        error = grid.grouped(error).sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_share = torch.where(better, share, best_share)
        best_sign = torch.where(better, sign, best_sign)
    return best_share.clamp(max=1 - 1e-6), best_sign


@torch.no_grad()
def smoothing_start(
    importance: Tensor, weights: list[Tensor], strength: float
) -> Tensor:
    """
    Channel scales that share the spread of a linear's inputs with its weights, as
    SmoothQuant does (arXiv 2211.10438, eq. 4), with root mean squares for maxima.

    :param importance: mean square of each input channel ``[in]``
    :param weights: of the linears that read the inputs, ``[out, in]`` each
    :param strength: 0 for scales of one, 1 for inputs of one size
    :return: fp32 ``[in]``, geometric mean one
    """
    if not strength:
        return torch.ones_like(importance)
    largest = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    scale = importance.sqrt().pow(strength) / largest.pow(1 - strength)
    usable = torch.isfinite(scale) & (scale > 0)
    scale = torch.where(usable, scale, 1.0).log()
    scale = torch.where(usable, scale - scale[usable].mean(), 0.0).exp()
    return scale.clamp(MIN_CHANNEL_SCALE, 1 / MIN_CHANNEL_SCALE)


class ChannelScale:
    """
    Scale per channel between a producing and a consuming linear, v→o or up→down.

    The producer's rows are divided by it, the consumer's columns multiplied, which
    leaves the full-precision function unchanged. Query heads that share a value head
    share its scales, since all of them read the same rows of the producer.

    :param start: where the scales start, fp32 ``[channels]``, one per output channel
        of the producer that is scaled
    :param head_dim: channels per head where query heads share value heads
    :param repeats: query heads per value head
    :param outputs: output channels of the producer
    :param channels: indices of those that are scaled
    """

    kind: Kind = "channel_scale"

    def __init__(
        self,
        start: Tensor,
        head_dim: int | None,
        repeats: int,
        outputs: int,
        channels: list[int],
    ):
        self.start = start
        self.factor = torch.ones_like(start).requires_grad_()
        self.head_dim = head_dim
        self.repeats = repeats
        self.outputs = outputs
        self.channels = torch.tensor(channels, device=start.device)

    def parameters(self) -> list[Tensor]:
        return [self.factor]

    def scale(self) -> Tensor:
        return self.start * floored(self.factor)

    def divisor(self) -> Tensor:
        """What the producer's rows are divided by, ``[outputs]``."""
        scale = self.scale()
        if len(scale) == self.outputs:
            return scale
        return scale.new_ones(self.outputs).index_copy(0, self.channels, scale)

    def multiplier(self) -> Tensor:
        """What the consumer's columns are multiplied by, ``[channels * repeats]``."""
        scale = self.scale()
        if self.head_dim is None:
            return scale
        heads = scale.unflatten(0, (-1, self.head_dim))
        return heads.repeat_interleave(self.repeats, dim=0).flatten()


class NormChannelScale:
    """
    Scale per channel between a norm and the linears that read it.

    The norm's gain, and a LayerNorm's bias, are divided by it. The divided gain is
    rounded to the dtype in which the norm is stored, and the consumers are multiplied
    by what that rounding left, so that storing the fold changes nothing.

    :param stored: the norm's ``weight`` parameter ``[hidden]``
    :param offset: what the norm adds to its stored weight: 1 for Gemma, else 0
    :param start: where the scales start, fp32 ``[hidden]``
    """

    kind: Kind = "channel_scale"

    def __init__(self, stored: Tensor, offset: float, start: Tensor):
        self.dtype = stored.dtype
        self.offset = offset
        self.gain = stored.detach().float() + offset
        self.start = start
        self.factor = torch.ones_like(start).requires_grad_()

    def parameters(self) -> list[Tensor]:
        return [self.factor]

    def scale(self) -> Tensor:
        return self.start * floored(self.factor)

    def folded(self) -> Tensor:
        """The norm's new stored weight, fp32 values that its dtype can hold."""
        divided = self.gain / self.scale() - self.offset
        return divided + (divided.to(self.dtype).float() - divided).detach()

    def multiplier(self) -> Tensor:
        """What divides the norm's output and multiplies the consumers' columns."""
        gain = self.folded() + self.offset
        # A channel whose gain is zero stays zero under every scale.
        usable = (gain.abs() > 0) & (self.gain.abs() > 0)
        return torch.where(
            usable, self.gain / torch.where(usable, gain, 1.0), self.scale()
        )


def floored(scale: Tensor) -> Tensor:
    return scale.clamp(min=MIN_CHANNEL_SCALE)
