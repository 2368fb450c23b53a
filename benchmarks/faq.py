"""What regenerated calibration data brings, at equal tokens and over three seeds.

    make bench-faq
    python -m benchmarks.faq --families tests --arms raw,family --methods gptq_w3a16

Every arm makes N rows of L tokens. ``raw`` are passages of books, ``raw_chat`` the same
written as chats, ``self`` and ``family`` what the target or its larger sibling answers
to them; ``prompts`` are answers of the target to the package's own prompts, less those
that are measured on. After a colon stands who chose among the candidates, by default
``expert_nll``; ``single`` has no other candidate to choose, and ``reasoned`` is such a
one whose generator is asked to think step by step. Each method quantises the
target with each arm's rows. Measured on chats nobody calibrates on: the mean
Kullback-Leibler divergence from the full-precision model, in nats per answer token, and
the perplexity of the answers. These are of two kinds: ``texts``, other passages by the
authors of the raw ones, and ``answers`` that the target itself gives in full precision.
The last column is how much smaller an arm's divergence is than that of raw passages,
``1 - KL / KL_raw``. Round-to-nearest reads no data, so it must not move.

Results are appended to a file as they come; what is there is not measured again.
"""

import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import torch
import typer
from datasets import Dataset
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from loguru import logger
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from benchmarks.markdown import markdown_table
from benchmarks.methods import config_groups
from benchmarks.quality import small_or_real
from benchmarks.run_arm import put_weights_on_grid
from benchmarks.runner import arm_context
from benchmarks.served import SERVE_ENV
from benchmarks.texts import CACHE, ROOT
from llmc_faq_slider import SliderQuantModifier, oneshot
from llmc_faq_slider.faq.assembly import experts, generator_source, stored_target
from llmc_faq_slider.faq.choice import pack
from llmc_faq_slider.faq.options import FAQOptions
from llmc_faq_slider.faq.regenerate import regenerate
from llmc_faq_slider.faq.rendering import Sample, encode, end_of_turn_id, prompt_text
from llmc_faq_slider.faq.sampling import sample_batch
from llmc_faq_slider.faq.seeds import Seed, shipped_seeds
from llmc_faq_slider.faq.settings import Sampling
from llmc_faq_slider.faq.store import Store
from llmc_faq_slider.report.server import Server, serve

TESTS = ROOT / "tests"

#: selectors of the arms whose candidates a generator writes
SELECTORS = ("expert_nll", "expert_judge", "random")
PASSAGE_WORDS = 120


@dataclass(frozen=True)
class Family:
    """A target, its larger sibling if there is one here, and the sizes of its arms."""

    name: str
    target: str
    sibling: str | None
    rows: int
    length: int
    new_tokens: int
    candidates: int
    chats: int
    methods: tuple[str, ...]
    arms: tuple[str, ...]
    measured_on: tuple[str, ...]


def families(smollm2: str) -> dict[str, Family]:
    own = ("raw", "raw_chat", "self")
    others = [name for name in SELECTORS if name != "expert_nll"]
    methods = ("rtn_w3a16", "gptq_w4a16", "gptq_w3a16", "slider_w4a8")
    tests = Family(
        "tests",
        str(TESTS / "models" / "small"),
        str(TESTS / "models" / "large"),
        *(32, 256, 96, 4, 48),
        methods,
        (
            *(*own, "family", "family:single"),
            *(f"family:{name}" for name in others),
        ),
        ("texts", "answers"),
    )
    smol = Family(
        "smollm2",
        smollm2,
        None,
        *(16, 256, 128, 3, 24),
        methods,
        (
            *(*own, "prompts:single", "prompts:reasoned", "prompts"),
            *(f"prompts:{name}" for name in others),
        ),
        ("answers",),
    )
    return {family.name: family for family in (tests, smol)}


@dataclass(frozen=True)
class Result:
    """One quantised model."""

    family: str
    arm: str
    method: str
    seed: int
    measured_on: str
    divergence: float
    perplexity: float
    seconds: float


def passages(half: int) -> list[Seed]:
    """Half 0 or 1 of each held-out text, cut into passages."""
    found = []
    for path in sorted((TESTS / "data" / "heldout").glob("*.txt")):
        text = path.read_text(encoding="utf-8")
        middle = len(text) // 2
        words = (text[:middle] if half == 0 else text[middle:]).split(" ")
        for start in range(0, len(words) - PASSAGE_WORDS, PASSAGE_WORDS):
            passage = " ".join(words[start : start + PASSAGE_WORDS])
            found.append(Seed("text", text=passage, source=path.stem))
    return found


def as_chat(tokenizer: PreTrainedTokenizerBase, text: str) -> Sample:
    """A passage as a chat: its first third asks, the rest answers."""
    words = text.split(" ")
    third = len(words) // 3
    asked = [{"role": "user", "content": " ".join(words[:third])}]
    prompt = encode(tokenizer, prompt_text(tokenizer, asked, False))
    answer = encode(tokenizer, " ".join(words[third:]))
    end = end_of_turn_id(tokenizer)
    answer = answer if end is None else [*answer, end]
    mask = [0] * len(prompt) + [1] * len(answer)
    return Sample([*prompt, *answer], mask)


def calibration(family: Family, arm: str, seed: int, folder: Path) -> torch.Tensor:
    """Rows of an arm, int32 [N, L]."""
    tokenizer = AutoTokenizer.from_pretrained(family.target)
    kind, _, selector = arm.partition(":")
    if kind in ("raw", "raw_chat"):
        samples = [
            as_chat(tokenizer, passage.text)
            if kind == "raw_chat"
            else Sample(ids := tokenizer(passage.text)["input_ids"], [1] * len(ids))
            for passage in passages(0)
        ]
        return pack(samples, family.rows, family.length, seed)[0]
    generator = family.sibling if kind == "family" else "self"
    if generator is None:
        raise typer.BadParameter(f"{family.name} has no larger sibling here")
    if kind == "prompts":
        measured = asked_prompts(family)
        seeds = [prompt for prompt in shipped_seeds() if prompt not in measured]
    else:
        seeds = passages(0)
    alone = selector in ("single", "reasoned")
    options = FAQOptions(
        generator=generator,
        selector="expert_nll" if alone or not selector else selector,
        num_candidates=1 if alone else family.candidates,
        chain_of_thought=True if selector == "reasoned" else None,
        num_samples=family.rows,
        sequence_length=family.length,
        max_new_tokens=family.new_tokens,
        min_response_tokens=16,
        batch_size=24,
        max_fallback_fraction=0.3,
        cache_dir=str(folder),
        seed=seed,
    )
    target = stored_target(family.target)
    source = generator_source(options, target, private=False)
    settings = options.settings(target.config, source)
    model = family.target if generator == "self" else generator
    with ExitStack() as stack:
        if selector == "expert_judge":
            server = stack.enter_context(judge(model, folder / "judge.log"))
            options = options.model_copy(update={"expert": f"{server.url}/v1"})
        asked = experts(options, target, source, private=False)
        store = Store(folder)
        found = regenerate(seeds, tokenizer, source, settings, store, asked)
    return found.input_ids


def judge(model: str, log: Path) -> AbstractContextManager[Server]:
    """The generator behind vLLM, which can hold a weak model to the form of grades."""
    return serve(Path(model), SERVE_ENV, log, max_model_len=2048, timeout=900)


def asked_prompts(family: Family) -> list[Seed]:
    """Prompts whose answers are measured on, for a target that can converse."""
    prompts = shipped_seeds()
    return prompts[:: len(prompts) // family.chats][: family.chats]


def held_out(family: Family, kind: str) -> list[Sample]:
    """Chats to measure on, of one kind."""
    tokenizer = AutoTokenizer.from_pretrained(family.target)
    texts = [passage.text for passage in passages(1)]
    chats = [as_chat(tokenizer, text) for text in texts[:: len(texts) // family.chats]]
    if kind == "texts":
        return chats
    if family.sibling is None:
        # A model that can converse is asked something.
        asked = asked_prompts(family)
        turns = [[{"role": "user", "content": seed.text}] for seed in asked]
        prompts = [encode(tokenizer, prompt_text(tokenizer, t, False)) for t in turns]
    else:
        prompts = [chat.input_ids[: chat.loss_mask.index(1)] for chat in chats]
    ends = {end_of_turn_id(tokenizer) or -1}
    sampling = Sampling(0.7, 0.95, 0, family.new_tokens)
    seeds = range(1000, 1000 + len(prompts))
    draws = sample_batch(load(family.target).eval(), prompts, seeds, sampling, ends)
    return [
        Sample([*prompt, *draw.ids], [0] * len(prompt) + [1] * len(draw.ids))
        for prompt, draw in zip(prompts, draws, strict=True)
    ]


@torch.inference_mode()
def answer_logprobs(model: PreTrainedModel, chats: list[Sample]) -> list[torch.Tensor]:
    """Log-probabilities fp32 [answer tokens, vocabulary] of each chat."""
    found = []
    for chat in chats:
        start = chat.loss_mask.index(1)
        logits = model(input_ids=torch.tensor([chat.input_ids])).logits[0]
        found.append(logits[start - 1 : -1].float().log_softmax(-1))
    return found


def measure(
    full: list[torch.Tensor], model: PreTrainedModel, chats: list[Sample]
) -> tuple[float, float]:
    """Divergence KL(full || model) per answer token, and perplexity of the answers."""
    divergence = loss = tokens = 0.0
    for chat, exact in zip(chats, full, strict=True):
        start = chat.loss_mask.index(1)
        (ours,) = answer_logprobs(model, [chat])
        divergence += float((exact.exp() * (exact - ours)).sum())
        labels = torch.tensor(chat.input_ids[start:])[:, None]
        loss -= float(ours.gather(1, labels).sum())
        tokens += len(labels)
    return divergence / tokens, math.exp(loss / tokens)


def stage(method: str) -> Any:
    """The quantising stage of a method such as ``gptq_w4a16``."""
    name, scheme = method.split("_")
    groups = config_groups(scheme.upper(), group_size=64)
    fields: dict[str, Any] = {"ignore": ["lm_head"], "config_groups": groups}
    if name == "rtn":
        return QuantizationModifier(**fields)
    if name == "gptq":
        return GPTQModifier(actorder="weight", **fields)
    # The rows are few and long, so a step takes fewer of them.
    return SliderQuantModifier(batch_size=2, **fields)


def load(name: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        name, dtype="auto", use_safetensors=True
    )


def quantise(family: Family, method: str, rows: torch.Tensor) -> PreTrainedModel:
    model = load(family.target)
    data = Dataset.from_dict({"input_ids": rows.tolist()})
    oneshot(
        model=model,
        recipe=stage(method),
        dataset=data,
        shuffle_calibration_samples=False,
    )
    put_weights_on_grid(model)
    return model.eval()


@dataclass(frozen=True)
class Lane:
    """Arms that share a store of candidates, and so follow each other."""

    family: Family
    arms: tuple[str, ...]
    methods: tuple[str, ...]
    seed: int
    folder: Path


def lanes(
    family: Family, arms: list[str], methods: list[str], seeds: int, stores: Path
) -> list[Lane]:
    # The longest first, or the last one runs alone.
    kinds = Counter(arm.partition(":")[0] for arm in arms).most_common()
    return [
        Lane(
            family,
            tuple(arm for arm in arms if arm.partition(":")[0] == kind),
            tuple(methods),
            seed,
            stores / f"{family.name}-{kind}-{seed}",
        )
        for seed, (kind, _) in product(range(seeds), kinds)
    ]


def run(lane: Lane, chats: dict[str, list[Sample]], output: Path, threads: int) -> None:
    """Measure what is not in the file yet."""
    done = {(r.family, r.arm, r.method, r.seed) for r in read(output)}
    for arm in lane.arms:
        key = (lane.family.name, arm)
        missing = [m for m in lane.methods if (*key, m, lane.seed) not in done]
        if not missing:
            continue
        # One process per data set: llm-compressor's tracing keeps every model it has
        # seen.
        with ProcessPoolExecutor(1, arm_context()) as process:
            work = (lane, arm, missing, chats, output, threads)
            process.submit(run_arm, *work).result()


def run_arm(
    lane: Lane,
    arm: str,
    methods: list[str],
    chats: dict[str, list[Sample]],
    output: Path,
    threads: int,
) -> None:
    """Make the rows of an arm, and quantise with each method on them."""
    logger.remove()
    torch.set_num_threads(threads)
    family, seed = lane.family, lane.seed
    full = load(family.target).eval()
    exact = {kind: answer_logprobs(full, chats[kind]) for kind in chats}
    began = time.perf_counter()
    rows = calibration(family, arm, seed, lane.folder)
    seconds = time.perf_counter() - began
    print(f"{family.name} {arm} {seed}: data in {seconds:.0f} s", flush=True)
    for method in methods:
        began = time.perf_counter()
        model = quantise(family, method, rows)
        seconds = time.perf_counter() - began
        results = []
        for kind in chats:
            found = measure(exact[kind], model, chats[kind])
            result = Result(family.name, arm, method, seed, kind, *found, seconds)
            results.append(result)
            print(
                f"{family.name} {arm} {seed}: {method}, {kind}: "
                f"KL {result.divergence:.4f}, perplexity {result.perplexity:.2f}, "
                f"{seconds:.0f} s",
                flush=True,
            )
        # Together, since a method with some results counts as measured.
        with output.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(asdict(r)) + "\n" for r in results))


def read(output: Path) -> list[Result]:
    if not output.is_file():
        return []
    lines = output.read_text(encoding="utf-8").splitlines()
    try:
        return [Result(**json.loads(line)) for line in lines]
    except (TypeError, json.JSONDecodeError) as error:
        raise typer.BadParameter(
            f"{output} has a line that is not a result of this version; move it away"
        ) from error


def place(known: dict[str, Family]) -> Callable[[Result], tuple]:
    """Where a result stands in the table, whichever lane was first."""

    def rank(r: Result) -> tuple:
        arms, methods = known[r.family].arms, known[r.family].methods
        return (
            list(known).index(r.family),
            methods.index(r.method) if r.method in methods else len(methods),
            r.measured_on,
            arms.index(r.arm) if r.arm in arms else len(arms),
            r.seed,
        )

    return rank


def table(results: list[Result]) -> str:
    """Markdown: mean and standard deviation over the seeds, in the results' order."""
    columns = ["model", "method", "measured on", "data", "seeds"]
    columns += ["KL", "perplexity", "1 - KL/raw"]
    rows = []

    def question(r: Result) -> tuple[str, str, str]:
        return r.family, r.method, r.measured_on

    for key in dict.fromkeys(map(question, results)):
        here = [r for r in results if question(r) == key]
        raw = [r.divergence for r in here if r.arm == "raw"]
        for arm in dict.fromkeys(r.arm for r in here):
            own = [r for r in here if r.arm == arm]
            reduction = ""
            if raw:
                reduction = f"{1 - mean(r.divergence for r in own) / mean(raw):+.1%}"
            divergence = spread([r.divergence for r in own], 4)
            perplexity = spread([r.perplexity for r in own], 2)
            measured = [str(len(own)), divergence, perplexity, reduction]
            rows.append([*key, arm, *measured])
    return markdown_table(columns, rows)


def spread(values: list[float], digits: int) -> str:
    sd = stdev(values) if len(values) > 1 else 0.0
    return f"{mean(values):.{digits}f} ± {sd:.{digits}f}"


def main(
    names: Annotated[str, typer.Option("--families")] = "smollm2,tests",
    arms: Annotated[str, typer.Option(help="default: those of the family")] = "",
    methods: Annotated[str, typer.Option(help="default: those of the family")] = "",
    smollm2: Annotated[
        str, typer.Option(help="folder or hub id; default: the quickstart's")
    ] = "",
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    jobs: Annotated[int, typer.Option(help="arms at a time", min=1)] = 2,
    output: Annotated[Path, typer.Option()] = CACHE / "bench-faq" / "results.jsonl",
) -> None:
    logger.remove()
    logger.add(sys.stderr, level="ERROR")
    output.parent.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    # For the arms and for the servers of judges, of which several may run at a time.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    known = families(smollm2)
    chats = {}
    queue: list[Lane] = []
    for name in names.split(","):
        if name not in known:
            raise typer.BadParameter(
                f"no family {name!r}; there are {', '.join(known)}"
            )
        family = known[name]
        if not family.target:
            family = replace(family, target=small_or_real("smollm2"))
        chats[name] = {kind: held_out(family, kind) for kind in family.measured_on}
        queue += lanes(
            family,
            arms.split(",") if arms else [*family.arms],
            methods.split(",") if methods else [*family.methods],
            seeds,
            output.parent / "faq-store",
        )
    with ThreadPoolExecutor(jobs) as pool:
        running = [
            pool.submit(run, lane, chats[lane.family.name], output, threads)
            for lane in queue
        ]
        for lane in running:
            lane.result()
    found = table(sorted(read(output), key=place(known)))
    output.with_name("table.md").write_text(found, encoding="utf-8")
    print(found)


if __name__ == "__main__":
    typer.run(main)
