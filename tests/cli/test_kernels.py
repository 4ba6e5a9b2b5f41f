"""`lmc kernels`: what its rows say is what we promise, and kernels/README.md says the same."""

import dataclasses
import json
import math
import re

import pytest
import triton
import typer
from typer.testing import CliRunner

from lmc.cli import kernels as kernel_table
from lmc.cli.kernels import README, kernels, readme, roofline, rows, section
from lmc.kernels import spec as spec_module
from lmc.kernels import traffic
from lmc.kernels.aot import DTYPES, TARGETS
from lmc.kernels.spec import interpreted, load

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(interpreted(), reason="TRITON_INTERPRET replaces the compiler"),
]
SPECS = load()
each_kernel = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
BY_NAME = {spec.name: spec for spec in SPECS}


@pytest.fixture(scope="module")
def ratios():
    return traffic.measure()


@pytest.fixture(scope="module")
def page():
    text = README.read_text()
    if f"Triton {triton.__version__};" not in text:
        pytest.skip(f"{README.name} was made with another Triton than {triton.__version__}")
    return text


@each_kernel
def test_a_kernel_moves_little_more_than_the_floor(spec, ratios):
    """The binaries' side of the promise is in test_aot.py."""
    assert set(spec.traffic) == set(spec.aot), "every variant needs a case to count bytes on"
    for variant, dtypes in ratios[spec.name].items():
        for dtype, ratio in dtypes.items():
            assert 1 <= ratio <= (1.05 if spec.moves else math.inf), (variant, dtype)


@each_kernel
def test_the_page_has_the_rows_of_today(spec, ratios, page):
    found = list(rows(spec, ratios))
    stale = f"kernels/README.md is out of date on {spec.name}: run lmc kernels --write"
    assert section(spec.name, found) in page, stale
    # One register more would not have been found there.
    [row for row in found if row["status"] == "compiled"][-1]["registers"] += 1
    assert section(spec.name, found) not in page


def test_the_rest_of_the_page_is_of_today(page):
    parts = {part.partition("\n")[0]: f"## {part}" for part in re.split(r"^## ", page, flags=re.M)}
    # The kernels' own sections are taken as they are: the test above has compared them.
    sections = [parts[spec.name].rstrip("\n") + "\n" for spec in SPECS]
    assert readme(SPECS, sections) == page


def test_a_target_that_cannot_be_is_a_row_that_says_so():
    spec = BY_NAME["gather"]
    variant = next(iter(spec.aot))
    # It is not compiled either: no argument of this signature has a type.
    without = dataclasses.replace(
        spec, aot={variant: {}}, unsupported={variant: tuple(TARGETS)}, traffic={}
    )
    found = list(rows(without, {}))
    assert {row["status"] for row in found} == {"unsupported"}
    assert {row["registers"] for row in found} == {None}
    assert section("gather", found).count("unsupported |") == len(TARGETS) * len(DTYPES)


def test_roofline_of_a_chunk_of_llama():
    """Gather at 8,192 tokens: 1 GiB read, 1 GiB written, and 1 GiB over the bus."""
    first, second = roofline(BY_NAME["gather"])
    assert (first["tokens"], second["tokens"]) == (8192, 32768)
    assert first["hbm_ms"] == pytest.approx(2**31 / 3.35e9, rel=1e-4)
    assert first["bus_ms"] == pytest.approx(2**30 / 55e6, rel=1e-4)
    assert second["bytes"] == 4 * first["bytes"]
    assert first["bound"] == "memory"

    hot = dataclasses.replace(BY_NAME["gather"], flops=lambda c: 10**12 * c.T, bus=None)
    first, _ = roofline(hot)
    assert first["compute_ms"] == pytest.approx(8192e12 / 989e9)
    assert (first["bound"], first["bus_ms"]) == ("compute", None)


app = typer.Typer()
app.command()(kernels)


@pytest.fixture
def two_kernels(monkeypatch, ratios):
    """The command on two kernels; their bytes are counted already."""
    monkeypatch.setattr(spec_module, "KERNELS", ("gather", "checksum"))
    monkeypatch.setattr(traffic, "measure", lambda: ratios)


def test_json_has_a_row_for_every_variant_dtype_and_target(two_kernels):
    found = json.loads(CliRunner().invoke(app, ["--json"]).stdout)
    assert {(row["kernel"], row["case"], row["dtype"], row["target"]) for row in found} == {
        (name, variant, dtype, target)
        for name in ("gather", "checksum")
        for variant in BY_NAME[name].aot
        for dtype in DTYPES.values()
        for target in TARGETS
    }
    assert set(found[0]) == {
        "kernel", "case", "dtype", "target", "status", "registers", "spills", "shared_bytes",
        "load_bits", "store_bits", "bytes_over_floor",
    }  # fmt: skip


def test_terminal_shows_every_row_in_eighty_columns(two_kernels):
    printed = CliRunner().invoke(app).stdout
    assert printed.count("gfx942") == 3 * len(BY_NAME["gather"].aot) + 3
    assert "…" not in printed
    assert re.search(r"D128 +bf16 +sm_90 +\d+ +0 +0 +128 +128 +1\.0\d\d", printed)
    assert re.search(r"gather +8192 +2\.000", printed)


def test_write_writes_the_page(two_kernels, monkeypatch, tmp_path):
    monkeypatch.setattr(kernel_table, "README", tmp_path / "README.md")
    assert CliRunner().invoke(app, ["--write"]).exit_code == 0
    text = (tmp_path / "README.md").read_text()
    assert re.findall(r"^## (.*)$", text, flags=re.M) == [
        "How to read the tables", "gather", "checksum", "Other GPUs", "Roofline",
    ]  # fmt: skip


def test_an_interpreting_shell_is_told_so(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    run = CliRunner().invoke(app)
    assert run.exit_code == 2
    assert "TRITON_INTERPRET=1" in run.stderr
