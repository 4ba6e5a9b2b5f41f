"""Hugging Face decoders: rows of them recomputed against reused KV, without a patch.

`answer` is the one call for a notebook; `HFModel`, `HFStore` and `run_blend` are its parts.
`PrefixStore` reuses beginnings alone, exactly, of models that cannot be blended too.
"""

from lmc.connectors.hf.answer import Answer, answer
from lmc.connectors.hf.model import HFModel
from lmc.connectors.hf.prefix import PrefixStore
from lmc.connectors.hf.serve import Blended, run_blend
from lmc.connectors.hf.store import HFStore

__all__ = ["Answer", "Blended", "HFModel", "HFStore", "PrefixStore", "answer", "run_blend"]
