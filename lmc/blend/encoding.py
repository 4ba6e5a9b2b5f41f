"""Context and position policies: how stored chunks were encoded, and where they are put.

They go with any strategy, on Hugging Face models; an engine stores what it serves, and puts chunks
where they stand.
"""

from typing import Literal

# Alone; behind the system prompt and nothing else; in a prompt with other chunks in front.
Context = Literal["isolated", "anchored", "first_seen"]
# Rotated to where they stand; all begin where the first of them does.
Position = Literal["global", "local"]
