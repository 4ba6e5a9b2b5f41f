"""How the command line tells a user about an input that is wrong, or a package that is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

# What each extra of pyproject.toml brings, as far as a command may miss it.
EXTRAS = {
    "store": {"lmdb", "safetensors", "xxhash", "zstandard"},
    "sim": {"ijson", "matplotlib", "numba", "tokenizers", "zstandard"},
    "hf": {"accelerate", "gguf", "matplotlib", "torch", "transformers", "triton"},
    "cuda": {"vllm"},
}


@contextmanager
def errors_in_one_line(extra: str = "hf") -> Iterator[None]:
    """A wrong input is the user's to mend: one red line and exit code 2, no traceback.

    extra: what the command needs; said where a package that it misses comes with several.
    """
    try:
        yield
    except BrokenPipeError:
        raise  # `lmc … | head`: nothing is wrong
    except (ValueError, OSError, ImportError) as e:
        from pydantic import ValidationError

        from lmc.registry import one_line

        text = one_line(e) if isinstance(e, ValidationError) else " ".join(str(e).split())
        from lmc.cli.output import visible

        said = visible(_missing(e, extra) or text)
        typer.secho(f"lmc: {said}", fg=typer.colors.RED, err=True)
        raise typer.Exit(2) from e


def _missing(error: BaseException, extra: str) -> str | None:
    """What to install, where a package that one of our extras brings is not there."""
    cause = error if isinstance(error, ModuleNotFoundError) else error.__cause__
    if not isinstance(cause, ModuleNotFoundError) or cause.name is None:
        return None
    package = cause.name.partition(".")[0]
    needed = next((x for x in (extra, *EXTRAS) if package in EXTRAS[x]), None)
    if needed is None:
        return None
    cpu = " (on a CPU: make setup)" if needed == "cuda" else ""
    return (
        f"this needs the extra [{needed}], whose package {package} is not installed: "
        f"pip install '.[{needed}]' in a clone of lmc{cpu}"
    )
