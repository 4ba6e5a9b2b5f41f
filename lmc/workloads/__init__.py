"""Workloads: prompts whose chunks may be reused, for timing and for quality alike.

Adding one: a frozen dataclass with `samples(tokenizer) -> list[Sample]`, and a line in
`WORKLOADS`. The runners on vLLM and on Hugging Face models and `lmc calibrate` take any of them.
"""

from __future__ import annotations

from lmc.registry import Registry

WORKLOADS = Registry(
    "workload",
    {
        "rag_reorder": "lmc.workloads.rag_reorder:RagReorder",
        "tool_docs": "lmc.workloads.tool_docs:ToolDocs",
        "chat": "lmc.workloads.sessions:Chat",
        "agents": "lmc.workloads.sessions:Agents",
        "pydoc": "lmc.workloads.pydoc:Pydoc",
        "passages": "lmc.workloads.passages:Passages",
        "recall": "lmc.workloads.tasks:Recall",
        "two_hop": "lmc.workloads.tasks:TwoHop",
        "chain": "lmc.workloads.tasks:Chain",
        "induction": "lmc.workloads.tasks:Induction",
        "order": "lmc.workloads.tasks:Order",
    },
    has=["samples"],
)
