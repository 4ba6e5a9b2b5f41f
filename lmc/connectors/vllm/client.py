"""What a client of the engine calls: parameters that are checked before they are sent."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from lmc.connectors.vllm.config import LMCConfig
from lmc.connectors.vllm.request import parse_request


def kv_transfer_params(
    prompt_tokens: int,
    *,
    chunks: Sequence[tuple[int, int]] | None = None,
    blend: Mapping[str, Any] | str | None = None,
    save: bool = True,
    enabled: bool = True,
    explain: bool = False,
    hand_over: str | None = None,
    handed: str | None = None,
    config: LMCConfig | None = None,
) -> dict[str, Any]:
    """`kv_transfer_params` of one request: the field of that name of vLLM's OpenAI server, or
    `SamplingParams(extra_args={"kv_transfer_params": ...})`.

    Args:
        prompt_tokens: T, to check the spans against.
        chunks: token spans `(start, end)` to store and find as one (`lmc.prompt` gives them);
            None leaves it to the engine's chunker.
        blend: the strategy; None is the engine's own.
        save: whether the request's KV is stored.
        enabled: false serves it without lmc.
        explain: have the report say of every token what became of it and why (`lmc explain`).
        hand_over: a name, which nobody else has, under which another engine that shares a tier
            finds the KV of this prompt as it is here, blended or not.
        handed: of the very prompt that another engine was given with `hand_over`, that name. It
            is waited for, `fetch_patience_s` seconds at most.
        config: the engine's settings, where they name further strategies or other limits.

    Raises:
        ValueError: what the server would answer with a plain prefill and `bad_request`.
    """
    raw: dict[str, Any] = {"save": save, "enabled": enabled, "explain": explain}
    if chunks is not None:
        raw["chunks"] = [list(span) for span in chunks]
    if blend is not None:
        raw["blend"] = blend if isinstance(blend, str) else dict(blend)
    names = {"hand_over": hand_over, "handed": handed}
    raw |= {key: name for key, name in names.items() if name is not None}
    parse_request(raw, prompt_tokens, config or LMCConfig(hand_over=True))
    return {"lmc": raw}


def drain(llm: Any, timeout_s: float = 60.0) -> None:
    """Return once every chunk that finished requests of `llm` computed can be found.

    Chunks are copied out behind the model's back. An engine in this process does nothing
    unless stepped, so this steps it; one in its own process goes on by itself.

    Raises:
        TimeoutError: the copies took longer than `timeout_s` seconds.
    """
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)
    deadline = time.monotonic() + timeout_s
    late = TimeoutError(f"chunks were still being stored after {timeout_s} s")
    if core is None:
        # Chunks that are computed once more come in steps of their own.
        while any(llm.collective_rpc("encodes_left", timeout=timeout_s)):
            if time.monotonic() > deadline:
                raise late
            time.sleep(0.05)
        llm.collective_rpc("finish_saves", timeout=timeout_s)
        time.sleep(0.2)  # the scheduler hears of it with its next step, milliseconds later
        return
    while core.scheduler.has_requests():
        if time.monotonic() > deadline:
            raise late
        llm.llm_engine.step()
        time.sleep(0.001)  # as vLLM's own loop does: the thread that copies needs a core, too
