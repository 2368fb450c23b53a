"""What the package relies on in llm-compressor and compressed-tensors, piece by piece.

When an upstream release changes one of them, the failing test names the piece and where
it is used, before anything else fails in a stranger way.
"""

import importlib
import inspect
import subprocess
import sys
from importlib.metadata import version

import pytest

pytestmark = pytest.mark.unit

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
    ("llmcompressor.core", "active_session", [], "checks, saved_recipe"),
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
        "slider.modifier",
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


def test_importing_us_leaves_llm_compressors_log_as_it_is():
    command = (
        "import llmc_faq_slider; from loguru import logger; "
        "from llmcompressor.logger import LOGGER_CONFIG; "
        "assert not LOGGER_CONFIG.disabled; logger.log('METRIC', 'seen')"
    )
    done = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "seen" in done.stdout
