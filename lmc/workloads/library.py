"""Sources of Python's standard library, which every Python carries, and what its functions do."""

from __future__ import annotations

import ast
import sysconfig
from functools import cache
from pathlib import Path


@cache
def sources() -> dict[str, str]:
    """Module -> its source, of all that are one file, by name."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(folder.glob("[a-z]*.py"))
    return {file.stem: file.read_text(encoding="utf-8") for file in files}


@cache
def descriptions() -> tuple[str, ...]:
    """Signature and docstring of each public function, as an agent is told of a tool."""
    found = []
    for module, source in sources().items():
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                text = ast.get_docstring(node)
                if text:
                    found.append(f"{module}.{node.name}({ast.unparse(node.args)})\n{text}")
    return tuple(found)
