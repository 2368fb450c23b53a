"""Which of SliderQuant's settings pay, on the tiny test family or any model.

    python -m benchmarks.slider_settings --schemes W3A16 --variants ratio_0.5

Prints, per scheme and variant, the loss over full precision (mean negative
log-likelihood per token on held-out text), CPU seconds, and round-to-nearest as the
control. The numbers in docs/experiments.md come from it.
"""

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from datasets import Dataset
from llmcompressor.modifiers.quantization import QuantizationModifier
from loguru import logger
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmc_faq_slider import SliderQuantModifier, oneshot

TESTS = Path(__file__).resolve().parents[1] / "tests"

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "fixed_windows_only": {"shallow_layers": 0, "deep_layers": 0},
    "fixed_windows_ratio_0.5": {"shallow_layers": 0, "deep_layers": 0, "ratio": 0.5},
    "ratio_0.5": {"ratio": 0.5},
    "ratio_0.5_sweep": {"ratio": 0.5, "stage_order": "sweep"},
    "rank_8": {"low_rank": 8},
    "no_low_rank": {"low_rank": 0},
    "no_channel_scales": {"channel_scales": False},
    "low_rank_lr_1e-3": {"low_rank_lr": 1e-3},
    "low_rank_lr_2e-2": {"low_rank_lr": 2e-2},
    "auto_windows": {"shallow_layers": "auto", "deep_layers": "auto"},
    "epochs_10": {"epochs": 10},
    "epochs_20": {"epochs": 20},
}


def config_groups(scheme: str) -> dict[str, Any]:
    """``W3A16`` per channel, ``W2A16_asym_g64`` with zero points in groups of 64."""
    name, *details = scheme.split("_")
    group_size = next((int(d[1:]) for d in details if d.startswith("g")), None)
    weights: dict[str, Any] = {
        "num_bits": int(name[1]),
        "type": "int",
        "symmetric": "asym" not in details,
        "strategy": "group" if group_size else "channel",
    }
    if group_size:
        weights["group_size"] = group_size
    group: dict[str, Any] = {"targets": ["Linear"], "weights": weights}
    input_bits = int(name.partition("A")[2])
    if input_bits < 16:
        group["input_activations"] = {
            "num_bits": input_bits,
            "type": "int",
            "strategy": "token",
            "dynamic": True,
        }
    return {"group_0": group}


def token_rows(model: Path, half: int, length: int, count: int) -> torch.Tensor:
    """Rows ``[count, length]`` of the held-out texts; half 0 calibrates, 1 tests."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids: list[int] = []
    for path in sorted((TESTS / "data" / "heldout").glob("*.txt")):
        text = path.read_text(encoding="utf-8")
        middle = len(text) // 2
        ids += tokenizer(text[:middle] if half == 0 else text[middle:])["input_ids"]
    rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return rows[order][:count]


@torch.no_grad()
def loss(model: torch.nn.Module, rows: torch.Tensor) -> float:
    total = 0.0
    for batch in rows.split(16):
        logits = model(input_ids=batch).logits[:, :-1].float()
        total += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"
        ).item()
    return total / rows[:, 1:].numel()


def main(
    model: Annotated[Path, typer.Option()] = TESTS / "models" / "small",
    schemes: Annotated[str, typer.Option()] = "W3A16,W2A16_asym_g64",
    variants: Annotated[str, typer.Option()] = ",".join(VARIANTS),
    rows: Annotated[int, typer.Option(help="calibration rows of 128 tokens")] = 32,
) -> None:
    logger.remove()
    logger.add(sys.stderr, level="WARNING")
    calibration = token_rows(model, 0, 128, rows).tolist()
    test = token_rows(model, 1, 128, 64)
    full = loss(AutoModelForCausalLM.from_pretrained(model, dtype="auto"), test)
    table = Table("scheme", "settings", "loss over full precision", "CPU seconds")
    for scheme in schemes.split(","):
        fields = {"ignore": ["lm_head"], "config_groups": config_groups(scheme)}
        stages = {"round to nearest": QuantizationModifier(**fields)}
        for name in variants.split(","):
            settings = {"batch_size": 8} | VARIANTS[name]
            stages[name] = SliderQuantModifier(**fields, **settings)
        for name, stage in stages.items():
            quantized = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
            data = Dataset.from_dict({"input_ids": calibration})
            began = time.process_time()
            oneshot(model=quantized, recipe=stage, dataset=data)
            seconds = time.process_time() - began
            row = (
                scheme,
                name,
                f"{loss(quantized, test) - full:.4f}",
                f"{seconds:.0f}",
            )
            table.add_row(*row)
            print(*row, flush=True)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
