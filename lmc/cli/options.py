"""Options that several commands have, said once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Trace = Annotated[
    Path,
    typer.Argument(
        help="A trace: a file, plain or compressed, a folder of them, or - for standard input."
    ),
]
Tokenizer = Annotated[
    str | None,
    typer.Option(
        help="For text: a tokenizer.json, a folder that holds one, a model of `lmc model export`, "
        "or a name of the hub."
    ),
]
Format = Annotated[
    str, typer.Option(help="The trace's format, if it cannot be told (`lmc trace formats`).")
]
Strict = Annotated[bool, typer.Option(help="Stop at the first bad line.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead, and nothing else.")]
Model = Annotated[
    str,
    typer.Option(
        help="Says the bytes of a token and the cost of computing it: a known name, a config.json "
        "or its folder."
    ),
]
KVDtype = Annotated[str | None, typer.Option(help="Of the KV, default the model's own.")]
Times = Annotated[
    str | None,
    typer.Option(
        help="Adds times: a file that `lmc fit` wrote for this model, or a GPU such as h100 or "
        "8xh100, by arithmetic."
    ),
]
Servers = Annotated[int, typer.Option(help="With times: engines behind one queue.")]
RateScale = Annotated[float, typer.Option(help="With times: how many times faster requests come.")]
