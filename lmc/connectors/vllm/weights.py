"""Whether the weights in a worker are still those that its KV was computed with."""

from __future__ import annotations

from typing import Any

import torch

SAMPLED = 4096  # elements of each weight that a close look reads; of smaller ones all


class WeightsWatch:
    """Notices that a model's weights were changed, by whatever way.

    vLLM's own ways (`reload_weights`, `update_weights`, sleep) are told by the worker class, and
    `load_weights` of the model is listened to, which is what a worker extension of a trainer calls.
    What writes into weights directly is noticed by PyTorch's count of writes, or by a sample of
    their values and of all buffers once vLLM's prefix cache is reset, as it must be then. Not
    noticed: a module that computes otherwise, with the weights it had.

    Attributes:
        changes: how often they changed.
        version: "" while they are those of the model's files, a name that the operator gave, or
            None when nobody can say which they are.
    """

    def __init__(self, model: Any) -> None:
        self.changes = 0
        self.version: str | None = ""
        self._model = model
        self._stamp: list[tuple[int, int]] | None = self._stamped()
        self._sample = self._sampled()
        load = getattr(model, "load_weights", None)
        if load is None:
            return

        def load_weights(*arguments: Any, **options: Any) -> Any:
            self.changed()
            return load(*arguments, **options)

        # On the instance: its class's own shows again when it goes.
        model.load_weights = load_weights

    def changed(self, version: str | None = None) -> None:
        """They are others now."""
        self.changes += 1
        self.version = version
        self._stamp = None  # what the change did is taken in with the next look

    def look(self, closely: bool) -> None:
        """Notice what nobody has told; a close look reads a little of every weight."""
        stamp, told = self._stamped(), self._stamp is None
        written = not told and stamp != self._stamp
        sample = self._sampled() if closely or told or written else self._sample
        if written or not (told or _equal(sample, self._sample)):
            self.changed()
        self._stamp, self._sample = stamp, sample

    def _stamped(self) -> list[tuple[int, int]]:
        return [(weight.data_ptr(), _writes(weight)) for weight in self._model.parameters()]

    @torch.no_grad()
    def _sampled(self) -> list[torch.Tensor]:
        """A few elements of every weight, spread over it, on the host."""
        parts: dict[Any, list[torch.Tensor]] = {}
        for weight in (*self._model.parameters(), *self._model.buffers()):
            if weight.numel() and not weight.is_meta:
                flat = weight.detach()
                flat = flat.view(-1) if flat.is_contiguous() else flat[..., :1].reshape(-1)
                step = max(1, flat.numel() // SAMPLED)
                some = flat[::step][:SAMPLED].contiguous().view(torch.uint8)
                parts.setdefault(weight.device, []).append(some)
        return [torch.cat(some).cpu() for some in parts.values()]


def _writes(weight: torch.Tensor) -> int:
    return 0 if weight.is_inference() else weight._version


def _equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return len(some) == len(others) and all(
        torch.equal(a, b) for a, b in zip(some, others, strict=True)
    )
