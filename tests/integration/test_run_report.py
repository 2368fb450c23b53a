"""The report of a run beside its checkpoint."""

import json

import pytest
from family import calibration_set, load, quantize
from llmcompressor.core import active_session
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file

from llmc_faq_slider import FAQModifier, SliderQuantModifier
from llmc_faq_slider.faq.competition import losses
from llmc_faq_slider.host.run_report import RUN_REPORT

pytestmark = pytest.mark.integration

FIELDS = {"ignore": ["lm_head"], "scheme": "W4A16", "epochs": 1}


def test_every_stage_of_ours_is_in_it_and_equal_runs_write_the_same(
    small_model, tmp_path
):
    def run(name):
        faq = FAQModifier(
            generator="self",
            num_candidates=2,
            num_samples=3,
            sequence_length=64,
            max_new_tokens=16,
            batch_size=4,
            min_response_tokens=1,
            max_repeated_share=1.0,
            max_zlib_ratio=1000.0,
            max_fallback_fraction=1.0,
            cache_dir=str(tmp_path / "faq"),
        )
        slider = SliderQuantModifier(**FIELDS, closing_epochs=1)
        output = tmp_path / name
        quantize(load(small_model), [faq, slider], output_dir=str(output))
        assert (output / "recipe.yaml").is_file()
        return slider, json.loads((output / RUN_REPORT).read_text())

    slider, report = run("first")
    first, second = report["stages"]
    (dataset,) = (tmp_path / "faq" / "datasets").iterdir()
    rows = load_file(dataset / "calibration.safetensors")
    manifest = json.loads((dataset / "manifest.json").read_text())
    lost = losses(manifest["counts"])
    assert first == {
        "stage": "FAQModifier",
        "dataset": dataset.name,
        "rows": 3,
        "tokens": 3 * 64,
        "answer_tokens": int(rows["loss_mask"].sum()),
        "counts": manifest["counts"],
        "gates": manifest["gates"],
        "warnings": [] if lost is None else [lost],
    }
    assert (second["stage"], second["rows"], second["tokens"]) == (
        "SliderQuantModifier",
        3,
        3 * 64,
    )
    assert [(w["start_loss"], w["loss"]) for w in second["windows"]] == [
        (result.start_loss, result.loss) for result in slider.results
    ]
    assert second["closing"]["loss"] <= second["closing"]["start_loss"]
    assert second["warnings"] == slider.warnings
    assert (
        len(slider.warnings)
        == sum(w["kept_start"] for w in second["windows"])
        + (second["closing"]["kept_start"])
    )
    assert {"llmcompressor", "torch"} < set(report["versions"])

    _, again = run("second")
    for one in (report, again):
        for window in one["stages"][1]["windows"]:
            assert window.pop("seconds") > 0
    assert again == report


def test_a_closing_pass_that_keeps_its_start_is_reported(small_model, tmp_path):
    stage = SliderQuantModifier(**FIELDS, closing_epochs=1, closing_lr=300.0)
    quantize(
        load(small_model),
        stage,
        dataset=calibration_set(small_model, 4),
        output_dir=str(tmp_path),
        clear_sparse_session=True,
    )
    assert not active_session().lifecycle.recipe.modifiers
    (record,) = json.loads((tmp_path / RUN_REPORT).read_text())["stages"]
    assert record["closing"]["kept_start"]
    assert "closing pass did not lower its loss" in record["warnings"][-1]

    nearest = QuantizationModifier(ignore=["lm_head"], scheme="W4A16")
    quantize(load(small_model), nearest, output_dir=str(tmp_path))
    assert not (tmp_path / RUN_REPORT).exists()
