"""Why tokens of a prompt are computed although they might have been reused: one list for all.

A request's report, recorded traces, `lmc explain`, `lmc sim` and `lmc reuse` use these names.
"""

from __future__ import annotations

CAUSES = {
    # Nothing that is stored has it.
    "never_seen": "nothing like it was stored, as far as is remembered",
    "evicted": "it was stored, and gave way to others",
    "expired": "it was stored, and its time was over",
    "reset": "it was stored, and forgotten when caches were reset",
    "other_weights": "it was stored with weights that are not the model's any more",
    "other_salt": "it was stored under another cache salt",
    "no_room": "it was seen, but there was no room to keep it, or to bring it from its tier",
    "repeated_within": "this very prompt has it further in front, and nothing before it had",
    "open_end": "it is known as the open end of a prompt, which serves behind the same text only",
    "cut_elsewhere": "its text was stored in chunks with other borders",
    "other_order": "a prefix cache has it behind other text: known parts came in another order",
    "changed_prefix": "a prefix cache has it behind other text: something in front of it is new",
    "tier_silent": "a tier that might have it did not answer, or is left alone for a while",
    # Something has it.
    "being_stored": "it is being stored just now, or came when the request was planned already",
    "lost": "its chunk could not be brought or read",
    "other_context": "stored behind other text, which the context policy does not let be moved",
    "gate": "stored behind other text, and the quality gate refuses to move it",
    "strategy": "stored behind other text, and the strategy that was asked for moves nothing",
    "engine": "stored, and of no use where no rows can be computed and a gap is in front",
    "not_worth": "found, and to use it would cost more rows than it saves",
    "last_token": "the last token is always computed: the answer begins with it",
    "boundary": "the rows at the boundary of a moved run, which the strategy computes again",
    "chosen": "rows of moved tokens that the strategy computes again",
    "chosen_by_layer": "moved; a share of these rows, another in each layer, is computed again",
    # The request was none of lmc's.
    "plain": "lmc left the request to the engine; its reason says why",
    "not_begun": "the request ended before its turn came",
}
# What a client is told in place of a cause that would say what clients of other salts have stored.
FOLDED = {"other_salt": "never_seen"}


def told(cause: str | None) -> str | None:
    """A cause as a client may know it."""
    return None if cause is None else FOLDED.get(cause, cause)
