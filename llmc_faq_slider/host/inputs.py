"""What of ``oneshot``'s arguments cannot work, found before a model is loaded."""

import json
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

from compressed_tensors.quantization import QuantizationStatus
from datasets import Dataset, IterableDataset
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.quantization.quantization import QuantizationMixin
from llmcompressor.transformers.data import TextGenerationDataset
from torch import nn
from torch.utils.data import DataLoader

from llmc_faq_slider.faq.modifier import FAQModifier
from llmc_faq_slider.files import check_room
from llmc_faq_slider.host.declared import declared_groups
from llmc_faq_slider.slider.modifier import SliderQuantModifier

__all__ = ["OUTPUT_REMEDY", "check_output", "wrong_inputs"]

OUTPUT_REMEDY = "give oneshot another output_dir."
Arguments = Mapping[str, Any]


def wrong_inputs(given: Arguments, modifiers: Sequence[Modifier]) -> Iterator[str]:
    """
    A sentence on each argument that a recipe cannot run with.

    :param given: arguments of ``oneshot`` by name
    """
    yield from _model(given.get("model"), modifiers)
    yield from _data(given, modifiers)
    yield from _pipeline(given.get("pipeline"), modifiers)
    if given.get("recipe_args"):
        yield (
            "oneshot's recipe_args change nothing: llm-compressor has no variables in "
            "recipes any more. Write the values into the recipe, or give oneshot the "
            "modifiers themselves."
        )


def check_output(given: Arguments, modifiers: Sequence[Modifier]) -> None:
    """
    Refuse an output folder that the checkpoint cannot be written to.

    :raises FolderError: if it cannot be made, written to, or is certainly too small
    """
    groups = declared_groups(modifiers)
    bits = min((group.group["weights"]["num_bits"] for group in groups), default=16)
    weights = _number_of_weights(given.get("model"))
    check_room(Path(given["output_dir"]), weights * bits // 8, OUTPUT_REMEDY)


def _number_of_weights(model: Any) -> int:
    """Weights of a model, at least; 0 if only its hub id is known."""
    if isinstance(model, nn.Module):
        return sum(parameter.numel() for parameter in model.parameters())
    files = Path(str(model)).expanduser().glob("*.safetensors")
    # no dtype has more bytes
    return sum(file.stat().st_size for file in files) // 4


def _model(model: Any, modifiers: Sequence[Modifier]) -> Iterator[str]:
    if not any(isinstance(modifier, QuantizationMixin) for modifier in modifiers):
        return
    name, quantised = "The model", False
    if isinstance(model, nn.Module):
        quantised = bool(getattr(model.config, "quantization_config", None))
        used = quantised_before(model)
        if used:
            yield used
            return
    elif isinstance(model, str | Path):
        name, folder = str(model), Path(model).expanduser()
        if name.startswith((".", "/", "~")) and not folder.is_dir():
            yield f"There is no model folder {name}. Check the path."
        elif folder.is_dir():
            try:
                quantised = bool(_config(folder).get("quantization_config"))
            except (OSError, ValueError) as error:
                yield (
                    f"The config.json of {name} cannot be read: {error}. Give a whole "
                    "model folder."
                )
            if not any(folder.glob("*.safetensors")) and any(folder.glob("*.bin")):
                yield (
                    f"The weights of {name} are in .bin files, which can hold code. "
                    "Give a model with .safetensors files."
                )
    if quantised:
        yield (
            f"{name} is already quantised. Give the full-precision model that it was "
            "made from."
        )


def quantised_before(model: nn.Module) -> str | None:
    """A sentence on a model object that an earlier run has quantised, if one has."""
    done = [
        name
        for name, module in model.named_modules()
        if getattr(module, "quantization_status", None)
        in (QuantizationStatus.FROZEN, QuantizationStatus.COMPRESSED)
    ]
    if not done:
        return None
    return (
        f"This model object was quantised before: {len(done)} of its layers, the first "
        f"is {done[0]}. Load the full-precision model anew."
    )


def _config(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_bytes())
    if not isinstance(config, dict):
        raise ValueError(f"it holds a {type(config).__name__}, not an object")
    return config


def _data(given: Arguments, modifiers: Sequence[Modifier]) -> Iterator[str]:
    dataset = given.get("dataset")
    if dataset is None and given.get("dataset_path") is None:
        yield from _needs_data(modifiers)
    elif isinstance(dataset, str) and not set("/:.") & set(dataset):
        known = TextGenerationDataset.registered_names()
        if dataset.replace("_", "-") not in known and not given.get("dataset_path"):
            near = get_close_matches(dataset.lower(), known, n=3, cutoff=0.4)
            yield (
                f"llm-compressor knows no data set {dataset!r}."
                + (f" Near it: {', '.join(near)}." if near else "")
                + " Give one of its names, a datasets.Dataset, or a folder that "
                "llmc-faq-slider regenerate wrote."
            )
    elif isinstance(dataset, Dataset):
        yield from _rows(dataset, given)
    elif isinstance(dataset, IterableDataset):
        yield (
            "The data set is streamed, and oneshot needs to know its length. Take some "
            "rows of it: Dataset.from_list(list(dataset.take(512)))."
        )
    elif dataset is not None and not isinstance(dataset, str | DataLoader):
        yield (
            f"The data set is of type {type(dataset).__name__}. Give oneshot a "
            'datasets.Dataset, such as Dataset.from_dict({"text": [...]}), or the '
            "path of a file."
        )


def _rows(dataset: Dataset, given: Arguments) -> Iterator[str]:
    columns = dataset.column_names
    text = given.get("text_column", "text")
    if not len(dataset):
        yield "The data set given to oneshot has no rows. Give one that has some."
    elif "input_ids" in columns:
        first = next((row for row in islice(dataset["input_ids"], 100) if row), None)
        if first is None:
            yield (
                "The data set's first rows have empty input_ids. Tokenise the text "
                "again."
            )
        elif not isinstance(first, list) or not isinstance(first[0], int):
            yield (
                "The data set's input_ids are no lists of whole numbers. Tokenise the "
                "text, or give it in a column named text."
            )
    elif text not in columns and "preprocessing_func" not in given.get("kwargs", {}):
        yield (
            f"The data set has the columns {', '.join(columns)}, and neither input_ids "
            f"nor {text}. Name its text column in oneshot's text_column. Prompts and "
            "chats are what the field seeds of FAQModifier takes."
        )


def _needs_data(modifiers: Sequence[Modifier]) -> Iterator[str]:
    """A sentence on the first stage that calibrates on data there is none of."""
    for modifier in modifiers:
        if isinstance(modifier, FAQModifier):
            return
        learns = isinstance(modifier, SliderQuantModifier)
        if learns or modifier.requires_calibration_data:
            yield (
                f"{type(modifier).__name__} needs calibration data and oneshot was "
                "given none. Give oneshot a dataset, or put a FAQModifier before it."
            )
            return


def _pipeline(pipeline: Any, modifiers: Sequence[Modifier]) -> Iterator[str]:
    """Stages of one shared pipeline that would run in another order."""
    if pipeline in (None, "independent"):
        return
    for index, modifier in enumerate(modifiers):
        if not isinstance(modifier, SliderQuantModifier | FAQModifier):
            continue
        for earlier in modifiers[:index]:
            if earlier.requires_calibration_data:
                yield (
                    f"{type(modifier).__name__} would run before "
                    f"{type(earlier).__name__}, which the recipe lists first, because "
                    f"pipeline={pipeline!r} is shared by all stages. Leave pipeline at "
                    'its default, "independent".'
                )
                return
