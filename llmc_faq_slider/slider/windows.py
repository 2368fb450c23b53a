"""The order in which windows of decoder layers are learned (SliderQuant §3.2).

Three families of windows slide from the first decoder layer to the last:

- progressively expanded windows over the shallow layers (PESW), all anchored at
  layer 0: ``[0], [0, 1], ..., [0 .. shallow - 1]``;
- fixed-size windows (FSSW) of ``size`` layers, moved by ``stride``;
- progressively contracted windows over the deep layers (PCSW), all anchored at the
  last layer: ``[L - deep .. L - 1], ..., [L - 1]``.

Neighbouring families share ``size - stride`` layers, so that every layer of the fixed
part is visited ``size / stride`` times.
"""

from dataclasses import dataclass
from typing import Literal

__all__ = ["Window", "visit_numbers", "window_schedule"]


@dataclass(frozen=True)
class Window:
    """Decoder layers ``start .. stop - 1``, learned together."""

    start: int
    stop: int
    family: Literal["shallow", "fixed", "deep"]

    @property
    def layers(self) -> range:
        return range(self.start, self.stop)

    def __len__(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        if len(self) == 1:
            return f"layer {self.start}"
        return f"layers {self.start}-{self.stop - 1}"


def window_schedule(
    num_layers: int,
    shallow_layers: int = 4,
    deep_layers: int = 4,
    window_size: int = 2,
    window_stride: int = 1,
) -> list[Window]:
    """
    Windows in training order. Starts never move back, and every layer is covered.

    Departure: the released code overlaps the three families by ``window_stride``
    layers, the paper's text by ``window_size - window_stride``; the two agree for the
    defaults, and the paper's rule keeps the visits even for all other settings.

    A model with fewer than ``shallow_layers + deep_layers`` layers gets shorter shallow
    and deep parts.

    :param num_layers: number of decoder layers L, at least 1
    :param shallow_layers: number of growing windows; 0 switches PESW off
    :param deep_layers: number of shrinking windows; 0 switches PCSW off
    :param window_size: layers per fixed window, at least 1
    :param window_stride: layers by which a fixed window moves, 1 .. ``window_size``
    :raises ValueError: if a parameter is out of range
    """
    if num_layers < 1:
        raise ValueError(f"num_layers must be at least 1, found {num_layers}.")
    if shallow_layers < 0 or deep_layers < 0:
        raise ValueError(
            "shallow_layers and deep_layers must not be negative, found "
            f"{shallow_layers} and {deep_layers}."
        )
    if not 1 <= window_stride <= window_size:
        raise ValueError(
            "window_stride must lie between 1 and window_size, or layers between two "
            f"windows are never learned; found window_stride={window_stride} and "
            f"window_size={window_size}."
        )

    shallow = min(shallow_layers, (num_layers + 1) // 2)
    deep = min(deep_layers, num_layers // 2)
    overlap = window_size - window_stride

    windows = [Window(0, stop, "shallow") for stop in range(1, shallow + 1)]

    start = max(shallow - overlap, 0)
    end = min(num_layers - deep + overlap, num_layers) if deep else num_layers
    while start < end:
        stop = min(start + window_size, end)
        if not windows or stop > windows[-1].stop:
            windows.append(Window(start, stop, "fixed"))
        if stop == end:
            break
        start += window_stride

    windows += [
        Window(start, num_layers, "deep")
        for start in range(num_layers - deep, num_layers)
    ]
    return windows


def visit_numbers(windows: list[Window], number: int) -> dict[int, int]:
    """
    Which visit window ``number`` is to each of its layers.

    :param windows: in training order
    :return: 1 for a layer's first visit, 2 for its second, ...
    """
    return {
        layer: sum(layer in window.layers for window in windows[: number + 1])
        for layer in windows[number].layers
    }
