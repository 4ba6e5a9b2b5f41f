"""`lmc calibrate`: measure strategies on a model, and write its quality profile."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmc.cli.errors import errors_in_one_line

if TYPE_CHECKING:
    from rich.table import Table

    from lmc.quality.profile import QualityProfile
    from lmc.workloads.sample import Sample

DTYPES = ("float32", "float16", "bfloat16")


def calibrate(
    model: Annotated[str, typer.Argument(help="A known name such as smollm2, or a folder.")],
    dtype: Annotated[
        str | None, typer.Option(help=f"{', '.join(DTYPES)}; default: the model's own.")
    ] = None,
    workload: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WORKLOAD",
            help="Prompts, such as pydoc or passages:path=FILE; may be repeated.",
        ),
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="How many of each workload.")] = 16,
    blend: Annotated[
        list[str] | None,
        typer.Option(
            metavar="STRATEGY",
            help="Strategies, such as epic or query:ratio=0.1; may be repeated. "
            "Default: all that are worth it, over their range.",
        ),
    ] = None,
    context: Annotated[
        str, typer.Option(help="How chunks were encoded: isolated, anchored or first_seen.")
    ] = "isolated",
    out: Annotated[
        Path | None, typer.Option(help="The YAML file; default: where an engine looks for it.")
    ] = None,
) -> None:
    """Measure what blending costs a model in quality, and write the profile that allows it.

    What is known after each prompt lies in FILE.partial; FILE is replaced when all is measured.

    For example: lmc calibrate smollm2 --prompts 16
    """
    with errors_in_one_line("hf"):
        if dtype not in (None, *DTYPES):
            raise ValueError(f"--dtype: got {dtype!r}; valid: {', '.join(DTYPES)}")

        from typing import get_args

        from rich.console import Console
        from transformers import AutoModelForCausalLM, AutoTokenizer

        import lmc
        from lmc.blend.encoding import Context
        from lmc.cli import output
        from lmc.cli.progress import progress
        from lmc.connectors.hf.model import HFModel
        from lmc.experiment.calibrate import calibrate as measured
        from lmc.experiment.calibrate import grid
        from lmc.model.exports import EXPORTS, resolve
        from lmc.model.weights import weights_digest
        from lmc.quality.profile import QualityProfile, user_profiles
        from lmc.results.rows import git_commit
        from lmc.workloads import WORKLOADS

        if context not in get_args(Context):
            raise ValueError(f"--context: got {context!r}; valid: {', '.join(get_args(Context))}")
        configs = grid(blend or [])
        workloads = [WORKLOADS.parse(text) for text in workload or ["pydoc"]]
        built = [WORKLOADS.build(config) for config in workloads]
        folder = resolve(model)
        weights = weights_digest(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        samples = [s for w in built for s in _first(prompts, w.samples(tokenizer), w)]
        hf = HFModel(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto").eval())
        console = Console()
        with progress(console, len(samples) * len(configs)) as step:
            for rows in measured(hf, samples, configs, step, context):  # type: ignore[arg-type]
                profile = QualityProfile(
                    model=model if model in EXPORTS else Path(folder).resolve().name,
                    weights=weights.hex(),
                    dtype=str(hf.dtype).removeprefix("torch."),
                    rope=hf.rotations.fingerprint.hex(),
                    lmc_version=lmc.__version__,
                    git_commit=git_commit(),
                    workloads=workloads,
                    prompts=rows[0].prompts,
                    context=context,  # type: ignore[arg-type]
                    rows=rows,
                )
                path = out or user_profiles() / profile.file_name
                partial = path.with_name(f"{path.name}.partial")
                profile.save(partial)
        partial.replace(path)
        output.show(table(profile))
        console.print(f"profile: {path}", soft_wrap=True, highlight=False)


def table(profile: QualityProfile) -> Table:
    """What was measured, by strategy."""
    from lmc.cli import output
    from lmc.quality.profile import knob_of

    title = f"{profile.model}, {profile.dtype}, {profile.prompts} prompts, {profile.context} chunks"
    result = output.table(title, ["strategy", "knob", "compute", "recovery [95%]", "KL"])
    for row in profile.rows:
        knob = row.strategy.knob
        rest = [f"{k}={v}" for k, v in row.blend.items() if k not in ("name", knob)]
        result.add_row(
            " ".join([row.blend["name"], *rest]),
            "–" if knob is None else f"{knob} {knob_of(row.strategy)}",
            f"{row.compute_fraction:.1%}",
            f"{row.recovery:.2f} [{row.low:.2f}, {row.high:.2f}]",
            f"{row.kl:.3f}",
        )
    return result


def _first(prompts: int, samples: list[Sample], workload: Any) -> list[Sample]:
    if len(samples) < prompts:
        raise ValueError(f"--prompts: got {prompts}, but {workload} has {len(samples)}")
    return samples[:prompts]
