"""Runs test_reference.py once more, on the Triton kernels.

Triton reads TRITON_INTERPRET when it is imported, and test_aot.py needs it unset: hence a process.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lmc.kernels.spec import interpreted


@pytest.mark.timeout(900)
@pytest.mark.skipif(interpreted(), reason="this process is interpreting already")
@pytest.mark.heavy
@pytest.mark.alone
def test_kernels_under_the_interpreter():
    target = Path(__file__).with_name("test_reference.py")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(target)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    if run.returncode or "skipped" in run.stdout:
        pytest.fail(
            f"TRITON_INTERPRET=1 pytest {target.name}:\n{run.stdout}{run.stderr}", pytrace=False
        )
