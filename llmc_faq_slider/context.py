"""How many tokens a model reads at once."""

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["context_length"]

#: scaling of rotary embeddings whose factor is one on positions
_STRETCHED = ("yarn", "linear", "dynamic", "ntk", "longrope", "llama3", "su")


def context_length(config: Any) -> int | None:
    """
    Positions a model can attend to, as its config tells them.

    Scaled rotary embeddings reach ``factor`` times the length of the pretraining:
    model cards add YaRN to a config whose ``max_position_embeddings`` stays what it
    was, while others have it there already. The larger of both is taken.

    :param config: a transformers config; of a multimodal model, the text model counts
    :return: None if the config does not say
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    stated = getattr(text, "max_position_embeddings", None)
    if not isinstance(stated, int) or stated <= 0:
        return None
    return max([stated, *_stretched(text, stated)])


def _stretched(config: Any, stated: int) -> Iterator[int]:
    parameters = getattr(config, "rope_parameters", None) or getattr(
        config, "rope_scaling", None
    )
    if not isinstance(parameters, Mapping):
        return
    # one set of parameters, or one for each type of layer
    for rope in [parameters, *parameters.values()]:
        if not isinstance(rope, Mapping):
            continue
        kind = rope.get("rope_type", rope.get("type"))
        factor = rope.get("factor")
        if kind in _STRETCHED and isinstance(factor, int | float):
            yield int(factor * (rope.get("original_max_position_embeddings") or stated))
