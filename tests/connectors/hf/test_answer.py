"""The one call for a notebook: its example as it stands, what it reports, what it refuses."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lmc.connectors.hf import answer
from tests.connectors.hf.tiny import (
    CHUNKS,
    QUESTION,
    SYSTEM,
    TOKENS,
    T,
    blended,
    far,
    reference,
    stored,
    tiny,
)

SEGMENTS = [SYSTEM, *CHUNKS, QUESTION]


@pytest.mark.heavy
def test_the_example_runs(smollm2_dir: Path) -> None:
    text = inspect.getdoc(answer) or ""
    lines = [line[4:] for line in text.splitlines() if line.startswith("    ")]
    example = lines[: next(i for i, line in enumerate(lines) if line.startswith("result.text"))]
    assert len(example) == 6
    names: dict[str, Any] = {"folder": str(smollm2_dir)}
    exec("\n".join(example), names)
    result = names["result"]
    assert result.token_ids
    assert result.text == names["tokenizer"].decode(result.token_ids)
    report = result.report
    assert sum(report["kinds"].values()) == report["prompt_tokens"]
    assert 0 < report["compute_fraction"] < 1
    assert report["kl_last"] >= 0
    assert report["kl_mean"] >= 0
    given = [names[name] for name in ("model", "tokenizer", "segments")]
    again = names["lmc"].answer(*given, "full_recompute", max_new_tokens=8, compare=True)
    assert again.report["kl_last"] < 1e-6
    assert again.report["top1_agreement"] == 1


def test_it_serves_out_of_the_store_it_fills() -> None:
    for context in ("isolated", "anchored", "first_seen"):
        result = answer(tiny(), None, SEGMENTS, {"name": "epic", "link_tokens": 8}, context=context)
        same = blended(stored("Llama", context), {"name": "epic", "link_tokens": 8})
        assert far(result.logits, same.logits[0][0]) < 1e-5
        assert result.selection == same.selection
        assert result.report == {
            "prompt_tokens": T,
            "kinds": same.plan.kinds(),
            "compute_fraction": same.compute_fraction,
            "flops_fraction": same.flops_fraction,
            "strategy": {"name": "epic", "link_tokens": 8},
            "context": context,
            "position": "global",
        }
        assert (result.token_ids, result.text) == ([], "")


@pytest.mark.parametrize("strategy", ["full_recompute", "full_reuse", "ape", "query"])
def test_the_distance_is_that_to_the_models_own_logits(strategy: str) -> None:
    result = answer(tiny(), None, SEGMENTS, strategy, max_new_tokens=4, compare=True)
    own = tiny().model.generate(torch.tensor([TOKENS]), max_new_tokens=4, do_sample=False,
                                eos_token_id=None)[0].tolist()  # fmt: skip
    p = reference(tiny(), own)[T - 1 : -1].double().softmax(-1)
    q = result.blended.logits[0].double().softmax(-1)
    kl = (p * (p / q).log()).sum(-1)
    assert result.report["kl_last"] == pytest.approx(float(kl[0]), rel=1e-3, abs=1e-9)
    assert result.report["kl_mean"] == pytest.approx(float(kl.mean()), rel=1e-3, abs=1e-9)
    agreement = float((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert result.report["top1_agreement"] == agreement
    assert len(result.token_ids) == 4
    if strategy == "full_recompute":
        assert result.token_ids == own[T:]


def test_a_comparison_without_an_answer_is_of_the_last_token() -> None:
    report = answer(tiny(), None, SEGMENTS, compare=True).report
    assert report["kl_last"] > 0
    assert not {"kl_mean", "top1_agreement"} & report.keys()


def test_a_prompt_without_chunks_is_answered_too() -> None:
    result = answer(tiny(), None, [SYSTEM, QUESTION], compare=True)
    assert result.report["kinds"]["exact"] == len(SYSTEM)
    assert result.report["kl_last"] < 1e-9


def test_the_answer_ends_before_the_tokenizers_end_token() -> None:
    class Tokenizer:
        """Of a model whose vocabulary is random: ids are their own text."""

        def __init__(self, end: int) -> None:
            self.eos_token_id = end

        def decode(self, ids: list[int]) -> str:
            return " ".join(map(str, ids))

    whole = answer(tiny(), None, SEGMENTS, max_new_tokens=5).token_ids
    end = whole[3]
    cut = answer(tiny(), Tokenizer(end), SEGMENTS, max_new_tokens=5)
    assert cut.token_ids == whole[: whole.index(end)]
    assert cut.text == " ".join(map(str, cut.token_ids))


@pytest.mark.parametrize(
    ("segments", "options", "words"),
    [
        ([SYSTEM], {}, "want at least two: the system prompt, then the chunks"),
        ("a text", {}, "segments: got 'a text', want at least two"),
        ([SYSTEM, [], QUESTION], {}, "segment 1: got [], which has no tokens"),
        ([SYSTEM, "a text"], {}, "tokenizer: got None, which is allowed for segments of token"),
        ([SYSTEM, [512], QUESTION], {}, "512, allowed: 0 to 511"),
        ([SYSTEM, [-1], QUESTION], {}, "token ids: got -1"),
        (SEGMENTS, {"strategy": "epics"}, "unknown blend strategy: got 'epics'; valid: "),
        (SEGMENTS, {"strategy": {"name": "epic", "k": 3}}, "unknown field k; valid: link_tokens"),
        (SEGMENTS, {"context": "alone"}, "context: got 'alone', valid: isolated, anchored, first"),
        (SEGMENTS, {"position": "near"}, "position: got 'near', valid: global, local"),
        (SEGMENTS, {"max_new_tokens": -1}, "max_new_tokens: got -1, allowed: 0 or more"),
    ],
)
def test_wrong_arguments_are_named(segments: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words are the test
        answer(tiny(), None, segments, **options)
    assert words in str(error.value)


def test_a_strategy_of_ones_own_is_named_by_module_and_class() -> None:
    own = answer(tiny(), None, SEGMENTS, "lmc.blend.epic:Epic")
    assert np.array_equal(own.logits, answer(tiny(), None, SEGMENTS, "epic").logits)
