"""Sign descent inside a box, for rounding offsets, and the decay of all rates."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

__all__ = ["SignDescent", "linear_decay"]


class SignDescent(torch.optim.Optimizer):
    """
    Moves every element by the learning rate against its gradient's sign, and keeps it
    within ``[-limit, limit]``.

    An offset matters only when it crosses a rounding threshold, so steps of equal size
    serve it better than steps in proportion to the gradient (AutoRound, arXiv
    2309.05516, section 3), and there is no state to keep.

    :param lr: in steps of the weight grid
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float, limit: float = 0.5):
        super().__init__(parameters, {"lr": lr, "limit": limit})

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None
    ) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad.sign(), alpha=group["lr"])
                    parameter.clamp_(-group["limit"], group["limit"])


def linear_decay(
    optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Rates that fall linearly to zero over ``steps`` steps."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 1 - step / max(1, steps)
    )
