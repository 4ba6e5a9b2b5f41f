"""lmc.prompt: token ids and spans from texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lmc
from lmc.chunking import CHUNKERS
from lmc.chunking.pieces import Piece, split

TEXTS = ["You are helpful.\n", "Paris is", " the capital", " of France", "?"]


class Letters:
    """A tokenizer with nothing but encode."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [ord(c) for c in text]


@pytest.fixture(scope="module", params=["transformers", "tokenizers"])
def tokenizer(request: pytest.FixtureRequest, smollm2_dir: Path) -> Any:
    if request.param == "transformers":
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(smollm2_dir)
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(smollm2_dir / "tokenizer.json"))


def test_spans_partition_and_decode_to_their_texts(tokenizer: Any) -> None:
    made = lmc.prompt(TEXTS, tokenizer)
    assert [start for start, _ in made.spans] == [0] + [end for _, end in made.spans[:-1]]
    assert made.spans[-1][1] == len(made.token_ids)
    assert [tokenizer.decode(made.token_ids[a:b]) for a, b in made.spans] == TEXTS
    assert all(type(t) is int for t in made.token_ids)


def test_a_text_has_the_same_ids_wherever_it_stands(tokenizer: Any) -> None:
    # Joined before, "France" and "?" or "is" and " the" could merge with their neighbours.
    forth, back = lmc.prompt(TEXTS, tokenizer), lmc.prompt(TEXTS[::-1], tokenizer)
    ids = [forth.token_ids[a:b] for a, b in forth.spans]
    assert ids == [back.token_ids[a:b] for a, b in back.spans][::-1]


def test_merges_do_not_cross_a_border(tokenizer: Any) -> None:
    assert len(lmc.prompt(["hel", "lo"], tokenizer).token_ids) > len(
        lmc.prompt(["hello"], tokenizer).token_ids
    )


def test_token_ids_are_taken_as_they_are() -> None:
    made = lmc.prompt(["ab", [7, 8], np.array([9]), "c"], Letters())
    assert made == lmc.Prompt([97, 98, 7, 8, 9, 99], [(0, 2), (2, 4), (4, 5), (5, 6)])
    assert all(type(t) is int for t in made.token_ids)


def test_spans_are_what_split_takes() -> None:
    made = lmc.prompt(["abc", "de"], Letters())
    pieces = split(np.array(made.token_ids), CHUNKERS.build("explicit"), made.spans)
    assert pieces == [Piece(0, 3), Piece(3, 5)]


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([], "got none"),
        (["a", ""], "segment 1: got ''"),
        ([[], "a"], r"segment 0: got \[\]"),
        ("abc", "got one text"),
    ],
)
def test_what_has_no_tokens(segments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lmc.prompt(segments, Letters())


@pytest.mark.parametrize(
    "segment", [[-1], [1.7], [True], [[1, 2]], [[1], [2, 3]], b"text", None, 7, {"a": 1}, [2**70]],
    ids=repr,
)  # fmt: skip
def test_what_are_no_token_ids(segment: Any) -> None:
    with pytest.raises(ValueError, match=r"segment 1: got .*want a text, or one list of token ids"):
        lmc.prompt(["a", segment], Letters())


def test_ids_of_any_kind() -> None:
    class Encoding:
        ids = (1, 2)

    class Batch(dict):
        input_ids = (1, 2)

    many = [[1, 2], (1, 2), np.array([1, 2]), torch.tensor([1, 2]), Encoding(), Batch()]
    assert lmc.prompt(many, Letters()).token_ids[-12:] == [1, 2] * 6
