"""Several answers to one prompt, as `n` asks for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.connectors.vllm.engine import run_scenario

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def several(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("several")
    # Prompts go through in one step: with a seed vLLM's own runner does not cut them on a CPU.
    scenario = "tests.connectors.vllm.several:several"
    return run_scenario(scenario, tiny_llama_dir, folder, max_num_batched_tokens=1024)


def test_several_answers_are_those_of_as_many_requests(several: Any) -> None:
    for name, result in several["answers"].items():
        blend, way = name.split(", ")
        together = [result["together"][i] for i in range(3)]
        assert together == result["alone"], name
        if blend != "epic":
            assert together == result["stock"], name
        assert len(set(map(tuple, together))) == (3 if way == "sampled" else 1), name


def test_each_answer_has_a_report_of_its_own(several: Any) -> None:
    for name, result in several["answers"].items():
        reports = [result["reports"][i] for i in range(3)]
        assert all(sum(report["kinds"].values()) == 270 for report in reports), name
        # One computes what all of them use: vLLM shares its blocks, blended ones with their like.
        shared = "local" if name.startswith("prefix") else "local_blended"
        assert [report["kinds"][shared] > 140 for report in reports] == [False, True, True], name
        moved = [report["kinds"]["moved"] for report in reports]
        assert moved == ([124, 0, 0] if name.startswith("epic") else [0, 0, 0]), name
    # Without streaming vLLM passes on that of one answer alone.
    assert several["kept"]["final"]["lmc"]["prompt_tokens"] == 270


def test_they_leave_chunks_and_nothing_else(several: Any) -> None:
    result = several["kept"]
    # Of what is open at its end one is kept of each context, here of the first answer.
    assert [kinds["exact"] for kinds in result["found"]] == [293, 270, 270]
    assert not any(result["left"].values()), result["left"]
