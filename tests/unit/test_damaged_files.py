"""Damaged files of the data stage are refused or made anew, and never believed."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from generated import cases, damage
from hypothesis import strategies as st

from llmc_faq_slider.faq.endpoint import Address
from llmc_faq_slider.faq.export import export, load_export
from llmc_faq_slider.faq.records import BrokenSeal, seal, unseal
from llmc_faq_slider.faq.serving import Served, recall, remember
from llmc_faq_slider.faq.store import (
    DATA,
    MANIFEST,
    MESSAGES,
    Candidate,
    CandidateLog,
    ScoreLog,
    Store,
)

pytestmark = pytest.mark.unit

CANDIDATES = [
    Candidate("a" * 16, 0, [300, 4, 21], True, -0.125, True, None, 12),
    Candidate("b" * 16 + "#1/2", 1, [7] * 12, False, None, False, None, 3),
    Candidate("c" * 16, 11, [], False, None, True, "invalid_reply", 40),
]
SCORES = {"x:0": [-1.5, -0.25], "x:1": [], "y:10": [-3.0e-7]}
KNOWN = Served(model="served", context=4096, same_tokenizer=True, probed="auto")
ADDRESS = Address.parse("http://127.0.0.1:1/v1")


@dataclass
class Written:
    """Files as the package writes them."""

    folder: Path
    candidates: bytes
    scores: bytes
    served: bytes
    dataset: dict[str, bytes]
    input_ids: torch.Tensor


@pytest.fixture(scope="module")
def written(tmp_path_factory, tokenizer) -> Written:
    folder = tmp_path_factory.mktemp("written")
    log = CandidateLog(folder / "candidates.jsonl")
    for candidate in CANDIDATES:
        log.append(candidate)
    scores = ScoreLog(folder / "scores.jsonl")
    for of, values in SCORES.items():
        scores.append(of, values)
    remember(folder / "servers", ADDRESS, KNOWN, tokenizer)
    (served,) = (folder / "servers").iterdir()
    ids = torch.arange(24, dtype=torch.int32).reshape(3, 8)
    mask = torch.ones(3, 8, dtype=torch.uint8)
    messages = [{"id": "x", "text": "größer\n"}]
    manifest = {"answer_tokens": 24, "counts": {"selected": 1}, "tokens": 24}
    made = Store(folder).write_dataset("key", ids, mask, messages, manifest)
    export(made, folder / "out")
    names = (DATA, MESSAGES, MANIFEST)
    return Written(
        folder,
        (folder / "candidates.jsonl").read_bytes(),
        (folder / "scores.jsonl").read_bytes(),
        served.read_bytes(),
        {name: (made.folder / name).read_bytes() for name in names},
        ids,
    )


def test_undamaged_files_are_read(written, tokenizer) -> None:
    log = CandidateLog(written.folder / "candidates.jsonl")
    assert [log.get(c.prompt_id, c.index) for c in CANDIDATES] == CANDIDATES
    scores = ScoreLog(written.folder / "scores.jsonl")
    assert {of: scores.get(of) for of in SCORES} == SCORES
    found = Store(written.folder).read_dataset("key")
    assert found is not None and torch.equal(found.input_ids, written.input_ids)
    assert recall(written.folder / "servers", ADDRESS, "served", tokenizer) == KNOWN
    assert load_export(written.folder / "out")["input_ids"][:] == (
        written.input_ids.tolist()
    )


def known_of(log, path: Path, content: bytes) -> dict:
    """What a log believes of a damaged file; nothing if it refuses it by its line."""
    path.write_bytes(content)
    try:
        return log(path)._known
    except ValueError as error:
        assert "line" in str(error) and "remove the file" in str(error)
        return {}


@cases(400, data=st.data())
def test_a_damaged_candidate_is_never_taken(data, written, tmp_path) -> None:
    spoilt = data.draw(damage(written.candidates))
    known = known_of(CandidateLog, tmp_path / "candidates.jsonl", spoilt)
    assert all(candidate in CANDIDATES for candidate in known.values())


@cases(300, data=st.data())
def test_a_damaged_score_is_never_taken(data, written, tmp_path) -> None:
    spoilt = data.draw(damage(written.scores))
    known = known_of(ScoreLog, tmp_path / "scores.jsonl", spoilt)
    assert all(SCORES.get(of) == values for of, values in known.items())


@cases(300, name=st.sampled_from([DATA, MESSAGES, MANIFEST]), data=st.data())
def test_a_damaged_data_set_is_never_taken(name, data, written, tmp_path) -> None:
    spoilt = data.draw(damage(written.dataset[name]))
    store = Store(tmp_path)
    folder = store.dataset_folder("key")
    folder.mkdir(parents=True, exist_ok=True)
    for part, content in (written.dataset | {name: spoilt}).items():
        (folder / part).write_bytes(content)
    found = store.read_dataset("key")
    # white space in the manifest may change
    if found is not None:
        original = Store(written.folder).read_dataset("key")
        assert original is not None and found.manifest == original.manifest
        assert torch.equal(found.input_ids, original.input_ids)
        assert torch.equal(found.loss_mask, original.loss_mask)
    try:
        rows = load_export(folder)
    except ValueError as error:
        assert "Write it again" in str(error) and found is None
    else:
        assert found is not None
        assert rows["input_ids"][:] == written.input_ids.tolist()


@cases(200, data=st.data())
def test_what_is_known_of_a_server_is_never_taken_damaged(
    data, written, tokenizer, tmp_path
) -> None:
    (path,) = (written.folder / "servers").iterdir()
    (tmp_path / path.name).write_bytes(data.draw(damage(written.served)))
    found = recall(tmp_path, ADDRESS, "served", tokenizer)
    assert found is None or found == KNOWN


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@cases(200, record=st.dictionaries(st.text(), json_values), other=json_values)
def test_a_seal_fits_one_record_only(record, other) -> None:
    record.pop("checksum", None)
    sealed = seal(record)
    assert unseal(sealed) == record
    with pytest.raises(BrokenSeal):
        unseal({**sealed, "one more": other})
    for key in record:
        with pytest.raises(BrokenSeal):
            unseal({k: v for k, v in sealed.items() if k != key})


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{}", "prompt_id: Field required"),
        (b"[]", "it is a list"),
        (b'{"prompt_id": 3, "index": 0, "ids": [], "finished": 1}', "prompt_id"),
        (b"\xff", "codec can't decode"),
        (b'{"checksum": 1}', "does not match its checksum"),
    ],
)
def test_a_line_that_is_no_record_is_named(line, reason, tmp_path) -> None:
    path = tmp_path / "candidates.jsonl"
    path.write_bytes(line + b"\n")
    with pytest.raises(ValueError, match="line 1 of ") as caught:
        CandidateLog(path)
    assert reason in str(caught.value)


def test_records_of_earlier_versions_are_still_read(tmp_path) -> None:
    path = tmp_path / "candidates.jsonl"
    line = (
        '{"prompt_id": "a", "index": 1, "ids": [5], "finished": true, "score": -1.0, '
        '"exact": true, "failure": null, "prompt_tokens": 2}\n'
    )
    path.write_text(line)
    expected = Candidate("a", 1, [5], True, -1.0, True, None, 2)
    assert CandidateLog(path).get("a", 1) == expected
