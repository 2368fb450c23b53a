"""What an OpenAI-compatible server may reply, checked type by type."""

import json
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmc_faq_slider.faq.endpoint import InvalidReply
from llmc_faq_slider.faq.rendering import THINK_CLOSE, THINK_OPEN

LogProbability = Annotated[float, Field(le=1e-3, allow_inf_nan=False)]
TokenId = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(min_length=1, max_length=1000)]


class _Reply(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class ServedModel(_Reply):
    """One entry of ``/models``; ``root`` and the length are vLLM's."""

    id: Name
    root: Name | None = None
    max_model_len: int | None = Field(default=None, ge=1)


class Models(_Reply):
    data: list[ServedModel]


class Tokens(_Reply):
    """Reply of vLLM's ``/tokenize``."""

    tokens: list[TokenId]


class Usage(_Reply):
    prompt_tokens: int = Field(default=0, ge=0)
    completion_tokens: int = Field(default=0, ge=0)


class _PositionLogprob(_Reply):
    logprob: LogProbability


class _TextLogprobs(_Reply):
    token_logprobs: list[LogProbability | None] = Field(default_factory=list)


class _ChatLogprobs(_Reply):
    content: list[_PositionLogprob] | None = None


class _Choice(_Reply):
    finish_reason: str | None = None
    token_ids: list[TokenId] | None = None


class TextChoice(_Choice):
    """A choice of ``/completions``."""

    text: str
    logprobs: _TextLogprobs | None = None
    prompt_logprobs: list[dict[str, _PositionLogprob] | None] | None = None

    @property
    def body(self) -> str:
        return self.text

    @property
    def answer_logprobs(self) -> list[float]:
        values = self.logprobs.token_logprobs if self.logprobs else []
        return [value for value in values if value is not None]


class _Message(_Reply):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class ChatChoice(_Choice):
    """A choice of ``/chat/completions``."""

    message: _Message
    logprobs: _ChatLogprobs | None = None

    @property
    def body(self) -> str:
        """The answer with its reasoning back in front, if a parser took it out.

        A thought without any answer after it was cut off and stays open.
        """
        thought = self.message.reasoning or self.message.reasoning_content
        said = self.message.content or ""
        if not thought:
            return said
        close = f"\n{THINK_CLOSE}\n\n{said.lstrip()}" if said else ""
        return f"{THINK_OPEN}\n{thought.strip()}{close}"

    @property
    def answer_logprobs(self) -> list[float]:
        values = (self.logprobs.content if self.logprobs else None) or []
        return [value.logprob for value in values]


class TextReply(_Reply):
    choices: Annotated[list[TextChoice], Field(min_length=1)]
    usage: Usage | None = None


class ChatReply(_Reply):
    choices: Annotated[list[ChatChoice], Field(min_length=1)]
    usage: Usage | None = None


R = TypeVar("R", bound=_Reply)


def parse(kind: type[R], content: bytes) -> R:
    """Check a reply.

    :raises InvalidReply: for anything that is not JSON of that kind, or text with
        lone surrogates
    """
    try:
        reply = kind.model_validate(_json(content))
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidReply(f"reply: {where}: {first['msg']}"[:300]) from None
    except RecursionError:
        raise InvalidReply("reply: nested too deeply") from None
    return reply


def prompt_logprobs(choice: TextChoice, ids: Sequence[int]) -> list[float]:
    """Log-probability of every prompt id but the first.

    A position lists the id itself and perhaps likelier ones.

    :raises InvalidReply: when positions or ids are missing
    """
    positions = choice.prompt_logprobs
    if positions is None or len(positions) != len(ids):
        found = "none" if positions is None else len(positions)
        raise InvalidReply(f"reply: {found} prompt_logprobs for {len(ids)} ids")
    values = []
    for index, position in zip(ids[1:], positions[1:], strict=True):
        if position is None or str(index) not in position:
            raise InvalidReply(f"reply: prompt_logprobs lack the id {index}")
        values.append(position[str(index)].logprob)
    return values


def _json(content: bytes) -> Any:
    try:
        value = json.loads(content.decode("utf-8"))
        # lone surrogates pass as JSON and fail in every encoder
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, UnicodeError) as error:
        raise InvalidReply(f"reply: no JSON text: {str(error)[:200]}") from None
    return value
