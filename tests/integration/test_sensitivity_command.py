"""Sensitivity on the trained small model: the measure, the command and ``auto``."""

import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from family import calibration_set, held_out_rows, load, logits, quantize
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.recipe import Recipe
from loguru import logger
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config
from typer.testing import CliRunner

from llmc_faq_slider import SliderQuantModifier
from llmc_faq_slider.cli import app
from llmc_faq_slider.report.sensitivity import Format, Sample, sensitivity_record
from llmc_faq_slider.slider.proposal import propose_windows

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
SAMPLE = ["--rows", "4", "--tokens", "64"]
PNG, SVG = b"\x89PNG\r\n\x1a\n", b"<?xml"


def run(*arguments):
    return CliRunner().invoke(app, ["sensitivity", *map(str, arguments)])


@pytest.mark.parametrize(
    ("number_format", "weights", "inputs"),
    [
        (Format(), {"num_bits": 4, "strategy": "group", "group_size": 128}, None),
        (
            Format(bits=2, symmetric=False, group_size=0, input_bits=8),
            {"num_bits": 2, "symmetric": False, "strategy": "channel"},
            {"num_bits": 8, "strategy": "token", "dynamic": True},
        ),
    ],
)
def test_values_are_those_of_models_quantised_by_llm_compressor(
    number_format, weights, inputs, small_model, tmp_path
):
    """One layer alone, by llm-compressor's own stage, and a plain forward pass."""
    tokenizer = AutoTokenizer.from_pretrained(small_model)
    text = tmp_path / "text.txt"
    rows = held_out_rows(small_model, half=1)[:4]
    text.write_text(tokenizer.decode(rows.flatten()), encoding="utf-8")
    ids = tokenizer(text.read_text(encoding="utf-8"))["input_ids"]
    rows = torch.tensor(ids[: 4 * 100]).view(4, 100)

    record = sensitivity_record(
        str(small_model), number_format, Sample(text, 4, 100), dtype="float32"
    )

    full = logits(load(small_model, torch.float32), rows).log_softmax(-1)
    loss = F.nll_loss(full[:, :-1].flatten(0, 1), rows[:, 1:].flatten()).item()
    assert record.loss == pytest.approx(loss, rel=1e-5)
    assert len(record.layers) == 8
    for index in (0, 3, 7):
        model = load(small_model, torch.float32)
        group = {"targets": [rf"re:.*layers\.{index}\..*_proj"], "weights": weights}
        if inputs:
            group["input_activations"] = inputs
        quantize(model, QuantizationModifier(config_groups={"group_0": group}))
        found = logits(model, rows).log_softmax(-1)
        kl = (full.exp() * (full - found)).sum(-1).mean().item()
        changed = F.nll_loss(found[:, :-1].flatten(0, 1), rows[:, 1:].flatten()).item()
        assert record.layers[index].kl == pytest.approx(kl, rel=1e-3)
        assert record.layers[index].loss_increase == pytest.approx(
            changed - loss, abs=1e-4
        )


@pytest.mark.parametrize(("suffix", "start"), [(".png", PNG), (".svg", SVG)])
def test_command_writes_figure_and_numbers(suffix, start, small_model, tmp_path):
    figure = tmp_path / f"layers{suffix}"
    result = run(small_model, "-o", figure, "--bits", 2, *SAMPLE)
    assert result.exit_code == 0, result.output
    assert figure.read_bytes().startswith(start)
    record = json.loads((tmp_path / "layers.json").read_text())
    assert [row["layer"] for row in record["layers"]] == [*range(8)]
    proposal = propose_windows([row["kl"] for row in record["layers"]])
    assert record["shallow_layers"] == proposal.shallow_layers
    assert (
        f"shallow_layers: {proposal.shallow_layers} and "
        f"deep_layers: {proposal.deep_layers}"
    ) in " ".join(result.output.split())
    assert (record["bits"], record["group_size"]) == (2, 128)
    # The first layer of the small model is by far its most sensitive one.
    kl = [row["kl"] for row in record["layers"]]
    assert kl[0] > 2 * max(kl[1:])


def test_same_command_gives_the_same_bytes(small_model, tmp_path):
    for name in ("a.svg", "b.svg"):
        assert run(small_model, "-o", tmp_path / name, *SAMPLE).exit_code == 0
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_entry_point_runs_in_a_process_of_its_own(small_model, tmp_path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"]["llmc-faq-slider"] == "llmc_faq_slider.cli:app"
    command = [sys.executable, "-m", "llmc_faq_slider.cli", "sensitivity"]
    done = subprocess.run(
        [*command, str(small_model), *SAMPLE],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Proposal: SliderQuantModifier with shallow_layers: 1" in done.stdout
    assert {p.name for p in tmp_path.iterdir()} == {
        "sensitivity.png",
        "sensitivity.json",
    }


@pytest.fixture
def broken(small_model, tmp_path):
    """Folders and files that the command cannot work with."""
    config = json.loads((small_model / "config.json").read_text())
    quantised = tmp_path / "quantised"
    shutil.copytree(small_model, quantised)
    config["quantization_config"] = {"quant_method": "compressed-tensors"}
    (quantised / "config.json").write_text(json.dumps(config))
    gpt2 = tmp_path / "gpt2"
    shutil.copytree(small_model, gpt2, ignore=shutil.ignore_patterns("model*"))
    tiny = GPT2Config(
        vocab_size=3072, n_embd=16, n_layer=1, n_head=1, bos_token_id=2, eos_token_id=2
    )
    AutoModelForCausalLM.from_config(tiny).save_pretrained(gpt2)
    unweighted = tmp_path / "unweighted"
    shutil.copytree(small_model, unweighted, ignore=shutil.ignore_patterns("model*"))
    untokenized = tmp_path / "untokenized"
    untokenized.mkdir()
    shutil.copy(small_model / "config.json", untokenized)
    (tmp_path / "empty").mkdir()
    (tmp_path / "unknown").mkdir()
    (tmp_path / "unknown" / "config.json").write_text("{}")
    (tmp_path / "short.txt").write_text("Too short.")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    return tmp_path


@pytest.mark.parametrize(
    ("model", "options", "sentence"),
    [
        ("{broken}/nowhere", [], "There is no model folder"),
        ("nobody/nothing", [], "it is no folder here, and as a hub id"),
        ("{broken}/empty", [], "holds no config.json"),
        ("{broken}/unknown", [], "cannot be read: Unrecognized model"),
        ("{broken}/quantised", [], "is quantised already"),
        ("{broken}/untokenized", [], "No tokenizer can be loaded"),
        ("{broken}/unweighted", [], "cannot be loaded as a causal language model"),
        ("{broken}/gpt2", [], "not a torch.nn.Linear"),
        ("{small}", ["--text", "{broken}/short.txt"], "too few for 8 rows of 128"),
        ("{small}", ["--text", "{broken}/binary.txt"], "cannot be read as UTF-8"),
        ("{small}", ["--rows", "10000"], "too few for 10000 rows"),
        ("{small}", ["--tokens", "4000", "--rows", "1"], "the 2048 that"),
        ("{small}", ["--group-size", "100"], "Groups of 128 divide all"),
        ("{small}", ["--device", "warp"], "device 'warp' cannot be used"),
        ("{small}", ["-o", "{broken}/figure.pdf"], "does not end in .png or .svg"),
        ("{small}", ["-o", "{broken}/no/figure.png"], "can be written to"),
    ],
)
def test_wrong_input_gives_a_sentence(model, options, sentence, broken, small_model):
    known = {"broken": str(broken), "small": str(small_model)}
    arguments = [argument.format(**known) for argument in [model, *options]]
    if "-o" not in options:
        arguments += ["-o", broken / "figure.png"]
    result = run(*arguments)
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    (line,) = (x for x in result.stderr.splitlines() if x.startswith("Error: "))
    assert sentence in line and line.endswith("."), line
    assert not (broken / "figure.json").exists()


@pytest.mark.parametrize(
    "options", [["--bits", "1"], ["--input-bits", "5"], ["--text", "none.txt"]]
)
def test_options_out_of_range(options, small_model):
    assert run(small_model, *options).exit_code == 2


def test_auto_measures_the_stages_own_rows_and_format(small_model, tmp_path):
    messages = []
    handler = logger.add(messages.append, level="INFO", format="{message}")
    stage = SliderQuantModifier(
        ignore=["lm_head"],
        scheme="W4A16",
        shallow_layers="auto",
        deep_layers="auto",
        epochs=1,
        batch_size=8,
    )
    try:
        quantize(
            load(small_model),
            stage,
            dataset=calibration_set(small_model, 8),
            output_dir=str(tmp_path),
        )
    finally:
        logger.remove(handler)
    (line,) = (m for m in messages if "sensitivity proposes" in m)
    values = [float(value) for value in line.rsplit(": ", 1)[1].split(", ")]
    proposal = propose_windows(values)
    assert len(values) == 8 and values[0] == max(values)
    for family, count in (
        ("shallow", proposal.shallow_layers),
        ("deep", proposal.deep_layers),
    ):
        assert sum(r.window.family == family for r in stage.results) == count
    saved = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    assert "auto" in json.dumps(saved)
    (again,) = Recipe.create_instance(str(tmp_path / "recipe.yaml")).modifiers
    assert (again.shallow_layers, again.deep_layers) == ("auto", "auto")


def test_auto_at_one_end_leaves_the_other(small_model):
    stage = SliderQuantModifier(
        ignore=["lm_head"],
        scheme="W4A16",
        shallow_layers=3,
        deep_layers="auto",
        epochs=1,
    )
    quantize(load(small_model), stage, dataset=calibration_set(small_model, 8))
    families = [result.window.family for result in stage.results]
    assert families.count("shallow") == 3
    assert 1 <= families.count("deep") <= 2
