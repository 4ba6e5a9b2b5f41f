"""What KV must be compatible with, how that changes in a running engine, and who notices."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lmc.connectors.vllm import identity
from lmc.connectors.vllm.messages import WeightsTold
from lmc.connectors.vllm.namespaces import Namespace
from lmc.connectors.vllm.weights import WeightsWatch


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What the model's files give; a test may change it."""
    digests = [b"f" * 32]
    monkeypatch.setattr(identity, "namespace_of", lambda *arguments: digests[-1])
    return digests


def namespace() -> Namespace:
    return Namespace(None, None, "no rope")


def told(changes: int, version: str | None, step: int = 7) -> WeightsTold:
    return WeightsTold(changes, step, version)


def test_tenants_have_names_of_their_own(files: list[bytes]) -> None:
    one = namespace()
    salts = [None, "a", "b", "x" * 64, "x" * 65, "x" * 66, "x" * 10_000_000]
    assert one.of("") == one.of(None) == files[0]
    assert len({one.of(salt) for salt in salts}) == len(salts)
    assert max(len(one.of(salt)) for salt in salts) <= 32 + 64  # it goes into every key


def test_what_is_handed_over_is_nobodys_who_does_not_name_it_and_no_salt_is_it(
    files: list[bytes],
) -> None:
    one = namespace()
    salts = ("", "a", "handed", "prompt-1", "x" * 64, "x" * 65, "x" * 500)
    names = (None, "prompt-1", "prompt-2")
    found = {one.of(salt, handed=name) for salt in salts for name in names}
    assert len(found) == len(salts) * len(names)
    # A tenant's all the same, and the model's: no eviction of it is put down to other weights.
    assert {of[:32] for of in found} == {one.of(None)[:32]}


def test_weights_that_nobody_knows_are_like_no_others(files: list[bytes]) -> None:
    one, other = namespace(), namespace()
    names = {one.of(None)}
    for changes in (1, 2):
        for each in (one, other):  # by as many updates each, and to other weights
            assert each.heard({0: told(changes, None)}) == 7
            names.add(each.of(None))
    assert len(names) == 5
    assert one.heard({0: told(2, None)}) is None  # no news


def test_named_weights_are_those_of_whoever_was_told_the_same(files: list[bytes]) -> None:
    one, other = namespace(), namespace()
    one.heard({0: told(1, "v1")})
    other.heard({0: told(5, "v1")})
    assert one.of("a") == other.of("a") != namespace().of("a")
    one.heard({0: told(2, "v2")})
    assert one.of("a") != other.of("a")


def test_reloaded_weights_are_those_of_the_files_as_they_are_now(files: list[bytes]) -> None:
    one = namespace()
    before = one.of(None)
    one.heard({0: told(1, None)})
    one.heard({0: told(2, "")})
    assert one.of(None) == before
    files.append(b"g" * 32)
    one.heard({0: told(3, "")})
    assert one.of(None) == b"g" * 32


def test_ranks_that_say_different_things_are_believed_nothing(files: list[bytes]) -> None:
    one = namespace()
    one.heard({0: told(1, "v1", step=5), 1: told(1, "v2", step=4)})
    other = namespace()
    other.heard({0: told(1, "v1"), 1: told(1, "v1")})
    assert one.of(None) != other.of(None)
    assert one.known == {0: 1, 1: 1}


def test_what_is_forgotten_is_never_found_again(files: list[bytes]) -> None:
    one = namespace()
    before = one.of(None)
    one.forget()
    assert one.of(None) != before


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(40, 30)
        self.second = torch.nn.Linear(30, 5, dtype=torch.bfloat16)
        self.tied = self.first.weight

    def load_weights(self, weights: Any) -> str:
        return "loaded"


def test_a_write_into_any_weight_is_noticed() -> None:
    model = Model()
    watch = WeightsWatch(model)
    watch.look(closely=False)
    watch.look(closely=True)
    assert (watch.changes, watch.version) == (0, "")
    for i, weight in enumerate(model.parameters()):
        with torch.no_grad():
            weight[0] += 1
        watch.look(closely=False)
        assert (watch.changes, watch.version) == (i + 1, None)
        watch.look(closely=True)  # the same write, not another
        assert watch.changes == i + 1


def test_a_write_behind_pytorchs_back_is_noticed_when_looked_at_closely() -> None:
    model = Model()
    watch = WeightsWatch(model)
    for i, weight in enumerate(model.parameters()):
        weight.data.copy_(torch.randn(weight.shape))
        watch.look(closely=False)
        assert watch.changes == i
        watch.look(closely=True)
        assert watch.changes == i + 1
        watch.look(closely=True)
        assert watch.changes == i + 1


def test_other_storage_and_loading_are_noticed_at_once() -> None:
    model = Model()
    watch = WeightsWatch(model)
    model.first.weight.data = torch.zeros(30, 40)
    watch.look(closely=False)
    assert watch.changes == 1
    assert model.load_weights([]) == "loaded"
    assert watch.changes == 2
    # What the load itself wrote is no further change.
    watch.look(closely=True)
    assert watch.changes == 2


def test_what_was_told_has_the_name_that_was_told_with_it() -> None:
    model = Model()
    watch = WeightsWatch(model)
    model.first.weight.data.zero_()
    watch.changed("v1")
    watch.look(closely=True)
    assert (watch.changes, watch.version) == (1, "v1")
    watch.look(closely=True)
    assert (watch.changes, watch.version) == (1, "v1")
    model.second.weight.data.zero_()
    watch.look(closely=True)
    assert (watch.changes, watch.version) == (2, None)
