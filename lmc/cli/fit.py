"""`lmc fit`: the constants of the time model, from what `lmc run` measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmc.cli.errors import errors_in_one_line

if TYPE_CHECKING:
    from rich.table import Table

    from lmc.model.times import TierSpeed
    from lmc.results.fit import Fit


@dataclass(frozen=True)
class UnmeasuredTier:
    """What `--tier NAME:...` says: bytes a second (a number or such as 2GiB), and latency."""

    bytes_per_s: float | str
    latency_s: float = 0.0


def fit(
    results: Annotated[
        list[Path],
        typer.Argument(help="Folders that `lmc run` wrote, such as results/demo."),
    ],
    out: Annotated[
        Path | None, typer.Option(help="The YAML file that the time model is written to.")
    ] = None,
    tier: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:FIELD=VALUE,...",
            help="A tier that was not measured, such as disk:2GiB,latency_s=0.0001; "
            "may be repeated.",
        ),
    ] = None,
    overlap: Annotated[
        float, typer.Option(help="Share of the loading to hide behind computing, 0 to 1.")
    ] = 0.0,
    model: Annotated[
        str | None,
        typer.Option(help="Its sizes, where the rows do not tell: a known name or a config.json."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Fit seconds to first token to measured rows, and say when reuse is slower than computing.

    For example: lmc fit results/demo --out times.yaml
    """
    with errors_in_one_line("sim"):
        from dataclasses import asdict, replace
        from hashlib import sha256

        from rich.console import Console

        from lmc.cli.output import print_json, show
        from lmc.model.shape import shape
        from lmc.results.fit import fit as fit_rows
        from lmc.results.rows import ROWS, read_rows

        files = [path / ROWS if path.is_dir() else path for path in results]
        rows = [row for file in files for row in read_rows(file)]
        fitted = fit_rows(rows, shape(model) if model else None)
        provenance = {
            **fitted.model.provenance,
            "files": {str(file): sha256(file.read_bytes()).hexdigest() for file in files},
        }
        tiers = (*fitted.model.tiers, *map(_tier, tier or []))
        times = replace(fitted.model, tiers=tiers, overlap=overlap, provenance=provenance)
        if out is not None:
            times.save(out)
        longest = provenance["prompt_tokens"][1]
        verdicts = [times.verdict(t.name, longest) for t in tiers]
        console = Console()
        if as_json:
            answer = {
                "times": asdict(times),
                "residuals": [asdict(residual) for residual in fitted.residuals],
                "warnings": fitted.warnings,
                "verdicts": verdicts,
            }
            print_json(answer)
            return
        show(*_tables(fitted))
        for warning in fitted.warnings:
            console.print(f"warning: {warning}", style="yellow", soft_wrap=True, highlight=False)
        for verdict in verdicts:
            console.print(verdict, soft_wrap=True, highlight=False)
        if out is not None:
            console.print(f"times: {out}", soft_wrap=True)


def _tier(text: str) -> TierSpeed:
    from lmc.model.times import TierSpeed
    from lmc.registry import Registry
    from lmc.sizes import scaled

    # Its name is the user's own, so the registry has no other.
    name = Registry("--tier", {}).parse(text)["name"] if text.strip()[:1] == "{" else ""
    name = name or text.strip().partition(":")[0]
    said = Registry("--tier", {name: "lmc.cli.fit:UnmeasuredTier"}).build(text)
    speed = said.bytes_per_s if isinstance(said.bytes_per_s, float) else scaled(said.bytes_per_s)
    return TierSpeed(name, said.latency_s, speed)


def _tables(fitted: Fit) -> list[Table]:
    from lmc.cli.output import table

    units = {
        "fixed_s": ("a request", "ms", 1e3),
        "per_row_s": ("a row computed", "ms", 1e3),
        "per_pair_s": ("1,000 keys attended to", "ms", 1e6),
        "blend_s": ("a forward among reused rows", "ms", 1e3),
    }
    constants = table("Time to first token", ["takes", "", "95%"])
    for name, e in fitted.estimates.items():
        what, unit, factor = units.get(name, (f"loading from {name}", "GiB/s", 2.0**-30))
        value, low, high = (f"{x * factor:.3g}" for x in (e.value, e.low, e.high))
        constants.add_row(what, f"{value} {unit}", f"{low} to {high}")
    residuals = table("Predicted ÷ measured - 1", ["arm", "rows", "size", "signed"])
    for r in fitted.residuals:
        residuals.add_row(r.arm, str(r.rows), f"{r.absolute:.1%}", f"{r.signed:+.1%}")
    return [constants, residuals]
