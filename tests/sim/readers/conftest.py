"""A tokenizer whose tokens are bytes, and a folder for hypothesis."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = models.BPE({byte: i for i, byte in enumerate(alphabet)}, [])
    bytewise = Tokenizer(model)
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    path = tmp_path_factory.mktemp("bytewise") / "tokenizer.json"
    bytewise.save(str(path))
    return path


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For hypothesis, which may not have a folder a test."""
    return tmp_path_factory.mktemp("traces")
