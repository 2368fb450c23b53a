"""Fingerprints of models and tokenizers, and the check that two are one family."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

_BLOCK = 1 << 16
_BLOCKS = 64
_VALUES = 1024
_PROBED_ENTRIES = 300

#: strings whose encodings two tokenizers of one family must share
_PROBES = (
    "The quick brown fox jumps over 13 lazy dogs.",
    "  def f(x):\n\treturn x ** 2  # squared\n",
    "Größe, naïve, œuvre; 漢字と仮名; Привет, мир! \u00a0\u200b",
    "3.14159e-10 + 0x7fff == 1_000_000 \\frac{a}{b}",
    "<think>\nhm\n</think>\n\n\r\nA\n\n\nB",
)


class FamilyError(ValueError):
    """The generator is no larger sibling of the target."""


def folder_fingerprint(folder: Path) -> str:
    """Hash of a model folder: its config, and size and samples of each weight file.

    :param folder: a local model folder
    :return: hex sha256; 64 evenly spaced blocks of 64 KiB stand for a weight file
    """
    digest = hashlib.sha256()
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        if path.is_file():
            digest.update(path.read_bytes())
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            for index in range(_BLOCKS):
                file.seek(index * max(size - _BLOCK, 0) // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def model_fingerprint(name: str) -> str:
    """Fingerprint of a model folder, or the commit of a hub snapshot.

    :param name: folder or hub id
    """
    if Path(name).is_dir():
        return folder_fingerprint(Path(name))
    # a hub snapshot lives in a folder named by its commit
    return Path(str(cached_file(name, "config.json"))).parent.name


def weights_fingerprint(weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Hash of in-memory weights: name, dtype, shape and spaced values of each.

    :param weights: names and tensors of any dtype, in a stable order
    """
    digest = hashlib.sha256()
    for name, weight in weights:
        flat = weight.detach().reshape(-1)
        spaced = flat[:: max(1, flat.numel() // _VALUES)].double().cpu()
        digest.update(f"{name}:{weight.dtype}:{tuple(weight.shape)}".encode())
        digest.update(spaced.numpy().tobytes())
    return digest.hexdigest()


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of the vocabulary, the added tokens and the encodings of the probes."""
    content = json.dumps(_tokenizer_content(tokenizer), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def check_tokenizers(
    target: PreTrainedTokenizerBase, generator: PreTrainedTokenizerBase, name: str
) -> None:
    """Refuse a generator whose tokenizer differs from the target's.

    :param name: the generator, for the message
    :raises FamilyError: naming the first difference
    """
    ours, theirs = _tokenizer_content(target), _tokenizer_content(generator)
    for part, own in ours.items():
        if own != theirs[part]:
            raise FamilyError(
                f"generator {name!r} is not of the target's family: the tokenizers "
                f"differ in their {part} (target {len(own)}, generator "
                f"{len(theirs[part])} entries). Choose a sibling with the same "
                "tokenizer, or `generator: self`."
            )


def encoding_probe(tokenizer: PreTrainedTokenizerBase) -> str:
    """One text whose encoding tells most other tokenizers apart.

    It holds the probe strings, every added token and a few hundred entries spread
    over the vocabulary.
    """
    ids = sorted(tokenizer.get_vocab().values())
    spread = ids[:: max(1, len(ids) // _PROBED_ENTRIES)]
    words = [str(tokenizer.decode([index])) for index in spread]
    added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    whole = [word for word in words if "\ufffd" not in word]
    return "\n".join([*_PROBES, *added, *whole])


def check_lineage(
    target: PretrainedConfig, generator: PretrainedConfig, name: str
) -> None:
    """Refuse a generator of another architecture line.

    :raises FamilyError: when the first parts of the model types differ
    """
    if _line(target) != _line(generator):
        raise FamilyError(
            f"generator {name!r} is not of the target's family: its model type is "
            f"{generator.model_type!r}, the target's {target.model_type!r}. Choose a "
            "sibling of the same line, or `generator: self`."
        )


def check_larger(target_size: int, generator_size: int, name: str) -> None:
    """Refuse a generator that is not larger than the target.

    :param target_size: parameters of the target; generator_size alike
    :raises FamilyError: when the generator has no more parameters
    """
    if generator_size <= target_size:
        raise FamilyError(
            f"generator {name!r} has {generator_size:,} parameters, not more than the "
            f"target's {target_size:,}. Choose a larger sibling, or `generator: self` "
            "to let the model write its own data."
        )


def _line(config: PretrainedConfig) -> str:
    return str(config.model_type).split("_")[0]


def _tokenizer_content(tokenizer: PreTrainedTokenizerBase) -> dict[str, dict]:
    added = tokenizer.added_tokens_decoder
    return {
        "vocabulary": tokenizer.get_vocab(),
        "added tokens": {str(i): str(token) for i, token in added.items()},
        "encodings": {
            text: tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in _PROBES
        },
    }
