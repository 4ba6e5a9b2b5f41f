"""A model's decoder layers called by themselves, however vLLM has written them down."""

from __future__ import annotations

import inspect
from contextlib import suppress
from typing import Any

import torch

from lmc.blend.forward import State


class Decoder:
    """The layers of one model, and what comes before and behind them.

    vLLM's own models hand on hidden states and, most of them, a residual; those that it runs as
    transformers has them (its Transformers backend) hand on hidden states with a batch axis, and
    are told the angles of their rows.

    Args:
        model: vLLM's `...ForCausalLM`.

    Attributes:
        model: the same. layers: of it, in order. embed: token ids `[M]` to hidden states.
        which_end: of `ends`, the one that the model's own forward gives; None where that is none
            of them, or was not looked at.

    Raises:
        AttributeError, ValueError: layers that take neither positions nor angles.
    """

    def __init__(self, model: Any) -> None:
        self.model, self._inner = model, model.model
        inner = self._inner
        first, end = getattr(inner, "start_layer", 0), getattr(inner, "end_layer", None)
        self.layers = list(inner.layers[first:end])
        self.embed: Any = getattr(inner, "embed_input_ids", None) or model.embed_input_ids
        takes = inspect.signature(self.layers[0].forward).parameters
        self._residual = "residual" in takes
        self._native = "positions" in takes
        if not self._native and "position_embeddings" not in takes:
            raise ValueError(f"layers take {', '.join(takes)}; known: positions, or angles")
        self.which_end: int | None = None
        self._types: Any = None  # of layers, where each type turns by its own
        if not self._native:
            angles = inspect.signature(inner.rotary_emb.forward).parameters
            self._types = inner.config.layer_types if "layer_type" in angles else None
        self._where: torch.Tensor | None = None
        self._angles: dict[str | None, Any] = {}

    def layer(self, index: int, where: torch.Tensor, state: State) -> State:
        """One layer on rows at positions `where` `[M]`: their state behind it."""
        if not self._native:
            return self._of_transformers(index, where, state)
        beside: dict[str, Any] = {}
        if self._residual:  # before layer 0 there is none
            beside["residual"] = state[1] if len(state) == 2 else None
        out = self.layers[index](positions=where, hidden_states=state[0], **beside)
        if not self._residual:
            return (out[0] if isinstance(out, tuple) else out,)
        hidden, residual = out
        return (hidden, residual)

    def ends(self, state: State) -> list[torch.Tensor]:
        """What `model.forward` may make of the state behind the last layer, `[M, hidden]` each.

        Not all that hand on a residual add it up in the end.
        """
        norm = getattr(self._inner, "norm", None) or self._inner.final_layernorm
        ends = [norm(state[0])]
        if len(state) == 2:
            with suppress(TypeError):  # of a norm that knows of no residual
                ends.append(norm(*state))
        return [end[0] if isinstance(end, tuple) else end for end in ends]

    def end(self, state: State) -> torch.Tensor:
        """What `model.forward` makes of it, `[M, hidden]`."""
        if self.which_end is None:
            raise ValueError("what the model makes of its last layer's state is not known")
        return self.ends(state)[self.which_end]

    def _of_transformers(self, index: int, where: torch.Tensor, state: State) -> State:
        hidden, positions = state[0][None], where[None]
        if where is not self._where:
            self._where, self._angles = where, {}
        name = None if self._types is None else self._types[index]
        if name not in self._angles:
            which = {} if name is None else {"layer_type": name}
            self._angles[name] = self._inner.rotary_emb(hidden, position_ids=positions, **which)
        out = self.layers[index](
            hidden,
            attention_mask=None,
            position_ids=positions,
            position_embeddings=self._angles[name],
            past_key_values=None,
            use_cache=False,
        )
        return ((out[0] if isinstance(out, tuple) else out)[0],)
