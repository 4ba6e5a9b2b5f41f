"""`lmc run`: measure an experiment, then print and draw all that its folder holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmc.cli.errors import errors_in_one_line

if TYPE_CHECKING:
    from rich.console import Console

    from lmc.experiment.hf.config import HFExperiment
    from lmc.experiment.vllm.config import VLLMExperiment
    from lmc.results.rows import Row


def run(
    experiment: Annotated[Path, typer.Argument(help="A YAML file, such as experiments/demo.yaml.")],
    out: Annotated[Path, typer.Option(help="The folder that rows.jsonl is appended to.")],
    override: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=VALUE", help="Override one value; may be repeated."),
    ] = None,
) -> None:
    """Run an experiment; one that was stopped goes on where it stopped.

    For example: lmc run experiments/demo.yaml --out results/demo --set workload.prompts=6
    """
    with errors_in_one_line():
        from functools import partial

        from rich.console import Console

        from lmc.cli.progress import progress
        from lmc.experiment.run import load
        from lmc.experiment.run import run as measured

        console = Console()
        config = load(experiment, override or [])
        rows = measured(config, out, progress=partial(progress, console))
        report(config, rows, out, console)


def report(
    config: VLLMExperiment | HFExperiment, rows: list[Row], out: Path, console: Console
) -> None:
    """Tables on the console, and a figure in the folder."""
    from importlib.util import find_spec

    from lmc.cli import tables
    from lmc.cli.output import show
    from lmc.experiment.hf.config import HFExperiment
    from lmc.results.rows import ROWS
    from lmc.results.summary import summarise

    if isinstance(config, HFExperiment):
        show(tables.hf_quality(rows), console=console)
        lines = tables.comparisons(rows, config.compare)
    else:
        summaries = summarise(rows)
        show(*tables.speed_and_quality(summaries), console=console)
        lines = tables.fallbacks(summaries)
    for line in [*lines, f"rows: {out / ROWS}"]:
        console.print(line, soft_wrap=True)
    if find_spec("matplotlib") is None:
        console.print("figure: not drawn, matplotlib is not installed (pip install '.[notebooks]')")
        return
    from lmc import plots

    if isinstance(config, HFExperiment):
        figure, name = plots.pareto(rows, title=config.workload["name"]), "pareto.png"
    else:
        figure, name = plots.ttft_quality(rows), "ttft_quality.png"
    figure.savefig(out / name, dpi=150)
    console.print(f"figure: {out / name}", soft_wrap=True)
