"""Hands regenerated rows to later stages, and shows a model's plain weights.

Upstream interfaces used here that are not documented for use from outside:

- ``llmcompressor.pipelines.registry.CalibrationPipeline.from_modifiers``, wrapped
  while a run without a data set is under way: a pipeline called with no loader gets
  ours. Every stage of the ``independent`` pipeline gets its pipeline from there.
- ``torch.utils.data.DataLoader.__dict__``, exchanged in place: all pipelines of a run
  are called with one and the same loader object, while ``state.data.calib`` is only a
  copy that none of them reads.
- ``on_initialize(calib_data=...)``, the keyword that carries that loader object.
- ``compressed_tensors``' module attribute ``quantization_enabled``, switched off and
  put back as it was (``DisableQuantization`` switches all modules on when it exits).
- ``compressed_tensors.quantization.QuantizationMetadata.all_qparam_names``.
- ``compressed_tensors.offload.disable_offloading``, which keeps onloaded weights for
  the length of a context, and ``disable_onloading``, which shows the stored ones.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from compressed_tensors.offload import disable_offloading, disable_onloading
from compressed_tensors.quantization import QuantizationMetadata
from llmcompressor.modifiers.utils.hooks import HooksMixin
from llmcompressor.pipelines.registry import CalibrationPipeline
from torch.utils.data import DataLoader, Dataset

__all__ = [
    "Handoff",
    "count_weights",
    "full_precision",
    "plain_weights",
    "rows_loader",
    "takes_loss_mask",
]

#: set by compressed-tensors on modules whose forward quantises
_SWITCH = "quantization_enabled"

Rows = dict[str, torch.Tensor]


class PackedRows(Dataset):
    """Rows of equal length: ``input_ids`` int64 [L] and ``attention_mask`` of ones.

    With a mask, ``loss_mask`` int64 [L] too: 1 on answers, 0 on prompts.
    """

    def __init__(self, input_ids: torch.Tensor, loss_mask: torch.Tensor | None = None):
        self.input_ids = input_ids.to(torch.int64)
        self.loss_mask = None if loss_mask is None else loss_mask.to(torch.int64)

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> Rows:
        row = self.input_ids[index]
        columns = {"input_ids": row, "attention_mask": torch.ones_like(row)}
        if self.loss_mask is not None:
            columns["loss_mask"] = self.loss_mask[index]
        return columns


class _NotYet(Dataset):
    """Stands for the data until the regenerating stage has run."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Rows:
        raise RuntimeError(
            "a stage asks for calibration data before FAQModifier has made any: "
            "oneshot was given no data set. List FAQModifier before every stage that "
            "calibrates, keep oneshot's default pipeline, or give oneshot a data set."
        )


def rows_loader(
    input_ids: torch.Tensor, loss_mask: torch.Tensor | None = None
) -> DataLoader:
    """Loader of batches of one row.

    :param input_ids: integer [N, L]
    :param loss_mask: integer [N, L], or None
    :return: loader of ``{input_ids, attention_mask}`` and ``loss_mask`` if given, all
        int64 [1, L], in order
    """
    return DataLoader(PackedRows(input_ids, loss_mask), batch_size=1, shuffle=False)


def takes_loss_mask(model: torch.nn.Module) -> bool:
    """Whether the model's forward puts up with a ``loss_mask`` among its inputs.

    Upstream's basic pipeline passes whole batches to the model.
    """
    parameters = inspect.signature(model.forward).parameters
    return "loss_mask" in parameters or any(
        p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()
    )


class _MissingLoader:
    """The loader of a run that was given none, shared by its stages."""

    def __init__(self) -> None:
        self.users = 0
        self.loader: DataLoader | None = None
        self._original: Any = None

    def acquire(self) -> DataLoader:
        if self.loader is None:
            self.loader = DataLoader(_NotYet(), batch_size=1)
            self._original = CalibrationPipeline.__dict__["from_modifiers"]
            wrapped = _supplying(self._original.__func__, self.loader)
            CalibrationPipeline.from_modifiers = classmethod(wrapped)
        self.users += 1
        return self.loader

    def release(self) -> None:
        self.users -= 1
        if self.users == 0:
            CalibrationPipeline.from_modifiers = self._original
            self.loader = self._original = None


_missing = _MissingLoader()


class Handoff:
    """One stage's hold on the loader object that all pipelines of a run read.

    :param calib_data: the loader ``on_initialize`` was given, or None
    """

    def __init__(self, calib_data: DataLoader | None):
        self.given = calib_data is not None
        self.loader = calib_data if calib_data is not None else _missing.acquire()
        self._original = dict(self.loader.__dict__)
        self._held = True

    def swap(
        self,
        input_ids: torch.Tensor,
        loss_mask: torch.Tensor,
        model: torch.nn.Module,
    ) -> None:
        """From now on the loader yields these rows, both integer [N, L].

        :param model: receives whole batches, so a mask it cannot take is left out
        """
        mask = loss_mask if takes_loss_mask(model) else None
        _become(self.loader, rows_loader(input_ids, mask).__dict__)

    def release(self) -> None:
        """Put the loader, and upstream's pipeline lookup, back as they were."""
        if not self._held:
            return
        self._held = False
        _become(self.loader, self._original)
        if not self.given:
            _missing.release()


def _become(loader: DataLoader, content: dict[str, Any]) -> None:
    # DataLoader forbids setting its dataset or sampler after construction
    content = dict(content)
    loader.__dict__.clear()
    loader.__dict__.update(content)


def _supplying(original: Callable, loader: DataLoader) -> Callable:
    def from_modifiers(
        cls: type[CalibrationPipeline], modifiers: list, user: str | None = None
    ) -> CalibrationPipeline:
        pipeline = original(cls, modifiers, user)
        kind = type(pipeline)

        def call(self: Any, model: Any, dataloader: Any, dataset_args: Any) -> None:
            pipeline(model, loader if dataloader is None else dataloader, dataset_args)

        # the same class name, because upstream logs it
        return type(kind.__name__, (kind,), {"__call__": call})()

    return from_modifiers


def plain_weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters by name, without those that belong to quantisation.

    Later stages have already registered theirs, uninitialised, when ours runs.
    """
    added = set(QuantizationMetadata.all_qparam_names())
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] not in added:
            yield name, parameter


def count_weights(model: torch.nn.Module) -> int:
    """Number of parameters without those of quantisation, tied ones once."""
    # onloading would make two tensors of one that is tied
    with disable_onloading():
        return sum(weight.numel() for _, weight in plain_weights(model))


@contextmanager
def full_precision(model: torch.nn.Module) -> Iterator[None]:
    """The model's forward is that of its plain weights, with no stage's hooks."""
    switched = [m for m in model.modules() if getattr(m, _SWITCH, False)]
    for module in switched:
        setattr(module, _SWITCH, False)
    try:
        with HooksMixin.disable_hooks(), disable_offloading():
            yield
    finally:
        for module in switched:
            setattr(module, _SWITCH, True)
