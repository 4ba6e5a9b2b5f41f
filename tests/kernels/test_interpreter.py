"""Runs test_reference.py once more, on the Triton kernels.

Triton reads TRITON_INTERPRET when it is imported, and test_aot.py needs it unset: hence a process.
"""

from pathlib import Path

import pytest

from lmc.kernels.spec import interpreted
from tests.kernels.interpreting import interpret


@pytest.mark.timeout(900)
@pytest.mark.skipif(interpreted(), reason="this process is interpreting already")
@pytest.mark.heavy
@pytest.mark.alone
def test_kernels_under_the_interpreter():
    target = Path(__file__).with_name("test_reference.py")
    assert "skipped" not in interpret(target)
