from __future__ import annotations

import pytest
import vllm

from lmc.connectors.vllm.config import TESTED_VLLM
from lmc.connectors.vllm.identity import check_vllm_version


def test_installed_vllm_is_a_tested_one() -> None:
    check_vllm_version()
    assert vllm.__version__.split("+")[0] in TESTED_VLLM


def test_untested_vllm_is_refused_naming_both() -> None:
    with pytest.raises(RuntimeError, match=r"vLLM 0\.33\.1 is not tested.*tested: 0\.32\.0"):
        check_vllm_version("0.33.1")
    check_vllm_version("0.32.0+cpu")
