"""How many growing and shrinking windows a model's sensitive layers call for.

The rule is ours; the paper takes 4 of each for every model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import median

__all__ = ["Proposal", "propose_windows"]

#: a layer stands out this many robust standard deviations above the middle ...
SPREADS = 3.0
#: ... and by this share of the middle's typical value, for middles that hardly vary
MARGIN = 0.5
#: makes the median absolute deviation of normal numbers their standard deviation
MAD_TO_SIGMA = 1.4826


@dataclass(frozen=True)
class Proposal:
    """
    :param shallow_layers: number of growing windows
    :param deep_layers: number of shrinking windows
    :param typical: median of the middle layers
    :param threshold: above it a layer counts as sensitive
    """

    shallow_layers: int
    deep_layers: int
    typical: float
    threshold: float


def propose_windows(values: Sequence[float]) -> Proposal:
    """
    Numbers of growing and shrinking windows for layers of the given sensitivity.

    A third of the layers, rounded down, may count as shallow, a third as deep. The
    layers between them are the middle. A layer is sensitive if its value lies above
    ``m + max(3 * 1.4826 * MAD, m / 2)``: m is the median of the middle, MAD the median
    absolute deviation from it. The shallow layers are the unbroken run of sensitive
    layers from the first on, the deep layers the run back from the last. Both are at
    least 1.

    :param values: one per decoder layer, first to last, at least one
    :raises ValueError: if there is none, or one is not finite
    """
    if not values:
        raise ValueError("propose_windows needs the value of at least one layer.")
    if not all(map(isfinite, values)):
        raise ValueError(
            "propose_windows needs finite values; found "
            f"{next(v for v in values if not isfinite(v))}."
        )
    at_most = max(1, len(values) // 3)
    middle = values[at_most : len(values) - at_most] or values
    typical = median(middle)
    spread = MAD_TO_SIGMA * median(abs(value - typical) for value in middle)
    threshold = typical + max(SPREADS * spread, MARGIN * abs(typical))

    def leading(run: Sequence[float]) -> int:
        below = (i for i, value in enumerate(run) if value <= threshold)
        return max(1, next(below, len(run)))

    return Proposal(
        leading(values[:at_most]),
        leading(values[::-1][:at_most]),
        typical,
        threshold,
    )
