"""`lmc report` and `lmc trace export`: one page that needs nothing beside it; hashes, no text."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lmc.chunking import CHUNKERS
from lmc.sim.readers import read
from lmc.sim.reuse import analyse
from tests.cli.shell import invoke


class Seen(HTMLParser):
    """What a page loads, and the text that it shows; every tag must be closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "link"):
            self.open.append(tag)
        self.loads += [v or "" for k, v in attrs if k in ("src", "href")]
        assert tag not in ("script", "link", "iframe")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def seen(path: Path) -> Seen:
    page = Seen()
    page.feed(path.read_text())
    assert not page.open
    assert all(url.startswith("data:image/png;base64,") for url in page.loads)
    return page


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "clock.jsonl"
    assert invoke("trace", "make", "clock:count=40", "--out", path)[0] == 0
    return path


def test_a_page_of_a_trace(trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    code, said, err = invoke("report", trace, "--out", out, "--profile", "8xh100")
    assert (code, said.strip()) == (0, str(out)), err
    page = seen(out)
    assert len(page.loads) == 2
    for text in ("A prefix cache can find", "of all that", "arithmetic, not measured", "sieve",
                 "changed_prefix", "Put what differs at token 40 behind", "How this was made",
                 "lmc "):  # fmt: skip
        assert text in page.text


def test_a_page_of_block_ids_has_what_they_show(tmp_path: Path) -> None:
    trace, out = tmp_path / "b.jsonl", tmp_path / "b.html"
    row = {"timestamp": 1, "input_length": 1024, "output_length": 1, "hash_ids": [1, 2]}
    trace.write_text(2 * (json.dumps(row) + "\n"))
    code, _, err = invoke("report", trace, "--out", out)
    assert code == 0, err
    assert "moved reuse does not show" in seen(out).text


def test_what_a_file_says_is_text(tmp_path: Path) -> None:
    name = "<script>alert(1)</script>"
    trace, out = tmp_path / "t.jsonl", tmp_path / "t.html"
    rows = [
        {"timestamp": i, "tokens": [1000 + i, *range(300)], "segments": [[name, 0, 301]]}
        for i in range(4)
    ]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert invoke("report", trace, "--out", out)[0] == 0
    assert name in seen(out).text


def test_a_page_of_results(tmp_path: Path, make_row: Any) -> None:
    quality = {"kl_mean": 0.2, "kl_last": 0.1, "logprob_error": 0.3, "top1_agreement": 0.5}
    folder, out = tmp_path / "results", tmp_path / "r.html"
    folder.mkdir()
    arms = ("full_prefill", "full_reuse", "epic16")
    with (folder / "rows.jsonl").open("w") as file:
        for arm in arms:
            for prompt in range(3):
                row = make_row(arm, prompt, **quality, delta_nll=0.1, greedy_agreement=0.5)
                config = {"model": "smollm2", "arms": {name: {} for name in arms}}
                said = {"config": config, "device": "a CPU"}
                file.write(json.dumps(row | said) + "\n")
    code, _, err = invoke("report", folder, "--out", out)
    assert code == 0, err
    page = seen(out)
    assert "9 measurements of 3 arms and 3 prompts, on a CPU." in page.text
    assert "epic16" in page.text and "model: smollm2" in page.text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--out", "x.pdf"], "want a file that ends in .html"),
        (["--out", "nowhere/x.html"], "there is no folder nowhere"),
        (["--out", "x.html", "--target", "200%"], "target: got '200%'"),
        (["--out", "x.html", "--profile", "h1"], "no file; GPU: got 'h1'"),
    ],
)
def test_what_is_wrong_is_told_and_nothing_written(
    trace: Path, args: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trace.parent)
    code, _, err = invoke("report", trace, *args)
    assert code == 2
    assert message in err
    assert sorted(p.name for p in trace.parent.iterdir()) == ["clock.jsonl"]


@pytest.mark.parametrize("name", ["rag", "chat", "skills"])
def test_an_export_shows_the_same_reuse_and_no_text(name: str, tmp_path: Path) -> None:
    trace, out = tmp_path / "t.jsonl", tmp_path / "hashed.jsonl"
    made = f"{name}:{'sessions' if name == 'chat' else 'count'}=20"
    assert invoke("trace", "make", made, "--out", trace)[0] == 0
    options = ["--chunker", "explicit"]
    assert invoke("trace", "export", trace, "--out", out, *options)[0] == 0
    before, after = list(read(trace)), list(read(out))
    assert [r.input_tokens for r in before] == [r.input_tokens for r in after]
    begun = before[0].timestamp
    assert [round(r.timestamp - begun, 1) for r in before] == [r.timestamp for r in after]
    sessions = [len({r.session for r in each}) for each in (before, after)]
    assert sessions[0] == sessions[1]
    chunker = CHUNKERS.build("explicit")
    shares = [
        [r.tokens() for r in analyse(each, chunker, scope="trace", spans=True)]
        for each in (before, after)
    ]
    assert shares[0] == shares[1]
    # Nothing but lengths and hashes is left; and another export hashes otherwise.
    lines = out.read_text()
    assert '"tokens"' not in lines and not re.search(rf'"{name} [0-9]|question|"chat [0-9]', lines)
    again = tmp_path / "again.jsonl"
    assert invoke("trace", "export", trace, "--out", again, *options)[0] == 0
    hashes = [set(re.findall(r'"([0-9a-f]{24})"', p.read_text())) for p in (out, again)]
    assert hashes[0] and not hashes[0] & hashes[1]


def test_block_ids_cannot_be_exported(tmp_path: Path) -> None:
    trace = tmp_path / "b.jsonl"
    row = {"timestamp": 1, "input_length": 512, "output_length": 1, "hash_ids": [1]}
    trace.write_text(json.dumps(row) + "\n")
    code, _, err = invoke("trace", "export", trace, "--out", tmp_path / "x.jsonl")
    assert (code, "no token ids" in err) == (2, True)
    assert not (tmp_path / "x.jsonl").exists()
