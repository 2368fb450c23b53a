"""What a sensitivity measurement found, as a file and as a table."""

from pydantic import BaseModel
from rich.table import Table

__all__ = ["LayerRecord", "SensitivityRecord"]


class LayerRecord(BaseModel):
    """Figures of one layer, in nats per token; see :class:`LayerSensitivity`."""

    layer: int
    kl: float
    loss_increase: float


class SensitivityRecord(BaseModel):
    """
    What was measured, on what, and what follows from it.

    ``loss``, ``kl``, ``loss_increase``, ``typical`` and ``threshold`` are nats per
    token; ``group_size`` is 0 for one scale per output channel; ``input_bits`` is 16
    for inputs as they are.
    """

    model: str
    bits: int
    symmetric: bool
    group_size: int
    input_bits: int
    text: str
    rows: int
    tokens_per_row: int
    dtype: str
    device: str
    seconds: float
    loss: float
    layers: list[LayerRecord]
    typical: float
    threshold: float
    shallow_layers: int
    deep_layers: int

    @property
    def format_name(self) -> str:
        """The number format in words."""
        weights = f"int{self.bits}{'' if self.symmetric else ' with zero points'}"
        groups = f"groups of {self.group_size}" if self.group_size else "per channel"
        inputs = "" if self.input_bits == 16 else f", int{self.input_bits} inputs"
        return f"{weights}, {groups}{inputs}"

    def is_shallow(self, layer: int) -> bool:
        return layer < self.shallow_layers

    def is_deep(self, layer: int) -> bool:
        return layer >= len(self.layers) - self.deep_layers

    def table(self) -> Table:
        """One line per layer for a terminal."""
        title = f"{self.model}, one layer at a time in {self.format_name}"
        table = Table("layer", title=title)
        table.add_column("KL, nats", justify="right")
        table.add_column("loss increase, nats", justify="right")
        table.add_column("")
        for row in self.layers:
            marks = [
                name
                for name, marked in (
                    ("shallow", self.is_shallow(row.layer)),
                    ("deep", self.is_deep(row.layer)),
                )
                if marked
            ]
            if not marks and row.kl > self.threshold:
                marks = ["sensitive"]
            table.add_row(
                str(row.layer),
                f"{row.kl:.5f}",
                f"{row.loss_increase:+.5f}",
                ", ".join(marks),
            )
        return table
