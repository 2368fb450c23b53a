"""Arguments of ``oneshot`` that cannot work, and the sentence each gives."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bad_recipes import ROOT, SMALL
from datasets import Dataset, DatasetDict

Arguments = dict[str, Any]
SLIDER = "recipes/slider_w4a16.yaml"


@dataclass(frozen=True)
class Argument:
    """
    :param shown: the call, as a user writes it
    :param make: the arguments that differ from a proper call; may write to a folder
    """

    title: str
    shown: str
    make: Callable[[Path], Arguments]


def rows(**columns: list) -> Callable[[Path], Arguments]:
    return lambda folder: {"dataset": Dataset.from_dict(columns)}


def model_with(**fields: Any) -> Callable[[Path], Arguments]:
    """The small model with other fields in its config.json."""

    def make(folder: Path) -> Arguments:
        shutil.copytree(ROOT / SMALL, folder / "model")
        path = folder / "model" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
        return {"model": str(folder / "model")}

    return make


def broken_config(folder: Path) -> Arguments:
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text('{"model_type": ')
    return {"model": str(folder / "model")}


def weights_in_bin(folder: Path) -> Arguments:
    (folder / "model").mkdir()
    shutil.copy(ROOT / SMALL / "config.json", folder / "model")
    (folder / "model" / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    return {"model": str(folder / "model")}


def damaged_data(folder: Path) -> Arguments:
    data = folder / "calibration"
    data.mkdir()
    (data / "manifest.json").write_text('{"tokens": 512}')
    (data / "calibration.safetensors").write_bytes(b"")
    return {"dataset": str(data)}


def a_word_file(folder: Path) -> Arguments:
    (folder / "rows.docx").write_bytes(b"PK")
    return {"dataset": str(folder / "rows.docx")}


def a_broken_file(folder: Path) -> Arguments:
    (folder / "rows.parquet").write_bytes(b"PAR1")
    return {"dataset": folder / "rows.parquet"}


def two_splits(**arguments: Any) -> Callable[[Path], Arguments]:
    part = Dataset.from_dict({"text": ["A text."] * 4})
    data = DatasetDict(train_sft=part, test_sft=part)
    return lambda folder: {"dataset": data, **arguments}


def a_file_in_the_way(folder: Path) -> Arguments:
    (folder / "out").write_text("")
    return {"output_dir": str(folder / "out")}


BOTH = """attention_stage:
  attention_modifiers:
    GPTQModifier: {targets: ["re:.*self_attn.*"], scheme: W4A16, actorder: weight}
mlp_stage:
  mlp_modifiers:
    SliderQuantModifier: {targets: ["re:.*mlp.*"], scheme: W4A16}
"""

ARGUMENTS = [
    Argument(
        "no such model folder", 'model="./nowhere"', lambda f: {"model": "./nowhere"}
    ),
    Argument("a config.json that is no JSON", 'model="FOLDER/model"', broken_config),
    Argument(
        "a model that is already quantised",
        'model="FOLDER/model"',
        model_with(quantization_config={"quant_method": "compressed-tensors"}),
    ),
    Argument("weights in a pickle", 'model="FOLDER/model"', weights_in_bin),
    Argument("no data set", "dataset=None", lambda folder: {"dataset": None}),
    Argument(
        "a data set without rows",
        'dataset=Dataset.from_dict({"input_ids": []})',
        rows(input_ids=[]),
    ),
    Argument(
        "a column of another name",
        'dataset=Dataset.from_dict({"body": ["a text"]})',
        rows(body=["a text"]),
    ),
    Argument(
        "text instead of token ids",
        'dataset=Dataset.from_dict({"input_ids": ["a text"]})',
        rows(input_ids=["a text"]),
    ),
    Argument(
        "samples of no token",
        'dataset=Dataset.from_dict({"input_ids": [[], []]})',
        rows(input_ids=[[], []]),
    ),
    Argument(
        "samples of one token",
        'dataset=Dataset.from_dict({"input_ids": [[5], [6]]})',
        rows(input_ids=[[5], [6]]),
    ),
    Argument(
        "ids outside the vocabulary",
        'dataset=Dataset.from_dict({"input_ids": [[5, 32000]]})',
        rows(input_ids=[[5, 32000]]),
    ),
    Argument(
        "an id below zero",
        'dataset=Dataset.from_dict({"input_ids": [[5, -100]]})',
        rows(input_ids=[[5, -100]]),
    ),
    Argument(
        "a sample longer than the context",
        'dataset=Dataset.from_dict({"input_ids": [[5] * 4000]})',
        rows(input_ids=[[5] * 4000]),
    ),
    Argument("a list", 'dataset=["a text"]', lambda folder: {"dataset": ["a text"]}),
    Argument(
        "an unknown data set",
        'dataset="ultrachat_200"',
        lambda folder: {"dataset": "ultrachat_200"},
    ),
    Argument(
        "a data set file that is not there",
        'dataset="./nowhere.jsonl"',
        lambda folder: {"dataset": "./nowhere.jsonl"},
    ),
    Argument("a file of another kind", 'dataset="FOLDER/rows.docx"', a_word_file),
    Argument("a damaged file", 'dataset="FOLDER/rows.parquet"', a_broken_file),
    Argument(
        "a data set of two splits",
        "dataset=DatasetDict(train_sft=..., test_sft=...)",
        two_splits(),
    ),
    Argument(
        "a split that is not there",
        'dataset=DatasetDict(train_sft=..., test_sft=...), splits="train[:4]"',
        two_splits(splits="train[:4]"),
    ),
    Argument(
        "a streamed data set",
        "dataset=dataset.to_iterable_dataset()",
        lambda f: {"dataset": Dataset.from_dict({"text": ["a"]}).to_iterable_dataset()},
    ),
    Argument(
        "arguments of a recipe",
        'recipe_args={"scheme": "W8A16"}',
        lambda folder: {"recipe_args": {"scheme": "W8A16"}},
    ),
    Argument("damaged data", 'dataset="FOLDER/calibration"', damaged_data),
    Argument(
        "one pipeline for stages that need their order",
        'pipeline="sequential", with GPTQ before SliderQuant',
        lambda folder: {"pipeline": "sequential", "recipe": BOTH},
    ),
    Argument("a file in the way", 'output_dir="FOLDER/out"', a_file_in_the_way),
]


def sentence_of(argument: Argument, folder: Path) -> str:
    """What ``oneshot`` says, with the folder's name taken out."""
    import llmc_faq_slider

    usual: Arguments = {
        "model": str(ROOT / SMALL),
        "recipe": str(ROOT / SLIDER),
        "dataset": Dataset.from_dict({"input_ids": [[5, 6, 7, 8]]}),
    }
    folder.mkdir()
    try:
        llmc_faq_slider.oneshot(**usual | argument.make(folder))
    except (OSError, ValueError) as error:
        return str(error).replace(str(folder), "FOLDER")
    raise AssertionError(f"{argument.title}: nothing was wrong")


def section(find: Callable[[Argument], str]) -> str:
    """The part of the document on these arguments."""
    parts = ["# Bad arguments of oneshot\n"]
    for argument in ARGUMENTS:
        parts.append(
            f"## {argument.title[0].upper()}{argument.title[1:]}\n\n"
            f"`{argument.shown}`\n\n> {find(argument)}\n"
        )
    return "\n".join(parts)
