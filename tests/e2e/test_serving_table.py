"""The table of what vLLM serves against vLLM itself, for all recipes of the package.

vLLM's own code chooses scheme and kernel: on this CPU, as on one with AVX2 alone, and
as on NVIDIA GPUs, of which it is told the compute capability. On the CPU it also
computes, which shows in which precision. scripts/ask_vllm.py does the asking, in the
serving environment.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from compressed_tensors.quantization import QuantizationScheme

from llmc_faq_slider.host.declared import declared_groups, plain_group
from llmc_faq_slider.host.recipe_lint import lint_recipe
from llmc_faq_slider.report.serving import (
    Layer,
    Target,
    describe,
    find_target,
    load_table,
    serve,
)

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]
# Sizes that every kernel takes, and sizes that some do not.
LAYER = Layer("down_proj", 512, 256)
AWKWARD = [
    Layer("awkward", 256, 192),
    Layer("awkward", 144, 288),
    Layer("awkward", 96, 160),
]
CPUS = ["cpu-avx2", "cpu-avx512", "cpu-amx"]
TARGETS = [*CPUS, "sm80", "sm89", "sm90", "sm100", "sm120"]


@dataclass(frozen=True)
class Question:
    """A config group and sizes on a target, with vLLM's option --linear-backend."""

    group: str
    target: str
    backend: str = "auto"
    layer: Layer = LAYER


def _more_groups() -> dict[str, dict[str, Any]]:
    """Config groups that no recipe has, and that a row of the table is about."""
    int8 = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    fp8 = int8 | {"type": "float"}

    def weights(bits: int, size: int | None = None, **fields: Any) -> dict[str, Any]:
        strategy = "group" if size else "channel"
        return {"num_bits": bits, "strategy": strategy, "group_size": size} | fields

    declared = {
        "W4A8 per channel": (weights(4), int8, "pack-quantized"),
        "W4A8 asymmetric weights": (weights(4, 128, symmetric=False), int8, None),
        "W4A8 groups of 32": (weights(4, 32), int8, "pack-quantized"),
        "W4A8 groups of 256": (weights(4, 256), int8, "pack-quantized"),
        "W4A8 one group": (weights(4, 512), int8, "int-quantized"),
        "W4A8 int-quantized": (weights(4, 128), int8, "int-quantized"),
        "W4A8 int-quantized, groups of 96": (weights(4, 96), int8, "int-quantized"),
        "W4A8 int-quantized, groups of 32": (weights(4, 32), int8, "int-quantized"),
        "W4A8 int-quantized, groups of 16": (weights(4, 16), int8, "int-quantized"),
        "W4A8 int-quantized, per channel": (weights(4), int8, "int-quantized"),
        "W3A8": (weights(3, 128), int8, "pack-quantized"),
        "W3A8 per channel": (weights(3), int8, "pack-quantized"),
        "W8A8 packed": (weights(8), int8, "pack-quantized"),
        "W8A8 packed, zero points": (
            weights(8, symmetric=False),
            int8,
            "pack-quantized",
        ),
        "W3A4": (weights(3, 128), int8 | {"num_bits": 4}, "pack-quantized"),
        "W8A16": (weights(8, 128), None, "pack-quantized"),
        "W8A16 zero points": (weights(8, 128, symmetric=False), None, None),
        "W4A16 per channel": (weights(4), None, "pack-quantized"),
        "W4AFP8 int-quantized": (weights(4, 128), fp8, "int-quantized"),
        "W4AFP8 groups of 64": (weights(4, 64), fp8, "pack-quantized"),
        "FP8": (weights(8, type="float"), fp8, "float-quantized"),
    }
    return {
        name: plain_group(
            QuantizationScheme(
                targets=["Linear"],
                weights=weight,
                input_activations=inputs,
                format=form,
            )
        )
        for name, (weight, inputs, form) in declared.items()
    }


def _groups() -> dict[str, dict[str, Any]]:
    groups = _more_groups()
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        modifiers, findings = lint_recipe(path)
        assert not findings, path
        for declared in declared_groups(modifiers):
            groups[f"{path.stem} {declared.name}"] = declared.group
    return groups


GROUPS = _groups()


def _questions() -> list[Question]:
    """Every group on every target, and again with each flag that the table names."""
    questions = []
    for name, group in GROUPS.items():
        size = group["weights"]["group_size"] or 1
        for target in TARGETS:
            questions += [
                Question(name, target, layer=layer)
                for layer in (LAYER, *AWKWARD)
                if layer.inputs % size == 0
            ]
            flag = serve(group, find_target(target), LAYER).flag or ""
            if flag.startswith("--linear-backend "):
                questions.append(Question(name, target, flag.split()[1]))
    return questions


QUESTIONS = _questions()
#: limits the libraries that multiply; scripts/avx2 does so for PyTorch
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}


def _fields(target: Target) -> dict[str, Any]:
    names = ("name", "platform", "capability", "isa")
    return {name: getattr(target, name) for name in names}


@pytest.fixture(scope="module")
def answers(serve_env: Path) -> dict[Question, dict[str, Any]]:
    possible = [q for q in QUESTIONS if _impossible(q.target) is None]
    on_avx2 = [q for q in possible if q.target == "cpu-avx2"]
    others = [q for q in possible if q.target != "cpu-avx2"]
    # vLLM loads one library per process.
    return _ask(serve_env, on_avx2, [ROOT / "scripts" / "avx2"], AVX2) | _ask(
        serve_env, others, [], {}
    )


def _ask(
    serve_env: Path,
    asked: list[Question],
    folders: list[Path],
    settings: dict[str, str],
) -> dict[Question, dict[str, Any]]:
    document = {
        "questions": [
            {
                "layer": [question.layer.inputs, question.layer.outputs],
                "target": _fields(find_target(question.target)),
                "group": GROUPS[question.group],
                "backend": question.backend,
            }
            for question in asked
        ],
    }
    paths = [*folders, serve_env.resolve() / "humming"]
    joined = [*map(str, paths), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [str(serve_env / "bin" / "python"), "scripts/ask_vllm.py"],
        input=json.dumps(document),
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(joined)} | settings,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["vllm"].split("+")[0] == load_table()["asked"]
    return dict(zip(asked, result["answers"], strict=True))


def _impossible(target: str) -> str | None:
    """Why this machine's CPU cannot answer for a target; with AVX2 alone it can."""
    if target == "cpu-amx" and not torch.cpu._is_amx_tile_supported():
        return "this machine has no AMX"
    if target == "cpu-avx512" and not torch.cpu._is_avx512_supported():
        return "this machine has no AVX-512"
    return None


@pytest.mark.parametrize("target", TARGETS)
def test_scheme_and_kernel(target: str, answers) -> None:
    """Every group of every recipe: the table says what vLLM chooses."""
    if (why := _impossible(target)) is not None:
        pytest.skip(why)
    wrong = []
    for question, answer in answers.items():
        if question.target != target or question.backend != "auto":
            continue
        group = GROUPS[question.group]
        expected = serve(group, find_target(target), question.layer)
        problem = _difference(expected, answer, group)
        if problem:
            size = f"{question.layer.inputs} x {question.layer.outputs}"
            wrong.append(f"{question.group} ({describe(group)}, {size}): {problem}")
    assert not wrong, "\n".join(wrong)


def _difference(expected, answer, group) -> str | None:
    scheme, kernel = answer["scheme"], answer["kernel"]
    found = f"vLLM: {scheme} -> {kernel}, {answer['error']}"
    if "unasked" in answer:
        # The compiled CUDA extension decides; the row has to say that it was read.
        asked = expected.scheme == scheme and expected.evidence == "source"
        return None if asked else found
    if expected.served or expected.kernel is not None:
        same = (expected.scheme, expected.kernel) == (scheme, kernel)
        return None if same else f"{expected.scheme} -> {expected.kernel}; {found}"
    # Not served: vLLM raises, or asks for tensors that the file will not have.
    if answer["error"] is not None:
        return None
    stored = "weight_packed" if group["format"] == "pack-quantized" else "weight"
    return found if stored in answer["parameters"] else None


@pytest.mark.parametrize("target", CPUS)
def test_what_the_cpu_computes(target: str, answers) -> None:
    """The precision that the table names explains the result; else there is none."""
    if (why := _impossible(target)) is not None:
        pytest.skip(why)
    compared = 0
    for question, answer in answers.items():
        if question.target != target or answer["kernel"] is None:
            continue
        group = GROUPS[question.group]
        if group["weights"]["type"] == "float":
            continue
        expected = serve(group, find_target(target), question.layer)
        if not expected.served:
            assert answer["error"] is not None, question
            broken = "cpu_gemm_wna16" in answer["error"]
            assert broken == (expected.evidence == "run"), (question, answer["error"])
            continue
        assert expected.evidence == "run" and not answer["error"], (question, answer)
        assert answer["computes"] == expected.computes, (question, answer["errors"])
        first, second = sorted(answer["errors"].values())[:2]
        assert first < 0.004 and 2 * first < second, (question, answer["errors"])
        compared += 1
    assert compared > 10


def test_flags(answers) -> None:
    """With the flag that the table names, vLLM chooses a kernel that works."""
    flagged = {q: a for q, a in answers.items() if q.backend != "auto"}
    assert {q.backend for q in flagged} == {"humming", "triton"}
    for question, answer in flagged.items():
        expected = {
            "humming": "HummingLinearKernel",
            "triton": "TritonInt8ScaledMMLinearKernel",
        }
        assert answer["kernel"] == expected[question.backend], (question, answer)


def test_what_humming_computes(answers) -> None:
    """vLLM settles on the precision that the table names, by default or by flag."""
    settled = {q: a["computes"] for q, a in answers.items() if "computes" in a}
    on_gpus = {q: c for q, c in settled.items() if q.target.startswith("sm")}
    if not on_gpus:
        pytest.skip("the serving environment has no humming; run `make serve-env`")
    for question, computes in on_gpus.items():
        group = GROUPS[question.group]
        expected = serve(group, find_target(question.target), question.layer)
        if question.backend == "humming":
            # The flag is there for inputs as declared.
            assert computes == f"int{group['inputs']['num_bits']} per token", question
        elif expected.served:
            assert computes == expected.computes, question
    assert len(on_gpus) > 20


def test_recipes_say_what_they_are_for() -> None:
    """The default recipe for each kind of hardware is served there as declared."""
    for recipe, targets in yaml.safe_load(DEFAULTS).items():
        modifiers, _ = lint_recipe(ROOT / "recipes" / f"{recipe}.yaml")
        (declared,) = declared_groups(modifiers)
        for target in targets:
            serving = serve(declared.group, find_target(target))
            assert serving.verdict == "as declared", (recipe, serving)


DEFAULTS = """
faq_slider_w4afp8: [sm90]
faq_slider_w4a8: [cpu-amx]
faq_slider_w4a8_cpu: [cpu-avx2, cpu-avx512, cpu-amx]
slider_w4a16: [cpu-avx512, sm80, sm89, sm90, sm100, sm120]
slider_w8a8: [cpu-avx2, cpu-avx512, cpu-amx, sm80, sm89, sm90]
"""
