"""What must hold when a SliderQuant stage says it is done."""

import torch
from torch import Tensor, nn

from llmc_faq_slider.slider.learner import WindowResult

__all__ = ["check_committed", "check_losses"]


@torch.no_grad()
def check_committed(modules: dict[str, nn.Module], committed: set[str]) -> None:
    """
    :param modules: every targeted module by name
    :param committed: names that were written
    :raises RuntimeError: if one was left out, or holds unusable scales or weights
    """
    missing = sorted(set(modules) - committed)
    if missing:
        raise RuntimeError(
            f"SliderQuant quantised {len(committed)} of {len(modules)} layers; "
            f"missing: {', '.join(missing[:5])}."
        )
    for name, module in modules.items():
        scale, weight = module.weight_scale, module.weight
        assert isinstance(scale, Tensor) and isinstance(weight, Tensor)
        if not (torch.isfinite(scale).all() and (scale != 0).all()):
            raise RuntimeError(f"{name} has weight scales that are zero or not finite.")
        if not torch.isfinite(weight).all():
            raise RuntimeError(f"{name} has weights that are not finite.")


def check_losses(results: list[WindowResult]) -> None:
    """
    :raises RuntimeError: if a window ended worse than it started, or not finite
    """
    for result in results:
        if not result.loss <= result.start_loss:
            raise RuntimeError(
                f"SliderQuant's window over {result.window} ended at loss "
                f"{result.loss:.4e}, above its start {result.start_loss:.4e}. Lower "
                "the learning rates, and check the calibration data and weights for "
                "NaN or infinity."
            )
