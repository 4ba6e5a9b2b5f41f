"""The text of a PTX kernel as a program: instructions, labels, registers and parameters.

PTX is read as the "PTX ISA" reference of NVIDIA, version 9.0, describes it, and of it what LLVM's
NVPTX back-end writes for one kernel without calls: one `.entry`, dynamic shared memory alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePosixPath


class FaultError(Exception):
    """What a kernel did that hardware would answer with a wrong result, a hang or an error."""


class UnsupportedError(Exception):
    """PTX that this executor does not know."""


@dataclass(frozen=True)
class Instruction:
    """`@!guard op operands;` and the source line that it was compiled from.

    parts: the op cut at its dots ("ld.global.v4.b32" -> ld, global, v4, b32);
    registers: all that it names, its guard aside; written: those that get a value;
    line: of the PTX, from 1.
    """

    parts: tuple[str, ...]
    operands: tuple[str, ...]
    guard: str | None
    negated: bool
    registers: frozenset[str]
    written: frozenset[str]
    text: str
    where: str
    line: int


@dataclass(frozen=True)
class Program:
    """threads: of a CTA; parameters: name to type, in order; kinds: type by prefix of a register;
    granule: bytes of the smallest access to (global, shared) memory."""

    name: str
    threads: int
    parameters: dict[str, str]
    kinds: dict[str, str]
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    granule: dict[str, int]

    def kind(self, register: str) -> str:
        """The type that a register was declared with, such as b32 or pred."""
        found = self.kinds.get(register) or self.kinds.get(register.rstrip("0123456789"))
        if found is None:
            raise UnsupportedError(f"register {register} is not declared")
        return found


_TOKEN = re.compile(
    r"""\s+
    | (?P<scope>[{}])
    | \.loc\s+(?P<file>\d+)\s+(?P<line>\d+)[^\n]*
    | \.file\b[^\n]*
    | (?P<label>[$\w%]+):(?!:)
    | (?P<statement>[^;{}]*(?:\{[^;{}]*\}[^;{}]*)*);""",
    re.VERBOSE,
)
_INSTRUCTION = re.compile(r"(?:@(!?)([%\w.]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
_REGISTER = re.compile(r"%(?:p|rs|r|rd|f|fd|h|hh|rq)\d+")
_DECLARED = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.DOTALL)
_GIVES_NOTHING = ("st", "red", "cp", "bar", "barrier", "fence", "stmatrix", "bra", "ret", "tcgen05")
_PARAMETER = re.compile(r"\.param\s+\.(\w+)[^,\n]*?\s([\w$]+)\s*(?=,|\n|$)")


@lru_cache(maxsize=256)
def parse(ptx: str) -> Program:
    """The program of the one kernel in `ptx`.

    Raises UnsupportedError where the text has no entry, several, or what is no statement of PTX.
    """
    entries = list(re.finditer(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{]*)\{", ptx, re.DOTALL))
    if len(entries) != 1:
        raise UnsupportedError(f"one .entry is needed, got {len(entries)}")
    entry = entries[0]
    threads = re.search(r"\.reqntid\s+(\d+)(?:\s*,\s*1)*\s*$", entry[3].strip())
    if threads is None:
        raise UnsupportedError(f"one .reqntid in x is needed, got {entry[3].strip()!r}")
    files = dict(re.findall(r'\.file\s+(\d+)\s+"([^"]+)"', ptx))
    body = re.sub(r"//[^\n]*", "", ptx[entry.end() :])
    before = ptx.count("\n", 0, entry.end())
    kinds: dict[str, str] = {}
    labels: dict[str, int] = {}
    instructions: list[Instruction] = []
    for kind, text, where, line in _scoped(_tokens(body, files)):
        if kind == "label":
            labels[text] = len(instructions)
        elif declared := _DECLARED.match(text):
            for name in declared[2].split(","):
                kinds[re.sub(r"<\d+>", "", name).strip()] = declared[1]
        elif not text.startswith((".pragma", ".loc")):
            instructions.append(_instruction(text, where, before + line, kinds))
    return Program(
        name=entry[1],
        threads=int(threads[1]),
        parameters={name: kind for kind, name in _PARAMETER.findall(entry[2])},
        kinds=kinds,
        instructions=tuple(instructions),
        labels=labels,
        granule={space: _granule(instructions, space) for space in ("global", "shared")},
    )


Token = tuple[str, str, str, int]


def _tokens(body: str, files: dict[str, str]) -> list[Token]:
    """(kind, text, source line, line of the body) up to the brace that closes the kernel."""
    tokens, at, where, depth, line = [], 0, "", 1, 1
    while depth:
        match = _TOKEN.match(body, at)
        if match is None:
            raise UnsupportedError(f"not PTX: {body[at : at + 60].strip()!r}")
        if match["file"]:
            where = f"{PurePosixPath(files.get(match['file'], '?')).name}:{match['line']}"
        for kind in ("scope", "label", "statement"):
            if text := (match[kind] or "").strip():
                begins = match.start(kind)
                begins += len(match[kind]) - len(match[kind].lstrip())
                tokens.append((kind, text, where, line + body.count("\n", at, begins)))
        line += body.count("\n", at, match.end())
        at = match.end()
        if match["scope"]:
            depth += 1 if match["scope"] == "{" else -1
    return tokens[:-1]


def _scoped(tokens: list[Token]) -> list[Token]:
    """The same without braces: what one pair of them declares has a name of its own."""
    found, renamed, scopes = [], [], 0
    for i, (kind, text, where, line) in enumerate(tokens):
        if kind == "scope":
            if text == "{":
                scopes += 1
                renamed.append({name: f"{name}.{scopes}" for name in _declared_inside(tokens, i)})
            else:
                renamed.pop()
            continue
        for names in renamed:
            for name, new in names.items():
                text = re.sub(rf"(?<![\w.%$]){re.escape(name)}(?![\w.])", new, text)
        found.append((kind, text, where, line))
    return found


def _declared_inside(tokens: list[Token], start: int) -> list[str]:
    names, depth = [], 0
    for kind, text, *_ in tokens[start:]:
        if kind == "scope":
            depth += 1 if text == "{" else -1
        elif kind == "label" and depth == 1:
            names.append(text)
        elif depth == 1 and (declared := _DECLARED.match(text)):
            names += [name.strip() for name in declared[2].split(",") if "<" not in name]
        if not depth:
            break
    return names


def _instruction(text: str, where: str, line: int, kinds: dict[str, str]) -> Instruction:
    match = _INSTRUCTION.fullmatch(text)
    if match is None:
        raise UnsupportedError(f"not an instruction: {text!r}")
    negated, guard, op, arguments = match.groups()
    named = frozenset(_REGISTER.findall(arguments)) | {
        name for name in kinds if "." in name and name in arguments
    }
    parts, operands = tuple(op.split(".")), tuple(_split(arguments))
    gets = operands[0] if operands and parts[0] not in _GIVES_NOTHING else ""
    return Instruction(
        parts=parts,
        operands=operands,
        guard=guard,
        negated=bool(negated),
        registers=named,
        written=frozenset(name for name in named if re.search(rf"{re.escape(name)}(?!\w)", gets)),
        text=" ".join(text.split()),
        where=where,
        line=line,
    )


def _split(arguments: str) -> list[str]:
    """Operands: cut at the commas that stand in no bracket."""
    found, depth, last = [], 0, 0
    for i, c in enumerate(arguments):
        depth += (c in "{[") - (c in "}]")
        if c == "," and not depth:
            found.append(arguments[last:i].strip())
            last = i + 1
    return [*found, rest] if (rest := arguments[last:].strip()) else found


def members(operand: str) -> list[str]:
    """The parts of `{a, b}`, or an operand alone."""
    return [x.strip() for x in operand.strip("{} ").split(",")]


def width(parts: tuple[str, ...]) -> tuple[int, int]:
    """(elements, bytes of each) that a load or store of one thread moves."""
    vector = next((int(x[1]) for x in parts if re.fullmatch(r"v\d", x)), 1)
    return vector, int(re.sub(r"\D", "", parts[-1])) // 8


def _granule(instructions: list[Instruction], space: str) -> int:
    """Bytes of the smallest access to a space: so fine are races told apart."""
    sizes = [16]
    for x in instructions:
        spaces = {part.partition("::")[0] for part in x.parts}
        if x.parts[0] in ("ld", "st", "atom", "red") and space in spaces:
            elements, size = width(x.parts)
            sizes.append(elements * size)
        elif x.parts[:2] == ("cp", "async") and len(x.operands) > 2:
            sizes.append(int(x.operands[2], 0))
    return min(sizes)
