"""One short row through the whole model, before anything is learned.

Whatever of an architecture would end a run late ends it here: layers that are no plain
chain, that cannot be differentiated, or that use a linear's weight in another way than
by calling the linear. Each layer runs once, so that a model whose weights are on a disk
is read once.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmc_faq_slider.slider.forwards import (
    Arguments,
    layer_output,
    replaced_forwards,
    same_output,
    split_hidden,
)

__all__ = ["DRY_TOKENS", "DryPass", "dry_pass", "not_supported"]

DRY_TOKENS = 64

Linears = Mapping[int, Mapping[str, nn.Module]]


def not_supported(what: str) -> ValueError:
    return ValueError(
        f"{what} SliderQuant needs a plain chain of decoder layers; this architecture "
        "is not supported."
    )


@dataclass
class DryPass:
    """
    :param calls: what each layer was given beside hidden states
    :param tails: what each layer returned behind hidden states, None if no tuple
    :param states: input of each layer and output of the last, ``[1, tokens, hidden]``
    :param hidden: output of the last layer, likewise
    :param logits: the model's own, None if it returns none
    :param uncalled: linears that no token of the row reached, ``<layer>.<name>``
    """

    calls: list[Arguments] = field(default_factory=list)
    tails: list[tuple[Any, ...] | None] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    hidden: Tensor = field(default_factory=lambda: torch.empty(0))
    logits: Any = None
    uncalled: set[str] = field(default_factory=set)


@torch.no_grad()
def dry_pass(
    model: nn.Module, layers: list[nn.Module], ids: Tensor, linears: Linears
) -> DryPass:
    """
    :param ids: token ids ``[1, tokens]``
    :param linears: what will be quantised, by layer index and name within the layer; of
        these layers it is also tried whether they can learn
    :raises ValueError: if a layer is not reached, if its input is not the output of the
        layer before it, has another shape or is not finite, if it cannot be
        differentiated, or if a linear cannot be quantised
    """
    found = DryPass()
    unfit: dict[str, str] = {}

    def tried(index: int) -> Callable[..., Any]:
        layer = layers[index]
        forward = layer.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            states, call = split_hidden(args, kwargs)
            reached = len(found.calls)
            if index > reached:
                raise _not_reached(reached, layers)
            if index < reached:
                raise not_supported(f"Decoder layer {index} is called more than once.")
            _check_states(index, states, found.hidden)
            found.calls.append(call)
            found.states.append(states)
            trial = _Trial(index, layer, forward, linears.get(index, {}))
            output = trial.run(states, *call[0], **call[1])
            for name, reason in trial.unfit.items():
                unfit.setdefault(_pattern(name), f"{name} of layer {index} {reason}")
            found.uncalled |= {f"{index}.{name}" for name in trial.uncalled}
            found.hidden = layer_output(output)
            if not isinstance(found.hidden, Tensor):
                raise not_supported(
                    f"Decoder layer {index} returns a {type(output).__name__}, not "
                    "hidden states."
                )
            found.tails.append(output[1:] if isinstance(output, tuple) else None)
            return output

        return run

    with replaced_forwards({layer: tried(i) for i, layer in enumerate(layers)}):
        output = model(input_ids=ids, use_cache=False)
    if len(found.calls) < len(layers):
        raise _not_reached(len(found.calls), layers)
    _check_finite(len(layers), found.hidden)
    found.states.append(found.hidden)
    if unfit:
        patterns = ", ".join(f'"re:.*{pattern}$"' for pattern in unfit)
        raise ValueError(
            f"Some linears cannot be quantised: {'; '.join(unfit.values())}. Add "
            f"{patterns} to ignore."
        )
    found.logits = getattr(output, "logits", None)
    return found


def _not_reached(index: int, layers: list[nn.Module]) -> ValueError:
    return ValueError(
        f"Text does not reach decoder layer {index} ({type(layers[index]).__name__}). "
        "Name the layer class of the language model with oneshot(sequential_targets="
        '["..."]).'
    )


def _check_states(index: int, states: Tensor, previous: Tensor) -> None:
    if states.ndim != 3:
        raise not_supported(
            "The decoder layers take hidden states of shape "
            f"{list(states.shape)}, not [rows, tokens, hidden]."
        )
    if not index:
        return
    _check_finite(index, previous)
    if not torch.equal(states, previous.to(states.device)):
        raise not_supported(
            f"Decoder layer {index} does not take the output of layer {index - 1} as "
            "it is."
        )


def _check_finite(index: int, output: Tensor) -> None:
    if not torch.isfinite(output).all():
        raise ValueError(
            f"The output of decoder layer {index - 1} is not finite in "
            f"{output.dtype}. Load the model in bfloat16 or float32; if it is, its "
            "weights are broken."
        )


def _pattern(name: str) -> str:
    """Matches the linears of all layers, and experts, that have the name."""
    return re.sub(r"\\\.\d+(?=\\\.)", r"\\.\\d+", re.escape(name).replace("\\_", "_"))


class _Trial:
    """One layer on one row, its targeted linears watched."""

    def __init__(
        self,
        index: int,
        layer: nn.Module,
        forward: Callable[..., Any],
        linears: Mapping[str, nn.Module],
    ):
        self.index = index
        self.layer = layer
        self.forward = forward
        self.linears = linears
        self.uncalled = set(linears)
        self.unfit: dict[str, str] = {}

    def run(self, states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.linears:
            return self.forward(states, *args, **kwargs)
        with torch.enable_grad():
            start = states.detach().requires_grad_()

            def work() -> Any:
                # no leaf, which a layer may not change in place
                return self.forward(start.clone(), *args, **kwargs)

            output = self._unread(list(self.linears), work)
            if output is None:
                self._name_readers(work)
                output = work()
            self._differentiate(layer_output(output), start)
        return _detached(output)

    def _unread(self, names: list[str], work: Callable[[], Any]) -> Any:
        """Output without NaN though weights are NaN outside their linears, or None."""
        with self._poisoned(names):
            try:
                output = work()
            except Exception:  # what code makes of such a weight may be anything
                return None
        return output if torch.isfinite(layer_output(output)).all() else None

    def _name_readers(self, work: Callable[[], Any]) -> None:
        if not torch.isfinite(layer_output(work())).all():
            return
        for name in self.linears:
            if self._unread([name], work) is None:
                self.unfit[name] = (
                    "has its weight read by the layer without being called"
                )

    @contextmanager
    def _poisoned(self, names: list[str]) -> Iterator[None]:
        """Context in which only the linears themselves see their weights.

        An attribute of the instance hides the parameter, wherever that is stored.
        """
        chosen = {name: self.linears[name] for name in names}
        for module in chosen.values():
            weight = module.weight
            assert isinstance(weight, Tensor)
            poison = weight.new_full((), torch.nan).expand(weight.shape)
            module.__dict__["weight"] = poison
        forwards = {module: self._own(n, module) for n, module in chosen.items()}
        try:
            with replaced_forwards(forwards):
                yield
        finally:
            for module in chosen.values():
                module.__dict__.pop("weight", None)

    def _own(self, name: str, module: nn.Module) -> Callable[..., Any]:
        forward = module.forward

        def call(*args: Any, **kwargs: Any) -> Any:
            # Experts may be called with no tokens.
            if not args or not isinstance(args[0], Tensor) or args[0].numel():
                self.uncalled.discard(name)
            poison = module.__dict__.pop("weight")
            try:
                output = forward(*args, **kwargs)
                if len(args) != 1 or kwargs:
                    self.unfit[name] = "is called with more than its input"
                elif type(module).forward is not nn.Linear.forward:
                    if not _is_linear(module, args[0], output):
                        kind = type(module).__name__
                        self.unfit[name] = f"is a {kind}, which does more than multiply"
                return output
            finally:
                module.__dict__["weight"] = poison

        return call

    def _differentiate(self, output: Tensor, states: Tensor) -> None:
        try:
            torch.autograd.grad(output.float().sum(), states)
        except (RuntimeError, NotImplementedError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"Decoder layer {self.index} ({type(self.layer).__name__}) cannot be "
                f"differentiated, so SliderQuant cannot learn in it: {reason}"
            ) from error


@torch.no_grad()
def _is_linear(module: nn.Module, states: Tensor, output: Any) -> bool:
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    if not isinstance(output, Tensor) or states.shape[-1] != weight.shape[-1]:
        return False
    expected = F.linear(states, weight, bias)  # type: ignore[arg-type]
    return output.shape == expected.shape and same_output(output, expected)


def _detached(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.detach()
    if isinstance(output, tuple):
        return tuple(map(_detached, output))
    return output
