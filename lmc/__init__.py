"""Reuse of KV cache at any position of a prompt, on stock vLLM and Hugging Face models.

What a notebook needs, each imported when it is first used:

    prompt, Prompt          texts to token ids and spans
    answer, Answer          a prompt whose middle was encoded elsewhere, on a Hugging Face model
    PrefixStore             beginnings of prompts, of any Hugging Face model
    Store                   chunks in host memory and on disk
    run                     an experiment, as `lmc run` runs it
    read_rows, summarise    what an experiment measured
    read_trace              a trace of requests
    plan                    from a trace to memory and hit rates, as `lmc plan`
    plots                   figures of rows and of traces
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from lmc import plots
    from lmc.chunking.prompt import Prompt, prompt
    from lmc.connectors.hf import Answer, PrefixStore, answer
    from lmc.experiment.run import run
    from lmc.results.rows import read_rows
    from lmc.results.summary import summarise
    from lmc.sim.planning import plan
    from lmc.sim.readers import read as read_trace
    from lmc.store.store import Store

__all__ = [
    "Answer",
    "PrefixStore",
    "Prompt",
    "Store",
    "__version__",
    "answer",
    "plan",
    "plots",
    "prompt",
    "read_rows",
    "read_trace",
    "run",
    "summarise",
]

_WHERE = {
    "Answer": "lmc.connectors.hf:Answer",
    "PrefixStore": "lmc.connectors.hf:PrefixStore",
    "Prompt": "lmc.chunking.prompt:Prompt",
    "Store": "lmc.store.store:Store",
    "answer": "lmc.connectors.hf:answer",
    "plan": "lmc.sim.planning:plan",
    "plots": "lmc.plots:",
    "prompt": "lmc.chunking.prompt:prompt",
    "read_rows": "lmc.results.rows:read_rows",
    "read_trace": "lmc.sim.readers:read",
    "run": "lmc.experiment.run:run",
    "summarise": "lmc.results.summary:summarise",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("lmc-kv")
    if name not in _WHERE:
        raise AttributeError(f"module 'lmc' has no attribute {name!r}; it has {', '.join(__all__)}")
    module, _, attribute = _WHERE[name].partition(":")
    found = import_module(module)
    return getattr(found, attribute) if attribute else found


def __dir__() -> list[str]:
    return __all__
