"""What must hold before a SliderQuant stage begins, and when it says it is done.

Each check returns sentences on what does not hold; :func:`conclude` fails the run with
them, or lets it pass with warnings.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from compressed_tensors.offload import disable_onloading
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from loguru import logger
from torch import Tensor, nn

from llmc_faq_slider.host.calibration_data import plain_weights
from llmc_faq_slider.slider.learning_state import WindowResult

__all__ = [
    "check_committed",
    "check_finite",
    "check_folds",
    "check_losses",
    "check_weights",
    "conclude",
]

SHOWN = 5
# Squared error of a committed layer's output relative to its square. 16 bits round the
# folded norms and weights once more.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 1e-3}
# Weights may stand this many roundings of their dtype beside the grid: the commit moves
# them by up to two where the code would be lost.
ROUNDINGS = 4


def conclude(problems: Iterable[str], strict: bool) -> list[str]:
    """
    Fail, or warn.

    :return: the sentences, for the record of the run
    :raises RuntimeError: with all of them, if there are any and ``strict``
    """
    found = list(problems)
    if found and strict:
        raise RuntimeError(
            "\n".join(found) + "\nThe stage's result is not to be trusted. With "
            "strict: false these are warnings."
        )
    for problem in found:
        logger.warning(problem)
    return found


@torch.no_grad()
def check_finite(model: nn.Module) -> list[str]:
    """Weights that hold NaN or infinity, by name."""
    with disable_onloading():
        broken = [
            name
            for name, weight in plain_weights(model)
            if weight.is_floating_point()
            and weight.device.type != "meta"
            and not _finite(weight)
        ]
    if not broken:
        return []
    return [f"{len(broken)} weights hold NaN or infinity: {_listed(broken)}."]


def check_weights(model: nn.Module) -> None:
    """
    Check what a stage is to learn from.

    :raises ValueError: if weights hold NaN or infinity
    """
    for problem in check_finite(model):
        raise ValueError(
            f"{problem} SliderQuant cannot learn from them: give it a model whose "
            "weights are whole."
        )


@torch.no_grad()
def check_committed(modules: dict[str, nn.Module], committed: set[str]) -> list[str]:
    """
    Modules left out, and unusable scales, weights or codes.

    :param modules: every targeted module by name
    :param committed: names that were written
    """
    problems = []
    missing = sorted(set(modules) - committed)
    if missing:
        problems.append(
            f"SliderQuant quantised {len(committed)} of {len(modules)} layers; "
            f"missing: {_listed(missing)}."
        )
    for name, module in modules.items():
        if name in committed:
            problem = _committed_problem(module)
            if problem is not None:
                problems.append(f"{name} {problem}.")
    return problems


def _committed_problem(module: nn.Module) -> str | None:
    scale, weight = module.weight_scale, module.weight
    zero_point = module.weight_zero_point
    assert isinstance(scale, Tensor) and isinstance(weight, Tensor)
    assert isinstance(zero_point, Tensor)
    if not (_finite(scale) and (scale != 0).all()):
        return "has weight scales that are not finite and nonzero"
    if not _finite(weight):
        return "has weights that are not finite"
    args: QuantizationArgs = module.quantization_scheme.weights  # type: ignore
    codes = quantize(weight, scale, zero_point, args)
    stored = dequantize(codes, scale, zero_point, args, dtype=weight.dtype)
    allowed = ROUNDINGS * torch.finfo(weight.dtype).eps * stored.float().abs()
    off = (weight.float() - stored.float()).abs() > allowed
    if off.any():
        return f"has {int(off.sum())} weights beside the grid of its scales"
    steps = 2**args.num_bits - 1
    if weight.any() and _reach(codes.float(), zero_point.float(), args) < steps / 4:
        return f"uses a small part of its {steps + 1} codes: its scales are too large"
    return None


def _reach(codes: Tensor, zero_point: Tensor, args: QuantizationArgs) -> float:
    """Largest distance of a code from zero, in steps."""
    if args.symmetric:
        return codes.abs().max().item()
    groups = codes.unflatten(-1, (zero_point.shape[-1], -1))
    return (groups - zero_point.unsqueeze(-1)).abs().max().item()


def check_losses(results: list[WindowResult]) -> list[str]:
    """Windows that ended worse than they started, or not finite."""
    return [
        f"SliderQuant's window over {result.window} ended at loss {result.loss:.4e}, "
        f"its start was {result.start_loss:.4e}. Lower the learning rates, and check "
        "the calibration data."
        for result in results
        if not math.isfinite(result.loss) or result.loss > result.start_loss
    ]


def check_folds(
    errors: Mapping[int, float], layers: Mapping[str, nn.Module], dtype: torch.dtype
) -> list[str]:
    """
    Layers whose committed weights do not compute what was trained.

    :param errors: relative to the output's square, by layer index
    :param layers: all of them by name, in order
    :param dtype: of the hidden states; a layer's weights may have fewer digits
    """
    problems = []
    for index, error in errors.items():
        name, layer = list(layers.items())[index]
        kept = {dtype} | {parameter.dtype for parameter in layer.parameters()}
        tolerance = max(TOLERANCE.get(one, 0.0) for one in kept)
        if not error <= tolerance:
            problems.append(
                f"{name} as committed differs from what was trained: relative squared "
                f"error of its output {error:.2e}, at most {tolerance:.0e} is rounding."
            )
    return problems


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
