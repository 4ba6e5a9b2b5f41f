"""Quality of blending: prompts whose chunks may be reused, and what is measured on them.

Adding a workload: one frozen dataclass with `samples(tokenizer) -> list[Sample]`, and one line in
`WORKLOADS`.
"""

from lmc.registry import Registry

WORKLOADS = Registry(
    "workload",
    {
        "pydoc": "lmc.workloads.texts:Pydoc",
        "passages": "lmc.workloads.texts:Passages",
        "recall": "lmc.workloads.tasks:Recall",
        "two_hop": "lmc.workloads.tasks:TwoHop",
        "chain": "lmc.workloads.tasks:Chain",
        "induction": "lmc.workloads.tasks:Induction",
        "order": "lmc.workloads.tasks:Order",
    },
)
