"""LoRA adapters in a worker: what those it holds are, by their content, and rows under them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from blake3 import blake3
from vllm.lora.layers import LoRAMapping
from vllm.lora.lora_weights import LoRALayerWeights


class Loras:
    """The adapters that vLLM has loaded into one worker.

    An adapter is known by the weights that were loaded, not by its files, which may be others by
    now. They are digested once a load, on a thread of their own; nothing is read from disk.

    vLLM's modules apply to each row the adapter that the runner's mapping names for it. lmc's rows
    are not the runner's, so they get a mapping of their own, and the runner its own back.

    Args:
        manager: the model runner's `lora_manager`.

    Raises:
        AttributeError: one of another shape.
    """

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self._adapters = manager._adapter_manager
        self._adapters._last_mapping  # noqa: B018
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lmc-lora")
        self._digests: dict[int, tuple[Any, Future[bytes | str]]] = {}  # by id: weights, digest
        self._told: dict[int, bytes | str] = {}

    def look(self, expected: Mapping[int, bytes]) -> tuple[dict[int, bytes | str], bool]:
        """What adapters are that nobody was told of yet, and whether one is not as `expected`."""
        before, self._digests = self._digests, {}
        for lora, weights in self._adapters.list_adapters().items():
            known = before.get(lora)
            if known is None or known[0] is not weights:
                known = weights, self._thread.submit(digest_of, weights)
            self._digests[lora] = known
        done = {i: digest.result() for i, (_, digest) in self._digests.items() if digest.done()}
        news = {i: digest for i, digest in done.items() if self._told.get(i) != digest}
        self._told = {i: d for i, d in self._told.items() if i in self._digests} | done
        wrong = any(done.get(i) != d for i, d in expected.items() if i in self._digests)
        return news, wrong

    def rows(self, of: Sequence[tuple[int, int]]) -> None:
        """Of whom the rows of the next calls of modules are: (adapter, rows), 0 for none."""
        mapping = tuple(lora for lora, n in of for _ in range(n))
        self._manager.set_active_adapters(set(), LoRAMapping(mapping, (0,), is_prefill=True))

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """While open, modules are called on lmc's rows; then the runner's mapping is back."""
        before = self._adapters._last_mapping
        try:
            yield
        finally:
            if before is not None:
                self._manager.set_active_adapters(set(), before)

    def stand_in(self, runner: Any) -> None:
        """Have a CPU's runner look at prompts' logprobs of one request at a time.

        vLLM 0.32 gives the head the adapters of the rows that are sampled in this step, of which
        there are not as many as of a prompt; on a CPU the error ends the engine.
        """
        own = runner._get_prompt_logprobs_dict

        def one_by_one(hidden_states: torch.Tensor, scheduled: Mapping[str, int]) -> dict[str, Any]:
            asked: dict[str, int] = runner.num_prompt_logprobs
            found: dict[str, Any] = {}
            try:
                for name, logprobs in list(asked.items()):
                    request = runner.requests[name]
                    lora = request.lora_request.lora_int_id if request.lora_request else 0
                    of = (lora,) * _logprob_rows(request, scheduled.get(name, 0))
                    runner.num_prompt_logprobs = {name: logprobs}
                    with self.borrowed():
                        if of:
                            mapping = LoRAMapping(of, of, is_prefill=True)
                            self._manager.set_active_adapters(set(), mapping)
                        found |= own(hidden_states, scheduled)
                    if not runner.num_prompt_logprobs:  # these were the last of its prompt
                        del asked[name]
            finally:
                runner.num_prompt_logprobs = asked
            return found

        runner._get_prompt_logprobs_dict = one_by_one


def _logprob_rows(request: Any, scheduled: int) -> int:
    """Of how many of a prompt's tokens the runner asks for logprobs in this step."""
    left = len(request.prompt_token_ids or ()) - request.num_computed_tokens - 1
    return max(0, min(scheduled, left))


def digest_of(adapter: Any) -> bytes | str:
    """BLAKE3 of all that an adapter holds but its number; why there is none, if so."""
    state = blake3()
    try:
        _take_in(state, {name: x for name, x in vars(adapter).items() if name != "id"})
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return state.digest()


def _take_in(state: Any, value: Any) -> None:
    """Add a value to a digest, each kind so that it cannot pass for another."""
    match value:
        case torch.Tensor():
            state.update(f"tensor {value.dtype} {tuple(value.shape)};".encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            state.update(flat.view(torch.uint8).numpy())
        case LoRALayerWeights():
            _take_in(state, vars(value))
        case dict():
            state.update(f"dict {len(value)};".encode())
            for name in sorted(value):
                _take_in(state, name)
                _take_in(state, value[name])
        case list() | tuple():
            state.update(f"list {len(value)};".encode())
            for item in value:
                _take_in(state, item)
        case None | bool() | int() | float() | str():
            said = repr(value).encode()
            state.update(f"{type(value).__name__} {len(said)};".encode() + said)
        case _:
            raise TypeError(f"an adapter with a {type(value).__name__} cannot be digested")
