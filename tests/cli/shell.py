"""The command line as a shell sees it."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner

from lmc.cli.app import app


def invoke(*args: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `lmc`; an error that has no exit code is raised."""
    result = CliRunner().invoke(app, [str(a) for a in args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def answer(*args: object) -> Any:
    """What a command that succeeds prints with --json."""
    code, out, err = invoke(*args, "--json")
    assert code == 0, err
    return json.loads(out)
