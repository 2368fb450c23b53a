"""What each part of SliderQuant and each default is worth.

    make bench-ablation
    python -m benchmarks.ablation --schemes W3A16 --variants fixed_windows,no_rounding

The first block is the paper's Table 8 on our models, the rest one setting at a time.
Every default in the code is the winner here or has its reason in docs/experiments.md.
"""

from itertools import product
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import typer

from benchmarks.markdown import markdown_table
from benchmarks.methods import Arm
from benchmarks.quality import divergence_rows, loss, small_or_real
from benchmarks.runner import Result, group_size_for, run_arms
from benchmarks.texts import CACHE, FILES, IN_DOMAIN

NO_ENDS: dict[str, Any] = {"shallow_layers": 0, "deep_layers": 0}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "fixed_windows": NO_ENDS,
    "fixed_windows_epochs_2": NO_ENDS | {"epochs": 2},
    "fixed_windows_ratio_0.5_epochs_2": NO_ENDS | {"ratio": 0.5, "epochs": 2},
    "no_deep": {"deep_layers": 0},
    "no_shallow": {"shallow_layers": 0},
    "ratio_0.5_epochs_2": {"ratio": 0.5, "epochs": 2},
    "ratio_0.33_epochs_3": {"ratio": 1 / 3, "epochs": 3},
    "ends_2": {"shallow_layers": 2, "deep_layers": 2},
    "ends_4": {"shallow_layers": 4, "deep_layers": 4},
    "ends_6": {"shallow_layers": 6, "deep_layers": 6},
    "ends_auto": {"shallow_layers": "auto", "deep_layers": "auto"},
    "one_layer_windows": NO_ENDS | {"window_size": 1, "epochs": 2},
    "size_3": {"window_size": 3},
    "size_4_stride_2": {"window_size": 4, "window_stride": 2},
    "no_rounding": {"rounding_travel": 0},
    "rounding_travel_0.4": {"rounding_travel": 0.4},
    "rounding_travel_0.1": {"rounding_travel": 0.1},
    "no_low_rank": {"low_rank": 0},
    "visit_decay_0": {"visit_decay": 0.0},
    "visit_decay_0_fixed_windows": NO_ENDS | {"visit_decay": 0.0},
    "rank_16": {"low_rank": 16},
    "low_rank_lr_3e-3": {"low_rank_lr": 3e-3},
    "clipping_lr_3e-2": {"clipping_lr": 3e-2},
    "unquantized_inputs": {"quantized_inputs": False},
    "channel_scales": {"channel_scales": True},
    "no_channel_scales": {"channel_scales": False},
    "smoothing_0": {"smoothing_strength": 0.0},
    "smoothing_0.5": {"smoothing_strength": 0.5},
    "smoothing_0.85": {"smoothing_strength": 0.85},
    "epochs_2": {"epochs": 2},
    "epochs_3": {"epochs": 3},
    "epochs_4": {"epochs": 4},
    "no_closing": {"closing_epochs": 0},
    "closing_2": {"closing_epochs": 2},
    "fixed_windows_no_closing": NO_ENDS | {"closing_epochs": 0},
    "batch_2": {"batch_size": 2},
    "batch_8": {"batch_size": 8},
}
# The default settings on more or fewer calibration rows.
ROWS = {"rows_32": 32, "rows_512": 512}


def table(full: Result, results: list[Result], variants: list[str]) -> str:
    """
    One row per scheme and variant, means over seeds.

    :param variants: name of the variant of each result
    """
    abroad = [name for name in FILES if name != IN_DOMAIN]
    groups: dict[tuple[str, str], list[Result]] = {}
    for variant, result in zip(variants, results, strict=True):
        groups.setdefault((result["arm"]["scheme"], variant), []).append(result)
    columns = ["scheme", "settings", "loss", "out of domain", "KL", "CPU s"]
    rows = []
    for (scheme, name), found in groups.items():
        whole = mean(loss(result, full, list(FILES)) for result in found)
        outside = mean(loss(result, full, abroad) for result in found)
        kl = mean(r["quality"][t]["kl"] for r in found for t in FILES)
        seconds = mean(result["cost"]["cpu_s"] for result in found)
        losses = [f"{value:.4f}" for value in (whole, outside, kl)]
        rows.append([scheme, name, *losses, f"{seconds:.0f}"])
    return markdown_table(columns, rows)


def main(
    model: Annotated[str, typer.Option()] = "small",
    schemes: Annotated[str, typer.Option()] = "W3A16,W2A16,W4A4",
    variants: Annotated[str, typer.Option()] = ",".join([*VARIANTS, *ROWS]),
    seeds: Annotated[int, typer.Option()] = 2,
    rows: Annotated[int, typer.Option(help="calibration rows")] = 128,
    length: Annotated[int, typer.Option(help="tokens per row")] = 128,
    evaluation_rows: Annotated[int, typer.Option(help="of 512 tokens, per text")] = 8,
    jobs: Annotated[int, typer.Option(help="arms at a time")] = 2,
    output: Annotated[Path, typer.Option()] = CACHE / "bench" / "ablation",
) -> None:
    """Runs every variant and prints the table."""
    folder = small_or_real(model)
    names = variants.split(",")
    size = group_size_for(folder)
    measured = evaluation_rows, divergence_rows(model, evaluation_rows)
    full = Arm(folder, "W16A16", "full_precision", 0, rows, length, *measured)
    runs = [*product(schemes.split(","), names, range(seeds))]
    arms = [
        Arm(
            folder,
            scheme,
            "slider",
            seed,
            ROWS.get(name, rows),
            length,
            *measured,
            VARIANTS.get(name, {}),
        )
        for scheme, name, seed in runs
    ]
    target = output / Path(folder).name
    baseline, *results = run_arms([full, *arms], target, jobs, size, [])
    found = table(baseline, results, [name for _, name, _ in runs])
    (target / "table.md").write_text(found)
    print(found)


if __name__ == "__main__":
    typer.run(main)
