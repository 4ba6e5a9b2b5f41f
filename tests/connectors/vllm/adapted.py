"""What the tests let an engine with LoRA adapters do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from vllm.lora.request import LoRARequest
from vllm.sampling_params import StructuredOutputsParams

from tests.connectors.vllm import persistent, sampled
from tests.connectors.vllm import scenarios as s

RANK = 4
SHAPES = {"q_proj": (128, 128), "k_proj": (128, 64), "v_proj": (128, 64), "o_proj": (128, 128)}
SHAPES = {f"self_attn.{name}": shape for name, shape in SHAPES.items()}
SHAPES |= {"mlp.gate_proj": (128, 256), "mlp.up_proj": (128, 256), "mlp.down_proj": (256, 128)}


def write_adapter(folder: Path, seed: int) -> None:
    """A random adapter of the tiny Llama, in PEFT's format."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(3):
        for module, (wide, out) in SHAPES.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            weights[f"{name}.lora_A.weight"] = torch.randn(RANK, wide, generator=generator) * 0.1
            weights[f"{name}.lora_B.weight"] = torch.randn(out, RANK, generator=generator) * 0.1
    save_file(weights, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "bias": "none",
        "target_modules": sorted({name.split(".")[1] for name in SHAPES}), "task_type": "CAUSAL_LM",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


REGEX = r"[ab]{3}[0-9]{4}[xyz]{5}"
SCHEMA = {
    "type": "object", "additionalProperties": False, "required": ["a", "b"],
    "properties": {"a": {"enum": ["x", "y"]}, "b": {"type": "boolean"}},
}  # fmt: skip


def beside(session: s.Session, folder: Path) -> dict[str, Any]:
    """All that one engine is asked: starting one takes longer."""
    results = {"sampled": sampled.in_steps(session), "structured": structured(session)}
    session.scheduler.connector._scheduler.reset()
    return results | {"adapted": adapted(session, folder)}


def structured(session: s.Session) -> dict[str, Any]:
    """Answers by a grammar, over exact and over moved KV, alone and beside others."""
    session.warm()
    parts = s.prompt(2, 0, 3)
    regex = {"structured_outputs": StructuredOutputsParams(regex=REGEX)}
    schema = {"structured_outputs": StructuredOutputsParams(json=SCHEMA)}
    asked: dict[str, Any] = {"save": False, "tokens": 12, "sampling": regex}
    results: dict[str, Any] = {"plain": s.plain(session, parts, tokens=12, sampling=regex)}
    for blend in ("prefix", "full_recompute"):
        results[blend] = session.fresh(parts, blend, **asked)
    results["epic"] = session.fresh(parts, s.EPIC, **asked)
    session.llm.reset_prefix_cache()
    ids = session.add(parts, s.EPIC, **asked), session.add(s.prompt(0), save=False, tokens=30)
    results["epic_beside"] = session.finish()[ids[0]]
    ending = schema | {"ignore_eos": False}
    said = session.fresh(parts, s.EPIC, save=False, tokens=60, sampling=ending)
    tokenizer = session.llm.get_tokenizer()
    texts = {name: tokenizer.decode(answer.tokens) for name, answer in results.items()}
    results["json"] = tokenizer.decode(said.tokens, skip_special_tokens=True)
    return results | {"texts": texts, "regex": REGEX}


def adapted(session: s.Session, folder: Path) -> dict[str, Any]:
    """Two adapters and none: what each finds, and what each answers."""
    for name, seed in (("first", 1), ("second", 2)):
        write_adapter(folder / name, seed)
    first = LoRARequest("first", 1, str(folder / "first"))
    second = LoRARequest("second", 2, str(folder / "second"))
    counts = persistent.counting(session)
    parts = s.prompt(2, 0, 3)
    of: dict[str, Any] = {"first": first, "second": second, "none": None}
    results: dict[str, Any] = {
        "plain": {name: s.plain(session, parts, lora=lora) for name, lora in of.items()},
        # Its digest came with that answer.
        "unknown": session.fresh(parts, lora=LoRARequest("third", 3, str(folder / "first"))),
    }
    session.warm(lora=first)
    results["others"] = {
        name: session.fresh(parts, "full_recompute", save=False, lora=of[name])
        for name in ("second", "none")
    }
    session.warm(lora=second)
    session.warm()
    for blend in ("prefix", "full_recompute"):
        results[blend] = {
            name: session.fresh(parts, blend, save=False, lora=lora) for name, lora in of.items()
        }
    # Rows of each under its own adapter, in one pass of the layers.
    del of["none"]
    alone = {n: session.fresh(parts, s.EPIC, save=False, lora=lora) for n, lora in of.items()}
    session.llm.reset_prefix_cache()
    session.together.clear()
    ids = {n: session.add(parts, s.EPIC, save=False, lora=lora) for n, lora in of.items()}
    answers = session.finish()
    results |= {"alone": alone, "together": {name: answers[i] for name, i in ids.items()}}
    results["claims"] = list(session.together)
    results["lost"] = lost(session, parts, first)
    # vLLM itself is wrong here, on a CPU (`keeping.misadapted`).
    session.llm.reset_prefix_cache()
    session.add([s.text(90, 64)], tokens=2)
    session.add([s.text(91, 64)], tokens=2, lora=first)
    session.finish()
    results["beside_an_adapter"] = session.fresh([s.text(90, 64), [7]], save=False)
    # Apart: beside adapters, vLLM gives what has none the last one, on a CPU.
    results["prompts"] = prompts(session, of) | prompts(session, {"none": None})
    results["changed"] = changed(session, parts, first, folder)
    return results | {"counts": counts}


def prompts(session: s.Session, loras: dict[str, Any]) -> dict[str, Any]:
    """Logprobs of prompts' tokens, all asked for at once: of answers, and of these as prompts."""
    text, results = s.text(95, 200), {}
    for name, lora in loras.items():
        said = s.plain(session, [text], lora=lora, tokens=20)
        results[name] = {"said": said.logprobs, "tokens": said.tokens}
    session.llm.reset_prefix_cache()
    ids = {}
    for name, lora in loras.items():
        parts = [text, results[name]["tokens"]]
        ids[session.add(parts, enabled=False, tokens=2, lora=lora, logprobs=True)] = name
        session.add([s.text(96, 60)], enabled=False, tokens=20, lora=lora)  # rows beside them
    while session.engine.has_unfinished_requests():
        for output in session.engine.step():
            if output.finished and (name := ids.get(output.request_id.split("-")[0])):
                tokens = zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
                results[name]["prompt"] = [of[i].logprob for i, of in list(tokens)[200:]]
    return results


def lost(session: s.Session, parts: list[list[int]], lora: Any) -> s.Answer:
    """A moved document is lost between plan and load: its rows are computed under the adapter."""
    session.llm.reset_prefix_cache()
    request = session.add(parts, "full_recompute", save=False, lora=lora)
    session.lose_last(next(iter(session.scheduler.connector._scheduler.requests.values())))
    answer = session.finish()[request]
    session.warm(lora=lora)  # what was lost is stored again
    return answer


def changed(session: s.Session, parts: list[list[int]], lora: Any, folder: Path) -> dict[str, Any]:
    """The adapter's files are others when vLLM loads it again; then they are the first ones again.

    Once because vLLM had let go of it, in the very step of a request that was planned before; and
    once because it was told to.
    """
    engine, files = session.engine, folder / "first"
    shutil.move(files, folder / "kept")
    write_adapter(files, 5)
    engine.remove_lora(1)
    session.llm.reset_prefix_cache()
    met = session.ask(parts, "full_recompute", lora=lora)
    plain = s.plain(session, parts, lora=lora)
    behind = session.fresh(parts, "full_recompute", save=False, lora=lora)
    shutil.rmtree(files)
    shutil.move(folder / "kept", files)
    engine.add_lora(LoRARequest("first", 1, str(files), load_inplace=True))
    session.fresh([s.text(9, 20)], enabled=False, tokens=2, lora=lora)  # the scheduler hears of it
    back = session.fresh(parts, "full_recompute", save=False, lora=lora)
    return {"met": met, "plain": plain, "behind": behind, "back": back}
