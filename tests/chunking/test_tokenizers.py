"""Prompts of texts that tokenizers of each kind cut: what stands in front, and between."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

import lmc
from lmc.chunking.prompt import begins, encode
from lmc.sim.readers import read
from lmc.workloads.frame import PLAIN, system_prompt
from lmc.workloads.rag_reorder import RagReorder

TEXTS = ["Question:", " what is it?\n", "Answer:", "\n\nit is", " a test. "]
CORPUS = ["hello world this is a test of pieces", "Question: what is it?\n\nAnswer: it is"] * 50
ALPHABET = list("▁abcdefghijklmnopqrstuvwxyzQA:?.\n")


def trained(tokenizer: Tokenizer, alphabet: list[str]) -> Tokenizer:
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def metaspace(scheme: str) -> Tokenizer:
    """SentencePiece as its newer conversions have it."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)  # type: ignore[arg-type]
    made.decoder = decoders.Metaspace(prepend_scheme=scheme)  # type: ignore[arg-type]
    return trained(made, ALPHABET)


def legacy() -> Tokenizer:
    """SentencePiece as Llama 2 has it: a normalizer puts the space in front."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Split("\x00", "isolated")
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]  # type: ignore[list-item]
    )
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]  # type: ignore[list-item]
    )
    return trained(made, ALPHABET)


def byte_level(prefix: bool = False) -> Tokenizer:
    """As GPT-2, or as those of its kind that put a space in front."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    made.decoder = decoders.ByteLevel()
    return trained(made, sorted(pre_tokenizers.ByteLevel.alphabet()))


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "metaspace first": lambda: metaspace("first"),
    "metaspace always": lambda: metaspace("always"),
    "metaspace never": lambda: metaspace("never"),
    "legacy": legacy,
    "byte level": byte_level,
    "byte level with a prefix": lambda: byte_level(prefix=True),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Tokenizer:
    return KINDS[request.param]()


def with_bos(tokenizer: Tokenizer, eos: bool = False) -> Tokenizer:
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if eos else "<s> $A", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return copy


def read_back(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text behind a letter, which keeps decoders from taking a space off its begin."""
    a = tokenizer.encode("a").ids
    return tokenizer.decode(a + ids, skip_special_tokens=True)[len(tokenizer.decode(a)) :]


def test_segments_say_what_the_text_does(kind: Tokenizer) -> None:
    made = lmc.prompt(TEXTS, kind)
    assert read_back(kind, made.token_ids) == "".join(TEXTS)
    for (start, end), text in zip(made.spans, TEXTS, strict=True):
        assert read_back(kind, made.token_ids[start:end]) == text
        assert made.token_ids[start:end] == encode(text, kind)


@pytest.mark.parametrize("eos", [False, True])
def test_prompts_begin_as_the_tokenizer_has_them_begin(kind: Tokenizer, eos: bool) -> None:
    wants = with_bos(kind, eos)
    assert begins(kind) == [] and begins(wants) == [1]
    bare, made = lmc.prompt(TEXTS, kind), lmc.prompt(TEXTS, wants)
    assert made.token_ids == [1, *bare.token_ids]
    assert made.spans == [(start + 1, end + 1) for start, end in bare.spans]
    # Once is enough, whoever puts it there.
    assert lmc.prompt([[1], *TEXTS], wants).token_ids == made.token_ids
    assert lmc.prompt(["<s>Question:", *TEXTS[1:]], wants).token_ids.count(1) == 1


@pytest.mark.parametrize("setting", ["truncation", "padding"])
def test_files_that_cut_or_pad(kind: Tokenizer, setting: str, tmp_path: Path) -> None:
    sick = with_bos(kind)
    if setting == "truncation":
        sick.enable_truncation(4)
    else:
        sick.enable_padding(length=64, pad_id=0, direction="left")
    assert lmc.prompt(TEXTS, sick) == lmc.prompt(TEXTS, with_bos(kind))
    assert (sick.truncation, sick.padding) != (None, None)  # the caller's is as it was
    sick.save(str(tmp_path / "tokenizer.json"))
    line = {"session": "s", "timestamp": 1,
            "messages": [{"role": "user", "content": "".join(TEXTS)}]}  # fmt: skip
    (tmp_path / "chat.jsonl").write_text(json.dumps(line) + "\n")
    (request,) = read(tmp_path / "chat.jsonl", tokenizer=tmp_path / "tokenizer.json")
    framed = f"<|im_start|>user\n{''.join(TEXTS)}<|im_end|>\n"
    assert request.input_tokens == len(kind.encode(framed, add_special_tokens=False).ids)


def test_workloads_begin_so_too(smollm2_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2_dir)
    plain = RagReorder(prompts=2).samples(tokenizer)
    assert plain[0].prompt.token_ids[0] == tokenizer.encode("<|im_start|>")[0]
    eos = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    assert eos != "<|endoftext|>" and begins(tokenizer) == [0]
    for made, before in zip(RagReorder(prompts=2).samples(tokenizer), plain, strict=True):
        assert made.prompt.token_ids[0] == 0 and made.prompt.token_ids.count(0) == 1
        assert len(made.prompt.token_ids) == len(before.prompt.token_ids)
        assert made.chunks == before.chunks
    for document in RagReorder(prompts=2).corpus(tokenizer):
        assert document.token_ids[0] == 0
    assert system_prompt(PLAIN, 20, tokenizer)[0] == 0
