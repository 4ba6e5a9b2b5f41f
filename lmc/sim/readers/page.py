"""The page of trace formats: docs/traces.md, and what `lmc trace formats` prints."""

from __future__ import annotations

from lmc.sim.readers import FORMATS

HEAD = """\
# Trace formats

`lmc trace info`, `lmc plan`, `lmc sim`, `lmc reuse` and `lmc lint` read these, plain or compressed
(gzip, xz, zstd, bzip2), as a file, a folder of files, or a pipe (`-`, `<(...)`). The format is
told from the first bytes; `--format NAME:field=value` says it. Lines that cannot be read are
counted, told and left out; `--strict` stops at the first. This page is what `lmc trace formats`
prints.

Prompts of *text* need `--tokenizer`: a tokenizer.json or its folder, a model of `lmc model export`,
or a name of the hub. What was tokenised once is kept in `~/.cache/lmc/traces`, 4 GiB at most, for
its user alone. Ids of blocks show what a prefix cache can find and nothing else; lengths alone
show nothing of a cache, and `lmc trace info` tells of them. In a notebook, `lmc.read_trace` takes a
path, or records such as the rows of a data set: `lmc.read_trace(datasets.load_dataset(...),
tokenizer=...)`.
"""


def page() -> str:
    """All formats with an example each, in Markdown."""
    parts = [HEAD]
    for name in FORMATS.names():
        if name == "timed_trace":
            continue  # mooncake under another name
        form = FORMATS.load(name)
        # A docstring's lines belong to one sentence; its paragraphs and its fields do not.
        about = [" ".join(part.split()) for part in (form.__doc__ or "").split("\n\n")]
        kind = "text" if form.has_text else "no text"
        parts.append("\n\n".join([f"## {name}", f"*{kind}.* {about[0]}", *about[1:]]))
        parts.append(f"```\n{form.example}\n```\n")
    return "\n".join(parts)
