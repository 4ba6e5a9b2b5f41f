from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from lmc.cli.app import app
from lmc.experiment.solvable import solved
from lmc.workloads import WORKLOADS
from lmc.workloads.sample import Sample


@pytest.fixture(scope="module")
def model(smollm2_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(smollm2_dir).eval()


@pytest.fixture(scope="module")
def recall(smollm2_dir: Path) -> list[Sample]:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    samples: list[Sample] = WORKLOADS.build({"name": "recall", "prompts": 5}).samples(tokenizer)
    return samples


def test_what_the_model_can_do_is_usable(model: Any, recall: list[Sample]) -> None:
    found = solved(model, recall)
    assert found.solvable
    assert found.share.value == sum(found.right) / 5
    assert found.share.low <= found.share.value <= found.share.high


def test_wrong_answers_are_not(model: Any, recall: list[Sample]) -> None:
    wrong = [replace(sample, answer=recall[i - 1].answer) for i, sample in enumerate(recall)]
    found = solved(model, wrong)
    right = solved(model, recall).right
    assert found.right == [
        a.answer == b.answer and r for a, b, r in zip(recall, wrong, right, strict=True)
    ]
    assert not found.solvable


def test_the_last_token_must_be_right_too(model: Any, recall: list[Sample]) -> None:
    sample = recall[solved(model, recall).right.index(True)]
    longer = replace(sample, answer=[*sample.answer, 0])
    assert solved(model, [longer]).right == [False]


def test_samples_without_an_answer_are_refused(model: Any, recall: list[Sample]) -> None:
    with pytest.raises(ValueError, match="samples: got none"):
        solved(model, [])
    with pytest.raises(ValueError, match="sample 1: got no answer tokens"):
        solved(model, [recall[0], replace(recall[0], answer=[])])


def test_commands(smollm2_dir: Path) -> None:
    run = CliRunner().invoke
    result = run(app, ["workload", "solvable", "recall", "--prompts", "3"])
    assert result.exit_code == 0, result.output
    assert (
        "recall: 3 of 3 prompts answered, 100% [100%, 100%]: solvable for smollm2" in result.output
    )
    result = run(app, ["workload", "show", "chain:chunks=2"])
    assert result.exit_code == 0, result.output
    assert "has the same number as the one before" in result.output
    assert "prompt 1, chunk 2:" in result.output
    result = run(app, ["workload", "show", "chain:chunks"])
    assert result.exit_code == 2
    assert "prompts: Input should be a valid integer" in result.output
