"""Models of the data stage, from safetensors files only."""

from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel


def open_model(name: str) -> PreTrainedModel:
    """A causal language model in evaluation mode, in the dtype of its files.

    :param name: folder or hub id
    :raises ValueError: when its weights cannot be loaded
    """
    try:
        # files of other kinds can hold code that runs when they are read
        return AutoModelForCausalLM.from_pretrained(
            name, dtype="auto", use_safetensors=True
        ).eval()
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"The model {name!r} cannot be loaded: {reason.rstrip('.')}. Give a folder "
            "or hub id with whole .safetensors files."
        ) from error
