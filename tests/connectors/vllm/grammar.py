"""What clients send: requests in their grammar, beside it, and far from it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from hypothesis import strategies as st

from lmc.quality import BLENDS

# Names of modules, files and classes that a request must never reach.
HOSTILE = [
    "os:system", "unittest.__main__:main", "this:x", ".x:y", "lmc.blend.evidence:Outline",
    "tests.connectors.vllm.selective:CheckedQuery", "/etc/passwd", "/dev/zero", "../lmc.yaml",
    "controlled", "controlled:times=/etc/passwd", "replay", "full_recompute", "ape", "nope", "",
    ":", "epic:", "epic:4", "epic:" + "[" * 50, "{name: epic, link_tokens: 4}", "&a [*a]",
    "x" * 5000, "name", "\0", "é", "__class__", "none",
]  # fmt: skip
FIELDS = [
    "ratio", "link_tokens", "layers", "check_layer", "tensor", "norm", "write", "causal", "compute",
    "wide", "seed", "asking", "heads", "queries", "page", "rows_per_run", "rotate", "by_layer",
    "first", "second", "strategy", "min_recovery", "times", "floor", "tier", "profile", "name", "x",
]  # fmt: skip
WORDS = [
    "k", "v", "both", "l1", "squared", "cosine", "all", "selected", "middle", "mean", "max", "sum",
    "l2", "position", "bottom_right", "epic", "query", "cacheblend", "random", "lmc", "prefix",
]  # fmt: skip

numbers = st.one_of(
    st.integers(-3, 300),
    st.sampled_from([-(2**63), 2**31, 2**63 - 1, 2**63, 10**30, 10**400]),
    st.floats(0, 1),
    st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e308, 1e-300, -0.0, 0.5, 1.0]),
)
leaves = st.one_of(
    numbers, st.none(), st.booleans(), st.sampled_from(HOSTILE), st.sampled_from(WORDS), st.text()
)
names = st.one_of(st.sampled_from(BLENDS.names()), st.sampled_from(HOSTILE), leaves)


def mappings(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    fields = st.dictionaries(st.sampled_from(FIELDS), values, max_size=4)
    named = st.builds(lambda name, rest: {"name": name} | rest, names, fields)
    return st.one_of(named, fields, st.lists(values, max_size=4))


blends = st.one_of(names, st.recursive(leaves, mappings, max_leaves=12))


def nested(depth: int) -> dict[str, Any]:
    blend: dict[str, Any] = {"name": "epic"}
    for _ in range(depth):
        blend = {"name": "union", "first": blend, "second": "query"}
    return blend


def spans(T: int) -> st.SearchStrategy[Any]:
    """Of a prompt of T tokens; most of them as they should be."""
    cuts = st.lists(st.integers(0, T), min_size=2, max_size=8, unique=True).map(sorted)
    right = cuts.map(lambda at: [list(pair) for pair in pairwise(at)])
    pair = st.one_of(st.lists(leaves, max_size=3), st.tuples(numbers, numbers).map(list), leaves)
    return st.one_of(right, right, st.lists(pair, max_size=4), leaves)


WORKING: list[Any] = [
    "epic", "full_reuse", "lmc", "uniform", {"name": "epic", "link_tokens": 3},
    {"name": "cacheblend", "ratio": 0.3}, {"name": "query", "ratio": 0.2, "layers": "all"},
    {"name": "random", "seed": 3}, {"name": "full_reuse", "rotate": False},
    {"name": "union", "first": "epic", "second": {"name": "query", "asking": 4}},
]  # fmt: skip


def parameters(T: int, documents: list[list[int]] | None = None) -> st.SearchStrategy[Any]:
    """`kv_transfer_params["lmc"]` of a prompt of T tokens, whose documents lie at these spans."""
    keys = {
        "blend": st.one_of(st.sampled_from(WORKING), blends, st.integers(0, 400).map(nested)),
        "chunks": st.one_of(st.just(documents), spans(T)) if documents else spans(T),
        "save": st.one_of(st.booleans(), leaves),
        "enabled": st.one_of(st.just(True), st.just(True), leaves),
        "chunk": leaves,
    }
    known = st.fixed_dictionaries({}, optional={k: keys[k] for k in keys if k != "chunk"})
    working = st.fixed_dictionaries(
        {"blend": st.sampled_from(WORKING), "save": st.booleans()},
        optional={"chunks": st.just(documents)},
    )
    return st.one_of(working, known, known, st.fixed_dictionaries({}, optional=keys), leaves)
