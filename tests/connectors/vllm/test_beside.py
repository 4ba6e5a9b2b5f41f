"""Beside what else vLLM does: adapters, drafts out of the text, structured output, sampling."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.connectors.vllm.engine import run_scenario

pytestmark = pytest.mark.engine


def same(got: Any, expected: Any) -> None:
    assert got.tokens == expected.tokens
    np.testing.assert_allclose(got.logprobs, expected.logprobs, atol=1e-4)


@pytest.fixture(scope="module")
def beside(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("beside")
    model = folder / "model"
    shutil.copytree(tiny_llama_dir, model)
    letters(model)
    return run_scenario(
        "tests.connectors.vllm.adapted:beside", model, folder, given=(folder,),
        enable_lora=True, max_loras=3, max_lora_rank=8, skip_tokenizer_init=False,
        structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
    )  # fmt: skip


def letters(model: Path, marks: Sequence[str] = ()) -> None:
    """A tokenizer whose tokens are bytes, and marks, as structured output wants one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {letter: i for i, letter in enumerate(["<unk>", "<s>", "</s>", *marks, *alphabet])}
    tokenizer = Tokenizer(models.BPE(words, []))
    tokenizer.add_special_tokens(list(marks))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(model)


class TestAdapters:
    @pytest.fixture
    def adapted(self, beside: Any) -> Any:
        return beside["adapted"]

    def test_kv_of_one_is_never_given_to_another(self, adapted: Any) -> None:
        plain = adapted["plain"]
        assert len({tuple(answer.tokens) for answer in plain.values()}) == 3
        for name, got in adapted["others"].items():
            assert got.kinds == {"new": 270}
            same(got, plain[name])

    @pytest.mark.parametrize("blend", ["prefix", "full_recompute"])
    def test_each_finds_its_own_and_answers_as_without_lmc(self, adapted: Any, blend: str) -> None:
        for name, got in adapted[blend].items():
            same(got, adapted["plain"][name])
            assert got.kinds["exact"] == 110
            assert got.kinds.get("recomputed", 0) == (0 if blend == "prefix" else 140)

    def test_rows_are_computed_under_their_adapter_in_one_pass(self, adapted: Any) -> None:
        assert adapted["claims"] == [2]
        for name, got in adapted["together"].items():
            same(got, adapted["alone"][name])
            assert got.kinds["moved"] == 124
        same(adapted["lost"], adapted["plain"]["first"])
        assert adapted["lost"].kinds == {"exact": 110, "recomputed": 140, "new": 20}

    def test_one_that_no_worker_has_told_of_is_served_plainly(self, adapted: Any) -> None:
        same(adapted["unknown"], adapted["plain"]["first"])  # the same files under another name
        assert adapted["unknown"].report["reason"].startswith("lora_without_digest:")

    def test_one_that_is_loaded_from_other_files_is_another(self, adapted: Any) -> None:
        changed = adapted["changed"]
        # Planned before it was loaded anew: what was found is computed with what is there now.
        same(changed["met"], changed["plain"])
        assert changed["met"].kinds == {"recomputed": 250, "new": 20}
        assert changed["behind"].kinds == {"new": 270}
        same(changed["behind"], changed["plain"])
        # And from the first ones again, it is the first one again.
        same(changed["back"], adapted["plain"]["first"])
        assert changed["back"].kinds["exact"] == 110
        assert adapted["counts"]["adapters_changed"] == 2

    def test_logprobs_of_prompts(self, adapted: Any) -> None:
        for of in adapted["prompts"].values():
            np.testing.assert_allclose(of["prompt"], of["said"], atol=1e-4)

    def test_what_a_cpu_computes_wrongly_beside_adapters_is_not_stored(self, adapted: Any) -> None:
        assert adapted["beside_an_adapter"].kinds == {"new": 65}


def test_every_way_to_sample_draws_the_same_however_the_prompt_is_cut(beside: Any) -> None:
    assert beside["sampled"]
    for got in beside["sampled"].values():
        same(got["steps"], got["one"])
        same(got["together"], got["alone"])


def test_structured_output(beside: Any) -> None:
    result = beside["structured"]
    for name in ("prefix", "full_recompute"):
        same(result[name], result["plain"])
        assert result[name].kinds["exact"] == 110
    same(result["epic_beside"], result["epic"])
    assert result["epic"].kinds["moved"] == 124
    assert set(json.loads(result["json"])) == {"a", "b"}
    for text in result["texts"].values():
        assert re.fullmatch(result["regex"], text)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_drafts_out_of_the_text(tiny_llama_dir: Path, tmp_path: Path) -> None:
    drafts = {"method": "ngram", "num_speculative_tokens": 3}
    drafts |= {"prompt_lookup_min": 1, "prompt_lookup_max": 3}
    result = run_scenario(
        "tests.connectors.vllm.drafted:drafted", tiny_llama_dir, tmp_path,
        speculative_config=drafts, timeout=800,
    )  # fmt: skip
    drafted, accepted = np.sum(result["steps"], axis=0)
    assert 0 < accepted < drafted
    same(result["prefix"], result["plain"])
    assert result["prefix"].kinds == {"exact": 110, "new": 160}
    same(result["full_recompute"], result["plain"])
    assert result["full_reuse"].kinds == {"exact": 110, "moved": 140, "new": 20}
    same(result["together"]["epic"], result["epic"])
    same(result["together"]["prefix"], result["prefix_alone"])
    for turn in result["stored"]:
        # Nothing behind what was accepted, all of it but perhaps the last token, and it is right.
        said = "".join(f"{token}," for token in turn["ids"])
        assert all("".join(f"{token}," for token in kept) in said for kept in turn["kept"])
        assert turn["said"] - 1 <= turn["turn"].kinds["exact"] <= turn["said"]
        same(turn["turn"], turn["plain"])


@pytest.mark.parametrize("method", ["eagle", "draft_model", "medusa"])
def test_drafts_with_kv_of_their_own_are_refused(method: str) -> None:
    from types import SimpleNamespace

    from lmc.connectors.vllm.config import LMCConfig
    from lmc.connectors.vllm.identity import engine_refusal

    parallel = SimpleNamespace(
        pipeline_parallel_size=1, decode_context_parallel_size=1, prefill_context_parallel_size=1
    )
    config = SimpleNamespace(
        parallel_config=parallel, speculative_config=SimpleNamespace(method=method)
    )
    refusal = engine_refusal(config, None, LMCConfig())
    assert refusal is not None and f"speculative decoding by {method}" in refusal
