"""Arms of the benchmarks are measured once, and again when what they run changes."""

import re
from itertools import product
from pathlib import Path

import pytest
import torch

from benchmarks import faq, methods, quality, run_arm, runner
from benchmarks.methods import Arm

SMALL = str(Path(__file__).parents[1] / "models" / "small")


@pytest.fixture
def runs(monkeypatch):
    """Arms that were run; in this process, and on random tokens instead of texts."""
    found = []

    def in_this_process(request, target, _log, _threads):
        found.append(target.stem)
        run_arm.measure(request, target)
        return 0

    def random_rows(_tokenizer, _name_or_seed, count, length):
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, 100, (count, length), generator=generator)

    monkeypatch.setattr(runner, "run_process", in_this_process)
    monkeypatch.setattr(run_arm, "calibration_rows", random_rows)
    monkeypatch.setattr(run_arm, "evaluation_rows", random_rows)
    return found


def test_what_was_measured_is_kept(runs, tmp_path, monkeypatch):
    arms = [
        Arm(SMALL, scheme, method, 0, 2, 8, 2, 1)
        for scheme, method in (("W16A16", "full_precision"), ("W4A16", "nearest"))
    ]
    first = runner.run_arms(arms, tmp_path, 1, 64, [])
    assert len(runs) == 2
    assert runner.run_arms(arms, tmp_path, 1, 64, []) == first
    assert len(runs) == 2

    described = methods.stages

    def other_stages(arm, group_size):
        return [
            stage.model_copy(update={"ignore": ["lm_head", "re:.*layers.0.*"]})
            for stage in described(arm, group_size)
        ]

    monkeypatch.setattr(runner, "stages", other_stages)
    runner.run_arms(arms, tmp_path, 1, 64, [])
    assert len(runs) == 3


def test_an_arm_that_fails_in_its_process_says_why(tmp_path):
    missing = str(tmp_path / "missing")
    arm = Arm(missing, "W4A16", "nearest", 0, 2, 8, 2, 1)
    with pytest.raises(RuntimeError, match=f"see {tmp_path}.*(?s:.*){missing}"):
        runner.run_arms([arm], tmp_path, 1, 64, [])


@pytest.mark.parametrize("autocast", [False, True])
def test_fast_products_are_those_of_bf16(monkeypatch, autocast):
    monkeypatch.setattr(run_arm, "product_dtype", lambda *_: torch.float32)
    plain = torch.nn.functional.linear
    torch.manual_seed(0)
    dtype = torch.float32 if autocast else torch.bfloat16
    inputs, weight, bias = (
        torch.randn(size, dtype=dtype, requires_grad=True)
        for size in ((16, 64), (32, 64), (32,))
    )

    def found():
        with torch.autocast("cpu", enabled=autocast):
            outputs = torch.nn.functional.linear(inputs, weight, bias)
        gradients = torch.autograd.grad(outputs.square().sum(), (inputs, weight, bias))
        return (outputs, *gradients)

    expected = found()
    with run_arm.fast_products(torch.device("cpu")):
        assert torch.nn.functional.linear is not plain
        for one, other in zip(found(), expected, strict=True):
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other, rtol=0.01, atol=0.05)
    assert torch.nn.functional.linear is plain


@pytest.mark.parametrize("scheme", quality.SCHEMES)
def test_every_method_of_a_scheme_has_a_recipe(scheme):
    extra = {"W2A16": ["slider_ends_w4"], "W4A4": ["spinquant_slider"]}
    for method in quality.methods_for(scheme) + extra.get(scheme, []):
        assert method in methods.METHODS
        *_, last = methods.stages(Arm(SMALL, scheme, method, 0, 2, 8, 2, 1), 64)
        bits = {group.weights.num_bits for group in last.config_groups.values()}
        assert bits == ({2, 4} if method == "slider_ends_w4" else {int(scheme[1])})


def test_the_layers_at_the_ends_get_four_bits():
    groups = methods.config_groups("W2A16", 64)
    ends = methods.ends_at_four_bits(groups, layers=12)["ends"]
    (target,) = ends["targets"]
    found = [
        index
        for index in range(12)
        if re.match(target[3:], f"model.layers.{index}.mlp.up_proj")
    ]
    assert found == [0, 1, 10, 11]
    assert ends["weights"] == groups["group_0"]["weights"] | {"num_bits": 4}


def test_weights_that_serve_two_schemes_are_measured_once():
    arms = [
        Arm(SMALL, scheme, method, 0, 2, 8, 2, 1)
        for scheme in ("W4A16", "W4A8", "W4A4")
        for method in ("gptq", "smoothquant_gptq", "slider")
    ]
    left = [(arm.scheme, arm.method) for arm in quality.without_twins(arms)]
    assert left == [
        ("W4A16", "smoothquant_gptq"),
        *product(("W4A8", "W4A4"), ("gptq", "smoothquant_gptq", "slider")),
    ]


@pytest.mark.parametrize("method", ["nearest", "gptq", "slider"])
def test_measured_on_the_way_is_what_an_arm_of_its_own_measures(runs, tmp_path, method):
    arms = [Arm(SMALL, s, method, 0, 2, 8, 2, 1) for s in ("W4A16", "W4A8")]
    alone, both = runner.run_arms(arms, tmp_path, 1, 64, [])
    assert quality.twin(both)["quality"] == alone["quality"]
    assert quality.twin(alone) is None


def test_the_table_has_what_was_measured_on_the_way(runs, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        quality.main(
            model="small",
            schemes="W4A16,W4A8",
            methods="nearest",
            seeds=2,
            rows=2,
            length=8,
            evaluation_rows=2,
            tasks="",
            jobs=1,
            output=tmp_path,
            quick=False,
        )
    assert ended.value.code == 0
    assert len(runs) == 3
    printed = capsys.readouterr().out
    assert printed.count("| W4A16 | round to nearest |") == 1
    assert printed.count("| W4A8 | round to nearest |") == 1


def test_bounds_are_shares_of_loss_and_orders_of_divergence():
    def row(method, loss, kl):
        return {"scheme": "W4A16", "method": method, "loss": loss, "kl": kl}

    ours, nobody = row("slider", 0.05, 0.08), row("nearest", 9.0, 9.0)
    rows = [ours, nobody, row("gptq", 0.06, 0.07), row("autoround", 0.06, 0.09)]
    verdicts = quality.verdicts(rows, order_alone=False)
    assert [holds for _, holds in verdicts] == [False, True]
    assert verdicts[0][0] == "W4A16, loss of SliderQuant: 0.83 x GPTQ (at most 0.8)"
    weak = [row("slider", 0.05, 0.06), row("gptq", -0.01, 0.07)]
    assert quality.verdicts(weak, order_alone=True) == [
        ("W4A16, kl of SliderQuant: 0.86 x GPTQ (at most 1.0)", True)
    ]


def test_the_digest_changes_with_code_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    source = tmp_path / "llmc_faq_slider" / "slider" / "windows.py"
    source.parent.mkdir(parents=True)

    def digest(text):
        source.write_text(text)
        return runner.source_digest()

    plain = digest("def size():\n    return 2\n")
    documented = '"""Sizes."""\n\ndef size():\n    """Two."""\n    return 2  # layers\n'
    assert digest(documented) == plain
    assert digest("def size():\n    return 3\n") != plain


def test_data_sets_are_compared_with_raw_passages_of_the_same_question():
    def result(arm, seed, divergence, method="gptq_w4a16"):
        return faq.Result("smollm2", arm, method, seed, "answers", divergence, 4.0, 1.0)

    results = [
        *(result("prompts:reasoned", 0, 0.3), result("raw", 0, 0.4)),
        *(result("raw", 1, 0.6), result("raw", 0, 9.0, "rtn_w3a16")),
    ]
    known = faq.families("smollm2")
    rows = faq.table(sorted(results, key=faq.place(known))).splitlines()[2:]
    compared = "| smollm2 | gptq_w4a16 | answers"
    assert rows == [
        "| smollm2 | rtn_w3a16 | answers | raw | 1 "
        "| 9.0000 ± 0.0000 | 4.00 ± 0.00 | +0.0% |",
        f"{compared} | raw | 2 | 0.5000 ± 0.1414 | 4.00 ± 0.00 | +0.0% |",
        f"{compared} | prompts:reasoned | 1 | 0.3000 ± 0.0000 | 4.00 ± 0.00 | +40.0% |",
    ]
