"""A generator behind an OpenAI-compatible server.

Prompts go out as token ids through ``/completions`` where the server takes them, so
that both sides see the same ids; else as messages through ``/chat/completions``.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loguru import logger
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from llmc_faq_slider.faq.endpoint import (
    Address,
    Endpoint,
    EndpointError,
    InvalidReply,
    RequestRefused,
)
from llmc_faq_slider.faq.generators import (
    Generator,
    GeneratorSource,
    Request,
    end_ids,
    generation_config,
    share_tokens,
)
from llmc_faq_slider.faq.identity import FamilyError
from llmc_faq_slider.faq.rendering import THINK_OPEN, encode
from llmc_faq_slider.faq.replies import (
    ChatChoice,
    ChatReply,
    TextChoice,
    TextReply,
    parse,
)
from llmc_faq_slider.faq.sampling import Draw
from llmc_faq_slider.faq.serving import Api, Served, contact, probe, recall, remember
from llmc_faq_slider.faq.settings import Sampling

#: failed requests from which on a server that fails most of them is given up
_ENOUGH_FAILURES = 8
#: longest answer text per token asked for, in characters
_CHARACTERS_PER_TOKEN = 256

Choice = TextChoice | ChatChoice


class EndpointGenerator:
    """Asks a server, several requests at a time.

    :param endpoint: the open connection
    :param served: what is known of the server
    :param tokenizer: the target's tokenizer
    :param stops: ids of the server that end an answer, besides those it knows
    :param shares_tokens: the server's token ids mean the same to the target
    :param concurrency: requests under way at once
    """

    def __init__(
        self,
        endpoint: Endpoint,
        served: Served,
        tokenizer: PreTrainedTokenizerBase,
        stops: frozenset[int],
        shares_tokens: bool,
        concurrency: int,
    ):
        self._endpoint = endpoint
        self._served = served
        self._tokenizer = tokenizer
        self._stops = stops
        self._shares_tokens = shares_tokens
        self._concurrency = concurrency
        self._asked = self._failed = 0
        self._counting = threading.Lock()

    def answer(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        on_step: Callable[[float], None],
        on_draw: Callable[[int, Draw], None],
    ) -> None:
        """See :class:`Generator`. Answers under way when one fails are still handed on.

        :raises EndpointError: when the server cannot be used, or fails most requests
        """
        with ThreadPoolExecutor(self._concurrency) as pool:
            futures = {
                pool.submit(self._draw, request, sampling): position
                for position, request in enumerate(requests)
            }
            try:
                for done, future in enumerate(as_completed(list(futures)), start=1):
                    on_draw(futures[future], future.result())
                    del futures[future]
                    on_step(done / len(requests))
            except Exception:
                self._endpoint.give_up()
                pool.shutdown(cancel_futures=True)
                for position, draw in _successes(futures):
                    on_draw(position, draw)
                raise
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self._endpoint.close()
                raise

    def _draw(self, request: Request, sampling: Sampling) -> Draw:
        try:
            choice = self._ask(request, sampling)
            draw = self._read(choice, request, sampling)
        except RequestRefused as error:
            draw = Draw([], False, [], failure="refused")
            self._count(error)
        except InvalidReply as error:
            draw = Draw([], False, [], failure="invalid_reply")
            self._count(error)
        else:
            self._count(None)
        return draw

    def _count(self, error: EndpointError | None) -> None:
        with self._counting:
            self._asked += 1
            self._failed += error is not None
            asked, failed = self._asked, self._failed
        if error is None:
            return
        if failed <= _ENOUGH_FAILURES:
            logger.warning(f"FAQ: no answer: {error}")
        if failed >= _ENOUGH_FAILURES and 2 * failed > asked:
            raise EndpointError(
                f"{failed} of {asked} requests to {self._endpoint.address.url} gave no "
                f"answer; the last one: {error}"
            ) from error

    def _ask(self, request: Request, sampling: Sampling) -> Choice:
        body: dict[str, Any] = {
            "model": self._served.model,
            "max_tokens": self._room(request, sampling),
            "seed": request.seed,
        }
        own = {"temperature": sampling.temperature, "top_p": sampling.top_p}
        if self._served.extras:
            own["top_k"] = sampling.top_k
            body |= {"return_token_ids": True, "stop_token_ids": sorted(self._stops)}
        body |= {name: value for name, value in own.items() if value is not None}
        if self._served.api == "completions":
            body |= {"prompt": list(request.ids)}
            if self._served.logprobs:
                body["logprobs"] = 0
            reply = self._endpoint.post("/completions", body)
            return parse(TextReply, reply).choices[0]
        if request.messages is None:
            raise EndpointError(
                "the target has no chat template, so texts are continued, which the "
                f"chat-only server {self._endpoint.address.url} cannot do"
            )
        body["messages"] = list(request.messages)
        if self._served.extras and request.enable_thinking is not None:
            switch = {"enable_thinking": request.enable_thinking}
            body["chat_template_kwargs"] = switch
        if self._served.logprobs:
            body["logprobs"] = True
        reply = self._endpoint.post("/chat/completions", body)
        return parse(ChatReply, reply).choices[0]

    def _room(self, request: Request, sampling: Sampling) -> int:
        if self._served.context is None:
            return sampling.max_new_tokens
        left = self._served.context - len(request.ids)
        return max(1, min(sampling.max_new_tokens, left))

    def _read(self, choice: Choice, request: Request, sampling: Sampling) -> Draw:
        finished = choice.finish_reason == "stop"
        if not finished and choice.finish_reason != "length":
            logger.debug(f"FAQ: finish reason {choice.finish_reason!r:.100}")
            return Draw([], False, [], failure="finish_reason")
        logprobs = choice.answer_logprobs if self._served.logprobs else []
        ids = choice.token_ids
        if ids is not None and self._shares_tokens:
            if len(ids) > sampling.max_new_tokens:
                raise InvalidReply(
                    f"reply: {len(ids)} tokens, {sampling.max_new_tokens} asked for"
                )
            if ids and max(ids) >= len(self._tokenizer):
                raise InvalidReply(
                    f"reply: token id {max(ids)} is not in the vocabulary"
                )
            return Draw(ids, finished, logprobs if len(logprobs) == len(ids) else [])
        text = choice.body
        if request.inside_thinking and text.startswith(THINK_OPEN):
            text = text.removeprefix(THINK_OPEN).lstrip("\n")
        if len(text) > _CHARACTERS_PER_TOKEN * sampling.max_new_tokens:
            raise InvalidReply(
                f"reply: {len(text)} characters, {sampling.max_new_tokens} tokens "
                "asked for"
            )
        return Draw(encode(self._tokenizer, text), finished, logprobs, exact=False)


def endpoint_source(
    address: Address,
    target: PreTrainedTokenizerBase,
    folder: Path,
    model: str | None = None,
    tokenizer: str | None = None,
    allow_retokenize: bool = False,
    api: Api = "auto",
    concurrency: int = 8,
) -> GeneratorSource:
    """A generator behind a server.

    With ``model`` given and the server known from before, nothing is sent until
    something has to be generated.

    :param folder: where to remember what the server is and can do
    :param model: name the server knows the model by; None for the only one it has
    :param tokenizer: folder or hub id of the generator's tokenizer; None to compare
        with the server's own by encoding texts there
    :param allow_retokenize: take a server with another or an unknown tokenizer
    :raises EndpointError: when the server cannot be reached or its model not told
    :raises FamilyError: when the tokenizers differ or cannot be compared
    """
    served = recall(folder, address, model, target) or contact(address, model, target)
    remember(folder, address, served, target)
    speaker, defaults = target, GenerationConfig()
    if tokenizer is not None:
        try:
            speaker = AutoTokenizer.from_pretrained(tokenizer)
        except (OSError, ValueError) as error:
            raise FamilyError(
                f"the generator's tokenizer {tokenizer!r} cannot be read: {error}"
            ) from error
        shares = share_tokens(target, speaker, tokenizer, allow_retokenize)
        defaults = generation_config(tokenizer)
    else:
        shares = _same_tokens(served, address, allow_retokenize)
    logger.info(
        f"FAQ: generator {served.model!r} at {address.url}; a server does not tell its "
        "size, so that it is larger than the target is not checked"
    )
    ids_known = shares or tokenizer is not None
    stops = end_ids(speaker, defaults) if ids_known else frozenset()

    @contextmanager
    def opened() -> Iterator[Generator]:
        endpoint = Endpoint(address, concurrency)
        try:
            known = served
            if known.probed != api:
                known = probe(endpoint, served, speaker, api, ids_known)
                remember(folder, address, known, target)
            yield EndpointGenerator(endpoint, known, target, stops, shares, concurrency)
        finally:
            endpoint.close()

    return GeneratorSource(
        identity={"kind": "endpoint", "model": served.model, "name": address.url},
        tokenizer=speaker,
        end_ids=end_ids(target, defaults if shares else GenerationConfig()),
        context_length=served.context,
        defaults=defaults,
        open=opened,
        independent=True,
        shares_tokens=shares,
    )


def _same_tokens(served: Served, address: Address, allow_retokenize: bool) -> bool:
    if served.same_tokenizer:
        return True
    problem = (
        f"the tokenizer of {served.model!r} at {address.url} cannot be compared"
        if served.same_tokenizer is None
        else f"the tokenizer of {served.model!r} at {address.url} encodes the probe "
        "texts differently"
    )
    if allow_retokenize:
        logger.warning(f"FAQ: {problem}; answers are tokenised again")
        return False
    raise FamilyError(
        f"{problem}. Choose a sibling with the target's tokenizer, name the folder or "
        "hub id of the generator's tokenizer in `generator_tokenizer`, or set "
        "`allow_retokenize: true`."
    )


def _successes(futures: dict[Future[Draw], int]) -> Iterator[tuple[int, Draw]]:
    for future, position in futures.items():
        if not future.cancelled() and future.exception() is None:
            yield position, future.result()
