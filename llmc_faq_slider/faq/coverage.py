"""Choice of samples by the channels of the target they excite. The choice is ours.

A sample's profile holds, for every input channel of every linear layer of the target,
the largest magnitude any of its tokens reaches. Samples are taken greedily: next comes
the one that raises the maxima of those taken most per token, so that what only few
samples excite is not left out of the calibration.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel


@torch.inference_mode()
def profiles(model: PreTrainedModel, samples: Sequence[Sequence[int]]) -> torch.Tensor:
    """Largest magnitude per channel of the inputs of the linear layers.

    :param model: causal language model in eval mode
    :param samples: token ids per sample, not empty
    :return: fp32 [samples, channels]; layers that read the same tensor count once
    """
    found: list[torch.Tensor] = []
    rows: list[torch.Tensor] = []
    last: list[torch.Tensor] = []

    def look(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        x = inputs[0]
        if last and last[0] is x:
            return
        last[:] = [x]
        rows.append(x.abs().amax(dim=tuple(range(x.ndim - 1))).float().cpu())

    head = model.get_output_embeddings()
    hooks = [
        module.register_forward_pre_hook(look)
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    ]
    try:
        for ids in samples:
            rows.clear()
            last.clear()
            model(input_ids=torch.tensor([list(ids)], device=model.device))
            found.append(torch.cat(rows))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found)


def by_coverage(profile: torch.Tensor, sizes: Sequence[int]) -> list[int]:
    """Samples in the order a greedy choice takes them.

    Maxima are counted relative to the largest of each channel. When no sample adds
    anything any more, the count starts anew with those that are left.

    :param profile: float [samples, channels], not negative
    :param sizes: tokens of each sample
    :return: a permutation of the samples
    """
    relative = profile / profile.amax(dim=0).clamp(min=1e-12)
    tokens = torch.tensor(sizes, dtype=torch.float32)
    left = torch.ones(len(sizes), dtype=torch.bool)
    covered = torch.zeros(profile.shape[1])
    order: list[int] = []
    for _ in sizes:
        gain = (relative - covered).clamp(min=0).sum(dim=1) / tokens
        gain[~left] = -1.0
        if float(gain.max()) <= 0:
            covered.zero_()
            gain = (relative.sum(dim=1) / tokens).masked_fill(~left, -1.0)
        taken = int(gain.argmax())
        covered = torch.maximum(covered, relative[taken])
        left[taken] = False
        order.append(taken)
    return order
