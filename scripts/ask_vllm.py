"""Asks vLLM itself which scheme and kernel take a config group, without a GPU.

Runs with the Python of the serving environment; tests/e2e/test_serving_table.py starts
it and compares the answers with the package's table. Reads from standard input

    {"questions": [
        {"target": {"name", "platform", "capability", "isa"},
         "group": {"weights", "inputs", "outputs", "format"},
         "layer": [inputs, outputs], "backend": "auto"}]}

and writes one answer per question as JSON; ``backend`` is vLLM's --linear-backend. For
a CUDA target vLLM is told that it runs on a GPU of that capability and that Humming,
which its CUDA build requires, is installed; nothing is computed. For a CPU target and
integer weights the chosen kernel also multiplies a random layer, and the answer says
which precision of the inputs explains the result, or how it failed. vLLM loads one
library per process: with scripts/avx2 on PYTHONPATH that for CPUs with AVX2 alone,
which questions about cpu-avx2 need.
"""

from __future__ import annotations

import json
import os
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch  # noqa: E402
import vllm  # noqa: E402
import vllm.config.vllm as vllm_config  # noqa: E402
import vllm.model_executor.layers.quantization.utils.humming.schema as humming_schema  # noqa: E402
import vllm.model_executor.parameter  # noqa: E402, F401
from compressed_tensors.compressors.pack_quantized.helpers import (  # noqa: E402
    pack_to_int32,
)
from kernel_inputs import input_errors, kernel_of, random_inputs  # noqa: E402
from vllm.config import VllmConfig  # noqa: E402
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (  # noqa: E402, E501
    CompressedTensorsConfig,
)
from vllm.platforms.interface import (  # noqa: E402
    DeviceCapability,
    Platform,
    PlatformEnum,
)

DTYPE = torch.bfloat16
PREFIX = "model.layers.0.mlp.down_proj"


class Gpu(Platform):
    """An NVIDIA GPU that answers questions about itself and computes nothing."""

    _enum = PlatformEnum.CUDA
    device_type = "cuda"
    capability = 0

    @classmethod
    def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
        return DeviceCapability(cls.capability // 10, cls.capability % 10)


class Linear(torch.nn.Module):
    """What a scheme hangs its parameters on."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = None
        self.has_bias = False


@contextmanager
def replaced(replacements: dict[str, Any]) -> Iterator[None]:
    """Names that vLLM's modules import from one another, exchanged in all of them."""
    before = []
    for module in list(sys.modules.values()):
        if module is None or not module.__name__.startswith("vllm"):
            continue
        for name, value in replacements.items():
            if name in vars(module):
                before.append((module, name, vars(module)[name]))
                setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


@contextmanager
def on(target: dict[str, Any]) -> Iterator[None]:
    """vLLM believes to run on ``target``."""
    if target["platform"] == "cuda":
        Gpu.capability = target["capability"]
        with replaced({"current_platform": Gpu(), "has_humming": lambda: True}):
            yield
        return
    library = "avx512" if torch.cpu._is_avx512_supported() else "avx2"
    asked = "avx2" if target["isa"] == "avx2" else "avx512"
    assert library == asked, f"vLLM has loaded its library for {library} here"
    supported = torch.cpu._is_amx_tile_supported
    if target["isa"] == "amx":
        assert supported(), "this machine has no AMX"
        # Linux grants the tile registers on request only.
        torch.cpu._init_amx()
    else:
        torch.cpu._is_amx_tile_supported = lambda: False
    try:
        yield
    finally:
        torch.cpu._is_amx_tile_supported = supported


def ask(
    group: dict[str, Any], target: dict[str, Any], size: list[int]
) -> dict[str, Any]:
    """Scheme, kernel, parameters and precision, or the error that vLLM raises."""
    answer: dict[str, Any] = {"scheme": None, "kernel": None, "error": None}
    layer: Any = Linear()
    try:
        scheme = CompressedTensorsConfig.from_config(_config(group)).get_scheme(
            layer, PREFIX
        )
        answer["scheme"] = type(scheme).__name__
        inputs, outputs = size
        layer.logical_widths = [outputs]
        scheme.create_weights(
            layer=layer,
            input_size=inputs,
            input_size_per_partition=inputs,
            output_partition_sizes=[outputs],
            output_size=outputs,
            params_dtype=DTYPE,
            weight_loader=lambda *args, **kwargs: None,
        )
    except (ValueError, NotImplementedError, RuntimeError) as error:
        answer["error"] = f"{type(error).__name__}: {error}"
        return answer
    except AttributeError as error:
        # A kernel that asks the compiled CUDA extension, which is not there.
        assert "_OpNamespace" in str(error), error
        answer["unasked"] = str(error)
        return answer
    answer["kernel"] = kernel_of(scheme)
    assert answer["kernel"] is not None, scheme
    answer["parameters"] = sorted(name for name, _ in layer.named_parameters())
    # FP8 products of PyTorch have ended this process on CPUs without AMX.
    if target["platform"] == "cpu" and group["weights"]["type"] == "int":
        try:
            answer["errors"] = compare(scheme, layer, group, size)
        except (RuntimeError, AttributeError) as error:
            answer["error"] = f"{type(error).__name__}: {error}"
        else:
            answer["computes"] = min(answer["errors"], key=answer["errors"].get)
    elif answer["kernel"] == "HummingLinearKernel" and find_spec("humming"):
        declared = getattr(layer, "_humming_input_quant_config", None)
        answer["computes"] = humming_inputs(group, declared, target["capability"])
    return answer


def _config(group: dict[str, Any]) -> dict[str, Any]:
    return {
        "format": group["format"],
        "ignore": [],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": group["weights"],
                "input_activations": group["inputs"],
                "output_activations": group["outputs"],
                "format": group["format"],
            }
        },
    }


def humming_inputs(
    group: dict[str, Any], declared: dict[str, Any] | None, capability: int
) -> str:
    """Precision of the inputs that vLLM settles on for its Humming kernel.

    :param declared: the inputs' format as vLLM's scheme hands it to the kernel
    """
    import humming.device
    from humming.schema import BaseInputSchema, BaseWeightSchema, HummingInputSchema

    # The library asks the driver for the device, and there is none.
    humming.device.current_device._value = types.SimpleNamespace(
        sm_version=capability, is_ppu=False
    )
    weights = group["weights"]
    weight_schema = BaseWeightSchema.from_config(
        {
            "quant_method": "humming",
            "dtype": f"int{weights['num_bits']}",
            "group_size": weights["group_size"] or 0,
            "has_zero_point": not weights["symmetric"],
        }
    )
    input_schema = (
        BaseInputSchema.from_config(declared) if declared else HummingInputSchema()
    )
    settled = humming_schema.check_and_fallback_input_schema(
        weight_schema, input_schema, DTYPE
    )
    bits = settled.get_activation_bits()
    return "16 bit" if bits == 16 else f"{settled.a_dtype} per token"


def compare(
    scheme: Any, layer: Any, group: dict[str, Any], size: list[int]
) -> dict[str, float]:
    """Relative error of the kernel's product against each precision of the inputs."""
    generator = torch.Generator().manual_seed(0)
    weight = _fill(layer, group, size, generator)
    scheme.process_weights_after_loading(layer)
    x = random_inputs(size[0], generator)
    return input_errors(weight, x, scheme.apply_weights(layer, x, None))


def _fill(
    layer: Any, group: dict[str, Any], size: list[int], generator: torch.Generator
) -> torch.Tensor:
    """Random codes, scales and zero points in the layer; returns the weight."""
    weights = group["weights"]
    inputs, outputs = size
    groups = inputs // weights["group_size"] if weights["group_size"] else 1
    shape = (outputs, groups)
    scale = (torch.rand(shape, generator=generator) * 0.01 + 0.005).to(DTYPE)
    layer.weight_scale.data.copy_(scale.reshape(layer.weight_scale.shape))
    if weights["type"] == "float":
        values = torch.randn(outputs, inputs, generator=generator) * 30
        codes = values.to(torch.float8_e4m3fn)
        layer.weight.data.copy_(codes)
        return codes.float() * scale.float()
    bits = weights["num_bits"]
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    # Spread as a model's weights: AVX2's int8 products saturate on uniform ones.
    spread_codes = torch.randn(size[::-1], generator=generator) * high / 4
    codes = spread_codes.round().clamp(low, high - 1).to(torch.int8)
    zero_point = torch.zeros(shape, dtype=torch.int8)
    if not weights["symmetric"]:
        zero_point = torch.randint(low, high, shape, generator=generator).to(torch.int8)
        packed = pack_to_int32(zero_point, bits, packed_dim=0)
        layer.weight_zero_point.data.copy_(packed)
    if group["format"] == "pack-quantized":
        layer.weight_packed.data.copy_(pack_to_int32(codes, bits))
    else:
        layer.weight.data.copy_(codes)

    def spread(per_group: torch.Tensor) -> torch.Tensor:
        return per_group.float().repeat_interleave(inputs // groups, 1)

    return (codes.float() - spread(zero_point)) * spread(scale)


def main() -> None:
    asked = json.load(sys.stdin)
    config = VllmConfig()
    config.model_config = types.SimpleNamespace(
        dtype=DTYPE, is_moe=False, quantization="compressed-tensors", hf_config=None
    )
    vllm_config._current_vllm_config = config
    alone = {
        "get_tensor_model_parallel_rank": lambda: 0,
        "get_tensor_model_parallel_world_size": lambda: 1,
    }
    answers = []
    with replaced(alone):
        for question in asked["questions"]:
            config.kernel_config.linear_backend = question["backend"]
            with on(question["target"]):
                answers.append(
                    ask(question["group"], question["target"], question["layer"])
                )
    print(json.dumps({"vllm": vllm.__version__, "answers": answers}))


if __name__ == "__main__":
    main()
