"""Quality of blending: prompts whose chunks may be reused, and what is measured on them.

Adding a workload: one frozen dataclass with `samples(tokenizer) -> list[Sample]`, and one line in
`WORKLOADS`.
"""

from lmc.registry import Registry

WORKLOADS = Registry(
    "workload",
    {
        "pydoc": "lmc.evaluation.texts:Pydoc",
        "passages": "lmc.evaluation.texts:Passages",
        "recall": "lmc.evaluation.tasks:Recall",
        "two_hop": "lmc.evaluation.tasks:TwoHop",
        "chain": "lmc.evaluation.tasks:Chain",
        "induction": "lmc.evaluation.tasks:Induction",
        "order": "lmc.evaluation.tasks:Order",
    },
)
