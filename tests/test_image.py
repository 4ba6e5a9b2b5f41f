"""The CPU image, built for real: no docker, and no registry of images is asked.

Slow. buildah executes every line of the Dockerfile, on a base that debootstrap makes of the same
release of Debian as the one it names; then the image serves the model that comes with it. Needs
root, and Debian's packages buildah and debootstrap.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest

from lmc.experiment.vllm.servers import free_port

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "deploy/Dockerfile.cpu"
PIP_KEYS = ("index-url", "extra-index-url", "find-links", "trusted-host")
CERTIFICATE = "/run/certificate.crt"
pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.engine]


def run(*command: object, cwd: Path, **options: object) -> str:
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        capture_output=True,
        text=True,
        **options,  # type: ignore[call-overload]
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return str(done.stdout)


class Buildah:
    """buildah with images and scratch files of its own, all below one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {
            "TMPDIR": str(folder / "tmp"),
            "BUILDAH_ISOLATION": "chroot",
        }
        (folder / "tmp").mkdir()

    def command(self, *words: object) -> list[str]:
        state = ("--root", self.folder / "images", "--runroot", self.folder / "run")
        return ["buildah", *map(str, state), *map(str, words)]

    def __call__(self, *words: object) -> str:
        return run(*self.command(*words), cwd=ROOT, env=self.environment).strip()


@pytest.fixture(scope="module")
def buildah(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Buildah]:
    for tool in ("buildah", "debootstrap"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} on this machine: apt-get install {tool}")
    if os.getuid():
        pytest.skip("debootstrap needs root")
    folder = tmp_path_factory.mktemp("image")
    yield Buildah(folder)
    shutil.rmtree(folder)  # 10 GB


@pytest.fixture(scope="module")
def image(buildah: Buildah) -> str:
    """The image of deploy/Dockerfile.cpu."""
    (base,) = {m[1] for m in re.finditer(r"^FROM (\S+)", DOCKERFILE.read_text(), re.MULTILINE)}
    release = re.fullmatch(r"debian:(\w+)-\d+-slim", base)
    assert release, base
    tree = buildah.folder / "base"
    run("debootstrap", "--variant=minbase", release[1], tree, mirror(release[1]), cwd=ROOT)
    container = buildah("from", "scratch")
    buildah("add", container, tree, "/")
    buildah("commit", "--rm", container, f"docker.io/library/{base}")
    secret, volumes = pip_settings(buildah.folder)
    buildah(
        "build", "--pull-never", "--layers=false", "--format", "docker", *volumes,
        "--secret", f"id=pip,src={secret}", "-f", DOCKERFILE, "-t", "lmc:cpu", ROOT,
    )  # fmt: skip
    return "lmc:cpu"


def mirror(release: str) -> str:
    """Where this machine's apt has that release from."""
    shown = "$(CREATED_BY) $(CODENAME) $(REPO_URI)"
    for line in run("apt-get", "indextargets", "--format", shown, cwd=ROOT).splitlines():
        kind, codename, uri = line.split()
        if (kind, codename) == ("Packages", release):
            return uri
    pytest.skip(f"apt on this machine has no mirror of {release}")


def pip_settings(folder: Path) -> tuple[Path, list[str]]:
    """pip.conf with where pip finds packages on this machine, and the mounts that it needs."""
    found: dict[str, str] = {}
    for line in run(sys.executable, "-m", "pip", "config", "list", cwd=ROOT).splitlines():
        key, _, value = line.partition("=")
        found.setdefault(key.rpartition(".")[2], value.strip("'"))
    settings = {key: found[key].replace("\\n", " ") for key in PIP_KEYS if key in found}
    volumes = []
    for place in re.findall(r"(?:^|\s|file://)(/\S+)", " ".join(settings.values())):
        if Path(place).exists():
            volumes += ["--volume", f"{place}:{place}:ro"]
            # An index of files beside each other refers to them by relative paths.
            if (files := Path(place).with_name("files")).is_dir():
                volumes += ["--volume", f"{files}:{files}:ro"]
    if "cert" in found:
        settings["cert"] = CERTIFICATE
        volumes += ["--volume", f"{found['cert']}:{CERTIFICATE}:ro"]
    lines = [f"{key} = {value}" for key, value in settings.items()]
    (folder / "pip.conf").write_text(
        "\n".join(["[global]", *lines, ""]).replace(" file:", "\n file:")
    )
    return folder / "pip.conf", volumes


@pytest.fixture
def container(buildah: Buildah, image: str) -> Iterator[str]:
    made = buildah("from", "--pull-never", image)
    yield made
    buildah("rm", made)


@pytest.mark.timeout(3600)
def test_every_line_of_the_dockerfile_is_executed(buildah: Buildah, container: str) -> None:
    def inside(*command: str) -> str:
        return buildah("run", container, "--", *command)

    assert inside("id", "-u") == "10001"
    assert inside("lmc", "--version") == "0.1.0"
    code = "import torch, vllm, lmc.connectors.vllm; print(vllm.__version__, torch.__version__)"
    assert inside("python", "-c", code).splitlines()[-1].startswith("0.32.0 2.13.0")
    assert "--config" in inside("lmc", "serve", "--help")
    inside("sh", "-c", "echo kv > /var/cache/lmc/mine && mkdir ~/.cache/mine")
    assert inside("stat", "-c", "%a %U", "/var/cache/lmc") == "700 lmc"
    # What developing takes is left behind, pip and the sources among it.
    left = "from importlib.util import find_spec; print(*map(find_spec, ['pip', 'pytest', 'mypy']))"
    assert inside("python", "-c", left) == "None None None"
    assert inside("sh", "-c", "ls -d /src /etc/pip.conf 2>/dev/null | wc -l") == "0"


def test_nothing_of_the_build_machine_is_in_the_image(buildah: Buildah, image: str) -> None:
    known = json.loads(buildah("inspect", "--type", "image", image))["Docker"]
    config = known["config"]
    assert config["Entrypoint"] == ["lmc", "serve"]
    assert config["User"] == "10001" and list(config["ExposedPorts"]) == ["8000/tcp"]
    assert "/health" in config["Healthcheck"]["Test"][-1]
    assert [e.partition("=")[0] for e in config["Env"]] == ["PATH"]
    assert CERTIFICATE not in json.dumps(known) and "index" not in json.dumps(known["history"])


@pytest.mark.timeout(1200)
def test_it_serves_the_model_that_comes_with_it(buildah: Buildah, container: str) -> None:
    """The entry point as a user runs it, the loopback its only network that is asked."""
    port = free_port()
    entry = json.loads(buildah("inspect", container))["Docker"]["config"]["Entrypoint"]
    command = buildah.command(
        "run", "--env", "VLLM_CPU_KVCACHE_SPACE=1", container, "--", *entry, "smollm2",
        "--host", "127.0.0.1", "--port", port, "--max-model-len", "512", "--dtype", "float32",
    )  # fmt: skip
    log = buildah.folder / "server.log"
    with log.open("w") as out:
        server = subprocess.Popen(
            command, env=buildah.environment, stdout=out, stderr=out, start_new_session=True
        )
    deadline = time.monotonic() + 900  # it makes the model, and compiles
    try:
        while not answers(f"http://127.0.0.1:{port}/health"):
            alive = server.poll() is None and time.monotonic() < deadline
            assert alive, log.read_text()[-5000:]
            time.sleep(2)
        body = {"model": "smollm2", "prompt": "The capital of France is", "max_tokens": 4}
        request = Request(
            f"http://127.0.0.1:{port}/v1/completions",
            json.dumps(body | {"temperature": 0}).encode(),
            {"Content-Type": "application/json"},
        )
        with urlopen(request, timeout=120) as response:
            assert "Paris" in json.load(response)["choices"][0]["text"]
        assert "exact prefixes, and chunks moved by epic" in log.read_text()
    finally:
        try:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGTERM)
            server.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait(60)


def answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (URLError, TimeoutError, ConnectionError):
        return False
