"""The walk over windows: each is trained, then the streams move on behind it.

Source: SliderQuant §3.2 (windows, intra-layer stages). For every window the target is
the full-precision layers' output on the full-precision path.

A state is saved after every window. It holds the learned tensors of all layers seen so
far and the mean squares from which their students start; students, streams and commits
follow from these and from the model by the same computations as before, so that a run
that goes on ends with the same bits.
"""

from functools import partial

import torch
from loguru import logger
from torch import Tensor
from tqdm import tqdm

from llmc_faq_slider.slider.checkpoint import Checkpoint
from llmc_faq_slider.slider.decoder import Commit, Decoder, LayerGrids
from llmc_faq_slider.slider.folds import exact_places, left_out
from llmc_faq_slider.slider.interruption import StopRequest
from llmc_faq_slider.slider.learning_state import (
    UNFINISHED,
    Learned,
    LearningSettings,
    Progress,
    Stopped,
    Unfinished,
    WindowResult,
    layer_role,
)
from llmc_faq_slider.slider.loss import CountedTokens
from llmc_faq_slider.slider.memory import RowLimit
from llmc_faq_slider.slider.places import Place
from llmc_faq_slider.slider.stream import DecoderCalls, row_batches
from llmc_faq_slider.slider.student import LinearGrids, StudentLayer
from llmc_faq_slider.slider.window_training import learn_window
from llmc_faq_slider.slider.windows import Window, visit_numbers

__all__ = [
    "Learned",
    "LearningSettings",
    "WindowResult",
    "learn_windows",
    "stage_ratios",
]


def stage_ratios(ratio: float) -> list[float]:
    """Intra-layer ratios ``γ, 2γ, ..., 1`` (§3.2)."""
    stages = max(1, round(1 / ratio))
    return [(stage + 1) / stages for stage in range(stages)]


def learn_windows(
    calls: DecoderCalls,
    hidden: list[Tensor],
    grids: LayerGrids,
    windows: list[Window],
    settings: LearningSettings,
    device: torch.device,
    commit: Commit,
    tokens: CountedTokens | None = None,
    limit: RowLimit | None = None,
    saved: Checkpoint | None = None,
    stop: StopRequest | None = None,
) -> Learned:
    """
    Learn every window in order and hand each layer to ``commit`` after its last visit.

    :param calls: how to call the decoder layers
    :param hidden: input of the first layer per row, ``[1, length, hidden]``
    :param grids: number formats by layer index and name of linear; layers without an
        entry are passed through
    :param windows: training order from :func:`window_schedule`
    :param commit: writes the folded layer into the model; the layer must then compute
        with its quantised weights
    :param tokens: whose errors count, None for all
    :param limit: rows per forward pass, None for ``batch_size``
    :param saved: goes on from its newest state, and saves one after every window
    :param stop: once set, training stops after the step at hand, with a state saved
    :raises KeyboardInterrupt: when stopped by SIGINT; SystemExit when by SIGTERM
    :raises ValueError: if the full-precision layers' output is not finite
    :raises MemoryError: if a step with one row does not fit
    """
    limit = limit or RowLimit(settings.batch_size)
    places: dict[int, list[Place]] = {}
    inexact: dict[int, list[Place]] = {}
    for index in grids:
        if learns_channel_scales(grids[index], settings):
            tried = partial(exact_places, calls, index, grids[index])
            places[index], inexact[index] = RowLimit(1, limit.advice).run(tried)
    said = left_out(inexact)

    def student(index: int, importance: dict[str, Tensor]) -> StudentLayer:
        at = places.get(index, [])
        return _student(calls, index, grids, importance, at, settings)

    decoder = Decoder(
        calls,
        device,
        grids,
        student,
        tokens or CountedTokens.all([row.shape[1] for row in hidden]),
        limit,
    )
    walk = _Walk(decoder, windows, settings, commit, saved, stop or StopRequest())
    learned = walk.run(hidden)
    learned.left_out = said
    return learned


def _student(
    calls: DecoderCalls,
    index: int,
    grids: LayerGrids,
    importance: dict[str, Tensor],
    places: list[Place],
    settings: LearningSettings,
) -> StudentLayer:
    return StudentLayer(
        calls.layers[index],
        grids[index],
        importance,
        settings.low_rank,
        settings.rounding_travel > 0,
        places,
        settings.smoothing_strength,
        torch.Generator().manual_seed(settings.seed + index),
    )


def learns_channel_scales(
    grids: dict[str, LinearGrids], settings: LearningSettings
) -> bool:
    if settings.channel_scales == "auto":
        return any(grid.input is not None for grid in grids.values())
    return settings.channel_scales


class _Walk:
    """All windows in order, from the beginning or from a saved state."""

    def __init__(
        self,
        decoder: Decoder,
        windows: list[Window],
        settings: LearningSettings,
        commit: Commit,
        saved: Checkpoint | None,
        stop: StopRequest,
    ):
        self.decoder = decoder
        self.windows = windows
        self.settings = settings
        self.commit = commit
        self.saved = saved
        self.stop = stop
        self.progress = Progress(0, decoder.limit.rows, [])
        self.unfinished: Unfinished | None = None
        self.fold_errors: dict[int, float] = {}

    def run(self, hidden: list[Tensor]) -> Learned:
        self._begin()
        done = self.progress.windows
        with tqdm(
            total=self._layer_steps(), unit="layer-step", desc="SliderQuant"
        ) as bar:
            self.decoder.begin(hidden)
            for number, window in enumerate(self.windows):
                bar.set_description(f"window {number + 1}/{len(self.windows)} {window}")
                self._wake(window)
                self.decoder.visit(window)
                if number < done:
                    bar.update(self._layer_steps([window]))
                else:
                    self._learn(number, bar)
                self._move_on(number)
        progress = self.progress
        return Learned(progress.results, self.decoder.full_precision, self.fold_errors)

    def _begin(self) -> None:
        """Take up the saved state, or save the first, before there is work to lose."""
        if self.saved is None:
            return
        record = self.saved.progress
        if record is None:
            self.saved.save(self.progress.record(), {})
            return
        self.progress = Progress.read(record)
        self.decoder.limit.rows = self.progress.rows
        if UNFINISHED in record:
            self.unfinished = Unfinished(**record[UNFINISHED])
            self.unfinished.tensors = self.saved.tensors(UNFINISHED)
        logger.info(
            f"SliderQuant: going on from {self.saved.folder} with "
            f"{self.progress.windows} of {len(self.windows)} windows finished"
        )

    def _wake(self, window: Window) -> None:
        """Make saved students of a window's layers, as they were."""
        for index in window.layers:
            role = layer_role(index)
            if self.saved is None or index in self.decoder.students:
                continue
            if role not in self.saved:
                continue
            tensors = self.saved.tensors(role)
            self.decoder.add_student(
                index,
                {
                    name: tensors[f"importance.{name}"].to(self.decoder.device)
                    for name in self.decoder.grids[index]
                },
            )
            self.decoder.students[index].restore(
                [tensors[n] for n in sorted(tensors) if n.startswith("learned.")]
            )

    def _learn(self, number: int, bar: tqdm) -> None:
        window = self.windows[number]
        unfinished, self.unfinished = self.unfinished, None
        try:
            result = learn_window(
                self.decoder,
                window,
                visit_numbers(self.windows, number),
                self._epochs(),
                self.settings,
                bar,
                self.stop,
                unfinished,
            )
        except Stopped as stopped:
            self._save_unfinished(window, stopped.unfinished)
            raise self.stop.exit() from None
        self.progress.results.append(result)
        self.progress.windows = number + 1
        self._save(window)

    def _save(self, window: Window) -> None:
        self.progress.rows = self.decoder.limit.rows
        if self.saved is None:
            return
        tensors = {
            layer_role(index): _layer_tensors(self.decoder, index)
            for index in window.layers
            if index in self.decoder.students
        }
        self.saved.save(self.progress.record(), tensors, drop=(UNFINISHED,))

    def _save_unfinished(self, window: Window, unfinished: Unfinished) -> None:
        assert self.stop.signal is not None
        message = f"SliderQuant: stopped by {self.stop.signal.name} in {window}"
        if self.saved is None:
            logger.warning(f"{message}. Without checkpoint_dir nothing was saved.")
            return
        # Layers that the window is the first to visit start from the data again.
        self.progress.rows = self.decoder.limit.rows
        tensors = {UNFINISHED: unfinished.tensors}
        self.saved.save(self.progress.record(unfinished), tensors)
        logger.warning(
            f"{message}, after step {unfinished.step}. Run the same command again to "
            f"go on from there; the state is in {self.saved.folder}."
        )

    def _move_on(self, number: int) -> None:
        """The quantised stream passes the layers that no later window visits."""
        windows, decoder = self.windows, self.decoder
        last = number + 1 == len(windows)
        following = windows[number].stop if last else windows[number + 1].start
        for index in range(windows[number].start, following):
            hidden = decoder.quantized[0].to(decoder.device)
            decoder.advance(index)
            if index in decoder.students:
                self.fold_errors[index] = decoder.commit(index, hidden, self.commit)

    def _epochs(self) -> dict[float, int]:
        """Epochs by ratio of each stage; later ones get what is left over."""
        ratios = stage_ratios(self.settings.ratio)
        each, over = divmod(self.settings.epochs, len(ratios))
        first = len(ratios) - over
        return {ratio: each + (k >= first) for k, ratio in enumerate(ratios)}

    def _layer_steps(self, windows: list[Window] | None = None) -> int:
        lengths = self.decoder.lengths
        size, order = self.settings.batch_size, [*range(len(lengths))]
        steps = len(list(row_batches(lengths, size, order)))
        layers = sum(map(len, self.windows if windows is None else windows))
        return layers * self.settings.epochs * steps


def _layer_tensors(decoder: Decoder, index: int) -> dict[str, Tensor]:
    state = decoder.students[index].state()
    return {f"learned.{place:06d}": t for place, t in enumerate(state)} | {
        f"importance.{name}": tensor
        for name, tensor in decoder.importance[index].items()
    }
