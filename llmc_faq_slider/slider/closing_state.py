"""What a closing pass saves between two steps, and how it is taken up again."""

from typing import Any

import torch
from loguru import logger
from torch import Tensor

from llmc_faq_slider.slider.checkpoint import Checkpoint
from llmc_faq_slider.slider.interruption import StopRequest
from llmc_faq_slider.slider.optimizer import optimizer_tensors, restore_optimizer

__all__ = ["restore_steps", "save_steps", "saved_attempt", "say_stopped"]

CLOSING = "closing"

#: epochs and first learning rate
Plan = dict[str, float]


def saved_attempt(saved: Checkpoint | None, plan: Plan) -> int:
    """The attempt that a saved state of the same plan is in."""
    where = _where(saved, plan)
    return 0 if where is None else where["attempt"]


def _where(saved: Checkpoint | None, plan: Plan) -> dict[str, Any] | None:
    """Place of a saved state in a pass of the same plan; others do not count."""
    progress = saved.progress if saved is not None else None
    where = (progress or {}).get(CLOSING)
    return where if where is not None and where.get("plan") == plan else None


def save_steps(
    saved: Checkpoint,
    plan: Plan,
    attempt: int,
    step: int,
    factors: list[Tensor],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> None:
    tensors = {
        f"factor.{number}": factor.detach().clone()
        for number, factor in enumerate(factors)
    }
    for name, tensor in optimizer_tensors(optimizer).items():
        tensors[f"optimizer.{name}"] = tensor
    where = {
        "plan": plan,
        "attempt": attempt,
        "step": step,
        "scaler": scaler.state_dict(),
    }
    saved.save({**(saved.progress or {}), CLOSING: where}, {CLOSING: tensors})


@torch.no_grad()
def restore_steps(
    saved: Checkpoint | None,
    plan: Plan,
    attempt: int,
    factors: list[Tensor],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LambdaLR,
    scaler: torch.amp.GradScaler,
) -> int:
    """Take up a saved state of the same attempt; the steps it has done."""
    where = _where(saved, plan)
    if where is None or where["attempt"] != attempt:
        return 0
    assert saved is not None
    tensors = saved.tensors(CLOSING)
    for number, factor in enumerate(factors):
        factor.copy_(tensors[f"factor.{number}"])
    states = {
        name.removeprefix("optimizer."): tensor
        for name, tensor in tensors.items()
        if name.startswith("optimizer.")
    }
    restore_optimizer(optimizer, schedule, states, where["step"])
    scaler.load_state_dict(where["scaler"])
    return where["step"]


def say_stopped(
    stop: StopRequest, saved: Checkpoint | None, step: int, steps: int
) -> None:
    assert stop.signal is not None
    logger.warning(
        f"SliderQuant: stopped by {stop.signal.name} after step {step} of {steps} of "
        "the closing pass. "
        + (
            f"Run the same command again to go on; the state is in {saved.folder}."
            if saved is not None
            else "Without checkpoint_dir nothing was saved."
        )
    )
