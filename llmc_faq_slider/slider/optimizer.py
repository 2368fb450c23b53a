"""Optimisers of a window: AdamW, scaled descent for rounding offsets, linear decay.

Also what an optimiser has to remember when a run stops between two of its steps.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from llmc_faq_slider.slider.learnables import Kind
from llmc_faq_slider.slider.learning_state import LearningSettings
from llmc_faq_slider.slider.student import StudentLayer

__all__ = [
    "ScaledDescent",
    "linear_decay",
    "optimizer_tensors",
    "restore_optimizer",
    "student_optimizers",
]

#: share of a mean square that stays from one step to the next
BETA = 0.9
TINY = torch.finfo(torch.float32).tiny


class ScaledDescent(torch.optim.Optimizer):
    """
    Moves every element against its gradient, divided by the root of that element's
    running mean square, and keeps it within ``[-limit, limit]``.

    This is Adam without momentum (arXiv 1412.6980, section 2). Departure from AutoRound
    (arXiv 2309.05516, section 3), which moves by the gradient's sign alone: here a
    batch that says much about a weight moves it further than one that hardly touches
    it. That takes one more tensor of the weight's shape and loses less
    (docs/experiments.md).

    :param lr: how far an element moves whose gradient has its usual size, in steps of
        the weight grid
    """

    def __init__(
        self,
        parameters: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        limit: float = 0.5,
    ):
        super().__init__(parameters, {"lr": lr, "limit": limit})

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None
    ) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if (grad := parameter.grad) is not None:
                    size = self._usual_size(parameter, grad)
                    parameter.addcdiv_(grad, size, value=-group["lr"])
                    parameter.clamp_(-group["limit"], group["limit"])

    def _usual_size(self, parameter: Tensor, grad: Tensor) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["square"] = torch.zeros_like(parameter)
        state["step"] += 1
        # With this weight the running mean is unbiased from the first step on.
        weight = (1 - BETA) / (1 - BETA ** state["step"].item())
        square: Tensor = state["square"]
        square.mul_(1 - weight).addcmul_(grad, grad, value=weight)
        return square.clamp(min=TINY).sqrt_()


def student_optimizers(
    students: list[tuple[StudentLayer, float]], settings: LearningSettings, steps: int
) -> list[torch.optim.Optimizer]:
    """
    AdamW without weight decay, and scaled descent for rounding offsets.

    :param students: each with its share of the learning rates
    """

    def groups(kind: Kind, rate: float) -> list[dict[str, Any]]:
        return [
            {"params": parameters, "lr": share * rate}
            for student, share in students
            if (parameters := student.parameters(kind))
        ]

    optimizers: list[torch.optim.Optimizer] = []
    rates = settings.learning_rates.items()
    if smooth := [group for kind, rate in rates for group in groups(kind, rate)]:
        optimizers.append(torch.optim.AdamW(smooth, weight_decay=0.0))
    # Rates that fall linearly to zero add up to half of the first one per step.
    offset_rate = 2 * settings.rounding_travel / max(1, steps)
    if offsets := groups("rounding", offset_rate):
        optimizers.append(ScaledDescent(offsets, offset_rate))
    return optimizers


def linear_decay(
    optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Rates that fall linearly to zero over ``steps`` steps."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 1 - step / max(1, steps)
    )


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies of what an optimiser keeps per parameter: :func:`restore_optimizer`."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        f"{number}.{name}": value.detach().clone()
        for number, parameter in enumerate(parameters)
        for name, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LambdaLR,
    tensors: Mapping[str, Tensor],
    steps: int,
) -> None:
    """
    Put an optimiser and its :func:`linear_decay` behind the ``steps``-th step.

    :param tensors: from :func:`optimizer_tensors`
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for key, value in tensors.items():
        number, name = key.split(".")
        parameter = parameters[int(number)]
        # AdamW counts steps on the CPU.
        place = value if value.ndim == 0 else value.to(parameter.device)
        optimizer.state[parameter][name] = place
    schedule.last_epoch = steps
    for group, rate, decay in zip(
        optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
    ):
        group["lr"] = rate * decay(steps)
