"""`lmc run` as a call: an experiment file in, rows out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lmc.experiment.hf.config import HFExperiment
from lmc.experiment.settings import read_settings
from lmc.experiment.vllm.config import VLLMExperiment
from lmc.results.progress import Progress, silent
from lmc.results.rows import Row

CONNECTORS = ("vllm", "hf")


def load(path: Path | str, overrides: Sequence[str] = ()) -> VLLMExperiment | HFExperiment:
    """Read an experiment; `connector` says whether on vLLM, the default, or on Hugging Face.

    overrides: `a.b=value`, the value in YAML; they come last.

    Raises ValueError for a file that is missing or is not YAML, and for unknown or wrong keys.
    """
    path = Path(path)
    raw = read_settings(path, list(overrides))
    connector = raw.get("connector", "vllm")
    if connector not in CONNECTORS:
        raise ValueError(f"{path}: connector: got {connector!r}; valid: {', '.join(CONNECTORS)}")
    if connector == "hf":
        from lmc.experiment.hf.config import load_config as load_hf

        return load_hf(path, raw)
    from lmc.experiment.vllm.config import load_config as load_vllm

    return load_vllm(path, {key: value for key, value in raw.items() if key != "connector"})


def run(
    experiment: VLLMExperiment | HFExperiment | Path | str,
    out: Path | str,
    overrides: Sequence[str] = (),
    progress: Progress = silent,
) -> list[Row]:
    """Measure what the folder `out` does not hold yet, and return all rows it then holds.

    experiment: what `load` gives, or the path that it is given with `overrides`.

    Raises ValueError for bad input, before anything is measured.
    """
    if isinstance(experiment, Path | str):
        config = load(experiment, overrides)
    elif overrides:
        raise ValueError(f"overrides: got {list(overrides)} for a config that is loaded already")
    else:
        config = experiment
    if isinstance(config, HFExperiment):
        from lmc.experiment.hf.run import run as run_hf

        return run_hf(config, Path(out), progress)
    from lmc.experiment.vllm.run import run as run_vllm

    return run_vllm(config, Path(out), progress)
