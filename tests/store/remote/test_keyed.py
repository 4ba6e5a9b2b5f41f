"""What tells of parts, and parts themselves, as a server may lose, swap or spoil them."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import redis

from lmc.store.remote.entries import MOST_BYTES
from lmc.store.tier import Behind
from tests.store.disk.chunks import Spec
from tests.store.remote.kept import SPECS, found, opened, put, running, served


@pytest.mark.parametrize("where", ["payload", "header", "entry", "another's"])
def test_bytes_that_are_not_what_was_put_are_not_served(where: str) -> None:
    with running() as server, opened(server.url) as tier:
        assert put(tier, *SPECS[:2]) == ["stored"] * 2
        client = redis.Redis.from_url(server.url)
        names = {kind: sorted(client.keys(f"lmc:2:{kind}*")) for kind in "pkb"}
        for name in names["p"]:
            value = bytearray(client.get(name))
            value[-1 if where == "payload" else 60] ^= 1
            if where in ("payload", "header"):
                client.set(name, bytes(value))
        if where == "another's":
            one, two = (client.get(name) for name in names["p"])
            client.set(names["p"][0], two)
            client.set(names["p"][1], one)
        if where == "entry":
            for name in [*names["k"], *names["b"]]:
                client.set(name, bytes(range(200)))
        with opened(server.url) as another:
            assert not any(served(another, spec) for spec in SPECS[:2])
            # It makes room for what is right.
            assert put(another, SPECS[0]) == ["stored"] and served(another, SPECS[0])


def test_engines_share_and_tenants_do_not() -> None:
    with running() as server, opened(server.url) as one, opened(server.url) as other:
        assert put(one, SPECS[0]) == ["stored"]
        assert found(other, SPECS[0]) and served(other, SPECS[0])
        assert put(other, SPECS[0]) == ["known"]
        assert not found(other, Spec(0, 0, 20, tenant=1))
        with opened(server.url, prefix="elsewhere") as elsewhere:
            assert not found(elsewhere, SPECS[0])


def test_a_prompt_of_many_chunks_is_asked_for_in_one_go_and_of_what_is_found_in_a_second() -> None:
    with running() as server, opened(server.url) as tier:
        assert put(tier, *SPECS) == ["stored"] * 4
        client = redis.Redis.from_url(server.url)
        record = SPECS[0].record()
        keys = [bytes([i, j]) * 16 for i in range(40) for j in range(50)]
        before = client.info("commandstats")
        assert not any(tier.lookup_many(record.namespace, keys, [], time.monotonic() + 5)[0])
        after = client.info("commandstats")
        grown = {
            name: after[name]["calls"] - before.get(name, {"calls": 0})["calls"]
            for name in after if name != "cmdstat_info"
        }  # fmt: skip
        assert {name: n for name, n in grown.items() if n} == {"cmdstat_mget": 1}


def test_entries_do_not_grow_without_end() -> None:
    with running() as server, opened(server.url) as tier:
        client = redis.Redis.from_url(server.url)
        for _ in range(400):
            assert put(tier, SPECS[0]) == ["stored"]
            for name in client.keys("lmc:2:p*"):
                client.delete(name)
        sizes = [client.strlen(name) for kind in "kb" for name in client.keys(f"lmc:2:{kind}*")]
        assert len(sizes) == 2 and max(sizes) < 70 << 10
        assert put(tier, SPECS[0]) == ["stored"] and served(tier, SPECS[0])


def test_parts_in_each_others_places_are_not_served() -> None:
    """Of one content behind two texts, and of one record the halves of two ranks."""
    for pair in ([Spec(1, 1, 20), Spec(1, 2, 20)], [Spec(2, 1, 20, kind="ranks")]):
        with running() as server, opened(server.url) as tier:
            assert set(tier.put([item for spec in pair for item in spec.items()])) == {"stored"}
            client = redis.Redis.from_url(server.url)
            one, two = sorted(client.keys("lmc:2:p*"))
            first, second = client.get(one), client.get(two)
            client.set(one, second)
            client.set(two, first)
            with opened(server.url) as another:
                assert not any(served(another, spec) for spec in pair)
                assert another.counts["faults:damaged"]
                assert set(another.put([i for s in pair for i in s.items()])) == {"stored"}
                assert all(served(another, spec) for spec in pair)


def test_what_all_prompts_begin_with_does_not_make_lookups_longer_for_ever() -> None:
    many = [Spec(content, 0, 9) for content in range(1, 400)]
    first = many[0].record()
    # All of them behind one text, as the first chunks of prompts are.
    same = [
        replace(
            spec.record(), context=first.context, tokens=first.tokens[:8] + spec.record().tokens[8:]
        )
        for spec in many
    ]
    with running() as server, opened(server.url) as tier:
        items = [(r, spec.sections()) for r, spec in zip(same, many, strict=True)]
        assert set(tier.put(items)) == {"stored"}
        client = redis.Redis.from_url(server.url)
        assert max(client.strlen(name) for name in client.keys("lmc:2:b*")) <= MOST_BYTES
        question = Behind(first.context, first.tokens[:8])
        _, (told,) = tier.lookup_many(first.namespace, [], [question], time.monotonic() + 5)
        assert [r.id for r in told] == [r.id for r in same[-16:]]


@pytest.mark.parametrize("kind", ["k", "b"])
@pytest.mark.parametrize("how", ["gone", "damaged", "another type"])
def test_what_no_longer_tells_of_a_part_does_so_once_it_is_put_again(kind: str, how: str) -> None:
    with running() as server, opened(server.url) as tier:
        spec, record = SPECS[0], SPECS[0].record()
        assert put(tier, spec) == ["stored"]
        client = redis.Redis.from_url(server.url)
        (name,) = client.keys(f"lmc:2:{kind}*")
        value = client.get(name)
        client.delete(name)
        if how == "damaged":
            client.set(name, value[:30])
        elif how == "another type":
            client.lpush(name, "x")
        with opened(server.url) as other:
            assert put(other, spec)[0] in ("known", "stored")
            behind = Behind(record.context, record.tokens[:8])
            told = other.lookup_many(record.namespace, [record.key], [behind], time.monotonic() + 5)
            assert [[r.id for r in some] for of in told for some in of] == [[record.id]] * 2
            assert served(other, spec)


def test_a_part_of_another_type_makes_room_for_what_is_put() -> None:
    with running() as server, opened(server.url) as tier:
        assert put(tier, SPECS[0]) == ["stored"]
        client = redis.Redis.from_url(server.url)
        (name,) = client.keys("lmc:2:p*")
        client.delete(name)
        client.lpush(name, "x")
        assert not served(tier, SPECS[0])
        assert put(tier, SPECS[0]) == ["stored"] and served(tier, SPECS[0])


def test_an_open_end_that_has_grown_takes_the_place_of_the_shorter_one() -> None:
    short, long = (Spec(3, 1, T, tail=True) for T in (9, 15))
    with running() as server, opened(server.url) as tier:
        assert put(tier, short) == ["stored"] and put(tier, long) == ["stored"]
        assert tier.contains([short.record(), long.record()]) == [False, True]
        assert put(tier, short) == ["known"]  # it would add nothing
        assert served(tier, long) and not served(tier, short)


def test_of_many_variants_of_a_text_the_latest_are_kept() -> None:
    variants = [Spec(1, context, 20) for context in range(5)]
    with running() as server, opened(server.url) as tier:
        for spec in variants:
            assert put(tier, spec) == ["stored"]
        assert tier.contains([spec.record() for spec in variants]) == [False] * 3 + [True] * 2
