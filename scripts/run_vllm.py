"""Runs checkpoints in vLLM itself, offline and one after the other, in one process.

Runs with the Python of the serving environment; benchmarks/served.py starts it. Reads
from standard input

    {"checkpoints": [folder, ...], "rows": [[id, ...], ...],
     "prompts": [[id, ...], ...], "max_tokens": 16, "max_model_len": 512,
     "probes": FILE, "output": FOLDER, "first": 0}

and writes per checkpoint, from the first asked for, ``N.json`` with the
log-probability of every token of the rows but the first, the greedy tokens after the
prompts, and vLLM's scheme and kernel per linear; and ``N.safetensors`` with what each
linear makes of its probe. ``probes`` is a safetensors file of inputs ``[tokens,
inputs]`` bf16 by vLLM's name of the linear.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

# In this process: the model is at hand, and the next one starts in seconds.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
from kernel_inputs import kernel_of  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402

# A GPU may be shared with other work, and a proof needs little of it.
GPU_MEMORY = {"gpu_memory_utilization": 0.3, "kv_cache_memory_bytes": 2**30}


def run(asked: dict[str, Any], checkpoint: str, stem: Path) -> None:
    """One checkpoint: its answers go to ``stem`` with two endings."""
    start = time.monotonic()
    llm = LLM(
        checkpoint,
        dtype="bfloat16",
        max_model_len=asked["max_model_len"],
        max_num_seqs=8,
        enforce_eager=True,
        enable_prefix_caching=False,
        **GPU_MEMORY if torch.cuda.is_available() else {},
    )
    document = {
        "logprobs": prompt_logprobs(llm, asked["rows"]),
        "greedy": greedy(llm, asked["prompts"], asked["max_tokens"]),
    }
    probes = load_file(asked["probes"])
    (found,) = llm.apply_model(lambda model: probe(model, probes))
    document["kernels"], outputs = found
    document["seconds"] = time.monotonic() - start
    save_file(outputs, stem.with_suffix(".safetensors"))
    del llm
    gc.collect()
    # Last: a checkpoint without this file is the one at which vLLM failed.
    stem.with_suffix(".json").write_text(json.dumps(document))


def prompt_logprobs(llm: LLM, rows: list[list[int]]) -> list[list[float]]:
    """Log-probability of every token but the first, row by row."""
    settings = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    # vLLM divides by the time its progress bar saw, which can be none.
    answers = llm.generate(_prompts(rows), settings, use_tqdm=False)
    return [
        [
            position[token].logprob
            for token, position in zip(row[1:], answer.prompt_logprobs[1:], strict=True)
        ]
        for row, answer in zip(rows, answers, strict=True)
    ]


def greedy(llm: LLM, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """The tokens that follow each prompt; an end of sequence does not end them."""
    settings = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
    answers = llm.generate(_prompts(prompts), settings, use_tqdm=False)
    return [list(answer.outputs[0].token_ids) for answer in answers]


def _prompts(rows: list[list[int]]) -> Any:
    return [{"prompt_token_ids": row} for row in rows]


def probe(
    model: torch.nn.Module, probes: dict[str, torch.Tensor]
) -> tuple[dict[str, list[str]], dict[str, torch.Tensor]]:
    """Scheme and kernel of every probed linear, and its output in bf16."""
    kernels, outputs = {}, {}
    for name, inputs in probes.items():
        linear: Any = model.get_submodule(name)
        scheme = getattr(linear, "scheme", None)
        kernels[name] = [type(scheme).__name__, kernel_of(scheme) or "none"]
        device = next(linear.parameters()).device
        result = linear(inputs.to(device))
        output = result[0] if isinstance(result, tuple) else result
        outputs[name] = output.cpu().contiguous()
    return kernels, outputs


def main() -> None:
    asked = json.load(sys.stdin)
    if torch.cpu._is_amx_tile_supported():
        # Linux grants the tile registers on request only; vLLM's worker processes ask.
        torch.cpu._init_amx()
    for index in range(asked["first"], len(asked["checkpoints"])):
        run(asked, asked["checkpoints"][index], Path(asked["output"]) / str(index))


if __name__ == "__main__":
    main()
