"""Blending: which rows of reused KV are recomputed, the plan of one request, and the forward.

Adding a strategy: one frozen dataclass with one method, and one line in `STRATEGIES`.
"""

from lmc.registry import Registry

STRATEGIES = Registry(
    "blend strategy",
    {
        "prefix": "lmc.blend.baselines:Prefix",
        "full_recompute": "lmc.blend.baselines:FullRecompute",
        "full_reuse": "lmc.blend.baselines:FullReuse",
        "epic": "lmc.blend.epic:Epic",
    },
)
