from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lmc.cli.app import app
from lmc.workloads import WORKLOADS
from lmc.workloads.passages import convert_musique
from lmc.workloads.sample import Sample

LINES = [
    {
        "passages": [f"Passage {i} of question {q} tells of a river." for i in range(4)],
        "question": f"Which river is meant in {q}?",
        "answer": "the Nile",
    }
    for q in range(3)
]


def build(tokenizer: Any, **fields: Any) -> list[Sample]:
    samples: list[Sample] = WORKLOADS.build(fields).samples(tokenizer)
    return samples


@pytest.fixture
def passages(tmp_path: Path) -> Path:
    path = tmp_path / "passages.jsonl.xz"
    with lzma.open(path, "wt") as f:
        f.writelines(json.dumps(line) + "\n\n" for line in LINES)
    return path


def test_passages_keep_the_order_of_the_file(tokenizer: Any, passages: Path) -> None:
    samples = build(tokenizer, name="passages", path=str(passages), chunks=3)
    assert len(samples) == 3
    for q, sample in enumerate(samples):
        texts = [tokenizer.decode(chunk) for chunk in sample.chunks]
        numbers = [int(text.split()[2]) for text in texts]
        assert numbers == sorted(set(numbers))
        assert all(f"of question {q} " in text for text in texts)
        assert f"Which river is meant in {q}?" in tokenizer.decode(sample.question)
        assert tokenizer.decode(sample.answer) == " the Nile"


def test_passages_are_cut(tokenizer: Any, passages: Path) -> None:
    (sample, *_) = build(
        tokenizer, name="passages", path=str(passages), chunks=2, tokens_per_passage=5
    )
    assert [len(chunk) for chunk in sample.chunks] == [5, 5]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "line 1: got no JSON"),
        ("[]", "line 1: got list, want an object"),
        ('{"question": "a", "answer": "b"}', "line 1: passages missing"),
        (json.dumps({**LINES[0], "answer": 5}), "line 1: answer: got '5', want a text"),
        (json.dumps({**LINES[0], "passages": ["a"]}), "line 1: got 1 passages, want 2"),
        ("", "got no lines, want at least one"),
    ],
)
def test_bad_passages_are_named(tokenizer: Any, tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        build(tokenizer, name="passages", path=str(path), chunks=2)


def test_passages_that_are_not_there(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing\.jsonl: cannot be read"):
        build(tokenizer, name="passages", path=str(tmp_path / "nothing.jsonl"))


def test_a_data_set_is_converted(tokenizer: Any, tmp_path: Path) -> None:
    contexts = [{"title": "Nile", "text": "A river."}, {"title": "", "text": "A town."}]
    entry = {"ctxs": contexts, "question": "Which?", "answers": ["the Nile", "Nile"]}
    source, target = tmp_path / "set.json", tmp_path / "set.jsonl.gz"
    source.write_text(json.dumps([entry, entry]))
    result = CliRunner().invoke(app, ["workload", "convert", str(source), str(target)])
    assert result.exit_code == 0, result.output
    assert "set.jsonl.gz: 2 questions" in result.output.replace("\n", "")
    (sample, _) = build(tokenizer, name="passages", path=str(target), chunks=2)
    assert tokenizer.decode(sample.chunks[0]) == "\n\nPassage: Nile\nA river."
    assert tokenizer.decode(sample.chunks[1]) == "\n\nPassage: A town."
    assert tokenizer.decode(sample.answer) == " the Nile"
    source.write_text(json.dumps([entry, {"ctxs": []}]))
    with pytest.raises(ValueError, match="entry 1: got ctxs; want ctxs and answers"):
        convert_musique(source, tmp_path / "other.jsonl")
    assert not (tmp_path / "other.jsonl").exists()
