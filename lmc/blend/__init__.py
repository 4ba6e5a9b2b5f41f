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
        "block": "lmc.blend.epic:Block",
        "cacheblend": "lmc.blend.cacheblend:CacheBlend",
        "query": "lmc.blend.query:Query",
        "random": "lmc.blend.controls:Random",
        "uniform": "lmc.blend.controls:Uniform",
        "tail": "lmc.blend.controls:Tail",
        "ape": "lmc.blend.ape:Ape",
        "cachecraft": "lmc.blend.cachecraft:CacheCraft",
        "oracle_deviation": "lmc.blend.oracle:OracleDeviation",
        "lmc": "lmc.blend.two_stage:TwoStage",
        "union": "lmc.blend.combine:Union",
        "replay": "lmc.blend.combine:Replay",
    },
    has=["rows", "counts", "needs", "moves"],
)
