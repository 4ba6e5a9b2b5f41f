"""Questions over passages, out of a file; and a data set made into such a file."""

from __future__ import annotations

import gzip
import json
import lzma
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lmc.chunking.prompt import encode
from lmc.workloads.frame import PLAIN, frame_of, front
from lmc.workloads.sample import Sample, positive

BRIEFLY = "Answer the question using only the passages below. Give only the answer, in a few words."
PASSAGE_FIELDS = ("passages", "question", "answer")


@dataclass(frozen=True)
class Passages:
    """Questions over passages, from a file of one JSON object a line.

    A line is `{"passages": [text, ...], "question": text, "answer": text}`; a name that ends in
    .xz or .gz is unpacked. A sample is a line. Which passages support the answer is not known,
    so `chunks` of a line's passages are drawn by the seed and keep the file's order: where a line
    has more, the answer may be missing from the prompt, which is fine for comparing with full
    prefill and wrong for judging answers.

    Attributes:
        path: the file.
        tokens_per_passage: a longer passage is cut to this, a shorter one kept whole.
        chunks: passages in a prompt.
        seed: another one draws other passages.
    """

    path: Path
    tokens_per_passage: int = 256
    chunks: int = 6
    seed: int = 0

    def samples(self, tokenizer: Any) -> list[Sample]:
        """Raises ValueError for a file that cannot be read, naming the line and what is wrong."""
        positive(self, "tokens_per_passage", "chunks")
        frame = frame_of(tokenizer)
        around = frame.before_system + BRIEFLY + frame.after_system
        system = front(encode(around, tokenizer), tokenizer)
        samples = []
        for number, line in _lines(self.path):
            where = f"{self.path}, line {number}"
            passages, question, answer = _fields(line, where)
            if len(passages) < self.chunks:
                raise ValueError(f"{where}: got {len(passages)} passages, want {self.chunks}")
            rng = random.Random(f"passages {self.seed} {number}")
            drawn = sorted(rng.sample(range(len(passages)), self.chunks))
            chunks = [
                encode(f"\n\nPassage: {passages[i]}", tokenizer)[: self.tokens_per_passage]
                for i in drawn
            ]
            ask = f"\n\nQuestion: {question}{frame.before_answer}"
            if frame is not PLAIN:
                ask += "Answer:"
            # A plain frame ends in a space, which the answer's first word begins with.
            ids = encode(ask.rstrip(" "), tokenizer)
            samples.append(Sample(system, chunks, ids, encode(f" {answer}", tokenizer)))
        if not samples:
            raise ValueError(f"{self.path}: got no lines, want at least one")
        return samples


def convert_musique(source: Path, target: Path) -> int:
    """Turn a multi-hop data set into the lines `Passages` reads; returns how many.

    source: a JSON list of `{"ctxs": [{"title", "text"}, ...], "question", "answers": [text, ...]}`
        (MuSiQue, Trivedi et al. 2022, as CacheBlend's examples carry it), .xz or .gz as well. The
        first answer is kept, and a title is put in front of its text.
    target: .jsonl, .jsonl.xz or .jsonl.gz.

    Raises ValueError naming the entry and what is missing; nothing is then written.
    """
    try:
        with _open(source, "rt") as f:
            entries = json.load(f)
    except (OSError, EOFError, lzma.LZMAError, ValueError) as e:
        raise ValueError(f"{source}: cannot be read: {e}") from e
    if not isinstance(entries, list):
        raise ValueError(f"{source}: got {type(entries).__name__}, want a list")
    lines = []
    for i, entry in enumerate(entries):
        match entry:
            case {"ctxs": [_, *_] as ctxs, "question": str(question), "answers": [str(answer), *_]}:
                texts = [_titled(ctx, f"{source}, entry {i}") for ctx in ctxs]
                line = {"passages": texts, "question": question, "answer": answer}
                lines.append(json.dumps(line, ensure_ascii=False) + "\n")
            case _:
                got = ", ".join(entry) if isinstance(entry, dict) else type(entry).__name__
                raise ValueError(
                    f"{source}, entry {i}: got {got}; want ctxs and answers (lists that are not "
                    "empty) and question (a text)"
                )
    with _open(target, "wt") as f:
        f.writelines(lines)
    return len(lines)


def _titled(ctx: Any, where: str) -> str:
    match ctx:
        case {"title": str(title), "text": str(text)} if text.strip():
            return f"{title}\n{text}" if title else text
    raise ValueError(f"{where}: got a context {str(ctx)[:60]!r}; want title and text")


def _fields(line: str, where: str) -> tuple[list[str], str, str]:
    try:
        entry = json.loads(line)
    except ValueError as e:
        raise ValueError(f"{where}: got no JSON: {e}") from e
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: got {type(entry).__name__}, want an object")
    if missing := [field for field in PASSAGE_FIELDS if field not in entry]:
        raise ValueError(f"{where}: {', '.join(missing)} missing")
    passages, question, answer = (entry[field] for field in PASSAGE_FIELDS)
    if not (isinstance(passages, list) and all(isinstance(p, str) and p for p in passages)):
        raise ValueError(f"{where}: passages: got {str(passages)[:60]!r}, want a list of texts")
    for field, value in (("question", question), ("answer", answer)):
        if not (isinstance(value, str) and value):
            raise ValueError(f"{where}: {field}: got {str(value)[:60]!r}, want a text")
    return passages, question, answer


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers from 1."""
    try:
        with _open(path, "rt") as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    yield number, line
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as e:
        raise ValueError(f"{path}: cannot be read: {e}") from e


def _open(path: Path, mode: str) -> IO[Any]:
    opener: Any = {".xz": lzma.open, ".gz": gzip.open}.get(Path(path).suffix, open)
    file: IO[Any] = opener(path, mode, encoding="utf-8")
    return file
