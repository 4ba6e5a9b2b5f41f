"""Figures are drawn from rows, from a folder, and from incomplete runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lmc import plots

ARMS = {
    "full_prefill": {"cache": "none"},
    "prefix_caching": {"cache": "shared"},
    "full_reuse": {"blend": {"name": "full_reuse"}},
    "epic16": {"blend": {"name": "epic"}},
}


def _rows(arms: list[str], kl: bool = True) -> list[dict[str, Any]]:
    rows = []
    for place, arm in enumerate(arms):
        for prompt_id in range(3):
            row = {"arm": arm, "prompt_id": prompt_id, "repetition": 0, "config": {"arms": ARMS}}
            row |= {"ttft_s": 4.0 / (1 + place + 0.1 * prompt_id), "cpu_s": 1.0}
            row |= {"prompt_tokens": 100, "compute_fraction": 0.3, "flops_fraction": 0.3}
            row["kinds"] = {"local": 0, "local_blended": 0, "exact": 10, "moved": 50}
            row["kinds"] |= {"recomputed": 10, "new": 30}
            row |= {
                "logprob_error": 0.1,
                "kl_last": 0.1,
                "kl_mean": 0.1 * place if kl else None,
                "reason": None,
            }
            row |= {"top1_agreement": 1.0, "delta_nll": 0.0, "greedy_agreement": 1.0}
            rows.append(row)
    return rows


@pytest.mark.parametrize("figure", [plots.ttft_quality, plots.ttft, plots.kinds])
@pytest.mark.parametrize(
    "rows", [_rows(list(ARMS)), _rows(["full_prefill"]), _rows(["epic16"], kl=False)]
)
def test_draws(figure: Any, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figure(rows).savefig(tmp_path / "rows.png")
    figure(tmp_path).savefig(tmp_path / "folder.png")
    assert (tmp_path / "rows.png").read_bytes() == (tmp_path / "folder.png").read_bytes()


def test_every_arm_is_named_and_no_two_names_overlap() -> None:
    rows = _rows(list(ARMS))
    figure = plots.ttft_quality(rows)
    (axes,) = figure.axes
    labels = [text for text in axes.texts if text.get_text() in ARMS]
    assert {text.get_text() for text in labels} == set(ARMS)
    boxes = [text.get_window_extent() for text in labels]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
