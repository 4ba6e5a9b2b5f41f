"""How far a run is and how long it will take: a bar in a terminal, lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lmc.results.progress import Step


@contextmanager
def progress(console: Console, total: int) -> Iterator[Step]:
    """A function that says what is being done; `advance` counts towards `total`.

    In a terminal the detail is shown too; elsewhere a line is printed when the phase changes.
    """
    if console.is_terminal:
        with _bar(console) as bar:
            task = bar.add_task("", total=total)

            def show(phase: str, detail: str = "", advance: int = 0) -> None:
                bar.update(task, description=f"{phase} {detail}".strip(), advance=advance)

            yield show
        return

    begun, done, last = 0.0, 0, ""

    def write(phase: str, detail: str = "", advance: int = 0) -> None:
        nonlocal begun, done, last
        if phase != last:
            now = time.monotonic()
            left = ""
            if done:
                left = f", about {(now - begun) / done * (total - done) / 60:.0f} min left"
            print(f"[{done}/{total}] {phase}{left}", flush=True)
            last = phase
            begun = begun if done else now
        done += advance

    yield write


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
        # Arms differ by a factor of ten: only a mean over whole prompts foretells anything.
        speed_estimate_period=300,
    )
