"""Runs arms side by side, one process each, and keeps what is already there."""

import ast
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from benchmarks.methods import Arm, stages
from benchmarks.run_arm import measure_logged
from benchmarks.texts import ROOT

__all__ = ["Result", "arm_context", "group_size_for", "run_arms", "source_digest"]

Result = dict[str, Any]
# glibc would return large tensors' memory at once and have it filled with zeros again.
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 31),
}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
PACKAGES = ("torch", "transformers", "llmcompressor", "compressed-tensors")


def group_size_for(model: str) -> int:
    """128, or the largest smaller power of two that divides all inputs of linears."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    attention = config.num_attention_heads * (
        getattr(config, "head_dim", None)
        or config.hidden_size // config.num_attention_heads
    )
    sizes = (config.hidden_size, config.intermediate_size, attention)
    return next(g for g in (128, 64, 32, 16) if all(size % g == 0 for size in sizes))


def run_arms(
    arms: list[Arm], output: Path, jobs: int, group_size: int, tasks: list[str]
) -> list[Result]:
    """
    One result per arm, in order. An arm whose specification, code and packages are
    those of a stored result is not run again.

    :param jobs: arms at a time; each gets an equal share of the cores
    :raises RuntimeError: if an arm fails, with the end of its log
    """
    output.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with Progress() as progress, ThreadPoolExecutor(jobs) as pool:
        bar = progress.add_task("arms", total=len(arms))

        def run(arm: Arm) -> Result:
            result = run_arm(arm, output, threads, group_size, tasks)
            progress.advance(bar)
            return result

        return list(pool.map(run, arms))


def run_arm(
    arm: Arm, output: Path, threads: int, group_size: int, tasks: list[str]
) -> Result:
    spec = {
        "arm": vars(arm),
        "group_size": group_size,
        "tasks": tasks,
        "versions": {name: version(name) for name in PACKAGES},
        "recipe": [
            {type(stage).__name__: stage.model_dump(mode="json", exclude_unset=True)}
            for stage in stages(arm, group_size)
        ],
        "code": source_digest() if arm.method.startswith("slider") else None,
    }
    settings = "".join(f"-{k}={v}" for k, v in arm.settings.items())
    rows = f"{arm.rows}x{arm.length}"
    name = f"{arm.scheme}-{arm.method}{settings}-{rows}-seed{arm.seed}"
    target = output / f"{name}.json"
    if target.exists():
        stored = json.loads(target.read_text())
        if all(stored.get(key) == value for key, value in spec.items()):
            return stored
    request, log = output / f"{name}.spec", output / f"{name}.log"
    request.write_text(json.dumps(spec))
    if run_process(request, target, log, threads):
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise RuntimeError(f"arm {name} failed, see {log}:\n{tail}")
    return json.loads(target.read_text())


def run_process(request: Path, target: Path, log: Path, threads: int) -> int:
    """Exit status of a process that measures one arm."""
    arguments = (request, target, log, threads)
    process = arm_context().Process(target=measure_logged, args=arguments)
    process.start()
    process.join()
    return process.exitcode or 0


def arm_context() -> BaseContext:
    """Makes processes for arms, which need not import llm-compressor again."""
    for name, value in KEEP_MEMORY.items():
        os.environ.setdefault(name, value)
    # That takes many seconds of a CPU, so they are forked from a process that has
    # imported it; a GPU cannot be used in a fork.
    context = get_context("spawn" if torch.cuda.is_available() else "forkserver")
    context.set_forkserver_preload(["benchmarks.run_arm"])
    return context


def source_digest() -> str:
    """Changes with the code that quantises, not with comments and docstrings."""
    digest = hashlib.sha256()
    for folder in ("slider", "host"):
        for path in sorted((ROOT / "llmc_faq_slider" / folder).glob("*.py")):
            tree = ast.parse(path.read_text("utf-8"))
            for node in ast.walk(tree):
                if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
                    del node.body[0]
            digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:16]
