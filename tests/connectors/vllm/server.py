"""A model that chats, for servers in tests."""

from __future__ import annotations

import shutil
from pathlib import Path


def chat_model(tiny: Path, tokenizer: Path, folder: Path) -> Path:
    """A random model of SmolLM2's vocabulary, with its tokenizer and chat template."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(tiny)
    config.vocab_size, config.tie_word_embeddings = 49152, True
    config.num_hidden_layers = 2  # each is compiled by itself
    with torch.random.fork_rng():
        torch.manual_seed(1)
        LlamaForCausalLM(config).float().save_pretrained(folder)
    for file in tokenizer.iterdir():
        if "token" in file.name or "vocab" in file.name or "chat" in file.name:
            shutil.copy(file, folder)
    return folder
