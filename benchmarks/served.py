"""A model as it was quantised, in memory, against what vLLM makes of its checkpoint.

The in-memory model computes with compressed-tensors' own fake quantisation. Kernels may
compute with other inputs than the checkpoint declares (`llmc-faq-slider check` says
which); ``computing`` gives the in-memory model the inputs of the kernel, so that what
is left is rounding.
"""

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStatus
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from kernel_inputs import input_errors, random_inputs
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.texts import ROOT
from llmc_faq_slider.host.grids import linear_grids
from llmc_faq_slider.report.serving import load_table

__all__ = [
    "FUSED",
    "Answer",
    "Tolerance",
    "computing",
    "exact_weights",
    "input_errors",
    "make_probes",
    "multiply_as_served",
    "quantised_linears",
    "run_vllm",
    "saturated_error",
    "token_logprobs",
    "tolerance",
]

SERVE_ENV = ROOT / ".venv-serve"
FUSED: dict[str, list[str]] = load_table()["fused"]


@dataclass(frozen=True)
class Tolerance:
    """Largest difference of log-probabilities in nats: on average, and of one token."""

    mean: float
    largest: float
    reason: str


#: by precision of the inputs in the kernel; both sides compute in bf16
TOLERANCES = {
    "16 bit": Tolerance(
        0.02, 0.2, "bf16 sums in another order, and rounds in other places"
    ),
    "int8": Tolerance(
        0.03, 0.3, "the same, and a bf16 rounding can move an int8 input by one step"
    ),
    "FP8": Tolerance(
        0.05, 0.5, "the same, and a step of an FP8 input is up to a sixteenth of it"
    ),
    "int4": Tolerance(
        0.10, 1.0, "the same, and a step of an int4 input is a seventh of its token"
    ),
}


# What vLLM's bf16 may differ by, in differences that transformers' own bf16 makes. The
# largest of two thousand is one draw from a long tail, so the mean is what decides.
AMPLIFIED_MEAN, AMPLIFIED_LARGEST = 1.25, 3.0


def tolerance(computes: str, rounding: Tensor | None = None) -> Tolerance:
    """
    :param computes: precision of the inputs, in the words of the serving table
    :param rounding: differences of log-probabilities that bf16 makes without vLLM. A
        model with outliers can amplify these far beyond the table
    """
    known = TOLERANCES[computes if computes == "16 bit" else computes.split(" per ")[0]]
    if rounding is None or rounding.abs().mean() <= known.mean:
        return known
    return Tolerance(
        AMPLIFIED_MEAN * rounding.abs().mean().item(),
        AMPLIFIED_LARGEST * rounding.abs().max().item(),
        known.reason,
    )


@dataclass(frozen=True)
class Answer:
    """What vLLM made of one checkpoint.

    :param kernels: scheme and kernel by vLLM's name of the linear
    :param outputs: what each linear made of its probe, bf16
    """

    logprobs: list[list[float]]
    greedy: list[list[int]]
    kernels: dict[str, tuple[str, str]]
    outputs: dict[str, Tensor]
    seconds: float


def run_vllm(
    checkpoints: list[Path],
    rows: Tensor,
    prompts: Tensor,
    max_tokens: int,
    probes: dict[str, Tensor],
    folder: Path,
    environment: Path = SERVE_ENV,
) -> list[Answer | RuntimeError]:
    """
    vLLM's answers, one per checkpoint, from one process of the serving environment.

    Where vLLM fails at a checkpoint, an error with the end of its log takes the place
    of the answer, and a new process goes on with the next one.

    :param rows: token ids ``[rows, length]`` whose log-probabilities are asked for
    :param prompts: token ids ``[prompts, length]`` that are continued greedily
    :param probes: inputs ``[tokens, inputs]`` bf16 by vLLM's name of a linear
    :param folder: for files that go to and fro, and the logs
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_file(probes, folder / "probes.safetensors")
    for index in range(len(checkpoints)):
        (folder / f"{index}.json").unlink(missing_ok=True)
    request = {
        "checkpoints": [str(path.resolve()) for path in checkpoints],
        "rows": rows.tolist(),
        "prompts": prompts.tolist(),
        "max_tokens": max_tokens,
        "max_model_len": max(rows.shape[1] + 1, prompts.shape[1] + max_tokens),
        "probes": str((folder / "probes.safetensors").resolve()),
        "output": str(folder.resolve()),
    }
    answers: list[Answer | RuntimeError] = []
    while len(answers) < len(checkpoints):
        first = len(answers)
        log = folder / f"vllm-{first}.log"
        with log.open("w") as output:
            subprocess.run(
                [str(environment / "bin" / "python"), "scripts/run_vllm.py"],
                input=json.dumps(request | {"first": first}),
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
            )
        while (folder / f"{len(answers)}.json").exists():
            answers.append(_read_answer(folder / str(len(answers))))
        if len(answers) < len(checkpoints):
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
            name = checkpoints[len(answers)].name
            answers.append(RuntimeError(f"vLLM failed at {name}, see {log}:\n{tail}"))
    return answers


def _read_answer(stem: Path) -> Answer:
    document = json.loads(stem.with_suffix(".json").read_text())
    kernels = {name: tuple(pair) for name, pair in document.pop("kernels").items()}
    outputs = load_file(stem.with_suffix(".safetensors"))
    return Answer(**document, kernels=kernels, outputs=outputs)


def quantised_linears(model: PreTrainedModel) -> dict[str, list[nn.Module]]:
    """Linears with quantised weights by vLLM's name; those it fuses are together."""
    fused_name = {part: whole for whole, parts in FUSED.items() for part in parts}
    linears: dict[str, list[nn.Module]] = {}
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None and scheme.weights is not None:
            parent, _, last = name.rpartition(".")
            whole = f"{parent}.{fused_name.get(last, last)}"
            linears.setdefault(whole, []).append(module)
    return linears


@contextmanager
def computing(model: PreTrainedModel, computes: str | None) -> Iterator[None]:
    """
    The in-memory model quantises its inputs as a kernel does.

    :param computes: precision in the words of the serving table; None leaves it as
        declared
    """
    schemes = {
        id(module.quantization_scheme): module.quantization_scheme
        for modules in quantised_linears(model).values()
        for module in modules
    }
    before = {key: scheme.input_activations for key, scheme in schemes.items()}
    try:
        if computes is not None:
            for scheme in schemes.values():
                scheme.input_activations = _input_args(computes)
        yield
    finally:
        for key, scheme in schemes.items():
            scheme.input_activations = before[key]


def _input_args(computes: str) -> QuantizationArgs | None:
    if computes == "16 bit":
        return None
    kind, _, spread = computes.partition(" per ")
    return QuantizationArgs(
        num_bits=8 if kind in ("int8", "FP8") else 4,
        type="float" if kind == "FP8" else "int",
        strategy="token",
        dynamic=True,
        symmetric="zero point" not in spread,
    )


@torch.inference_mode()
def token_logprobs(model: PreTrainedModel, rows: Tensor) -> Tensor:
    """Log-probability fp32 ``[rows, length - 1]`` of every token but the first."""
    found = []
    for batch in rows.split(4):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        scores = logits.log_softmax(-1)
        found.append(scores.gather(2, batch[:, 1:, None])[..., 0])
    return torch.cat(found)


@torch.inference_mode()
def exact_weights(modules: list[nn.Module]) -> Tensor:
    """
    Weights fp32 ``[outputs, inputs]`` as the kernel multiplies them, of linears that
    are fused.
    """
    return torch.cat([_kernel_weight(module) for module in modules])


def _kernel_weight(module: nn.Module) -> Tensor:
    weight, scale = module.weight.float(), module.weight_scale.float()
    if module.quantization_status == QuantizationStatus.COMPRESSED:
        return weight
    args = module.quantization_scheme.weights
    stored = fake_quantize(weight, scale, module.weight_zero_point, args)
    return linear_grids(module).weight.multiplied(stored, scale)


@torch.inference_mode()
def saturated_error(modules: list[nn.Module], inputs: Tensor, output: Tensor) -> float:
    """
    Relative error of an output against int8 products as oneDNN adds them with AVX2
    alone: two neighbours in 16 bits, where large ones saturate.

    :param modules: fused linears with int8 weights per channel
    :param inputs: ``[tokens, inputs]``, quantised to int8 per token
    """
    scale = torch.cat([module.weight_scale.float() for module in modules])
    codes = (exact_weights(modules) / scale).round()
    step = inputs.float().abs().amax(-1, keepdim=True) / 127
    # The instruction takes one side without signs.
    shifted = (inputs.float() / step).round() + 128
    pairs = (shifted[:, None] * codes).unflatten(-1, (-1, 2)).sum(-1)
    sums = pairs.clamp(-(2**15), 2**15 - 1).sum(-1) - 128 * codes.sum(-1)
    exact = sums * step * scale.view(1, -1)
    return ((output.float() - exact).norm() / exact.norm()).item()


def multiply_as_served(model: PreTrainedModel) -> None:
    """Weights become what the kernel multiplies, for good; inputs stay quantised."""
    for modules in quantised_linears(model).values():
        for module in modules:
            module.weight.data = exact_weights([module]).to(module.weight.dtype)
            module.quantization_status = QuantizationStatus.COMPRESSED


def make_probes(linears: dict[str, list[nn.Module]]) -> dict[str, Tensor]:
    """Random inputs per linear."""
    probes = {}
    for index, (name, modules) in enumerate(linears.items()):
        generator = torch.Generator().manual_seed(index)
        size = modules[0].weight.shape[1]
        probes[name] = random_inputs(size, generator)
    return probes
