"""How fast vLLM serves our formats, against bf16: on the CPU, and on a GPU if there is.

    make bench-serve
    python -m benchmarks.serving --model small --tokens 16

Each arm is served by ``vllm serve`` and asked over HTTP, streamed, by 1, 8 and 64
clients at once. Tokens per second count the answers' tokens over the time from the
first request to the last token; time to first token and time per token are means over
clients. The checkpoints are the recipes' formats with weights rounded to nearest: what
a format costs to serve does not depend on how its numbers were learned. Kernels are
those that vLLM's log names. Writes ``serving.json`` and ``serving.md``.
"""

import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Annotated

import torch
import typer
import yaml
from loguru import logger
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks.prove_serving import RECIPES, gpu_target, local_target, own_stages
from benchmarks.quality import small_or_real
from benchmarks.runner import group_size_for
from benchmarks.served import SERVE_ENV
from benchmarks.texts import CACHE, ROOT
from llmc_faq_slider import oneshot
from llmc_faq_slider.host.model_check import model_servings
from llmc_faq_slider.host.recipe_lint import lint_recipe
from llmc_faq_slider.host.skeleton import load_skeleton
from llmc_faq_slider.report.server import Server, ServerError, serve
from llmc_faq_slider.report.serving import Target

ARMS = {
    "bf16": None,
    "W4A16": "slider_w4a16",
    "W4A8": "faq_slider_w4a8",
    "W4A8, int-quantized": "faq_slider_w4a8_cpu",
    "W4AFP8": "faq_slider_w4afp8",
    "W8A8": "slider_w8a8",
}
# One that vLLM's slowest kernel takes minutes for; name it to have it measured.
EXTRA = "W4A8, int-quantized"
CLIENTS = (1, 8, 64)
KERNEL = re.compile(r"(?:Using|Selected) (\w+Kernel) for (CompressedTensors\w+)")
LOADED = re.compile(r"Model loading took ([\d.]+) GiB")


@dataclass
class Load:
    """What ``clients`` clients at once got: tokens per second, and seconds."""

    clients: int
    tokens_per_s: float
    first_token_s: float
    per_token_s: float


@dataclass
class Row:
    """One arm on one target; ``skipped`` says why there are no figures."""

    target: str
    arm: str
    kernel: str = ""
    computes: str = ""
    weights_mb: float = 0.0
    memory_mb: float = 0.0
    skipped: str = ""
    loads: list[Load] = field(default_factory=list)


def make_checkpoint(model: str, arm: str, folder: Path) -> Path:
    """The arm's checkpoint, made once; bf16 is the model itself."""
    recipe = arm_recipe(model, arm, folder)
    if recipe is None:
        return Path(model)
    out = recipe.with_suffix("")
    if not (out / "config.json").exists():
        oneshot(
            model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16),
            tokenizer=AutoTokenizer.from_pretrained(model),
            recipe=str(recipe),
            output_dir=str(out),
        )
    return out


def arm_recipe(model: str, arm: str, folder: Path) -> Path | None:
    """The arm's format in a recipe that fits the model, None for bf16."""
    name = ARMS[arm]
    if name is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(nearest(RECIPES / f"{name}.yaml", model))
    return path


def nearest(recipe: Path, model: str) -> str:
    """A recipe's formats as llm-compressor's stage that rounds to nearest."""
    layers = AutoConfig.from_pretrained(model).num_hidden_layers
    text = own_stages(recipe, layers, group_size_for(model), None)
    (stage,) = yaml.safe_load(text).values()
    ((fields,),) = (modifiers.values() for modifiers in stage.values())
    kept = {key: fields[key] for key in ("ignore", "config_groups")}
    quantise = {"quant_modifiers": {"QuantizationModifier": kept}}
    return yaml.safe_dump({"quant_stage": quantise}, sort_keys=False)


def measure(
    target: Target,
    arm: str,
    checkpoint: Path,
    environment: Path,
    prompt: list[int],
    tokens: int,
    log: Path,
) -> Row:
    """Serves one checkpoint and loads it with clients."""
    row = Row(target.name, arm)
    row.weights_mb = (
        sum(f.stat().st_size for f in checkpoint.glob("*.safetensors")) / 1e6
    )
    with serve(
        checkpoint,
        environment,
        log,
        max_model_len=len(prompt) + tokens,
        max_num_seqs=max(CLIENTS),
        eager=target.platform == "cpu",
        timeout=1800,
    ) as server:
        # The first answers pay for memory that later ones find in place.
        _load(server, prompt, 2, tokens)
        row.loads = [_load(server, prompt, clients, tokens) for clients in CLIENTS]
        row.memory_mb = _memory(server, target)
    text = log.read_text(errors="replace")
    loaded = LOADED.search(text)
    if loaded and target.platform == "cuda":
        row.weights_mb = float(loaded[1]) * 1024**3 / 1e6
    kernels = dict.fromkeys(KERNEL.findall(text))
    row.kernel = ", ".join(f"{kernel} ({scheme})" for kernel, scheme in kernels)
    return row


def _load(server: Server, prompt: list[int], clients: int, tokens: int) -> Load:
    def client(number: int) -> tuple[float, float]:
        # Prompts that differ at once: no client finds another's key-value cache.
        start, ask = time.monotonic(), [prompt[number % len(prompt)], *prompt[1:]]
        times = [time.monotonic() for _ in server.stream(ask, tokens, ignore_eos=True)]
        return times[0] - start, (times[-1] - times[0]) / (tokens - 1)

    start = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(client, range(clients)))
    seconds = time.monotonic() - start
    firsts, rates = zip(*answers, strict=True)
    return Load(clients, clients * tokens / seconds, mean(firsts), mean(rates))


def _memory(server: Server, target: Target) -> float:
    """Megabytes of the server: of the GPU, or of its processes' share of memory."""
    if target.platform == "cuda":
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            check=True,
        )
        return float(asked.stdout.split()[0]) * 1024**2 / 1e6
    kilobytes = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(folder.name)) != server.process_group:
                continue
            shares = (folder / "smaps_rollup").read_text()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        found = re.search(r"^Pss:\s+(\d+)", shares, re.M)
        kilobytes += int(found[1]) if found else 0
    return kilobytes * 1024 / 1e6


def bench(
    model: str,
    target: Target,
    environment: Path,
    arms: list[str],
    tokens: int,
    folder: Path,
) -> list[Row]:
    """One row per arm; those that vLLM does not serve there say why."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = (ROOT / "tests" / "data" / "heldout" / "austen.txt").read_text("utf-8")
    prompt = tokenizer(text[:2000]).input_ids[:128]
    rows = []
    for arm in arms:
        computes, recipe = "16 bit", arm_recipe(model, arm, folder)
        if recipe is not None:
            modifiers, _ = lint_recipe(recipe)
            found = model_servings(modifiers, load_skeleton(model), [target])
            servings = [one.serving for one in found]
            why = next((one.why for one in servings if one.computes is None), None)
            if why is not None:
                rows.append(Row(target.name, arm, skipped=why))
                continue
            computes = ", ".join(dict.fromkeys(str(one.computes) for one in servings))
        checkpoint = make_checkpoint(model, arm, folder)
        log = folder / f"{target.name}-{ARMS[arm] or arm}.log"
        try:
            row = measure(target, arm, checkpoint, environment, prompt, tokens, log)
        except ServerError as error:
            row = Row(target.name, arm, skipped=str(error).splitlines()[0])
        row.computes = computes
        rows.append(row)
        print(f"{target.name} {arm}: {row.skipped or row.loads}", flush=True)
    return rows


def markdown(rows: list[Row]) -> str:
    heads = [f"{n} client{'s' if n > 1 else ''}" for n in CLIENTS]
    lines = [
        "Per load: tokens/s, ms to the first token, ms per token.\n",
        f"| target | arm | kernel | inputs | {' | '.join(heads)} | weights MB | MB |",
        f"|{'---|' * (6 + len(CLIENTS))}",
    ]
    for row in rows:
        cells = [
            f"{load.tokens_per_s:.1f}, {1e3 * load.first_token_s:.0f}, "
            f"{1e3 * load.per_token_s:.1f}"
            for load in row.loads
        ] or [row.skipped, *[""] * (len(CLIENTS) - 1)]
        sizes = f"{row.weights_mb:.0f} | {row.memory_mb:.0f}" if row.loads else " | "
        lines.append(
            f"| {row.target} | {row.arm} | {row.kernel} | {row.computes} "
            f"| {' | '.join(cells)} | {sizes} |"
        )
    return "\n".join(lines) + "\n"


def main(
    model: Annotated[
        str, typer.Option(help="smollm2, small, large, a folder or a hub id")
    ] = "smollm2",
    arms: Annotated[str, typer.Option(help=f"of {'; '.join(ARMS)}")] = ";".join(
        arm for arm in ARMS if arm != EXTRA
    ),
    tokens: Annotated[int, typer.Option(min=2, help="of each answer")] = 32,
    gpu_environment: Annotated[
        Path | None, typer.Option(help="virtual environment with vLLM for the GPU")
    ] = None,
    output: Annotated[Path, typer.Option()] = CACHE / "bench-serve",
) -> None:
    """Measures bf16 and our formats with vLLM, and prints the tables."""
    logger.remove()
    logger.add(sys.stderr, level="WARNING")
    chosen = [arm.strip() for arm in arms.split(";")]
    unknown = [arm for arm in chosen if arm not in ARMS]
    if unknown:
        sys.exit(f"There is no arm {', '.join(unknown)}; known: {'; '.join(ARMS)}.")
    folder = small_or_real(model)
    target = output / Path(folder).name
    rows: list[Row] = []
    skipped = []
    unsupported = SERVE_ENV / "unsupported"
    if unsupported.exists():
        skipped.append(f"CPU part skipped: {unsupported.read_text().strip()}.")
    else:
        cpu = local_target()
        rows += bench(folder, cpu, SERVE_ENV, chosen, tokens, target)
    gpu = gpu_target()
    if gpu is None:
        skipped.append("GPU part skipped: nvidia-smi finds no NVIDIA GPU here.")
    elif gpu_environment is None:
        skipped.append(
            f"GPU part skipped: {gpu.name} is here, but --gpu-environment names no "
            "virtual environment with vLLM for it."
        )
    else:
        rows += bench(folder, gpu, gpu_environment, chosen, tokens, target)
    target.mkdir(parents=True, exist_ok=True)
    document = {
        "model": Path(folder).name,
        "cores": os.cpu_count(),
        "tokens": tokens,
        "rows": [asdict(row) for row in rows],
        "skipped": skipped,
    }
    (target / "serving.json").write_text(json.dumps(document, indent=1))
    table = markdown(rows) + "".join(f"\n{line}\n" for line in skipped)
    (target / "serving.md").write_text(table)
    print(table)


if __name__ == "__main__":
    typer.run(main)
