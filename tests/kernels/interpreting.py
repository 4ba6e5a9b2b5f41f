"""A file of tests once more, in a process whose kernels run in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def interpret(file: str | Path, *options: str) -> str:
    """What pytest prints of a file under the interpreter; a test that fails there fails here."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, str(file)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    if run.returncode:
        report = f"TRITON_INTERPRET=1 pytest {Path(file).name}:\n{run.stdout}{run.stderr}"
        pytest.fail(report, pytrace=False)
    return run.stdout
