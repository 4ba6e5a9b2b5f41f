"""The worker class: hands the model to the connector, which vLLM does not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector
from vllm.distributed.parallel_state import get_pp_group
from vllm.model_executor.models.interfaces import supports_multimodal
from vllm.platforms import current_platform

from lmc.connectors.vllm.connector import LMCConnector
from lmc.connectors.vllm.lora import Loras
from lmc.connectors.vllm.worker import WorkerSide

if TYPE_CHECKING or current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker
else:
    from vllm.v1.worker.gpu_worker import Worker


class LMCWorker(Worker):
    """vLLM's worker of this platform.

    After warm-up the connector gets the model and checks it; and it is told of each way in which
    vLLM changes the model's weights, before KV of the old ones can be taken for the new ones'.
    """

    def compile_or_warm_up_model(self) -> Any:
        result = super().compile_or_warm_up_model()
        if connector := _connector():
            runner = self.model_runner
            lora_manager = getattr(runner, "lora_manager", None)
            model: Any = runner.get_model()
            if supports_multimodal(model):
                model = model.get_language_model()  # a request with more than text is vLLM's alone
            connector.take_model(model, lora_manager)
            _stand_in(runner, connector.worker)
            if lora_manager is not None and current_platform.is_cpu():
                Loras(lora_manager).stand_in(runner)
        return result

    def sample_tokens(self, *arguments: Any, **options: Any) -> Any:
        with _own_draws(self.model_runner):
            return super().sample_tokens(*arguments, **options)

    def finish_saves(self) -> None:
        """Return when every chunk computed so far is stored (`collective_rpc("finish_saves")`)."""
        if side := _side():
            side.finish_saves()

    def encodes_left(self) -> int:
        """How many chunks the scheduler has yet to have computed alone."""
        side = _side()
        return side.encodes_left if side else 0

    def name_weights(self, version: str) -> None:
        """Say which weights these are now, after an update (`collective_rpc("name_weights", ...)`).

        Engines on the same files that are told the same name share what they store.
        """
        if not version:
            raise ValueError("version: got an empty name")
        self._weights_changed(version)

    def reload_weights(self, *arguments: Any, **options: Any) -> None:
        with self._changing(None if arguments or options else ""):  # "": from the model's files
            super().reload_weights(*arguments, **options)

    def update_weights(self, *arguments: Any, **options: Any) -> None:
        with self._changing():
            super().update_weights(*arguments, **options)

    def finish_weight_update(self) -> None:
        with self._changing():
            super().finish_weight_update()

    def reset_weights(self) -> None:
        with self._changing():
            super().reset_weights()

    def sleep(self, level: int = 1) -> None:
        if side := _side():
            side.lose_pages()
        super().sleep(level)
        if level > 1:
            self._weights_changed(None)

    def discard(self, tags: tuple[str, ...]) -> None:
        if side := _side():
            side.lose_pages()  # as for `sleep`: `release_kv_cache_memory` lets pages go too
        super().discard(tags)

    @contextmanager
    def _changing(self, version: str | None = None) -> Iterator[None]:
        """Around what changes weights, perhaps in part where it fails."""
        try:
            yield
        except BaseException:
            self._weights_changed(None)
            raise
        self._weights_changed(version)

    def _weights_changed(self, version: str | None) -> None:
        side = _side()
        if side and side.watch:
            side.watch.changed(version)


@contextmanager
def _own_draws(runner: Any) -> Iterator[None]:
    """Rows whose token is thrown away draw it from no generator of their own, on a CPU.

    vLLM 0.32 samples such rows too (a prompt computed in several steps) and winds the generator of
    a request with a `seed` back, which a CPU's cannot: the error ends the engine.
    """
    batch = getattr(runner, "input_batch", None)
    if batch is None or not batch.generators or not current_platform.is_cpu():
        yield
        return
    discarded = runner.discard_request_mask.np
    own = {row: batch.generators.pop(row) for row in list(batch.generators) if discarded[row]}
    try:
        yield
    finally:
        batch.generators.update(own)


def _stand_in(runner: Any, side: WorkerSide | None) -> None:
    """Have the runner take hidden states that lmc has computed for those of its own forward.

    Not where more than that is asked of the model: by a drafter, by a pooler, by another stage of a
    pipeline; nor of its attention layers, by a connector beside this one, which is told of each.
    """
    own = getattr(runner, "_model_forward", None)
    more = getattr(runner, "use_aux_hidden_state_outputs", True) or runner.is_pooling_model
    beside = isinstance(get_kv_transfer_group(), MultiConnector)
    if side is None or own is None or more or beside or get_pp_group().world_size > 1:
        return
    if not side.ends_rows():  # asked on all ranks, or on none
        return

    def forward(*arguments: Any, **named: Any) -> Any:
        ends = side.serving.take_ends(runner.input_batch.req_ids)
        return own(*arguments, **named) if ends is None else ends

    runner._model_forward = forward


def _connector() -> LMCConnector | None:
    """Ours, beside others too; None where there is no connector."""
    if not has_kv_transfer_group():
        return None
    group: Any = get_kv_transfer_group()
    some = group.sub_connectors if isinstance(group, MultiConnector) else [group]
    return next((one for one in some if isinstance(one, LMCConnector)), None)


def _side() -> Any:
    """The worker's side of the connector, if it stores anything."""
    connector = _connector()
    return connector.worker if connector else None
