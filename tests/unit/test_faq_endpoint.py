"""Generators behind a server, against one that misbehaves as the test says."""

import json
from dataclasses import replace
from functools import partial

import pytest
from scripted_server import failure, reply, scripted_server, written
from transformers import AutoTokenizer

from llmc_faq_slider.faq.competition import RegenerationError
from llmc_faq_slider.faq.endpoint import (
    Address,
    EndpointError,
    check_privacy,
)
from llmc_faq_slider.faq.endpoint_generator import endpoint_source
from llmc_faq_slider.faq.generators import Request, resolve_sampling
from llmc_faq_slider.faq.identity import FamilyError
from llmc_faq_slider.faq.regenerate import regenerate
from llmc_faq_slider.faq.rendering import end_of_turn_id
from llmc_faq_slider.faq.seeds import Seed
from llmc_faq_slider.faq.settings import GateLimits, Sampling, Settings
from llmc_faq_slider.faq.store import Store

pytestmark = pytest.mark.unit

SAMPLING = Sampling(0.7, 0.9, 20, 40)
KEY = "sk-very-secret"
LOG = "candidates/*/candidates.jsonl"


@pytest.fixture
def server(tokenizer):
    with scripted_server(tokenizer, end_of_turn_id(tokenizer)) as running:
        yield running


@pytest.fixture
def source(server, tokenizer, tmp_path):
    def make(**changes):
        address = Address.parse(server.url, attempts=4, timeout=20, longest_wait=0.02)
        options = {"folder": tmp_path / "servers", **changes}
        return endpoint_source(address, tokenizer, **options)

    return make


def ask(source, count=1, sampling=SAMPLING, **changes):
    """Answers to ``count`` requests with the seeds 0, 1, ..."""
    draws = {}
    message = {"role": "user", "content": "hi"}
    requests = [Request([5, 6, 7], seed, [message], **changes) for seed in range(count)]
    with source.open() as generator:
        generator.answer(requests, sampling, lambda share: None, draws.__setitem__)
    return [draws[i] for i in range(count)]


def with_first(server, *reactions):
    """The server reacts to its first generation requests as given, then as usual."""
    left = list(reactions)

    def react(path, body):
        return left.pop(0) if "seed" in body and left else server.usual(path, body)

    server.react = react


def test_token_ids_and_log_probabilities_are_taken_as_they_are(server, source) -> None:
    draws = ask(source(), 5)
    for seed, draw in enumerate(draws):
        ids, logprobs = written({"seed": seed}, server.end_id)
        assert (draw.ids, draw.logprobs) == (ids, pytest.approx(logprobs))
        assert draw.finished and draw.exact and draw.failure is None
    body = server.generations[0]
    assert body["prompt"] == [5, 6, 7] and body["return_token_ids"] is True
    assert (body["temperature"], body["top_p"], body["top_k"]) == (0.7, 0.9, 20)
    assert body["max_tokens"] == 40 and body["model"] == "served"


def test_what_is_not_set_is_left_to_the_server(server, source) -> None:
    sampling = resolve_sampling(source(), 40, top_p=0.5)
    assert sampling == Sampling(None, 0.5, None, 40)
    ask(source(), sampling=sampling)
    assert server.generations[0]["top_p"] == 0.5
    assert not {"temperature", "top_k"} & server.generations[0].keys()


def test_the_generators_own_sampling_is_read_beside_its_tokenizer(
    source, small_model, tmp_path
) -> None:
    folder = tmp_path / "large"
    AutoTokenizer.from_pretrained(small_model).save_pretrained(folder)
    own = {"temperature": 0.3, "top_p": 0.6, "top_k": 11, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(own))
    sampling = resolve_sampling(source(tokenizer=str(folder)), 40, top_k=5)
    assert sampling == Sampling(0.3, 0.6, 5, 40)


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 504])
def test_busy_and_failing_servers_are_asked_again(server, source, status) -> None:
    with_first(server, failure(status), failure(status, retry_after="0.01"))
    (draw,) = ask(source())
    assert draw.ids == written({"seed": 0}, server.end_id)[0]
    assert len(server.generations) == 3


def test_a_dropped_connection_is_tried_again(server, source) -> None:
    with_first(server, None, None)
    (draw,) = ask(source())
    assert draw.finished and len(server.generations) == 3


def test_tries_are_counted(server, source) -> None:
    with_first(server, *[failure(503, "overloaded")] * 9)
    with pytest.raises(EndpointError, match="status 503.*overloaded"):
        ask(source())
    assert len(server.generations) == 4


def changed(**changes):
    choice = {"text": "fine", "finish_reason": "stop", "token_ids": [400, 401]}
    return reply({"choices": [choice | changes]})


INVALID = {
    "truncated json": (200, {}, b'{"choices": [{"text": "fi'),
    "no json": (200, {}, b"<html>welcome</html>"),
    "not utf-8": (200, {}, b'{"choices": [{"text": "\xff"}]}'),
    "a list": (200, {}, b"[]"),
    "nested": (200, {}, b"[" * 100_000),
    "no choices": reply({"choices": []}),
    "choices of a wrong type": reply({"choices": {"text": "x"}}),
    "text is a number": changed(text=7),
    "ids are strings": changed(token_ids=["400"]),
    "ids are floats": changed(token_ids=[400.5]),
    "an id below zero": changed(token_ids=[-1]),
    "an id beyond the vocabulary": changed(token_ids=[10**6]),
    "more ids than asked for": changed(token_ids=[400] * 41),
    "a log-probability above zero": changed(logprobs={"token_logprobs": [1.5, 0]}),
    "log-probabilities are text": changed(logprobs={"token_logprobs": ["-1"]}),
    "not a number": (
        200,
        {},
        b'{"choices": [{"text": "a", "logprobs": {"token_logprobs": [NaN]}}]}',
    ),
    "a lone surrogate": changed(text="broken \ud800"),
    "a megabyte of text": changed(text="word " * 200_000, token_ids=None),
    "a megabyte of a finish reason": changed(finish_reason="x" * 1_000_000),
    "filtered": changed(finish_reason="content_filter"),
    "no finish reason": changed(finish_reason=None),
}


@pytest.mark.parametrize("name", INVALID)
def test_invalid_replies_are_one_failed_answer_never_asked_again(
    server, source, name
) -> None:
    with_first(server, INVALID[name])
    draws = ask(source(concurrency=1), 3)
    assert [draw.failure is None for draw in draws] == [False, True, True]
    assert draws[0].failure in ("invalid_reply", "finish_reason")
    assert draws[0].ids == [] and len(server.generations) == 3


def test_a_refused_request_is_one_failed_answer(server, source) -> None:
    with_first(server, failure(400, "prompt too long"))
    draws = ask(source(concurrency=1), 3)
    assert [draw.failure for draw in draws] == ["refused", None, None]
    assert len(server.generations) == 3


def test_a_server_that_fails_most_requests_is_given_up(server, source) -> None:
    with_first(server, *[failure(422, "no such field")] * 50)
    with pytest.raises(EndpointError, match="8 of 8 requests .*no such field"):
        ask(source(concurrency=1), 50)
    assert len(server.generations) < 12


@pytest.mark.parametrize("status", [401, 403])
def test_a_wrong_key_ends_the_run_and_is_not_quoted(
    server, source, status, monkeypatch
) -> None:
    monkeypatch.setenv("LLMC_FAQ_SLIDER_API_KEY", KEY)
    with_first(server, failure(status, f"incorrect key {KEY}"))
    with pytest.raises(
        EndpointError, match="LLMC_FAQ_SLIDER_API_KEY was sent"
    ) as error:
        ask(source())
    assert KEY not in str(error.value)
    assert len(server.generations) == 1


def test_the_key_is_sent_and_never_written(
    server, source, tokenizer, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    address = Address.parse(server.url, key_variable="MY_KEY", longest_wait=0.02)
    made = endpoint_source(address, tokenizer, tmp_path / "servers")
    run(tokenizer, made, tmp_path)
    assert {h["authorization"] for _, h, _ in server.requests} == {f"Bearer {KEY}"}
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes()


def test_no_more_requests_run_at_once_than_allowed(server, source) -> None:
    server.wait = 0.03
    ask(source(concurrency=3), 12)
    assert server.most_active == 3


def test_answers_that_came_are_handed_on_when_another_fails(server, source) -> None:
    draws = {}
    with_first(server, failure(401))
    requests = [Request([5], seed, None) for seed in range(4)]
    with source(concurrency=4).open() as generator:
        with pytest.raises(EndpointError):
            generator.answer(requests, SAMPLING, lambda s: None, draws.__setitem__)
    assert len(draws) == len(server.generations) - 1


def test_prompts_and_answers_stay_inside_the_context(server, source) -> None:
    ask(source(), sampling=Sampling(None, None, None, 5000))
    assert server.generations[0]["max_tokens"] == 997


def without_token_ids(server, path, body):
    status, headers, content = server.usual(path, body)
    if status != 200 or "choices" not in (answer := json.loads(content)):
        return status, headers, content
    answer["choices"][0]["token_ids"] = None
    return reply(answer)


def test_text_is_tokenised_where_ids_are_not_told(server, source, tokenizer) -> None:
    server.react = partial(without_token_ids, server)
    (draw,) = ask(source())
    text = tokenizer.decode(written({"seed": 0}, server.end_id)[0][:-1])
    assert draw.ids == tokenizer(text)["input_ids"]
    assert draw.finished and not draw.exact


def chat_only(server, message, path, body):
    if path == "/v1/completions":
        return failure(404)
    if path != "/v1/chat/completions":
        return server.usual(path, body)
    choice = {"message": message, "finish_reason": "length"}
    return reply({"choices": [choice]})


@pytest.mark.parametrize(
    ("message", "inside", "text"),
    [
        ({"content": "plain"}, False, "plain"),
        (
            {"content": "so", "reasoning": "hm"},
            False,
            "<think>\nhm\n</think>\n\nso",
        ),
        ({"content": None, "reasoning_content": "cut"}, False, "<think>\ncut"),
        ({"content": "so", "reasoning": "hm"}, True, "hm\n</think>\n\nso"),
    ],
)
def test_chat_servers_with_and_without_reasoning_parser(
    server, source, tokenizer, message, inside, text
) -> None:
    server.react = partial(chat_only, server, message)
    (draw,) = ask(source(), enable_thinking=True, inside_thinking=inside)
    assert tokenizer.decode(draw.ids) == text and not draw.finished
    body = server.generations[0]
    assert body["messages"] == [{"role": "user", "content": "hi"}]
    assert body["chat_template_kwargs"] == {"enable_thinking": True}


def test_extras_are_left_out_where_they_are_refused(server, source) -> None:
    def plain(path, body):
        if path == "/v1/chat/completions" and not {"top_k", "logprobs"} & body.keys():
            return chat_only(server, {"content": "plain"}, path, body)
        return failure(400, "unknown field")

    server.react = plain
    (draw,) = ask(source(allow_retokenize=True))
    assert draw.failure is None and draw.score is None
    assert not {"top_k", "return_token_ids", "prompt"} & server.generations[0].keys()


def test_log_probabilities_changed_by_sampling_are_not_trusted(server, source) -> None:
    def scaled(path, body):
        if "prompt_logprobs" in body:
            told = [{str(i): {"logprob": -0.9}} for i in body["prompt"]]
            choice = {"text": "", "prompt_logprobs": [None, *told[1:]]}
            return reply({"choices": [choice]})
        return server.usual(path, body)

    server.react = scaled
    (draw,) = ask(source())
    assert draw.score is None and "logprobs" not in server.generations[0]


def test_another_tokenizer_is_refused_unless_allowed(server, source) -> None:
    def other(path, body):
        tokens = {"tokens": [1, 2, 3]}
        return reply(tokens) if path == "/tokenize" else server.usual(path, body)

    server.react = other
    with pytest.raises(FamilyError, match="encodes the probe texts differently"):
        source()
    assert not source(allow_retokenize=True).shares_tokens


def test_a_tokenizer_that_cannot_be_compared_has_to_be_named(
    server, source, small_model
) -> None:
    server.react = lambda path, body: failure(404)
    with pytest.raises(FamilyError, match="cannot be compared.*generator_tokenizer"):
        source()
    assert source(tokenizer=str(small_model)).shares_tokens


def test_a_model_that_is_not_served_is_named(server, source) -> None:
    with pytest.raises(EndpointError, match="serves 'served', not 'other'"):
        source(model="other")


def test_no_server_is_an_error_that_says_so(tokenizer, tmp_path) -> None:
    address = Address.parse("http://127.0.0.1:9", attempts=2, longest_wait=0.01)
    with pytest.raises(EndpointError, match="127.0.0.1:9/v1/models: ConnectError"):
        endpoint_source(address, tokenizer, tmp_path)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://host/v1", "no http or https URL"),
        ("http:///v1", "no http or https URL"),
        ("https://user:pw@host/v1", "holds a user name"),
        ("https://host/v1?key=abc", "holds a user name"),
    ],
)
def test_addresses_are_checked_and_secrets_not_quoted(url, message) -> None:
    with pytest.raises(ValueError, match=message) as error:
        Address.parse(url)
    assert "pw" not in str(error.value) and "abc" not in str(error.value)


@pytest.mark.parametrize(
    ("url", "loopback"),
    [
        ("http://127.0.0.1:8000", True),
        ("http://127.8.9.1/v1", True),
        ("http://[::1]:8000/v1", True),
        ("http://localhost:8000/v1", True),
        ("http://localhost.example.org/v1", False),
        ("http://192.168.0.7/v1", False),
        ("https://api.example.org/v1", False),
        ("http://0.0.0.0:8000/v1", False),
    ],
)
def test_private_seeds_leave_the_machine_only_if_allowed(url, loopback) -> None:
    address = Address.parse(url)
    assert address.is_loopback is loopback and address.url.endswith("/v1")
    check_privacy(address, private=False, allow_remote=False)
    check_privacy(address, private=True, allow_remote=True)
    if loopback:
        check_privacy(address, private=True, allow_remote=False)
    else:
        with pytest.raises(ValueError, match="allow_remote: true"):
            check_privacy(address, private=True, allow_remote=False)


SEEDS = [Seed("prompt", text=f"question {i}") for i in range(10)]
SETTINGS = Settings(
    num_candidates=2,
    num_samples=4,
    sequence_length=64,
    sampling=SAMPLING,
    batch_size=4,
    gates=GateLimits(min_response_tokens=4),
)


def run(tokenizer, source, folder, settings=SETTINGS, seeds=SEEDS):
    return regenerate(seeds, tokenizer, source, settings, Store(folder))


def test_a_known_server_is_asked_nothing_when_all_is_stored(
    server, source, tokenizer, tmp_path
) -> None:
    first = run(tokenizer, source(model="served"), tmp_path)
    asked = len(server.requests)
    by_chance = replace(SETTINGS, selector="random")
    run(tokenizer, source(model="served"), tmp_path, by_chance)
    assert len(server.requests) == asked
    assert first.manifest["gates"]["invalid_reply"] == 0


def test_a_run_that_broke_off_asks_only_for_the_rest(
    server, source, tokenizer, tmp_path
) -> None:
    whole = run(tokenizer, source(), tmp_path / "whole")
    asked = len(server.generations)
    assert asked == len({body["seed"] for body in server.generations})

    broken = []

    def breaks(path, body):
        if len(server.generations) <= 5:
            return server.usual(path, body)
        broken.append(body)
        return failure(401)

    server.requests.clear()
    server.react = breaks
    with pytest.raises(EndpointError):
        run(tokenizer, source(concurrency=1), tmp_path / "cut")
    server.react = server.usual
    again = run(tokenizer, source(concurrency=5), tmp_path / "cut")
    answered = [b["seed"] for b in server.generations if b not in broken]
    answered += [b["seed"] for b in server.generations if b in broken][len(broken) :]
    assert len(answered) == len(set(answered)) == asked
    data = "datasets/*/*"
    files = [sorted((tmp_path / d).glob(data)) for d in ("whole", "cut")]
    assert again.manifest == whole.manifest
    assert [p.read_bytes() for p in files[0]] == [p.read_bytes() for p in files[1]]


def test_failures_are_stored_counted_and_not_asked_again(
    server, source, tokenizer, tmp_path
) -> None:
    with_first(server, *[INVALID["truncated json"]] * 2, changed(text="x" * 10))
    result = run(tokenizer, source(concurrency=1), tmp_path)
    assert result.manifest["gates"]["invalid_reply"] == 2
    assert result.manifest["gates"]["too_short"] == 1
    asked = len(server.generations)
    for path in tmp_path.glob("datasets/*/*"):
        path.unlink()
    again = run(tokenizer, source(), tmp_path)
    assert len(server.generations) == asked and again.manifest == result.manifest
    log = next(tmp_path.glob(LOG)).read_text().splitlines()
    assert sum(json.loads(line)["failure"] == "invalid_reply" for line in log) == 2


def test_unclosed_think_tags_are_refused_and_counted(
    server, source, tokenizer, tmp_path
) -> None:
    def thinking(path, body):
        status, headers, content = server.usual(path, body)
        answer = json.loads(content)
        if "seed" in body:
            choice = answer["choices"][0]
            opened = tokenizer("<think>never closed ")["input_ids"]
            choice["token_ids"] = opened[:8] + choice["token_ids"][8:]
            choice["logprobs"] = None
        return reply(answer)

    server.react = thinking
    with pytest.raises(RegenerationError, match="think_unbalanced"):
        run(tokenizer, source(), tmp_path)
