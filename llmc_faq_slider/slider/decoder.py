"""The model between embedding and head while windows slide over it.

It holds the two streams of hidden states and the students of the layers that are still
open. One stream stands behind the last layer that any window has visited, in full
precision: that is the target of the window at hand, since no window stops before an
earlier one did. The other stands behind the layers that are quantised for good.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from llmc_faq_slider.slider.loss import CountedTokens, token_errors
from llmc_faq_slider.slider.memory import RowLimit
from llmc_faq_slider.slider.stream import DecoderCalls, pass_rows
from llmc_faq_slider.slider.student import FoldedLayer, LinearGrids, StudentLayer
from llmc_faq_slider.slider.windows import Window

__all__ = ["Commit", "Decoder", "LayerGrids"]

LayerGrids = dict[int, dict[str, LinearGrids]]
StartStudent = Callable[[int, dict[str, Tensor]], StudentLayer]
Commit = Callable[[int, FoldedLayer], None]

# An input channel counts at least this share of the mean one, or a channel that the
# calibration data leaves silent could be quantised at will.
LEAST_IMPORTANCE = 1e-6


@dataclass
class Decoder:
    """
    :param grids: number formats by layer index and name of linear
    :param start: makes the student of a layer from its inputs' mean squares
    :param tokens: which tokens' errors count
    :param limit: rows per forward pass
    :param importance: mean square of each input channel, by layer and name of linear
    :param full_precision: target of the window at hand, by row
    :param quantized: its input, by row
    :param visited: layers that ``full_precision`` has passed
    """

    calls: DecoderCalls
    device: torch.device
    grids: LayerGrids
    start: StartStudent
    tokens: CountedTokens
    limit: RowLimit
    students: dict[int, StudentLayer] = field(default_factory=dict)
    importance: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    full_precision: list[Tensor] = field(default_factory=list)
    quantized: list[Tensor] = field(default_factory=list)
    visited: int = 0

    @property
    def lengths(self) -> list[int]:
        return self.tokens.lengths

    def batch(self, rows: list[Tensor], indices: list[int]) -> Tensor:
        return torch.cat([rows[i] for i in indices]).to(self.device)

    def window_students(self, window: Window) -> list[StudentLayer]:
        return [self.students[i] for i in window.layers if i in self.students]

    def installed(self, window: Window, ratio: float, dtype: torch.dtype) -> ExitStack:
        """Context in which the window's layers compute as students."""
        stack = ExitStack()
        for student in self.window_students(window):
            stack.enter_context(student.installed(ratio, dtype))
        return stack

    def begin(self, hidden: list[Tensor]) -> None:
        """Put both streams before the first layer."""
        self.full_precision = self.quantized = hidden

    @torch.no_grad()
    def visit(self, window: Window) -> None:
        """
        Move the full-precision stream behind the window; start students of new layers.

        The same pass measures how strongly each input channel of the new layers is
        excited.

        :raises ValueError: if the full-precision output is not finite
        """
        layers = range(self.visited, window.stop)
        if not layers:
            return
        new = [i for i in layers if i in self.grids and i not in self.students]
        inputs = {
            (index, name): _InputSquares(self.calls.layers[index].get_submodule(name))
            for index in new
            for name in self.grids[index]
        }

        def forget() -> None:
            for squares in inputs.values():
                squares.tokens = 0
                squares.sums = None

        handles = [squares.attach() for squares in inputs.values()]
        try:
            self.full_precision = self.limit.run(
                lambda: self._through(layers, self.full_precision), forget
            )
        finally:
            for handle in handles:
                handle.remove()
        self.visited = window.stop
        for row, target in enumerate(self.full_precision):
            if not torch.isfinite(target).all():
                raise ValueError(
                    f"The full-precision output of {window} is not finite for "
                    f"calibration row {row} in {target.dtype}. Load the model in "
                    "bfloat16 or float32, or leave out that row."
                )
        for index in new:
            found = {name: inputs[index, name] for name in self.grids[index]}
            importance = {name: one.mean() for name, one in found.items()}
            self.add_student(index, importance)

    def add_student(self, index: int, importance: dict[str, Tensor]) -> None:
        self.importance[index] = importance
        self.students[index] = self.start(index, importance)

    @torch.no_grad()
    def advance(self, index: int) -> None:
        """Move the quantised stream behind a layer, in the model's own dtype."""
        layer = Window(index, index + 1, "fixed")
        with self.installed(layer, 1.0, self.quantized[0].dtype):
            self.quantized = self.limit.run(
                lambda: self._through(range(index, index + 1), self.quantized)
            )

    @torch.no_grad()
    def commit(self, index: int, hidden: Tensor, commit: Commit) -> float:
        """
        Commit layer ``index``, and how far its weights then are from what was trained.

        Inputs stay unquantised on both sides: in few bits, one that lies between two
        codes goes either way after any rounding.

        :param hidden: input of the layer ``[1, length, hidden]``
        :return: mean of :func:`token_errors`
        """
        student = self.students.pop(index)
        with student.installed(1.0, hidden.dtype, as_served=False):
            trained = self.calls.run(index, hidden)
        commit(index, student.fold())
        return token_errors(self.calls.run(index, hidden), trained).mean().item()

    def _through(self, layers: range, rows: list[Tensor]) -> list[Tensor]:
        return pass_rows(self.calls, layers, rows, self.limit.rows)


class _InputSquares:
    """Sum of the squares of a linear's input channels, while a hook is attached."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.tokens = 0
        self.sums: Tensor | None = None

    def attach(self) -> torch.utils.hooks.RemovableHandle:
        return self.module.register_forward_pre_hook(self._add)

    def _add(self, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows = args[0].flatten(0, -2)
        squares = rows.float().square().sum(0)
        self.sums = squares if self.sums is None else self.sums + squares
        self.tokens += len(rows)

    def mean(self) -> Tensor:
        """fp32 ``[in]``; ones if no token reached the linear, or none but zeros."""
        if self.sums is None or not self.tokens or not self.sums.any():
            weight = self.module.weight
            assert isinstance(weight, Tensor)
            return torch.ones(weight.shape[1], device=weight.device)
        mean = self.sums / self.tokens
        return mean.clamp(min=LEAST_IMPORTANCE * mean.mean().item())
