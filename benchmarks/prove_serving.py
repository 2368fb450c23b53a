"""Served equals trained: vLLM against the model as it was quantised.

    make prove-serving
    python -m benchmarks.prove_serving --model smollm2 --recipes slider_w4a16
    python -m benchmarks.prove_serving --model large --gpu-environment DIR

Every recipe quantises the model with its own quantisation stages (rows of held-out text
stand in for FAQ's, and group sizes shrink to what divides the model's layers). Then
vLLM, offline and over HTTP, gives log-probabilities, greedy tokens and the output of
each linear, and all are compared with the model in memory. A recipe that vLLM does not
serve here, by the table of `llmc-faq-slider check`, is loaded in transformers
instead. Writes a file per recipe, ``summary.json`` and ``table.md``; exits with 1 if
anything differs by more than its tolerance. What was proven with the same code and
numbers is not proven again.
"""

import copy
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from compressed_tensors.offload import remove_dispatch
from datasets import Dataset
from loguru import logger
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.http_checks import check_http
from benchmarks.quality import small_or_real
from benchmarks.runner import group_size_for, source_digest
from benchmarks.served import (
    SERVE_ENV,
    Answer,
    Tolerance,
    computing,
    exact_weights,
    input_errors,
    make_probes,
    multiply_as_served,
    quantised_linears,
    run_vllm,
    saturated_error,
    token_logprobs,
    tolerance,
)
from benchmarks.texts import CACHE, ROOT, calibration_rows, evaluation_rows
from llmc_faq_slider import oneshot
from llmc_faq_slider.host.declared import declared_groups
from llmc_faq_slider.host.recipe_lint import lint_recipe
from llmc_faq_slider.report.server import serve as http_server
from llmc_faq_slider.report.serving import (
    Serving,
    Target,
    describe,
    find_target,
    serve,
    this_cpu,
)

RECIPES = ROOT / "recipes"
PROMPTS, PROMPT_LENGTH, NEW_TOKENS = 20, 32, 16
PERPLEXITY_BOUND = 0.005
SAME_PROMPTS = 18
#: relative error of a kernel's output against the arithmetic it is said to do (bf16
#: alone makes 0.0017, Machete's rounded products of zero point and scale 0.0055, a
#: wrong channel 0.02), and how many times larger it is against any other
LAYER_ERROR, LAYER_MARGIN = 0.008, 2
#: nats, where large products saturate: 0.08 and 0.9 were seen
SATURATED = Tolerance(0.25, 3.0, "pairs of int8 products are added in 16 bits")
#: transformers computes the reloaded checkpoint as the model was computed in memory
RELOAD_BOUND = 1e-3


@dataclass
class Trained:
    """A quantised model in memory, its checkpoint, and what is to be compared.

    :param computes: inputs of vLLM's kernel here, None where vLLM does not serve it
    :param exact: the model in fp32, as vLLM's kernel computes
    :param logprobs: ``[rows, length - 1]`` of ``exact``
    :param declared: the same with inputs as the checkpoint declares them
    :param rounding: change of ``logprobs`` when transformers computes in bf16
    """

    recipe: str
    checkpoint: Path
    servings: list[Serving]
    described: str
    computes: str | None
    exact: PreTrainedModel
    linears: dict[str, list[nn.Module]]
    logprobs: Tensor
    declared: Tensor
    rounding: Tensor


@dataclass
class Proof:
    """What was found for one recipe; ``failures`` are sentences."""

    recipe: str
    format: str
    reader: str
    kernel: str
    computes: str
    figures: dict[str, float | int | str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def expect(self, holds: bool, sentence: str) -> None:
        if not holds:
            self.failures.append(sentence)


#: this machine's CPU in the serving table
local_target = this_cpu


def gpu_target() -> Target | None:
    """The first NVIDIA GPU of this machine, None without one."""
    if shutil.which("nvidia-smi") is None:
        return None
    asked = subprocess.run(
        ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"],
        capture_output=True,
        text=True,
    )
    lines = asked.stdout.split()
    if asked.returncode or not lines:
        return None
    return find_target("sm" + lines[0].replace(".", ""))


def where(gpu_environment: Path | None) -> tuple[Target, Path]:
    """Target and environment of vLLM: the GPU if one is given for it, else the CPU."""
    if gpu_environment is not None:
        gpu = gpu_target()
        if gpu is None:
            sys.exit("Skipped: nvidia-smi finds no NVIDIA GPU here.")
        return gpu, gpu_environment
    unsupported = SERVE_ENV / "unsupported"
    if unsupported.exists():
        sys.exit(f"Skipped: {unsupported.read_text().strip()}.")
    return local_target(), SERVE_ENV


def own_stages(recipe: Path, layers: int, group_size: int, epochs: int | None) -> str:
    """
    The quantisation stages of a recipe, fit for a model, as YAML.

    :param layers: of the model, for recipes that name the last ones
    :param group_size: the largest that divides the model's layers
    :param epochs: of SliderQuant; None leaves the recipe's
    """
    text = recipe.read_text("utf-8").replace("26|27", f"{layers - 2}|{layers - 1}")
    stages = {
        name: stage
        for name, stage in yaml.safe_load(text).items()
        if "faq_modifiers" not in stage
    }
    for stage in stages.values():
        for modifiers in stage.values():
            for name, fields in modifiers.items():
                for group in fields.get("config_groups", {}).values():
                    size = group["weights"].get("group_size")
                    if size is not None:
                        group["weights"]["group_size"] = min(size, group_size)
                if name == "SliderQuantModifier" and epochs is not None:
                    fields |= {"epochs": epochs, "closing_epochs": 1}
    return yaml.safe_dump(stages, sort_keys=False)


def train(
    model: str,
    recipe: Path,
    calibration: Tensor,
    rows: Tensor,
    folder: Path,
    epochs: int | None,
    target: Target,
) -> Trained:
    """Quantise, compute what is compared later, and save the checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    quantised: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.bfloat16
    ).eval()
    layers = quantised.config.num_hidden_layers
    path = folder / f"{recipe.stem}.yaml"
    path.write_text(own_stages(recipe, layers, group_size_for(model), epochs))
    ids = calibration.tolist()
    data = Dataset.from_dict(
        {"input_ids": ids, "attention_mask": torch.ones_like(calibration).tolist()}
    )
    oneshot(
        model=quantised,
        recipe=str(path),
        dataset=data,
        num_calibration_samples=len(ids),
    )
    # Else it computes on the GPU where there is one, in copies of its weights.
    remove_dispatch(quantised)
    modifiers, _ = lint_recipe(path)
    groups = [declared.group for declared in declared_groups(modifiers)]
    servings = [serve(group, target) for group in groups]
    computed = {serving.computes if serving.served else None for serving in servings}
    computes = computed.pop() if len(computed) == 1 else None

    exact = copy.deepcopy(quantised).float()
    declared_logprobs = token_logprobs(exact, rows)
    if computes is not None:
        multiply_as_served(exact)
    with computing(exact, computes):
        logprobs = token_logprobs(exact, rows)
    with computing(half := copy.deepcopy(exact).to(torch.bfloat16), computes):
        rounding = token_logprobs(half, rows) - logprobs
    checkpoint = folder / recipe.stem
    quantised.save_pretrained(checkpoint, save_compressed=True)
    AutoTokenizer.from_pretrained(model).save_pretrained(checkpoint)
    return Trained(
        recipe=recipe.stem,
        checkpoint=checkpoint,
        servings=servings,
        described="; ".join(describe(group) for group in groups),
        computes=computes,
        exact=exact,
        linears=quantised_linears(exact),
        logprobs=logprobs,
        declared=declared_logprobs,
        rounding=rounding,
    )


def perplexity(logprobs: Tensor) -> float:
    return math.exp(-logprobs.double().mean().item())


def compare(trained: Trained, answer: Answer, prompts: Tensor) -> Proof:
    """vLLM's answer against the model in memory, computing as vLLM's kernel does."""
    (serving, *_) = trained.servings
    assert trained.computes is not None
    bound = bound_of(trained)
    proof = Proof(
        trained.recipe,
        trained.described,
        "vLLM",
        str(serving.kernel),
        trained.computes,
    )
    told = torch.tensor(answer.logprobs)
    _compare_logprobs(proof, trained, told, bound.mean, bound.largest)
    proof.figures["mean difference to declared"] = _mean(told, trained.declared)
    _compare_kernels(proof, trained, answer)
    if bound is SATURATED:
        for name, inputs in make_probes(trained.linears).items():
            error = saturated_error(trained.linears[name], inputs, answer.outputs[name])
            proof.expect(error < LAYER_ERROR, f"{name} is off by {error:.4f}")
    else:
        told = torch.tensor(answer.greedy)
        _compare_layers(proof, trained, answer)
        _compare_greedy(proof, trained, prompts, told, bound.largest)
    return proof


def bound_of(trained: Trained) -> Tolerance:
    """Wider where oneDNN multiplies int8 by an instruction of AVX2 that saturates."""
    (serving, *_) = trained.servings
    kernel, target = serving.kernel, serving.target.name
    if (kernel, target) == ("CPUInt8ScaledMMLinearKernel", "cpu-avx2"):
        return SATURATED
    return tolerance(str(trained.computes), trained.rounding)


def _mean(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().mean().item()


def _compare_logprobs(
    proof: Proof, trained: Trained, told: Tensor, mean: float, largest: float
) -> None:
    change = told - trained.logprobs
    difference = change.abs()
    ours, theirs = perplexity(trained.logprobs), perplexity(told)
    proof.figures |= {
        "mean difference": difference.mean().item(),
        "largest difference": difference.max().item(),
        "mean difference of transformers in bf16": trained.rounding.abs().mean().item(),
        "perplexity in memory": ours,
        "perplexity as read": theirs,
    }
    proof.expect(
        difference.mean().item() <= mean,
        f"log-probabilities differ by {difference.mean():.4f} nats on average, "
        f"more than {mean}",
    )
    proof.expect(
        difference.max().item() <= largest,
        f"a log-probability differs by {difference.max():.3f} nats, more than "
        f"{largest}",
    )
    chance = 2 * change.std().item() / math.sqrt(change.numel())
    proof.expect(
        abs(theirs / ours - 1) <= max(PERPLEXITY_BOUND, chance),
        f"perplexity is {theirs:.3f}, in memory {ours:.3f}",
    )


def _compare_kernels(proof: Proof, trained: Trained, answer: Answer) -> None:
    schemes = {(serving.scheme, serving.kernel) for serving in trained.servings}
    for name, found in answer.kernels.items():
        proof.expect(
            found in schemes, f"{name} went to {found}, the table says {schemes}"
        )


def _compare_layers(proof: Proof, trained: Trained, answer: Answer) -> None:
    """Every linear alone: its output says which arithmetic the kernel did."""
    largest, margin = 0.0, math.inf
    for name, inputs in make_probes(trained.linears).items():
        weight = exact_weights(trained.linears[name])
        errors = input_errors(weight, inputs, answer.outputs[name])
        own = errors.pop(str(trained.computes))
        largest, margin = max(largest, own), min(margin, min(errors.values()) / own)
    proof.figures |= {"layer error": largest, "layer margin": margin}
    proof.expect(largest < LAYER_ERROR, f"a layer's output is off by {largest:.4f}")
    proof.expect(
        margin > LAYER_MARGIN,
        f"a layer's output is only {margin:.1f} times closer to that of its inputs "
        "than to that of others",
    )


def _compare_greedy(
    proof: Proof, trained: Trained, prompts: Tensor, told: Tensor, largest: float
) -> None:
    """
    Greedy tokens, up to the first difference of each prompt.

    Until then both have seen the same tokens, so one pass over vLLM's own continuation
    says what the model in memory would have chosen at each step.
    """
    with computing(trained.exact, trained.computes), torch.inference_mode():
        rows = torch.cat([prompts, told], 1)
        logits = trained.exact(input_ids=rows, use_cache=False).logits
    scores = logits[:, prompts.shape[1] - 1 : -1].float().log_softmax(-1)
    best = scores.amax(-1)
    gaps = best - scores.gather(2, told[..., None])[..., 0]
    first = [row[row > 0][0].item() for row in gaps if (row > 0).any()]
    same = len(prompts) - len(first)
    proof.figures |= {
        "prompts with the same tokens": same,
        "largest gap at a first difference": max(first, default=0.0),
    }
    proof.expect(
        same >= SAME_PROMPTS or max(first) <= largest,
        f"{same} of {len(prompts)} prompts go on alike, and a first difference has a "
        f"gap of {max(first, default=0.0):.3f} nats",
    )


def compare_reloaded(trained: Trained, rows: Tensor) -> Proof:
    """The checkpoint in transformers, for formats that vLLM does not serve here."""
    why = next((s.why for s in trained.servings if not s.served), None)
    proof = Proof(
        trained.recipe,
        trained.described,
        "transformers",
        "none here",
        "as declared",
        {"why not vLLM": why or "its groups are computed in different ways"},
    )
    reloaded = AutoModelForCausalLM.from_pretrained(
        trained.checkpoint, dtype=torch.float32
    ).eval()
    told = token_logprobs(reloaded, rows)
    _compare_logprobs(proof, trained, told, RELOAD_BOUND, 50 * RELOAD_BOUND)
    return proof


def prove(
    model: str,
    recipe: Path,
    calibration: Tensor,
    rows: Tensor,
    folder: Path,
    epochs: int | None,
    http: bool,
    target: Target,
    environment: Path,
) -> Proof:
    """Quantise by a recipe; compare what reads the checkpoint with what was made."""
    trained = train(model, recipe, calibration, rows, folder, epochs, target)
    if trained.computes is None:
        return compare_reloaded(trained, rows)
    prompts = prompts_of(rows)
    (answer,) = run_vllm(
        [trained.checkpoint],
        rows,
        prompts,
        NEW_TOKENS,
        make_probes(trained.linears),
        folder / "vllm",
        environment,
    )
    if isinstance(answer, RuntimeError):
        raise answer
    proof = compare(trained, answer, prompts)
    if http:
        log = folder / f"{trained.recipe}.log"
        tokenizer = AutoTokenizer.from_pretrained(trained.checkpoint)
        with http_server(trained.checkpoint, environment, log, timeout=900) as server:
            figures, failures = check_http(
                server,
                rows,
                trained.logprobs,
                bound_of(trained),
                chats=tokenizer.chat_template is not None,
            )
        proof.figures |= figures
        proof.failures += failures
    return proof


def stored(path: Path, settings: dict[str, Any], proof: Callable[[], Proof]) -> Proof:
    """The proof in a file if it was made with these settings, else a new one."""
    if path.exists():
        found = json.loads(path.read_text())
        if found["settings"] == settings:
            return Proof(**found["proof"])
    made = proof()
    path.write_text(json.dumps({"settings": settings, "proof": asdict(made)}, indent=1))
    return made


def prompts_of(rows: Tensor) -> Tensor:
    """Beginnings ``[prompts, length]`` to go on from, cut from the compared rows."""
    ids = rows.reshape(-1)[: PROMPTS * PROMPT_LENGTH]
    return ids.view(PROMPTS, PROMPT_LENGTH)


def markdown(proofs: list[Proof]) -> str:
    lines = [
        "| recipe | read by | kernel | inputs | mean (largest) difference, nats "
        "| transformers in bf16 | to declared | perplexity: memory, read | layer error "
        "| same greedy | |",
        f"|{'---|' * 11}",
    ]
    for proof in proofs:
        f = proof.figures
        layer = f"{f['layer error']:.4f}" if "layer error" in f else ""
        declared = f.get("mean difference to declared", "")
        declared = f"{declared:.4f}" if declared != "" else ""
        same = f.get("prompts with the same tokens", "")
        gap = f.get("largest gap at a first difference", 0.0)
        greedy = f"{same} of {PROMPTS}" + (f" (gap {gap:.3f})" if gap else "")
        lines.append(
            f"| `{proof.recipe}` | {proof.reader} "
            f"| {proof.kernel.removesuffix('LinearKernel')} | {proof.computes} "
            f"| {f['mean difference']:.4f} ({f['largest difference']:.3f}) "
            f"| {f['mean difference of transformers in bf16']:.4f} | {declared} "
            f"| {f['perplexity in memory']:.3f}, {f['perplexity as read']:.3f} "
            f"| {layer} | {greedy if same != '' else ''} "
            f"| {'; '.join(proof.failures) or 'equal'} |"
        )
    return "\n".join(lines) + "\n"


def family_rows(model: str | Path, count: int, length: int, half: int) -> Tensor:
    """Held-out text of the tiny family; it has seen none of the other texts."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids: list[int] = []
    for path in sorted((ROOT / "tests" / "data" / "heldout").glob("*.txt")):
        text = path.read_text("utf-8")
        middle = len(text) // 2
        ids += tokenizer((text[:middle] if half == 0 else text[middle:])[:8000])[
            "input_ids"
        ]
    rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return rows[order[:count]]


def main(
    model: Annotated[
        str, typer.Option(help="small, large, smollm2, a folder or a hub id")
    ] = "small",
    recipes: Annotated[str, typer.Option(help="names, default: all")] = "",
    rows: Annotated[int, typer.Option(help="of 128 tokens, compared")] = 16,
    calibration: Annotated[int, typer.Option(help="rows of 128 tokens")] = 32,
    epochs: Annotated[
        int, typer.Option(help="of SliderQuant, 0 for the recipe's own")
    ] = 2,
    http: Annotated[bool, typer.Option(help="serve each over HTTP as well")] = True,
    gpu_environment: Annotated[
        Path | None,
        typer.Option(help="prove it on the GPU: virtual environment with vLLM for it"),
    ] = None,
    output: Annotated[Path, typer.Option()] = CACHE / "prove-serving",
) -> None:
    """Quantises with every recipe and compares what vLLM computes."""
    logger.remove()
    logger.add(sys.stderr, level="WARNING")
    target, environment = where(gpu_environment)
    folder = small_or_real(model)
    chosen = (
        [RECIPES / f"{name}.yaml" for name in re.split(r"[,\s]+", recipes.strip())]
        if recipes
        else sorted(RECIPES.glob("*.yaml"))
    )
    missing = [path.stem for path in chosen if not path.exists()]
    if missing:
        sys.exit(f"There is no recipe {', '.join(missing)} in {RECIPES}.")
    if model in ("small", "large"):
        first = family_rows(folder, calibration, 128, half=0)
        second = family_rows(folder, rows, 128, half=1)
    else:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        first = calibration_rows(tokenizer, 0, calibration, 128)
        second = evaluation_rows(tokenizer, "wikipedia", rows, 128)
    results = output / target.name / Path(folder).name
    results.mkdir(parents=True, exist_ok=True)
    proofs = []
    for recipe in tqdm(chosen, unit="recipe", desc="Proving"):
        settings = {
            "recipe": recipe.read_text("utf-8"),
            "code": source_digest(),
            "numbers": [rows, calibration, epochs, http],
        }
        one = partial(
            prove,
            folder,
            recipe,
            first,
            second,
            results,
            epochs or None,
            http,
            target,
            environment,
        )
        proofs.append(stored(results / f"{recipe.stem}.json", settings, one))
    document: dict[str, Any] = {
        "model": Path(folder).name,
        "target": target.name,
        "proofs": [asdict(proof) for proof in proofs],
    }
    (results / "summary.json").write_text(json.dumps(document, indent=1))
    table = markdown(proofs)
    (results / "table.md").write_text(table)
    print(table)
    sys.exit(1 if any(proof.failures for proof in proofs) else 0)


if __name__ == "__main__":
    typer.run(main)
