"""Models and devices by the name a user gives, with errors that say what to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

__all__ = [
    "Dtype",
    "full_precision_config",
    "load_model",
    "load_tokenizer",
    "pick_device",
]

Dtype = Literal["auto", "bfloat16", "float32"]


def pick_device(name: str | None) -> torch.device:
    """
    :param name: such as ``cpu`` or ``cuda:1``; None for an accelerator where there is
        one, else the CPU
    :raises ValueError: if it cannot be used here
    """
    if name is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if accelerator is None else accelerator
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (AssertionError, ImportError, RuntimeError) as error:
        raise ValueError(
            f"The device {name!r} cannot be used here: {_first_line(error)}"
        ) from error
    return device


def full_precision_config(model: str) -> PretrainedConfig:
    """
    Configuration of a model whose weights are not quantised.

    :param model: hub id or folder
    :raises ValueError: if there is no such model, or it is quantised
    """
    folder = Path(model).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(
            f"The folder {model!r} holds no config.json, so it is no model folder."
        )
    if not folder.is_dir() and (model.startswith((".", "/", "~")) or folder.exists()):
        raise ValueError(
            f"There is no model folder {model!r}. Give a folder with a config.json, or "
            "the id of a model on the hub."
        )
    with _loading(
        f"The configuration of {model!r} cannot be read"
        + ("" if folder.is_dir() else "; it is no folder here, and as a hub id")
    ):
        config = AutoConfig.from_pretrained(_source(model))
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{model!r} is quantised already. Give the full-precision model that it "
            "was made from."
        )
    return config


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """:raises ValueError: if the model comes without one"""
    with _loading(f"No tokenizer can be loaded from {model!r}"):
        tokenizer = AutoTokenizer.from_pretrained(_source(model))
        # Where the files are missing, transformers makes one without a vocabulary.
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            raise ValueError("its vocabulary is missing")
        return tokenizer


def load_model(model: str, dtype: Dtype = "auto") -> PreTrainedModel:
    """
    A causal language model in evaluation mode, on the CPU.

    :param dtype: ``auto`` for the dtype of the checkpoint
    :raises ValueError: if it is none, or its weights are missing
    """
    with _loading(f"{model!r} cannot be loaded as a causal language model"):
        # files of other kinds can hold code that runs when they are read
        return AutoModelForCausalLM.from_pretrained(
            _source(model), dtype=dtype, use_safetensors=True
        ).eval()


def _source(model: str) -> str:
    folder = Path(model).expanduser()
    return str(folder) if folder.is_dir() else model


@contextmanager
def _loading(problem: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"{problem}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".:") + "."
