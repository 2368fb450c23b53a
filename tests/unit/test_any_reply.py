"""Whatever a server replies is a checked answer or one failed one."""

import json

import pytest
from generated import cases, damage
from hypothesis import strategies as st
from scripted_server import scripted_server

from llmc_faq_slider.faq.endpoint import Address, EndpointError, InvalidReply
from llmc_faq_slider.faq.endpoint_generator import endpoint_source
from llmc_faq_slider.faq.gates import failed_gate, think_balanced
from llmc_faq_slider.faq.generators import Request
from llmc_faq_slider.faq.rendering import control_ids, end_of_turn_id
from llmc_faq_slider.faq.replies import (
    ChatReply,
    Models,
    TextReply,
    Tokens,
    parse,
    prompt_logprobs,
)
from llmc_faq_slider.faq.settings import GateLimits, Sampling

pytestmark = pytest.mark.unit

KINDS = (TextReply, ChatReply, Models, Tokens)
SAMPLING = Sampling(0.7, 0.9, 20, 40)
MEGABYTE = 1_000_000

TEXT_REPLY = {
    "choices": [
        {
            "text": "<think>so</think> fine",
            "finish_reason": "stop",
            "token_ids": [400, 401],
            "logprobs": {"token_logprobs": [-0.5, -1.5]},
            "prompt_logprobs": [None, {"5": {"logprob": -1.0}}],
        }
    ],
    "usage": {"prompt_tokens": 3, "completion_tokens": 2},
}
CHAT_REPLY = {
    "choices": [
        {
            "message": {"content": "fine", "reasoning_content": "so"},
            "finish_reason": "length",
            "logprobs": {"content": [{"logprob": -0.25}]},
        }
    ]
}
ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(st.characters(exclude_categories=()), max_size=8)
    | st.sampled_from(
        ["stop", "length", "\ud800", "<think>", "</think>", "x" * MEGABYTE, -1, 1e309]
    ),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["choices", "text", "message", "data", "tokens", "id"])
            | st.text(max_size=4),
            inner,
            max_size=3,
        )
    ),
    max_leaves=5,
)


def places(value, path=()):
    yield path
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from places(inner, (*path, key))


@st.composite
def payloads(draw):
    """A proper reply with any value put anywhere, broken bytes, or anything."""
    whole = json.loads(json.dumps(draw(st.sampled_from([TEXT_REPLY, CHAT_REPLY]))))
    kind = draw(st.sampled_from(["put", "put", "damage", "cut", "value", "bytes"]))
    if kind == "bytes":
        return draw(st.binary(max_size=60))
    if kind == "value":
        return json.dumps(draw(ANY)).encode()
    if kind == "put":
        *path, last = draw(st.sampled_from(list(places(whole))[1:]))
        parent = whole
        for key in path:
            parent = parent[key]
        parent[last] = draw(ANY)
        return json.dumps(whole).encode()
    content = json.dumps(whole).encode()
    if kind == "cut":
        return content[: draw(st.integers(0, len(content) - 1))]
    return draw(damage(content))


@cases(500, content=payloads(), kind=st.sampled_from(KINDS))
def test_a_reply_is_what_the_protocol_says_or_invalid(content, kind) -> None:
    try:
        reply = parse(kind, content)
    except InvalidReply as error:
        assert 0 < len(str(error)) <= 320 and "\n" not in str(error)
        return
    dumped = reply.model_dump_json()
    assert kind.model_validate_json(dumped) == reply
    for choice in getattr(reply, "choices", []):
        choice.body.encode("utf-8")
        assert all(index >= 0 for index in choice.token_ids or [])
        assert all(value <= 1e-3 for value in choice.answer_logprobs)
        if isinstance(reply, TextReply):
            try:
                assert len(prompt_logprobs(choice, [4, 5])) == 1
            except InvalidReply:
                pass


@pytest.fixture(scope="module")
def running(tokenizer, tmp_path_factory):
    """A server, and what asks it."""
    with scripted_server(tokenizer, end_of_turn_id(tokenizer)) as server:
        address = Address.parse(server.url, attempts=1, timeout=20)
        folder = tmp_path_factory.mktemp("servers")
        source = endpoint_source(address, tokenizer, folder, concurrency=1)
        with source.open():
            pass  # the probe, so that what follows is generation only
        yield server, source


@cases(50, content=payloads())
def test_no_payload_stops_or_spoils_a_run(content, running, tokenizer) -> None:
    server, source = running
    usual = server.usual

    def react(path, body):
        spoilt = body.get("seed") == 1
        return (200, {}, content) if spoilt else usual(path, body)

    server.react = react
    draws = {}
    requests = [Request([5, 6], seed, None) for seed in range(3)]
    with source.open() as generator:
        generator.answer(requests, SAMPLING, lambda share: None, draws.__setitem__)
    assert draws[0].failure is None and draws[2].failure is None
    draw = draws[1]
    if draw.failure is not None:
        assert draw.ids == [] and draw.failure in ("invalid_reply", "finish_reason")
        return
    assert all(0 <= index < len(tokenizer) for index in draw.ids)
    assert len(draw.logprobs) in (0, len(draw.ids)) or not draw.exact
    text = tokenizer.decode(draw.ids)
    gate = failed_gate(
        draw.ids, text, not draw.finished, control_ids(tokenizer), GateLimits(1)
    )
    if gate is None:
        assert think_balanced(text, not draw.finished)
        assert not set(draw.ids) & control_ids(tokenizer)


@cases(200, parts=st.lists(st.sampled_from(["<think>", "</think>", "a", "\n"])))
def test_an_answer_with_an_unclosed_thought_is_no_finished_one(parts) -> None:
    text = "".join(parts)
    thought = [part for part in parts if "think" in part]
    proper = thought in ([], ["<think>", "</think>"])
    assert think_balanced(text) is proper
    assert think_balanced(text, truncated=True) is (proper or thought == ["<think>"])


@cases(25, content=payloads(), status=st.sampled_from([200, 200, 404, 418, 503]))
def test_a_lying_server_is_refused_in_a_sentence(
    content, status, tokenizer, lying, tmp_path
) -> None:
    lying.react = lambda path, body: (status, {}, content)
    address = Address.parse(lying.url, attempts=1, timeout=20)
    source = endpoint_source(
        address, tokenizer, tmp_path, model="served", allow_retokenize=True
    )
    try:
        with source.open():
            pass
    except EndpointError as error:
        assert 0 < len(str(error)) < 4000


@pytest.fixture(scope="module")
def lying(tokenizer):
    with scripted_server(tokenizer, end_of_turn_id(tokenizer)) as server:
        yield server
