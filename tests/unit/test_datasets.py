"""Data sets as users give them become the rows they name."""

import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from llmc_faq_slider.host.datasets import keep_short_rows, resolve_dataset
from llmc_faq_slider.slider.modifier import SliderQuantModifier

pytestmark = pytest.mark.unit

TEXTS = ["one", "two", "three", "four"]


def resolved(**given) -> dict:
    resolve_dataset(given)
    return given


def write(name: str, folder: Path) -> Path:
    path = folder / name
    rows = Dataset.from_dict({"text": TEXTS})
    match path.suffix:
        case ".jsonl":
            path.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
        case ".json":
            path.write_text(json.dumps([{"text": text} for text in TEXTS]))
        case ".csv":
            rows.to_csv(path)
        case ".parquet":
            rows.to_parquet(path)
        case ".txt":
            path.write_text("\n".join(TEXTS))
        case _:
            rows.save_to_disk(path)
    return path


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.txt", "a_saved_one"]
)
def test_files_and_folders_are_read(name, tmp_path) -> None:
    path = write(name, tmp_path)
    assert resolved(dataset=str(path))["dataset"]["text"] == TEXTS
    given = resolved(dataset=path, splits="train[1:3]")
    assert given == {"dataset": given["dataset"]}
    assert given["dataset"]["text"] == TEXTS[1:3]


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        ("train_sft[:2]", TEXTS[:2]),
        ("train_sft[50%:]", TEXTS[2:]),
        ({"calibration": "train_sft[-1:]"}, TEXTS[-1:]),
        (["test"], ["other"]),
        ("train_sft[:1]+test", ["one", "other"]),
    ],
)
def test_splits_of_loaded_data(splits, expected) -> None:
    data = DatasetDict(
        train_sft=Dataset.from_dict({"text": TEXTS}),
        test=Dataset.from_dict({"text": ["other"]}),
    )
    assert resolved(dataset=data, splits=splits)["dataset"]["text"] == expected


def test_the_only_split_needs_no_name() -> None:
    data = DatasetDict(train_sft=Dataset.from_dict({"text": TEXTS}))
    assert resolved(dataset=data)["dataset"]["text"] == TEXTS


def test_names_are_left_to_llm_compressor() -> None:
    for name in ("ultrachat_200k", "HuggingFaceH4/ultrachat_200k"):
        assert resolved(dataset=name, splits="train_sft[:4]") == {
            "dataset": name,
            "splits": "train_sft[:4]",
        }


def test_a_short_row_does_not_cut_its_batch() -> None:
    stage = SliderQuantModifier(scheme="W4A16")
    uneven = Dataset.from_dict({"input_ids": [[5] * 48, [5, 6]]})
    even = Dataset.from_dict({"input_ids": [[5] * 48, [6] * 48]})

    def size(dataset, modifiers, **given) -> int:
        given |= {"dataset": dataset, "batch_size": 8}
        keep_short_rows(given, modifiers)
        return given["batch_size"]

    assert size(uneven, [stage]) == 1
    assert size(even, [stage]) == 8
    assert size(uneven, []) == 8
    assert size(uneven, [stage], data_collator="padding") == 8
