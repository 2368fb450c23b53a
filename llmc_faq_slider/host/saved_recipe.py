"""Makes the recipe.yaml that llm-compressor saves one that it can load again.

Upstream writes it with ``yaml.dump`` from the modifiers' fields and reads it with
``yaml.safe_load``, which refuses the tuples and enums that some built-in stages put
into their fields while they run (SmoothQuant's inferred mappings, GPTQ's actorder).

Private upstream API: ``active_session().lifecycle.recipe.modifiers``.
"""

from enum import Enum
from typing import Any

from llmcompressor.core import active_session
from pydantic import BaseModel

__all__ = ["make_recipe_loadable"]


def make_recipe_loadable() -> None:
    """Turn tuples into lists and enums into their values in all stages' fields."""
    recipe = active_session().lifecycle.recipe
    for modifier in recipe.modifiers if recipe is not None else []:
        _plain(modifier)


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        for field in type(value).model_fields:
            # Fields with a trailing underscore are state, which is not saved.
            if not field.endswith("_"):
                before = getattr(value, field)
                after = _plain(before)
                if after is not before:
                    setattr(value, field, after)
        return value
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, list | tuple | set):
        plain = [_plain(item) for item in value]
        unchanged = isinstance(value, list) and all(
            a is b for a, b in zip(plain, value, strict=True)
        )
        return value if unchanged else plain
    if isinstance(value, dict):
        plain_dict = {key: _plain(item) for key, item in value.items()}
        same = all(plain_dict[key] is item for key, item in value.items())
        return value if same else plain_dict
    return value
