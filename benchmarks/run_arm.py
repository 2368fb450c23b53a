"""Runs one arm in a process of its own and writes its result as JSON."""

import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationStatus
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from datasets import Dataset
from loguru import logger
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.methods import Arm, measures_weights_alone, stages
from benchmarks.texts import FILES, calibration_rows, evaluation_rows
from llmc_faq_slider import oneshot
from llmc_faq_slider.products import product_dtype
from llmc_faq_slider.report.perplexity import loss_and_divergence, next_token_loss

EVALUATION_LENGTH = 512


def run(arm: Arm, group_size: int, tasks: list[str]) -> dict[str, Any]:
    """Quality per text and task, and cost, of one arm."""
    tokenizer = AutoTokenizer.from_pretrained(arm.model)
    model = load(arm.model)
    cost = None
    if arm.method != "full_precision":
        rows = calibration_rows(tokenizer, arm.seed, arm.rows, arm.length)
        cost = quantize(model, arm, group_size, rows)
        put_weights_on_grid(model)
        model.set_attn_implementation("sdpa")
    model.to(product_dtype("auto", model.device))

    def measured() -> dict[str, Any]:
        scores = task_scores(model, tokenizer, tasks) if tasks else {}
        return {"quality": quality(model, arm), "scores": scores}

    found = measured() | {"cost": cost}
    if measures_weights_alone(arm.scheme, arm.method):
        for module in model.modules():
            if scheme := getattr(module, "quantization_scheme", None):
                scheme.input_activations = None
        found["weights_alone"] = measured()
    return found


def quality(model: PreTrainedModel, arm: Arm) -> dict[str, dict[str, float]]:
    """Loss per token, and divergence from full precision on the first rows, by text."""
    tokenizer = AutoTokenizer.from_pretrained(arm.model)
    reference = load(arm.model).to(model.dtype)
    found = {}
    for name in FILES:
        rows = evaluation_rows(tokenizer, name, arm.evaluation_rows, EVALUATION_LENGTH)
        compared, rest = rows.tensor_split([arm.divergence_rows])
        loss, kl = loss_and_divergence(reference, model, compared)
        if len(rest):
            share = len(compared) / len(rows)
            loss = share * loss + (1 - share) * next_token_loss(model, rest)
        found[name] = {"loss": loss, "kl": kl}
    return found


def put_weights_on_grid(model: PreTrainedModel) -> None:
    """Rounds all weights for good, or every forward pass would do it again."""
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None and scheme.weights is not None:
            module.weight.data = forward_quantize(
                module, module.weight.data, "weight", scheme.weights
            )
            module.quantization_status = QuantizationStatus.COMPRESSED


@contextmanager
def fast_products(device: torch.device) -> Iterator[None]:
    """
    bf16 linears multiply in fp32 and round the sums, where the device is faster at it:
    the same numbers but for the order of the sums. Our stage does so by itself.
    """
    plain = functional.linear

    def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        autocast = torch.is_autocast_enabled("cpu")
        if not autocast and inputs.dtype != torch.bfloat16:
            return plain(inputs, weight, bias)
        exact = (
            None if operand is None else operand.bfloat16().float()
            for operand in (inputs, weight, bias)
        )
        with torch.autocast("cpu", enabled=False):
            return plain(*exact).bfloat16()

    if product_dtype("auto", device) == torch.float32:
        functional.linear = linear
    try:
        yield
    finally:
        functional.linear = plain


def load(model: str) -> PreTrainedModel:
    loaded = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.bfloat16, attn_implementation="sdpa", use_safetensors=True
    )
    return loaded.to("cuda" if torch.cuda.is_available() else "cpu")


def quantize(
    model: PreTrainedModel, arm: Arm, group_size: int, rows: torch.Tensor
) -> dict[str, float]:
    """Runs the recipe on the model; wall and CPU or GPU seconds, peak memory in MB."""
    data = Dataset.from_dict(
        {"input_ids": rows.tolist(), "attention_mask": torch.ones_like(rows).tolist()}
    )
    recipe = stages(arm, group_size)
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        # PyTorch's fused attention for CPUs is the slowest there is on rows this short.
        model.set_attn_implementation("eager")
    ours = "slider" in arm.method
    wall, cpu = time.monotonic(), time.process_time()
    with nullcontext() if ours else fast_products(model.device):
        oneshot(
            model=model, recipe=recipe, dataset=data, num_calibration_samples=arm.rows
        )
    cost = {"wall_s": time.monotonic() - wall, "cpu_s": time.process_time() - cpu}
    if on_gpu:
        cost["peak_mb"] = torch.cuda.max_memory_allocated() / 1e6
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        cost["peak_mb"] = peak / (1e6 if sys.platform == "darwin" else 1e3)
    return cost


def task_scores(
    model: PreTrainedModel, tokenizer: Any, tasks: list[str]
) -> dict[str, float]:
    """Accuracy per lm-eval task, normalised by length where the task has that."""
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        sys.exit("--tasks needs lm-eval: pip install 'llmc-faq-slider[eval]'")
    found = lm_eval.simple_evaluate(HFLM(model, tokenizer=tokenizer), tasks=tasks)
    scores = {}
    for task, values in found["results"].items():
        accuracy = values.get("acc_norm,none", values.get("acc,none"))
        if accuracy is None:
            sys.exit(
                f"--tasks: {task} has no accuracy, but {', '.join(values)}. Name tasks "
                "with one, such as arc_easy or hellaswag."
            )
        scores[task] = float(accuracy)
    return scores


def measure(request: Path, target: Path) -> None:
    """Runs the arm of a specification; that and the result go to ``target``."""
    spec = json.loads(request.read_text())
    torch.manual_seed(spec["arm"]["seed"])
    result = run(Arm(**spec["arm"]), spec["group_size"], spec["tasks"])
    result["threads"] = torch.get_num_threads()
    draft = target.with_suffix(".part")
    draft.write_text(json.dumps(spec | result, indent=1))
    draft.rename(target)


def measure_logged(request: Path, target: Path, log: Path, threads: int) -> None:
    """:func:`measure`, with all that the process prints in ``log``."""
    with log.open("w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    logger.remove()
    logger.add(sys.stderr, level="WARNING")
    torch.set_num_threads(threads)
    # AutoRound asks for deterministic operations, which fill new memory before it is
    # used. That costs time and changes no result.
    torch.utils.deterministic.fill_uninitialized_memory = False
    measure(request, target)
