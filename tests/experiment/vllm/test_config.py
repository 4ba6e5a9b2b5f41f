"""Experiment files: what is read, and what is refused with which words."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmc.experiment.run import load as load_config
from lmc.experiment.vllm.config import BlendArm, StockArm

EXPERIMENTS = sorted((Path(__file__).parents[3] / "experiments").glob("*.yaml"))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_loads(path: Path) -> None:
    assert load_config(path).arms


def test_there_are_experiments() -> None:
    assert {"demo", "pareto"} <= {path.stem for path in EXPERIMENTS}


def test_demo_has_the_arms_the_readme_names(demo: Path) -> None:
    assert list(load_config(demo).arms) == [
        "full_prefill",
        "prefix_caching",
        "prefix_equal_rows",
        "full_recompute",
        "full_reuse_norotate",
        "full_reuse",
        "epic16",
        "epic16_cdc",
    ]


def test_overrides_are_yaml_and_may_add_an_arm_or_drop_one(demo: Path) -> None:
    config = load_config(
        demo,
        ["workload.seed=7", "arms.epic16_cdc=null", "arms.epic4={blend: {name: epic}}"],
    )
    assert config.workload["seed"] == 7
    assert "epic16_cdc" not in config.arms
    assert config.arms["epic4"] == BlendArm(blend={"name": "epic"})
    assert isinstance(config.arms["prefix_caching"], StockArm)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("workload.sed=7", "unknown field sed; valid: seed, documents"),
        ("engine.thread=1", "unknown key thread; valid: dtype"),
        ("arms.epic16.blend.name=epik", "got 'epik'; valid: ape, auto, block"),
        ("arms.epic16.blend.links=3", "unknown field links; valid: link_tokens"),
        ("arms.epic16.spam=1", "unknown key spam; valid: blend, spans"),
        ("arms.prefix_caching.cache=all", "'none', 'shared' or 'warmed' (got 'all')"),
        ("arms.prefix_equal_rows.equal_rows_of=nobody", "got nobody; valid: full_recompute"),
        ("arms.prefix_equal_rows.equal_rows_of=null", "cache: warmed with equal_rows_of: None"),
        ("arms.full_prefill=null", "`full_prefill: {cache: none}`, which must be among them"),
        ("workload.name=other", "got 'other'; valid: agents, chain, chat, induction"),
        ("workload.documents_per_prompt=9", "got 9, allowed: 2 to 8"),
        ("workload.limit=0", "limit: got 0, want a whole number of at least 1"),
        ("connector=sglang", "connector: got 'sglang'; valid: vllm, hf"),
        ("lmc.memory=1", "valid keys: memory_bytes"),
        ("lmc.chunker.name=dcd", "got 'dcd'; valid: "),
        ("seed", "want a.b=value"),
        ("model.name=x", "model is a value"),
    ],
)
def test_wrong_values_are_named_with_what_is_allowed(demo: Path, override: str, words: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words are the test
        load_config(demo, [override])
    assert words in str(error.value)


def test_extends_merges_key_by_key(tmp_path: Path, demo: Path) -> None:
    child = tmp_path / "child.yaml"
    child.write_text(f"extends: {demo}\nworkload: {{seed: 3}}\narms: {{epic16_cdc: null}}\n")
    config = load_config(child)
    assert config.workload["seed"] == 3
    assert config.workload["documents"] == load_config(demo).workload["documents"]
    assert "epic16_cdc" not in config.arms
    assert "epic16" in config.arms


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.yaml: cannot be read"):
        load_config(tmp_path / "absent.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ValueError, match=r"broken\.yaml: is not YAML"):
        load_config(tmp_path / "broken.yaml")
    (tmp_path / "loop.yaml").write_text("extends: loop.yaml")
    with pytest.raises(ValueError, match=r"loop\.yaml: extends itself"):
        load_config(tmp_path / "loop.yaml")


def test_digest_ignores_only_how_much_is_measured(demo: Path) -> None:
    digest = load_config(demo).digest()
    assert load_config(demo, ["repetitions=5", "workload.limit=1"]).digest() == digest
    assert load_config(demo, ["workload.seed=1"]).digest() != digest
    assert load_config(demo, ["arms.epic16.blend.link_tokens=8"]).digest() != digest


@pytest.mark.parametrize(
    "spelling", ["epic:link_tokens=4", "epic:4", "{name: epic, link_tokens: 4}"]
)
def test_a_strategy_is_written_as_everywhere(demo: Path, spelling: str) -> None:
    config = load_config(demo, [f"arms.epic4={{blend: '{spelling}'}}"])
    assert config.arms["epic4"] == BlendArm(blend={"name": "epic", "link_tokens": 4})


def test_any_workload_is_timed(demo: Path, tmp_path: Path) -> None:
    child = tmp_path / "child.yaml"
    child.write_text(f"extends: {demo}\nworkload: {{name: chain, chunks: 2, limit: 3}}\n")
    config = load_config(child)
    assert config.workload == {"name": "chain", "prompts": 64, "chunks": 2, "seed": 0, "limit": 3}
    config = load_config(demo, ["workload='chain:chunks=2,limit=3'"])
    assert config.workload == {"name": "chain", "prompts": 64, "chunks": 2, "seed": 0, "limit": 3}


def test_the_demo_is_named_as_before(demo: Path) -> None:
    """Folders that earlier versions measured into go on; they had another context policy."""
    before = load_config(demo, ["lmc.context=shared_prefix"])
    assert before.digest() == "69fc04ba4f6f4603"
