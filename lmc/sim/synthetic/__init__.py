"""Synthetic traces with token ids, of which it is known what can be reused."""

from lmc.registry import Registry
from lmc.sim.synthetic.truth import Truth

GENERATORS = Registry(
    "generator",
    {
        "agents": "lmc.sim.synthetic.sessions:Agents",
        "chat": "lmc.sim.synthetic.sessions:Chat",
        "clock": "lmc.sim.synthetic.questions:Clock",
        "rag": "lmc.sim.synthetic.questions:Rag",
        "relay": "lmc.sim.synthetic.sessions:Relay",
        "skills": "lmc.sim.synthetic.questions:Skills",
        "tools": "lmc.sim.synthetic.sessions:Tools",
    },
    has=["requests"],
)

__all__ = ["GENERATORS", "Truth"]
