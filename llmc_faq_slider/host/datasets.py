"""Calibration data as users give it to oneshot, as llm-compressor takes it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import (
    Dataset,
    DatasetDict,
    ReadInstruction,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)
from llmcompressor.modifiers import Modifier
from loguru import logger

from llmc_faq_slider.faq.export import is_export, load_export
from llmc_faq_slider.slider.modifier import SliderQuantModifier

__all__ = ["keep_short_rows", "resolve_dataset"]

FILE_KINDS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}


def resolve_dataset(given: dict[str, Any]) -> None:
    """
    Replace a local file or folder, and splits of loaded data, by the rows they name.

    :param given: arguments of ``oneshot`` by name; ``dataset`` and ``splits`` change
    :raises ValueError: if there is no such file or split, or it cannot be read
    """
    dataset, splits = given.get("dataset"), given.get("splits")
    if isinstance(dataset, str | Path):
        dataset = _local(dataset, given.get("dataset_path"))
        if dataset is None:
            return
    if isinstance(dataset, DatasetDict):
        dataset = _cut(dataset, splits)
    elif isinstance(dataset, Dataset) and splits is not None:
        dataset = _cut(DatasetDict({str(dataset.split or "train"): dataset}), splits)
    else:
        given["dataset"] = dataset
        return
    given["dataset"] = dataset
    given.pop("splits", None)


def _local(name: str | Path, other_path: Any) -> Any:
    """What a file or folder holds, None for a name that llm-compressor resolves."""
    path = Path(name).expanduser()
    if is_export(path):
        return load_export(path)
    kind = FILE_KINDS.get(path.suffix.lower())
    written_as_path = isinstance(name, Path) or name.startswith((".", "/", "~"))
    if not path.exists():
        if written_as_path or (kind is not None and other_path is None):
            raise ValueError(
                f"There is no data set at {name}. Check the path given as dataset."
            )
        return None
    if path.is_file() and kind is None:
        raise ValueError(
            f"The data set {name} is no file of a known kind. Give a "
            f"{', '.join(FILE_KINDS)} file, or a datasets.Dataset."
        )
    if path.is_dir() and not written_as_path and other_path is not None:
        return None
    try:
        if kind is not None and path.is_file():
            return load_dataset(kind, data_files={"train": str(path)})
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return load_from_disk(str(path))
        return load_dataset(str(path))
    except Exception as error:  # many readers, each with errors of its own
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise ValueError(
            f"The data set {name} cannot be read: {reason}. Mend the file, or give a "
            "datasets.Dataset."
        ) from error


def _cut(dataset: DatasetDict, splits: Any) -> Dataset:
    """The rows of a split such as ``train_sft[:4]``; without one, the only or train."""
    if isinstance(splits, dict):
        splits = splits.get("calibration")
    elif isinstance(splits, list | tuple):
        splits = splits[0] if splits else None
    names = list(dataset)
    if splits is None:
        if len(names) > 1 and "train" not in names:
            raise ValueError(
                f"The data set has the splits {', '.join(names)}. Name one in "
                f'oneshot\'s splits, such as splits="{names[0]}".'
            )
        return dataset["train" if "train" in names else names[0]]
    try:
        parts = ReadInstruction.from_spec(str(splits)).to_absolute(
            {name: len(rows) for name, rows in dataset.items()}
        )
    except (ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise ValueError(
            f"splits={splits!r} names no rows of the data set, whose splits are "
            f"{', '.join(names)}: {reason}."
        ) from error
    return concatenate_datasets(
        [dataset[p.splitname].select(range(p.from_, p.to)) for p in parts]
    )


def keep_short_rows(given: dict[str, Any], modifiers: Sequence[Modifier]) -> None:
    """
    Load rows one at a time where batches would cut them to the shortest.

    SliderQuant makes batches of its own, so that they cost it nothing.

    :param given: arguments of ``oneshot`` by name; ``batch_size`` may change
    """
    size = given.get("batch_size", 1)
    cuts = given.get("data_collator", "truncation") == "truncation"
    learns = any(isinstance(modifier, SliderQuantModifier) for modifier in modifiers)
    dataset = given.get("dataset")
    if size == 1 or not cuts or not learns or dataset is None:
        return
    if isinstance(dataset, Dataset) and "input_ids" in dataset.column_names:
        lengths = {len(ids) for ids in dataset["input_ids"]}
        if len(lengths) == 1:
            return
        found = f"have {min(lengths)} to {max(lengths)} tokens"
    elif isinstance(dataset, Dataset | str):
        found = "may differ in length"
    else:
        return
    logger.info(
        f"The calibration rows {found}, and batch_size={size} would cut those of a "
        "batch to the shortest: they are loaded one at a time. SliderQuant's own "
        "batch_size is a field of the stage."
    )
    given["batch_size"] = 1
