"""`lmc workload`: see the prompts, if a model can solve them, export them, convert a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lmc.cli.errors import errors_in_one_line

workload_app = typer.Typer(
    help="Prompts to measure on: look at them, see if a model can solve them, export them, "
    "convert a data set.",
    no_args_is_help=True,
)
Name = Annotated[
    str,
    typer.Argument(
        metavar="WORKLOAD", help="pydoc, recall, two_hop:chunks=2, passages:path=FILE, ..."
    ),
]
Model = Annotated[str, typer.Option(help="A model's name or folder.")]


@workload_app.command()
def show(
    name: Name,
    model: Model = "smollm2",
    prompts: Annotated[int, typer.Option(min=1, help="How many prompts to print.")] = 1,
) -> None:
    """Print prompts as the model reads them, each part on its own.

    For example: lmc workload show two_hop:chunks=2 --model smollm2
    """
    with errors_in_one_line("hf"):
        from rich.console import Console

        console = Console()
        tokenizer, samples = _samples(name, model)
        for i, sample in enumerate(samples[:prompts]):
            parts = [("system", sample.system)]
            parts += [(f"chunk {j + 1}", ids) for j, ids in enumerate(sample.chunks)]
            parts += [("question", sample.question), ("answer", sample.answer)]
            for title, ids in parts:
                console.rule(f"prompt {i + 1}, {title}: {len(ids)} tokens", align="left")
                console.print(tokenizer.decode(ids), markup=False, highlight=False)


@workload_app.command()
def solvable(
    name: Name,
    model: Model = "smollm2",
    prompts: Annotated[int, typer.Option(min=1, help="How many prompts to answer.")] = 24,
) -> None:
    """Say whether a model can do a task at all: full prefill must answer 80% of the prompts.

    For example: lmc workload solvable recall --model smollm2
    """
    with errors_in_one_line("hf"):
        from transformers import AutoModelForCausalLM

        from lmc.experiment.solvable import SOLVABLE, solved
        from lmc.model import exports

        _, samples = _samples(name, model)
        loaded = AutoModelForCausalLM.from_pretrained(exports.resolve(model)).eval()
        found = solved(loaded, samples[:prompts])
        share = found.share
        typer.echo(
            f"{name}: {sum(found.right)} of {len(found.right)} prompts answered, "
            f"{share.value:.0%} [{share.low:.0%}, {share.high:.0%}]: "
            f"{'solvable' if found.solvable else f'not solvable, below {SOLVABLE:.0%}'} for {model}"
        )


@workload_app.command()
def export(
    name: Name,
    out: Annotated[Path, typer.Option(help="The file, .jsonl; one that is there is replaced.")],
    format: Annotated[
        Literal["vllm-bench"], typer.Option(help="The data set `custom` of `vllm bench serve`.")
    ] = "vllm-bench",
    model: Model = "smollm2",
    output_tokens: Annotated[
        int | None, typer.Option(min=1, help="Asked for; by default as many as the answer has.")
    ] = None,
) -> None:
    """Write a workload for another program to send: the same prompts, in the same order.

    For example: lmc workload export rag_reorder --out rag.jsonl
    """
    with errors_in_one_line("hf"):
        from lmc.workloads.export import vllm_bench

        if out.suffix != ".jsonl":  # vLLM reads no other
            raise ValueError(f"--out: got {out.name}, want a name that ends in .jsonl")
        tokenizer, samples = _samples(name, model)
        lines = list(vllm_bench(samples, tokenizer, output_tokens))
        out.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        lengths = [len(sample.prompt.token_ids) for sample in samples]
        typer.echo(
            f"{out}: {len(samples)} prompts of {min(lengths):,} to {max(lengths):,} tokens, as "
            f"{format}"
        )


@workload_app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A list of {ctxs, question, answers} in JSON.")],
    target: Annotated[Path, typer.Argument(help="The JSONL that workload `passages` reads.")],
) -> None:
    """Turn a multi-hop data set, as CacheBlend's examples carry it, into passages.

    For example: lmc workload convert musique_s.json musique.jsonl
    """
    with errors_in_one_line("hf"):
        from lmc.workloads.passages import convert_musique

        typer.echo(f"{target}: {convert_musique(source, target)} questions")


def _samples(name: str, model: str) -> tuple[Any, list[Any]]:
    from transformers import AutoTokenizer

    from lmc.model import exports
    from lmc.workloads import WORKLOADS

    workload = WORKLOADS.build(name)
    tokenizer = AutoTokenizer.from_pretrained(exports.resolve(model))
    return tokenizer, workload.samples(tokenizer)
