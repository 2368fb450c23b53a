"""Seeds from files and rows, and the prompts made of them."""

import json

import pytest
import torch
from datasets import Dataset
from loguru import logger
from torch.utils.data import DataLoader

from llmc_faq_slider.faq.prompts import Wrapping, to_messages, turns
from llmc_faq_slider.faq.seeds import (
    Seed,
    load_mixture,
    load_seeds,
    seeds_from_rows,
    seeds_hash,
    shipped_seeds,
)

pytestmark = pytest.mark.unit


def test_the_shipped_set_is_varied() -> None:
    seeds = shipped_seeds()
    assert len(seeds) >= 200
    assert len({seed.id for seed in seeds}) == len(seeds)
    assert any(ord(c) > 0x3000 for seed in seeds for c in seed.text)


def test_every_column_kind_is_read(tmp_path) -> None:
    path = tmp_path / "seeds.jsonl"
    chat = [
        {"from": "human", "value": "hi"},
        {"from": "gpt", "value": "hello"},
    ]
    records = [
        {"conversations": chat},
        {"instruction": "Add", "input": "1 2"},
        {"text": " a passage "},
        {"prompt": "Why?", "text": "unused"},
    ]
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n\n")
    assert load_seeds(str(path)) == [
        Seed("messages", messages=(("user", "hi"), ("assistant", "hello"))),
        Seed("prompt", text="Add\n\n1 2"),
        Seed("text", text="a passage"),
        Seed("prompt", text="Why?"),
    ]


def test_json_txt_and_parquet(tmp_path) -> None:
    (tmp_path / "a.json").write_text('[{"prompt": "x"}, {"prompt": "x"}]')
    assert load_seeds(str(tmp_path / "a.json")) == [Seed("prompt", text="x")]
    (tmp_path / "a.txt").write_text("one\nstill one\n\ntwo\n\n\n")
    assert [s.text for s in load_seeds(str(tmp_path / "a.txt"))] == [
        "one\nstill one",
        "two",
    ]
    Dataset.from_dict({"text": ["p", "q"]}).to_parquet(tmp_path / "a.parquet")
    assert load_seeds(str(tmp_path / "a.parquet")) == [
        Seed("text", text="p"),
        Seed("text", text="q"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "x", "use a .json, .jsonl, .txt or .parquet"),
        ("a.json", "3", "not a list"),
        ("a.jsonl", '{"body": "x"}', r"columns \['body'\]; expected one of messages"),
        ("a.txt", "\n\n", "holds no text"),
    ],
)
def test_unusable_files_are_named(tmp_path, name, content, message) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_seeds(str(tmp_path / name))


QUESTION, ANSWER = "What is rain?", "Water."


@pytest.mark.parametrize(
    ("asks", "answers"),
    [
        ("Human", "Assistant"),
        ("USER", "ASSISTANT"),
        ("prompter", "assistant"),
        ("human", "gpt-4"),
        ("User:", "Bot"),
        ("customer", "AI"),
    ],
)
def test_speakers_go_by_many_names(asks, answers, tmp_path) -> None:
    turns = [{"from": asks, "value": QUESTION}, {"from": answers, "value": ANSWER}]
    path = tmp_path / "seeds.jsonl"
    path.write_text(json.dumps({"conversations": turns}))
    chat = (("user", QUESTION), ("assistant", ANSWER))
    assert load_seeds(str(path)) == [Seed("messages", messages=chat)]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": {"role": ["user", "assistant"], "content": [QUESTION, ANSWER]}},
        {"conversations": {"from": ["human", "gpt"], "value": [QUESTION, ANSWER]}},
        {
            "messages": json.dumps(
                [
                    {"role": "user", "content": QUESTION},
                    {"role": "assistant", "content": ANSWER},
                ]
            )
        },
        {
            "text": [
                {"role": "user", "content": [QUESTION]},
                {"role": "assistant", "content": {"parts": [ANSWER]}},
            ]
        },
        {"Dialog": [QUESTION, ANSWER]},
        {
            "chat": [
                {"speaker": "User", "text": QUESTION},
                {"role": "ai", "text": ANSWER},
            ]
        },
        {
            "turns": [
                {"author": {"role": "user"}, "content": QUESTION},
                {"role": "model", "content": ANSWER},
            ]
        },
    ],
)
def test_chats_come_in_many_forms(record, tmp_path) -> None:
    path = tmp_path / "seeds.jsonl"
    path.write_text(json.dumps(record))
    chat = (("user", QUESTION), ("assistant", ANSWER))
    assert load_seeds(str(path)) == [Seed("messages", messages=chat)]


def test_records_left_out_are_counted_and_named(tmp_path) -> None:
    path = tmp_path / "seeds.jsonl"
    stranger = {"messages": [{"role": "narrator", "content": "It rained."}]}
    silent = {"messages": [{"role": "assistant", "content": "Hello."}]}
    records = [{"prompt": QUESTION}, stranger, silent]
    path.write_text("\n".join(json.dumps(record) for record in records))
    said: list[str] = []
    handle = logger.add(said.append, format="{message}")
    try:
        assert len(load_seeds(str(path))) == 1
    finally:
        logger.remove(handle)
    assert "2 of 3 records" in said[0] and str(path) in said[0]
    assert "record 2" in said[0] and "'narrator'" in said[0]
    path.write_text(json.dumps(stranger))
    with pytest.raises(ValueError, match="record 1: its chat has the speaker 'narr"):
        load_seeds(str(path))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"prompt": "Why?"}\r\n{"prompt": "How?"}\r\n'),
        ("a.json", '[{"prompt": "Why?"}, {"prompt": "How?"}]'),
        ("a.txt", "Why?\r\n\r\nHow?\r\n"),
    ],
)
def test_a_byte_order_mark_is_no_text(encoding, name, content, tmp_path) -> None:
    (tmp_path / name).write_bytes(content.encode(encoding))
    assert [seed.text for seed in load_seeds(str(tmp_path / name))] == ["Why?", "How?"]


@pytest.mark.parametrize(
    "content",
    [
        '{"prompt": "Why?"}\n{"prompt": "How?"}\n',
        '{"prompt": ["Why?", "How?"]}',
        '{"data": [{"prompt": "Why?"}, {"prompt": "How?"}]}',
    ],
)
def test_json_files_hold_records_in_many_forms(content, tmp_path) -> None:
    (tmp_path / "a.json").write_text(content)
    assert [s.text for s in load_seeds(str(tmp_path / "a.json"))] == ["Why?", "How?"]


def test_a_missing_file_is_no_hub_name(tmp_path) -> None:
    with pytest.raises(ValueError, match="no file at"):
        load_seeds(str(tmp_path / "gone.jsonl"))


def test_rows_become_text_seeds_in_any_order(tokenizer) -> None:
    texts = ["the first passage", "another one here", "and a third"]
    rows = [tokenizer(text)["input_ids"] for text in texts]
    stored = Dataset.from_dict({"input_ids": rows})
    seeds = seeds_from_rows(DataLoader(stored, batch_size=1), tokenizer)
    assert sorted(s.text for s in seeds) == sorted(texts)
    flipped = Dataset.from_dict({"input_ids": rows[::-1]})
    again = seeds_from_rows(DataLoader(flipped, batch_size=1), tokenizer)
    assert seeds_hash(again) == seeds_hash(seeds) and again == seeds


def test_rows_of_another_loader_are_unpadded(tokenizer) -> None:
    ids = tokenizer("a b c")["input_ids"]
    row = {
        "input_ids": torch.tensor([*ids, 7, 7]),
        "attention_mask": torch.tensor([1] * len(ids) + [0, 0]),
    }
    seeds = seeds_from_rows(DataLoader([row], batch_size=1), tokenizer)
    assert [s.text for s in seeds] == [tokenizer.decode(ids)]
    with pytest.raises(ValueError, match="carry no input_ids"):
        seeds_from_rows(DataLoader([{"x": torch.ones(1)}]), tokenizer)


def messages(seed, reasoning, tokenizer, tokens=64, answers=()):
    return to_messages(turns(seed, Wrapping(tokens, reasoning), tokenizer), answers)


def test_chats_are_put_turn_by_turn(tokenizer) -> None:
    chat = (("user", "q"), ("assistant", "a"), ("user", "r"))
    seed = Seed("messages", messages=chat)
    first = [{"role": "user", "content": "q"}]
    assert messages(seed, False, tokenizer) == first
    assert messages(seed, False, tokenizer, answers=["new"]) == [
        *first,
        {"role": "assistant", "content": "new"},
        {"role": "user", "content": "r"},
    ]


def test_a_chat_ends_before_a_tool_comes_in(tokenizer) -> None:
    chat = (
        ("assistant", "welcome"),
        ("user", "q"),
        ("assistant", "a"),
        ("tool", "42"),
        ("user", "r"),
    )
    said = turns(Seed("messages", messages=chat), Wrapping(64, False), tokenizer)
    assert said == [[{"role": "user", "content": "q"}]]


def test_reasoning_is_asked_for_in_words_only_if_wanted(tokenizer) -> None:
    seed = Seed("prompt", text="q")
    plain = messages(seed, False, tokenizer)[0]["content"]
    asked = messages(seed, True, tokenizer)[0]["content"]
    assert plain == "q" and asked.startswith("q") and "step by step" in asked
    chat = (("user", "q"), ("assistant", "a"), ("user", "r"))
    said = turns(Seed("messages", messages=chat), Wrapping(64, True), tokenizer)
    assert "step by step" in said[0][0]["content"] and said[1][0]["content"] == "r"


def test_a_passage_is_cut_to_its_tokens(tokenizer) -> None:
    made = messages(Seed("text", text="word " * 500), True, tokenizer, tokens=16)
    assert 10 < made[0]["content"].count("word") <= 16


def test_sources_and_answers_are_read(tmp_path) -> None:
    path = tmp_path / "seeds.jsonl"
    records = [
        {"prompt": "Why?", "completion": "Because.", "source": "a"},
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "Hm?"}]}]},
        {"question": "broken \ud800 text", "topic": "b"},
    ]
    path.write_text("\n".join(json.dumps(record) for record in records))
    other = tmp_path / "other.txt"
    other.write_text("a passage")
    seeds = load_mixture([str(path), str(other)])
    assert seeds == [
        Seed("messages", messages=(("user", "Why?"), ("assistant", "Because."))),
        Seed("messages", messages=(("user", "Hm?"),)),
        Seed("prompt", text="broken \ufffd text"),
        Seed("text", text="a passage"),
    ]
    assert [seed.source for seed in seeds] == ["a", str(path), "b", str(other)]
    path.write_text('{"messages": [3]}')
    with pytest.raises(ValueError, match="record 1: .*turn that is of type int"):
        load_seeds(str(path))
