"""Packing of rendered samples into rows of equal length."""

from collections.abc import Sequence

import torch

from llmc_faq_slider.faq.rendering import Sample


def pack(
    samples: Sequence[Sample], num_rows: int, row_length: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shuffle whole samples, concatenate them and cut the stream into rows.

    :param samples: rendered samples, in a fixed order
    :param num_rows: rows to make (N)
    :param row_length: tokens of each row (L)
    :param seed: seed of the shuffle
    :return: ``input_ids`` int32 [N, L] and ``loss_mask`` uint8 [N, L]
    :raises ValueError: when the samples hold fewer than N x L tokens
    """
    total = sum(len(sample.input_ids) for sample in samples)
    needed = num_rows * row_length
    if total < needed:
        raise ValueError(
            f"packing {num_rows} rows of {row_length} tokens needs {needed} tokens, "
            f"the samples hold {total}"
        )
    order = torch.randperm(
        len(samples), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    ids = [i for index in order for i in samples[index].input_ids][:needed]
    mask = [m for index in order for m in samples[index].loss_mask][:needed]
    shape = (num_rows, row_length)
    return (
        torch.tensor(ids, dtype=torch.int32).reshape(shape),
        torch.tensor(mask, dtype=torch.uint8).reshape(shape),
    )
