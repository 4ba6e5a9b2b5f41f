"""What stands before the server: where texts are among tokens, and that nothing else is touched."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from lmc.connectors.vllm.front import Front, spans_of, with_places

pytest.importorskip("vllm", reason="the front stands before vLLM's server")

WORDS = st.text(st.sampled_from("abc xyzß\n\t漢🙂é.,"), min_size=1, max_size=30)


@pytest.fixture(scope="module")
def tokenizer(smollm2_dir: Path) -> Tokenizer:
    return Tokenizer.from_file(str(smollm2_dir / "tokenizer.json"))


def rendered(tokenizer: Tokenizer, text: str) -> dict[str, Any]:
    encoded = tokenizer.encode(text)
    return {
        "prompt": text, "prompt_token_ids": encoded.ids, "prompt_token_offsets": encoded.offsets
    }  # fmt: skip


@given(parts=st.lists(st.tuples(WORDS, WORDS.filter(lambda t: bool(t.strip()))), max_size=6))
def test_spans_are_the_tokens_within_the_texts(
    tokenizer: Tokenizer, parts: list[tuple[str, str]]
) -> None:
    """Ascending, none in two, and no token that is wholly within is left out."""
    prompt = rendered(tokenizer, "".join(between + text for between, text in parts))
    texts = [text for _, text in parts]
    expected, at = [], 0
    for text in texts:
        begin = prompt["prompt"].index(text.strip(), at)
        at = begin + len(text.strip())
        places = enumerate(prompt["prompt_token_offsets"])
        inside = [i for i, (a, b) in places if begin <= a < b <= at]
        if inside:  # else it is less than a token
            expected.append([inside[0], inside[-1] + 1])
    assert spans_of(texts, prompt, 1) == expected


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["two", "one"], "behind the texts before it"),
        (["  \n"], "texts[0]: got '  \\n'"),
        (["one", "three"], "texts[1]: got 'three'"),
    ],
)
def test_texts_that_are_not_there(tokenizer: Tokenizer, texts: list[str], message: str) -> None:
    with pytest.raises(ValueError, match="lmc parameter") as caught:
        spans_of(texts, rendered(tokenizer, "one\ntwo"), 1)
    assert message in str(caught.value)


def test_the_text_of_a_prompt_that_came_as_tokens(smollm2_dir: Path) -> None:
    """As of a server that takes embeddings too: vLLM tells neither text nor places then."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    text = "<|im_start|>user\nFirst: a b.\n\nSecond, 漢🙂é: c.<|im_end|>\n"
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = encoded["input_ids"]
    texts = ["First: a b.", "Second, 漢🙂é: c."]
    told = {"prompt": text, "prompt_token_ids": ids,
            "prompt_token_offsets": encoded["offset_mapping"]}  # fmt: skip
    alone = with_places({"prompt_token_ids": ids}, tokenizer)
    assert spans_of(texts, alone, 1) == spans_of(texts, told, 1)
    assert with_places(told, None) is told
    # Nobody can say where a text is in tokens that are no text's, or not those it is cut into.
    for odd in ([*tokenizer.encode("a"), *tokenizer.encode("b")], [1 << 40], [-1], [49_999_999]):
        prompt = {"prompt_token_ids": odd}
        assert with_places(prompt, tokenizer) is prompt


def test_a_prompt_that_is_no_text_or_several(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="want chunks"):
        spans_of(["one"], {"prompt_token_ids": [1]}, 1)
    with pytest.raises(ValueError, match="got 2 prompts"):
        spans_of(["one"], rendered(tokenizer, "one"), 2)


# -- as ASGI ---------------------------------------------------------------------------------


class Inner:
    """A server that keeps what it is sent."""

    def __init__(self) -> None:
        self.body: bytes | None = None
        self.headers: dict[bytes, bytes] = {}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.headers = dict(scope["headers"])
        self.body = b""
        while True:
            message = await receive()
            self.body += message["body"]
            if not message["more_body"]:
                break
        assert (await receive())["type"] == "http.disconnect"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})


def sent(
    body: bytes, pieces: int = 1, path: str = "/v1/chat/completions", key: str | None = None
) -> tuple[int, Inner]:
    """The status that a client sees, and the server that it came to, if it did.

    key: of a server that wants one, which is not sent.
    """
    extra = {"lmc": {}}
    transfer = SimpleNamespace(kv_connector="LMCConnector", kv_connector_extra_config=extra)
    state = SimpleNamespace(vllm_config=SimpleNamespace(kv_transfer_config=transfer))
    size = -(-len(body) // pieces)
    cut = [body[i * size : (i + 1) * size] for i in range(pieces)]
    messages = [
        {"type": "http.request", "body": piece, "more_body": i < pieces - 1}
        for i, piece in enumerate(cut)
    ] + [{"type": "http.disconnect"}]
    status: list[int] = []
    inner = Inner()

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        status.append(message.get("status", 0))

    scope = {
        "type": "http", "method": "POST", "path": path,
        "headers": [(b"content-length", b"1"), (b"content-type", b"application/json")],
        "app": SimpleNamespace(state=state),
    }  # fmt: skip
    app: Any = inner if key is None else AuthenticationMiddleware(inner, [key])
    asyncio.run(Front(app)(scope, receive, send))
    if key is not None:
        assert len(messages) == pieces + 1  # nothing of the body was taken
    return (status or [0])[0], inner


@given(
    body=st.one_of(
        st.binary(max_size=200),
        st.sampled_from([
            b"[" * 200_000 + b'"kv_transfer_params"',
            b'{"kv_transfer_params": null}',
            b'{"kv_transfer_params": {"other": 1}}',
            b'["kv_transfer_params"]',
            b'{"kv_transfer_params": {"lmc": null, "x": 1}}'.replace(b'"lmc": null, ', b""),
            b'{"kv_transfer_params": {"lmc": {"blend": "epic"}}, "a": NaN}',
        ]),
    ),
    pieces=st.integers(1, 4),
)  # fmt: skip
def test_what_is_not_lmcs_passes_as_it_is(body: bytes, pieces: int) -> None:
    status, inner = sent(body, pieces)
    assert (status, inner.body) == (200, body)


@pytest.mark.parametrize("lmc", [[], 3, None, "x", {"a": 1}, {"blend": 1e999}, {"texts": [1]}])
def test_what_is_wrong_goes_no_further(lmc: Any) -> None:
    status, inner = sent(json.dumps({"kv_transfer_params": {"lmc": lmc}}).encode())
    if lmc is None:  # as if there were none
        assert status == 200
        return
    assert (status, inner.body) == (400, None)


@pytest.mark.parametrize("path", ["/v1/responses", "/invocations", "/v1/chat/completions/batch"])
def test_wherever_it_is_sent(path: str) -> None:
    for lmc in ({"textz": 1}, {"texts": ["a"]}, {"save": 1}):
        status, inner = sent(json.dumps({"kv_transfer_params": {"lmc": lmc}}).encode(), path=path)
        assert (status, inner.body) == (400, None), lmc


def test_however_the_name_is_written() -> None:
    body = b'{"kv_transfer_param\\u0073": {"\\u006cmc": {"textz": 1}}}'
    assert sent(body)[0] == 400


def test_nothing_is_read_of_whom_the_server_does_not_let_in() -> None:
    body = json.dumps({"kv_transfer_params": {"lmc": {"textz": 1}}}).encode()
    assert sent(body, 3, key="secret")[0] == 401


def test_a_client_that_goes_away() -> None:
    inner = Inner()

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        raise AssertionError(message)

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}
    asyncio.run(Front(inner)(scope, receive, send))
    assert inner.body is None
