"""Reuse of KV cache at any position of a prompt, on stock vLLM and Hugging Face models."""

from importlib.metadata import version

from lmc.chunking.prompt import Prompt, prompt

__version__ = version("lmc")
__all__ = ["Prompt", "__version__", "prompt"]
