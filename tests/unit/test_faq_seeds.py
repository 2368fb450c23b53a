"""Seeds from files and rows, and the prompts made of them."""

import json

import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from llmc_faq_slider.faq.prompts import Wrapping, to_messages
from llmc_faq_slider.faq.seeds import (
    Seed,
    load_seeds,
    seeds_from_rows,
    seeds_hash,
    shipped_seeds,
)

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def tokenizer(small_model):
    return AutoTokenizer.from_pretrained(small_model)


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
        ("a.json", '{"prompt": "x"}', "not a list"),
        ("a.jsonl", '{"body": "x"}', r"columns \['body'\]; expected one of messages"),
        ("a.txt", "\n\n", "holds no text"),
    ],
)
def test_unusable_files_are_named(tmp_path, name, content, message) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_seeds(str(tmp_path / name))


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


def test_messages_end_with_the_first_user_turn(tokenizer) -> None:
    chat = (("system", "be brief"), ("user", "q"), ("assistant", "a"), ("user", "r"))
    made = to_messages(Seed("messages", messages=chat), Wrapping(64, False), tokenizer)
    assert made == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "q"},
    ]


def test_reasoning_is_asked_for_in_words_only_if_wanted(tokenizer) -> None:
    seed = Seed("prompt", text="q")
    plain = to_messages(seed, Wrapping(64, False), tokenizer)[0]["content"]
    asked = to_messages(seed, Wrapping(64, True), tokenizer)[0]["content"]
    assert plain == "q" and asked.startswith("q") and "step by step" in asked


def test_a_passage_is_cut_to_its_tokens(tokenizer) -> None:
    text = "word " * 500
    made = to_messages(Seed("text", text=text), Wrapping(16, True), tokenizer)
    assert 10 < made[0]["content"].count("word") <= 16
