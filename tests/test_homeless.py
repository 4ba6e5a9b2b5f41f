"""A user without a home or a name, in an installation that may not be written: it costs time."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, sys
from pathlib import Path
import numpy as np
from lmc.sim import stack, windows
assert len(windows.window_hashes(np.arange(10), 3)) == 8
from lmc.model.weights import cache_dir, weights_digest
from lmc.quality.profile import find_profile
try:
    cache_dir()
    raise SystemExit("it has a home")
except FileNotFoundError as e:
    assert "XDG_CACHE_HOME" in str(e)
assert find_profile(b"x" * 32, "float32", b"y" * 32) is None
assert len(weights_digest(Path(sys.argv[1]))) == 32
print(sorted(os.listdir()))
"""


@pytest.mark.skipif(
    os.getuid() != 0 or shutil.which("setpriv") is None, reason="needs root and setpriv"
)
def test_who_has_no_home_keeps_nothing_and_misses_nothing(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    tmp_path.chmod(0o777)
    for folder in tmp_path.parents:  # the way there is open to all
        if folder.stat().st_mode & 0o5 != 0o5 and folder.owner() == "root" and "tmp" in str(folder):
            folder.chmod(folder.stat().st_mode | 0o5)
    reading = ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]
    user = ["setpriv", "--reuid", "12345", "--regid", "12345", "--clear-groups", *reading]
    environment = {k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME")}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    ended = subprocess.run(
        [*user, sys.executable, "-c", PROGRAM, str(tmp_path / "model")],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() == "['model']"  # and nothing is left where it ran
