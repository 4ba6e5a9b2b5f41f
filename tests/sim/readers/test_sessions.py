"""Logs of agents: each answer is a request, whose prompt is what led to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmc.sim.readers import FORMATS, read
from lmc.sim.readers.page import page
from lmc.sim.trace import Request
from tests.sim.readers.lines import opened

DOCS = Path(__file__).parents[3] / "docs"


def jsonl(*records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def claude(uuid: str, parent: str | None, role: str, content: Any, at: int, **more: Any) -> Any:
    message = {"role": role, "content": content} | more.pop("message", {})
    return {
        "type": role, "uuid": uuid, "parentUuid": parent, "sessionId": "s", "isSidechain": False,
        "timestamp": f"1970-01-01T00:00:{at:02}.000Z", "message": message,
    } | more  # fmt: skip


CALL = {"type": "tool_use", "id": "t1", "name": "Read", "input": {"file_path": "a.py"}}
RESULT = {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "x=1"}]}
CLAUDE = jsonl(
    {"type": "summary", "summary": "A test", "leafUuid": "a9"},
    claude("u1", None, "user", "Fix it.", 1),
    {"type": "progress", "uuid": "p1", "parentUuid": "u1", "timestamp": "1970-01-01T00:00:02Z"},
    claude("a1", "p1", "assistant", [{"type": "thinking", "thinking": "hm"},
           {"type": "text", "text": "I look."}], 3, message={"id": "m1"}),
    claude("a2", "a1", "assistant", [CALL], 4, message={"id": "m1"}),
    claude("u2", "a2", "user", [RESULT], 5),
    claude("a3", "u2", "assistant", [{"type": "text", "text": "Done."}], 6,
           message={"id": "m2", "usage": {"output_tokens": 77}}),
    # Taken back: another question in place of the one behind a3.
    claude("u3", "a3", "user", "And b?", 7),
    claude("u4", "a3", "user", "And c?", 8),
    claude("a4", "u4", "assistant", [{"type": "text", "text": "Too."}], 9, message={"id": "m3"}),
    claude("v1", None, "user", "Search.", 10, isSidechain=True, agentId="g"),
    claude("v2", "v1", "assistant", "Found.", 11, isSidechain=True, agentId="g"),
)  # fmt: skip


def codex(kind: str, at: int, **payload: Any) -> Any:
    return {"timestamp": f"1970-01-01T00:00:{at:02}.5Z", "type": kind, "payload": payload}


def item(at: int, kind: str, **fields: Any) -> Any:
    return codex("response_item", at, type=kind, **fields)


def message(at: int, role: str, text: str) -> Any:
    kind = "output_text" if role == "assistant" else "input_text"
    return item(at, "message", role=role, content=[{"type": kind, "text": text}])


CODEX = jsonl(
    codex("session_meta", 0, id="s", cwd="/x", base_instructions={"text": "Be brief."}),
    message(1, "developer", "Rules."),
    message(2, "user", "Fix it."),
    codex("event_msg", 2, type="user_message", message="Fix it."),
    codex("turn_context", 2, model="m"),
    item(3, "reasoning", summary=[], encrypted_content="gAAA"),
    item(3, "function_call", name="shell", arguments='{"cmd":"ls"}', call_id="c"),
    item(4, "function_call_output", call_id="c", output="a.py"),
    message(5, "assistant", "Done."),
    message(6, "user", "Thanks."),
    codex("compacted", 7, message="A file was fixed."),
    message(8, "user", "Go on."),
    message(9, "assistant", "Yes."),
)

OPENHANDS = json.dumps([
    {"id": 0, "source": "agent", "action": "system", "args": {"content": "You are."}},
    {"id": 1, "source": "user", "action": "message", "args": {"content": "Fix it."},
     "timestamp": "1970-01-01T00:00:01"},
    {"id": 2, "source": "agent", "action": "run", "args": {"command": "ls", "thought": "Look."},
     "tool_call_metadata": {"model_response": {"id": "r1", "usage": {"completion_tokens": 44}}},
     "timestamp": "1970-01-01T00:00:02"},
    {"id": 3, "source": "agent", "observation": "run", "content": "a.py", "extras": {},
     "timestamp": "1970-01-01T00:00:03"},
    {"id": 4, "source": "agent", "action": "read", "args": {"path": "a"},
     "tool_call_metadata": {"model_response": {"id": "r1"}}, "timestamp": "1970-01-01T00:00:04"},
    {"id": 5, "source": "agent", "observation": "read", "content": "x=1",
     "timestamp": "1970-01-01T00:00:05"},
    {"id": 6, "source": "environment", "observation": "agent_state_changed", "content": "",
     "timestamp": "1970-01-01T00:00:06"},
    {"id": 7, "source": "agent", "action": "finish", "args": {"thought": "Done."},
     "timestamp": "1970-01-01T00:00:07"},
])  # fmt: skip

TURNS = [
    {"role": "system", "content": "You are."},
    {"role": "user", "content": [{"type": "text", "text": "Fix it."}]},
    {"role": "assistant", "content": "I look.", "tool_calls": [{"function": {"name": "ls"}}]},
    {"role": "tool", "content": "a.py"},
    {"role": "assistant", "content": "Done."},
]
FILES = {
    "claude_code": CLAUDE,
    "codex": CODEX,
    "openhands": OPENHANDS,
    "trajectories": jsonl({"instance_id": "i", "messages": TURNS}),
}


def shown(reading: Any) -> list[list[tuple[str, str]]]:
    """Of each request (role, text) of the prompt."""
    found = []
    for r in reading:
        assert r.tokens is not None
        parts = [(role, reading.decode(r.tokens[a:b])) for role, a, b in r.segments]
        # The tokenizer of the tests has no decoder: bytes are letters, with spaces between.
        letters = [(role, text.replace(" ", "")) for role, text in parts]
        found.append([(r, t.replace("Ġ", " ").replace("Ċ", "\n")) for r, t in letters])
    return found


def framed(role: str, text: str) -> tuple[str, str]:
    return role, f"<|im_start|>{role}\n{text}<|im_end|>\n"


@pytest.mark.parametrize("name", FILES)
def test_each_is_recognised(name: str, tmp_path: Path, tokenizer: Path) -> None:
    reading = opened(tmp_path, FILES[name], tokenizer=tokenizer)
    requests = list(reading)
    assert (reading.format, reading.bad_count) == (name, 0)
    assert requests and [r.timestamp for r in requests] == sorted(r.timestamp for r in requests)
    assert facts(list(reading)) == facts(requests)  # once more


def facts(requests: list[Request]) -> list[Any]:
    return [
        (r.timestamp, r.session, r.output_tokens, None if r.tokens is None else r.tokens.tolist())
        for r in requests
    ]


def test_claude_code_follows_the_branch(tmp_path: Path, tokenizer: Path) -> None:
    reading = opened(tmp_path, CLAUDE, tokenizer=tokenizer)
    first, second, third, fourth = shown(reading)
    call = json.dumps({"name": "Read", "input": {"file_path": "a.py"}})
    asked, looks = framed("user", "Fix it."), framed("assistant", "I look.")
    assert first == [asked]
    assert second == [asked, looks, framed("assistant", call), framed("user", "x=1")]
    assert third == [*second, framed("assistant", "Done."), framed("user", "And c?")]
    assert fourth == [framed("user", "Search.")]
    requests = list(reading)
    assert [r.timestamp for r in requests] == [1, 5, 8, 10]  # when what is asked was complete
    assert [r.session for r in requests] == ["s", "s", "s", "s/g"]
    assert requests[1].output_tokens == 77


def test_calls_side_by_side_are_all_in_the_prompt(tmp_path: Path, tokenizer: Path) -> None:
    """Each result stands behind the line of its own call, and only one of them leads on."""
    other = CALL | {"id": "t2", "name": "Grep"}
    lines = [
        claude("u", None, "user", "Fix it.", 1),
        claude("b", "u", "assistant", [CALL], 2,
               message={"id": "m", "usage": {"output_tokens": 3}}),
        claude("c", "b", "assistant", [other], 3,
               message={"id": "m", "usage": {"output_tokens": 90}}),
        claude("d", "b", "user", [RESULT], 4),
        claude("e", "c", "user", [RESULT | {"content": "y=2"}], 5),
        claude("f", "e", "assistant", "Done.", 6, message={"id": "n"}),
        claude("g", "f", "assistant", "API Error", 7, message={"id": "x", "model": "<synthetic>"}),
    ]  # fmt: skip
    reading = opened(tmp_path, jsonl(*lines), tokenizer=tokenizer)
    _, second = shown(reading)
    assert [text for _, text in second][3:] == [framed("user", t)[1] for t in ("x=1", "y=2")]
    assert [role for role, _ in second] == ["user", "assistant", "assistant", "user", "user"]
    assert next(iter(reading)).output_tokens == 90  # of the last line


def test_a_wrong_line_costs_itself_alone(tmp_path: Path, tokenizer: Path) -> None:
    lines = CLAUDE.splitlines()
    for i, wrong in ((1, "{"), (3, lines[3].replace("1970-01-01T00:00:03.000Z", "noon"))):
        broken = "".join(f"{line}\n" for line in [*lines[:i], wrong, *lines[i + 1 :]])
        reading = opened(tmp_path, broken, tokenizer=tokenizer)
        prompts = shown(reading)
        assert reading.bad_count == 1
        assert any(framed("user", "x=1") in p and framed("user", "And c?") in p for p in prompts)


def test_copied_sessions_count_once(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "a.jsonl").write_text(CLAUDE)
    (tmp_path / "b.jsonl").write_text(CLAUDE)  # as one that is resumed begins
    assert len(list(read(tmp_path, tokenizer=tokenizer))) == 4


def test_sessions_without_times_follow_each_other(tmp_path: Path, tokenizer: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.traj").write_text(json.dumps({"history": TURNS}))
    reading = read(tmp_path, tokenizer=tokenizer)
    assert [(r.session, r.timestamp) for r in reading] == [
        ("a", 0), ("a", 1), ("b", 2), ("b", 3),
    ]  # fmt: skip
    assert reading.assumed.startswith("no times")


def test_codex_counts_what_is_hidden(tmp_path: Path, tokenizer: Path) -> None:
    count = codex("event_msg", 3, type="token_count",
                  info={"last_token_usage": {"output_tokens": 500}})  # fmt: skip
    lines = CODEX.splitlines()
    lines.insert(7, json.dumps(count))
    first, *_ = opened(tmp_path, "\n".join(lines), tokenizer=tokenizer)
    assert first.output_tokens == 500


def test_codex_items_become_requests(tmp_path: Path, tokenizer: Path) -> None:
    reading = opened(tmp_path, CODEX, tokenizer=tokenizer)
    first, second, third = shown(reading)
    call = json.dumps({"name": "shell", "arguments": '{"cmd":"ls"}'})
    rules = [framed("system", "Be brief."), framed("developer", "Rules.")]
    assert first == [*rules, framed("user", "Fix it.")]
    assert second == [*first, framed("assistant", call), framed("tool", "a.py")]
    said = [framed("user", t) for t in ("Fix it.", "Thanks.", "A file was fixed.", "Go on.")]
    assert third == [*rules, *said]
    assert [r.timestamp for r in reading] == [2.5, 4.5, 8.5]


def test_openhands_answers_of_several_actions_are_one(tmp_path: Path, tokenizer: Path) -> None:
    reading = opened(tmp_path, OPENHANDS, tokenizer=tokenizer)
    first, second = shown(reading)
    assert first == [framed("system", "You are."), framed("user", "Fix it.")]
    ran = json.dumps({"action": "run", "command": "ls", "thought": "Look."})
    did = [framed("assistant", ran), framed("tool", "a.py")]
    did += [framed("assistant", json.dumps({"action": "read", "path": "a"})), framed("tool", "x=1")]
    assert second == [*first, *did]
    assert [r.timestamp for r in reading] == [1, 5]
    assert next(iter(reading)).output_tokens == 44


@pytest.mark.parametrize("how", ["a line", "a file", "indented", "an array", "sharegpt"])
def test_conversations_however_they_are_written(how: str, tmp_path: Path, tokenizer: Path) -> None:
    record: dict[str, Any] = {"instance_id": "i", "history": TURNS, "info": {"timestamp": 5}}
    name = "t.traj"
    if how == "sharegpt":
        text, name = jsonl({"id": "i", "conversations": TURNS}), "t.jsonl"
    elif how == "an array":
        text = json.dumps([record])
        reading = opened(tmp_path, text, name, tokenizer=tokenizer, format="trajectories")
    else:
        text = json.dumps(record, indent=1 if how == "indented" else None)
    if how != "an array":
        reading = opened(tmp_path, text, name, tokenizer=tokenizer)
    first, second = shown(reading)
    assert first == [framed("system", "You are."), framed("user", "Fix it.")]
    assert second[2][0] == "assistant" and second[3] == framed("tool", "a.py")
    assert [r.session for r in reading] == ["i", "i"]


def test_a_folder_of_folders(tmp_path: Path, tokenizer: Path) -> None:
    for day in ("01", "02"):
        (tmp_path / "2026" / day).mkdir(parents=True)
        (tmp_path / "2026" / day / "rollout.jsonl").write_text(CODEX)
    (tmp_path / "notes.txt").write_text("no trace")
    reading = read(tmp_path, tokenizer=tokenizer)
    assert len(list(reading)) == 6 and reading.bad_count == 0


@pytest.mark.parametrize(
    ("name", "line", "reason"),
    [
        ("claude_code", claude("a", None, "user", 5, 1), "content: want text or a list"),
        ("claude_code", claude("a", None, "user", "x", 1, timestamp="noon"), "ISO date"),
        ("codex", codex("response_item", 1, type="dance"), "item of type 'dance'"),
        ("codex", codex("response_item", 1, type="message", role=5), "role: got 5, want text"),
        ("trajectories", {"messages": [5]}, "want one that is a list of {role, content}"),
        ("openhands", {"source": "user", "action": "message", "args": [1]}, "want a JSON object"),
    ],
)
def test_a_bad_line_is_told(
    name: str, line: Any, reason: str, tmp_path: Path, tokenizer: Path
) -> None:
    text = json.dumps([line]) if name == "openhands" else jsonl(line)
    reading = opened(tmp_path, text, format=name, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=reason):
        list(reading)


@given(
    name=st.sampled_from(list(FILES)), at=st.floats(0, 1), cut=st.integers(0, 30),
    put=st.binary(max_size=12),
)  # fmt: skip
def test_mutated_files(
    name: str, at: float, cut: int, put: bytes, folder: Path, tokenizer: Path
) -> None:
    data = FILES[name].encode()
    i = int(at * len(data))
    try:
        reading = opened(folder, data[:i] + put + data[i + cut :], format=name, tokenizer=tokenizer)
        assert len(list(reading)) == reading.count
    except ValueError as e:
        if isinstance(e, OSError):
            raise


def test_a_log_that_goes_in_circles_ends(tmp_path: Path, tokenizer: Path) -> None:
    lines = [claude("a", "b", "user", "x", 1), claude("b", "a", "user", "y", 2),
             claude("c", "b", "assistant", "z", 3)]  # fmt: skip
    (said,) = shown(opened(tmp_path, jsonl(*lines), tokenizer=tokenizer))
    assert said == [framed("user", "x"), framed("user", "y")]


@pytest.mark.parametrize("name", ["claude_code", "codex", "trajectories"])
def test_what_is_nested_too_deep_is_a_bad_line(name: str, tmp_path: Path, tokenizer: Path) -> None:
    deep = 700 * '[{"type": "tool_result", "content": ' + '"x"' + 700 * "}]"
    turns = [{"role": "user", "content": "DEEP"}, {"role": "assistant", "content": "x"}]
    line = {
        "claude_code": claude("a", None, "user", "DEEP", 1),
        "codex": item(1, "message", role="user", content="DEEP"),
        "trajectories": {"messages": turns},
    }[name]
    text = FILES[name] + jsonl(line).replace('"DEEP"', deep)
    reading = opened(tmp_path, text, tokenizer=tokenizer, format=name)
    before = len(list(opened(tmp_path, FILES[name], "u.jsonl", tokenizer=tokenizer, format=name)))
    assert len(list(reading)) == before
    assert reading.bad_count == 1


def test_a_folder_whose_first_file_says_nothing(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "a.jsonl").write_text(jsonl({"type": "summary", "leafUuid": "x"}))
    (tmp_path / "b.jsonl").write_text(CLAUDE)
    reading = read(tmp_path, tokenizer=tokenizer)
    assert (reading.format, len(list(reading))) == ("claude_code", 4)


def test_the_page_of_formats_is_up_to_date(tmp_path: Path, tokenizer: Path) -> None:
    assert (DOCS / "traces.md").read_text() == page()
    for name in FORMATS.names():
        form = FORMATS.load(name)
        options = {"tokenizer": tokenizer} if form.has_text else {}
        reading = opened(tmp_path, f"{form.example}\n", "t.jsonl", **options)
        assert reading.format == ("mooncake" if name == "timed_trace" else name)
        list(reading)
        assert reading.bad_count == 0, (name, reading.bad)
