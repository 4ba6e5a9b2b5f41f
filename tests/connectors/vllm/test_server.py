"""`lmc serve` with clients over HTTP: chats, spans as texts, and what is wrong with a request.

Compiled as vLLM does by default, with its prefix cache on.
"""

from __future__ import annotations

import json
import random
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from lmc.experiment.vllm.servers import Server, lmc_serve, running
from tests.connectors.vllm.server import chat_model

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]


def texts_of(seed: int) -> list[str]:
    """Three texts that share no chunk with those of other seeds."""
    rng = random.Random(seed)
    words = ("paper", "copper", "barley", "amber", "salt", "linen", "cedar", "wool")
    return [
        " ".join(
            f"Of {rng.choice(words)} {rng.randrange(999)} some is in room {rng.randrange(99)}."
            for _ in range(24)
        )
        for _ in range(3)
    ]


TEXTS = texts_of(0)
FLAGS = ("--max-model-len", "2048", "--dtype", "float32", "--max-num-seqs", "8")
ENVIRONMENT = {
    "VLLM_API_KEY": "k",
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
}


@pytest.fixture(scope="module")
def model(
    tiny_llama_dir: Path, smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return chat_model(tiny_llama_dir, smollm2_dir, tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the settings, the store and the logs."""
    path = tmp_path_factory.mktemp("served")
    disk = {"name": "disk", "path": str(path / "kv"), "capacity": "1GiB"}
    settings = {"memory_bytes": 256 << 20, "min_recovery": None, "tiers": [disk]}
    (path / "lmc.yaml").write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="module")
def server(model: Path, folder: Path) -> Iterator[Server]:
    command = [*lmc_serve(model, folder / "lmc.yaml"), *FLAGS]
    with running(command, folder / "log", ENVIRONMENT) as it:
        yield it


def client(server: Server, key: str = "k") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=300)


def name(server: Server) -> str:
    return client(server).models.list().data[0].id


def said(messages: list[dict[str, str]]) -> list[Any]:
    return messages


def ask(
    server: Server, messages: list[dict[str, str]], lmc: dict[str, Any] | None = None, n: int = 8
) -> tuple[str, dict[str, Any]]:
    """The answer, and what became of the prompt."""
    extra = {"kv_transfer_params": {"lmc": lmc}} if lmc is not None else {}
    answer = client(server).chat.completions.create(
        model=name(server), messages=said(messages), max_tokens=n,
        temperature=0, extra_body=extra | {"ignore_eos": True},
    )  # fmt: skip
    report = answer.model_dump()["kv_transfer_params"]["lmc"]
    assert sum(report["kinds"].values()) == report["prompt_tokens"] == answer.usage.prompt_tokens
    return answer.choices[0].message.content or "", report


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_compiled_rows_are_the_models_own(server: Server) -> None:
    """The loop over the layers is compared with the compiled model at start."""
    assert "chunks moved by epic" in server.log.read_text()


@pytest.mark.parametrize("told", [False, True])
def test_a_chat_goes_on(server: Server, told: bool) -> None:
    """The next turn finds the one before: in vLLM's cache, and when vLLM has dropped it.

    A random model answers with what is no text, and comes back as other tokens: the prompt it is.
    """
    texts = texts_of(1 + told)
    first = user("\n\n".join(texts) + "\n\nWhat is in room 9?")
    answer, before = ask(server, [first], {"texts": texts} if told else None, n=40)
    turn = [first, {"role": "assistant", "content": answer}, user("And in room 10?")]
    for dropped in (False, True):
        if dropped:
            server.post("/reset_prefix_cache")
        found, report = ask(server, turn, {})
        kinds = report["kinds"]
        exact = kinds["local"] + kinds["exact"]
        assert exact > before["prompt_tokens"] - 40, (kinds, before)
        assert (kinds["exact"] > 400) == dropped
        plain, _ = ask(server, turn, {"enabled": False})
        assert found == plain


def test_documents_are_found_in_another_order(server: Server) -> None:
    ask(server, [user("Now.\n" + "\n\n".join(TEXTS) + "\n\nWhat is it?")], {"texts": TEXTS})
    turned = [TEXTS[2], TEXTS[0], TEXTS[1]]
    prompt = [user("Then.\n" + "\n\n".join(turned) + "\n\nWho is it?")]
    moved, until = 0, time.monotonic() + 120
    while moved <= 500 and time.monotonic() < until:
        time.sleep(0.5)  # what was told of for the first time is computed alone once nothing runs
        _, report = ask(server, prompt, {"texts": turned, "blend": "full_reuse", "save": False})
        moved = report["kinds"]["moved"]
    assert moved > 500 and report["strategy"] == "full_reuse"
    assert report["reason"] is None


def test_an_answer_that_is_streamed(server: Server) -> None:
    messages = said([user("Streamed.\n" + TEXTS[1])])
    extra = {"kv_transfer_params": {"lmc": {"texts": TEXTS[1:2]}}, "ignore_eos": True}
    stream = client(server).chat.completions.create(
        model=name(server), messages=messages, max_tokens=8, temperature=0, stream=True,
        extra_body=extra,
    )  # fmt: skip
    pieces = [x.choices[0].delta.content or "" for x in stream if x.choices]
    assert "".join(pieces) == ask(server, [user("Streamed.\n" + TEXTS[1])], {})[0]


@pytest.mark.parametrize(
    ("lmc", "message"),
    [
        ({"chunkz": []}, "unknown lmc parameter 'chunkz'; valid: "),
        ({"texts": "a"}, "texts must be a list of texts"),
        ({"texts": ["not there"]}, r"texts[0]: got 'not there', which is not in the prompt"),
        ({"texts": [TEXTS[1], TEXTS[0]]}, "which is not in the prompt behind the texts before it"),
        ({"texts": TEXTS[:1], "chunks": [[0, 1]]}, "got chunks too"),
        ({"chunks": [[0, 9999]]}, "got span (0, 9999)"),
        ({"blend": "os:system"}, "lmc parameter blend: got 'os:system'"),
        ({"blend": {"name": "epic", "link_tokens": "x"}}, "link_tokens"),
        ({"save": 3}, "save must be true or false, got 3"),
        ([], "lmc parameters must be an object, got list"),
    ],
)
def test_what_is_wrong_is_said(server: Server, lmc: Any, message: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(server, [user("\n".join(TEXTS))], lmc)
    body: Any = caught.value.body
    assert message in body["message"] and body["param"] == "kv_transfer_params.lmc"
    with pytest.raises(openai.BadRequestError) as caught:
        client(server).completions.create(
            model=name(server), prompt="\n".join(TEXTS), max_tokens=1,
            extra_body={"kv_transfer_params": {"lmc": lmc}},
        )  # fmt: skip
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "lmc", [{"texts": TEXTS[:1]}, {"chunks": [[0, 4]]}], ids=["texts", "chunks"]
)
def test_what_vllm_itself_refuses_it_says_itself(server: Server, lmc: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client(server).completions.create(
            model=name(server), prompt="\n".join(TEXTS), max_tokens=1, suffix="no model does this",
            extra_body={"kv_transfer_params": {"lmc": lmc}},
        )  # fmt: skip
    assert "suffix" in str(caught.value)


def test_who_has_no_key_is_told_nothing(server: Server) -> None:
    stranger = client(server, "wrong")
    for lmc in ({"texts": TEXTS}, {"chunkz": []}):
        with pytest.raises(openai.AuthenticationError):
            stranger.chat.completions.create(
                model="x", messages=said([user(TEXTS[0])]),
                extra_body={"kv_transfer_params": {"lmc": lmc}},
            )  # fmt: skip


@pytest.mark.slow
def test_the_plain_command_does_the_same_after_a_restart(
    server: Server, folder: Path, tmp_path: Path
) -> None:
    """What `lmc serve` printed is vLLM's own command; it finds on the disk what was stored."""
    texts = texts_of(3)  # of which nothing is known yet: what is moved is not stored as exact
    turn = [user("Restarted.\n" + "\n\n".join(texts) + "\n\nWhat is in room 3?")]
    answer, before = ask(server, turn, {"texts": texts}, n=40)
    turn += [{"role": "assistant", "content": answer}, user("And in room 4?")]
    lines = server.log.read_text().splitlines()
    plain = shlex.split(lines[next(i for i, x in enumerate(lines) if "the same without" in x) + 1])
    plain = plain[: plain.index("--host")]  # and the port
    with running([sys.executable, *plain[1:]], tmp_path / "log", ENVIRONMENT) as again:
        _, report = ask(again, turn)
        assert report["kinds"]["exact"] > before["prompt_tokens"] - 40, (before, report)
        with pytest.raises(openai.BadRequestError):
            ask(again, turn, {"chunkz": []})
