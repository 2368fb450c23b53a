"""Number formats and quantisation methods by name, as recipe stages."""

from dataclasses import dataclass, field
from typing import Any

from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.autoround import AutoRoundModifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.modifiers.transform.spinquant import SpinQuantModifier
from transformers import AutoConfig

from llmc_faq_slider import SliderQuantModifier

__all__ = [
    "METHODS",
    "Arm",
    "config_groups",
    "ends_at_four_bits",
    "measures_weights_alone",
    "stages",
]

METHODS = {
    "full_precision": "full precision",
    "nearest": "round to nearest",
    "gptq": "GPTQ",
    "smoothquant_gptq": "SmoothQuant + GPTQ",
    "awq": "AWQ",
    "autoround": "AutoRound, 200 iterations",
    "slider_paper": "SliderQuant, the paper's settings, 2 epochs",
    "slider_fixed": "SliderQuant's learnables in the paper's fixed windows",
    "slider_fast": "SliderQuant, fast",
    "slider": "SliderQuant",
    "slider_best": "SliderQuant, best",
    "slider_ends_w4": "SliderQuant, two layers at each end in 4 bits",
    "spinquant_slider": "SpinQuant + SliderQuant",
}

# They leave inputs of 8 bits out when they choose weights: W4A8 has those of W4A16.
WITHOUT_8_BIT_INPUTS = (
    "nearest",
    "gptq",
    "autoround",
    "slider_fixed",
    "slider_fast",
    "slider",
    "slider_best",
)

# Appendix Table A, but for the epochs: one for each of the two stages. The released
# code adds the clipping.
PAPER: dict[str, Any] = {
    "epochs": 2,
    "closing_epochs": 0,
    "shallow_layers": 4,
    "deep_layers": 4,
    "ratio": 0.5,
    "rounding_travel": 0,
    "channel_scales": True,
    "quantized_inputs": True,
    "smoothing_strength": 0.0,
    "low_rank_lr": 1e-4,
    "clipping_lr": 1e-2,
    "channel_scale_lr": 1e-3,
    "visit_decay": 0.0,
}


@dataclass(frozen=True)
class Arm:
    """One run: everything that decides its result."""

    model: str
    scheme: str
    method: str
    seed: int
    rows: int
    length: int
    evaluation_rows: int
    divergence_rows: int
    settings: dict[str, Any] = field(default_factory=dict)


def measures_weights_alone(scheme: str, method: str) -> bool:
    """Whether the arm is also measured with unquantised inputs: W4A8 as W4A16."""
    return scheme.endswith("A8") and method in WITHOUT_8_BIT_INPUTS


def config_groups(scheme: str, group_size: int) -> dict[str, Any]:
    """
    ``W4A8`` symmetric in groups, inputs int8 per token; ``W2A16_asym`` with zero
    points; ``W3A16_channel`` with one scale per output channel.
    """
    name, *details = scheme.split("_")
    weights: dict[str, Any] = {
        "num_bits": int(name[1]),
        "type": "int",
        "symmetric": "asym" not in details,
        "strategy": "channel" if "channel" in details else "group",
    }
    if weights["strategy"] == "group":
        weights["group_size"] = group_size
    group: dict[str, Any] = {"targets": ["Linear"], "weights": weights}
    input_bits = int(name.partition("A")[2])
    if input_bits < 16:
        group["input_activations"] = {
            "num_bits": input_bits,
            "type": "int",
            "symmetric": True,
            "strategy": "token",
            "dynamic": True,
        }
    return {"group_0": group}


def ends_at_four_bits(
    groups: dict[str, Any], layers: int, count: int = 2
) -> dict[str, Any]:
    """Config groups in which the first and last ``count`` layers have 4-bit weights."""
    indices = [*range(count), *range(layers - count, layers)]
    pattern = rf"re:.*layers\.({'|'.join(map(str, indices))})\..*_proj$"
    group = groups["group_0"]
    four_bits = group["weights"] | {"num_bits": 4}
    return {"ends": group | {"targets": [pattern], "weights": four_bits}} | groups


def stages(arm: Arm, group_size: int) -> list[Modifier]:
    """The recipe of an arm; settings of an arm go to its last stage."""
    fields: dict[str, Any] = {
        "ignore": ["lm_head"],
        "config_groups": config_groups(arm.scheme, group_size),
        **arm.settings,
    }
    slider = {"seed": arm.seed, **fields}
    match arm.method:
        case "full_precision":
            return []
        case "nearest":
            return [QuantizationModifier(**fields)]
        case "gptq":
            return [GPTQModifier(**fields)]
        case "smoothquant_gptq":
            smooth = SmoothQuantModifier(smoothing_strength=0.5)
            return [smooth, GPTQModifier(**fields)]
        case "awq":
            return [AWQModifier(), QuantizationModifier(**fields)]
        case "autoround":
            # Compiling needs a compiler and minutes; it changes no result.
            return [AutoRoundModifier(enable_torch_compile=False, **fields)]
        case "slider_paper":
            return [SliderQuantModifier(**PAPER | slider)]
        case "slider_fixed":
            fixed = {"shallow_layers": 0, "deep_layers": 0, "closing_epochs": 0}
            return [SliderQuantModifier(**fixed | slider)]
        case "slider_fast" | "slider" | "slider_best":
            preset = (
                arm.method.removeprefix("slider_") if "_" in arm.method else "default"
            )
            return [SliderQuantModifier(preset=preset, **slider)]
        case "slider_ends_w4":
            layers = AutoConfig.from_pretrained(arm.model).num_hidden_layers
            groups = ends_at_four_bits(slider["config_groups"], layers)
            return [SliderQuantModifier(**slider | {"config_groups": groups})]
        case "spinquant_slider":
            rotation = SpinQuantModifier(
                rotations=["R1", "R2"], transform_type="random-hadamard"
            )
            return [rotation, SliderQuantModifier(**slider)]
    raise ValueError(f"unknown method {arm.method}; known: {', '.join(METHODS)}")
