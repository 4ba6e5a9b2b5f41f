"""What stands before vLLM's OpenAI server, and checks what its clients ask of lmc.

    --middleware lmc.connectors.vllm.front.Front

Without it a wrong parameter costs its request the reuse and nothing else. With it the client is
told, by a 400 that names what is wrong, and may say which texts of a prompt are documents: `texts`,
which the server finds among the tokens, where a client has no tokenizer.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from lmc.connectors.vllm.config import Limits, LMCConfig, load_config
from lmc.connectors.vllm.request import parse_request

NAME = "kv_transfer_params"
# Others pass the parameters on too, and vLLM renders their prompts in other ways.
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"


class Front:
    """ASGI middleware for vLLM's server; a request without lmc parameters passes untouched."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._config: LMCConfig | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Nothing of whom vLLM will not let in is read.
        if not (_may_say(scope) and _authentic(self._app, scope)):
            return await self._app(scope, receive, send)
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        body = await _read(receive)
        if body is None:  # the client has gone
            return None
        if NAME.encode() in body or b"\\u" in body:  # which may write the same
            try:
                body = await self._checked(scope, path, body)
            except ValueError as error:
                response = JSONResponse(_error(str(error)), status_code=400)
                return await response(scope, receive, send)
            headers = MutableHeaders(scope=scope)
            headers["content-length"] = str(len(body))
        return await self._app(scope, _again(body, receive), send)

    async def _checked(self, scope: Scope, path: str, body: bytes) -> bytes:
        """The body that vLLM gets; ValueError for parameters that are wrong."""
        try:
            sent = json.loads(body)
        except (ValueError, RecursionError):
            return body  # vLLM says so itself
        params = sent.get(NAME) if isinstance(sent, dict) else None
        if not isinstance(params, dict) or params.get("lmc") is None:
            return body
        state = scope["app"].state
        config = self._config = self._config or _config(state)
        if config is None:
            return body
        raw = params["lmc"]
        if not isinstance(raw, dict):
            parse_request(raw, 1, config)  # which says what it is
        texts, rest = raw.get("texts"), {k: v for k, v in raw.items() if k != "texts"}
        if texts is not None and path not in (CHAT, COMPLETION):
            raise ValueError(f"lmc parameter texts: want {CHAT} or {COMPLETION}, got {path}")
        if texts is None and rest.get("chunks") is None:
            parse_request(rest, 1, config)
            return body
        if texts is not None:
            check_texts(texts, rest, config.limits)
        parse_request(rest | {"chunks": None}, 1, config)
        try:
            prompts = await _rendered(state, path, sent)
        except Exception:  # whatever is wrong with it, vLLM says so itself
            return body
        for prompt in prompts:
            if texts is not None:
                placed = await asyncio.to_thread(with_places, prompt, _tokenizer(state, path))
                rest["chunks"] = spans_of(texts, placed, len(prompts))
            parse_request(rest, len(prompt["prompt_token_ids"]), config)
        if texts is None:
            return body
        return json.dumps(sent | {NAME: params | {"lmc": rest}}).encode()


def check_texts(texts: Any, rest: Mapping[str, Any], limits: Limits) -> None:
    """Raise ValueError unless `texts` are texts, no more than spans may be, beside no spans."""
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("lmc parameter texts must be a list of texts of the prompt")
    if len(texts) > limits.spans:
        raise ValueError(
            f"lmc parameter texts: got {len(texts)}, allowed: {limits.spans} "
            "(limits.spans of the engine's config)"
        )
    if rest.get("chunks") is not None:
        raise ValueError("lmc parameter texts: got chunks too, want one of them")


def spans_of(texts: Sequence[str], prompt: Mapping[str, Any], prompts: int) -> list[list[int]]:
    """Where texts are among the tokens of a prompt: the tokens that are wholly within.

    White space at the ends of a text counts for nothing, since chat templates cut it off. Linear
    in the prompt.

    Args:
        texts: in the order in which they stand in the prompt.
        prompt: as vLLM renders one, with `prompt` and `prompt_token_offsets`.
        prompts: how many the request has.

    Raises:
        ValueError: a text that is not there, or not behind the one before; a prompt without text.
    """
    text, offsets = prompt.get("prompt"), prompt.get("prompt_token_offsets")
    if prompts > 1:
        raise ValueError(f"lmc parameter texts: got {prompts} prompts, want one a request")
    if text is None or offsets is None:
        raise ValueError(
            "lmc parameter texts: this prompt is not text that the model's tokenizer tells the "
            "places of; want chunks, as spans of tokens"
        )
    places = np.array(offsets, np.int64).reshape(-1, 2)
    tokens = np.flatnonzero(places[:, 1] > places[:, 0])  # special ones have no place
    starts, ends = places[tokens, 0], places[tokens, 1]
    spans, at = [], 0
    for i, wanted in enumerate(texts):
        stripped = wanted.strip()
        begin = text.find(stripped, at) if stripped else -1
        if begin < 0:
            raise ValueError(
                f"lmc parameter texts[{i}]: got {wanted[:80]!r}, which is not in the prompt "
                f"behind the texts before it"
            )
        at = begin + len(stripped)
        first = int(np.searchsorted(starts, begin))
        last = int(np.searchsorted(ends, at, "right"))
        if first < last:  # else less than a token, or cut off by `truncate_prompt_tokens`
            spans.append([int(tokens[first]), int(tokens[last - 1]) + 1])
    return spans


def with_places(prompt: Mapping[str, Any], tokenizer: Any) -> Mapping[str, Any]:
    """A prompt with its text and the places of its tokens, where the tokenizer can tell them.

    vLLM has tokens alone of a chat where clients may send embeddings (`--enable-prompt-embeds`),
    and of a prompt that was sent so. Their text counts if its tokens are those of the prompt.
    """
    if prompt.get("prompt_token_offsets") is not None or not getattr(tokenizer, "is_fast", False):
        return prompt
    ids = prompt["prompt_token_ids"]
    try:
        text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        again = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    except Exception:  # ids that it does not have, of which vLLM says so
        return prompt
    if list(again["input_ids"]) != list(ids):
        return prompt
    return {**prompt, "prompt": text, "prompt_token_offsets": again["offset_mapping"]}


def _tokenizer(state: Any, path: str) -> Any:
    serving = state.openai_serving_chat if path == CHAT else state.openai_serving_completion
    return serving.online_renderer.renderer.get_tokenizer()


async def _rendered(state: Any, path: str, sent: dict[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The prompts of a request as vLLM's own renderer has them: ids, and where it can text."""
    wanted = sent | {"return_token_offsets": True}
    if path == CHAT:
        chat = ChatCompletionRequest.model_validate(wanted)
        found = await state.openai_serving_chat.online_renderer.render_chat(chat)
        prompts = found[1]  # an answer that is an error has no items
    elif path == COMPLETION:
        completion = CompletionRequest.model_validate(wanted)
        prompts = await state.openai_serving_completion.online_renderer.render_completion(
            completion
        )
    else:
        raise ValueError(f"{path} is rendered in other ways")
    if isinstance(prompts, ErrorResponse):
        raise ValueError(prompts.error.message)
    if any("prompt_token_ids" not in prompt for prompt in prompts):
        raise ValueError("a prompt that is no tokens, as embeddings are")
    return list(prompts)


def _config(state: Any) -> LMCConfig | None:
    """The engine's settings; None where its connector is another."""
    transfer = state.vllm_config.kv_transfer_config
    if transfer is None or transfer.kv_connector != "LMCConnector":
        return None
    return load_config(transfer.kv_connector_extra_config)


def _may_say(scope: Scope) -> bool:
    """Whether a request may have parameters of lmc: one that sends JSON."""
    return (
        scope["type"] == "http"
        and scope["method"] == "POST"
        and "json" in Headers(scope=scope).get("content-type", "")
    )


def _authentic(app: Any, scope: Scope) -> bool:
    """Whether vLLM lets the client in: middleware that is added by flag comes before its check."""
    while app is not None:
        if isinstance(app, AuthenticationMiddleware):
            return app.verify_token(Headers(scope=scope))
        app = getattr(app, "app", None)
    return True


async def _read(receive: Receive) -> bytes | None:
    """The body of a request; None when its client goes away."""
    parts, more = [], True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


def _again(body: bytes, receive: Receive) -> Receive:
    """What tells a body in one piece, and then what comes."""
    told = False

    async def tell() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return tell


def _error(message: str) -> dict[str, Any]:
    """As OpenAI's and vLLM's servers put it."""
    what = {"type": "BadRequestError", "param": f"{NAME}.lmc", "code": 400}
    return {"error": {"message": message} | what}
