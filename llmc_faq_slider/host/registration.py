"""Makes the stages known to llm-compressor's recipes.

llm-compressor 0.14 has no plugin discovery; ``ModifierFactory.register`` is its public
way in. The registered name must be the class name, because a saved recipe writes that.
"""

from llmcompressor.modifiers import Modifier, ModifierFactory

__all__ = ["register_stage"]


def register_stage(stage: type[Modifier]) -> None:
    """Let recipes name ``stage`` by its class name."""
    ModifierFactory.register(stage.__name__, stage)
