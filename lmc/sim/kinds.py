"""What tokens of a prompt are, as far as a cache that forgets nothing could have had them."""

KINDS = ("prefix", "moved", "repeated_within", "new")
PREFIX, MOVED, REPEATED_WITHIN, NEW = range(4)
