"""Places behind a network that hold bytes by key: what they hold of chunks, and how it is found."""
