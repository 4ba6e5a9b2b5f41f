"""A request as lmc reads it, and what of an error in doing so concerns others."""

from __future__ import annotations

from array import array
from dataclasses import replace
from typing import Any

import numpy as np
from blake3 import blake3
from vllm.logger import init_logger

from lmc.blend.baselines import Prefix
from lmc.chunking.pieces import split
from lmc.connectors.vllm.config import LMCConfig
from lmc.connectors.vllm.gate import QualityGate
from lmc.connectors.vllm.namespaces import Namespace
from lmc.connectors.vllm.request import RequestOptions, parse_request
from lmc.connectors.vllm.tracked import Tracked, unblendable

logger = init_logger(f"vllm.{__name__}")  # else vLLM prints none of it

_told: set[type[BaseException]] = set()
FATAL = (KeyboardInterrupt, SystemExit, GeneratorExit)  # meant for the process, not for a request


class Reader:
    """Reads requests as they come."""

    def __init__(self, config: LMCConfig, gate: QualityGate, namespace: Namespace) -> None:
        self._config, self._gate, self._namespace = config, gate, namespace
        self._chunker = config.build_chunker()

    def read(self, request: Any, refusal: str | None) -> Tracked:
        """The request's options, or why it is served as if lmc were not there.

        Args:
            refusal: why nothing is stored or reused in this engine, or None.
        """
        if refusal:
            return Tracked(request, None, f"engine:{refusal}")
        lora = request.lora_request
        if reason := unblendable(request) or self._namespace.adapters.refusal(lora):
            return Tracked(request, None, reason)
        try:
            params = request.kv_transfer_params or {}
            options = parse_request(params.get("lmc"), request.num_prompt_tokens, self._config)
            options = bound(options, request.prompt_token_ids)
            options, gate = self._gate.admit(options, adapted=lora is not None)
            if params.get("do_remote_decode") and options.strategy.moves:
                # Another connector takes its KV to an engine that believes it to be exact.
                options, gate = replace(options, strategy=Prefix()), "its KV goes to another engine"
        except BaseException as error:
            survive(error, quiet=True)
            return Tracked(request, None, f"bad_request:{error!s:.500}")
        if not options.enabled:
            return Tracked(request, None, "disabled")
        tracked = Tracked(request, options, None, gate=gate)
        self.read_tokens(tracked)
        return tracked

    def read_tokens(self, tracked: Tracked) -> None:
        """Take in the tokens that a request has by now, and what its KV must be compatible with."""
        assert tracked.options is not None
        options, request = tracked.options, tracked.request
        of = (request.cache_salt, request.lora_request, options.handed)
        tracked.namespace = self._namespace.of(*of)
        tracked.scope = tracked.namespace + repr(options.strategy).encode()
        # Through an array, which reads a list in half the time that numpy takes.
        tracked.tokens = np.frombuffer(array("q", request.all_token_ids[:]), np.int64)
        longest = self._config.limits.chunk_tokens
        tracked.pieces = split(tracked.tokens, self._chunker, options.chunks, longest)


def bound(options: RequestOptions, prompt: list[int]) -> RequestOptions:
    """With a name of what is handed over that stands for this very prompt: of another one nothing
    is found under it."""
    if options.hand_over is None and options.handed is None:
        return options
    digest = blake3(array("q", prompt).tobytes()).hexdigest()
    hand_over, handed = (
        None if name is None else f"{name} {digest}" for name in (options.hand_over, options.handed)
    )
    return replace(options, hand_over=hand_over, handed=handed)


def survive(error: BaseException, quiet: bool = False) -> None:
    """Raise what is meant for the process; of all else, one request's affair, say what it was.

    A library may panic, which is no Exception.
    """
    if isinstance(error, FATAL):
        raise error
    if not quiet:
        # Once a kind: whoever can cause one can cause many.
        told = logger.debug if type(error) in _told else logger.error
        _told.add(type(error))
        told("lmc leaves a request to vLLM", exc_info=error)
