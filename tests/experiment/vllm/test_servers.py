"""Servers of experiments: they and all that they started are gone in the end."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lmc.experiment.vllm import servers

# As vLLM's: it starts a process, which lives on for `seconds` after it.
SERVER = """
import http.server, subprocess, sys
seconds, port = sys.argv[1], int(sys.argv[-1])
child = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({seconds})"])
print("child", child.pid, flush=True)
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", port), Health).serve_forever()
"""


def alive(pid: int) -> bool:
    """Whether it runs; what nobody has reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("seconds", [2, 1000])
def test_what_a_server_started_is_gone_behind_it(
    seconds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "ENGINE_STOP_S", 1.0)
    log = tmp_path / "log"
    with servers.running([sys.executable, "-c", SERVER, str(seconds)], log) as server:
        assert server.get("/health") is not None
        child = int(log.read_text().split()[1])
        assert alive(child)
    assert not alive(child)
