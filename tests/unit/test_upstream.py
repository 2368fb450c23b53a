"""What the package relies on in llm-compressor and compressed-tensors, piece by piece.

When an upstream release changes one of them, the failing test names the piece and where
it is used, before anything else fails in a stranger way.
"""

import ast
import importlib
import inspect
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import (
    QuantizationConfig,
    apply_quantization_config,
    preset_name_to_scheme,
)
from torch import nn
from torch.utils.data import DataLoader

pytestmark = pytest.mark.unit

PACKAGE = Path(__file__).parents[2] / "llmc_faq_slider"
# Documented entry points; what is imported from elsewhere stands in RELIED_ON.
PUBLIC = {
    "llmcompressor",
    "llmcompressor.core",
    "llmcompressor.modifiers",
    "llmcompressor.recipe",
    "compressed_tensors",
    "compressed_tensors.quantization",
    "transformers",
    "transformers.utils",
}

# (module, name in it, parameters that must exist, used in)
RELIED_ON = [
    ("llmcompressor.modifiers", "ModifierFactory.register", ["type_"], "registration"),
    (
        "llmcompressor.utils.pytorch.module",
        "infer_sequential_targets",
        ["model", "sequential_targets"],
        "decoder",
    ),
    (
        "llmcompressor.pipelines.registry",
        "CalibrationPipeline.from_modifiers",
        ["modifiers", "user"],
        "calibration_data",
    ),
    ("llmcompressor.core", "active_session", [], "checks, run_report"),
    (
        "compressed_tensors.compressors.format",
        "infer_module_format",
        ["module_type", "scheme"],
        "declared",
    ),
    ("llmcompressor.modifiers", "ModifierFactory._main_registry", None, "fields"),
    ("llmcompressor.modifiers", "ModifierFactory._registered_registry", None, "fields"),
    (
        "llmcompressor.modifiers",
        "ModifierFactory._experimental_registry",
        None,
        "recipe_fields",
    ),
    ("llmcompressor.logger", "configure_logger", ["logger_config"], "quiet"),
    ("llmcompressor.logger", "LOGGER_CONFIG.disabled", None, "quiet"),
    (
        "llmcompressor.modeling.moe.linearize",
        "get_non_linearized_moes",
        ["model"],
        "skeleton",
    ),
    (
        "llmcompressor.modeling.moe.linear_experts",
        "LinearExperts2D.get_linear_experts_cls",
        ["experts_cls"],
        "skeleton",
    ),
    ("llmcompressor.modeling.moe", "context._CALIBRATE_ALL_EXPERTS", None, "decoder"),
    ("compressed_tensors.utils", "patch_attr", ["base", "attr", "value"], "decoder"),
    (
        "llmcompressor.modifiers.utils.hooks",
        "HooksMixin.disable_hooks",
        [],
        "calibration_data",
    ),
    ("llmcompressor.utils.dev", "get_main_device", [], "slider.modifier"),
    (
        "llmcompressor.utils.helpers",
        "DisableQuantization",
        ["module"],
        "decoder",
    ),
    (
        "llmcompressor.modifiers.quantization.quantization",
        "QuantizationMixin.initialize_quantization",
        ["model"],
        "slider.modifier",
    ),
    (
        "llmcompressor.modifiers.quantization.quantization",
        "QuantizationMixin.end_calibration",
        ["model"],
        "slider.modifier",
    ),
    (
        "llmcompressor.modifiers.quantization.quantization",
        "QuantizationMixin.resolve_quantization_config",
        [],
        "slider.modifier",
    ),
    (
        "compressed_tensors.offload",
        "update_offload_parameter",
        ["module", "name", "data"],
        "commit",
    ),
    ("compressed_tensors.offload", "disable_offloading", [], "calibration_data"),
    (
        "compressed_tensors.quantization.lifecycle.forward",
        "quantize",
        ["x", "scale", "zero_point", "args"],
        "commit",
    ),
    (
        "compressed_tensors.quantization.lifecycle.forward",
        "dequantize",
        ["x_q", "scale", "zero_point", "args", "dtype"],
        "commit",
    ),
    (
        "compressed_tensors.quantization",
        "QuantizationMetadata.all_qparam_names",
        [],
        "calibration_data",
    ),
    (
        "compressed_tensors.utils",
        "match_named_modules",
        ["model", "targets", "ignore"],
        "checks",
    ),
    (
        "compressed_tensors.utils",
        "match_targets",
        ["name", "module", "targets"],
        "model_check",
    ),
    ("compressed_tensors.offload", "disable_onloading", [], "calibration_data"),
    (
        "compressed_tensors.quantization.quant_scheme",
        "PRESET_SCHEMES",
        None,
        "recipe_fields",
    ),
    ("llmcompressor.modifiers", "ModifierFactory._loaded", None, "recipe_fields"),
    ("llmcompressor.modifiers", "ModifierFactory.refresh", [], "recipe_fields"),
    (
        "llmcompressor.modifiers.quantization.quantization",
        "QuantizationMixin.has_config",
        [],
        "checks",
    ),
    (
        "llmcompressor.modifiers.quantization.quantization",
        "QuantizationMixin.resolved_config",
        None,
        "checks",
    ),
    (
        "llmcompressor.modifiers.quantization.quantization",
        "QuantizationMixin.resolved_targets",
        None,
        "checks",
    ),
    ("llmcompressor.recipe", "Recipe.from_modifiers", ["modifiers"], "recipe_lint"),
    (
        "llmcompressor.transformers.data",
        "TextGenerationDataset.registered_names",
        [],
        "inputs",
    ),
    (
        "llmcompressor",
        "oneshot",
        [
            *("model", "recipe", "stage", "dataset", "dataset_path", "text_column"),
            *("pipeline", "output_dir"),
        ],
        "oneshot",
    ),
    ("transformers", "PreTrainedModel._no_split_modules", None, "decoder"),
    (
        "transformers.utils.hub",
        "cached_file",
        ["path_or_repo_id", "filename"],
        "faq.identity",
    ),
    ("transformers.cache_utils", "Cache.batch_select_indices", None, "faq.sampling"),
    ("transformers.cache_utils", "DynamicLayer", None, "faq.sampling"),
    (
        "transformers.integrations.sdpa_attention",
        "sdpa_attention_forward",
        ["module", "query", "key", "value", "attention_mask", "scaling"],
        "faq.decoding",
    ),
    ("transformers.modeling_utils", "ALL_ATTENTION_FUNCTIONS", None, "faq.decoding"),
    (
        "transformers.conversion_mapping",
        "get_checkpoint_conversion_mapping",
        ["model_type"],
        "saved_keys",
    ),
    (
        "transformers.conversion_mapping",
        "get_model_conversion_mapping",
        ["model", "add_legacy"],
        "saved_keys",
    ),
    (
        "transformers.conversion_mapping",
        "_checkpoint_conversion_mapping_cache",
        None,
        "read_back",
    ),
    (
        "transformers.core_model_loading",
        "WeightRenaming",
        ["source_patterns", "target_patterns"],
        "saved_keys",
    ),
    (
        "transformers.core_model_loading",
        "WeightConverter.source_patterns",
        None,
        "saved_keys",
    ),
    (
        "compressed_tensors.utils",
        "is_match",
        ["name", "module", "targets", "ignore"],
        "saved_config",
    ),
    (
        "transformers",
        "PreTrainedTokenizerBase.get_chat_template",
        [],
        "faq.rendering",
    ),
]


@pytest.mark.parametrize(
    ("module", "name", "parameters", "used_in"),
    RELIED_ON,
    ids=[name for _, name, _, _ in RELIED_ON],
)
def test_upstream_still_has(module, name, parameters, used_in):
    release = (
        f"llmcompressor {version('llmcompressor')}, compressed-tensors "
        f"{version('compressed-tensors')}: {module}.{name}, used in host/{used_in}, "
    )
    piece = importlib.import_module(module)
    for part in name.split("."):
        assert hasattr(piece, part), release + "is gone"
        piece = getattr(piece, part)
    if parameters is None:
        return
    found = list(inspect.signature(piece).parameters)
    for parameter in parameters:
        assert parameter in found, release + f"takes {found}, not {parameter}"


def test_every_undocumented_import_is_in_the_list():
    """What the package imports below upstream's documented entry points."""
    listed = {(module, name.split(".")[0]) for module, name, _, _ in RELIED_ON}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or not node.module:
                continue
            root = node.module.partition(".")[0]
            if root not in ("llmcompressor", "compressed_tensors", "transformers"):
                continue
            for alias in node.names:
                private = node.module not in PUBLIC or alias.name.startswith("_")
                known = (node.module, alias.name) in listed
                assert not private or known, f"{path.name}: {node.module}.{alias.name}"


def quantised_linear() -> nn.Linear:
    model = nn.Sequential(nn.Linear(128, 4, bias=False))
    scheme = preset_name_to_scheme("W4A16", ["Linear"])
    config = QuantizationConfig(config_groups={"group_0": scheme})
    apply_quantization_config(model, config)
    return model[0]


def test_schemes_and_scales_are_attributes_of_modules():
    """Read in host/grids and host/commit."""
    linear = quantised_linear()
    assert linear.quantization_scheme.weights.num_bits == 4
    assert linear.weight_scale.shape == (4, 1)
    assert linear.weight_zero_point.shape == (4, 1)


def test_quantization_enabled_switches_a_module_off():
    """Set in host/calibration_data."""
    linear = quantised_linear()
    nn.init.constant_(linear.weight_scale, 0.5)
    linear.quantization_enabled = True
    x = torch.ones(1, 128)
    rounded = linear(x)
    linear.quantization_enabled = False
    plain = x @ linear.weight.T
    torch.testing.assert_close(linear(x), plain)
    assert not torch.allclose(rounded, plain)


def test_quantisation_switches_all_modules_on_when_it_is_left():
    """Why host/calibration_data does not use ``DisableQuantization``."""
    from llmcompressor.utils.helpers import DisableQuantization

    linear = quantised_linear()
    linear.quantization_enabled = False
    with DisableQuantization(linear):
        pass
    assert linear.quantization_enabled


def test_stages_get_the_very_loader_that_pipelines_get(small_model):
    """Relied on in host/calibration_data: its rows are exchanged in place."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers import Modifier
    from llmcompressor.pipelines.registry import CalibrationPipeline
    from transformers import AutoModelForCausalLM

    seen = []

    class Watching(Modifier):
        def on_initialize(self, state, **kwargs):
            seen.append(kwargs["calib_data"])
            return True

    class Watched:
        def __call__(self, model, dataloader, dataset_args):
            seen.append(dataloader)

    loader = DataLoader([{"input_ids": torch.ones(1, 4, dtype=torch.int64)}])
    original = CalibrationPipeline.__dict__["from_modifiers"]
    CalibrationPipeline.from_modifiers = classmethod(lambda *a, **k: Watched())
    try:
        model = AutoModelForCausalLM.from_pretrained(small_model)
        oneshot(model=model, recipe=[Watching()], dataset=loader)
    finally:
        CalibrationPipeline.from_modifiers = original
    assert len(seen) == 2 and all(found is loader for found in seen)


def test_a_loaders_content_can_be_exchanged():
    """Done in host/calibration_data, because DataLoader forbids setting it."""
    one, other = DataLoader([1, 2]), DataLoader([3, 4, 5])
    content = dict(other.__dict__)
    one.__dict__.clear()
    one.__dict__.update(content)
    assert [int(x) for x in one] == [3, 4, 5]


def test_routers_tell_the_experts_they_choose():
    """Watched in slider/rows."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe import modeling_qwen3_moe as modeling

    config = Qwen3MoeConfig(hidden_size=8, num_experts=4, num_experts_per_tok=2)
    router = modeling.Qwen3MoeTopKRouter(config)
    chosen = router(torch.randn(5, 8))[-1]
    assert router.num_experts == 4 and chosen.shape == (5, 2)
    assert not chosen.is_floating_point()


def test_a_recipe_is_found_where_modifiers_are_listed():
    """Built in the form that upstream reads; see host/recipe_text."""
    from llmcompressor.recipe import Recipe

    arguments = {"scheme": "W4A16", "targets": ["Linear"]}
    read = Recipe.from_dict({"a_stage": {"b_modifiers": {"GPTQModifier": arguments}}})
    assert [type(m).__name__ for m in read.modifiers] == ["GPTQModifier"]
    assert read.modifiers[0].group == "b"
    assert not Recipe.from_dict({"a_stag": {"b_modifiers": {"X": {}}}}).modifiers
    assert not Recipe.from_dict({"a_stage": {"modifiers": {"X": {}}}}).modifiers


def test_stages_say_whether_they_calibrate():
    """Read in host/recipe_lint, host/inputs and host/checks."""
    from llmcompressor.modifiers import Modifier
    from llmcompressor.modifiers.gptq import GPTQModifier

    assert "requires_calibration_data" in Modifier.model_fields
    assert GPTQModifier(scheme="W4A16").requires_calibration_data


def test_session_lists_the_recipes_modifiers():
    from llmcompressor.core import active_session
    from llmcompressor.recipe import Recipe

    assert hasattr(active_session().lifecycle, "recipe")
    assert "modifiers" in Recipe.model_fields


def test_recipes_cannot_name_a_stage_without_registration():
    """No discovery upstream yet; once there is, registering by import can go."""
    from llmcompressor.modifiers import ModifierFactory

    with pytest.raises(ValueError, match="No modifier of type"):
        ModifierFactory.create("llmc_faq_slider.SliderQuantModifier", True, True)
