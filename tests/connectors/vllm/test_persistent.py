"""The connector with a disk tier: what it stored is there after a restart, exact and moved."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmc.chunking.prompt import join
from tests.connectors.vllm.engine import run_scenario
from tests.connectors.vllm.persistent import BLENDS as BLENDS_OF

pytestmark = pytest.mark.engine


def disk(path: Path, **fields: Any) -> dict[str, Any]:
    return {"tiers": [{"name": "disk", "path": str(path), "capacity": "1GiB"} | fields]}


def same(got: Any, expected: Any) -> None:
    assert got.tokens == expected.tokens
    np.testing.assert_allclose(got.logprobs, expected.logprobs, atol=1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store") / "kv"


@pytest.fixture(scope="module")
def stored(tiny_llama_dir: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_scenario(
        "persist", tiny_llama_dir, tmp_path_factory.mktemp("persist"), lmc=disk(folder)
    )


@pytest.fixture(scope="module")
def restarted(
    tiny_llama_dir: Path, folder: Path, stored: Any, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    return run_scenario(
        "restarted", tiny_llama_dir, tmp_path_factory.mktemp("restarted"), lmc=disk(folder)
    )


def test_a_restarted_engine_answers_as_the_one_that_stored(stored: Any, restarted: Any) -> None:
    for arm in BLENDS_OF:
        same(restarted[arm], stored[arm])
        assert restarted[arm].kinds == stored[arm].kinds
    same(restarted["full_recompute"], restarted["plain"])


def test_the_report_says_that_the_bytes_came_from_disk(restarted: Any) -> None:
    assert restarted["epic"].report["bytes"] == {"host": 0, "disk": 250 * 1536}
    counts = restarted["counts"]
    assert counts["fetched"] > 0 and counts["disk:hits"] == counts["fetched"]
    assert not [kind for kind in counts if "damaged" in kind or "fault" in kind]


def test_a_tenant_does_not_find_anothers_documents_on_disk(restarted: Any) -> None:
    assert restarted["other_tenant"].kinds == {"new": 270}


@pytest.fixture(scope="module")
def notebook(tiny_llama_dir: Path) -> Any:
    """The engine's model, as a notebook has it."""
    from transformers import AutoModelForCausalLM

    from lmc.connectors.hf import HFModel

    return HFModel(AutoModelForCausalLM.from_pretrained(tiny_llama_dir).eval())


def test_a_notebook_answers_out_of_what_an_engine_stored(
    notebook: Any, folder: Path, stored: Any, restarted: Any
) -> None:
    from lmc.connectors.hf import HFStore, run_blend
    from lmc.quality import BLENDS
    from tests.connectors.vllm.scenarios import prompt

    whole = join(prompt(2, 0, 3))
    store = HFStore(notebook, tiers=disk(folder)["tiers"])
    try:
        assert store.namespace == notebook.namespace()
        for arm in ("full_reuse", "epic", "prefix"):
            got = run_blend(store, whole.token_ids, whole.spans, BLENDS.build(BLENDS_OF[arm]))
            kinds = {kind: n for kind, n in got.plan.kinds().items() if n}
            assert kinds == stored[arm].kinds, arm
            first = stored[arm].tokens[0]
            logprob = got.logits[0][0].double().log_softmax(-1)[first]
            np.testing.assert_allclose(float(logprob), stored[arm].logprobs[0], atol=1e-4)
    finally:
        store.close()


def test_an_engine_answers_out_of_what_a_notebook_stored(
    notebook: Any, tiny_llama_dir: Path, restarted: Any, tmp_path: Path
) -> None:
    from lmc.connectors.hf import HFStore
    from tests.connectors.vllm.scenarios import DOCUMENTS, SYSTEM

    store = HFStore(notebook, tiers=disk(tmp_path / "kv")["tiers"])
    for document in DOCUMENTS:
        whole = join([SYSTEM, document])
        store.add(whole.token_ids, whole.spans)
    store.close()
    got = run_scenario("restarted", tiny_llama_dir, tmp_path, lmc=disk(tmp_path / "kv"))
    for arm in BLENDS_OF:
        same(got[arm], restarted[arm])
        assert got[arm].kinds == restarted[arm].kinds, arm


def test_workers_in_processes_of_their_own(
    tiny_llama_dir: Path, folder: Path, restarted: Any, tmp_path: Path
) -> None:
    got = run_scenario(
        "restarted_elsewhere", tiny_llama_dir, tmp_path, separate_worker=True, lmc=disk(folder)
    )
    same(got["epic"], restarted["epic"])
    assert got["epic"].report["bytes"] == {"host": 0, "disk": 250 * 1536}


def test_a_disk_that_hangs_stops_nobody(
    tiny_llama_dir: Path, folder: Path, restarted: Any, tmp_path: Path
) -> None:
    got = run_scenario(
        "slow_disk", tiny_llama_dir, tmp_path, lmc=disk(folder) | {"fetch_patience_s": 0.5}
    )
    for name in ("alone", "at_rest", "waits"):
        assert got[name].tokens == got["plain"].tokens
    # Given up while its chunks were on their way: nothing is kept for it, and nobody notices.
    assert got["gone"] is None and got["left"] == 0
    same(got["beside"], got["beside_alone"])
    # The first waited in vain, so the tier is left alone for a while.
    assert got["rests"] and got["at_rest"].kinds == {"new": 270}
    assert got["gets"] == 7  # one a chunk, of the first request alone
    # One that is not alone does not wait inside a step: the other goes on decoding.
    assert got["steps_before_it"] > 2
    assert got["counts"]["deferred_for_fetch"] > 0
    assert got["counts"]["tiers_left_alone"] == 2


def test_damaged_segments_are_computed(
    tiny_llama_dir: Path, folder: Path, restarted: Any, tmp_path: Path
) -> None:
    copy = tmp_path / "kv"
    shutil.copytree(folder, copy)
    for segment in (copy / "segments").iterdir():
        data = bytearray(segment.read_bytes())
        for at in range(5000, len(data), 4096 * 40):
            data[at] ^= 4
        segment.write_bytes(data)
    got = run_scenario("restarted", tiny_llama_dir, tmp_path, lmc=disk(copy))
    same(got["full_recompute"], restarted["plain"])
    same(got["prefix"], restarted["plain"])
    counts = got["counts"]
    assert counts["disk:damaged:payload"] + counts["disk:damaged:header"] > 0
    assert counts["disk:quarantined"] > 0


def test_write_back_and_compression(tiny_llama_dir: Path, stored: Any, tmp_path: Path) -> None:
    lmc = disk(tmp_path / "kv", write="back", compression="int8")
    run_scenario("persist", tiny_llama_dir, tmp_path, lmc=lmc)
    got = run_scenario("restarted", tiny_llama_dir, tmp_path, lmc=lmc)
    assert got["epic"].kinds == stored["epic"].kinds
    # Codes of 8 bits: near what was stored, and not the same.
    assert np.abs(got["epic"].logprobs[0] - stored["epic"].logprobs[0]) < 0.5
    assert got["full_reuse"].logprobs.tolist() != stored["full_reuse"].logprobs.tolist()


def test_two_ranks_find_what_one_has_stored(
    tiny_llama_dir: Path, folder: Path, restarted: Any, tmp_path: Path
) -> None:
    got = run_scenario(
        "restarted_elsewhere", tiny_llama_dir, tmp_path, separate_worker=True, lmc=disk(folder),
        tensor_parallel_size=2,
    )  # fmt: skip
    same(got["epic"], restarted["epic"])
    assert got["epic"].kinds == restarted["epic"].kinds
    # A rank's bytes: half of the heads.
    assert got["epic"].report["bytes"] == {"host": 0, "disk": 250 * 1536 // 2}


@pytest.mark.slow
def test_one_rank_finds_what_two_have_stored(
    tiny_llama_dir: Path, stored: Any, restarted: Any, tmp_path: Path
) -> None:
    lmc = disk(tmp_path / "kv")
    both: dict[str, Any] = {"separate_worker": True, "tensor_parallel_size": 2}
    run_scenario("persist_elsewhere", tiny_llama_dir, tmp_path, lmc=lmc, **both)
    got = run_scenario("restarted_elsewhere", tiny_llama_dir, tmp_path, lmc=lmc, **both)
    same(got["epic"], stored["epic"])
    got = run_scenario("restarted", tiny_llama_dir, tmp_path, lmc=lmc)
    for arm in BLENDS_OF:
        same(got[arm], restarted[arm])
        assert got[arm].kinds == restarted[arm].kinds
    assert got["epic"].report["bytes"] == {"host": 0, "disk": 250 * 1536}
