"""A model's modules without weights, to look at names and sizes.

Private upstream API, by which oneshot makes linears of a mixture of experts:
``llmcompressor.modeling.moe.linearize.get_non_linearized_moes`` and
``llmcompressor.modeling.moe.linear_experts.LinearExperts2D``.
"""

from pathlib import Path

import torch
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from llmcompressor.modeling.moe.linearize import get_non_linearized_moes
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

__all__ = ["load_skeleton"]


def load_skeleton(name: str) -> PreTrainedModel:
    """
    The model on the meta device, experts as linears, from its config.json alone.

    :param name: folder or hub id
    :raises ValueError: if there is none, it is no causal language model, or it is
        already quantised
    """
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise ValueError(f"There is no model folder {name}. Check the path.")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        config = AutoConfig.from_pretrained(str(Path(name).expanduser()))
    except Exception as error:  # hub, network, JSON: one place, many kinds
        detail = " ".join(str(error).split())[:200].rstrip(".")
        raise ValueError(
            f"The config.json of {name} cannot be read: {detail}. Give a model folder, "
            "or a hub id that can be reached."
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    quantised = getattr(config, "quantization_config", None)
    if quantised:
        method = dict(quantised).get("quant_method", "an unknown method")
        raise ValueError(
            f"{name} is already quantised ({method}). Give the full-precision model it "
            "was made from."
        )
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # a config may name anything
        raise ValueError(
            f"No causal language model can be made of {name}'s config.json, whose "
            f"model_type is {config.model_type!r}. Give a model that "
            "AutoModelForCausalLM loads."
        ) from error
    for path, experts in get_non_linearized_moes(model):
        kind = LinearExperts2D.get_linear_experts_cls(experts.__class__)
        with torch.device("meta"):
            model.set_submodule(path, kind(getattr(experts, "config", config)))
    return model
