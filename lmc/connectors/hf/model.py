"""Which Hugging Face models rows can be recomputed in, and their full prefill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lmc.blend.forward import Outcome, selective_forward
from lmc.connectors.hf.adapter import HFAdapter, Pages, Watch
from lmc.connectors.hf.weights import identity_of
from lmc.kernels.rerotate import rerotate
from lmc.model.identity import namespace_of
from lmc.model.layers import layers_of
from lmc.model.reuse import moved_refusal
from lmc.model.rope import Rotations, rotations_of
from lmc.model.shape import shape_of


@dataclass(frozen=True)
class Prefill:
    """A whole computation.

    Attributes:
        pages: K and V of all its rows. logits: `[n, V]` fp32 of the rows that were asked for.
        outputs: attention outputs `[L, n, H * D]` of those rows, if recorded.
    """

    pages: Pages
    logits: torch.Tensor
    outputs: torch.Tensor | None = None


class HFModel:
    """A decoder whose layers keep keys and values, ready to blend.

    It is compared with its own forward first: its longest window and 64 tokens, once by
    `model(...)` and once by the layer loop in two parts, and keys re-rotated against keys computed
    where they go.

    Args:
        model: a transformers `...ForCausalLM`; it is not changed.

    Raises:
        ValueError: states in place of keys, no RoPE or one that depends on the length,
            or an architecture whose layers do more than hand hidden states on.
    """

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config()
        if reason := moved_refusal(config):
            raise ValueError(f"{type(model).__name__}: {reason}")
        self.rotations = rotations_of(config)
        self.layers = layers_of(config)
        self.model = model
        inner = getattr(model, "model", None)
        # Of what sees images too, the part that has the text's tokens.
        self.inner: Any = getattr(inner, "language_model", inner)
        for part in ("embed_tokens", "layers", "rotary_emb"):
            if not hasattr(self.inner, part):
                raise ValueError(f"{type(model).__name__} has no model.{part}: not supported")
        self._norm: Any = getattr(self.inner, "norm", None) or getattr(
            self.inner, "final_layernorm", None
        )
        if self._norm is None:
            raise ValueError(f"{type(model).__name__} has no norm behind its layers: not supported")
        self.shape = shape_of(config)
        self.L: int = self.shape.L
        self.dtype, self.device = model.dtype, model.device
        self.layout = self.shape.layout(str(self.dtype).removeprefix("torch."))
        self.vocabulary: int = config.vocab_size
        self._check()

    @property
    def name(self) -> str:
        """What people call it."""
        return Path(getattr(self.model.config, "_name_or_path", "") or "model").name

    def namespace(self) -> bytes:
        """What its KV is stored under: an engine that serves the same files has the same.

        Reads the weights, in memory and on disk, and compares them.
        """
        dtype = str(self.dtype).removeprefix("torch.")
        # What turns of latents lies in the order of the model's code: no engine has the same.
        own = f"latents as transformers has them, {self.layout.D}" if self.layout.sides == 1 else ""
        return namespace_of(*identity_of(self.model), dtype, self.rotations, engine=own)

    def pages(self, T: int) -> Pages:
        """Room for the KV of T tokens."""
        return Pages(self.layout, T, self.device)

    def adapter(
        self,
        tokens: np.ndarray,
        pages: Pages,
        positions: np.ndarray | None = None,
        **options: Any,
    ) -> HFAdapter:
        """Its layers for the rows of one request; arguments as of `HFAdapter`."""
        return HFAdapter(self.inner, tokens, pages, self.layers, positions, **options)

    @torch.inference_mode()
    def prefill(
        self,
        tokens: np.ndarray,
        positions: np.ndarray | None = None,
        *,
        logits_from: int | None = None,
        split: int | None = None,
        record: bool = False,
        room: int = 0,
        watch: Watch | None = None,
    ) -> Prefill:
        """Compute all of `tokens` `[T]`.

        Args:
            positions: `[T]` RoPE positions, default 0..T-1.
            logits_from: the first row whose logits are wanted; default the last one.
            split: compute in two parts, `[0, split)` and the rest: the same but for rounding.
            record: keep the attention outputs of the rows from `logits_from` on.
            room: further rows that the pages must hold.
            watch: is shown every attention.
        """
        T = len(tokens)
        first = T - 1 if logits_from is None else logits_from
        pages = self.pages(T + room)
        adapter = self.adapter(tokens, pages, positions)
        adapter.watch = watch
        parts = [(0, T)] if split is None else [(0, split), (split, T)]
        states, outputs = [], []
        with adapter.installed(self.model):
            for start, end in parts:
                adapter.outputs = [] if record else None
                outcome = selective_forward(adapter, np.arange(start, end, dtype=np.int64))
                states.append(outcome.state[0])
                if adapter.outputs is not None:
                    outputs.append(torch.stack(adapter.outputs))
        hidden = torch.cat(states)[first:]
        recorded = torch.cat(outputs, 1)[:, first:] if record else None
        return Prefill(pages, self.logits(hidden), recorded)

    def forced(
        self, tokens: np.ndarray, answer: Sequence[int], pages: Pages, *, record: bool = False
    ) -> Prefill:
        """Logits `[n, V]` while `answer` `[n]` is forced behind a prompt that `pages` holds.

        The prompt's last row is computed again, and so are the answer's but its last.
        """
        T, n = len(tokens), len(answer)
        adapter = self.adapter(np.array([*tokens, *answer]), pages)
        adapter.outputs = [] if record else None
        hidden = self.run(adapter, np.arange(T - 1, T + n - 1)).state[0]
        outputs = torch.stack(adapter.outputs) if adapter.outputs else None
        return Prefill(pages, self.logits(hidden), outputs)

    def greedy(
        self, tokens: np.ndarray, logits: torch.Tensor, pages: Pages, n: int, **options: Any
    ) -> list[int]:
        """The n most likely tokens behind a prompt, one by one.

        Args:
            tokens: `[T]`. logits: `[V]` of its last row.
            pages: K and V of the prompt, with room for n - 1 rows more, which are written.
            options: of `HFAdapter`, where the answer does not attend as usual.
        """
        answer = [int(logits.argmax())] if n else []
        for i in range(n - 1):
            adapter = self.adapter(np.array([*tokens, *answer]), pages, **options)
            hidden = self.run(adapter, np.array([len(tokens) + i])).state[0]
            answer.append(int(self.logits(hidden)[0].argmax()))
        return answer

    def run(self, adapter: HFAdapter, *arguments: Any) -> Outcome:
        """`selective_forward(adapter, *arguments)` on this model."""
        with torch.inference_mode(), adapter.installed(self.model):
            return selective_forward(adapter, *arguments)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """fp32 logits `[n, V]` of hidden states `[n, hidden]` behind the last layer."""
        config = self.model.config.get_text_config()
        with torch.inference_mode():
            logits: torch.Tensor = self.model.lm_head(self._norm(hidden)).float()
            logits = logits * (getattr(config, "logit_scale", None) or 1.0)  # Cohere
            logits = logits / (getattr(config, "logits_scaling", None) or 1.0)  # Granite
            if cap := getattr(config, "final_logit_softcapping", None):  # Gemma
                logits = torch.tanh(logits / cap) * cap
        return logits

    def _whole(self, ids: torch.Tensor, n: int) -> torch.Tensor:
        """Logits `[n, V]` of the last rows of ids `[1, T]`, by the model's own forward."""
        before = self.model.config._attn_implementation
        if any(layer.cap for layer in self.layers):  # which torch's own attention leaves out
            self.model.set_attn_implementation("eager")
        try:
            out = self.model(ids, use_cache=False, logits_to_keep=n)
        finally:
            self.model.set_attn_implementation(before)
        logits: torch.Tensor = out.logits[0].float()
        return logits

    @torch.inference_mode()
    def _check(self) -> None:
        asked = 64  # rows whose logits are compared, behind the longest window
        T, shift = max(layer.window for layer in self.layers) + asked, 100
        tokens = np.arange(T, dtype=np.int64) * 7919 % self.vocabulary
        whole = self._whole(torch.from_numpy(tokens).to(self.device)[None], asked)
        try:
            ours = self.prefill(tokens, logits_from=T - asked, split=T - asked // 2)
            moved = self.prefill(tokens, np.arange(T) + shift)
        except Exception as error:  # an architecture of another shape may fail in any way
            raise ValueError(
                f"{type(self.model).__name__}: the layer loop does not run on this model: {error}"
            ) from error
        pairs = {"logits": (whole, ours.logits)}
        # A text that is moved as a whole is the same to every layer but for its keys' rotation.
        here, there = (prefill.pages.rows(0, T)[:, 0] for prefill in (ours, moved))
        # Which elements make a pair no config says: GLM and Ernie have neighbours.
        both = [self.rotations.paired(pairing) for pairing in (False, True)]
        first = ours.pages.all.turned_from(2 * len(self.rotations.ropes[0].inv_freq))
        turned = [_turned(rotations, here, there, shift, first) for rotations in both]
        worst_of = [max(float((a - b).abs().max()) for a, b in pairs) for pairs in turned]
        right = worst_of.index(min(worst_of))
        self.rotations = both[right]
        for layer, pair in enumerate(turned[right]):
            pairs[f"re-rotated keys of layer {layer}"] = pair
        # Sums are taken in another order; no more than that.
        tolerance = torch.finfo(self.dtype).eps ** 0.5
        for name, (expected, got) in pairs.items():
            scale = expected.float().abs().max().clamp_min(1e-6)
            worst = float((expected.float() - got.float()).abs().max() / scale)
            if not worst <= tolerance:
                raise ValueError(
                    f"{type(self.model).__name__}: {name} differ from the model's own by "
                    f"{worst:.1e} (at most {tolerance:.1e}), so its rows cannot be recomputed"
                )


def _turned(
    rotations: Rotations, here: torch.Tensor, there: torch.Tensor, shift: int, first: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """By layer, keys `[T, G, D]` computed `shift` positions further on, and those moved there.

    first: the first of their dims that turn.
    """
    cos, sin = (torch.from_numpy(x).to(here.device) for x in rotations.angles(shift))
    pairs = []
    for which, keys, moved in zip(rotations.of, here, there, strict=True):
        turned = keys
        if which >= 0:
            angles = cos[which], sin[which]
            turned = rerotate(keys, *angles, first=first, interleaved=rotations.interleaved)
        pairs.append((moved, turned))
    return pairs
