"""Draws the sensitivity of a model's decoder layers."""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llmc_faq_slider.report.sensitivity_record import SensitivityRecord

__all__ = ["SUFFIXES", "draw_sensitivity"]

SUFFIXES = (".png", ".svg")

LINE = "#1f4e79"
ENDS = "#e0a030"
RULE = "#666666"


def draw_sensitivity(record: SensitivityRecord, path: Path) -> None:
    """
    Two panels over the layers: KL divergence, and increase of the loss.

    The proposed shallow and deep layers are shaded. The same record gives the same
    bytes.

    :param path: ends in ``.png`` or ``.svg``, which decides the format
    """
    # A figure of its own, without pyplot: no window system and no global state.
    figure = Figure(figsize=(8, 6), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True)
    layers = [row.layer for row in record.layers]
    last = len(layers) - 0.5
    for panel in (upper, lower):
        panel.axvspan(-0.5, record.shallow_layers - 0.5, color=ENDS, alpha=0.2, lw=0)
        panel.axvspan(last - record.deep_layers, last, color=ENDS, alpha=0.2, lw=0)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", alpha=0.3)
    _points(upper, layers, [row.kl for row in record.layers])
    if all(row.kl > 0 for row in record.layers):
        upper.set_yscale("log")
    upper.axhline(record.threshold, color=RULE, ls="--", lw=1, label="sensitive above")
    upper.axhline(
        record.typical, color=RULE, ls=":", lw=1, label="median of the middle"
    )
    upper.legend(frameon=False, loc="upper center", ncols=2)
    upper.set_ylabel("KL divergence, nats per token")
    _points(lower, layers, [row.loss_increase for row in record.layers])
    lower.axhline(0, color=RULE, lw=1)
    lower.set_ylabel("increase of loss, nats per token")
    lower.set_xlabel("the decoder layer that alone is quantised")
    lower.xaxis.get_major_locator().set_params(integer=True)
    lower.set_xlim(-0.5, last)
    name = Path(record.model).name or record.model
    figure.suptitle(
        f"{name}: {record.format_name}\nproposed (shaded): {record.shallow_layers} "
        f"shallow, {record.deep_layers} deep",
        fontsize=11,
    )
    # SVG would otherwise hold the date and random ids.
    with matplotlib.rc_context({"svg.hashsalt": "sensitivity"}):
        metadata = {"Date": None} if path.suffix.lower() == ".svg" else {}
        figure.savefig(path, dpi=150, metadata=metadata)


def _points(panel: Axes, layers: list[int], values: list[float]) -> None:
    panel.plot(layers, values, color=LINE, lw=1, marker="o", ms=4)
