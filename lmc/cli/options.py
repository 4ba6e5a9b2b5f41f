"""Options that several commands have, said once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lmc.sim.batching import Batch

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
Servers = Annotated[
    int,
    typer.Option(
        help="With times: engines, of one queue; where they batch, a request "
        "goes to the one that has the fewest."
    ),
]
RateScale = Annotated[float, typer.Option(help="With times: how many times faster requests come.")]
MaxNumSeqs = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="With times: requests that an engine serves side by side, as vLLM's own option says; "
        "by default one after the other.",
    ),
]
MaxNumBatchedTokens = Annotated[
    int | None,
    typer.Option(min=1, help="With --max-num-seqs: tokens of a step, as vLLM's own; 2048 untold."),
]


def batch_of(max_num_seqs: int | None, max_num_batched_tokens: int | None) -> Batch | None:
    """How engines batch, as the two options say; ValueError where only the second is given."""
    from lmc.sim.batching import Batch

    if max_num_seqs is None:
        if max_num_batched_tokens is not None:
            raise ValueError("max-num-batched-tokens: goes with --max-num-seqs")
        return None
    if max_num_batched_tokens is None:
        return Batch(max_num_seqs)
    return Batch(max_num_seqs, max_num_batched_tokens)
