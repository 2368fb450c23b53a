"""The table of what vLLM serves: its form, its rules, and the README that shows it."""

from __future__ import annotations

import pytest
import serving_matrix
import torch
from bad_recipes import FP8, INT4, INT8, group, slider
from generated import cases
from hypothesis import strategies as st

from llmc_faq_slider import SliderQuantModifier
from llmc_faq_slider.host.declared import declared_groups
from llmc_faq_slider.host.recipe_lint import lint_recipe
from llmc_faq_slider.host.serving_check import (
    Served,
    check_serving,
    remedy,
)
from llmc_faq_slider.report.serving import (
    Layer,
    describe,
    find_target,
    known_targets,
    load_table,
    serve,
    serve_experts,
    this_cpu,
    unmet,
)

pytestmark = pytest.mark.unit

EVIDENCE = {"asked", "run", "source"}


def declared(weights: str, inputs: str | None = None, form: str | None = None):
    """The config group of a recipe, as the table reads it."""
    recipe = slider(*group(weights, inputs, form or "pack-quantized"))
    (found,) = declared_groups(lint_recipe(recipe)[0])
    return found


W4A8 = declared(INT4, INT8)
W4AFP8 = declared(INT4, FP8)
W4A16 = declared(INT4)
W8A16 = declared(INT4.replace("num_bits: 4", "num_bits: 8"))
INT_Q = "int-quantized"
W8A8 = declared("num_bits: 8, type: int, strategy: channel", INT8, "int-quantized")


def test_every_row_has_release_evidence_and_source():
    table = load_table()
    schemes = {row["scheme"] for row in table["schemes"]}
    for row in table["schemes"]:
        if row["scheme"] != "outside":
            assert row["evidence"] in EVIDENCE and row["source"] and row["since"]
    for row in table["kernels"]:
        assert set(row["schemes"]) <= schemes, row
        assert row["evidence"] in EVIDENCE and row["source"] and row["since"], row
        assert ("broken" in row) != bool(row.get("computes")), row
    for row in (*table["moe"], *table["rotations"], table["kv_cache"]):
        assert row["evidence"] in EVIDENCE and row["source"], row
    assert schemes - {"outside"} == {n for r in table["kernels"] for n in r["schemes"]}


@pytest.mark.parametrize(
    ("what", "target", "kernel", "computes", "flag"),
    [
        (W4AFP8, "sm90", "CutlassW4A8LinearKernel", "FP8 per token", None),
        (W4A8, "sm90", "MacheteLinearKernel", "16 bit", None),
        (W4A8, "sm89", "MarlinLinearKernel", "16 bit", None),
        (W4A8, "cpu-avx512", "CPUWNA16LinearKernel", "16 bit", None),
        (W4A8, "cpu-amx", "CPUWNA16LinearKernel", "int8 per token", None),
        (W8A8, "cpu-avx2", "CPUInt8ScaledMMLinearKernel", "int8 per token", None),
        (
            declared(INT4, INT8.replace("symmetric: true", "symmetric: false"), INT_Q),
            "cpu-avx2",
            "Dynamic4bitLinearKernel",
            "int8 per token with zero point",
            None,
        ),
        (W4A16, "sm86", "MarlinLinearKernel", "16 bit", None),
        (W4A16, "cpu-amx", "CPUWNA16LinearKernel", "int8 per token", None),
        (W8A8, "sm80", "CutlassInt8ScaledMMLinearKernel", "int8 per token", None),
        (
            declared("num_bits: 4, type: int, strategy: channel", INT8),
            "sm90",
            "MacheteLinearKernel",
            "16 bit",
            "--linear-backend humming",
        ),
        (
            declared("num_bits: 4, type: int, strategy: channel", INT8),
            "sm100",
            "MarlinLinearKernel",
            "16 bit",
            None,
        ),
    ],
)
def test_known_answers(what, target, kernel, computes, flag):
    serving = serve(what.group, find_target(target))
    assert (serving.kernel, serving.computes, serving.flag) == (kernel, computes, flag)


def test_what_is_not_served():
    for what in (W4A8, W4A16, W8A16):
        there = serve(what.group, find_target("cpu-avx2"))
        assert there.verdict == "not served" and "has no kernel" in (there.why or "")
    for what, target in [(W4AFP8, "sm89"), (W4AFP8, "cpu-avx512"), (W4AFP8, "sm100")]:
        assert serve(what.group, find_target(target)).verdict == "not served"
    blackwell = serve(W8A8.group, find_target("sm120"))
    assert blackwell.verdict == "needs a flag" and "triton" in (blackwell.flag or "")


def test_sizes_decide_too():
    hopper, cpu = find_target("sm90"), find_target("cpu-avx512")
    fits, narrow = Layer("o_proj", 512, 256), Layer("o_proj", 512, 192)
    assert serve(W4AFP8.group, hopper, fits).kernel == "CutlassW4A8LinearKernel"
    fallback = serve(W4AFP8.group, hopper, narrow)
    assert (fallback.kernel, fallback.computes) == ("HummingLinearKernel", "16 bit")
    per_channel = declared("num_bits: 4, type: int, strategy: channel").group
    odd = serve(per_channel, cpu, Layer("o_proj", 144, 256))
    assert not odd.served and "multiples of 32" in (odd.why or "")


def test_experts():
    hopper = find_target("sm90")
    assert not serve_experts(W4A8.group, hopper).served
    assert serve_experts(W4AFP8.group, hopper).verdict == "as declared"
    small = serve_experts(W4AFP8.group, hopper, Layer("gate_up_proj", 128, 256))
    assert not small.served and "multiples of 256" in (small.why or "")
    assert not serve_experts(W4A16.group, find_target("cpu-avx512")).served


@pytest.mark.parametrize(
    ("name", "capability"), [("sm90", 90), ("SM_90a", 90), ("sm86", 86), ("sm103", 103)]
)
def test_targets(name, capability):
    assert find_target(name).capability == capability


@pytest.mark.parametrize(
    ("able", "name"),
    [
        ({"avx2"}, "cpu-avx2"),
        ({"avx2", "avx512"}, "cpu-avx512"),
        ({"avx2", "avx512", "amx_tile"}, "cpu-amx"),
    ],
)
def test_cpu_is_this_machines(monkeypatch, able, name):
    """PyTorch is asked at every call, so that a CPU can be had on any machine."""
    for one in ("avx2", "avx512", "amx_tile"):
        monkeypatch.setattr(
            torch.cpu, f"_is_{one}_supported", lambda one=one: one in able
        )
    assert find_target("cpu") == this_cpu() == find_target(name)


def test_a_cpu_that_is_not_in_the_table(monkeypatch):
    """As on an Arm machine, and with a PyTorch that cannot be asked."""
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    for one in ("avx2", "avx512"):
        monkeypatch.setattr(torch.cpu, f"_is_{one}_supported", lambda: False)
    with pytest.raises(ValueError, match="Name the CPU that will serve: cpu-avx2"):
        find_target("cpu")


@pytest.mark.parametrize("name", ["sm75", "gpu", "", "sm", "sm9", "H100"])
def test_unknown_targets(name):
    with pytest.raises(ValueError, match=r"is not known.*Give one of cpu, "):
        find_target(name)


bits = st.integers(2, 8)
booleans = st.booleans()
input_formats = st.none() | st.fixed_dictionaries(
    {
        "type": st.sampled_from(["int", "float"]),
        "num_bits": st.sampled_from([4, 8]),
        "strategy": st.sampled_from(["token", "tensor", "group"]),
        "symmetric": booleans,
        "dynamic": booleans,
        "group_size": st.none(),
    }
)


@st.composite
def groups(draw):
    size = draw(st.sampled_from([None, 16, 32, 64, 128, 256]))
    weights = {
        "type": "int",
        "num_bits": draw(bits),
        "strategy": "group" if size else "channel",
        "group_size": size,
        "symmetric": draw(booleans),
        "dynamic": False,
    }
    return {
        "weights": weights,
        "inputs": draw(input_formats),
        "outputs": None,
        "format": draw(st.sampled_from(["pack-quantized", "int-quantized"])),
    }


@cases(300, config=groups(), target=st.sampled_from([t.name for t in known_targets()]))
def test_every_group_gets_a_consistent_answer(config, target):
    hardware = find_target(target)
    serving = serve(config, hardware)
    assert serving.served == (serving.why is None) or serving.verdict == "needs a flag"
    assert serving.served or serving.why or serving.verdict == "not in the table"
    assert (serving.computes is not None) <= serving.served
    assert describe(config) and "None" not in describe(config)
    four_bits = config["weights"]["num_bits"] == 4 and config["inputs"] is None
    if four_bits and target != "cpu-avx2":
        packed = config | {"format": "pack-quantized"}
        assert serve(packed, hardware).served or config["weights"]["group_size"] == 16


def test_remedies():
    """The advice for a group, target by target; what it leads to is served."""
    for what, target, advice in [
        (W4AFP8, "sm80", "leave input_activations out"),
        (W4A8, "sm90", "set input_activations.type: float"),
        (declared(INT4, FP8, "int-quantized"), "sm90", "set format: pack-quantized"),
        (W8A8, "sm100", "set format: pack-quantized and leave input_activations out"),
        (
            W4A8,
            "cpu-avx2",
            "set format: int-quantized and set input_activations.symmetric: false",
        ),
        (
            W4A16,
            "cpu-avx2",
            "set format: int-quantized and set input_activations: {num_bits: 8, "
            "type: int, symmetric: false, strategy: token, dynamic: true}",
        ),
        (
            declared(INT4.replace("true", "false")),
            "cpu-avx2",
            "set scheme: W8A8",
        ),
        (W8A16, "cpu-avx2", "set scheme: W8A8"),
    ]:
        hardware = find_target(target)
        assert remedy(Served(what, serve(what.group, hardware))) == advice, what


def test_conditions():
    assert unmet({"num_bits": [4, 8]}, {"num_bits": 8}) is None
    assert unmet({"num_bits": 4}, None, "inputs") == "inputs are not quantised"
    assert unmet(None, {"num_bits": 8}, "inputs") == "inputs are quantised"
    assert unmet({"min": 80, "max": 89}, 90, "capability") == "capability is 90"
    multiple = {"group_size": {"multiple": 32}}
    assert unmet(multiple, {"group_size": 96}) is None
    assert unmet(multiple, {"group_size": 16}) == (
        "group_size is 16, it takes multiples of 32"
    )
    assert unmet({"group_size": [None, 64]}, {"group_size": 32}) == (
        "group_size is 32, it takes per channel or 64"
    )


def test_stage_warns_of_formats_that_nobody_serves_as_declared(said):
    check_serving(SliderQuantModifier(scheme="W4AFP8"), None)
    check_serving(SliderQuantModifier(scheme="W8A8"), "sm100")
    assert len(said) == 1 and "--linear-backend triton" in said[0]
    stage = SliderQuantModifier(
        config_groups={
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "group_size": 128, "symmetric": False},
                "input_activations": {
                    "num_bits": 8,
                    "strategy": "token",
                    "dynamic": True,
                    "symmetric": False,
                },
            }
        }
    )
    check_serving(stage, None)
    assert "no vLLM kernel that is known here serves it as declared" in said[1]


def test_readme_shows_the_table():
    readme = serving_matrix.README.read_text("utf-8")
    assert serving_matrix.updated(readme) == readme, (
        "run .venv/bin/python scripts/serving_matrix.py"
    )
