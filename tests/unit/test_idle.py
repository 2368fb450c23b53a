"""Experts that no calibration token reaches are counted, weighed, and estimated for."""

import pytest
import torch
from torch import nn

from llmc_faq_slider.slider.idle import find_idle, idle_linears, tokens_for_all
from llmc_faq_slider.slider.memory import RowLimit
from llmc_faq_slider.slider.stream import capture_decoder

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")


class Experts(nn.Module):
    """Sends each token to the expert that its first channel names."""

    def __init__(self, size: int, experts: int):
        super().__init__()
        self.experts = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(size, size)}) for _ in range(experts)
        )

    def forward(self, x):
        chosen = (x[..., 0] > 0).long()
        output = torch.zeros_like(x)
        for number in chosen.unique():
            mask = chosen == number
            output[mask] = self.experts[int(number)]["up"](x[mask])
        return output


def idle_of(model, rows, linears):
    layers = list(model.model.layers)
    hidden, calls = capture_decoder(model, layers, rows, CPU, linears)
    return find_idle(calls, hidden, linears, RowLimit(2))


def test_experts_without_tokens_are_counted(model):
    layer = model.model.layers[1]
    layer.mlp = Experts(32, 4)
    names = [f"mlp.experts.{i}.up" for i in range(4)] + ["self_attn.q_proj"]
    linears = {1: {name: layer.get_submodule(name) for name in names}}
    rows = [torch.randint(0, 64, (16,)) for _ in range(3)]
    found = idle_of(model, rows, linears)
    assert found.linears == ["1.mlp.experts.2.up", "1.mlp.experts.3.up"]
    assert (found.experts, found.all_experts) == (2, 4)
    assert found.share_of_weights == pytest.approx(2 / 5)
    assert "2 of 4 experts (40 % of the quantised weights)" in found.sentence(48)
    hooks = layer.mlp.experts[0]["up"]._forward_pre_hooks
    assert not hooks


def test_rows_run_only_where_the_dry_pass_left_something_out(model):
    layer = model.model.layers[1]
    linears = {1: {"mlp.up_proj": layer.mlp.up_proj}}
    assert idle_of(model, [torch.randint(0, 64, (16,))], linears) is None
    layer.mlp.other = nn.Linear(32, 32)
    linears[1]["mlp.other"] = layer.mlp.other
    found = idle_of(model, [torch.randint(0, 64, (16,))], linears)
    assert found.linears == ["1.mlp.other"] and found.tokens is None
    assert "No calibration token reaches 1 linears" in found.sentence(16)


def test_a_run_that_leaves_most_experts_idle_says_so():
    counts = {f"0.mlp.experts.{i}.up": int(i < 3) for i in range(8)}
    found = idle_linears(counts, dict.fromkeys(counts, 10), tokens=3)
    assert found.experts == 5
    sentence = found.sentence(3)
    assert sentence.startswith("Most experts idle: 5 of 8 experts")
    assert f"About {found.tokens} tokens" in sentence


def test_the_estimate_reaches_every_expert_of_a_uniform_router():
    generator = torch.Generator().manual_seed(0)
    experts, tokens = 128, 150

    def counts(number):
        chosen = torch.randint(0, experts, (number,), generator=generator)
        return torch.bincount(chosen, minlength=experts)

    few = counts(tokens)
    assert (few == 0).sum() > 20
    needed = tokens_for_all(few.tolist(), tokens)
    # coupon collector: n (ln n + 0.58) is the mean
    assert 400 < needed < 1500
    assert (counts(2 * needed) == 0).sum() < 3


def test_the_estimate_grows_with_what_is_missing():
    more = [tokens_for_all([0] * n + [1] * 4, 100) for n in (1, 2, 8)]
    assert more == sorted(set(more))
    assert tokens_for_all([0, 5, 9], 100) > 200
