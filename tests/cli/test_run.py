"""`lmc run`: what is printed and drawn of rows, and the bars of what takes long."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lmc.cli import output
from lmc.cli.run import report
from lmc.experiment.run import load


def test_tables_and_a_figure_of_a_run_on_vllm(tmp_path: Path, demo: Path, make_row: Any) -> None:
    config = load(demo)
    quality = {"kl_mean": 0.2, "kl_last": 0.1, "logprob_error": 0.3, "top1_agreement": 0.5}
    rows = []
    for arm in ("full_prefill", "full_reuse", "epic16"):
        for prompt in range(3):
            row = make_row(arm, prompt, **quality, delta_nll=0.1, greedy_agreement=0.5)
            rows.append(row | {"config": config.model_dump(mode="json"), "device": "a CPU"})
    console = Console(file=io.StringIO(), width=100)
    report(config, rows, tmp_path, console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "Time to first token" in printed and "Quality against full_prefill" in printed
    assert f"figure: {tmp_path / 'ttft_quality.png'}" in printed
    assert (tmp_path / "ttft_quality.png").stat().st_size > 10_000


@pytest.mark.parametrize("terminal", [True, False])
def test_bytes_are_shown_on_a_terminal_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    import rich.console

    shown = io.StringIO()
    monkeypatch.setattr(
        rich.console, "Console",
        lambda **_: Console(file=shown, force_terminal=terminal, width=80),
    )  # fmt: skip
    trace = tmp_path / "trace.jsonl"
    trace.write_text("x" * 100)
    with output.bar_of_bytes(trace, quiet=False) as tell:
        assert (tell is not None) is terminal
        if tell is not None:
            tell(100)
    assert ("reading trace.jsonl" in shown.getvalue()) is terminal
    with output.bar_of_bytes(trace, quiet=True) as tell:
        assert tell is None
