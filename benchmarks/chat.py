"""A conversation goes on after vLLM has dropped it, and after a restart.

    python benchmarks/chat.py

Chats about documents, through the model's own chat template, on stock vLLM and on vLLM with lmc as
it is by default, with a disk behind it. Each turn is asked with vLLM's prefix cache emptied in
both, as it is when others have used the pages meanwhile: `found` is how much lmc had of the turn
before, its answer included as far as the chat template writes the same tokens for it; `sooner`
how many times sooner the first token came than stock vLLM's. In `spans` the first turn says where
its documents are and no other does, in `plain` none does. At last an engine that is started anew
on the same disk is asked the last turn (`restart`). Prints medians over conversations with
bootstrap intervals, and appends a row a turn to benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from lmc.experiment.vllm.config import EngineConfig
from lmc.experiment.vllm.engines import Answer, Engine, Request
from lmc.model import exports
from lmc.results.rows import git_commit
from lmc.results.statistics import bootstrap
from lmc.workloads.manual import documents

OUT = Path(__file__).parent / "results" / "chat.jsonl"
DOCUMENTS, DOCUMENT, ANSWER = 5, 240, 48  # how many, and tokens of each
QUESTIONS = (
    "What are these documents about? Answer in one sentence.",
    "Which of them would you read first, and why?",
    "Name one thing that the last document says.",
)
ARMS = ("spans", "plain")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--chats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    model = exports.resolve(options.model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    config = EngineConfig(
        dtype="float32", threads=options.threads, kv_cache_memory_bytes=1 << 30,
        max_model_len=4096, max_num_batched_tokens=4096,
    )  # fmt: skip
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as work, ExitStack() as stack:
        folder = Path(work)
        disk = {"name": "disk", "path": str(folder / "kv"), "capacity": "16GiB"}
        lmc = {"memory_bytes": 2 << 30, "tiers": [disk], "fetch_patience_s": 30.0}
        stock = stack.enter_context(Engine(model, config, None, folder / "stock.log"))
        with Engine(model, config, lmc, folder / "lmc.log") as engine:
            for each in (stock, engine):
                each.wait()
            chats = [Chat(tokenizer, i, options.chats) for i in range(options.chats)]
            for chat in chats:
                rows += talked(chat, stock, engine)
        with Engine(model, config, lmc, folder / "again.log") as again:
            again.wait()
            for chat in chats:
                turn = chat.prompt(len(QUESTIONS) - 1)
                expected = asked(stock, turn, f"restart {chat.name}")
                for arm in ARMS:
                    answer = asked(again, turn, f"{arm} {chat.name}", {"save": False})
                    row = row_of(chat, arm, len(QUESTIONS) - 1, expected, answer)
                    rows.append(row | {"engine": "restart", "device": again.device})
    OUT.parent.mkdir(exist_ok=True)
    with OUT.open("a") as out:
        out.writelines(json.dumps({"benchmark": "chat", "commit": git_commit()} | row) + "\n"
                       for row in rows)  # fmt: skip
    show(rows)


class Chat:
    """A conversation about documents, and what was answered so far."""

    def __init__(self, tokenizer: Any, number: int, chats: int) -> None:
        self.name = f"chat {number}"
        self._tokenizer = tokenizer
        some = documents(DOCUMENT, tokenizer)
        own = some[number :: len(some) // DOCUMENTS][:DOCUMENTS]
        self.texts = [tokenizer.decode(document.ids) for document in own]
        self.answers: list[str] = []
        self.said: list[list[int]] = []  # token ids of each turn, its answer's too

    def prompt(self, turn: int) -> list[int]:
        """Token ids of a turn, with all before it."""
        messages = [{"role": "system", "content": "You are helpful." + "".join(self.texts)}]
        for question, answer in zip(QUESTIONS[:turn], self.answers, strict=False):
            messages += [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
        messages.append({"role": "user", "content": QUESTIONS[turn]})
        rendered = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        ids: list[int] = self._tokenizer.encode(rendered, add_special_tokens=False)
        return ids

    def spans(self, tokens: list[int]) -> list[list[int]]:
        """Where the documents are in a prompt, as near as tokens show."""
        found, at = [], 0
        for text in self.texts:
            ids = self._tokenizer.encode(text, add_special_tokens=False)[4:-4]
            start = next(i for i in range(at, len(tokens)) if tokens[i : i + len(ids)] == ids)
            at = start + len(ids)
            found.append([start, at])
        return found


def talked(chat: Chat, stock: Engine, engine: Engine) -> list[dict[str, Any]]:
    """All turns of a conversation; the later ones timed, once vLLM holds none of it."""
    rows = []
    for turn in range(len(QUESTIONS)):
        tokens = chat.prompt(turn)
        if turn:
            expected = asked(stock, tokens, f"{turn} {chat.name}")
        for arm in ARMS:
            salt = f"{arm} {chat.name}"
            if turn:
                answer = asked(engine, tokens, salt, {"save": False})
                row = row_of(chat, arm, turn, expected, answer)
                rows.append(row | {"engine": "running", "device": engine.device})
            lmc = {"chunks": chat.spans(tokens)} if arm == "spans" and not turn else {}
            answer = engine.ask(Request(tokens, salt, max_tokens=ANSWER, lmc=lmc))
            engine.drain()
        chat.said.append([*tokens, *answer.token_ids])
        chat.answers.append(chat._tokenizer.decode(answer.token_ids, skip_special_tokens=True))
    return rows


def asked(
    engine: Engine, tokens: list[int], salt: str, lmc: dict[str, Any] | None = None
) -> Answer:
    """The first token, with nothing in vLLM's own cache."""
    return engine.ask(Request(tokens, salt, lmc=lmc, reset=True))


def row_of(chat: Chat, arm: str, turn: int, stock: Answer, answer: Answer) -> dict[str, Any]:
    assert answer.report is not None
    kinds = answer.report["kinds"]
    pairs = zip(chat.prompt(turn), chat.said[turn - 1], strict=False)
    before = next((i for i, (here, there) in enumerate(pairs) if here != there), None)
    before = before or len(chat.said[turn - 1])
    reused = answer.report["prompt_tokens"] - kinds["new"]
    return {
        "chat": chat.name, "arm": arm, "turn": turn + 1, "kinds": kinds,
        "stock_s": stock.wall_s, "lmc_s": answer.wall_s,
        "equal": stock.token_ids == answer.token_ids,
        "found": min(reused, before) / before,
        "strategy": answer.report["strategy"], "reason": answer.report["reason"],
    }  # fmt: skip


def show(rows: list[dict[str, Any]]) -> None:
    print("engine   arm    turn  tokens  found (least)   stock s  lmc s  sooner [95%]")
    for engine, arm, turn in sorted({(r["engine"], r["arm"], r["turn"]) for r in rows}):
        mine = [r for r in rows if (r["engine"], r["arm"], r["turn"]) == (engine, arm, turn)]
        ratios = bootstrap([[r["stock_s"] / r["lmc_s"]] for r in mine],
                           lambda sample: float(np.median(sample)))  # fmt: skip
        assert ratios is not None
        found = [r["found"] for r in mine]
        tokens = np.median([sum(r["kinds"].values()) for r in mine])
        seconds = [np.median([r[column] for r in mine]) for column in ("stock_s", "lmc_s")]
        print(
            f"{engine:8} {arm:6} {turn:4}  {tokens:6.0f}"
            f"  {np.median(found):5.3f} ({min(found):5.3f})  {seconds[0]:7.2f}  {seconds[1]:5.2f}"
            f"  {ratios.value:.2f} [{ratios.low:.2f}, {ratios.high:.2f}]"
        )
    print(f"the same first token as stock vLLM: {sum(r['equal'] for r in rows)} of {len(rows)}")


if __name__ == "__main__":
    main()
