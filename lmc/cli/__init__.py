"""The command line: every command, and what all of them print alike."""
