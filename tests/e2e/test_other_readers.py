"""Others' tools read a checkpoint of ours: transformers, and lm-eval in two ways."""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.e2e

HELD_OUT = Path(__file__).parents[1] / "data" / "heldout"
RECIPE = "slider_w4a16_asym"
#: for vLLM the first of these that it serves on this CPU
RECIPES = (RECIPE, "faq_slider_w4a8_cpu")
ITEMS = 12
#: backends may differ on a continuation by this share of what shuffled words cost
SHARE = 0.1


@pytest.fixture(scope="module")
def checkpoint(proven) -> Path:
    return proven.trained(RECIPE).checkpoint


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_transformers_generates(checkpoint: Path, dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    asked = tokenizer("The people of the", return_tensors="pt")
    made = model.generate(**asked, max_new_tokens=12, do_sample=False)
    assert len(tokenizer.decode(made[0], skip_special_tokens=True).split()) > 6


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of lm-eval: which goes on from here, the text or its words shuffled?

    The same words on both sides, so that neither is likelier for being shorter.
    """
    folder = tmp_path_factory.mktemp("task")
    passages = []
    for path in sorted(HELD_OUT.glob("*.txt")):
        words = path.read_text("utf-8").split()
        passages += [words[i : i + 60] for i in range(0, 60 * ITEMS, 60)]
    random.Random(0).shuffle(passages)
    rows = []
    for words in passages[:ITEMS]:
        right = words[45:]
        wrong = random.Random(1).sample(right, len(right))
        choices = [" ".join(right), " ".join(wrong)]
        rows.append({"start": " ".join(words[:45]), "choices": choices, "right": 0})
    data = folder / "passages.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "passages.yaml").write_text(
        yaml.safe_dump(
            {
                "task": "passages",
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": str(data)}},
                "test_split": "test",
                "output_type": "multiple_choice",
                "doc_to_text": "{{start}}",
                "doc_to_choice": "{{choices}}",
                "doc_to_target": "{{right}}",
                "metric_list": [{"metric": "acc"}],
            }
        )
    )
    return folder


def lm_eval(
    environment: Path, task: Path, backend: str, arguments: str, output: Path
) -> tuple[float, list[Any]]:
    """Accuracy, and the log-likelihoods of both continuations of every item."""
    done = subprocess.run(
        [
            *(str(environment / "bin" / "python"), "-m", "lm_eval"),
            *("--model", backend, "--model_args", arguments),
            *("--tasks", "passages", "--include_path", str(task)),
            *("--batch_size", "4", "--log_samples", "--output_path", str(output)),
        ],
        env=os.environ
        | {
            "HF_DATASETS_CACHE": str(task / "cache"),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    (path,) = output.glob("**/results_*.json")
    accuracy = json.loads(path.read_text())["results"]["passages"]["acc,none"]
    (path,) = output.glob("**/samples_passages_*.jsonl")
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    samples.sort(key=lambda sample: sample["doc_id"])
    return accuracy, [
        [float(answer[0]) for answer in sample["filtered_resps"]] for sample in samples
    ]


def test_lm_eval_agrees_with_itself(
    serve_env: Path, proven, task: Path, tmp_path: Path
) -> None:
    """`lm_eval --model hf` and `--model vllm` on the same checkpoint."""
    read = (proven.trained(recipe) for recipe in RECIPES)
    checkpoint = next(one.checkpoint for one in read if one.computes is not None)
    model = f"pretrained={checkpoint},dtype=bfloat16"
    by_hf, told_hf = lm_eval(serve_env, task, "hf", model, tmp_path / "hf")
    extra = "max_model_len=512,enforce_eager=True"
    output = tmp_path / "vllm"
    by_vllm, told_vllm = lm_eval(serve_env, task, "vllm", f"{model},{extra}", output)
    hf, vllm = torch.tensor(told_hf), torch.tensor(told_vllm)
    print(f"accuracy {by_hf}, {by_vllm}; difference {(hf - vllm).abs().max():.3f} nats")
    assert hf.shape == vllm.shape == (ITEMS, 2)
    # The two continuations of one item differ by tens of nats.
    apart = (hf[:, 0] - hf[:, 1]).abs().mean()
    assert (hf - vllm).abs().max() < SHARE * apart
    # A broken reading would guess: one in two is right.
    assert by_hf > 0.8 and by_vllm > 0.8
