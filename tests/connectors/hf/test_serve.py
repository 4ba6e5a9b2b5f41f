"""Blended requests on tiny models of each family: what must equal what, and what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lmc.blend import STRATEGIES
from lmc.connectors.hf import HFModel, HFStore, run_blend
from lmc.connectors.hf.adapter import Pages
from lmc.connectors.hf.serve import positions_of
from tests.connectors.hf.tiny import (
    CHUNKS,
    END,
    FAMILIES,
    QUESTION,
    SPANS,
    SYSTEM,
    TOKENS,
    T,
    blended,
    far,
    reference,
    stored,
    tiny,
)

# Recomputing everything by each way that chooses rows.
EVERYTHING = [
    "full_recompute",
    {"name": "epic", "link_tokens": 40},
    {"name": "cacheblend", "ratio": 1.0, "tensor": "k"},
    {"name": "cacheblend", "ratio": [1.0, 1.0], "check_layer": 0, "write": "selected"},
    {"name": "query", "ratio": 1.0},
    {"name": "uniform", "ratio": 1.0},
    {"name": "union", "first": "random", "second": {"name": "query", "ratio": 1.0}},
    {"name": "cachecraft", "alpha": 2.0},
    {"name": "oracle_deviation", "ratio": 1.0},
]
SOMETHING = [
    "full_reuse",
    "epic",
    "block",
    "cacheblend",
    {"name": "cacheblend", "ratio": [0.5, 0.3, 0.1], "check_layer": 0, "tensor": "k"},
    {"name": "query", "layers": [0, 2], "heads": "max", "queries": "max"},
    "random",
    "uniform",
    "tail",
    "cachecraft",
    "union",
]
# Families whose attention has neither a cap nor sinks.
PLAIN = [family for family in FAMILIES if family not in ("Gemma2", "GptOss")]
# Behind the second chunk stands a text that no store knows.
GAP = [(7 * i + 3) % 500 for i in range(25)]
GAPPED = [*TOKENS[:100], *GAP, *TOKENS[100:]]
GAPPED_SPANS = [*SPANS[:3], (125, 165), (165, 205)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("strategy", EVERYTHING, ids=str)
def test_recomputing_everything_is_full_prefill(family: str, strategy: Any) -> None:
    assert far(blended(stored(family), strategy).logits[0], reference(tiny(family))[-1:]) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_reuse_without_recompute_is_not(family: str) -> None:
    assert far(blended(stored(family), "full_reuse").logits[0], reference(tiny(family))[-1:]) > 0.1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("strategy", ["full_reuse", "cacheblend", "query", "ape"])
def test_nothing_moved_is_prefix_caching(family: str, strategy: str) -> None:
    if strategy == "ape" and family not in PLAIN:
        pytest.skip("its attention is not what APE knows: it is refused, as a test below has it")
    store = HFStore(tiny(family))
    store.add(SYSTEM, [(0, len(SYSTEM))])
    got = blended(store, strategy)
    assert got.plan.kinds()["exact"] == len(SYSTEM)
    assert got.plan.kinds()["new"] == T - len(SYSTEM)
    assert got.compute_fraction == 1 - len(SYSTEM) / T
    assert far(got.logits[0], reference(tiny(family))[-1:]) < 1e-5


@pytest.mark.parametrize("i", range(5))
@pytest.mark.parametrize("strategy", ["full_recompute", {"name": "query", "ratio": 1.0}])
def test_recomputing_all_behind_chunk_i_is_prefix_caching_of_i_chunks(
    i: int, strategy: Any
) -> None:
    store = HFStore(tiny())
    store.add(TOKENS[: 20 + 40 * i], SPANS[: i + 1])
    for chunk in CHUNKS[i:]:
        store.add(chunk, [(0, len(chunk))])
    got, prefix = blended(store, strategy), blended(store, "prefix")
    assert prefix.plan.end == 20 + 40 * i
    assert got.plan.kinds()["exact"] == prefix.plan.kinds()["exact"] == 20 + 40 * i
    assert far(got.logits[0], prefix.logits[0]) < 1e-5
    assert far(got.pages.rows(0, T), prefix.pages.rows(0, T)) < 1e-4
    if strategy == "full_recompute":
        assert got.compute_fraction == prefix.compute_fraction
        assert got.flops_fraction == pytest.approx(prefix.flops_fraction)


@pytest.mark.parametrize("strategy", SOMETHING, ids=str)
@pytest.mark.parametrize("gap", [False, True])
def test_a_replayed_selection_gives_the_same(strategy: Any, gap: bool) -> None:
    tokens, spans = (GAPPED, GAPPED_SPANS) if gap else (TOKENS, SPANS)
    first = run_blend(stored(), tokens, spans, STRATEGIES.build(strategy))
    again = run_blend(
        stored(), tokens, spans, STRATEGIES.build({"name": "replay", "by_layer": first.selection})
    )
    assert again.selection == first.selection
    assert far(again.logits[0], first.logits[0]) < 1e-5
    assert far(again.pages.buffer, first.pages.buffer) < 1e-4


@pytest.mark.parametrize("strategy", [*SOMETHING, "full_recompute", "ape"], ids=str)
@pytest.mark.parametrize("position", ["global", "local"])
def test_what_lay_in_the_pages_before_changes_nothing(
    strategy: Any, position: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (stored(), GAPPED, GAPPED_SPANS, STRATEGIES.build(strategy))
    options: dict[str, Any] = {"position": position, "answers": ([5, 6, 7],)}
    clean = run_blend(*arguments, **options)
    monkeypatch.setattr(HFModel, "pages", _poisoned)
    poisoned = run_blend(*arguments, **options)
    assert poisoned.selection == clean.selection
    assert far(poisoned.logits[0], clean.logits[0]) < 1e-5


_pages = HFModel.pages


def _poisoned(model: HFModel, rows: int) -> Pages:
    """Large and finite: NaN would survive any mask, since masked values are still multiplied."""
    pages = _pages(model, rows)
    pages.buffer.fill_(1e4)
    return pages


@pytest.mark.parametrize(
    "strategy", [*SOMETHING, "full_recompute", "prefix", "ape", "oracle_deviation"], ids=str
)
@pytest.mark.parametrize("gap", [False, True])
def test_the_compute_fraction_counts_every_row_of_every_layer(strategy: Any, gap: bool) -> None:
    """Counted where rows go through the model's layers, and again from the outcome."""
    tokens, spans = (GAPPED, GAPPED_SPANS) if gap else (TOKENS, SPANS)
    n, L, cost = len(tokens), 4, tiny().shape.cost
    passed: list[np.ndarray] = []

    def count(_: Any, arguments: Any, options: Any) -> None:
        passed.append(options["position_ids"][0].numpy())
        assert arguments[0].shape[1] == len(passed[-1])

    store = stored()
    hooks = [x.register_forward_pre_hook(count, with_kwargs=True) for x in tiny().inner.layers]
    try:
        got = run_blend(store, tokens, spans, STRATEGIES.build(strategy))
    finally:
        for hook in hooks:
            hook.remove()
    assert got.compute_fraction == pytest.approx(sum(map(len, passed)) / (n * L))
    keys = sum(int((rows + 1).sum()) for rows in passed)
    flops = cost.linear * sum(map(len, passed)) + cost.attention * keys
    assert got.flops_fraction == pytest.approx(flops / (L * cost.flops(0, n)))
    suffix = L * (n - got.plan.end)
    oracle = n * L if strategy == "oracle_deviation" else 0
    by_hand = sum(len(rows) for rows in got.outcome.rows) + got.outcome.probe + suffix + oracle
    assert by_hand == sum(map(len, passed))
    # What a scheduler reckons with beforehand; a union cannot know how far its parts overlap.
    expected = sum((end - start) * share for start, end, share in got.plan.computed_runs()) * L
    if strategy == "union":
        assert by_hand <= expected
    else:
        assert by_hand - oracle == pytest.approx(expected)
    assert sum(got.plan.kinds().values()) == n


def test_a_probe_is_paid_for() -> None:
    got = blended(stored(), {"name": "query", "ratio": 0.0, "layers": [2]})
    assert got.outcome.probe == 3 * len(QUESTION)
    assert got.compute_fraction == pytest.approx((4 + 3) * len(QUESTION) / (4 * T))


def test_bottom_right_costs_quality_and_is_right_only_when_everything_is_recomputed() -> None:
    masked = {"name": "cacheblend", "causal": "bottom_right", "ratio": 1.0}
    right = reference(tiny())[-1:]
    assert far(blended(stored(), masked).logits[0], right) < 1e-5
    few = [blended(stored(), masked | {"ratio": 0.2, "causal": causal})
           for causal in ("position", "bottom_right")]  # fmt: skip
    assert few[0].selection == few[1].selection  # up to the check layer all rows are computed
    assert far(few[0].logits[0], few[1].logits[0]) > 1e-2


# -- oracle ----------------------------------------------------------------------------------


@pytest.mark.parametrize("position", ["global", "local"])
def test_the_oracle_lies_between_full_reuse_and_full_prefill(position: Any) -> None:
    store = stored()
    all_of_it, none_of_it, some = (
        blended(store, {"name": "oracle_deviation", "ratio": ratio}, position=position)
        for ratio in (1.0, 0.0, 0.3)
    )
    at = positions_of(all_of_it.plan, SPANS, T) if position == "local" else None
    full = tiny().prefill(np.array(TOKENS), at)
    reuse = blended(store, "full_reuse", position=position)
    assert far(all_of_it.logits[0], full.logits) < 1e-5
    assert torch.equal(none_of_it.logits[0], reuse.logits[0])
    right = full.pages.rows(0, END)
    far_from = [(x.pages.rows(0, END) - right).square().sum() for x in (some, reuse)]
    assert 0 < far_from[0] < far_from[1]
    assert some.compute_fraction == reuse.compute_fraction + 1 > 1


def test_the_oracle_patches_the_rows_that_are_farthest() -> None:
    some = blended(stored(), {"name": "oracle_deviation", "ratio": 0.1})
    reuse = blended(stored(), "full_reuse").pages.rows(0, END)
    right = tiny().prefill(np.array(TOKENS)).pages.rows(0, END)
    distance = (reuse - right).square().sum((1, 3, 4))[1:]  # [L - 1, END]; layer 0 is right
    patched = (some.pages.rows(0, END) != reuse).flatten(3).any(3).any(1)[1:]
    for layer in range(3):
        assert patched[layer].sum() == 16
        assert distance[layer][patched[layer]].min() >= distance[layer][~patched[layer]].max()


def test_truth_that_is_given_is_used_for_global_positions_only() -> None:
    truth = tiny().prefill(np.array(TOKENS)).pages
    strategy = {"name": "oracle_deviation", "ratio": 1.0}
    for position in ("global", "local"):
        given = blended(stored(), strategy, truth=truth, position=position)
        made = blended(stored(), strategy, position=position)
        assert far(given.logits[0], made.logits[0]) < 1e-5


# -- APE -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "what"), [("Gemma2", "capped"), ("GptOss", "learned sinks")])
def test_attention_of_a_strategy_that_leaves_something_out_is_refused(
    family: str, what: str
) -> None:
    with pytest.raises(ValueError, match=f"a strategy does not know of a model's {what}"):
        blended(stored(family), "ape")


@pytest.mark.parametrize("family", PLAIN)
@pytest.mark.parametrize("context", ["isolated", "first_seen"])
def test_ape_without_temperature_and_scale_is_full_reuse(family: str, context: Any) -> None:
    plain = {"name": "ape", "temperature": 1.0, "scale": 1.0}
    got, reuse = (blended(stored(family, context), s) for s in (plain, "full_reuse"))
    assert far(got.logits[0], reuse.logits[0]) < 1e-5
    assert far(blended(stored(family, context), "ape").logits[0], reuse.logits[0]) > 1e-3


def test_ape_treats_the_first_text_as_the_others() -> None:
    """It is exact where it stands, and at the place where all of them begin."""
    got = blended(stored("Llama", "anchored"), "ape", position="local")
    assert got.plan.kinds() == {
        "local": 0, "local_blended": 0, "exact": 20, "moved": 160, "recomputed": 0, "new": 10,
    }  # fmt: skip
    assert got.plan.outline.moved == tuple(SPANS[1:])
    at = positions_of(got.plan, SPANS, T)
    assert [at[start] for start, _ in SPANS[1:]] == [20] * 4
    # All were encoded there, so no key is rotated.
    store = stored("Llama", "anchored")
    for s in got.plan.found:
        reused = got.pages.rows(s.start, s.end)
        assert torch.equal(reused, store.chunk(s.record.slot))


# -- positions -------------------------------------------------------------------------------


def test_local_positions_begin_at_one_place_and_go_on_behind_the_longest() -> None:
    store = HFStore(tiny())
    longer = [*CHUNKS[1], 11, 12, 13]
    store.add_chunks("isolated", SYSTEM, [CHUNKS[0], longer, CHUNKS[2]])
    tokens = [*SYSTEM, *CHUNKS[0], *longer, *CHUNKS[2], *QUESTION]
    spans = [(0, 20), (20, 60), (60, 103), (103, 143)]
    got = run_blend(store, tokens, spans, STRATEGIES.build("full_reuse"), position="local")
    at = positions_of(got.plan, spans, len(tokens) + 2)
    expected = [*range(20), *range(20, 60), *range(20, 63), *range(20, 60), *range(63, 75)]
    assert at.tolist() == expected
    # A key of the first layer depends on its token and its position alone.
    fresh = tiny().prefill(np.array(tokens), at).pages.rows(0, 143)
    assert far(got.pages.rows(0, 143)[0, 0], fresh[0, 0]) < 1e-5


def test_an_unknown_position_policy_is_named() -> None:
    with pytest.raises(ValueError, match="position: got 'near', valid: global, local"):
        blended(stored(), "full_reuse", position="near")


# -- answers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["full_recompute", "ape", "cacheblend"])
@pytest.mark.parametrize("position", ["global", "local"])
def test_a_generated_answer_is_what_forcing_it_predicts(strategy: str, position: Any) -> None:
    written = blended(stored(), strategy, position=position, generate=6).answer
    forced = blended(stored(), strategy, position=position, answers=(written, [1, 2], ()))
    assert len(written) == 6
    assert [len(logits) for logits in forced.logits] == [6, 2, 1]
    assert forced.logits[0].argmax(-1).tolist() == written
    if (strategy, position) == ("full_recompute", "global"):
        prompt = torch.tensor([TOKENS])
        own = tiny().model.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None)
        assert own[0, T:].tolist() == written


def test_answers_are_forced_each_on_its_own() -> None:
    both = blended(stored(), "full_recompute", answers=([5, 6, 7], [8, 9]))
    for answer, logits in zip(([5, 6, 7], [8, 9]), both.logits, strict=True):
        right = reference(tiny(), [*TOKENS, *answer])[T - 1 : -1]
        assert far(logits, right) < 1e-5


def test_recorded_outputs_are_those_of_the_rows_with_logits() -> None:
    answer = [5, 6, 7]
    got = blended(stored(), "full_recompute", answers=(answer,), record=True)
    full = tiny().prefill(np.array([*TOKENS, *answer[:-1]]), logits_from=T - 1, record=True)
    assert got.outputs is not None
    assert full.outputs is not None
    assert got.outputs.shape == (4, 3, 128)
    assert far(got.outputs, full.outputs) < 1e-5


# -- a real model ----------------------------------------------------------------------------


@pytest.mark.heavy
def test_smollm2_recomputed_is_full_prefill_and_reused_is_near(smollm2_dir: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lmc import prompt

    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    model = HFModel(AutoModelForCausalLM.from_pretrained(smollm2_dir))
    asked = prompt(
        [
            "Answer from the notes.\n",
            "Ann lives in Rome and works as a baker; she has two cats.\n",
            "Bob lives in Oslo and paints houses; he has a blue boat.\n",
            "Question: in which city does Ann live? Answer: Ann lives in",
        ],
        tokenizer,
    )
    store = HFStore(model)
    system, *chunks, _ = (asked.token_ids[start:end] for start, end in asked.spans)
    store.add_chunks("isolated", system, chunks)
    where = (asked.token_ids, asked.spans[:-1])
    right = reference(model, asked.token_ids)[-1:]
    logits = {
        name: run_blend(store, *where, STRATEGIES.build(strategy)).logits[0]
        for name, strategy in {
            "full_recompute": "full_recompute",
            "epic": {"name": "epic", "link_tokens": 4},
            "full_reuse": "full_reuse",
        }.items()
    }
    assert far(logits["full_recompute"], right) < 1e-4 * float(right.abs().max())
    kl = {name: float(_kl(right, found)) for name, found in logits.items()}
    assert kl["full_recompute"] < 1e-6 < kl["epic"] < kl["full_reuse"]


def _kl(full: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    p, q = full.double().log_softmax(-1), other.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum()
