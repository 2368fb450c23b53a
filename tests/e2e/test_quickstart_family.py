"""The quickstart from end to end on the tiny family, vLLM on the CPU included."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from quickstart import choose_form

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Run:
    """What one run of the quickstart printed and wrote."""

    printed: str
    checkpoint: Path


@pytest.fixture(scope="module")
def recipe(large_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's own recipe in the family's sizes: it writes short answers."""
    chosen = choose_form(None).recipe
    stages = yaml.safe_load(chosen.read_text())
    stages["calibration_stage"]["faq_modifiers"]["FAQModifier"] |= {
        "generator": str(large_model),
        "num_candidates": 2,
        "num_samples": 16,
        "sequence_length": 128,
        "max_new_tokens": 64,
        "min_response_tokens": 4,
    }
    path = tmp_path_factory.mktemp("recipe") / chosen.name
    path.write_text(yaml.safe_dump(stages, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def quickstart(
    serve_env: Path,
    small_model: Path,
    recipe: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Run:
    output = tmp_path_factory.mktemp("quickstart")
    done = subprocess.run(
        [
            *(sys.executable, "scripts/quickstart.py"),
            *("--model", str(small_model), "--recipe", str(recipe)),
            *("--output", str(output)),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return Run(done.stdout, output / "small" / recipe.stem)


def test_prints_table_and_answer(quickstart: Run) -> None:
    perplexities = {
        name: float(value)
        for name, value in re.findall(
            r"│ (full precision|round to nearest|ours) +│ ([\d.]+) ", quickstart.printed
        )
    }
    assert perplexities.keys() == {"full precision", "round to nearest", "ours"}
    assert perplexities["ours"] < 1.1 * perplexities["full precision"]
    answer = re.search(
        r"capital of France\?\n(.+?)\ndone after", quickstart.printed, re.S
    )
    assert answer and answer.group(1).strip()
