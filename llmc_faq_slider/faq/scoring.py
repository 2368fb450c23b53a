"""Score of an answer under an expert: its mean log-probability. The choice is ours.

Sampling already yields these numbers when the expert is the generator itself; this
is the same quantity for answers that come without them.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from llmc_faq_slider.faq.sampling import left_pad
from llmc_faq_slider.products import multiplied_in, product_dtype

_CHUNK = 256


@torch.inference_mode()
def mean_logprobs(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    chunk: int = _CHUNK,
) -> list[float]:
    """Mean natural log-probability per answer token given its prompt.

    The forward runs in the model's own dtype, but for products that are faster in a
    wider one; log-softmax in fp32, ``chunk``
    positions at a time.

    :param prompts: prompt ids per row, not empty
    :param answers: answer ids per row, not empty
    """
    device = model.device
    rows = [[*p, *a] for p, a in zip(prompts, answers, strict=True)]
    ids, mask = left_pad(rows, device)
    longest = max(len(answer) for answer in answers)
    with multiplied_in(product_dtype("auto", device), device):
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=longest + 1,
        ).logits[:, :-1]
    labels = ids[:, -longest:]
    token_logprobs = torch.cat(
        [
            _gather(logits[:, i : i + chunk], labels[:, i : i + chunk])
            for i in range(0, longest, chunk)
        ],
        dim=-1,
    )
    return [
        float(token_logprobs[i, longest - len(answer) :].mean())
        for i, answer in enumerate(answers)
    ]


def _gather(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = logits.float()
    chosen = logits.gather(-1, labels[..., None])[..., 0]
    return chosen - logits.logsumexp(-1)
