"""A model out of a GGUF file, as files that Hugging Face and vLLM load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Pre-tokenizers of byte-level tokenizers whose models were trained behind BOS, where a file does
# not say so itself, as llama.cpp has it.
_BOS_ANYWAY = ("llama-bpe", "llama3", "llama-v3")


def write_model(gguf: Path, folder: Path) -> None:
    """Dequantise a GGUF file to float32 safetensors, with its tokenizer.

    Raises:
        ValueError: it is no GGUF file, or of a family that transformers does not read.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    bos = bos_of(gguf)
    source: dict[str, Any] = {
        "pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name
    }  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # The weights are dequantised, yet the model still says it is GGUF and refuses to be saved.
    model.hf_quantizer = None
    for owner, attribute in ((model, "quantization_method"), (model.config, "quantization_config")):
        if hasattr(owner, attribute):
            delattr(owner, attribute)
    if bos is not None:
        model.config.bos_token_id = bos
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if bos is not None:
        _put_in_front(bos, folder)


def bos_of(gguf: Path) -> int | None:
    """The token that the model of a GGUF file was trained behind, or None.

    Raises:
        ValueError: it is no GGUF file.
    """
    from gguf import GGUFReader

    try:
        fields = GGUFReader(gguf).fields
    except (ValueError, IndexError, OverflowError) as e:
        raise ValueError(f"{gguf}: got no GGUF file: {e}") from e

    def of(name: str) -> Any:
        field = fields.get(f"tokenizer.ggml.{name}")
        return None if field is None else field.contents()

    wanted = of("add_bos_token")
    if wanted is None:
        wanted = of("model") == "llama" or of("pre") in _BOS_ANYWAY
    token = of("bos_token_id")
    return int(token) if wanted and token is not None else None


def _put_in_front(bos: int, folder: Path) -> None:
    """Have the tokenizer of a folder begin texts with a token; conversions from GGUF drop it."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer("a").input_ids[0] != bos:
        token = tokenizer.convert_ids_to_tokens(bos)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, bos)]
        )
        tokenizer.save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer("a").input_ids[0] != bos:
        raise ValueError(f"the tokenizer does not take {bos} in front of a text, as the model does")
