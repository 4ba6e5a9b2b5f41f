"""Files of profiles, which profile is of which model, and what lies between measured values."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st

from lmc.blend import STRATEGIES
from lmc.quality import profile as module
from lmc.quality.profile import (
    QualityProfile,
    find_profile,
    interpolated,
    least_knob,
    load_profile,
    user_profiles,
)
from tests.quality.profiles import FULL, MODEL, ROPE, WEIGHTS, cacheblend, epic, profile


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_saved_profile_reads_the_same_and_leaves_nothing_else(tmp_path: Path) -> None:
    FULL.save(tmp_path / "new" / "a.yaml")
    assert load_profile(tmp_path / "new" / "a.yaml") == FULL
    assert os.listdir(tmp_path / "new") == ["a.yaml"]


def _break(**changes: Any) -> str:
    return yaml.safe_dump({**FULL.model_dump(), **changes})


def _row(**changes: Any) -> str:
    return _break(rows=[{**FULL.rows[0].model_dump(), **changes}])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is no quality profile: "),
        ("[1, 2", "is not YAML"),
        ("a: \0", "is not YAML"),
        ("- 1", "is no quality profile: "),
        (_break(weights="ab"), "weights: "),
        (_break(rows=[]), "rows: "),
        (_break(prompts=0), "prompts: "),
        (_break(extra=1), "extra: "),
        (_break(rows=[FULL.rows[0].model_dump()] * 2), "is there twice"),
        (_row(recovery=float("nan")), "rows.0.recovery: "),
        (_row(kl=-1.0), "rows.0.kl: "),
        (_row(low=1.0), "low is 1.0, above high"),
        (_row(blend={"ratio": 0.1}), "want the name of a strategy"),
        (_row(blend={"name": "epic", "ratio": 0.1}), "got unknown field ratio"),
    ],
)
def test_damaged_files_say_what_is_wrong(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "damaged.yaml"
    file.write_text(text)
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words are the test
        load_profile(file)
    assert str(error.value).startswith(str(file))
    assert words in str(error.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        load_profile(tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match="is not YAML"):
        load_profile(tmp_path / "bytes.yaml")


def test_a_file_does_not_import_a_users_module(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(_row(blend={"name": "no_such_module:Strategy"}))
    assert load_profile(tmp_path / "p.yaml").curve("epic", STRATEGIES.build("epic")) == []


def test_the_users_newest_is_found_before_the_shipped_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = tmp_path / "shipped"
    monkeypatch.setattr(module, "SHIPPED", shipped)
    assert find_profile(*MODEL) is None
    FULL.save(shipped / FULL.file_name)
    assert find_profile(*MODEL) == FULL
    for age, recovery in ((200, 0.2), (100, 0.3), (300, 0.4)):
        one = profile(epic(4, recovery)).model_copy(update={"model": f"m{age}"})
        file = user_profiles() / one.file_name
        one.save(file)
        os.utime(file, (1e9 - age, 1e9 - age))
    found = find_profile(*MODEL)
    assert found is not None
    assert found.rows[0].recovery == 0.3


@pytest.mark.parametrize(
    "other", [(ROPE, "float32", ROPE), (WEIGHTS, "bfloat16", ROPE), (WEIGHTS, "float32", WEIGHTS)]
)
def test_a_profile_of_another_model_is_never_used(
    tmp_path: Path, other: tuple[bytes, str, bytes]
) -> None:
    FULL.save(user_profiles() / FULL.file_name)
    assert find_profile(*MODEL) == FULL
    assert find_profile(*other) is None
    with pytest.raises(ValueError, match="of another model, tiny/model in float32"):
        find_profile(*other, path=user_profiles() / FULL.file_name)
    weights, dtype, rope = other
    theirs = FULL.model_copy(
        update={"weights": weights.hex(), "dtype": dtype, "rope": rope.hex()}
    ).file_name
    (user_profiles() / FULL.file_name).rename(user_profiles() / theirs)
    with pytest.raises(ValueError, match="of another model"):
        find_profile(*other)


def test_a_profile_tells_of_chunks_encoded_as_it_had_them() -> None:
    other = FULL.model_copy(update={"context": "anchored"})
    FULL.save(user_profiles() / FULL.file_name)
    assert find_profile(*MODEL, "anchored") is None
    other.save(user_profiles() / other.file_name)
    assert find_profile(*MODEL, "anchored") == other
    assert find_profile(*MODEL) == FULL
    with pytest.raises(ValueError, match="encoded anchored, and here they are isolated: run"):
        find_profile(*MODEL, path=user_profiles() / other.file_name)


def test_shipped_profiles_are_whole_and_found_by_their_names() -> None:
    for file in module.SHIPPED.glob("*"):
        one = load_profile(file)
        assert file.name == one.file_name
        model = (bytes.fromhex(one.weights), one.dtype, bytes.fromhex(one.rope))
        assert find_profile(*model) == one


def test_a_curve_has_the_rows_that_differ_in_the_knob_only() -> None:
    def knobs(blend: Any) -> list[Any]:
        return [knob for knob, _ in FULL.curve(blend, STRATEGIES.build(blend))]

    assert knobs({"name": "epic", "link_tokens": 7}) == [4, 16, 32]
    assert knobs("lmc.blend.epic:Epic") == [4, 16, 32]
    assert knobs("cacheblend") == [0.15, 0.35]
    assert knobs({"name": "cacheblend", "tensor": "k"}) == [0.05]
    assert knobs({"name": "cacheblend", "norm": "l1"}) == []
    assert knobs({"name": "cacheblend", "ratio": [0.35, 0.15]}) == []
    assert knobs("full_reuse") == [None]
    assert knobs("random") == []


def test_a_list_of_ratios_is_known_only_as_it_was_measured() -> None:
    falling = {"name": "cacheblend", "ratio": [0.35, 0.15]}
    row = cacheblend(0.35, 0.7).model_copy(update={"blend": falling})
    both = profile(row, cacheblend(0.15, 0.4))
    assert both.curve(falling, STRATEGIES.build(falling)) == [(None, row)]
    assert [k for k, _ in both.curve("cacheblend", STRATEGIES.build("cacheblend"))] == [0.15]


curves = st.dictionaries(
    st.integers(0, 60), st.floats(-2, 1), min_size=1, max_size=6
).map(lambda rows: [(k, epic(k, r)) for k, r in sorted(rows.items())])  # fmt: skip


@given(curves, st.floats(-5, 80))
def test_between_two_values_recovery_lies_between_theirs(curve: Any, at: float) -> None:
    found = interpolated(curve, at)
    if at < curve[0][0]:
        assert found is None
        return
    assert found is not None
    below = [row for knob, row in curve if knob <= at][-1]
    above = next((row for knob, row in curve if knob >= at), below)
    for value, name in zip(found, ("recovery", "low", "high"), strict=True):
        ends = (getattr(below, name), getattr(above, name))
        assert min(ends) - 1e-12 <= value <= max(ends) + 1e-12
        if at in dict(curve):
            assert value == getattr(dict(curve)[at], name)


@given(curves, st.lists(st.floats(0, 80), min_size=2, max_size=2))
def test_interpolation_keeps_the_order(curve: Any, at: list[float]) -> None:
    recoveries = sorted(row.recovery for _, row in curve)
    rising = [(k, epic(k, r)) for (k, _), r in zip(curve, recoveries, strict=True)]
    low, high = (interpolated(rising, x) for x in sorted(at))
    assume(low is not None and high is not None)
    assert low is not None and high is not None
    assert low[0] <= high[0] + 1e-12


@given(curves, st.floats(-2, 1), st.booleans())
def test_the_least_knob_reaches_the_bound_and_one_less_does_not(
    curve: Any, bound: float, fractions: bool
) -> None:
    if fractions:
        curve = [(k / 60, cacheblend(k / 60, row.recovery)) for k, row in curve]
    knob = least_knob(curve, bound)
    if knob is None:
        assert max(row.recovery for _, row in curve) < bound
        return
    assert type(knob) is type(curve[0][0])
    reached = interpolated(curve, knob)
    assert reached is not None
    assert reached[0] >= bound
    before = interpolated(curve, knob - (0.001 if fractions else 1))
    assert before is None or before[0] < bound + 1e-9


def test_equality_of_profiles_covers_all() -> None:
    assert QualityProfile.model_validate(FULL.model_dump()) == FULL
    assert profile(epic(4, 0.2)) != profile(epic(4, 0.3))
