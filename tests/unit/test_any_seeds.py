"""Whatever a data set holds becomes seeds or one sentence."""

import json
import tempfile
from pathlib import Path

import pytest
from datasets import Dataset
from generated import cases, damage
from hypothesis import strategies as st

from llmc_faq_slider.faq.prompts import Wrapping, turns
from llmc_faq_slider.faq.seeds import load_seeds, seed_texts

pytestmark = pytest.mark.unit

COLUMNS = ["messages", "conversations", "prompt", "question", "instruction", "input"]
COLUMNS += ["completion", "answer", "output", "text", "source", "foo"]
text = st.text(st.characters(exclude_categories=()), max_size=12)
turn = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "system", "tool"]) | text,
        "from": st.sampled_from(["human", "gpt"]),
        "content": text | st.none() | st.lists(st.dictionaries(text, text), max_size=2),
        "value": text,
    },
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | text,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3)
    ),
    max_leaves=4,
)
records = st.dictionaries(
    st.sampled_from(COLUMNS), st.lists(turn, max_size=4) | anything, max_size=4
)
GOOD = "\n".join(
    json.dumps(record)
    for record in (
        {"prompt": "Why is the sky blue?", "source": "web"},
        {"messages": [{"role": "user", "content": "Hi"}]},
        {"text": "A passage of text."},
    )
).encode()


def check(path: Path, tokenizer) -> None:
    try:
        seeds = load_seeds(str(path))
    except ValueError as error:
        said = str(error)
        assert said.startswith("seeds: ") and path.name in said, said
        assert "\n" not in said and len(said) < 1000
        return
    assert seeds and len({seed.id for seed in seeds}) == len(seeds)
    for seed in seeds:
        for said in seed_texts(seed):
            said.encode("utf-8")
        for part in turns(seed, Wrapping(64, True), tokenizer):
            assert any(message["role"] == "user" for message in part)
        assert any(said.strip() for said in seed_texts(seed))


@cases(120, rows=st.lists(records | anything, max_size=4), suffix=st.booleans())
def test_any_json_is_seeds_or_a_sentence(rows, suffix, tokenizer, tmp_path) -> None:
    path = tmp_path / ("seeds.json" if suffix else "seeds.jsonl")
    lines = [json.dumps(row) for row in rows]
    path.write_text("[" + ",".join(lines) + "]" if suffix else "\n".join(lines))
    check(path, tokenizer)


@cases(
    200,
    content=damage(GOOD) | st.binary(max_size=40),
    suffix=st.sampled_from(["json", "jsonl", "txt"]),
)
def test_any_bytes_are_seeds_or_a_sentence(content, suffix, tokenizer, tmp_path):
    path = tmp_path / f"seeds.{suffix}"
    path.write_bytes(content)
    check(path, tokenizer)


@pytest.fixture(scope="module")
def parquet():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "seeds.parquet"
        Dataset.from_dict({"prompt": ["Why?", "How?"]}).to_parquet(path)
        yield path.read_bytes()


@cases(40, data=st.data())
def test_a_damaged_parquet_file_is_seeds_or_a_sentence(
    data, parquet, tokenizer, tmp_path_factory
) -> None:
    # a folder of its own, because datasets remembers files by name
    path = tmp_path_factory.mktemp("parquet") / "seeds.parquet"
    path.write_bytes(data.draw(damage(parquet)))
    check(path, tokenizer)


def test_a_missing_text_is_no_text(tmp_path) -> None:
    path = tmp_path / "seeds.jsonl"
    path.write_text('{"text": null}\n{"text": "Here."}\n')
    assert [seed.text for seed in load_seeds(str(path))] == ["Here."]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": \n', "line 2 of "),
        ("a.json", b"3", "not a list of records"),
        ("a.json", b"[", "is no JSON"),
        ("a.txt", b"\xff\xff", "not UTF-8"),
        ("a.jsonl", b"", "holds no text"),
        ("a.jsonl", b"3\n", "record 1: it is no object"),
        ("a.jsonl", b'{"foo": "x"}\n', "has the columns ['foo']; expected one of"),
        ("a.parquet", b"PAR1", "is no parquet file"),
        ("a.pkl", b"\x80\x04N.", "cannot read a.pkl"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(name, content, reason, tmp_path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match="^seeds: ") as caught:
        load_seeds(str(path))
    assert reason in str(caught.value) and name in str(caught.value)
