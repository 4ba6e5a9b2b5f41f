"""The namespace of a model: its bytes, which stored KV is found by, and what changes them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lmc.model.identity import namespace_of
from lmc.model.rope import Rope, Rotations


def turning(*inv_freq: float, interleaved: bool = False) -> Rotations:
    """Two layers, by one rotation."""
    rope = Rope(np.array(inv_freq), interleaved=interleaved, kind="default")
    return Rotations((rope,), (0, 0))


ROPE = turning(1.0, 0.1)
GIVEN = ('{"a": 1}', bytes(32), "float32", ROPE)


def test_stored_kv_is_found_by_the_same_bytes_as_ever() -> None:
    assert (
        namespace_of(*GIVEN).hex()
        == "6c02d7fe93142c55f386e57e2af229faae53f4b39adff0f5458481e0c678c74b"
    )


def test_whatever_makes_kv_another_changes_it() -> None:
    others = [
        ('{"a": 2}', *GIVEN[1:]),
        (GIVEN[0], b"1" * 32, *GIVEN[2:]),
        (*GIVEN[:2], "bfloat16", ROPE),
        (*GIVEN[:3], None),
        (*GIVEN[:3], turning(1.0, 0.2)),
        (*GIVEN[:3], turning(1.0, 0.1, interleaved=True)),
        (*GIVEN[:3], replace(ROPE, of=(0, -1))),
        (*GIVEN[:3], replace(ROPE, ropes=(*ROPE.ropes, *turning(1.0, 0.2).ropes), of=(0, 1))),
    ]
    assert len({namespace_of(*GIVEN), *(namespace_of(*other) for other in others)}) == 9


def test_how_an_engine_computes_changes_it() -> None:
    ways = [
        {},
        {"computed_in": "bfloat16"},
        {"computed_in": "float16"},
        {"engine": "fp8"},
        {"engine": "fp8", "computed_in": "bfloat16"},
    ]
    assert len({namespace_of(*GIVEN, **way) for way in ways}) == len(ways)
    assert namespace_of(*GIVEN, computed_in="float32") == namespace_of(*GIVEN)
