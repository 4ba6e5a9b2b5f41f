"""Models that see images too: their texts are reused and blended like any other's."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from tests.connectors.hf.tiny import decoder
from tests.connectors.vllm.engine import BLOCK, run_scenario
from tests.connectors.vllm.test_beside import letters
from tests.connectors.vllm.test_families import IDS
from tests.connectors.vllm.windowed import same

VIDEOS = {"Qwen2_5_VL": "Qwen2VLVideoProcessor", "Qwen3VL": "Qwen3VLVideoProcessor"}
MARKS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


@pytest.mark.engine
@pytest.mark.parametrize("family", VIDEOS)
def test_texts_are_reused_and_blended(family: str, tmp_path: Path) -> None:
    pytest.importorskip(
        "torchvision", reason="vLLM imports torchvision for these, of which the CPU build has none"
    )
    model = tmp_path / "model"
    decoder(family, **IDS).save_pretrained(model)
    letters(model, MARKS)
    getattr(transformers, f"{family}Processor")(
        image_processor=transformers.Qwen2VLImageProcessor(),
        tokenizer=transformers.AutoTokenizer.from_pretrained(model),
        video_processor=getattr(transformers, VIDEOS[family])(), chat_template="",
    ).save_pretrained(model)  # fmt: skip
    got = run_scenario(
        "tests.connectors.vllm.families:layers", model, tmp_path, given=(False,),
        skip_tokenizer_init=False, limit_mm_per_prompt={"image": 0, "video": 0},
        kv_cache_memory_bytes=40 * BLOCK * 4 * 2 * 2 * 32 * 4,
    )  # fmt: skip
    for name in ("recompute", "all_by_deviation", "all_by_query"):
        assert got[name].kinds == {"exact": 110, "recomputed": 140, "new": 20}, name
        assert same(got[name], got["plain"]), name
    assert got["exact"].kinds == {"exact": 269, "recomputed": 1}
    assert same(got["exact"], got["plain"]) and same(got["turn"], got["turn_plain"])
    assert got["reuse"].kinds == {"exact": 110, "moved": 140, "new": 20}
    assert not same(got["reuse"], got["plain"])
